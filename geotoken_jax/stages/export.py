"""The stage `export`: a folder that needs nothing else to answer, with a card that says what it is."""

import pathlib
import shutil
from typing import Any

from etils import epath

from geotoken_jax import backbone, settings
from geotoken_jax.artifacts import Workdir, needed
from geotoken_jax.backbone import checkpoint as published
from geotoken_jax.configuration import Config
from geotoken_jax.export import card, pictures, quantized, stablehlo
from geotoken_jax.gallery.table import Table
from geotoken_jax.predict import bundle
from geotoken_jax.workdir import Manifest, write_bytes, write_json

#: Folder of an export that holds its backbone's checkpoint.
_BACKBONE = "backbone"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes export/ from the trained parameters, the gallery, the photos and the report of a work directory.

    The decoder is that of config.evaluate.reference.
    """
    variant = config.evaluate.reference
    own = config.variant(variant)
    trained = ["align", f"geotoken/{variant}", *(f"{name}/{variant}" for name in needed(own.predict))]
    inputs = [*trained, "photos", "gallery", "report"]
    stage = workdir.begin(config, "export", (), inputs, own.select("predict", "export"))
    if stage.manifest:
        return [stage.manifest]
    workdir.check_backbone(own.embed)
    folder = stage.path
    referred = _copy(own, workdir, variant, folder)
    lost = None
    if own.export.gallery == "int8":
        lost = quantized.quantize(workdir, own.index.search, folder)
        lost |= quantized.cost(own, workdir, variant, folder)
    counts = pictures.write(workdir, folder, own, variant, Table(folder / "gallery").ids())
    shutil.rmtree(folder / "targets", ignore_errors=True)  # of the parameters before these
    card.write(folder, workdir, own, variant, referred, lost)
    files = (file for file in sorted(pathlib.Path(folder).rglob("*")) if file.is_file())
    sums = {str(file.relative_to(folder)): bundle.sha256(file) for file in files}
    sums.pop("begun.json", None)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_bytes(folder / bundle.SUMS, lines.encode())
    made = stage.finish({"files": len(sums), **counts}, sha256=sums, **({"int8": lost} if lost else {}))
    return [made]


def _copy(config: Config, workdir: Workdir, variant: str, folder: epath.Path) -> dict[str, Any] | None:
    """Writes settings, parameters, gallery, selectors, calibration and programs; returns name and sums of the
    backbone's checkpoint, None where it has none. config: with the variant's changes made."""
    tower, referred = copy_backbone(folder, config.embed, config.export.weights)
    selectors = workdir.selectors(config, variant)
    aligned, model = workdir.aligned_settings(config.align.model), workdir.model_settings(variant, config.model)
    read = {
        "backbone": tower,
        "checkpoint": referred,
        "align": aligned,
        "model": {**settings.plain(model), "attention": "xla"},  # which every device has
        "predict": config.predict,
        "learned": selectors,
        "index": {"threads": config.index.search.threads},
    }
    write_json(folder / "config.json", settings.plain(read))
    for source, name in (("align", "align"), (f"geotoken/{variant}", "geotoken")):
        data = (workdir.path / source / "parameters.safetensors").read_bytes()
        write_bytes(folder / f"{name}.safetensors", data)
    for source, name in (("gallery", "gallery"), *((f"{name}/{variant}", name) for name in selectors)):
        workdir.copy_trained(source, folder / name)
    calibration = workdir.calibration_file(variant)
    if calibration.exists():
        write_bytes(folder / calibration.name, calibration.read_bytes())
    if model.scheme == "s2":  # standalone.py knows no other cells
        stablehlo.write(folder, aligned, model, config.predict, workdir.width)
    return referred


def copy_backbone(
    folder: epath.Path, options: backbone.BackboneSettings, weights: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the backbone's settings as config.json has them, and the name and sums of its checkpoint, None where it
    has none. weights: copy it into the folder. No path of this machine is in either."""
    section = settings.plain({name: getattr(options, name) for name in settings.names(backbone.BackboneSettings)})
    source = pathlib.Path(section["huggingface"]["path"])
    section["huggingface"]["path"] = ""
    if section["backbone"] != "huggingface":
        return section, None
    files = published.needed(source)
    if weights:
        (folder / _BACKBONE).mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / _BACKBONE / file.name)
        section["huggingface"]["path"] = _BACKBONE
    sums = {file.name: bundle.sha256(file) for file in files}
    return section, {"name": published.name(source), "sha256": sums}
