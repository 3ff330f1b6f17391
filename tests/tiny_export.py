"""Makes a folder like those of `geotoken export` in seconds, with random weights and 40 synthetic photos."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from configs import common
from geotoken_jax import checkpoint, manifests, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings, embeddings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.data.join import neighbors
from geotoken_jax.export import stablehlo
from geotoken_jax.gallery import index, table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict.decode import Decoder, PredictSettings

WIDTH, PHOTOS = 12, 40
#: Settings of the demo that differ from the paper's architecture, apart from sizes.
OURS = dict(
    norm="pre", activation="gelu", positions="factored", memory="compact", tie_tokens=True, copy_head=True,
    similarities=True,
)  # fmt: skip


def write(folder: Path, model: dict | None = None, predict: dict | None = None) -> np.ndarray:
    """Writes the folder, and returns features [PHOTOS, WIDTH] of photos to predict."""
    config = common.get_config()
    config.model.update(
        backbone_width=WIDTH, width=16, heads=2, encoder_layers=2, decoder_layers=2, feed_forward=16, neighbors=3,
        group=4, dtype="float32", attention="xla", **(model or {}),
    )  # fmt: skip
    config.predict.update(samples=5, batch_size=8, **(predict or {}))
    config.predict.search.expansions = 0
    config.predict.update(selectors=("greedy",), choice="greedy")
    config.align.model.update(hidden=8)
    config.align.model.location.update(fourier=4, hidden=4, out=4)
    read = {"align": config.align.model, "model": config.model, "predict": config.predict}
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2 * PHOTOS, WIDTH)).astype(np.float32)
    aligned = AlignModel(settings.read(AlignSettings, read["align"], "align"), WIDTH, rngs=nnx.Rngs(0))
    options = settings.read(ModelSettings, read["model"], "model")
    decoder = GeoTokenModel(options, nnx.Rngs(1))
    decoder.head[...] *= 4  # without this all tokens have nearly equal probability
    manifests.write_json(epath.Path(folder) / "config.json", settings.plain(read))
    checkpoint.write_parameters(folder / "align.safetensors", nnx.to_pure_dict(nnx.state(aligned)))
    checkpoint.write_parameters(folder / "geotoken.safetensors", nnx.to_pure_dict(nnx.state(decoder)))
    coordinates = rng.uniform((-85, -180), (85, 180), (PHOTOS, 2))
    ids = np.array([f"photo{i}" for i in range(PHOTOS)], "S32")
    columns = {
        "embeddings": embeddings(aligned, features[:PHOTOS]).astype(ml_dtypes.bfloat16),
        "coordinates": coordinates,
        "tokens": CellScheme(20, 1).encode(*coordinates.T).astype(np.uint8),
        "ids": ids,
        "authors": ids,
    }
    half = PHOTOS // 2
    for shard, rows in enumerate((slice(0, half), slice(half, PHOTOS))):
        table.write_shard(folder / "gallery", shard, 2, {name: values[rows] for name, values in columns.items()})
    align = settings.read(AlignSettings, read["align"], "align")
    chosen = settings.read(PredictSettings, read["predict"], "predict")
    stablehlo.write(epath.Path(folder), align, options, chosen, WIDTH)
    return features[PHOTOS:]


def answers(folder: Path, features: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the package's own candidates, by exact search."""
    read = json.loads((folder / "config.json").read_text())
    options = settings.read(ModelSettings, read["model"], "model")
    task = AlignTask(settings.read(AlignSettings, read["align"], "align"), WIDTH)
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(options, rngs))
    gallery = table.Table(folder / "gallery")
    decoder = Decoder(model, settings.read(PredictSettings, read["predict"], "predict"), gallery)
    query = embeddings(checkpoint.read_module(folder / "align.safetensors", task.init), features)
    vectors = table.index_vectors(gallery.embeddings())
    rows, scores = index.exact(vectors, table.index_vectors(query), options.neighbors)
    batch = {"query": query, **neighbors(gallery, rows, options.cells)}
    pool = decoder(batch, rows, scores, np.zeros(len(query), np.int64))
    return {**pool.candidates._asdict(), "coordinates": pool.coordinates, "query": query, "rows": rows}


def compare(told: list[dict], wanted: dict[str, np.ndarray], within: float = 1e-4) -> None:
    """Asserts that predictions of standalone.py equal the package's in tokens, coordinates and log-probabilities."""
    tokens = np.array([[c["tokens"] for c in answer["candidates"]] for answer in told])
    np.testing.assert_array_equal(tokens, wanted["tokens"])
    at = [[(c["latitude"], c["longitude"]) for c in answer["candidates"]] for answer in told]
    np.testing.assert_allclose(at, wanted["coordinates"], rtol=0, atol=1e-6)
    log_p = [[c["log_probability"] for c in answer["candidates"]] for answer in told]
    np.testing.assert_allclose(log_p, wanted["log_probability"], rtol=0, atol=within)
