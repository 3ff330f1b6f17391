"""Presentation of a scaling study: the page with its charts, docs/scaling.md, and the summary in the terminal."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax.analysis import scaling, scaling_law, scaling_results, trend
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.manifests import StageError, write_bytes
from geotoken_jax.pages import coordinate_check, frame, scaling_charts
from geotoken_jax.pages.chart import Chart, Panels
from geotoken_jax.pages.frame import Section
from geotoken_jax.pages.table import Cell, Group, Row, Table, plain
from geotoken_jax.workdir import Workdir

_HEAD = """# Scaling

This page shows how the decoder's loss and accuracy depend on its size, on compute, on the number of train photos, on
the number of neighbors, on the size of the gallery and on the number of candidates. These commands print
all runs and their cost, check how activations depend on the width, train the runs, fit the laws to them, draw the
charts (scaling/index.html in the work directory), and write this page ({date}, {cores} {machine} cores).

```
geotoken scaling plan --config=configs/{name}.py
geotoken scaling check --config=configs/{name}.py --workdir=runs/demo
geotoken scaling run --config=configs/{name}.py --workdir=runs/demo
geotoken scaling fit --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --document --config=configs/{name}.py --workdir=runs/demo > docs/scaling.md
```
"""
_SIDE_BY_SIDE = """These commands train two runs at a time, on one thread each with
`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`:

```
seq 0 {last} | xargs -P 2 -I{{}} geotoken scaling run --index={{}} --config=... --workdir=...
geotoken scaling run --index={held_out} --config=... --workdir=...
```
"""
#: Coefficient of the law -> name in tables.
_LAW = {
    "E": "E, nats", "A": "A", "alpha": "a, of size", "B": "B", "beta": "b, of data", "repeats": "R*, of repetitions",
}  # fmt: skip
_ANSWERS = {
    "first_neighbor": "first neighbor", "decoder": "decoder", "chosen": "most probable", "nearest": "nearest to truth",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Part:
    """A section of the page and of the document: a heading, paragraphs, tables, and charts, which only the page has."""

    name: str
    title: str
    text: Sequence[str]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()

    def markdown(self) -> str:
        return "\n".join(
            [f"## {self.title}\n", *(f"{text}\n" for text in self.text), *(t.markdown() for t in self.tables)]
        )

    def section(self) -> Section:
        text = [f"<p>{escape(text)}</p>" for text in self.text]
        charts = [Panels(self.charts, ())] if self.charts else []
        return Section(self.name.lower().replace(" ", "-"), self.name, self.title, [*text, *charts, *self.tables])


def summary(fitted: Mapping[str, Any]) -> str:
    """Returns the law and the forecast as lines of text. fitted: result of stages.scaling.fit."""
    law = ", ".join(f"{name} = {_interval(fitted['law'][key])}" for key, name in _LAW.items())
    lines = [f"L = E + A / N^a + B / D'^b: {law}", *_undetermined(fitted["law"]), _forecast_text(fitted["forecast"])]
    return "\n".join(lines)


def document(config: Config, workdir: Workdir) -> str:
    """Returns the text of docs/scaling.md, from scaling/runs.json and scaling/fit.json of the work directory.

    Raises StageError if scaling/fit.json is missing.
    """
    s, runs = scaling.scaling_settings(config), len(scaling.runs(config))
    head = _HEAD.format(name=config.name, cores=os.cpu_count(), machine=platform.machine(), date=date.today())
    parts = [part.markdown() for part in _parts(config, workdir, *_read(workdir))]
    side_by_side = _SIDE_BY_SIDE.format(last=runs - 2, held_out=runs - 1)
    limits = "## What does not transfer\n\n" + "\n".join(f"- {line}" for line in s.limits) + "\n"
    return "\n".join([head, parts[0], side_by_side, *parts[1:], limits])


def plot(config: Config, workdir: Workdir) -> epath.Path:
    """Writes scaling/index.html, the page with charts, tables and limits of the study, and returns its path.

    Raises StageError if scaling/fit.json is missing.
    """
    s, (rows, fitted) = scaling.scaling_settings(config), _read(workdir)
    listed = "".join(f"<li>{escape(line)}</li>" for line in s.limits)
    limits = Section("limits", "Limits", "What does not transfer", [f"<ul>{listed}</ul>"])
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary(fitted).splitlines())
    file = workdir.path / scaling.FOLDER / "index.html"
    sections = [part.section() for part in _parts(config, workdir, rows, fitted)]
    page = frame.page("GeoToken: scaling", f"<h1>Scaling</h1>{lines}", [*sections, limits])
    write_bytes(file, page.encode())
    return file


def _read(workdir: Workdir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    files = [workdir.path / scaling.FOLDER / name for name in (scaling.RUNS, scaling.FIT)]
    if not files[1].exists():
        raise StageError(f"{files[1]} is missing: run `geotoken scaling fit` with the same --workdir first")
    rows, fitted = (json.loads(file.read_text()) for file in files)
    return rows, fitted


def _parts(config: Config, workdir: Workdir, rows: list[dict[str, Any]], fitted: Mapping[str, Any]) -> list[_Part]:
    """Returns the parts of the page in order. Parts whose runs are not complete are left out."""
    s = scaling.scaling_settings(config)
    parts = [
        _what_was_run(rows, s, len(scaling.runs(config))),
        _slices_part(rows, fitted),
        _law_part(rows, fitted),
        _forecast_part(rows, fitted),
        _frontier_part(rows, fitted),
        _learning_rate_part(fitted),
        _coordinate_part(workdir),
        _accuracy_part(rows, fitted),
        _neighbors_part(rows, fitted, s),
        _tested_part(fitted["tested"]),
        _Part("Runs", "Runs", [], [_runs_table(rows)]),
    ]
    return [part for part in parts if part]


def _what_was_run(rows: Sequence[dict[str, Any]], s: ScalingSettings, total: int) -> _Part:
    wall, cpu = (sum(row.get(name, 0.0) for row in rows) / 60 for name in ("wall", "cpu"))
    undone = f" {total - len(rows)} of {total} runs are not complete." if len(rows) < total else ""
    budgets = ", ".join(f"{budget:.2g}" for budget in s.budgets)
    text = [
        s.note,
        "N is the number of weights in encoder and decoder layers. D is the number of examples that a run reads. U is "
        "the number of distinct photos and views among which it reads; each set of photos contains the next smaller "
        "one. Neighbors come from the whole gallery for every U, so that the effect of train photos is separate from "
        "the effect of the gallery. Compute is counted in full: all matrix products, with the projections of features, "
        f"neighbors and the output layer, forward and backward. Every size is trained with {budgets} floating-point "
        "operations (FLOPs).",
        "L is the loss in nats per photo: the sum of the cross-entropies of all tokens, unweighted. Of "
        f"{s.validations} validations per run, the one with the smallest loss on one half of the validation photos "
        "counts. L and accuracy are measured on the other half.",
        f"{len(rows)} runs took {cpu:.0f} minutes of processor time and {wall:.0f} minutes of wall time, summed over "
        f"runs.{undone}",
    ]
    return _Part("Design", "What was run", text)


def _slices_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> _Part:
    grid = scaling.of_axes(rows, scaling.GRID)
    sizes = list(dict.fromkeys(row["size"] for row in grid))
    measured, optima = [], []
    for one in fitted["slices"]:
        losses = {row["size"]: row["loss"] for row in grid if row["budget"] == one["budget"]}
        best = min((loss for loss in losses.values() if loss), default=None)
        cells = [f"{losses.get(size) or np.nan:.3f}".replace("nan", "") for size in sizes]
        looks = ["best" if losses.get(size) == best else "" for size in sizes]
        marked = [Cell(cell, look=look) for cell, look in zip(cells, looks, strict=True)]
        measured.append(Row(f"{one['budget']:.2g}", marked))
        if one["at"]:
            found = [_number(one["at"]), f"{_number(one['low'])} to {_number(one['high'])}", f"{one['examples']:,.0f}"]
        else:
            found = ["", "", ""]
        optima.append([f"{one['budget']:.2g}", *found, "yes" if one["determined"] else "not determined"])
    power = fitted["power"]
    if power and power["determined"]:
        law = f"The best N grows as C^{power['value']:.2f} (95 % interval {power['low']:.2f} to {power['high']:.2f})."
    else:
        law = "The exponent of the best N is not determined: not every slice has an optimum inside the sizes."
    text = [
        "Loss of every size at equal compute, on the most photos. A parabola in log N is fitted to the "
        "smallest loss of a slice and the sizes beside it (approach 2 of Hoffmann et al. 2022, arXiv "
        "2203.15556). Its minimum is the best N. It is not determined if noise moves it beyond the smallest "
        "or the largest size in more than 5 % of simulations. " + law,
    ]
    tables = [
        Table(["FLOPs", *sizes], [Group(measured)]),
        plain(["FLOPs", "best N", "95 % interval", "examples there", "determined"], optima),
    ]
    return _Part("Equal compute", "Sizes at equal compute", text, tables, scaling_charts.slices(rows, fitted))


def _undetermined(law: Mapping[str, Any]) -> list[str]:
    """Returns a sentence per coefficient of the law that is not determined."""
    lines = []
    for key, name in _LAW.items():
        if law[key].get("determined") is False:
            budget = law[key].get("budget")
            enough = (
                f"in simulations with the fitted law, slices of up to {budget:.1e} FLOPs determine it"
                if budget
                else "in simulations with the fitted law, 256 times the compute does not determine it either"
            )
            lines.append(f"{name} is not determined; {enough}.")
    return lines


def _law_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> _Part:
    law, noise = fitted["law"], fitted["noise"]
    lines = []
    for key, name in _LAW.items():
        determined = {True: "yes", False: "not determined"}.get(law[key].get("determined"), "")
        lines.append([name, _number(law[key]["value"]), _range(law[key]), determined])
    seeds = f"{noise['seeds']:.3f}" if noise["seeds"] is not None else "not measured"
    text = [
        "L = E + A / N^a + B / D'^b is fitted to the runs of the grid, on fewer photos and with other seeds "
        "(approach 3 of Hoffmann et al. 2022). D' is the effective number of examples: D' = U + U R* (1 - exp(-R / "
        "R*)), where R = D / U - 1 is the number of repetitions (Muennighoff et al. 2023, arXiv 2305.16264). The "
        "Huber loss of logarithms is minimized from 32 starts. Intervals are percentiles 2.5 and 97.5 of a "
        "bootstrap over runs, in which each resample is fitted from all starts. A coefficient is not determined if "
        f"its interval reaches a bound of the fit, or if the upper end is more than {scaling_law.WIDEST:g} times the "
        "lower end.",
        *([" ".join(_undetermined(law))] if _undetermined(law) else []),
        f"The standard deviation of runs that differ only in the seed: {seeds} nats; of all runs around the law: "
        f"{noise['residuals']:.3f} nats.",
    ]
    models = [
        [model["name"], str(model["coefficients"]), f"{model['error']:.4f}", f"{model['left_out']:.4f}"]
        for model in fitted["models"]
    ]
    heads = ["model", "coefficients", "error, nats", "leave-one-out error, nats"]
    tables = [plain(["", "value", "95 % interval", "determined"], lines), plain(heads, models)]
    return _Part("Law", "The law of size and data", text, tables, [scaling_charts.law(rows, fitted)])


def _forecast_text(forecast: Mapping[str, Any] | None) -> str:
    if forecast is None:
        return "The held-out run is not complete."
    best, measured = forecast["models"][scaling_law.LAW.name], forecast["measured"]
    inside = "inside" if best["80"][0] <= measured <= best["80"][1] else "outside"
    return (
        f"Forecast of {forecast['label']}, stored before it was trained: {best['loss']:.3f} nats, 80 % prediction "
        f"interval {best['80'][0]:.3f} to {best['80'][1]:.3f}. Measured: {measured:.3f}, {inside} the interval."
    )


def _forecast_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> _Part | None:
    forecast = fitted["forecast"]
    if forecast is None:
        return None
    measured = forecast["measured"]
    lines = []
    for name in (model.name for model in scaling_law.MODELS):
        model = forecast["models"][name]
        inside = "yes" if model["80"][0] <= measured <= model["80"][1] else "no"
        ends = (f"{model[share][0]:.3f} to {model[share][1]:.3f}" for share in ("80", "95"))
        lines.append([name, f"{model['loss']:.3f}", *ends, f"{model['loss'] - measured:+.3f}", inside])
    held_out = next(row for row in rows if row["label"] == forecast["label"])
    most = max(row["compute"] for row in scaling.of_axes(rows, scaling.GRID))
    text = [
        _forecast_text(forecast),
        f"The held-out run has {held_out['parameters']:,} parameters and {held_out['compute'] / most:.1f} times the "
        "largest compute of the grid. The prediction intervals contain the uncertainty of the coefficients and the "
        "noise of one run. The constant, the null model, is a robust mean of all losses. The power law in compute is "
        f"L = E + K / C^c. All fitted losses are within {forecast['spread']:.3f} nats.",
    ]
    heads = ["model", "forecast, nats", "80 % interval", "95 % interval", "error", "inside 80 %"]
    return _Part("Forecast", "A run that was forecast", text, [plain(heads, lines)])


def _frontier_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> _Part:
    lines = [
        [f"{p['compute']:.2g}", _number(p["parameters"]), f"{p['examples']:,.0f}", f"{p['epochs']:.2g}",
         f"{p['loss']:.3f}", f"{p['80'][0]:.3f} to {p['80'][1]:.3f}"]
        for p in fitted["frontier"]
    ]  # fmt: skip
    text = [
        "The number of parameters with the smallest loss by the law, on the most photos, and the prediction interval."
    ]
    heads = ["FLOPs", "best N", "examples", "epochs", "loss, nats", "80 % interval"]
    return _Part("Frontier", "Compute frontier", text, [plain(heads, lines)], [scaling_charts.frontier(rows, fitted)])


def _learning_rate_part(fitted: Mapping[str, Any]) -> _Part | None:
    if not fitted["transfer"]:
        return None
    lines, ratios = [], []
    for entry in fitted["transfer"]:
        for one in entry["widths"]:
            cells = [_number(one["at"]), _range(one)] if one["at"] else ["", ""]
            determined = "yes" if one["determined"] else "not determined"
            lines.append([entry["parametrization"], str(one["width"]), *cells, determined])
        if entry["ratio"]:
            doubt = "" if entry["determined"] else "; an optimum is not determined"
            ratios.append(
                f"{entry['parametrization']}: the best rates of all widths are within a factor of {entry['ratio']:.2f} "
                f"(95 % interval {entry['low']:.2f} to {entry['high']:.2f}{doubt})."
            )
        else:
            ratios.append(f"{entry['parametrization']}: a width has no best rate inside the tried rates.")
    text = [
        "Learning rates were tried at several widths with one depth. A parabola in the logarithm of the rate gives the "
        "best rate of a width. " + " ".join(ratios),
    ]
    heads = ["parametrization", "width", "best rate", "95 % interval", "determined"]
    charts = scaling_charts.learning_rates(fitted["transfer"])
    return _Part("Learning rate", "Transfer of the learning rate", text, [plain(heads, lines)], charts)


def _coordinate_part(workdir: Workdir) -> _Part | None:
    file = workdir.path / scaling.FOLDER / scaling.CHECK
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    names = list(result["slopes"])
    lines = [
        [
            activation,
            *(f"{result['slopes'][name][activation][key]:+.2f}" for name in names for key in ("rms", "change")),
        ]
        for activation in result["slopes"][names[0]]
    ]
    heads = ["activation", *(f"{name}, {key}" for name in names for key in ("size", "change"))]
    text = [
        f"Exponents of the width: the slope of the logarithm of an activation's root mean square, and of its change in "
        f"{result['steps']} training steps, over widths {', '.join(map(str, result['widths']))}. With mup they should "
        "be 0: the width then does not change the scale of activations.",
    ]
    return _Part("Coordinates", "Coordinate check", text, [plain(heads, lines)], coordinate_check.charts(result))


def _trend_cells(found: Mapping[str, Any] | None) -> list[str]:
    """Returns the cells of a trend: formula, a and b with intervals, and leave-one-out errors."""
    if not found:
        return ["", "", "", "", ""]
    constant = f"{found['errors']['constant']:.4f}"
    a, b = (_interval(found[name]) for name in "ab")
    return [trend.FORMS[found["form"]], a, b, f"{found['errors'][found['form']]:.4f}", constant]


_TREND_HEADS = ("y", "a", "b", "leave-one-out error", "of a constant")


def _accuracy_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> _Part:
    lines = [[f"{km:,} km", *_trend_cells(found)] for km, found in zip(THRESHOLDS_KM, fitted["accuracy"], strict=True)]
    text = [
        "Share y of greedy answers within a distance, by loss x, over the runs that the law is fitted to. Of a "
        "straight line, a logistic curve and a constant, the form with the smallest leave-one-out error is shown, "
        "with 95 % intervals from a bootstrap over runs.",
    ]
    chart = scaling_charts.accuracy(rows, fitted)
    return _Part("Accuracy", "Accuracy by loss", text, [plain(["within", *_TREND_HEADS], lines)], [chart])


def _neighbors_part(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any], s: ScalingSettings) -> _Part | None:
    compared = scaling_results.neighbor_rows(rows, s)
    if len(compared) < 2:
        return None
    lines = [
        [str(row["neighbors"]), f"{row['loss']:.3f}", *(f"{100 * share:.1f}" for share in row["accuracy"])]
        for row in compared
    ]
    found = fitted["neighbors"]
    text = [f"{s.reference}, trained and validated with different numbers of neighbors, on as many examples."]
    if found:
        text.append("Loss y by x = 1 + neighbors: " + _trend_sentence(found))
    heads = ["neighbors", "loss, nats", *(f"{km:,} km, %" for km in THRESHOLDS_KM)]
    return _Part("Neighbors", "Neighbors", text, [plain(heads, lines)], [scaling_charts.neighbors(compared, found)])


def _trend_sentence(found: Mapping[str, Any]) -> str:
    formula, a, b, error, constant = _trend_cells(found)
    return f"y = {formula}, a = {a}, b = {b}; leave-one-out error {error}, of a constant {constant}."


def _tested_part(tested: Mapping[str, Any] | None) -> _Part | None:
    if tested is None:
        return None
    share, n = tested["gallery"][-1]["decoder"][2], tested["photos"]
    shares, trends = [], []
    for part, answers in tested["trends"].items():
        for answer, fits in answers.items():
            for row in tested[part]:
                cells = [f"{100 * value:.1f}" for value in row[answer]]
                shares.append([part, f"{row['count']:,}", _ANSWERS[answer], *cells])
            for km, found in zip(THRESHOLDS_KM, fits, strict=True):
                if found:
                    trends.append([part, _ANSWERS[answer], f"{km:,} km", *_trend_cells(found)])
    text = [
        f"Percent of the {n:,} photos of {tested['split']} that {tested['label']} places within a distance; 95 % "
        f"intervals are about ±{196 * np.sqrt(share * (1 - share) / n):.1f} points. The gallery is reduced to random "
        "photos, and each set contains the next smaller one. With fewer neighbors, the decoder reads only the first. "
        "The decoder was trained with the whole gallery and all neighbors. Candidates are the greedy candidate and K "
        "samples; no choice among them can surpass the candidate that is nearest to the truth.",
        "The second table has the trend of each share y with the number x: a logarithm, a power law or a constant, "
        "the form with the smallest leave-one-out error.",
    ]
    tables = [
        plain(["varied", "number", "answer", *(f"{km:,} km" for km in THRESHOLDS_KM)], shares),
        plain(["varied", "answer", "within", *_TREND_HEADS], trends),
    ]
    return _Part(
        "Test time", "Gallery, neighbors and candidates at test time", text, tables, scaling_charts.tested(tested)
    )


def _runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    heads = [
        "run",
        "varies",
        "N",
        "photos",
        "neighbors",
        "rate",
        "examples",
        "epochs",
        "best after",
        "FLOPs",
        "loss, nats",
    ]
    heads += [f"{km:,} km, %" for km in THRESHOLDS_KM] + ["CPU, s"]
    lines = [
        [
            row["label"],
            row["axis"],
            *(f"{row[name]:,}" for name in ("parameters", "photos", "neighbors")),
            f"{row['rate']:.2g}",
            f"{row['examples']:,}",
            f"{row['examples'] / row['unique']:.2g}",
            f"{row['seen']:,}",
            f"{row['compute']:.2g}",
            "diverged" if row["loss"] is None else f"{row['loss']:.3f}",
            *(f"{100 * share:.1f}" for share in row["accuracy"]),
            f"{row.get('cpu', 0):.0f}",
        ]
        for row in rows
    ]
    return plain(heads, lines)


def _interval(part: Mapping[str, float]) -> str:
    return f"{_number(part['value'])} ({_range(part)})"


def _range(part: Mapping[str, float]) -> str:
    return f"{_number(part['low'])} to {_number(part['high'])}"


def _number(value: float) -> str:
    """Returns a number with three significant digits, or as an integer from 1,000 to 999,999: 0.413, 11.2, 1,230."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
