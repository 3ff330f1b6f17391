"""Photos against a gallery of encoded coordinates, as GeoCLIP chooses (Vivanco Cepeda et al. 2023, section 3.2)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Float32, Int32

from geotoken_jax import records
from geotoken_jax.batch import blocks
from geotoken_jax.gallery import index, int8
from geotoken_jax.gallery.index import Vectors

#: Coordinates encoded at once, always: a capsule of 1,024 holds 17 MB of each layer's numbers.
_BLOCK = 4096
#: Rows of a product at a time: 512 photos against 16,384 places are 34 MB of logits.
_PHOTOS, _PLACES = 512, 16_384


def encoder(
    module: nnx.Module, vectors: Callable[[Any, jax.Array], jax.Array]
) -> Callable[[Float[np.ndarray, "N 2"]], Iterator[Float32[np.ndarray, "n E"]]]:
    """Returns what yields the vectors of coordinates, block by block, each of length 1; compiled once.

    vectors: module, and latitudes and longitudes [n, 2] in degrees -> vectors [n, E].
    """

    @nnx.jit
    def run(module: nnx.Module, block: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            found = vectors(module, block)
        return found / jnp.linalg.norm(found, axis=-1, keepdims=True)

    def encode(coordinates: Float[np.ndarray, "N 2"]) -> Iterator[Float32[np.ndarray, "n E"]]:
        for block, n in blocks(coordinates, _BLOCK):
            yield np.asarray(run(module, jnp.asarray(block, jnp.float32)))[:n]

    return encode


def save(path: epath.Path, blocks: Iterable[Float32[np.ndarray, "n E"]], n: int, width: int) -> None:
    """Writes blocks as one array [n, width] of bfloat16, whole or not at all, and never whole in memory: of 4.12
    million places 768 wide it is 6.3 GB."""
    beside = path.parent / f".{path.name}.partial"
    array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint16, shape=(n, width))
    first = 0
    for block in blocks:
        array[first : first + len(block)] = block.astype(ml_dtypes.bfloat16).view(np.uint16)
        first += len(block)
    array.flush()
    beside.replace(path)


def open(path: epath.Path) -> Vectors:
    """Memory-maps what `save` wrote, or `quantize` made of it."""
    values = records.open_array(path)
    if values.dtype == np.int8:
        return int8.Quantized(values, records.open_array(_scales(path)))
    return values.view(ml_dtypes.bfloat16)


def quantize(path: epath.Path) -> None:
    """Makes int8 of what `save` wrote."""
    int8.write(records.open_array(path, ml_dtypes.bfloat16), path, _scales(path))


def _scales(path: epath.Path) -> epath.Path:
    return path.with_suffix(".scales.npy")


def rank(
    places: Vectors, photos: Float32[np.ndarray, "B E"], k: int
) -> tuple[Int32[np.ndarray, "B k"], Float32[np.ndarray, "B k"]]:
    """Returns rows and log-probabilities of each photo's k most probable places, best first.

    photos: vectors times the logit scale, so that products with `places` are logits; the softmax is over all places.
    """
    rows, logits = index.exact(places, photos, k)
    total = np.full(len(photos), -np.inf, np.float32)
    for first in range(0, len(places), _PLACES):
        block = jnp.asarray(places[first : first + _PLACES], jnp.float32)
        for q in range(0, len(photos), _PHOTOS):
            part = slice(q, q + _PHOTOS)
            total[part] = np.logaddexp(total[part], _log_sum(jnp.asarray(photos[part]), block))
    return rows, logits - total[:, None]


@jax.jit
def _log_sum(photos: jax.Array, places: jax.Array) -> jax.Array:
    logits = jnp.matmul(photos, places.T, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.logsumexp(logits, axis=1)
