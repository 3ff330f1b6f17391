"""The weighted cross-entropy of the decoder (paper, equation of section 3.4)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def level_weights(length: int, first: float, last: float) -> Float[np.ndarray, " T"]:
    """Returns the loss weight of each token, linear from `first` (paper: 2.0) to `last` (paper: 1.0)."""
    return np.linspace(first, last, length, dtype=np.float32)


def cross_entropy(log_probabilities: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns minus the log-probability of each true token, in nats."""
    return -jnp.take_along_axis(log_probabilities, tokens[..., None], -1)[..., 0]


def weighted(losses: Float[Array, "B T"], weights: Float[np.ndarray, " T"]) -> Float[Array, " B"]:
    """Returns the weighted mean of each photo's token losses. weights: weight of each token, not normalized."""
    return losses @ jnp.asarray(weights / weights.sum())
