"""An export that is written in seconds, without data and training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx

from geotoken_jax import GeoToken, Prediction, backbone, checkpoint, records, settings
from geotoken_jax.align.heads import AlignSettings, embeddings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.data.join import neighbors
from geotoken_jax.export import stablehlo
from geotoken_jax.gallery import index, table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.model import reranker
from geotoken_jax.model.comparator import ComparatorSettings, ComparatorTask
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict import bundle, channels, export_format, parts
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.vectors import unit
from tests import tiny

PHOTOS = 64
#: Largest differences between the answers of a program and of the package: degrees, share of a radius, probability.
DEGREES, RADIUS, PROBABILITY = 1e-4, 0.01, 0.01


def of_channels(config: Any) -> None:
    """Changes a configuration: the reranker chooses, and the gallery is in int8 and has photos of several sources."""
    config.reranker.model.sources = True
    config.predict.update(selectors=("greedy", "reranker"), choice="reranker")
    config.export.gallery = "int8"


def of_samples(config: Any) -> None:
    """Changes a configuration: no search, a choice by the location tower, and a decoder that reads capture times."""
    config.predict.search.expansions = 0
    config.predict.update(selectors=("greedy", "similarity"), choice="similarity")
    config.model.update(dtype="float32", context="season")


def published(config: Any) -> None:
    """Changes a configuration: the architecture of the paper, and the greedy candidate."""
    config.model.update(config.variants.paper.model)
    config.model.dtype = "float32"
    config.predict.update(config.variants.paper.predict)


def photos(n: int = 11) -> list[np.ndarray]:
    """Returns random photos of different sizes. A batch of 11 is padded."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*rng.integers(20, 60, 2), 3)).astype(np.uint8) for _ in range(n)]


def compare(found: list[dict[str, Any]], expected: list[Prediction]) -> None:
    """Asserts that standalone.py predicts the same as the package."""
    for one, wanted in zip(found, expected, strict=True):
        at = np.array([(p["latitude"], p["longitude"]) for p in (one, *one.get("places", ()))])
        places = np.array([(p.latitude, p.longitude) for p in (wanted, *(wanted.places or ()))])
        # At a pole, all longitudes are the same place.
        assert great_circle_km(*at.T, *places.T).max() < 111 * DEGREES
        for name in ("radius_km", "radius_90_km"):
            assert one[name] == pytest.approx(getattr(wanted, name), rel=RADIUS)
        assert list(one["within"].values()) == pytest.approx(list(wanted.within.values()), abs=PROBABILITY)
        assert [n["id"] for n in one["neighbors"]] == [n.id for n in wanted.neighbors]
        assert len({tuple(c["tokens"]) for c in one["candidates"]}) == len(wanted.candidates)


def candidates(folder: Path, photos: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the package's candidates of photos, their vectors `query`, and the gallery rows of their neighbors."""
    model, found = GeoToken.load(folder), parts.read(folder)
    query = embeddings(found.aligned, model._backbone.images(np.stack([model.prepare(photo) for photo in photos])))
    gallery, options = table.Table(folder / "gallery"), found.decoder.settings
    vectors = table.index_vectors(gallery.embeddings())
    rows, scores = index.exact(vectors, table.index_vectors(query), options.neighbors)
    batch = {"query": query, "context": np.zeros((len(query), 3), np.float32)}  # no capture time is known
    batch |= neighbors(gallery, rows, options.cells)
    pool = Decoder(found.decoder, found.predict, gallery)(batch, rows, scores, np.zeros(len(query), np.int64))
    return {**pool.candidates._asdict(), "coordinates": pool.coordinates, "query": query, "rows": rows}


def write(folder: Path, change: Callable[[Any], None] | None = None, *, program: bool = False) -> None:
    """Writes an export as `geotoken export` does: a model of random parameters, and a gallery of PHOTOS photos.

    change: function that changes the configuration first. program: whether to write the program and standalone.py, too.
    """
    config = tiny.get_config()
    config.predict.update(selectors=("greedy", "expected_geoscore"), choice="expected_geoscore")
    config.predict.search.update(expansions=8)
    if change:
        change(config)
    reranked = config.predict.choice == "reranker"
    read = {
        "format": export_format.FORMAT,
        "backbone": {name: config.embed[name] for name in settings.names(backbone.BackboneSettings)},
        "align": config.align.model,
        "model": {**config.model, "attention": "xla"},
        "predict": config.predict,
        "learned": {"reranker": config.reranker.model, "comparator": config.channels.comparator} if reranked else {},
        "index": {"threads": 1},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.plain(read)))
    width = config.model.backbone_width
    align = AlignTask(settings.read(AlignSettings, read["align"], "align"), width).init(nnx.Rngs(0))
    model = settings.read(ModelSettings, read["model"], "model")
    for name, module in (("align", align), ("geotoken", GeoTokenModel(model, nnx.Rngs(0)))):
        save(folder / f"{name}.safetensors", module)
    rng = np.random.default_rng(0)
    places = rng.uniform((-80, -180), (80, 180), (PHOTOS, 2))
    names = np.array([f"photo-{n}" for n in range(PHOTOS)], "S32")
    columns = {
        "embeddings": rng.normal(size=(PHOTOS, 3, width)).astype(ml_dtypes.bfloat16),
        "coordinates": places,
        "tokens": CellScheme(20, 1).encode(*places.T).astype(np.uint8),
        "ids": names,
        "authors": names,
        "sources": np.array([(b"trips", b"street", b"flickr")[n % 3] for n in range(PHOTOS)]),
    }
    half = PHOTOS // 2
    for shard, rows in enumerate((slice(0, half), slice(half, PHOTOS))):
        table.write_shard(folder / "gallery", shard, 2, {name: values[rows] for name, values in columns.items()})
    if config.export.gallery == "int8":
        table.quantize(folder / "gallery")
    gallery = table.Table(folder / "gallery")
    how = settings.read(index.IndexSettings, config.index.search, "index.search")
    index.build(table.IndexVectors(gallery), how, epath.Path(folder / "gallery" / "index"))
    if reranked:
        write_reranker(folder, config, gallery, align)
    if program:
        stablehlo.write(epath.Path(folder))
    write_sums(folder)


def write_reranker(folder: Path, config: Any, gallery: table.Table, align: Any) -> None:
    """Writes a random reranker and the channels that it searches, with two images per photo of the gallery."""
    options = settings.read(reranker.RerankerSettings, config.reranker.model, "reranker.model")
    compared = settings.read(ComparatorSettings, config.channels.comparator, "channels.comparator")
    comparator = ComparatorTask(compared, np.zeros(gallery.width, np.float32)).init(nnx.Rngs(2))
    features, n = len(reranker.names(options)), len(options.channels)
    moments = np.stack([np.zeros(features), np.ones(features)]).astype(np.float32)
    network = reranker.Reranker(options, moments, np.ones(n, np.float32), rngs=nnx.Rngs(3))
    # The initial weights of most features are 0.
    network.linear.kernel[...] += 0.3 * jax.random.normal(jax.random.key(3), network.linear.kernel.shape)
    rng = np.random.default_rng(1)
    images = np.asarray(gallery.embeddings()[:, 0], np.float32)
    both = np.concatenate([images, images + rng.normal(0, 0.3, images.shape).astype(np.float32)])
    matrix = channels.whitening(images)
    vectors = {
        "backbone": channels.whitened(matrix, images),
        "comparator": channels.encode(comparator, both),
        "location": unit(np.asarray(align.location(gallery.coordinates().astype(np.float32)), np.float32)),
    }
    how = {**config.index.search, "kind": "exact", "reorder_dtype": config.channels.dtype}
    for name, values in vectors.items():
        place = epath.Path(folder / "channels" / name)
        place.mkdir(parents=True)
        index.build(values, settings.read(index.IndexSettings, how, "index.search"), place / "index")
    records.save_array(epath.Path(folder / "channels" / "owner.npy"), np.tile(np.arange(len(images)), 2))
    records.save_array(epath.Path(folder / "channels" / "backbone" / "whitening.npy"), matrix)
    save(folder / "channels" / "comparator" / "parameters.safetensors", comparator)
    (folder / "reranker").mkdir()
    save(folder / "reranker" / "parameters.safetensors", network)


def save(file: Path, module: nnx.Module) -> None:
    checkpoint.write_parameters(epath.Path(file), jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module))))


def write_sums(folder: Path) -> None:
    """Writes the SHA-256 sums of an export's files as they are now."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != bundle.SUMS)
    sums = "".join(f"{bundle.sha256(file)}  {file.relative_to(folder)}\n" for file in files)
    (folder / bundle.SUMS).write_text(sums)
