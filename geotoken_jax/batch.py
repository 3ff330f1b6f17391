"""Describes the arrays of a batch, draws random batches for tests and benchmarks, and pads and divides batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

#: Array name -> shape and type; the first axis is the batch axis.
Spec = dict[str, jax.ShapeDtypeStruct]


def spec(size: int, **arrays: tuple[tuple[int, ...], Any]) -> Spec:
    """Returns the specification of a batch of `size` examples. arrays: array name -> shape and type for one example."""
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()}


def random_batch(spec: Spec, seed: int = 0, below: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Returns random arrays with the shapes and types of a specification: standard normal numbers, or integers >= 0.

    below: array name -> exclusive upper limit of its integers, a number or an array that broadcasts. The limit is 2 for
    arrays that are not in `below`.
    """
    rng, bounds = np.random.default_rng(seed), below or {}

    def draw(name: str, array: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(array.dtype, np.integer):
            return rng.integers(0, bounds.get(name, 2), array.shape).astype(array.dtype)
        return rng.standard_normal(array.shape, np.float32).astype(array.dtype)

    return {name: draw(name, array) for name, array in spec.items()}


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `rows`, padded to `size` rows with copies of the first row. jit then compiles for fewer shapes."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), 0)]) if len(rows) < size else rows


def padded_size(rows: int, most: int, devices: int = 1) -> int:
    """Returns the size to which a batch is padded, so that jit compiles for few sizes.

    Each device gets the same number of rows: the next power of two, but at most `most` / devices, rounded up. If `rows`
    is above `most`, each device gets `rows` / devices, rounded up.

    rows: number of rows before padding. most: number of rows of a full batch. devices: number of devices.
    """
    share, limit = -(-rows // devices), -(-most // devices)
    return devices * min(1 << (share - 1).bit_length(), max(limit, share))


def blocks(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields blocks of `size` rows, each with the number of its rows without padding. Only the last block is padded.

    Because all blocks have one shape, a function is compiled once, and a row's result does not depend on the number of
    other rows. For the padding, see `padded`.
    """
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        yield padded(block, size), len(block)
