"""The stage `export`: a folder that needs nothing else to answer, with a card that says what it is."""

import json
import pathlib
import shutil
from typing import Any

from etils import epath

from geotoken_jax import backbone, checkpoint, settings, workdir
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.export import stablehlo
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict import exported, learn
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.workdir import Manifest

#: Files that tell how a folder was made, or that making it needed.
_OF_THE_MAKING = (
    "manifest.json", "begun.json", "checkpoints", "metrics.jsonl", "parameters.txt", "tensorboard", "features.npy",
    "captured-*.npy",  # when the gallery's photos were taken is nobody else's business
)  # fmt: skip


def run(config: Any, path: epath.PathLike, variant: str) -> Manifest:
    """Makes export/ from the trained parameters, the gallery and the report of a work directory."""
    path = epath.Path(path)
    changed = settings.variant(config, variant)
    learned = learn.needed(changed)
    trained = ["align", f"geotoken/{variant}", *(f"{name}/{variant}" for name in learned)]
    stage = workdir.begin(path, "export", {"predict": changed.predict}, [*trained, "gallery", "report"])
    if stage.manifest:
        return stage.manifest
    search = settings.read(IndexSettings, changed.index.search, "index.search")
    read = {
        "backbone": {name: changed.embed[name] for name in settings.names(backbone.BackboneSettings)},
        "align": changed.align.model,
        "model": {**changed.model, "attention": "xla"},  # which every device has
        "predict": changed.predict,
        "learned": {name: changed[name].model for name in learned},
        "index": {"threads": search.threads},
    }
    workdir.write_json(stage.path / "config.json", settings.plain(read))
    for source, name in (("align", "align"), (f"geotoken/{variant}", "geotoken")):
        data = (path / source / "parameters.safetensors").read_bytes()
        workdir.write_bytes(stage.path / f"{name}.safetensors", data)
    for source, name in (("gallery", "gallery"), *((f"{name}/{variant}", name) for name in learned)):
        shutil.rmtree(stage.path / name, ignore_errors=True)
        shutil.copytree(path / source, stage.path / name, ignore=shutil.ignore_patterns(*_OF_THE_MAKING))
    calibration = path / "predictions" / variant / "calibration.json"
    if calibration.exists():
        workdir.write_bytes(stage.path / calibration.name, calibration.read_bytes())
    if changed.model.scheme == "s2":  # standalone.py knows no other cells
        _write_programs(stage.path, read, Table(path / "gallery").width)
    workdir.write_bytes(stage.path / "README.md", _card(path, changed, variant).encode())
    files = (file for file in sorted(pathlib.Path(stage.path).rglob("*")) if file.is_file())
    sums = {str(file.relative_to(stage.path)): exported.sha256(file) for file in files}
    sums.pop("begun.json", None)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    workdir.write_bytes(stage.path / exported.SUMS, lines.encode())
    return stage.finish({"files": len(sums)}, sha256=sums)


def _write_programs(folder: epath.Path, read: dict[str, Any], width: int) -> None:
    """Writes what answers without this package: two programs, and standalone.py, which runs them."""
    aligned = AlignTask(settings.read(AlignSettings, read["align"], "align"), width)
    options = settings.read(ModelSettings, read["model"], "model")
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(options, rngs))
    predict = settings.read(PredictSettings, read["predict"], "predict")
    embedding = stablehlo.embedding(checkpoint.read_module(folder / "align.safetensors", aligned.init), width)
    workdir.write_bytes(folder / "align.stablehlo", embedding)
    workdir.write_bytes(folder / "geotoken.stablehlo", stablehlo.decoding(model, predict))
    workdir.write_bytes(folder / "standalone.py", pathlib.Path(__file__).with_name("standalone.py").read_bytes())


def _card(path: epath.Path, config: Any, variant: str) -> str:
    """Returns the model card, written from the run's own manifests and metrics."""
    trained = workdir.read_manifest(path, f"geotoken/{variant}")
    photos = workdir.read_manifest(path, "photos")
    metrics = json.loads((path / "report" / "metrics.json").read_text())
    label = config.evaluate.labels.get(variant, variant)
    calibrated = workdir.read_manifest(path, f"predictions/{variant}").facts["calibrated"]
    sure = "The radii given with an answer are not calibrated."
    if calibrated:
        sure = "The radii given with an answer hold 50 and 90 % of its probability, calibrated on validation photos."
    alone = ""
    if config.model.scheme == "s2":
        alone = """
Without the package, with jax and numpy alone: `python standalone.py FEATURES.npy > answers.jsonl`; its first lines say
what it takes, and what it leaves out.
"""
    rows = []
    for split, found in metrics["splits"].items():
        for method in found["methods"]:
            if method["variant"] == variant and method.get("main"):
                values = " | ".join(f"{100 * v['value']:.1f}" for v in method["accuracy"])
                rows.append(f"| {split} | {values} |")
    return f"""# {label}

Tells where on Earth a photo was taken, as cells ({config.model.scheme}) as fine as S2's of level {config.model.level},
from the photo and its {config.model.neighbors} nearest neighbors in a gallery of {photos.counts["train"]:,} photos.

Data: {config.photos.source}.

Use: `from geotoken_jax import GeoToken; GeoToken.load("FOLDER").predict("photo.jpg")`.
{alone}
{trained.facts["parameters"]:,} parameters; trained on {trained.counts["examples"]:,} examples; validation loss
{trained.facts["best_loss"]:.4f} at step {trained.facts["best_step"]:,}.

Percent of photos within 1, 25, 200, 750 and 2500 km:

| split | 1 km | 25 km | 200 km | 750 km | 2500 km |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{sure} Do not use this model to find people.
"""
