"""Loss as a function of model size and data, L = E + A / N^alpha + B / D'^beta, fitted to runs, and simpler models.

N is the number of parameters. D' is the effective number of examples. A run that reads D examples, U of them unique,
has D' = U + U R* (1 - exp(-R / R*)) with R = D / U - 1 repetitions: each repetition is worth less than the one before,
and all of them are worth R* U further unique examples at most (Muennighoff et al. 2023, arXiv 2305.16264, equation 5).
The effect of repetitions on N that they also model is left out.

The fit is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3): the Huber loss between logarithms of
losses, minimized from 32 starts. A bootstrap over runs gives intervals. The fit of each resample begins at the same 32
starts, because intervals around one optimum would be too narrow (Besiroglu et al. 2024, arXiv 2404.10102).

Two models with fewer parameters show what the law is worth: a power law in compute, L = E + K / C^gamma, and the
constant L = E, the null model. E of the constant is a robust mean of all losses.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.analysis import curve_fit

#: Error of the logarithm of the loss above which the Huber loss is linear: 0.1 %, as in Hoffmann et al.
_HUBER = 1e-3
#: An exponent or R* is not determined if the upper end of its 95 % interval is more than this many times the lower end.
WIDEST = 3.0
#: It is not determined either if an end of the interval is within this share of the allowed range from a bound.
_NEAR = 0.01
#: Allowed values. R* of Muennighoff et al. is 15.
_EXPONENTS, _REPEATS = (0.0, 4.0), (0.1, 1000.0)
#: In `sufficient_budgets`: multiples of the largest compute, studies per multiple, and resamples per study.
_MULTIPLES, _STUDIES, _RESAMPLES = (4, 16, 64, 256), 3, 40


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs, as arrays of n numbers.

    parameters: N. examples: D. unique: number of different examples that could be read, U. compute: floating-point
    operations.
    """

    parameters: Float[np.ndarray, "n"]
    examples: Float[np.ndarray, "n"]
    unique: Float[np.ndarray, "n"]
    compute: Float[np.ndarray, "n"]

    def where(self, rows: Any) -> "Points":
        return Points(*(values[rows] for values in self._arrays()))

    def joined(self, other: "Points") -> "Points":
        return Points(*map(np.concatenate, zip(self._arrays(), other._arrays(), strict=True)))

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Model:
    """A family of curves for the loss. The logarithm of the loss is a log-sum-exp of terms.

    name: name in tables. names: names of the coefficients. terms: function of points and units that returns a function
    of parameters [P, k], which returns the logarithms of the terms [P, n, t] and their derivatives [P, n, t, k].
    exponents: names of the coefficients that must be determined.
    """

    name: str
    names: tuple[str, ...]
    terms: Callable[[Points, "Units"], Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]
    exponents: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Units:
    """Geometric means of the fitted runs' N, D' without repetition, and C. In these units A, B and K are a few nats."""

    parameters: float
    examples: float
    compute: float


def _law_terms(points: Points, units: Units) -> Any:
    x = np.log(points.parameters / units.parameters)
    unique = np.minimum(points.unique, points.examples)
    y, repeats = np.log(unique / units.examples), points.examples / unique - 1

    def terms(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, a, alpha, b, beta, log_r = (column[:, None] for column in p.T)
        r = np.exp(log_r)
        faded = np.exp(-repeats / r)
        gain = r * (1 - faded)
        data = y + np.log1p(gain)
        values = np.stack([e + 0 * x, a - alpha * x, b - beta * data], -1)
        slopes = np.zeros((*values.shape, 6))
        slopes[..., 0, 0] = slopes[..., 1, 1] = slopes[..., 2, 3] = 1
        slopes[..., 1, 2], slopes[..., 2, 4] = -x, -data
        slopes[..., 2, 5] = -beta * (gain - repeats * faded) / (1 + gain)
        return values, slopes

    return terms


def _compute_terms(points: Points, units: Units) -> Any:
    x = np.log(points.compute / units.compute)

    def terms(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, k, gamma = (column[:, None] for column in p.T)
        values = np.stack([e + 0 * x, k - gamma * x], -1)
        slopes = np.zeros((*values.shape, 3))
        slopes[..., 0, 0] = slopes[..., 1, 1] = 1
        slopes[..., 1, 2] = -x
        return values, slopes

    return terms


def _constant_terms(points: Points, units: Units) -> Any:
    del units

    def terms(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return p[:, None, :] + np.zeros((1, len(points.compute), 1)), np.ones((len(p), len(points.compute), 1, 1))

    return terms


LAW = Model(
    "law of size and data", ("E", "A", "alpha", "B", "beta", "repeats"), _law_terms, ("alpha", "beta", "repeats")
)
COMPUTE = Model("power law in compute", ("E", "K", "gamma"), _compute_terms, ("gamma",))
CONSTANT = Model("constant", ("E",), _constant_terms, ())
MODELS = (LAW, COMPUTE, CONSTANT)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model fitted to the same runs with several weights.

    parameters: logarithms of E, A, B, K and R*, and exponents, in `units` [R, k]. The first row has weight 1 for every
    run; the other rows are bootstrap resamples. bounds: allowed values of the parameters [k, 2].
    """

    model: Model
    units: Units
    parameters: Float[np.ndarray, "R k"]
    bounds: Float[np.ndarray, "k 2"]

    def losses(self, points: Points) -> Float[np.ndarray, "R n"]:
        """Returns the loss of each run by each row of `parameters`, in nats."""
        values, _ = self.model.terms(points, self.units)(self.parameters)
        return np.exp(values).sum(-1)

    def coefficients(self) -> dict[str, np.ndarray]:
        """Returns coefficient -> value per row of `parameters`, for N, examples and operations without units."""
        p = dict(zip(self.model.names, self.parameters.T, strict=True))
        scales = {"A": ("alpha", self.units.parameters), "B": ("beta", self.units.examples)}
        scales["K"] = ("gamma", self.units.compute)
        found = {}
        for name, values in p.items():
            exponent, unit = scales.get(name, ("", 1.0))
            found[name] = (
                values if name in _POWERS else np.exp(values + (p[exponent] * np.log(unit) if exponent else 0))
            )
        return found

    def estimates(self) -> dict[str, dict[str, Any]]:
        """Returns coefficient -> value, `low` and `high`, percentiles 2.5 and 97.5 of the resamples.

        An exponent and R* also have `determined`. It is False if the interval reaches a bound, if `high` is more than
        WIDEST times `low`, or if the term of the exponent vanishes in more than 2.5 % of the resamples.
        """
        found = {}
        for i, (name, values) in enumerate(self.coefficients().items()):
            low, high = _ends(values[1:])
            found[name] = {"value": float(values[0]), "low": float(low), "high": float(high)}
            if name in self.model.exponents:
                of_term = {"alpha": "A", "beta": "B", "gamma": "K"}.get(name)
                at_bound = self._at_bound(i) or bool(of_term and self._at_bound(self.model.names.index(of_term)))
                found[name]["determined"] = not at_bound and bool(high <= WIDEST * low)
        return found

    def _at_bound(self, column: int) -> bool:
        ends, (least, most) = _ends(self.parameters[1:, column]), self.bounds[column]
        near = _NEAR * (most - least)
        return bool(ends[0] <= least + near or ends[1] >= most - near)


#: Coefficients that are parameters as they are. The others are stored as logarithms.
_POWERS = ("alpha", "beta", "gamma")


def _ends(values: np.ndarray) -> np.ndarray:
    return np.percentile(values, (2.5, 97.5))


def fit(model: Model, points: Points, loss: Float[np.ndarray, "n"], weights: Float[np.ndarray, "R n"]) -> Fit:
    """Returns the model fitted to n runs once per row of weights. loss: loss of each run in nats."""
    effective = np.minimum(points.unique, points.examples)
    units = Units(*(float(np.exp(np.log(v).mean())) for v in (points.parameters, effective, points.compute)))
    terms, log_loss = model.terms(points, units), np.log(loss)

    def curve(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = terms(p)
        total = np.logaddexp.reduce(values, axis=-1)
        shares = np.exp(values - total[..., None])
        return total, np.einsum("pnt,pntk->pnk", shares, slopes)

    bounds, starts = _bounds(model, loss), _starts(model, loss)
    return Fit(model, units, curve_fit.minimize(curve, log_loss, weights, starts, bounds, _HUBER), bounds)


def _bounds(model: Model, loss: np.ndarray) -> np.ndarray:
    """Returns the smallest and largest value of each parameter.

    E is between 5 % of the smallest loss and the smallest loss. The other terms are between 1e-4 of the spread of the
    losses, which is nothing, and ten times the largest loss, for a run of average size.
    """
    low, high = loss.min(), loss.max()
    term = (np.log(1e-4 * (high - low) + 1e-9), np.log(10 * high))
    floor = (np.log(0.05 * low), np.log(low))
    if model is CONSTANT:
        floor = (np.log(low) - 1e-9, np.log(high) + 1e-9)
    of = {"E": floor, "A": term, "B": term, "K": term, "repeats": tuple(np.log(_REPEATS))}
    return np.array([of.get(name, _EXPONENTS) for name in model.names])


def _starts(model: Model, loss: np.ndarray) -> np.ndarray:
    """Returns up to 32 starts of a fit [S, k]: all combinations of these values, without equal ones."""
    spread = np.log(np.ptp(loss) + 1e-6)
    of = {
        "E": np.log(loss.min()) + np.log([0.8, 0.98]),
        "A": [spread - 2, spread],
        "K": [spread - 2, spread],
        "B": [spread - 1],
        "repeats": np.log([3, 30]),
    }
    if model is CONSTANT:
        of["E"] = np.log(np.median(loss))[None]
    return np.array(list(itertools.product(*(of.get(name, (0.2, 0.8)) for name in model.names))))


def resampled(n: int, resamples: int, seed: int, least: int) -> Float[np.ndarray, "R n"]:
    """Returns weights for `fit`: a row of ones, then the number of draws of each run in each bootstrap resample.

    A resample with fewer than `least` different runs is drawn again, up to all runs.
    """
    rng, rows = np.random.default_rng(seed), [np.ones(n)]
    while len(rows) <= resamples:
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        if (counts > 0).sum() >= min(least, n // 2):
            rows.append(counts)
    return np.stack(rows)


def leave_one_out(model: Model, points: Points, loss: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns forecast minus measured loss of each run, in nats. Each forecast comes from a fit without the run.

    Runs that differ only in the seed are left out together.
    """
    groups = replicas(points)
    weights = (groups[None, :] != np.arange(groups.max() + 1)[:, None]).astype(float)
    forecasts = fit(model, points, loss, weights).losses(points)
    return forecasts[groups, np.arange(len(loss))] - loss


def replicas(points: Points) -> Int[np.ndarray, "n"]:
    """Returns a number per run. Runs with equal numbers differ only in the seed."""
    columns = np.stack([points.parameters, points.examples, points.unique], 1)
    return np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)


def noise(fitted: Fit, points: Points, loss: Float[np.ndarray, "n"]) -> dict[str, Any]:
    """Returns standard deviations in nats.

    `residuals`: of losses around the fit, with as many degrees of freedom as runs minus coefficients. `seeds`: of runs
    that differ only in the seed; None if there are no such runs. `used`: the larger one, the noise of a prediction.
    """
    errors = fitted.losses(points)[0] - loss
    free = max(1, len(loss) - len(fitted.model.names))
    residual = float(np.sqrt((errors**2).sum() / free))
    groups = replicas(points)
    squares, repeated = 0.0, 0
    for group in range(groups.max() + 1):
        same = loss[groups == group]
        squares, repeated = squares + float(((same - same.mean()) ** 2).sum()), repeated + len(same) - 1
    seeds = float(np.sqrt(squares / repeated)) if repeated else None
    return {"residuals": residual, "seeds": seeds, "used": max(residual, seeds or 0.0)}


def predicted(fitted: Fit, points: Points, noise: float, seed: int) -> list[dict[str, Any]]:
    """Returns the forecast of each run: `loss`, and the prediction intervals `80` and `95`, in nats.

    A prediction interval contains the uncertainty of the coefficients, from the bootstrap, and the noise of one run, a
    normal distribution with the standard deviation `noise`.
    """
    losses = fitted.losses(points)
    drawn = np.repeat(losses[1:], 50, axis=0)
    drawn = drawn + np.random.default_rng(seed).normal(0, noise, drawn.shape)
    ends = np.percentile(drawn, (2.5, 10, 90, 97.5), axis=0)
    return [
        {"loss": float(loss), "80": [float(e[1]), float(e[2])], "95": [float(e[0]), float(e[3])]}
        for loss, e in zip(losses[0], ends.T, strict=True)
    ]


def sufficient_budgets(fitted: Fit, points: Points, noise: float, names: Sequence[str], seed: int) -> Mapping[str, Any]:
    """Returns coefficient -> floating-point operations of the largest run of a study that would determine it, or None.

    The study is simulated: the runs of `points`, with further slices of 4, 16, ... up to 256 times the largest compute.
    Each slice adds a size that is twice the largest. Losses follow the fitted law, with the noise of one run. A budget
    is enough if each of three simulations determines the coefficient. If 256 times the compute is not enough, the
    result is None. It presumes that the fitted law holds, although this coefficient is not determined.
    """
    central = dataclasses.replace(fitted, parameters=fitted.parameters[:1])
    rng, enough = np.random.default_rng(seed), dict.fromkeys(names)
    for slices, multiple in enumerate(_MULTIPLES, 1):
        grown = points.joined(_slices(points, slices))
        expected = central.losses(grown)[0]
        determined = []
        for study in range(_STUDIES):
            loss = np.maximum(expected + rng.normal(0, noise, len(expected)), 0.01 * expected)
            weights = resampled(len(loss), _RESAMPLES, seed + study, len(fitted.model.names))
            determined.append(fit(fitted.model, grown, loss, weights).estimates())
        for name in names:
            if enough[name] is None and all(estimates[name]["determined"] for estimates in determined):
                enough[name] = multiple * float(points.compute.max())
        if None not in enough.values():
            break
    return enough


def _slices(points: Points, count: int) -> Points:
    """Returns the runs of `count` further slices. Each has 4 times the compute of the slice before."""
    sizes, first = np.unique(points.parameters, return_index=True)
    per_example = points.compute[first] / points.examples[first]
    slope, offset = np.polyfit(np.log(sizes), np.log(per_example), 1)
    rows = []
    for i in range(1, count + 1):
        sizes = np.append(sizes, 2 * sizes[-1])
        per_example = np.append(per_example, np.exp(offset + slope * np.log(sizes[-1])))
        compute = np.full(len(sizes), points.compute.max() * 4.0**i)
        rows.append([sizes, compute / per_example, np.full(len(sizes), points.unique.max()), compute])
    return Points(*np.concatenate(rows, axis=1))
