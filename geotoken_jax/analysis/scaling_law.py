"""Loss as a function of model and data size, L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs.

Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3): the Huber loss of the logarithms is minimized by
L-BFGS from many starts. Intervals are of the bootstrap over runs.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize

#: Of the logarithm of the loss, where Huber's loss turns from square to linear: 0.1 %, Hoffmann et al.'s.
_HUBER = 1e-3


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) in nats. E: the loss of an endless model on endless data."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: Any, photos: Any) -> Any:
        return self.E + self.A / np.asarray(parameters) ** self.alpha + self.B / np.asarray(photos) ** self.beta


def fit(
    parameters: Float[np.ndarray, "n"],
    photos: Float[np.ndarray, "n"],
    loss: Float[np.ndarray, "n"],
    resamples: int,
    seed: int,
) -> tuple[Law, list[Law]]:
    """Returns the law of the runs and those of bootstrap resamples of them.

    E is at most the smallest loss, and no exponent is negative or above 4: few runs over a narrow range would be fitted
    best by something else than a law. A resample's fit begins where the whole one's ended; one of fewer than six
    different runs is drawn again.
    """
    # N and D in units of their geometric means, so that A and B are nats there and not astronomical.
    units = [float(np.exp(np.log(values).mean())) for values in (parameters, photos)]
    x, y, log_loss = np.log(parameters / units[0]), np.log(photos / units[1]), np.log(loss)
    _, best = min((_descend(start, x, y, log_loss) for start in _starts(log_loss)), key=lambda end: end[0])
    rng, others = np.random.default_rng(seed), []
    while len(others) < resamples:
        rows = rng.integers(len(loss), size=len(loss))
        if len(set(rows.tolist())) >= 6:
            others.append(_law(_descend(best, x[rows], y[rows], log_loss[rows])[1], units))
    return _law(best, units), others


def _starts(log_loss: Float[np.ndarray, "n"]) -> list[np.ndarray]:
    """Returns starts: logarithms of A, B and E, and the exponents."""
    spread = np.log(np.ptp(np.exp(log_loss)) + 1e-6)
    floors = log_loss.min() + np.log([0.8, 0.98])
    sizes = spread + np.array([-2.0, 0.0])
    grid = itertools.product(sizes, sizes, floors, (0.2, 0.8), (0.2, 0.8))
    return [np.array(start) for start in grid]


def _descend(start: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the smallest mean Huber loss that L-BFGS finds from a start, and where."""

    def value(p: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = p
        terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])
        sums = np.logaddexp.reduce(terms)
        off, shares = sums - log_loss, np.exp(terms - sums)
        small = np.abs(off) <= _HUBER
        huber = np.where(small, off**2 / 2, _HUBER * (np.abs(off) - _HUBER / 2))
        slope = np.clip(off, -_HUBER, _HUBER) * shares
        gradient = np.stack([slope[0], slope[1], slope[2], -slope[0] * x, -slope[1] * y])
        return huber.mean() / _HUBER**2, gradient.mean(1) / _HUBER**2

    bounds = [(None, None), (None, None), (None, log_loss.min()), (0.0, 4.0), (0.0, 4.0)]
    found = optimize.minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    return float(found.fun), found.x


def _law(p: np.ndarray, units: Sequence[float]) -> Law:
    a, b, e, alpha, beta = map(float, p)
    return Law(float(np.exp(e)), float(np.exp(a)) * units[0] ** alpha, alpha, float(np.exp(b)) * units[1] ** beta, beta)


def intervals(law: Law, resampled: Sequence[Law]) -> dict[str, dict[str, float]]:
    """Returns each number of the law with percentiles 2.5 and 97.5 of the resampled ones."""
    found = {}
    for name, value in dataclasses.asdict(law).items():
        low, high = np.percentile([getattr(other, name) for other in resampled], (2.5, 97.5))
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found
