"""The stage `export`: writes a self-contained folder for prediction, with a model card."""

import shutil
from typing import Any

from etils import epath

from geotoken_jax import backbone, disk, settings
from geotoken_jax.backbone import checkpoint as published
from geotoken_jax.configuration import Config
from geotoken_jax.export import card, pictures, quantized, stablehlo
from geotoken_jax.gallery.table import Table
from geotoken_jax.manifests import Manifest, write_bytes, write_json
from geotoken_jax.predict import bundle, export_format
from geotoken_jax.workdir import Workdir, trained_selectors

#: Folder of an export that holds its backbone's checkpoint.
_BACKBONE = "backbone"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Writes export/ from the trained parameters, the gallery, the photos and the report of a work directory.

    The exported decoder is the variant config.evaluate.reference.
    """
    variant = config.evaluate.reference
    variant_config = config.variant(variant)
    trained = [
        "align",
        f"geotoken/{variant}",
        *(f"{name}/{variant}" for name in trained_selectors(variant_config.predict)),
    ]
    # The model card needs the report. The report is no input: a baseline added to it later does not change the export.
    workdir.manifest("report")
    inputs = [f"predictions/{variant}", *trained, "photos", "gallery"]
    section = variant_config.select("predict", "export")
    if not variant_config.export.authors:  # manifests of earlier versions lack this key, and still count as equal
        del section["export"]["authors"]
    stage = workdir.begin(config, "export", (), inputs, section)
    if stage.manifest:
        return [stage.manifest]
    workdir.check_backbone(variant_config.embed)
    folder = stage.path
    reference = _copy(variant_config, workdir, variant, folder)
    int8_cost = None
    if variant_config.export.gallery == "int8":
        int8_cost = quantized.quantize(workdir, variant_config.index.search, folder)
        int8_cost |= quantized.cost(variant_config, workdir, variant, folder)
    if workdir.model_settings(variant, variant_config.model).scheme.startswith("s2"):  # programs decode S2 cells only
        stablehlo.write(folder)
    counts = pictures.write(workdir, folder, variant_config, variant, Table(folder / "gallery").ids())
    shutil.rmtree(folder / "targets", ignore_errors=True)  # older targets contain older parameters
    card.write(folder, workdir, variant_config, variant, reference, int8_cost)
    sums = bundle.write_sums(folder)
    manifest = stage.finish({"files": len(sums), **counts}, sha256=sums, **({"int8": int8_cost} if int8_cost else {}))
    return [manifest]


def _copy(config: Config, workdir: Workdir, variant: str, folder: epath.Path) -> dict[str, Any] | None:
    """Writes settings, parameters, gallery, selectors, calibration and programs to the export.

    config: configuration with the variant's changes applied. Returns name and SHA-256 sums of the backbone's
    checkpoint, or None if the backbone has no checkpoint.
    """
    tower, reference = copy_backbone(folder, config.embed, config.export.weights)
    selectors = workdir.selectors(config, variant)
    aligned, model = workdir.aligned_settings(config.align.model), workdir.model_settings(variant, config.model)
    read = {
        "format": export_format.FORMAT,
        "backbone": tower,
        "checkpoint": reference,
        "align": aligned,
        "model": {**settings.plain(model), "attention": "xla"},  # runs on every device
        "predict": config.predict,
        "learned": selectors,
        "index": {"threads": config.index.search.threads},
    }
    write_json(folder / "config.json", settings.plain(read))
    for source, name in (("align", "align"), (f"geotoken/{variant}", "geotoken")):
        data = (workdir.path / source / "parameters.safetensors").read_bytes()
        write_bytes(folder / f"{name}.safetensors", data)
    trained = [(f"{name}/{variant}", name) for name in trained_selectors(config.predict)]
    channels = [("channels", "channels")] if "comparator" in selectors else []
    for source, name in (("gallery", "gallery"), *channels, *trained):
        workdir.copy_trained(source, folder / name)
    if not config.export.authors:
        for file in disk.matching(folder / "gallery", "authors-*.npy"):
            file.unlink()
    calibration = workdir.calibration_file(variant)
    if calibration.exists():
        write_bytes(folder / calibration.name, calibration.read_bytes())
    return reference


def copy_backbone(
    folder: epath.Path, options: backbone.BackboneSettings, weights: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the backbone's settings for config.json, and name, commit and SHA-256 sums of its checkpoint.

    Neither result contains a local path. The second result is None if the backbone has no checkpoint. It has a commit
    only if the checkpoint is from the Hugging Face hub.

    weights: whether to copy the checkpoint into the folder.
    """
    section = settings.plain({name: getattr(options, name) for name in settings.names(backbone.BackboneSettings)})
    path = section["huggingface"]["path"]
    section["huggingface"]["path"] = ""
    if section["backbone"] != "huggingface":
        return section, None
    source = published.folder(path)
    files = published.needed(source)
    if weights:
        (folder / _BACKBONE).mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / _BACKBONE / file.name)
        section["huggingface"]["path"] = _BACKBONE
    sums = {file.name: bundle.sha256(file) for file in files}
    name, commit = published.name(source)
    return section, {"name": name, **({"commit": commit} if commit else {}), "sha256": sums}
