"""Robust fits of curves to few points, many fits at once: bootstrap resamples and starts are one batch of arrays.

The method of Levenberg and Marquardt minimizes a weighted Huber loss of the errors. In each step, the Huber loss is
replaced by the weighted square with the same slope (iteratively reweighted least squares). Parameters have bounds.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

#: Function of parameters [P, k]. It returns the values of the curve at n points [P, n], and their derivatives by the
#: parameters [P, n, k].
Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
#: A fit ends after this number of steps, or earlier if a step lowers its loss by less than this share.
_STEPS, _TOLERANCE = 150, 1e-8
#: Damping of the first step, and damping with which a fit ends, because no step lowers its loss.
_DAMPING, _STUCK = 1e-2, 1e8


def minimize(
    curve: Curve,
    y: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "R n"],
    starts: Float[np.ndarray, "S k"],
    bounds: Float[np.ndarray, "k 2"],
    huber: float,
) -> Float[np.ndarray, "R k"]:
    """Returns the parameters with the smallest loss for each row of weights: the best end of S starts.

    weights: weight of each point, such as the number of times that it is in a bootstrap resample. bounds: smallest and
    largest value of each parameter. huber: error above which the loss grows linearly.
    """
    count = len(starts)
    parameters = np.tile(np.clip(starts, *bounds.T), (len(weights), 1))
    losses, running = np.full(len(parameters), np.inf), np.arange(len(parameters))
    weight = np.repeat(weights, count, axis=0)
    at, damping = parameters.copy(), np.full(len(parameters), _DAMPING)
    values, slopes = curve(at)
    errors = values - y
    loss = _loss(errors, weight, huber)
    for _ in range(_STEPS):
        trial = np.clip(at + _step(errors, slopes, weight, (at, bounds), damping, huber), *bounds.T)
        values, trial_slopes = curve(trial)
        trial_errors = values - y
        trial_loss = _loss(trial_errors, weight, huber)
        better = trial_loss < loss
        ended = np.where(better, loss - trial_loss <= _TOLERANCE * loss, damping > _STUCK)
        at[better], errors[better], slopes[better] = trial[better], trial_errors[better], trial_slopes[better]
        loss = np.where(better, trial_loss, loss)
        damping = np.where(better, np.maximum(damping / 4, 1e-10), damping * 5)
        parameters[running], losses[running] = at, loss
        if ended.all():
            break
        if ended.any():
            left = ~ended
            at, errors, slopes, loss, damping = at[left], errors[left], slopes[left], loss[left], damping[left]
            weight, running = weight[left], running[left]
    best = losses.reshape(-1, count).argmin(1)
    return parameters.reshape(len(weights), count, -1)[np.arange(len(weights)), best]


def _loss(errors: np.ndarray, weight: np.ndarray, huber: float) -> np.ndarray:
    """Returns the weighted Huber loss of each fit. errors, weight: [P, n]."""
    size = np.abs(errors)
    return (weight * np.where(size <= huber, errors**2 / 2, huber * (size - huber / 2))).sum(1) / huber**2


def _step(
    errors: np.ndarray,
    slopes: np.ndarray,
    weight: np.ndarray,
    limited: tuple[np.ndarray, np.ndarray],
    damping: np.ndarray,
    huber: float,
) -> np.ndarray:
    """Returns the damped Gauss-Newton step of each fit [P, k].

    A parameter at a bound does not move if the loss falls beyond the bound. limited: parameters [P, k], and their
    bounds [k, 2].
    """
    at, bounds = limited
    scale = weight / np.maximum(np.abs(errors), huber) / huber
    scaled = (slopes * scale[:, :, None]).transpose(0, 2, 1)
    gradient, curvature = (scaled @ errors[:, :, None])[..., 0], scaled @ slopes
    fixed = ((at <= bounds[:, 0]) & (gradient > 0)) | ((at >= bounds[:, 1]) & (gradient < 0))
    free = ~fixed
    curvature = curvature * free[:, :, None] * free[:, None, :]
    diagonal = np.einsum("pkk->pk", curvature)
    # A parameter without any effect has a diagonal of 0. The added constant keeps the equations solvable.
    added = damping[:, None] * diagonal + 1e-12 * (1 + diagonal.max(1, keepdims=True)) + fixed
    curvature = curvature + added[:, :, None] * np.eye(at.shape[1])
    return -np.linalg.solve(curvature, (gradient * free)[..., None])[..., 0]
