"""A tiny decoder in each architecture, and batches for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geotoken_jax.gallery import placement
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model import batch as contract
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.model.task import GeoTokenTask, LossSettings

C, M = 12, 3
CELLS = CellScheme(level=6, group=2)
_OURS = dict(norm="pre", activation="gelu", positions="factored", memory="full", tie_tokens=True, copy_head=True)
_PAPER = dict(norm="post", activation="relu", positions="sinusoidal", memory="full", tie_tokens=False, copy_head=False)
FORMS = {
    "paper": _PAPER,
    "ours": _OURS,
    "compact": {**_OURS, "memory": "compact", "similarities": True},
    "gated": {**_OURS, "activation": "swiglu", "qk_norm": True},
    "gated_post": {**_PAPER, "activation": "geglu", "qk_norm": True},
    "without_neighbor_tokens": {**_OURS, "copy_head": False, "neighbor_tokens": False},
}


def settings(form: str, **changes) -> ModelSettings:
    """Level 6 in groups of 2: vocabularies 6, 16, 16, 16."""
    values = dict(
        scheme="s2", level=6, group=2, backbone_width=C, neighbors=M, width=16, heads=2, feed_forward=24,
        encoder_layers=1, decoder_layers=2, dropout=0.0, neighbor_tokens=True, neighbor_embeddings=True,
        neighbor_dropout=0.0, similarities=False, context="none", qk_norm=False, attention="auto",
        attention_dropout=0.0, dtype="float32", remat="none", parametrization="standard", base_width=16, base_heads=2,
        base_layers=1,
    )  # fmt: skip
    return ModelSettings(**{**values, **FORMS[form], **changes})


def model(form: str, **changes) -> GeoTokenModel:
    """Returns a model with random parameters far from their initial values, so that every part affects the output."""
    s = settings(form, **changes)
    graph, state = nnx.split(nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    scale = {"scale": (1.0, 0.2), "kernel": (0.0, 0.4)}  # of norms and linear layers; others have (0, 0.5)

    def values(path, variable):
        mean, deviation = scale.get(path[-1], (0.0, 0.5))
        return variable.replace(jnp.asarray(rng.normal(mean, deviation, variable.shape), jnp.float32))

    return nnx.merge(graph, nnx.from_flat_state([(path, values(path, v)) for path, v in nnx.to_flat_state(state)]))


def task(s: ModelSettings, where: str = "host", mesh=None) -> GeoTokenTask:
    """Returns the task with the paper's loss weights. where: placement of the gallery."""
    return GeoTokenTask(s, LossSettings(2.0, 1.0), placement.lookup(placement.GallerySettings(where, -1), mesh))


def batch(n: int = 4, cells: CellScheme = CELLS, seed: int = 0) -> dict[str, np.ndarray]:
    """Photos with 3, 2, 1, 0, 3, ... neighbors; neighbor m agrees with the photo's first m + 1 tokens and no more."""
    shapes = {name: array.shape for name, array in contract.spec(settings("ours"), n).items()}
    rng = np.random.default_rng(seed)
    sizes = np.array(cells.vocab_sizes)
    tokens = rng.integers(0, sizes, (n, cells.length))
    near = np.repeat(tokens[:, None], M, 1)
    for m in range(M):
        near[:, m, m + 1 :] = (near[:, m, m + 1 :] + 1 + m) % sizes[m + 1 :]
    return {
        "query": rng.normal(size=shapes["query"]).astype(np.float32),
        "neighbors": rng.normal(size=shapes["neighbors"]).astype(np.float32),
        "neighbor_tokens": near.astype(np.int32),
        "neighbor_count": (M - np.arange(n) % (M + 1)).astype(np.int32),
        "tokens": tokens.astype(np.int32),
        "valid": np.ones(n, bool),
    }


def neighbors(batch) -> Neighbors:
    return Neighbors(*(jnp.asarray(batch[name]) for name in ("neighbors", "neighbor_tokens", "neighbor_count")))


@nnx.jit
def forward(model: GeoTokenModel, batch, key=None):
    """Returns teacher-forced log-probabilities; compiled once for each form and shape."""
    return model(batch["query"], neighbors(batch), batch["tokens"], key, batch.get("context"))


@nnx.jit
def stepwise(model: GeoTokenModel, batch):
    """Returns the log-probabilities of the same tokens from the cache, two candidates a photo: the photo's own tokens,
    and the next photo's."""
    memory = model.encode(batch["query"], neighbors(batch), context=batch.get("context"))
    tokens = jnp.stack([batch["tokens"], jnp.roll(batch["tokens"], -1, 0)], 1)

    def step(cache, t):
        log_p, cache = model.step(cache, memory, t, tokens[:, :, jnp.maximum(t - 1, 0)], 2 * t)
        return cache, log_p

    _, found = jax.lax.scan(step, model.start(memory, 2, 2 * tokens.shape[-1]), jnp.arange(tokens.shape[-1]))
    return jnp.moveaxis(found, 0, 2)
