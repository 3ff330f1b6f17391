"""Charts of a scaling study, for pages/scaling.py. They read scaling/runs.json (`rows`) and scaling/fit.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geotoken_jax.analysis import scaling, scaling_law, trend
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages.chart import Chart, Series

Rows = Sequence[Mapping[str, Any]]
_ABOVE = "nats above the best run"


def least(rows: Rows) -> float:
    """Returns the smallest loss of the rows. Charts of losses show the difference from it."""
    return min(row["loss"] for row in rows if row["loss"] is not None)


def dots(
    name: str, color: int, rows: Rows, x: str, low: float, listed: bool = True, notes: Sequence[str] = ()
) -> list[Series]:
    """Returns a dot per run without a line: the run's loss minus `low`. x: key of the x value in a row.

    listed: whether the legend has the name. notes: tooltips; label and loss if empty.
    """
    series = []
    for i, row in enumerate(row for row in rows if row["loss"] is not None):
        note = notes[i] if notes else f"{row['label']}: {row['loss']:.3f} nats"
        y = np.array([row["loss"] - low])
        series.append(Series(name, color, y, np.array([float(row[x])]), y, y, notes=[note], listed=listed and not i))
    return series


def slices(rows: Rows, fitted: Mapping[str, Any]) -> list[Chart]:
    """Returns loss by number of parameters with a parabola per budget, and the best number of parameters by compute."""
    grid = scaling.of_axes(list(map(dict, rows)), scaling.GRID)
    low, series, optima = least(grid), [], []
    for color, one in enumerate(fitted["slices"]):
        same = [row for row in grid if row["budget"] == one["budget"]]
        name = f"{one['budget']:.2g} FLOPs"
        series += dots(name, color, same, "parameters", low)
        if one["at"]:
            x = np.geomspace(one["near"][0], one["near"][1], 40)
            y = np.polyval(one["coefficients"], np.log(x)) - low
            series.append(Series(f"{name}, parabola", color, y, x, style="dashed", listed=False))
            at, best = np.array([one["at"]]), np.array([one["loss"] - low])
            series.append(
                Series(f"{name}, optimum", 7, best, at, best, best, notes=[f"{one['at']:,.0f}"], listed=False)
            )
            optima.append(one)
    charts = [
        Chart(
            "Dots: runs; dashed: parabolas; gray dots: optima", "Loss by parameters at equal compute",
            "parameters N", _ABOVE, series, log_x=True, legend=None,
        )
    ]  # fmt: skip
    if optima:
        charts.append(_optima(optima, fitted))
    return charts


def _optima(optima: Rows, fitted: Mapping[str, Any]) -> Chart:
    x, at, low, high = (np.array([one[k] for one in optima], float) for k in ("budget", "at", "low", "high"))
    series = [
        Series("optimum of a slice", 0, at[i : i + 1], x[i : i + 1], low[i : i + 1], high[i : i + 1],
               notes=[f"{at[i]:,.0f} parameters"], listed=not i)
        for i in range(len(optima))
    ]  # fmt: skip
    compute, by_law = (np.array([p[k] for p in fitted["frontier"]]) for k in ("compute", "parameters"))
    if fitted["power"]:
        power = np.exp(fitted["power"]["offset"] + fitted["power"]["value"] * np.log(compute))
        series.append(Series("power law of the optima", 0, power, compute, style="dashed"))
    series.append(Series("optimum of the law", 1, by_law, compute))
    return Chart(
        "Best size; whiskers: 95 % intervals", "Best number of parameters by compute", "FLOPs", "parameters N", series,
        log_x=True, log_y=True, legend=None,
    )  # fmt: skip


def frontier(rows: Rows, fitted: Mapping[str, Any]) -> Chart:
    """Returns loss by compute: all runs of the grid, the frontier of the law with its band, and the held-out run."""
    grid, held_out = ([r for r in rows if r["axis"] == axis] for axis in (scaling.GRID, scaling.HELD_OUT))
    low, series = least([*grid, *held_out]), []
    for color, size in enumerate(dict.fromkeys(row["size"] for row in grid)):
        series += dots(size, color, [row for row in grid if row["size"] == size], "compute", low)
    points = fitted["frontier"]
    x, y = (np.array([p[key] for p in points]) for key in ("compute", "loss"))
    for end in (0, 1):
        edge = np.array([p["80"][end] for p in points])
        series.append(Series("80 % prediction interval", 6, edge - low, x, style="dotted", listed=not end))
    series.append(Series("frontier of the law", 6, y - low, x))
    series += dots("held out", 7, held_out, "compute", low)
    return Chart("Compute frontier", "Loss by compute", "FLOPs", _ABOVE, series, log_x=True, legend=None)


def law(rows: Rows, fitted: Mapping[str, Any]) -> Chart:
    """Returns the law's forecast by measured loss: of each fitted run, left out of the fit, and of the held-out run."""
    shown = [row for row in rows if row["label"] in fitted["forecasts"]]
    series, measured = [], [row["loss"] for row in shown]
    names = {scaling.GRID: "grid", scaling.PHOTOS: "fewer photos", scaling.SEED: "other seed"}
    for color, (axis, name) in enumerate(names.items()):
        for i, row in enumerate(row for row in shown if row["axis"] == axis):
            y = np.array([fitted["forecasts"][row["label"]]])
            note = f"{row['label']}: forecast {y[0]:.3f}, measured {row['loss']:.3f}"
            series.append(Series(name, color, y, np.array([row["loss"]]), y, y, notes=[note], listed=not i))
    if fitted["forecast"]:
        best, x = fitted["forecast"]["models"][scaling_law.LAW.name], fitted["forecast"]["measured"]
        low_end, high_end = (np.array([end]) for end in best["80"])
        note = f"forecast {best['loss']:.3f}, measured {x:.3f}"
        series.append(
            Series("held out, 80 %", 7, np.array([best["loss"]]), np.array([x]), low_end, high_end, notes=[note])
        )
        measured.append(x)
    low = min(min(measured), *(float(s.y.min()) for s in series))
    moved = [_moved(s, low) for s in series]
    line = np.array([0.0, max(measured) - low])
    moved.append(Series("equal", 6, line, line, style="faint", listed=False))
    axis = "nats above the smallest loss"
    return Chart(
        "Leave-one-out forecasts", "Forecast by measured loss", f"measured, {axis}", "forecast", moved, legend=None
    )


def _moved(s: Series, low: float) -> Series:
    assert s.x is not None and s.low is not None and s.high is not None
    return Series(s.name, s.color, s.y - low, s.x - low, s.low - low, s.high - low, notes=s.notes, listed=s.listed)


def learning_rates(transfer: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Returns a chart of loss by learning rate per parametrization, and a chart of the best rates by width."""
    charts, best = [], []
    for number, entry in enumerate(transfer):
        series = []
        low = min(min(one["losses"]) for one in entry["widths"])
        for color, one in enumerate(entry["widths"]):
            x, y = np.array(one["rates"]), np.array(one["losses"]) - low
            notes = [
                f"width {one['width']}, rate {rate:g}: {loss + low:.3f} nats" for rate, loss in zip(x, y, strict=True)
            ]
            series.append(Series(f"width {one['width']}", color, y, x, y, y, notes=notes))
        name = entry["parametrization"]
        charts.append(
            Chart(name, f"Loss by learning rate, {name}", "learning rate", "nats above the best run", series,
                  log_x=True, legend=None)
        )  # fmt: skip
        found = [one for one in entry["widths"] if one["at"]]
        if found:
            x, y, low_end, high = (np.array([one[k] for one in found], float) for k in ("width", "at", "low", "high"))
            notes = [f"{name}, width {one['width']}: {one['at']:.2g}" for one in found]
            best.append(Series(name, number, y, x, low_end, high, notes=notes))
    if best:
        caption = "Best learning rate; whiskers: 95 % intervals"
        charts.append(Chart(caption, caption, "width", "learning rate", best, log_x=True, log_y=True, legend=None))
    return charts


def accuracy(rows: Rows, fitted: Mapping[str, Any]) -> Chart:
    """Returns accuracy by loss, one color per threshold, with the fitted trends."""
    shown = [row for row in rows if row["axis"] in scaling.FITTED and row["loss"] is not None]
    loss = np.array([row["loss"] for row in shown])
    shares = np.array([row["accuracy"] for row in shown])
    notes = [row["label"] for row in shown]
    series = _with_trends(loss, shares, fitted["accuracy"], notes, log=False)
    return Chart("Dots: runs; dashed: trends", "Accuracy by loss", "loss, nats", "percent within", series, legend=None)


def neighbors(rows: Rows, found: Mapping[str, Any] | None) -> Chart:
    """Returns loss by 1 + neighbors in training. rows: result of scaling_results.neighbor_rows. found: their trend."""
    low, x = least(rows), np.array([1.0 + row["neighbors"] for row in rows])
    series = dots("runs", 0, [{**row, "x": 1 + row["neighbors"]} for row in rows], "x", low)
    if found:
        tried = np.geomspace(x[0], x[-1], 40)
        series.append(Series(trend.FORMS[found["form"]], 0, trend.curve(found, tried) - low, tried, style="dashed"))
    return Chart("Neighbors in training", "Loss by neighbors", "1 + neighbors", _ABOVE, series, log_x=True, legend=None)


def tested(found: Mapping[str, Any]) -> list[Chart]:
    """Returns a chart per part of scaling/tested.json and answer: percent within each threshold, with the trends."""
    labels = {"gallery": "photos in the gallery", "neighbors": "neighbors", "candidates": "samples"}
    charts = []
    for part, label in labels.items():
        for answer, trends in found["trends"].get(part, {}).items():
            x = np.array([row["count"] for row in found[part]], float)
            shares = np.array([row[answer] for row in found[part]])
            series = _with_trends(x, shares, trends, [f"{n:,.0f} {label}" for n in x], log=True)
            caption = f"{answer.replace('_', ' ')}, by {label}"
            charts.append(Chart(caption, caption, label, "percent within", series, log_x=True, legend=None))
    return charts


def _with_trends(
    x: np.ndarray, shares: np.ndarray, trends: Sequence[Any], notes: Sequence[str], log: bool
) -> list[Series]:
    """Returns the dots of each threshold and the curve of its trend, as percent. shares: [n, thresholds]."""
    series = []
    space = np.geomspace if log else np.linspace
    for color, (km, column, found) in enumerate(zip(THRESHOLDS_KM, 100 * shares.T, trends, strict=True)):
        for i, (at, share) in enumerate(zip(x, column, strict=True)):
            y = np.array([share])
            note = f"{notes[i]}: {share:.1f} % within {km:,} km"
            series.append(Series(f"{km:,} km", color, y, np.array([at]), y, y, notes=[note], listed=not i))
        if found:
            tried = space(x.min(), x.max(), 40)
            y = 100 * trend.curve(found, tried)
            series.append(Series(f"{km:,} km, trend", color, y, tried, style="dashed", listed=False))
    return series
