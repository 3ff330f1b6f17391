"""Specifications of batches (name -> shape and type), and made-up batches that follow them."""

from collections.abc import Mapping
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
