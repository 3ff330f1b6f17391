"""Results of a scaling study, computed from the table of its runs: the contents of scaling/fit.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax.analysis import isoflop, scaling, scaling_law, trend
from geotoken_jax.analysis.scaling_law import Fit, Points
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM

#: Smallest number of runs that are fitted: two more than the coefficients of the law.
LEAST = 8
#: Amounts of compute on the frontier.
_FRONTIER = 13


def fitted_models(rows: Sequence[Mapping[str, Any]], s: ScalingSettings) -> tuple[Points, np.ndarray, list[Fit]]:
    """Returns the points and losses of runs, and each of scaling_law.MODELS fitted to them."""
    points, loss = scaling.points(rows), scaling.losses(rows)
    fits = []
    for model in scaling_law.MODELS:
        weights = scaling_law.resampled(len(loss), s.resamples, s.seed, len(model.names))
        fits.append(scaling_law.fit(model, points, loss, weights))
    return points, loss, fits


def forecast(rows: Sequence[Mapping[str, Any]], run: scaling.Run, s: ScalingSettings) -> dict[str, Any]:
    """Returns the forecast of a run's loss by each model, fitted to the rows.

    The result has `label` and `models`: name -> `loss`, the 80 % and 95 % prediction intervals `80` and `95`, and
    `noise`, the standard deviation of one run's loss.
    """
    points, loss, fits = fitted_models(rows, s)
    models = {}
    for fit in fits:
        noise = scaling_law.noise(fit, points, loss)["used"]
        models[fit.model.name] = {**scaling_law.predicted(fit, scaling.points([run]), noise, s.seed)[0], "noise": noise}
    return {"label": run.label, "models": models}


def results(rows: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Returns the fits of a study. rows: table of its runs; enough of them, see LEAST.

    `law`: coefficients of the law, see `Fit.estimates`, each with `budget` if it is not determined, see
    `sufficient_budgets`. `models`: name, number of coefficients, and root mean square error of each model, in sample
    and leave-one-out, in nats. `forecasts`: label -> leave-one-out forecast of the law. `noise`: see
    `scaling_law.noise`. `slices`, `power`: see `isoflop.slices`. `frontier`: see `frontier`. `transfer`: see
    `isoflop.learning_rates`. `accuracy`: trend of accuracy against loss per threshold. `neighbors`: trend of the loss
    against 1 + neighbors in training; None if there are fewer than four runs.
    """
    s = scaling.scaling_settings(config)
    fitted = [row for row in scaling.of_axes(rows, *scaling.FITTED) if row["loss"] is not None]
    points, loss, fits = fitted_models(fitted, s)
    law, noise = fits[0], scaling_law.noise(fits[0], points, loss)
    used = noise["used"]
    left_out = loss + scaling_law.leave_one_out(scaling_law.LAW, points, loss)
    estimates = law.estimates()
    unknown = [name for name, estimate in estimates.items() if estimate.get("determined") is False]
    budgets = scaling_law.sufficient_budgets(law, points, used, unknown, s.seed) if unknown else {}
    for name, budget in budgets.items():
        estimates[name]["budget"] = budget
    return {
        "law": estimates,
        "models": [_errors(fit, points, loss) for fit in fits],
        "forecasts": dict(zip([row["label"] for row in fitted], left_out.tolist(), strict=True)),
        "noise": noise,
        **isoflop.slices(scaling.of_axes(fitted, scaling.GRID), noise["seeds"] or used, s.seed),
        "frontier": frontier(config, law, used),
        "transfer": _transfer(rows, noise["seeds"] or used, s),
        "accuracy": _accuracy(fitted, s),
        "neighbors": _neighbors(rows, s),
    }


def _errors(fit: Fit, points: Points, loss: np.ndarray) -> dict[str, Any]:
    def size(errors: np.ndarray) -> float:
        return float(np.sqrt(np.mean(errors**2)))

    left_out = scaling_law.leave_one_out(fit.model, points, loss)
    in_sample = fit.losses(points)[0] - loss
    names = len(fit.model.names)
    return {"name": fit.model.name, "coefficients": names, "error": size(in_sample), "left_out": size(left_out)}


def frontier(config: Config, law: Fit, noise: float) -> list[dict[str, Any]]:
    """Returns the number of parameters with the smallest loss by the law, for amounts of compute.

    The amounts range from the smallest budget to the budget of the held-out run. The numbers of parameters range from
    the smallest to the largest size of the study, with the held-out one. Operations per example are interpolated
    between sizes. Each entry has `compute`, `parameters`, `examples`, `epochs`, `loss`, and its prediction intervals
    `80` and `95`.
    """
    s = scaling.scaling_settings(config)
    sized = {run.parameters: run for run in scaling.runs(config) if run.axis in (scaling.GRID, scaling.HELD_OUT)}
    sizes = np.array(sorted(sized), float)
    log_flops = np.log([sized[int(n)].flops for n in sizes])
    tried = np.geomspace(sizes[0], sizes[-1], 200)
    per_example = np.exp(np.interp(np.log(tried), np.log(sizes), log_flops))
    unique, best = max(run.unique for run in sized.values()), []
    for compute in np.geomspace(s.budgets[0], s.held_out_budget, _FRONTIER):
        points = Points(tried, compute / per_example, np.full(200, unique), np.full(200, compute))
        least = points.where([int(law.losses(points)[0].argmin())])
        predicted = scaling_law.predicted(law, least, noise, s.seed)[0]
        n, examples = float(least.parameters[0]), float(least.examples[0])
        place = {"compute": float(compute), "parameters": n, "examples": examples, "epochs": examples / unique}
        best.append({**place, **predicted})
    return best


def _transfer(rows: Sequence[dict[str, Any]], noise: float, s: ScalingSettings) -> list[dict[str, Any]]:
    """Returns the best learning rates, if every run of the axis is complete."""
    tried = scaling.of_axes(rows, scaling.RATE)
    if not tried or len(tried) < len(s.transfer) * len(s.rates):
        return []
    tried = [{**row, "loss": loss} for row, loss in zip(tried, scaling.losses(tried).tolist(), strict=True)]
    return isoflop.learning_rates(tried, noise, s.seed)


def _accuracy(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> list[dict[str, Any] | None]:
    """Returns the trend of accuracy against loss per threshold, over the runs that are fitted."""
    loss = scaling.losses(rows)
    accuracy = np.array([row["accuracy"] for row in rows])
    return [trend.fit(loss, accuracy[:, i], ("linear", "logistic"), s.seed) for i in range(len(THRESHOLDS_KM))]


def neighbor_rows(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> list[dict[str, Any]]:
    """Returns the runs that differ in the number of neighbors in training, fewest first, with the run of the grid."""
    label = scaling.run_label(s.reference, s.budgets[len(s.budgets) // 2])
    compared = [row for row in rows if row["axis"] == scaling.NEIGHBORS or row["label"] == label]
    return sorted((row for row in compared if row["loss"] is not None), key=lambda row: row["neighbors"])


def _neighbors(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> dict[str, Any] | None:
    compared = neighbor_rows(rows, s)
    x = 1.0 + np.array([row["neighbors"] for row in compared])
    return trend.fit(x, scaling.losses(compared), ("logarithmic", "power"), s.seed)


def trends_at_test_time(tested: Mapping[str, Any], seed: int) -> dict[str, dict[str, list[dict[str, Any] | None]]]:
    """Returns the trends of accuracy with the gallery, the neighbors and the candidates at test time.

    The result is a dict: part (gallery, neighbors, candidates) -> answer (first_neighbor, decoder, chosen, nearest) ->
    a trend per threshold. tested: contents of scaling/tested.json.
    """
    found: dict[str, Any] = {}
    for part in ("gallery", "neighbors", "candidates"):
        x = np.array([row["count"] for row in tested[part]], float)
        for answer in tested[part][0] if tested[part] else ():
            if answer != "count":
                shares = np.array([row[answer] for row in tested[part]])
                trends = [trend.fit(x, column, ("logarithmic", "power"), seed) for column in shares.T]
                found.setdefault(part, {})[answer] = trends
    return found


def measured_forecast(rows: Sequence[Mapping[str, Any]], folder: epath.Path) -> dict[str, Any] | None:
    """Returns the stored forecast, with the measured loss and the largest minus the smallest fitted loss, `spread`.

    The result is None until the held-out run is complete and the forecast is stored.
    """
    held_out = next((row for row in rows if row["axis"] == scaling.HELD_OUT), None)
    if held_out is None or held_out["loss"] is None or not (folder / scaling.FORECAST).exists():
        return None
    stored = json.loads((folder / scaling.FORECAST).read_text())
    fitted = [row["loss"] for row in rows if row["axis"] in scaling.FITTED and row["loss"] is not None]
    return {**stored, "measured": held_out["loss"], "spread": max(fitted) - min(fitted)}
