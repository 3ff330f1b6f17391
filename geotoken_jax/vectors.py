"""Normalizes vectors to length 1."""

from typing import Any

import numpy as np


def unit(x: Any) -> Any:
    """Returns vectors [..., C] divided by their lengths; a zero vector stays zero.

    numpy arrays give float32 numpy arrays, jax arrays give jax arrays of the same type.
    """
    if isinstance(x, np.ndarray):
        x = np.asarray(x, np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    import jax.numpy as jnp
    from jax.lax import rsqrt

    return x * rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))
