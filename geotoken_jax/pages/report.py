"""report/index.html: how well the predictions are, on every split."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.analysis.examples import Examples, Gallery
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame, photos, uncertainty
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval, points
from geotoken_jax.records import Photos
from geotoken_jax.workdir import Manifest

Losses = Sequence[tuple[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the report shows.

    Attributes:
        name: the configuration's.
        reference: the variant that the others are compared with.
        seed: of the photos that are drawn for the map.
        metrics: what report/metrics.json has.
        truths, methods: by split, in the order to show.
        photos: split -> records of photos/.
        examples: photos that the reference placed best and worst, None if it has no predictions of the split.
        gallery: places and pictures of the neighbors of the examples.
        losses: name of each model, and its loss -> steps and values.
        manifests: folder of the work directory -> its manifest.
    """

    name: str
    reference: str
    seed: int
    metrics: Mapping[str, Any]
    truths: Mapping[str, CoordinateTable]
    methods: Mapping[str, Sequence[Method]]
    photos: Mapping[str, Photos]
    examples: Examples | None
    gallery: Gallery
    losses: Losses
    manifests: Mapping[str, Manifest]


def page(report: Report) -> str:
    """Returns the page."""
    splits, reference = report.metrics["splits"], report.reference
    sure = {split: scores["uncertainty"] for split, scores in splits.items()}
    drawn = photos.photo_map(report.truths, report.methods, report.photos, reference, report.seed)
    nobody = f"<p>{escape(reference)} has no predictions for {escape(first_split(report.truths))}.</p>"
    shown = photos.cards(report.examples, report.gallery) if report.examples else nobody
    sections = [
        Section("world-map", "Map", "On the map", [drawn]),
        Section("accuracy", "Accuracy", "Accuracy", _accuracy(report.metrics, reference)),
        Section("differences", "Differences", "Differences", _differences(splits)),
        Section("distance", "Distance", "Accuracy against distance", _distance(report.methods, reference)),
        Section("sure", "How sure", "How sure it is", uncertainty.reliability(sure)),
        Section("area", "Area", "How much must be searched", uncertainty.area(sure)),
        Section("continents", "Continents", "By continent", _continents(splits, reference)),
        Section("clean", "New photos", "Without photos that the gallery knows", _clean(report.metrics, reference)),
        Section("photos", "Photos", "Best, median and worst", [shown]),
        Section("training", "Training", "Training", _training(report.losses)),
        Section("made", "How it was made", "How it was made", [_made(report)]),
    ]
    return frame.page("GeoToken: where were these photos taken?", _headline(report), sections)


def first_split(truths: Mapping[str, CoordinateTable]) -> str:
    """Returns the split of the headline and of the photos that are shown one by one: `test` if it is there."""
    return "test" if "test" in truths else next(iter(truths))


def _headline(report: Report) -> str:
    split = first_split(report.truths)
    scores = report.metrics["splits"][split]
    own = (m for m in scores["methods"] if m["main"] and m["variant"] == report.reference)
    main = next(own, scores["methods"][0])
    rivals = [m for m in scores["methods"] if m["baseline"] and m["main"] and m is not main]
    rival = max(rivals, key=lambda m: m["accuracy"][1]["value"], default=None)  # the best within 25 km
    city = main["accuracy"][1]
    tick = f"; the tick on each bar is {escape(rival['name'])}" if rival else ""
    made = report.manifests["photos"]
    source = made.settings.get("photos", {}).get("source", "")
    facts = {
        "Configuration": report.name,
        "Photos": f"{source} " + ", ".join(f"{part} {count:,}" for part, count in made.counts.items()),
        "Median error": f"{formats.km(main['median_km'])} on {split}",
        "Seeds": ", ".join(f"{part} {seed}" for part, seed in _seeds(report).items()),
    }
    return (
        "<h1>A photo goes in, a place on Earth comes out</h1>"
        "<p>GeoToken looks at a photo and at the places of photos like it, and writes down where it was taken as a "
        "sequence of ever smaller cells of the globe. This page shows how well it does.</p>"
        f'<p class="lead">On the {scores["photos"]:,} photos of <b>{escape(split)}</b>, <b>{escape(main["name"])}</b> '
        f"named a place within {city['km']} km of the true one for {100 * city['value']:.1f} % of them{tick}.</p>"
        f'<ul class="tiles">{_bars(main, rival)}</ul><dl class="facts">'
        + "".join(f"<div><dt>{fact}</dt><dd>{escape(value.strip())}</dd></div>" for fact, value in facts.items())
        + "</dl>"
    )


def _bars(main: Mapping[str, Any], rival: Mapping[str, Any] | None) -> str:
    """Returns a tile per threshold, with a bar on which a tick is the rival."""
    tiles = []
    for i, a in enumerate(main["accuracy"]):
        tick = versus = ""
        if rival:
            other = rival["accuracy"][i]["value"]
            gain = 100 * (a["value"] - other)
            tick = f'<b style="left:{100 * other:.1f}%"></b>'
            sign = "up" if gain > 0 else "down" if gain < 0 else ""
            gained = f'<span class="{sign}">{formats.signed(gain)} points</span>'
            versus = f"<small>{gained} against {escape(rival['name'])}</small>"
        tiles.append(
            f"<li><small>within {a['km']:,} km</small><strong>{100 * a['value']:.1f} %</strong>"
            f'<div class="bar"><i style="width:{100 * a["value"]:.1f}%"></i>{tick}</div>{versus}</li>'
        )
    return "".join(tiles)


def _seeds(report: Report) -> dict[str, int]:
    """Returns the seeds on the way to the reference's predictions, by folder."""

    def find(value: Any) -> int | None:
        if not isinstance(value, Mapping):
            return None
        if "seed" in value:
            return value["seed"]
        return next(filter(lambda seed: seed is not None, map(find, value.values())), None)

    folders = ["photos", "align", f"geotoken/{report.reference}", f"predictions/{report.reference}"]
    found = {f.split("/")[0]: find(report.manifests[f].settings) for f in folders if f in report.manifests}
    return {folder: seed for folder, seed in found.items() if seed is not None}


def _accuracy(metrics: Mapping[str, Any], reference: str) -> list[Piece | str]:
    parts, notes = [], []
    for split, scores in metrics["splits"].items():
        honest = [m for m in scores["methods"] if not m["bound"]]
        best = [max(m["accuracy"][i]["value"] for m in honest) for i in range(len(THRESHOLDS))]
        rows = []
        for m in scores["methods"]:
            cells: list[Cell | str] = [
                interval(a, look="best" if not m["bound"] and a["value"] == top > 0 else "")
                for a, top in zip(m["accuracy"], best, strict=True)
            ]
            cells += [f"{m['median_km']:,.1f}", f"{m['mean_km']['value']:,.0f}", interval(m["geoscore"], ",.0f", 1)]
            look = "bound" if m["bound"] else _look(m, reference) if m["main"] else ""
            rows.append(Row(m["name"] + (" (bound)" if m["bound"] else ""), cells, look))
            if m["missing"]:
                missing = f"{split}: {m['name']} has no prediction for {m['missing']:,} photos; they count as wrong."
                notes.append(f"<p>{escape(missing)}</p>")
        columns = ["Method", *THRESHOLDS, "median km", "mean km", "GeoScore"]
        parts.append((split, _size(scores), [Table(columns, [Group(rows)])]))
    return [
        f"<p>Percent of photos placed {'less than' if metrics['strict'] else 'within'} a distance of the truth, on the "
        f"{metrics['earth']}, with 95 % bootstrap intervals, resampled by "
        "author where authors are known. The best choice of each column is bold. A bound knows the truth: it shows "
        "what a perfect choice among the same candidates would reach.</p>",
        frame.folded(parts),
        *notes,
    ]


def _look(method: Mapping[str, Any], reference: str) -> str:
    return "reference" if method["variant"] == reference else ""


def _differences(splits: Mapping[str, Any]) -> list[Piece | str]:
    parts, pairs = [], []
    for split, scores in splits.items():
        rows = [Row(m["name"], [*map(points, m["accuracy"])]) for m in scores["differences"]]
        if rows:
            parts.append((split, _size(scores), [Table(["Method", *THRESHOLDS], [Group(rows)])]))
        compared = [
            Row(f"{pair['name']}, against {pair['against']}", [*map(points, pair["accuracy"])])
            for pair in scores["comparisons"]
        ]
        if compared:
            pairs.append(Group(compared, split, _size(scores)))
    if not parts:
        return ["<p>There is nothing to compare the reference with.</p>"]
    reference = next(scores["reference"] for scores in splits.values() if scores["reference"])
    return [
        f"<p>Points above (+) or below (&minus;) <b>{escape(reference)}</b>, over the same resamples of the same "
        "photos. Color marks the differences whose 95 % interval excludes zero.</p>",
        frame.folded(parts),
        *(["<h3>Other pairs</h3>", Table(["Pair", *THRESHOLDS], pairs)] if pairs else []),
    ]


def _continents(splits: Mapping[str, Any], reference: str) -> list[Piece | str]:
    parts = []
    for split, scores in splits.items():
        groups = []
        for i, method in enumerate(scores["continents"][0]["methods"] if scores["continents"] else ()):
            rows = []
            for part in scores["continents"]:
                m = part["methods"][i]
                cells = [f"{part['photos']:,}", *map(interval, m["accuracy"]), f"{m['geoscore']['value']:,.0f}"]
                rows.append(Row(part["name"], cells, _look(method, reference)))
            groups.append(Group(rows, method["name"]))
        if groups:
            table = Table(["Continent", "Photos", *THRESHOLDS, "GeoScore"], groups)
            parts.append((split, _size(scores), [table]))
    if not parts:
        return ["<p>No photo here has a country or a continent.</p>"]
    return [
        "<p>Percent of the photos of each continent that were placed within a distance. A photo whose source names no "
        "country counts as unknown.</p>",
        frame.folded(parts),
    ]


def _clean(metrics: Mapping[str, Any], reference: str) -> list[Piece | str]:
    groups, notes = [], []
    for split, scores in metrics["splits"].items():
        clean, every = scores["clean"], {m["variant"]: m for m in scores["methods"] if m["main"]}
        counts = ", ".join(f"{kind} {count:,}" for kind, count in clean["left_out"].items() if count)
        left = f"{clean['photos']:,} of {scores['photos']:,} photos left" + (f"; left out: {counts}" if counts else "")
        if not counts or not clean["methods"]:
            notes.append(f"<p>{escape(split)}: {left}.</p>")
            continue
        rows = []
        for method in clean["methods"]:
            pairs = zip(method["accuracy"], every[method["variant"]]["accuracy"], strict=True)
            cells = [Cell(f"{100 * a['value']:.1f}", [f"of all {100 * b['value']:.1f}"]) for a, b in pairs]
            rows.append(Row(method["name"], cells, _look(method, reference)))
        groups.append(Group(rows, split, left))
    return [
        "<p>A photo is easier if the gallery has another by its author, or one that looks the same. Here are the "
        "photos left without those that share id or author with a gallery photo, or whose image embedding has a cosine "
        f"above {metrics['cosine_above']:g} with one; below each figure, that of all photos.</p>",
        *([Table(["Method", *THRESHOLDS], groups)] if groups else []),
        *notes,
    ]


def _size(scores: Mapping[str, Any]) -> str:
    authors = f", {scores['authors']:,} authors" if scores["authors"] else ""
    return f"{scores['photos']:,} photos{authors}"


def _distance(methods: Mapping[str, Sequence[Method]], reference: str) -> list[Piece | str]:
    """Returns a chart per split, a color per variant; of the bounds, only those of the baselines and the reference."""
    drawn = {
        split: [m for m in found if not m.bound or m.baseline or m.variant == reference]
        for split, found in methods.items()
    }
    variants = {m.variant for found in drawn.values() for m in found}
    ordered = sorted(variants, key=lambda variant: (variant != reference, variant))
    grid = np.geomspace(0.1, 20_000, 160)
    charts = []
    for split, found in drawn.items():
        series = []
        for m in found:
            within = 100 * np.searchsorted(np.sort(m.km), grid, side="right") / len(m.km)
            style = "dashed" if m.bound else "solid" if m.main else "dotted"
            name = m.name + (" (bound)" if m.bound else "")
            series.append(Series(name, ordered.index(m.variant), within, grid, style=style))
        title = f"Percent of the photos of {split} within a distance, one curve a method"
        x_label = "distance from the truth, km"
        series.reverse()
        marks = distance.THRESHOLDS_KM
        charts.append(Chart(split, title, x_label, "percent of photos", series, log_x=True, marks=marks))
    keys = [key for chart in charts for key in chart.entries()[::-1]]  # the reference is drawn last, over the others
    return [
        "<p>How many photos are within a distance of the truth, at every distance; the dotted lines are the "
        "thresholds of the table.</p>",
        Panels(charts, list(dict.fromkeys(keys))),
    ]


def _training(losses: Losses) -> list[Piece | str]:
    """Returns a chart per model of train/loss* and validation/loss*; the parts of a loss are faint."""
    charts = []
    for name, curves in losses:
        ordered = sorted(curves.items(), key=lambda item: item[0].endswith("/loss"))
        series = [
            Series(key, int(key.startswith("validation")), y, x, style="solid" if key.endswith("/loss") else "faint")
            for key, (x, y) in ordered
        ]
        title = f"Loss of {name} on train and validation photos over training steps"
        charts.append(Chart(name, title, "step", "loss", series))
    if not charts:
        return ["<p>No model here kept its training metrics.</p>"]
    keys = [("train", 0, "solid"), ("validation", 1, "solid"), ("parts of either loss", 7, "faint")]
    return ["<p>Loss over training steps.</p>", Panels(charts, keys)]


def _made(report: Report) -> str:
    return (
        "<p>Each folder of the work directory, with the settings it was made with, what it holds, and what was "
        f"dropped on the way.</p>{frame.manifests(report.manifests)}"
        "<p>A missing prediction counts as wrong at every threshold, and as half the Earth's circumference in medians "
        f"and means. {frame.intervals(report.metrics['resamples'])} Every number of this page is in metrics.json "
        "beside it.</p>"
    )
