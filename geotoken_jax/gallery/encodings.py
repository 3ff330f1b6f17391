"""Encodes the coordinates of gallery photos as vectors, and ranks these locations for a photo.

Source: GeoCLIP (Vivanco Cepeda et al. 2023, section 3.2).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Float32, Int32

from geotoken_jax import disk, records
from geotoken_jax.batch import blocks
from geotoken_jax.gallery import index
from geotoken_jax.gallery.index import Vectors

#: Coordinates per compiled call. A capsule of width 1,024 then has 17 MB of activations per layer.
_BLOCK = 4096
#: Photos and encoded locations per block of logits: 34 MB.
_PHOTOS, _LOCATIONS = 512, 16_384


def encoder(
    module: nnx.Module, vectors: Callable[[Any, jax.Array], jax.Array]
) -> Callable[[Float[np.ndarray, "N 2"]], Iterator[Float32[np.ndarray, "n E"]]]:
    """Returns a function that yields the unit vectors of coordinates, block by block. It is compiled only once.

    vectors: function of the module and of latitudes and longitudes [n, 2] in degrees; it returns vectors [n, E].
    """

    @nnx.jit
    def run(module: nnx.Module, block: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            encoded = vectors(module, block)
        return encoded / jnp.linalg.norm(encoded, axis=-1, keepdims=True)

    def encode(coordinates: Float[np.ndarray, "N 2"]) -> Iterator[Float32[np.ndarray, "n E"]]:
        for block, n in blocks(coordinates, _BLOCK):
            yield np.asarray(run(module, jnp.asarray(block, jnp.float32)))[:n]

    return encode


def save(path: epath.Path, blocks: Iterable[Float32[np.ndarray, "n E"]], n: int, width: int) -> None:
    """Writes blocks of vectors as one bfloat16 array [n, width]. The file appears at `path` when it is complete.

    Blocks are written to disk one by one, since 4.12 million vectors of width 768 are 6.3 GB.
    """
    with disk.writing(path) as partial:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=(n, width))
        first = 0
        for block in blocks:
            array[first : first + len(block)] = block.astype(ml_dtypes.bfloat16).view(np.uint16)
            first += len(block)
        array.flush()


def open_encodings(path: epath.Path) -> Vectors:
    """Returns the vectors stored by `save`, memory-mapped."""
    return records.open_array(path, ml_dtypes.bfloat16)


def rank(
    gallery: Vectors, photos: Float32[np.ndarray, "B E"], k: int
) -> tuple[Int32[np.ndarray, "B k"], Float32[np.ndarray, "B k"]]:
    """Returns gallery rows and log-probabilities of each photo's k most probable locations, best first.

    The softmax is over the whole gallery.

    gallery: unit vectors of the encoded coordinates. photos: unit vectors times the logit scale, so that inner products
    with `gallery` are logits.
    """
    rows, logits = index.exact(gallery, photos, k)
    total = np.full(len(photos), -np.inf, np.float32)
    for first in range(0, len(gallery), _LOCATIONS):
        block = jnp.asarray(gallery[first : first + _LOCATIONS], jnp.float32)
        for q in range(0, len(photos), _PHOTOS):
            part = slice(q, q + _PHOTOS)
            total[part] = np.logaddexp(total[part], _log_sum(jnp.asarray(photos[part]), block))
    return rows, logits - total[:, None]


@jax.jit
def _log_sum(photos: jax.Array, gallery: jax.Array) -> jax.Array:
    """Returns, per photo, the logarithm of the sum of exp(logit) over a block of encoded gallery locations."""
    logits = jnp.matmul(photos, gallery.T, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.logsumexp(logits, axis=1)
