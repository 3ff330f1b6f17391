"""Random keys and dropout. Both are the same on any mesh, and for any value of JAX_DEFAULT_PRNG_IMPL.

For dropout, JAX's generator draws one random 32-bit word per row of the array. Each column has a constant. A number of
the array is dropped if a hash of its row's word and its column's constant is below a limit. If several rows share a
word, each of these rows has a constant too. This is faster than drawing a random number for each number of the array:
the hash takes five operations, JAX's generator about a hundred. The backward pass computes the hash again, so no mask
is stored.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

# The generator is fixed, so results do not depend on the environment. Threefry is JAX's default. With the other
# generators, a device cannot compute the random numbers of its own rows alone.
_GENERATOR = "threefry2x32"
#: Odd multipliers of 32-bit hashes, from MurmurHash3 (Appleby).
_MULTIPLIERS = np.array([0x85EBCA6B, 0xC2B2AE35], np.uint32)
#: Largest number of columns of an array in `dropout`. Each value of its argument `site` has 2^24 constants of its own,
#: one per column.
_MAX_COLUMNS = 1 << 24


def key(seed: int) -> Key[Array, ""]:
    """Returns the random key of a seed."""
    return jax.random.key(seed, impl=_GENERATOR)


def split(key: Key[Array, ""] | None, n: int) -> list[Key[Array, ""] | None]:
    """Returns a list of n keys split from `key`, or a list of n None if `key` is None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def words(key: Key[Array, ""] | None, *shape: int) -> UInt32[Array, "..."] | None:
    """Returns random words for `dropout`, one per row of an array, or None if `key` is None.

    shape: shape of the array without its last axis.
    """
    return None if key is None else jax.random.bits(key, shape, jnp.uint32)


def dropout(
    x: Float[Array, "... D"], rate: float, words: UInt32[Array, "..."] | None, site: int = 0
) -> Float[Array, "... D"]:
    """Returns x after dropout: each number is set to 0 with probability `rate`, or else divided by 1 - rate.

    Returns x unchanged if `words` is None or `rate` is 0.

    words: random words, an array with the axes of x except the last. Usually each row of x has a word of its own. If
    `words` has size 1 along an axis, the rows along this axis share a word. Their masks still differ, because the
    constants of the hash differ too. site: number from 0 to 254. With equal words, different sites have different
    masks.
    """
    if words is None or rate == 0.0:
        return x
    return _dropout(x, words, rate, site)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dropout(x: Array, words: Array, rate: float, site: int) -> Array:
    kept = _kept(x.shape, words, rate, site)
    # In bfloat16, 1 / (1 - rate) would be wrong by up to 0.4 %, and by 0.16 % at a rate of 0.1.
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    scaled = x.astype(wide) * jnp.asarray(1 / (1 - rate), wide)
    return jnp.where(kept, scaled, jnp.zeros((), wide)).astype(x.dtype)


def _forward(x: Array, words: Array, rate: float, site: int) -> tuple[Array, Array]:
    return _dropout(x, words, rate, site), words


def _backward(rate: float, site: int, words: Array, gradient: Array) -> tuple[Array, None]:
    return _dropout(gradient, words, rate, site), None


_dropout.defvjp(_forward, _backward)


def _kept(shape: tuple[int, ...], words: Array, rate: float, site: int) -> Array:
    """Returns a mask of the numbers that are kept, bool, in the shape of x."""
    rows = (*words.shape, 1)
    columns = tuple(size if row == 1 else 1 for size, row in zip(shape, rows, strict=True))
    # All factors are odd, because multiplication by an odd number maps different words to different products.
    factors = _hash(np.arange(np.prod(columns), dtype=np.uint32) + np.uint32((1 + site) * _MAX_COLUMNS)) | np.uint32(1)
    word = words.reshape(rows) * jnp.asarray(factors.reshape(columns))
    word = (word ^ (word >> np.uint32(15))) * _MULTIPLIERS[1]
    # The words are compared as signed numbers, because TPUs cannot compare unsigned numbers.
    return jax.lax.bitcast_convert_type(word, jnp.int32) >= np.int32(round(rate * 2**32) - 2**31)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of 32-bit numbers, the finalizer of MurmurHash3: each input bit affects all output bits."""
    for shift, multiplier in zip((16, 13), _MULTIPLIERS, strict=True):
        numbers = (numbers ^ (numbers >> np.uint32(shift))) * multiplier
    return numbers ^ (numbers >> np.uint32(16))
