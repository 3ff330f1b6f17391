"""Random keys and dropout, the same on any mesh and for any value of JAX_DEFAULT_PRNG_IMPL.

A dropout mask is made from random words, one word for each row of the array, and constants, one for each column. A
number is dropped if a hash of its row's word and its column's constant is small. JAX's generator draws the words, far
fewer than there are numbers. The hash has five operations per number; JAX's generator has about a hundred. The backward
pass computes the hash again, so that no mask is stored.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

# The generator is fixed, because results would otherwise depend on the environment. Threefry is JAX's default, and the
# only one that each device computes for its own rows alone.
_GENERATOR = "threefry2x32"
#: Odd multipliers of 32-bit hashes, from MurmurHash3 (Appleby).
_MULTIPLIERS = np.array([0x85EBCA6B, 0xC2B2AE35], np.uint32)
#: Largest number of columns of an array in `dropout`.
_COLUMNS = 1 << 24


def key(seed: int) -> Key[Array, ""]:
    """Returns the random key of a seed."""
    return jax.random.key(seed, impl=_GENERATOR)


def split(key: Key[Array, ""] | None, n: int) -> list[Key[Array, ""] | None]:
    """Returns a list of n keys split from `key`, or a list of n None if `key` is None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def words(key: Key[Array, ""] | None, *shape: int) -> UInt32[Array, "..."] | None:
    """Returns random words for `dropout`, one per row, or None if key is None. shape: numbers of rows."""
    return None if key is None else jax.random.bits(key, shape, jnp.uint32)


def dropout(
    x: Float[Array, "... D"], rate: float, words: UInt32[Array, "..."] | None, site: int = 0
) -> Float[Array, "... D"]:
    """Returns x with each number set to 0 with probability `rate` or else divided by 1 - rate; x if words is None.

    words: random word of each row of x. An axis of x, before the last one, along which `words` has size 1 belongs to
    the columns: its rows share a word, and differ by their constants. site: number from 0 to 254; equal words give
    different masks at different sites.
    """
    if words is None or rate == 0.0:
        return x
    return _dropout(x, words, rate, site)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dropout(x: Array, words: Array, rate: float, site: int) -> Array:
    kept = _kept(x.shape, words, rate, site)
    # In 16 bits 1 / (1 - rate) would be off by up to 0.2 %.
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    scaled = x.astype(wide) * jnp.asarray(1 / (1 - rate), wide)
    return jnp.where(kept, scaled, jnp.zeros((), wide)).astype(x.dtype)


def _forward(x: Array, words: Array, rate: float, site: int) -> tuple[Array, Array]:
    return _dropout(x, words, rate, site), words


def _backward(rate: float, site: int, words: Array, gradient: Array) -> tuple[Array, None]:
    return _dropout(gradient, words, rate, site), None


_dropout.defvjp(_forward, _backward)


def _kept(shape: tuple[int, ...], words: Array, rate: float, site: int) -> Array:
    """Returns whether each number is kept."""
    rows = (*words.shape, 1)
    columns = tuple(size if row == 1 else 1 for size, row in zip(shape, rows, strict=True))
    # Odd factors: the product with an odd constant takes each value for one word.
    factors = _hash(np.arange(np.prod(columns), dtype=np.uint32) + np.uint32((1 + site) * _COLUMNS)) | np.uint32(1)
    word = words.reshape(rows) * jnp.asarray(factors.reshape(columns))
    word = (word ^ (word >> np.uint32(15))) * _MULTIPLIERS[1]
    # Comparison of signed numbers, because TPUs have no unsigned one.
    return jax.lax.bitcast_convert_type(word, jnp.int32) >= np.int32(round(rate * 2**32) - 2**31)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of 32-bit numbers, the finalizer of MurmurHash3: each input bit affects all output bits."""
    for shift, multiplier in zip((16, 13), _MULTIPLIERS, strict=True):
        numbers = (numbers ^ (numbers >> np.uint32(shift))) * multiplier
    return numbers ^ (numbers >> np.uint32(16))
