"""Specifications of batches (name -> shape and type), made-up batches that follow them, and rows in blocks."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

#: Array name -> its shape and type; the first axis is the batch's.
Spec = dict[str, jax.ShapeDtypeStruct]


def spec(size: int, **arrays: tuple[tuple[int, ...], Any]) -> Spec:
    """Returns the specification of a batch of `size` examples. arrays: shape and type of one example's."""
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()}


def fake(spec: Spec, seed: int = 0, below: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Returns random arrays that follow a specification: normal numbers, or integers.

    below: name -> smallest integer that is too large, a number or an array that broadcasts; 2 for names not in it.
    """
    rng, bounds = np.random.default_rng(seed), below or {}

    def draw(name: str, array: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(array.dtype, np.integer):
            return rng.integers(0, bounds.get(name, 2), array.shape).astype(array.dtype)
        return rng.standard_normal(array.shape, np.float32).astype(array.dtype)

    return {name: draw(name, array) for name, array in spec.items()}


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` rows: these, and the first of them again. So few shapes are compiled."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), 0)]) if len(rows) < size else rows


def blocks(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields blocks of `size` rows, and how many of them are there: the last block is filled up.

    A compiled function then sees one shape, and a row's result does not depend on how many others there are.
    """
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        yield filled(block, size), len(block)
