"""The decoder's batch: what `data.join.Tokens` reads and `model.task.GeoTokenTask` trains on."""

import jax.numpy as jnp
import numpy as np

from geotoken_jax import batch
from geotoken_jax.model.geotoken import ModelSettings


def spec(model: ModelSettings, size: int, on_device: bool = False) -> batch.Spec:
    """Returns the specification of a batch of `size` photos.

    query [B, 3, C] bfloat16: the photo's image, location and text embeddings. tokens [B, T] int32.
    neighbor_count [B] int32: number of neighbors that are real, the first ones. neighbors [B, M, 3, C] bfloat16 and
    neighbor_tokens [B, M, T] int32; or neighbor_rows [B, M] int32, gallery rows, -1 if missing, if on_device: the
    gallery is on the devices. context [B, times] float32, if the model reads when a photo was taken.
    Evaluation adds valid [B] bool: False for examples that only fill the batch up.
    """
    m, t, c = model.neighbors, model.cells.length, model.backbone_width
    near = (
        {"neighbor_rows": ((m,), jnp.int32)}
        if on_device
        else {"neighbors": ((m, 3, c), jnp.bfloat16), "neighbor_tokens": ((m, t), jnp.int32)}
    )
    context = {"context": ((model.times,), jnp.float32)} if model.times else {}
    return batch.spec(
        size, query=((3, c), jnp.bfloat16), tokens=((t,), jnp.int32), neighbor_count=((), jnp.int32), **near, **context
    )


def fake(model: ModelSettings, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of made-up photos, each with all its neighbors."""
    sizes = np.array(model.cells.vocab_sizes)
    found = batch.fake(spec(model, size), seed, {"tokens": sizes, "neighbor_tokens": sizes})
    return {**found, "neighbor_count": np.full(size, model.neighbors, np.int32)}
