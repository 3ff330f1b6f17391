"""Vectors of length 1."""

from typing import Any

import numpy as np


def unit(x: Any) -> Any:
    """Returns vectors [..., C] divided by their length; zeros stay zeros. numpy (then float32) and jax alike."""
    if isinstance(x, np.ndarray):
        x = np.asarray(x, np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    import jax.numpy as jnp
    from jax.lax import rsqrt

    return x * rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))
