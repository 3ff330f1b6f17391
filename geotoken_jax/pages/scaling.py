"""Presentation of a scaling study: the page with its charts, docs/scaling.md, and the summary in the terminal."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax.analysis import scaling
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.manifests import StageError, write_bytes
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import plain
from geotoken_jax.workdir import Workdir

_HEAD = """# Scaling

This page shows how the decoder's loss and accuracy depend on its size, on the number of train photos, on the number of
neighbors, on the size of the gallery and on the number of candidates. The first of these commands trains the runs, and
the second fits the law to them. The third draws the charts, scaling/index.html in the work directory, and the last
wrote this page ({date}, {cores} {machine} cores).

```
geotoken scaling run --config=configs/{name}.py --workdir=runs/demo
geotoken scaling fit --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --document --config=configs/{name}.py --workdir=runs/demo > docs/scaling.md
```
"""
_SIDE_BY_SIDE = "seq 0 {last} | xargs -P 2 -I{{}} geotoken scaling run --index={{}} --config=... --workdir=..."
_LAW = (("E", "E, nats"), ("A", "A"), ("alpha", "a, of size"), ("B", "B"), ("beta", "b, of data"))


def summary(fitted: Mapping[str, Any]) -> str:
    """Returns the law and the forecast as two lines of text. fitted: result of stages.scaling.fit."""
    law = ", ".join(f"{name} = {_interval(fitted['law'][key])}" for key, name in _LAW)
    return f"L(N, D) = E + A / N^a + B / D^b: {law}\n{_forecast(fitted['forecast'])}"


def document(config: Config, workdir: Workdir) -> str:
    """Returns the text of docs/scaling.md, from scaling/runs.json and scaling/fit.json of the work directory.

    Raises StageError if scaling/fit.json is missing.
    """
    rows, fitted, s = *_read(workdir), scaling.scaling_settings(config)
    header = {"name": config.name, "cores": os.cpu_count(), "machine": platform.machine(), "date": date.today()}
    sections = [
        _HEAD.format(**header),
        _what_was_run(rows, s, config),
        "## Runs\n\n" + plain(*_runs_table(rows)).markdown(),
        _law_section(fitted),
        f"## A size that was not fitted\n\n{_forecast(fitted['forecast'])}\n",
        _compute_section(rows, fitted, s),
        _neighbors_section(rows, s),
        _accuracy_section(fitted),
        _tested_section(fitted["tested"]),
        "## What does not transfer\n\n" + "\n".join(f"- {line}" for line in s.limits) + "\n",
    ]
    return "\n".join(section for section in sections if section)


def plot(config: Config, workdir: Workdir) -> epath.Path:
    """Writes scaling/index.html, the page with the charts and the table of runs, and returns its path.

    Raises StageError if scaling/fit.json is missing.
    """
    rows, fitted, s = *_read(workdir), scaling.scaling_settings(config)
    grid = [row for row in rows if row["axis"] in ("grid", "held out")]
    sections = [
        Section("loss", "Loss", "Loss by number of photos and by size", _loss_charts(grid, fitted)),
        Section("compute", "Compute", "Loss by compute", [Panels([_compute_chart(rows, s)], ())]),
        Section("accuracy", "Accuracy", "Accuracy by loss", [Panels([_accuracy_chart(grid)], ())]),
    ]
    if fitted["tested"]:
        charts = Panels(_tested_charts(fitted["tested"]), ())
        sections.append(Section("tested", "Test time", "Gallery and candidates at test time", [charts]))
    sections.append(Section("runs", "Runs", "All runs", [plain(*_runs_table(rows))]))
    headline = f"<h1>Scaling</h1><p>{escape(summary(fitted))}</p>"
    file = workdir.path / scaling.FOLDER / "index.html"
    write_bytes(file, frame.page("GeoToken: scaling", headline, sections).encode())
    return file


def _read(workdir: Workdir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    files = [workdir.path / scaling.FOLDER / name for name in (scaling.RUNS, scaling.FIT)]
    if not files[1].exists():
        raise StageError(f"{files[1]} is missing: run `geotoken scaling fit` with the same --workdir first")
    rows, fitted = (json.loads(file.read_text()) for file in files)
    return rows, fitted


def _what_was_run(rows: Sequence[dict[str, Any]], s: ScalingSettings, config: Config) -> str:
    wall, cpu = (sum(row.get(name, 0.0) for row in rows) / 60 for name in ("wall", "cpu"))
    examples = ", ".join(f"{count:,} examples of {photos:,}" for photos, count in s.photos)
    total = len(scaling.runs(config))
    undone = f" {total - len(rows)} of {total} runs are not complete." if len(rows) < total else ""
    return (
        f"## What was run\n\n{s.note}\n\n"
        "N is the number of weights in encoder and decoder layers. D is the number of distinct photos that the decoder "
        "is trained on, with their views; each set of photos contains the next smaller one. Neighbors come from the "
        "whole gallery for every D, so that the effect of train photos is separate from the effect of the gallery, "
        "which has a section below. L is the validation loss in nats per photo: the sum of the cross-entropies of all "
        f"tokens, unweighted, at the lowest of {s.validations} validations. Runs of the grid see {examples}. With the "
        "fewest photos the loss rises again before the end.\n\n"
        f"{len(rows)} runs took {cpu:.0f} minutes of processor time and {wall:.0f} minutes of wall time, summed over "
        f"runs that shared the cores with each other and with other programs.{undone} These commands train two runs at "
        "a time, on one thread each with `XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`:\n\n"
        f"```\n{_SIDE_BY_SIDE.format(last=total - 2)}\n"
        f"geotoken scaling run --index={total - 1} --config=... --workdir=...\n```\n"
    )


def _runs_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the column heads, and the cells of each run's row."""
    heads = ["run", "varies", "N", "photos", "neighbors", "examples", "best after", "GFLOPs", "loss, nats"]
    heads += [f"{km:,} km, %" for km in THRESHOLDS_KM] + ["CPU, s"]
    return heads, [
        [
            row["label"],
            row["axis"],
            *(f"{row[name]:,}" for name in ("parameters", "photos", "neighbors", "examples", "seen")),
            f"{row['compute'] / 1e9:,.0f}",
            f"{row['loss']:.3f}",
            *(f"{100 * share:.1f}" for share in row["accuracy"]),
            f"{row.get('cpu', 0):.0f}",
        ]
        for row in rows
    ]


def _law_section(fitted: Mapping[str, Any]) -> str:
    lines = [[name, _number(fitted["law"][key]["value"]), _range(fitted["law"][key])] for key, name in _LAW]
    noise, spread = "", fitted["noise"]
    if spread is not None:
        noise = f" The loss of runs that differ only in the seed has a standard deviation of {spread:.3f} nats."
    return (
        "## The law\n\nL(N, D) = E + A / N^a + B / D^b, fitted to the grid with approach 3 of Hoffmann et al. 2022: "
        "L-BFGS from 32 starts minimizes the Huber loss of logarithms. Intervals are percentiles 2.5 and 97.5 of a "
        "bootstrap over runs.\n\n"
        + plain(["", "value", "95 % interval"], lines).markdown()
        + f"\nThe root mean square error of the fit over the grid is {fitted['error']:.3f} nats."
        + f"{noise}\n"
    )


def _forecast(forecast: Mapping[str, Any] | None) -> str:
    if forecast is None:
        return "The held-out run is not complete."
    measured, error = forecast["measured"], forecast["loss"] - forecast["measured"]
    naive = forecast["as_the_largest"] - measured
    return (
        f"Forecast of {forecast['label']}, stored before it was trained: {forecast['loss']:.3f} nats "
        f"({forecast['low']:.3f} to {forecast['high']:.3f}). Measured: {measured:.3f}. The error of the forecast is "
        f"{error:+.3f} nats, {100 * abs(error) / measured:.2f} % of the loss. The loss of the largest fitted size, "
        f"taken as the forecast, has an error of {naive:+.3f} nats. For comparison, all losses of the grid are within "
        f"{forecast['spread']:.3f} nats, {100 * forecast['spread'] / measured:.1f} % of the loss."
    )


def _compute_section(rows: Sequence[dict[str, Any]], fitted: Mapping[str, Any], s: ScalingSettings) -> str:
    lines = [
        [f"{p['compute'] / 1e9:,.0f}", p["size"], f"{p['photos']:,.0f}", f"{p['loss']:.3f}"] for p in fitted["frontier"]
    ]
    spent = {row["label"]: row for row in rows if row["axis"] == "compute"}
    measured = []
    for budget in s.budgets:
        losses = {size: spent.get(scaling.spent_on(size, budget), {}).get("loss") for size in s.fitted}
        least = min((loss for loss in losses.values() if loss), default=None)
        cells = [
            "" if loss is None else f"**{loss:.3f}**" if loss == least else f"{loss:.3f}" for loss in losses.values()
        ]
        measured.append([f"{budget / 1e9:,.0f}", *cells])
    return (
        "## Compute\n\nSize and number of photos with the lowest loss by the law, for an amount of compute. Sizes are "
        "the sizes of the study, and the number of examples per number of photos is the same as in the study:\n\n"
        + plain(["GFLOPs", "size", "photos", "loss, nats"], lines).markdown()
        + "\nMeasured loss of every size with the same compute, on all photos:\n\n"
        + plain(["GFLOPs", *s.fitted], measured).markdown()
    )


def _neighbors_section(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> str:
    base = f"{s.reference}_{s.photos[-1][0]}"
    compared = [row for row in rows if row["axis"] == "neighbors" or row["label"] == base]
    compared.sort(key=lambda row: row["neighbors"])
    lines = [
        [str(row["neighbors"]), f"{row['loss']:.3f}", *(f"{100 * share:.1f}" for share in row["accuracy"])]
        for row in compared
    ]
    heads = ["neighbors", "loss, nats", *(f"{km:,} km, %" for km in THRESHOLDS_KM)]
    return (
        f"## Neighbors\n\n{s.reference}, trained and validated with different numbers of neighbors:\n\n"
        + plain(heads, lines).markdown()
    )


def _accuracy_section(fitted: Mapping[str, Any]) -> str:
    lines = [
        [f"{line['km']:,} km", f"{100 * line['a_nat_less']:+.1f}", f"{100 * line['explained']:.0f} %"]
        for line in fitted["accuracy"]
    ]
    return (
        "## Accuracy by loss\n\nLinear fits over the runs of the grid: percentage points of accuracy of greedy answers "
        "gained per nat of lower loss, and the share of the variance between runs that the fit explains.\n\n"
        + plain(["within", "points per nat", "explained"], lines).markdown()
    )


def _tested_section(tested: Mapping[str, Any] | None) -> str:
    if tested is None:
        return ""
    share, n = tested["gallery"][-1]["decoder"][2], tested["photos"]
    by_gallery, by_candidates = _tested_rows(tested)
    heads = [f"{km:,} km" for km in THRESHOLDS_KM]
    return (
        f"## Gallery and candidates at test time\n\nPercent of the {n:,} photos of `{tested['split']}` that "
        f"{tested['label']} places within a distance; 95 % intervals are about "
        f"±{196 * np.sqrt(share * (1 - share) / n):.1f} points. The gallery is reduced to random photos, and each set "
        "contains the next smaller one. The decoder was trained with the whole gallery.\n\n"
        + plain(["gallery", "answer of", *heads], by_gallery).markdown()
        + "\nCandidates are the greedy candidate and K samples. `chosen` is the most probable candidate, `nearest` the "
        "candidate nearest to the truth, which no choice can surpass:\n\n"
        + plain(["K", "candidate", *heads], by_candidates).markdown()
    )


def _tested_rows(tested: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    def lines(part: str, count: str, names: Mapping[str, str]) -> list[list[str]]:
        return [
            [f"{row[count]:,}", name, *(f"{100 * share:.1f}" for share in row[key])]
            for key, name in names.items()
            for row in tested[part]
        ]

    by_gallery = lines("gallery", "photos", {"first_neighbor": "first neighbor", "decoder": "decoder"})
    return by_gallery, lines("candidates", "candidates", {"chosen": "chosen", "nearest": "nearest"})


def _loss_charts(grid: Sequence[dict[str, Any]], fitted: Mapping[str, Any]) -> list[Piece | str]:
    least = min(row["loss"] for row in grid)
    law = scaling.scaling_law.Law(**{name: part["value"] for name, part in fitted["law"].items()})
    charts = []
    for along, by in (("photos", "size"), ("parameters", "photos")):
        series = []
        x = np.geomspace(min(row[along] for row in grid), max(row[along] for row in grid), 60)
        for color, value in enumerate(dict.fromkeys(row[by] for row in grid if row["axis"] == "grid")):
            curve = [row for row in grid if row[by] == value and row["axis"] == "grid"]
            fixed = curve[0]["parameters" if by == "size" else "photos"]
            loss = law(fixed, x) if by == "size" else law(x, fixed)
            name = f"{value:,}" if by == "photos" else value
            series.append(_dots(name, color, curve, along, least))
            series.append(Series(f"{name}, the law", color, loss - least, x, style="dashed", listed=False))
        for row in (row for row in grid if row["axis"] == "held out"):
            series.append(_dots(f"{row['size']}, held out", 7, [row], along, least))
        caption, y_label = f"Loss by {along}; dashed: fitted law", "nats above the best run"
        charts.append(Chart(caption, f"Loss by {along}", along, y_label, series, log_x=True, legend=None))
    forecast = f"<p>{escape(_forecast(fitted['forecast']))}</p>" if fitted["forecast"] else ""
    return [Panels(charts, ()), forecast]


def _dots(name: str, color: int, rows: Sequence[dict[str, Any]], along: str, least: float) -> Series:
    """Returns a curve with a dot per run: the run's loss minus `least`. along: key of x in a row."""
    rows = sorted(rows, key=lambda row: row[along])
    x, y = (np.array([row[key] for row in rows], float) for key in (along, "loss"))
    notes = [f"{row['label']}: {row['loss']:.3f} nats" for row in rows]
    return Series(name, color, y - least, x, y - least, y - least, notes=notes)


def _compute_chart(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> Chart:
    least, series = min(row["loss"] for row in rows), []
    for color, size in enumerate(s.fitted):
        curve = [row for row in rows if row["size"] == size and row["neighbors"] == rows[0]["neighbors"]]
        curve = [row for row in curve if row["photos"] == s.photos[-1][0]]
        if curve:
            series.append(_dots(size, color, curve, "compute", least))
    caption, y_label = "Runs with all photos, one curve per size", "nats above the best run"
    return Chart(caption, "Loss by compute", "FLOPs", y_label, series, log_x=True, legend=None)


def _accuracy_chart(grid: Sequence[dict[str, Any]]) -> Chart:
    rows = sorted(grid, key=lambda row: row["loss"])
    loss = np.array([row["loss"] for row in rows])
    series = []
    for i, km in enumerate(THRESHOLDS_KM):
        share = 100 * np.array([row["accuracy"][i] for row in rows])
        notes = [f"{row['label']}: {value:.1f} %" for row, value in zip(rows, share, strict=True)]
        series.append(Series(f"{km:,} km", i, share, loss, share, share, notes=notes))
    caption = "Each dot is a run of the grid"
    return Chart(caption, "Accuracy by loss", "loss, nats", "percent within", series, legend=None)


def _tested_charts(tested: Mapping[str, Any]) -> list[Chart]:
    charts = []
    for part, count, styles, label in (
        ("gallery", "photos", {"first_neighbor": "dashed", "decoder": "solid"}, "photos in the gallery"),
        ("candidates", "candidates", {"chosen": "solid", "nearest": "dashed"}, "samples"),
    ):
        x = np.array([row[count] for row in tested[part]], float)
        series = [
            Series(f"{km:,} km, {key}", i, np.array([100 * row[key][i] for row in tested[part]]), x, style=style)
            for i, km in enumerate(THRESHOLDS_KM)
            for key, style in styles.items()
        ]
        keys = [(f"{km:,} km", i, "solid") for i, km in enumerate(THRESHOLDS_KM)]
        keys += [(key.replace("_", " "), 0, style) for key, style in styles.items()]
        caption = f"Accuracy by {label}"
        charts.append(Chart(caption, label, label, "percent within", series, log_x=True, legend=keys))
    return charts


def _interval(part: Mapping[str, float]) -> str:
    return f"{_number(part['value'])} ({_range(part)})"


def _range(part: Mapping[str, float]) -> str:
    return f"{_number(part['low'])} to {_number(part['high'])}"


def _number(value: float) -> str:
    """Returns a number with three significant digits, or as an integer from 1,000 to 999,999: 0.413, 11.2, 1,230."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
