"""Selectors: which of a photo's candidates is the answer."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from geotoken_jax.predict.sample import Candidates


def greedy(candidates: Candidates) -> Int[np.ndarray, " B"]:
    """Takes the greedy candidate, which comes first in the pool."""
    return np.zeros(len(candidates.tokens), np.int64)


def log_probability(candidates: Candidates) -> Int[np.ndarray, " B"]:
    """Takes the candidate most probable under the tempered distribution it was sampled from (paper, section 3.5)."""
    return np.argmax(candidates.tempered_log_probability, axis=1)


#: Name, as in predictions and in `config.predict.choice` -> candidates -> index [B].
SELECTORS: dict[str, Callable[[Candidates], Int[np.ndarray, " B"]]] = {
    "greedy": greedy,
    "log_probability": log_probability,
}
