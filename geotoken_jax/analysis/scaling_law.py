"""Loss as a function of model and data size, L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs.

N is the number of parameters, D the number of photos. The fit is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556,
section 3.3): L-BFGS from several starts minimizes the Huber loss between logarithms of the losses. Intervals come from
a bootstrap over runs.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize

#: Error of the logarithm of the loss above which the Huber loss is linear: 0.1 %, as in Hoffmann et al.
_HUBER = 1e-3


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients of L(N, D), in nats. E: loss in the limit of infinitely many parameters and photos."""

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
    """Returns the law fitted to n runs, and the laws fitted to bootstrap resamples of the runs.

    E is at most the smallest loss, and exponents are in [0, 4]. Without these bounds, a fit to few runs of similar size
    can give absurd coefficients. The fit of a resample starts at the solution for all runs. A resample with fewer than
    six different runs is drawn again.
    """
    # N and D are divided by their geometric means, so that A and B are a few nats in the fit and not astronomical.
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
    """Returns 32 starts of the fit. A start is an array with log A, log B, log E, alpha and beta."""
    spread = np.log(np.ptp(np.exp(log_loss)) + 1e-6)
    floors = log_loss.min() + np.log([0.8, 0.98])
    sizes = spread + np.array([-2.0, 0.0])
    grid = itertools.product(sizes, sizes, floors, (0.2, 0.8), (0.2, 0.8))
    return [np.array(start) for start in grid]


def _descend(start: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the minimum of the mean Huber loss that L-BFGS reaches from a start, and the parameters there."""

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
    result = optimize.minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    return float(result.fun), result.x


def _law(p: np.ndarray, units: Sequence[float]) -> Law:
    a, b, e, alpha, beta = map(float, p)
    return Law(float(np.exp(e)), float(np.exp(a)) * units[0] ** alpha, alpha, float(np.exp(b)) * units[1] ** beta, beta)


def intervals(law: Law, resampled: Sequence[Law]) -> dict[str, dict[str, float]]:
    """Returns each coefficient of the law with percentiles 2.5 and 97.5 of the resampled laws, by name."""
    estimates = {}
    for name, value in dataclasses.asdict(law).items():
        low, high = np.percentile([getattr(other, name) for other in resampled], (2.5, 97.5))
        estimates[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return estimates
