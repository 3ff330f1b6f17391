"""The stage `export`: a folder that needs nothing else to answer, with a card that says what it is."""

import dataclasses
import pathlib
import shutil
from typing import Any

from etils import epath

from geotoken_jax import backbone, checkpoint, settings, workdir
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import checkpoint as published
from geotoken_jax.export import card, pictures, quantized, stablehlo
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
#: Folder of an export that holds its backbone's checkpoint.
_BACKBONE = "backbone"


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """config.export. gallery: numbers of its vectors, bfloat16 or int8, which costs what the model card says. weights:
    the checkpoint of a Hugging Face backbone is copied in; else it is referred to, and needed again to answer.
    thumbnails: pixels of the longest side of the gallery photos that the service's page shows beside an answer, 0 for
    none. examples: photos of `test` to try there, 0 for none."""

    gallery: str
    weights: bool
    thumbnails: int
    examples: int

    def __post_init__(self):
        if self.gallery not in ("bfloat16", "int8"):
            raise ValueError(f"config.export.gallery is {self.gallery!r}: it must be 'bfloat16' or 'int8'")
        for name in ("thumbnails", "examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.export.{name} is {getattr(self, name)}: use 0 for none, or more")


def run(config: Any, path: epath.PathLike, variant: str) -> Manifest:
    """Makes export/ from the trained parameters, the gallery, the photos and the report of a work directory."""
    path = epath.Path(path)
    changed = settings.variant(config, variant)
    learned = learn.needed(changed)
    trained = ["align", f"geotoken/{variant}", *(f"{name}/{variant}" for name in learned)]
    options = settings.read(ExportSettings, changed.export, "export")
    made_with = {"predict": changed.predict, "export": options}
    stage = workdir.begin(path, "export", made_with, [*trained, "photos", "gallery", "report"])
    if stage.manifest:
        return stage.manifest
    search = settings.read(IndexSettings, changed.index.search, "index.search")
    tower, referred = _backbone(stage.path, changed, options.weights)
    read = {
        "backbone": tower,
        "checkpoint": referred,
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
    lost = None
    if options.gallery == "int8":
        lost = {**quantized.quantize(path, stage.path), **quantized.cost(changed, path, variant, stage.path)}
    counts = pictures.write(path, stage.path, changed, variant, Table(stage.path / "gallery").ids())
    shutil.rmtree(stage.path / "targets", ignore_errors=True)  # of the parameters before these
    card.write(stage.path, path, changed, variant, referred, lost)
    files = (file for file in sorted(pathlib.Path(stage.path).rglob("*")) if file.is_file())
    sums = {str(file.relative_to(stage.path)): exported.sha256(file) for file in files}
    sums.pop("begun.json", None)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    workdir.write_bytes(stage.path / exported.SUMS, lines.encode())
    return stage.finish({"files": len(sums), **counts}, sha256=sums, **({"int8": lost} if lost else {}))


def _backbone(folder: epath.Path, config: Any, weights: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the backbone's settings as config.json has them, and the name and sums of its checkpoint, None where it
    has none. weights: copy it into the folder. No path of this machine is in either."""
    section = settings.plain({name: config.embed[name] for name in settings.names(backbone.BackboneSettings)})
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
    sums = {file.name: exported.sha256(file) for file in files}
    return section, {"name": published.name(source), "sha256": sums}


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
