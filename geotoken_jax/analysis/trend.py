"""Trends of one number against another: the form that predicts left-out points best, with intervals.

All forms are straight lines after a transformation of x or y, so each fit has a closed form.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

#: Form -> formula, with y = f(a, b, x).
FORMS = {
    "constant": "a",
    "linear": "a + b x",
    "logarithmic": "a + b ln x",
    "power": "a x^b",
    "logistic": "1 / (1 + exp(-a - b x))",
}
#: Shares are moved this far from 0 and 1 before their logits are taken.
_EDGE = 1e-3
_DRAWS = 400


def fit(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], forms: tuple[str, ...], seed: int
) -> dict[str, Any] | None:
    """Returns the form with the smallest leave-one-out error, fitted to all points.

    The result is None if there are fewer than four points. It has `form`; `a` and `b`, each with `value`, `low` and
    `high`, a 95 % interval from a bootstrap over points; and `errors`: form -> root mean square of the leave-one-out
    errors of y, for the constant too.

    forms: candidates, keys of FORMS. A form that takes the logarithm of x or y is left out if a value is not positive.
    """
    if len(x) < 4:
        return None
    possible = [form for form in ("constant", *forms) if _is_possible(form, x, y)]
    every = np.ones((1, len(x)))
    errors = {}
    for form in possible:
        left_out = _lines(form, x, y, 1 - np.eye(len(x)))
        predicted = np.array([values(form, a, b, x[i]) for i, (a, b) in enumerate(left_out)])
        errors[form] = float(np.sqrt(np.mean((predicted - y) ** 2)))
    best = min(errors, key=lambda form: errors[form])
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), _DRAWS).astype(float)
    counts = counts[(counts > 0).sum(1) > 2]
    line, drawn = _lines(best, x, y, every)[0], _lines(best, x, y, counts)
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    coefficients = {
        name: {"value": float(line[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate("ab")
    }
    return {"form": best, **coefficients, "errors": errors}


def values(form: str, a: Any, b: Any, x: Any) -> Any:
    """Returns y of a form at x. a, b: coefficients."""
    if form == "constant":
        return a + 0 * x
    if form == "logarithmic":
        return a + b * np.log(x)
    if form == "power":
        return a * x**b
    line = a + b * x
    return 1 / (1 + np.exp(-line)) if form == "logistic" else line


def curve(found: Mapping[str, Any], x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns y of a trend at x. found: result of `fit`."""
    return values(found["form"], found["a"]["value"], found["b"]["value"], x)


def _is_possible(form: str, x: np.ndarray, y: np.ndarray) -> bool:
    needed = {"logarithmic": (x,), "power": (x, y)}.get(form, ())
    return all(numbers.min() > 0 for numbers in needed) and (form != "logistic" or bool(0 <= y.min() <= y.max() <= 1))


def _lines(form: str, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns a and b of the form for each row of weights [R, n], by weighted least squares after transformation."""
    u = np.log(x) if form in ("logarithmic", "power") else x
    v = np.log(y) if form == "power" else y
    if form == "logistic":
        inside = np.clip(y, _EDGE, 1 - _EDGE)
        v = np.log(inside / (1 - inside))
    total = weights.sum(1)
    middle, mean = weights @ u / total, weights @ v / total
    spread = weights @ u**2 / total - middle**2
    slope = (weights @ (u * v) / total - middle * mean) / np.where(spread > 1e-12, spread, np.inf)
    if form == "constant":
        slope = 0 * slope
    offset = mean - slope * middle
    return np.stack([np.exp(offset) if form == "power" else offset, slope], 1)
