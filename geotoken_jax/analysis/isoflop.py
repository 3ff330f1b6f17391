"""Optima of measured curves: the best size for an amount of compute, and the best learning rate for a width.

This is approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): all sizes are trained with the same compute,
a parabola in the logarithm of the size is fitted to the losses, and the optima of several amounts of compute are fitted
with a power law. Learning rates have optima of the same kind. Intervals come from simulations: the noise of one run is
added to each loss, and the fit is repeated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

#: Number of simulations.
_DRAWS = 400
#: A parabola is fitted to the smallest loss and the points beside it. The next point on each side is used too if its
#: loss is within this many standard deviations of the smallest. Farther from the optimum, the loss is not a parabola.
_NEAR = 10.0
#: An optimum is determined if it is inside the measured range in this share of the simulations.
_SHARE = 0.95


def optimum(
    x: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"], noise: float, seed: int
) -> tuple[dict[str, Any], Float[np.ndarray, " R"]]:
    """Returns the optimum of a curve that was measured at x, and the optima of the simulations.

    The optimum has `at`, with the ends `low` and `high` of its 95 % interval; `loss`, the loss there; `coefficients` of
    the parabola in log x, highest power first; `near`, the range of x that it is fitted to; and `determined`. It is not
    determined if the parabola has no minimum inside the range of x, or if fewer than 95 % of the simulations have one.
    `at` is None if the parabola of the measured losses has none. Simulations without one have NaN.

    x: at least three positive values, ascending. noise: standard deviation of a loss. Losses may be infinite.
    """
    finite = np.isfinite(loss)
    x, loss = x[finite], loss[finite]
    nothing = {"at": None, "low": None, "high": None, "loss": None, "coefficients": [], "near": [], "determined": False}
    if len(x) < 3:
        return nothing, np.full(_DRAWS, np.nan)
    near = _near(loss, noise)
    log_x, loss = np.log(x[near]), loss[near]
    drawn = loss + np.random.default_rng(seed).normal(0, noise, (_DRAWS, len(loss)))
    middle = log_x.mean()
    fits = np.polyfit(log_x - middle, np.vstack([loss, drawn]).T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertices = np.where(fits[0] > 0, -fits[1] / (2 * fits[0]), np.nan) + middle
    vertices[~((vertices > np.log(x[0])) & (vertices < np.log(x[-1])))] = np.nan
    at, simulated = vertices[0], np.exp(vertices[1:])
    inside = np.isfinite(simulated)
    if np.isnan(at) or not inside.any():
        return nothing, simulated
    a, b, c = fits[:, 0]
    low, high = np.percentile(simulated[inside], (2.5, 97.5)).tolist()
    found = {"at": float(np.exp(at)), "low": low, "high": high, "loss": float(c - b * b / (4 * a))}
    expanded = [float(a), float(b - 2 * a * middle), float(c - b * middle + a * middle**2)]
    return {
        **found,
        "coefficients": expanded,
        "near": [float(x[near][0]), float(x[near][-1])],
        "determined": bool(inside.mean() >= _SHARE),
    }, simulated


def _near(loss: np.ndarray, noise: float) -> slice:
    """Returns the points that a parabola is fitted to: three to five."""
    middle = min(max(int(np.argmin(loss)), 1), len(loss) - 2)
    close = loss <= loss.min() + _NEAR * noise
    first = middle - 2 if middle > 1 and close[middle - 2] else middle - 1
    return slice(first, middle + 3 if middle + 2 < len(loss) and close[middle + 2] else middle + 2)


def slices(rows: Sequence[dict[str, Any]], noise: float, seed: int) -> dict[str, Any]:
    """Returns the optimum of each slice, and the power law of the optima.

    `slices`: per budget, smallest first, `budget` and the optimum of the number of parameters, with `examples`, the
    number of examples there. `power`: exponent of the best number of parameters against compute, with its 95 % interval
    and `determined`; None if fewer than two slices have an optimum. It is determined if each slice's optimum is.

    rows: runs of the slices with the keys budget, parameters, examples and loss. noise: standard deviation of a loss.
    """
    found, simulated = [], []
    for i, budget in enumerate(sorted({row["budget"] for row in rows})):
        same = sorted((row for row in rows if row["budget"] == budget), key=lambda row: row["parameters"])
        parameters, examples, loss = (
            np.array([row[k] for row in same], float) for k in ("parameters", "examples", "loss")
        )
        best, draws = optimum(parameters, loss, noise, seed + i)
        at = best["at"]
        there = float(np.exp(np.interp(np.log(at), np.log(parameters), np.log(examples)))) if at else None
        found.append({"budget": budget, **best, "examples": there})
        simulated.append(draws)
    kept = [i for i, one in enumerate(found) if one["at"]]
    power = None
    if len(kept) > 1:
        log_compute = np.log([found[i]["budget"] for i in kept])
        exponent, offset = np.polyfit(log_compute, np.log([found[i]["at"] for i in kept]), 1)
        draws = np.log(np.stack([simulated[i] for i in kept], 1))
        draws = draws[np.isfinite(draws).all(1)]
        low, high = (
            np.percentile(np.polyfit(log_compute, draws.T, 1)[0], (2.5, 97.5)).tolist() if len(draws) else (0, 0)
        )
        power = {"value": float(exponent), "low": low, "high": high, "offset": float(offset)}
        power["determined"] = all(one["determined"] for one in found)
    return {"slices": found, "power": power}


def learning_rates(rows: Sequence[dict[str, Any]], noise: float, seed: int) -> list[dict[str, Any]]:
    """Returns how far the best learning rate moves with the width, per parametrization.

    Each entry has `parametrization`; `widths`, a list with `width`, the measured `rates` and `losses`, without those
    that are not finite, and the optimum; and `ratio`, the largest best rate divided by the smallest, with the ends
    `low` and `high` of its 95 % interval. `determined` is False if the optimum of a width is not determined. The ratio
    is None if a width has no optimum.

    rows: runs with the keys parametrization, width, rate and loss. noise: standard deviation of a loss.
    """
    found = []
    for name in dict.fromkeys(row["parametrization"] for row in rows):
        widths, simulated = [], []
        for width in sorted({row["width"] for row in rows if row["parametrization"] == name}):
            same = [row for row in rows if (row["parametrization"], row["width"]) == (name, width)]
            finite = sorted((row["rate"], row["loss"]) for row in same if np.isfinite(row["loss"]))
            rates, losses = np.array(finite, float).reshape(-1, 2).T
            best, draws = optimum(rates, losses, noise, seed + len(simulated))
            widths.append({"width": width, "rates": rates.tolist(), "losses": losses.tolist(), **best})
            simulated.append(draws)
        entry: dict[str, Any] = {"parametrization": name, "widths": widths, "ratio": None, "low": None, "high": None}
        at, draws = [one["at"] for one in widths], np.stack(simulated, 1)
        draws = draws[np.isfinite(draws).all(1)]
        if all(at) and len(draws):
            entry["ratio"] = max(at) / min(at)
            entry["low"], entry["high"] = np.percentile(draws.max(1) / draws.min(1), (2.5, 97.5)).tolist()
        found.append({**entry, "determined": all(one["determined"] for one in widths)})
    return found
