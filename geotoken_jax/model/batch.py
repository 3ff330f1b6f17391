"""The decoder's batches: `data.join.Tokens` reads them, and `model.task.GeoTokenTask` trains on them."""

import jax.numpy as jnp
import numpy as np

from geotoken_jax import batch
from geotoken_jax.model.geotoken import ModelSettings


def spec(model: ModelSettings, size: int, on_device: bool = False) -> batch.Spec:
    """Returns the specification of a batch of `size` photos.

    query [B, 3, C] bfloat16: image, location and text embedding of each photo.
    tokens [B, T] int32: tokens of the photo's cell.
    neighbor_count [B] int32: number of real neighbors. They come first; the rest of the M neighbors is padding.
    neighbors [B, M, 3, C] bfloat16 and neighbor_tokens [B, M, T] int32: only if the gallery is on the host.
    neighbor_rows [B, M] int32: gallery rows, -1 if missing; only if the gallery is on the devices (on_device).
    context [B, times] float32: capture time (data.join.context); only if the model reads it.

    Batches of evaluation also have `valid` [B] bool, which the specification leaves out. It is False for examples that
    do not count, such as padding.
    """
    m, t, c = model.neighbors, model.cells.length, model.backbone_width
    neighbors = (
        {"neighbor_rows": ((m,), jnp.int32)}
        if on_device
        else {"neighbors": ((m, 3, c), jnp.bfloat16), "neighbor_tokens": ((m, t), jnp.int32)}
    )
    context = {"context": ((model.times,), jnp.float32)} if model.times else {}
    return batch.spec(
        size,
        query=((3, c), jnp.bfloat16),
        tokens=((t,), jnp.int32),
        neighbor_count=((), jnp.int32),
        **neighbors,
        **context,
    )


def random_batch(model: ModelSettings, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of `size` random photos, each with all M neighbors, for a gallery on the host."""
    sizes = np.array(model.cells.vocab_sizes)
    arrays = batch.random_batch(spec(model, size), seed, {"tokens": sizes, "neighbor_tokens": sizes})
    return {**arrays, "neighbor_count": np.full(size, model.neighbors, np.int32)}
