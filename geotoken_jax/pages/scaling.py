"""A scaling study as people read it: a page with its charts, docs/scaling.md, and a few lines in the terminal."""

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
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import plain
from geotoken_jax.workdir import StageError, write_bytes

_HEAD = """# Scaling

How the decoder's loss and accuracy change with its size, with the photos that it is trained on, with the neighbors it
reads, with the gallery and with the candidates of a photo. The first of these commands makes the runs, the second fits
the law to them, the third draws a page with the charts, scaling/index.html in the work directory, and the last wrote
this one ({date}, {cores} {machine} cores).

```
geotoken scaling run --config=configs/{name}.py --workdir=runs/demo
geotoken scaling fit --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --config=configs/{name}.py --workdir=runs/demo
geotoken scaling plot --document --config=configs/{name}.py --workdir=runs/demo > docs/scaling.md
```
"""
_SIDE_BY_SIDE = "seq 0 {last} | xargs -P 2 -I{{}} geotoken scaling run --index={{}} --config=... --workdir=..."
_LAW = (("E", "E, nats"), ("A", "A"), ("alpha", "a, of size"), ("B", "B"), ("beta", "b, of data"))


def summary(found: Mapping[str, Any]) -> str:
    """Returns the law and the forecast in two lines. found: what `scaling.fit` returns."""
    law = ", ".join(f"{name} = {_interval(found['law'][key])}" for key, name in _LAW)
    return f"L(N, D) = E + A / N^a + B / D^b: {law}\n{_forecast(found['forecast'])}"


def document(config: Config, workdir: Workdir) -> str:
    """Returns docs/scaling.md, from scaling/runs.json and fit.json. Raises StageError if they are not there."""
    rows, found, s = *_read(workdir), scaling.study(config)
    made = {"name": config.name, "cores": os.cpu_count(), "machine": platform.machine(), "date": date.today()}
    sections = [
        _HEAD.format(**made),
        _what_was_run(rows, s, config),
        "## Runs\n\n" + plain(*_runs_table(rows)).markdown(),
        _law_section(found),
        f"## A size that was not fitted\n\n{_forecast(found['forecast'])}\n",
        _compute_section(rows, found, s),
        _neighbors_section(rows, s),
        _accuracy_section(found),
        _tested_section(found["tested"]),
        "## What does not transfer\n\n" + "\n".join(f"- {line}" for line in s.limits) + "\n",
    ]
    return "\n".join(section for section in sections if section)


def plot(config: Config, workdir: Workdir) -> epath.Path:
    """Writes scaling/index.html with every chart and table, in both themes, and returns where it is."""
    rows, found, s = *_read(workdir), scaling.study(config)
    grid = [row for row in rows if row["axis"] in ("grid", "held out")]
    sections = [
        Section("loss", "Loss", "Loss by data and by size", _loss_charts(grid, found)),
        Section("compute", "Compute", "Loss by compute", [Panels([_compute_chart(rows, s)], ())]),
        Section("accuracy", "Accuracy", "Accuracy against loss", [Panels([_accuracy_chart(grid)], ())]),
    ]
    if found["tested"]:
        sections.append(Section("tested", "Test time", "At test time", [Panels(_tested_charts(found["tested"]), ())]))
    sections.append(Section("runs", "Runs", "Every run", [plain(*_runs_table(rows))]))
    headline = f"<h1>Scaling</h1><p>{escape(summary(found))}</p>"
    file = workdir.path / scaling.FOLDER / "index.html"
    write_bytes(file, frame.page("GeoToken: scaling", headline, sections).encode())
    return file


def _read(workdir: Workdir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    files = [workdir.path / scaling.FOLDER / name for name in (scaling.RUNS, scaling.FIT)]
    if not files[1].exists():
        raise StageError(f"{files[1]} is not there: run `geotoken scaling fit` with the same --workdir first")
    rows, found = (json.loads(file.read_text()) for file in files)
    return rows, found


def _what_was_run(rows: Sequence[dict[str, Any]], s: ScalingSettings, config: Config) -> str:
    wall, cpu = (sum(row.get(name, 0.0) for row in rows) / 60 for name in ("wall", "cpu"))
    examples = ", ".join(f"{seen:,} examples of {photos:,}" for photos, seen in s.photos)
    total = len(scaling.runs(config))
    undone = f" {total - len(rows)} of {total} runs were not made yet." if len(rows) < total else ""
    return (
        f"## What was run\n\n{s.note}\n\n"
        "N counts the weights of encoder and decoder layers. D counts distinct photos that the decoder is trained on, "
        "with their views; each set lies in the next larger. Neighbors come from the whole gallery whatever D is, so "
        "that what the decoder learns and what it can look up are two questions; the gallery has its own below. "
        "L is the validation loss in nats a photo: the cross-entropies of all its tokens summed, unweighted, at the "
        f"validation where it was lowest of {s.validations}. To convergence means {examples}: at the fewest photos the "
        "loss rises again before the end.\n\n"
        f"{len(rows)} runs took {cpu:.0f} minutes of processor time ({wall:.0f} minutes of wall time, summed over runs "
        f"side by side, beside other work).{undone} Two at a time, on one thread each (`XLA_FLAGS="
        f"--xla_cpu_multi_thread_eigen=false`):\n\n```\n{_SIDE_BY_SIDE.format(last=total - 2)}\n"
        f"geotoken scaling run --index={total - 1} --config=... --workdir=...\n```\n"
    )


def _runs_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = ["run", "for", "N", "photos", "neighbors", "examples", "best after", "GFLOPs", "loss, nats"]
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


def _law_section(found: Mapping[str, Any]) -> str:
    lines = [[name, _number(found["law"][key]["value"]), _range(found["law"][key])] for key, name in _LAW]
    noise, spread = "", found["noise"]
    if spread is not None:
        noise = f" Runs that differ in the seed alone have a standard deviation of {spread:.3f} nats."
    return (
        "## The law\n\nL(N, D) = E + A / N^a + B / D^b, fitted to the grid as Hoffmann et al. 2022 (approach 3): Huber "
        "loss of logarithms, L-BFGS from 32 starts. Intervals are percentiles 2.5 and 97.5 of the bootstrap over "
        "runs.\n\n"
        + plain(["", "value", "95 % interval"], lines).markdown()
        + f"\nThe fit is off by {found['error']:.3f} nats (root mean square over the grid)."
        + f"{noise}\n"
    )


def _forecast(forecast: Mapping[str, Any] | None) -> str:
    if forecast is None:
        return "The held-out run is not made yet."
    measured, miss = forecast["measured"], forecast["loss"] - forecast["measured"]
    naive = forecast["as_the_largest"] - measured
    return (
        f"Forecast of {forecast['label']}, written down before it was trained: {forecast['loss']:.3f} nats "
        f"({forecast['low']:.3f} to {forecast['high']:.3f}). Measured: {measured:.3f}. The miss is {miss:+.3f} nats, "
        f"{100 * abs(miss) / measured:.2f} % of the loss; to say that it will be as the largest size that was fitted "
        f"would have missed by {naive:+.3f}. All losses of the grid lie within {forecast['spread']:.3f} nats, "
        f"{100 * forecast['spread'] / measured:.1f} % of the loss: a miss is to be held against that."
    )


def _compute_section(rows: Sequence[dict[str, Any]], found: Mapping[str, Any], s: ScalingSettings) -> str:
    lines = [
        [f"{p['compute'] / 1e9:,.0f}", p["size"], f"{p['photos']:,.0f}", f"{p['loss']:.3f}"] for p in found["frontier"]
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
        "## Compute\n\nBy the law, the size and the photos of the least loss for an amount of compute, among the sizes "
        "of the study, with as many examples of those photos as the study sees:\n\n"
        + plain(["GFLOPs", "size", "photos", "loss, nats"], lines).markdown()
        + "\nMeasured, the same compute spent on each size, on all photos:\n\n"
        + plain(["GFLOPs", *s.fitted], measured).markdown()
    )


def _neighbors_section(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> str:
    whole = f"{s.reference}_{s.photos[-1][0]}"
    alike = [row for row in rows if row["axis"] == "neighbors" or row["label"] == whole]
    alike.sort(key=lambda row: row["neighbors"])
    lines = [
        [str(row["neighbors"]), f"{row['loss']:.3f}", *(f"{100 * share:.1f}" for share in row["accuracy"])]
        for row in alike
    ]
    heads = ["neighbors", "loss, nats", *(f"{km:,} km, %" for km in THRESHOLDS_KM)]
    return f"## Neighbors\n\n{s.reference}, trained and tested with so many:\n\n" + plain(heads, lines).markdown()


def _accuracy_section(found: Mapping[str, Any]) -> str:
    lines = [
        [f"{line['km']:,} km", f"{100 * line['a_nat_less']:+.1f}", f"{100 * line['explained']:.0f} %"]
        for line in found["accuracy"]
    ]
    return (
        "## Accuracy against loss\n\nA line through the grid's runs: points of accuracy of greedy answers for a nat "
        "less of loss, and the share of the variance between runs that the line explains.\n\n"
        + plain(["within", "points a nat", "explained"], lines).markdown()
    )


def _tested_section(tested: Mapping[str, Any] | None) -> str:
    if tested is None:
        return ""
    share, n = tested["gallery"][-1]["decoder"][2], tested["photos"]
    by_gallery, by_candidates = _tested_rows(tested)
    heads = [f"{km:,} km" for km in THRESHOLDS_KM]
    return (
        f"## Gallery and candidates at test time\n\n{tested['label']} on the {n:,} photos of `{tested['split']}`, "
        f"percent within; of so many photos 95 % intervals are about ±{196 * np.sqrt(share * (1 - share) / n):.1f} "
        "points. The gallery is cut down to photos drawn at random, each set within the next larger; the decoder was "
        "trained with all of it.\n\n"
        + plain(["gallery", "answer of", *heads], by_gallery).markdown()
        + "\nBeside the greedy candidate K samples are drawn; `chosen` is the most probable of all these, `nearest` "
        "the best that any choice among them could find:\n\n"
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


def _loss_charts(grid: Sequence[dict[str, Any]], found: Mapping[str, Any]) -> list[Piece | str]:
    least = min(row["loss"] for row in grid)
    law = scaling.scaling_law.Law(**{name: part["value"] for name, part in found["law"].items()})
    charts = []
    for along, by in (("photos", "size"), ("parameters", "photos")):
        series = []
        x = np.geomspace(min(row[along] for row in grid), max(row[along] for row in grid), 60)
        for color, value in enumerate(dict.fromkeys(row[by] for row in grid if row["axis"] == "grid")):
            alike = [row for row in grid if row[by] == value and row["axis"] == "grid"]
            fixed = alike[0]["parameters" if by == "size" else "photos"]
            loss = law(fixed, x) if by == "size" else law(x, fixed)
            name = f"{value:,}" if by == "photos" else value
            series.append(_dots(name, color, alike, along, least))
            series.append(Series(f"{name}, the law", color, loss - least, x, style="dashed", listed=False))
        for row in (row for row in grid if row["axis"] == "held out"):
            series.append(_dots(f"{row['size']}, held out", 7, [row], along, least))
        caption, y_label = f"Loss by {along}; dashed: the law", "nats above the best run"
        charts.append(Chart(caption, f"Loss by {along}", along, y_label, series, log_x=True, legend=None))
    forecast = f"<p>{escape(_forecast(found['forecast']))}</p>" if found["forecast"] else ""
    return [Panels(charts, ()), forecast]


def _dots(name: str, color: int, rows: Sequence[dict[str, Any]], along: str, least: float) -> Series:
    """Returns the losses of runs in the order of `along`, as a curve with a dot per run."""
    rows = sorted(rows, key=lambda row: row[along])
    x, y = (np.array([row[key] for row in rows], float) for key in (along, "loss"))
    notes = [f"{row['label']}: {row['loss']:.3f} nats" for row in rows]
    return Series(name, color, y - least, x, y - least, y - least, notes=notes)


def _compute_chart(rows: Sequence[dict[str, Any]], s: ScalingSettings) -> Chart:
    least, series = min(row["loss"] for row in rows), []
    for color, size in enumerate(s.fitted):
        alike = [row for row in rows if row["size"] == size and row["neighbors"] == rows[0]["neighbors"]]
        alike = [row for row in alike if row["photos"] == s.photos[-1][0]]
        if alike:
            series.append(_dots(size, color, alike, "compute", least))
    caption, y_label = "All photos, each run at its end", "nats above the best run"
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
    return Chart(caption, "Accuracy against loss", "loss, nats", "percent within", series, legend=None)


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
    """Returns three digits that matter: 0.413, 11.2, 1,230, 4.2e+09."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
