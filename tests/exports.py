"""An export that is written in a second, without data and training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from geotoken_jax import backbone, checkpoint, settings
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.gallery import index, table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict import bundle, export_format
from tests import tiny


def write(folder: Path, change: Callable[[Any], None] | None = None) -> None:
    """Writes an export like `geotoken export` does: a model of random parameters, and a gallery of 64 photos.

    change: function that changes the configuration first.
    """
    config = tiny.get_config()
    config.predict.update(selectors=("greedy", "expected_geoscore"), choice="expected_geoscore")
    config.predict.search.update(expansions=8)
    if change:
        change(config)
    read = {
        "format": export_format.FORMAT,
        "backbone": {name: config.embed[name] for name in settings.names(backbone.BackboneSettings)},
        "align": config.align.model,
        "model": {**config.model, "attention": "xla"},
        "predict": config.predict,
        "learned": {},
        "index": {"threads": 1},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.plain(read)))
    align = AlignTask(settings.read(AlignSettings, read["align"], "align"), config.model.backbone_width)
    model = settings.read(ModelSettings, read["model"], "model")
    for name, module in (("align", align.init(nnx.Rngs(0))), ("geotoken", GeoTokenModel(model, nnx.Rngs(0)))):
        checkpoint.write_parameters(folder / f"{name}.safetensors", nnx.to_pure_dict(nnx.state(module)))
    rng = np.random.default_rng(0)
    places = rng.uniform((-80, -180), (80, 180), (64, 2))
    names = np.array([f"photo-{n}" for n in range(len(places))], "S32")
    columns = {
        "embeddings": rng.normal(size=(len(places), 3, config.model.backbone_width)).astype(ml_dtypes.bfloat16),
        "coordinates": places,
        "tokens": CellScheme(20, 1).encode(*places.T).astype(np.uint8),
        "ids": names,
        "authors": names,
    }
    table.write_shard(folder / "gallery", 0, 1, columns)
    how = settings.read(index.IndexSettings, config.index.search, "index.search")
    index.build(table.index_vectors(columns["embeddings"]), how, folder / "gallery" / "index")
    write_sums(folder)


def write_sums(folder: Path) -> None:
    """Writes the SHA-256 sums of an export's files as they are now."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != bundle.SUMS)
    sums = "".join(f"{bundle.sha256(file)}  {file.relative_to(folder)}\n" for file in files)
    (folder / bundle.SUMS).write_text(sums)
