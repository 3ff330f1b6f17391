"""Page of `geotoken experiment NAME`, experiments/NAME/index.html: the question, and accuracy and settings per run."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.configuration import Experiment
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval, method, plain, points

#: Largest number of methods in a chart. The palette has this number of colors.
_MAX_BARS = 8


def page(name: str, experiment: Experiment, results: Mapping[str, Any], resamples: int) -> str:
    """Returns the page as HTML. results: contents of results.json. resamples: number of bootstrap resamples."""
    title = name.replace("_", " ").capitalize()
    note = f"<p>{escape(experiment.note)}</p>" if experiment.note else ""
    headline = f'<h1>{escape(title)}</h1><p class="lead">{escape(results["question"])}</p>{note}'
    first = results["runs"][0]["name"]
    sections = [
        *([Section("curve", "Training", "During training", _curve(results["curve"]))] if results["curve"] else []),
        Section("accuracy", "Accuracy", "Accuracy", _accuracy(results)),
        Section("differences", "Differences", f"Differences from {first}", _differences(results, first)),
        Section("runs", "Runs", "Runs", _runs(experiment, results)),
        Section("made", "How it was made", "How it was made", [_made(name, results, resamples)]),
    ]
    return frame.page(f"GeoToken: {title}", headline, sections)


def _accuracy(results: Mapping[str, Any]) -> list[Piece | str]:
    charts, parts = [], []
    for split, scores in results["splits"].items():
        rows = []
        for m in scores["methods"]:
            cells: list[Cell | str] = [*map(interval, m["accuracy"]), f"{m['median_km']:,.1f}"]
            cells.append(interval(m["geoscore"], ",.0f", 1))
            label = m["name"] + (" (bound)" if m["bound"] else "")
            rows.append(Row(method(label, m["choice"]), cells, "bound" if m["bound"] else ""))
        table = Table(["Run", *THRESHOLDS, "median km", "GeoScore"], [Group(rows)])
        parts.append((split, f"{scores['photos']:,} photos", [table]))
        drawn = [m for m in scores["methods"] if not m["bound"]]
        if 1 < len(drawn) <= _MAX_BARS:
            charts.append(_chart(split, drawn))
    lead = (
        f"<p>Percent of photos {'less than' if results['strict'] else 'within'} a distance of the truth, on the "
        f"{results['earth']}, with 95 % bootstrap intervals. A bound is the best of the same candidates, chosen "
        "by the truth.</p>"
    )
    return [lead, *([Panels(charts)] if charts else []), frame.folded(parts)]


def _chart(split: str, methods: list[Mapping[str, Any]]) -> Chart:
    series = []
    for i, m in enumerate(methods):
        y, low, high = (np.array([100 * a[part] for a in m["accuracy"]]) for part in ("value", "low", "high"))
        series.append(Series(m["name"], i, y, low=low, high=high))
    title = f"Percent of the photos of {split} within each distance, one bar per run"
    groups = [f"{km:,}" for km in THRESHOLDS_KM]
    return Chart(split, title, "distance from the truth, km", "percent of photos", series, groups)


def _curve(curve: Mapping[str, Any]) -> list[Piece | str]:
    """Returns charts of each run's accuracy on validation, over train examples and over processor time."""
    charts = []
    for key, name, unit in (("examples", "train examples", 1), ("processor_s", "minutes of processor time", 60)):
        for at in (0, 1):
            x = [np.array([row[key] for row in rows]) / unit for rows in curve["runs"].values()]
            series = [
                Series(label, i, 100 * np.array([row["within"][at] for row in rows]), x[i])
                for i, (label, rows) in enumerate(curve["runs"].items())
            ]
            ends = np.array([min(values[0] for values in x), max(values[-1] for values in x)])
            level = np.full(2, 100 * curve["first_neighbor"][at])
            series.append(Series("first neighbor", len(series), level, ends, style="dashed"))
            km = f"{THRESHOLDS_KM[at]:,} km"
            title = f"Percent of the validation photos within {km} against {name}, one curve per run"
            charts.append(Chart(f"within {km}, by {name}", title, name, f"percent within {km}", series))
    lead = (
        f"<p>Greedy decoding of {curve['photos']:,} photos of validation. Processor time includes training, without "
        "compilation and validation.</p>"
    )
    return [lead, Panels(charts)]


def _differences(results: Mapping[str, Any], first: str) -> list[Piece | str]:
    parts = [
        (
            split,
            f"{scores['photos']:,} photos",
            [Table(["Run", *THRESHOLDS], [Group([Row(d["name"], [*map(points, d["accuracy"])]) for d in listed])])],
        )
        for split, scores in results["splits"].items()
        if (listed := scores["differences"])
    ]
    if not parts:
        return ["<p>There is no other run to compare with the first one.</p>"]
    return [
        f"<p>Accuracy in percentage points above (+) or below (&minus;) <b>{escape(first)}</b>, from the same "
        "resamples of the same photos. A difference whose 95 % interval excludes zero is green or red.</p>",
        frame.folded(parts),
    ]


def _runs(experiment: Experiment, results: Mapping[str, Any]) -> list[Piece | str]:
    lines, changed = [], []
    for run, (name, changes, *trained_by) in zip(results["runs"], experiment.runs, strict=True):
        models = f"of {trained_by[0]}" if trained_by else "its own"
        loss = f"{run['validation_loss']:.3f}"
        lines.append([name, models, f"{run['examples']:,}", f"{run['parameters']:,}", loss])
        text = json.dumps(changes, indent=1, default=str, ensure_ascii=False)
        changed.append(frame.hidden(name, f"<pre>{escape(text, quote=False)}</pre>"))
    return [
        plain(["Run", "Trained models", "Train examples", "Parameters", "Validation loss"], lines),
        "<p>The validation loss is in nats per token, with the run's own loss weights. Settings that differ:</p>",
        *changed,
    ]


def _made(name: str, results: Mapping[str, Any], resamples: int) -> str:
    return (
        f"<p><code>geotoken experiment {escape(name)}</code> with the configuration <b>{escape(results['base'])}</b> "
        "made this page. A missing prediction counts as wrong at every threshold. "
        f"{frame.intervals(resamples)} All figures are in results.json in the same folder.</p>"
    )
