"""Batch specifications (name -> shape and type), random batches for tests and benchmarks, and blocks of equal size."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

#: Array name -> shape and type; the first axis is the batch axis.
Spec = dict[str, jax.ShapeDtypeStruct]


def spec(size: int, **arrays: tuple[tuple[int, ...], Any]) -> Spec:
    """Returns the specification of a batch of `size` examples. arrays: shape and type of each array of one example."""
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()}


def random_batch(spec: Spec, seed: int = 0, below: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Returns random arrays of a specification: standard normal numbers, or integers from 0.

    below: name -> exclusive upper limit of the integers, a number or an array that broadcasts; 2 if a name is missing.
    """
    rng, bounds = np.random.default_rng(seed), below or {}

    def draw(name: str, array: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(array.dtype, np.integer):
            return rng.integers(0, bounds.get(name, 2), array.shape).astype(array.dtype)
        return rng.standard_normal(array.shape, np.float32).astype(array.dtype)

    return {name: draw(name, array) for name, array in spec.items()}


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `rows` padded to `size` with copies of the first row, so that compiled functions see fewer shapes."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), 0)]) if len(rows) < size else rows


def padded_size(rows: int, most: int, devices: int = 1) -> int:
    """Returns the batch size that `rows` are padded to on a number of devices, so that few batch sizes are compiled.

    Each device gets the same number of rows: the next power of two, or its share of `most` if that is less but enough.
    """
    share, limit = -(-rows // devices), -(-most // devices)
    return devices * min(1 << (share - 1).bit_length(), max(limit, share))


def blocks(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields blocks of `size` rows and the number of real rows in each; the last block is padded (see `padded`).

    So a function is compiled for one shape only, and a row's result does not depend on the number of other rows.
    """
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        yield padded(block, size), len(block)
