"""Page of `geotoken evaluate`, report/index.html: accuracy and uncertainty of all predictions on every split."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.analysis.examples import Examples, PhotoLookup
from geotoken_jax.geo import distance
from geotoken_jax.manifests import Manifest
from geotoken_jax.pages import frame, photos, uncertainty
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, explanation, interval, method, points
from geotoken_jax.preparation import source_name
from geotoken_jax.records import Photos

#: Key of each source of candidates (predict/channels.py, predict/rerank.py) -> its name in the table of recall.
_SOURCES = {
    "index": "neighbors by image, location and text vectors",
    "backbone": "neighbors by whitened image embeddings",
    "comparator": "neighbors by the comparator",
    "location": "neighbors by encoded location",
    "samples": "samples of the decoder",
    "cells": "most probable cells of the decoder",
    "all": "all together",
}
#: Loss curves of trained models: per model its name, and the steps and values of each loss, by name of the loss.
Losses = Sequence[tuple[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]]


@dataclasses.dataclass(frozen=True)
class Report:
    """Contents of the report.

    Attributes:
        name: name of the configuration.
        reference: variant with which the other variants are compared.
        seed: seed of the random choice of photos on the map.
        metrics: contents of report/metrics.json.
        truths: true coordinates by split, in the order of the page.
        methods: methods by split, in the order of the page.
        photos: photo records by split.
        examples: photos of `first_split` with the smallest, median and largest errors of the reference. None if the
            reference has no predictions for this split.
        gallery: lookup of place names and of photos of neighbors.
        losses: loss curves of the trained models.
        manifests: manifests by folder of the work directory.
    """

    name: str
    reference: str
    seed: int
    metrics: Mapping[str, Any]
    truths: Mapping[str, CoordinateTable]
    methods: Mapping[str, Sequence[Method]]
    photos: Mapping[str, Photos]
    examples: Examples | None
    gallery: PhotoLookup
    losses: Losses
    manifests: Mapping[str, Manifest]


def page(report: Report) -> str:
    """Returns the page as HTML."""
    splits, reference = report.metrics["splits"], report.reference
    sure = {split: scores["uncertainty"] for split, scores in splits.items()}
    drawn = photos.photo_map(report.truths, report.methods, report.photos, reference, report.seed)
    no_examples = f"<p>{escape(reference)} has no predictions for {escape(first_split(report.truths))}.</p>"
    shown = photos.cards(report.examples, report.gallery) if report.examples else no_examples
    sections = [
        Section("world-map", "Map", "True and predicted places", [drawn]),
        Section("accuracy", "Accuracy", "Accuracy", _accuracy(report.metrics, reference)),
        *(
            [Section("recall", "Recall", "Recall of the pool", _recall(report.metrics))]
            if report.metrics["recall"]
            else []
        ),
        Section("differences", "Differences", "Differences between methods", _differences(splits)),
        Section("distance", "Distance", "Accuracy at every distance", _distance(report.methods, reference)),
        Section("sure", "Uncertainty", "Stated uncertainty", uncertainty.reliability(sure)),
        Section("area", "Area", "Area to search until the place is found", uncertainty.area(sure)),
        Section("continents", "Continents", "Accuracy by continent", _continents(splits, reference)),
        Section("clean", "New photos", "Accuracy without leaked photos", _clean(report.metrics, reference)),
        *_exclusion(splits, reference),
        Section("photos", "Photos", "Photos with the smallest, median and largest errors", [shown]),
        Section("training", "Training", "Training", _training(report.losses)),
        Section("made", "How it was made", "How it was made", [_made(report)]),
    ]
    return frame.page("GeoToken: where were these photos taken?", _headline(report), sections)


def first_split(truths: Mapping[str, CoordinateTable]) -> str:
    """Returns the split that the headline and the example photos show: `test` if it exists, else the first split."""
    return "test" if "test" in truths else next(iter(truths))


def _headline(report: Report) -> str:
    split = first_split(report.truths)
    scores = report.metrics["splits"][split]
    of_reference = (m for m in scores["methods"] if m["main"] and m["variant"] == report.reference)
    main = next(of_reference, scores["methods"][0])
    rivals = [m for m in scores["methods"] if m["baseline"] and m["main"] and m is not main]
    rival = max(rivals, key=lambda m: m["accuracy"][1]["value"], default=None)  # the best within 25 km
    city = main["accuracy"][1]
    tick = f" The tick on each bar shows {escape(rival['name'])}, the best baseline." if rival else ""
    manifest = report.manifests["photos"]
    source = source_name(manifest.settings.get("photos", {}))
    facts = {
        "Configuration": report.name,
        "Photos": f"{source} " + ", ".join(f"{part} {count:,}" for part, count in manifest.counts.items()),
        "Median error": f"{formats.km(main['median_km'])} on {split}",
        "Seeds": ", ".join(f"{part} {seed}" for part, seed in _seeds(report).items()),
    }
    return (
        "<h1>A photo goes in, a place on Earth comes out</h1>"
        "<p>GeoToken compares a photo with similar photos of known places, and predicts where it was taken as a "
        "sequence of ever smaller cells of the globe. This page shows how accurate the predictions are.</p>"
        f'<p class="lead"><b>{escape(main["name"])}</b> places {100 * city["value"]:.1f} % of the '
        f"{scores['photos']:,} photos of <b>{escape(split)}</b> within {city['km']} km of the truth.{tick}</p>"
        f'<ul class="tiles">{_bars(main, rival)}</ul><dl class="facts">'
        + "".join(f"<div><dt>{fact}</dt><dd>{escape(value.strip())}</dd></div>" for fact, value in facts.items())
        + "</dl>"
    )


def _bars(main: Mapping[str, Any], rival: Mapping[str, Any] | None) -> str:
    """Returns a tile per threshold, with a bar for the main method and a tick for the rival, the best baseline."""
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
    """Returns the seeds of the reference variant's photos, alignment, decoder and predictions, by folder.

    A folder without a seed in its settings is left out. If its settings have several seeds, the first one is returned.
    """

    def find(value: Any) -> int | None:
        if not isinstance(value, Mapping):
            return None
        if "seed" in value:
            return value["seed"]
        return next(filter(lambda seed: seed is not None, map(find, value.values())), None)

    folders = ["photos", "align", f"geotoken/{report.reference}", f"predictions/{report.reference}"]
    seeds = {f.split("/")[0]: find(report.manifests[f].settings) for f in folders if f in report.manifests}
    return {folder: seed for folder, seed in seeds.items() if seed is not None}


def _accuracy(metrics: Mapping[str, Any], reference: str) -> list[Piece | str]:
    parts, notes = [], []
    for split, scores in metrics["splits"].items():
        no_bounds = [m for m in scores["methods"] if not m["bound"]]
        best = [max(m["accuracy"][i]["value"] for m in no_bounds) for i in range(len(THRESHOLDS))]
        rows = []
        for m in scores["methods"]:
            cells: list[Cell | str] = [
                interval(a, look="best" if not m["bound"] and a["value"] == top > 0 else "")
                for a, top in zip(m["accuracy"], best, strict=True)
            ]
            cells += [f"{m['median_km']:,.1f}", f"{m['mean_km']['value']:,.0f}", interval(m["geoscore"], ",.0f", 1)]
            look = "bound" if m["bound"] else _look(m, reference) if m["main"] else ""
            rows.append(Row(method(m["name"] + (" (bound)" if m["bound"] else ""), m["choice"]), cells, look))
            if m["missing"]:
                missing = f"{split}: {m['name']} has no prediction for {m['missing']:,} photos; they count as wrong."
                notes.append(f"<p>{escape(missing)}</p>")
        columns = ["Method", *THRESHOLDS, "median km", "mean km", "GeoScore"]
        parts.append((split, _size(scores), [Table(columns, [Group(rows)])]))
    return [
        f"<p>Percent of photos placed {'less than' if metrics['strict'] else 'within'} a distance of the truth, on the "
        f"{metrics['earth']}, with 95 % bootstrap intervals. The best value of each accuracy column is bold. A bound "
        "is the best of the same candidates, chosen by the truth. No choice among them can be more accurate. "
        "GeoScore is the mean score of the game GeoGuessr: 5,000 at the right place, 2,559 at 1,000 km.</p>",
        frame.folded(parts),
        _explanations(metrics["splits"]),
        *notes,
    ]


def _recall(metrics: Mapping[str, Any]) -> list[Piece | str]:
    """Returns a table per split: for each source of candidates, the share of photos with a candidate near the truth."""
    parts = []
    for split, sources in metrics["recall"].items():
        best = [max(shares[i] for name, shares in sources.items() if name != "all") for i in range(len(THRESHOLDS))]
        rows = [
            Row(
                _SOURCES[name],
                [
                    Cell(f"{100 * share:.1f}", look="best" if name != "all" and share == top > 0 else "")
                    for share, top in zip(shares, best, strict=True)
                ],
                "bound" if name == "all" else "",
            )
            for name, shares in ((name, sources[name]) for name in _SOURCES if name in sources)
        ]
        parts.append((split, _size(metrics["splits"][split]), [Table(["Source", *THRESHOLDS], [Group(rows)])]))
    return [
        "<p>The reranker chooses among candidates from several sources. The table has the percent of photos for which "
        "a source brings a candidate within a distance of the truth. No choice can be more accurate than the last row. "
        "The best value of each column is bold.</p>",
        frame.folded(parts),
    ]


def _explanations(splits: Mapping[str, Any]) -> str:
    """Returns a list that explains the selectors in the names of methods, or "" if no name has a selector.

    The list is hidden until the user clicks on its heading.
    """
    choices = dict.fromkeys(m["choice"] for scores in splits.values() for m in scores["methods"])
    items = [
        f"<li><b>{escape(choice.replace('_', ' '))}</b>: {escape(explanation(choice))}</li>"
        for choice in choices
        if explanation(choice)
    ]
    return (
        frame.hidden("How each selector in the names chooses its answer", f"<ul>{''.join(items)}</ul>") if items else ""
    )


def _look(m: Mapping[str, Any], reference: str) -> str:
    """Returns the CSS class of a method's row."""
    return "reference" if m["variant"] == reference else ""


def _differences(splits: Mapping[str, Any]) -> list[Piece | str]:
    parts, pairs = [], []
    for split, scores in splits.items():
        rows = [Row(method(m["name"], m["choice"]), [*map(points, m["accuracy"])]) for m in scores["differences"]]
        if rows:
            parts.append((split, _size(scores), [Table(["Method", *THRESHOLDS], [Group(rows)])]))
        compared = [
            Row(f"{pair['name']}, against {pair['against']}", [*map(points, pair["accuracy"])])
            for pair in scores["comparisons"]
        ]
        if compared:
            pairs.append(Group(compared, split, _size(scores)))
    if not parts:
        return ["<p>There is no other method to compare the reference with.</p>"]
    reference = next(scores["reference"] for scores in splits.values() if scores["reference"])
    return [
        f"<p>Accuracy in percentage points above (+) or below (&minus;) <b>{escape(reference)}</b>, from the same "
        "bootstrap resamples of the same photos. A difference whose 95 % interval excludes zero is green or red. Point "
        "at a difference for its p-value.</p>",
        frame.folded(parts),
        *(["<h3>Other pairs of methods</h3>", Table(["Pair", *THRESHOLDS], pairs)] if pairs else []),
    ]


def _continents(splits: Mapping[str, Any], reference: str) -> list[Piece | str]:
    parts = []
    for split, scores in splits.items():
        groups = []
        for i, main in enumerate(scores["continents"][0]["methods"] if scores["continents"] else ()):
            rows = []
            for continent in scores["continents"]:
                m = continent["methods"][i]
                cells = [f"{continent['photos']:,}", *map(interval, m["accuracy"]), f"{m['geoscore']['value']:,.0f}"]
                rows.append(Row(continent["name"], cells, _look(main, reference)))
            groups.append(Group(rows, main["name"]))
        if groups:
            table = Table(["Continent", "Photos", *THRESHOLDS, "GeoScore"], groups)
            parts.append((split, _size(scores), [table]))
    if not parts:
        return ["<p>The source of these photos names no countries or continents.</p>"]
    return [
        "<p>Percent of the photos of each continent placed within a distance of the truth. A photo whose source names "
        "neither country nor continent counts as unknown.</p>",
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
        for m in clean["methods"]:
            pairs = zip(m["accuracy"], every[m["variant"]]["accuracy"], strict=True)
            cells = [Cell(f"{100 * a['value']:.1f}", [f"all {100 * b['value']:.1f}"]) for a, b in pairs]
            rows.append(Row(method(m["name"], m["choice"]), cells, _look(m, reference)))
        groups.append(Group(rows, split, left))
    return [
        "<p>A photo is easier to place if the gallery has a photo by the same author or a nearly equal picture. Such "
        "leaked photos are left out here: photos that share their id or author with a gallery photo, or whose image "
        f"embedding has a cosine above {metrics['cosine_above']:g} with the embedding of a gallery photo. Numbers are "
        "the percent of photos placed within a distance of the truth; small numbers below are for all photos.</p>",
        *([Table(["Method", *THRESHOLDS], groups)] if groups else []),
        *notes,
    ]


def _exclusion(splits: Mapping[str, Any], reference: str) -> list[Section]:
    """Returns a section on benchmarks with and without exclusion, or an empty list if there are no benchmarks."""
    counts, accuracies = [], []
    for split, scores in splits.items():
        if "exclusion" not in scores:
            continue
        exclusion = scores["exclusion"]
        known = scores["photos"] - exclusion["unknown_authors"]
        note = f"{_size(scores)}; authors known of {known:,} photos"
        names = ("photos", "gallery", "neighbors", "fewer")
        rows = [
            Row(rules.replace("_", " "), [f"{n[name]:,}" for name in names]) for rules, n in exclusion["rules"].items()
        ]
        counts.append(Group(rows, split, note))
        rows = []
        for m in exclusion["methods"]:
            rows.append(Row(method(m["name"], m["choice"]), [*map(interval, m["accuracy"])], _look(m, reference)))
            rows += [
                Row(f"without {rules.replace('_', ' ')}", [*map(_changed, of["accuracy"], of["change"]["accuracy"])])
                for rules, of in m["rules"].items()
            ]
        accuracies.append(Group(rows, split, _size(scores)))
    if not counts:
        return []
    columns = ["Rules", "Photos", "Gallery photos", "Other neighbors", "Too few neighbors"]
    explained = (
        "<p>Photos of a benchmark are often by authors whose other photos are in the gallery, or are nearly equal to "
        "photos in it. Each benchmark is predicted again without the gallery photos that the rules of "
        "config.benchmarks.exclude exclude. The first table counts the photos for which a rule excludes any gallery "
        "photo, the gallery photos that it excludes for any photo, the photos that get other neighbors, and those that "
        "are left with too few. The trained models are the same: they were trained on all gallery photos.</p>"
    )
    changed = "<p>Percent of photos placed within a distance; below it the change by the exclusion, in points.</p>"
    tables = [Table(columns, counts), changed, Table(["Method", *THRESHOLDS], accuracies)]
    return [Section("exclusion", "Exclusion", "Benchmarks with and without exclusion", [explained, *tables])]


def _changed(estimate: Mapping[str, float], change: Mapping[str, float]) -> Cell:
    """Returns a cell with an accuracy, its interval, and its change with the interval of the change."""
    cell, difference = interval(estimate), points(change)
    notes = [*cell.notes, f"{difference.text} ({difference.notes[0]})"]
    return Cell(cell.text, notes, sign=difference.sign, title=difference.title)


def _size(scores: Mapping[str, Any]) -> str:
    authors = f", {scores['authors']:,} authors" if scores["authors"] else ""
    return f"{scores['photos']:,} photos{authors}"


def _distance(methods: Mapping[str, Sequence[Method]], reference: str) -> list[Piece | str]:
    """Returns a chart per split with a color per variant.

    Only bounds of baselines and of the reference are drawn.
    """
    drawn = {
        split: [m for m in listed if not m.bound or m.baseline or m.variant == reference]
        for split, listed in methods.items()
    }
    variants = {m.variant for listed in drawn.values() for m in listed}
    ordered = sorted(variants, key=lambda variant: (variant != reference, variant))
    grid = np.geomspace(0.1, 20_000, 160)
    charts = []
    for split, listed in drawn.items():
        series = []
        for m in listed:
            within = 100 * np.searchsorted(np.sort(m.km), grid, side="right") / len(m.km)
            style = "dashed" if m.bound else "solid" if m.main else "dotted"
            name = m.name + (" (bound)" if m.bound else "")
            series.append(Series(name, ordered.index(m.variant), within, grid, style=style))
        title = f"Percent of the photos of {split} within a distance, one curve per method"
        x_label = "distance from the truth, km"
        series.reverse()
        marks = distance.THRESHOLDS_KM
        charts.append(Chart(split, title, x_label, "percent of photos", series, log_x=True, marks=marks))
    keys = [key for chart in charts for key in chart.entries()[::-1]]  # the reference, drawn last, is first here
    return [
        "<p>Percent of photos placed within a distance of the truth, for every distance. Dotted vertical lines are the "
        "thresholds of the tables. Solid curves are answers, dotted curves are choices of other selectors, and dashed "
        "curves are bounds.</p>",
        Panels(charts, list(dict.fromkeys(keys))),
    ]


def _training(losses: Losses) -> list[Piece | str]:
    """Returns a chart per model, with curves of train/loss* and validation/loss*. Terms of a loss have faint curves."""
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
        return ["<p>No model of this work directory has training metrics.</p>"]
    keys = [("train", 0, "solid"), ("validation", 1, "solid"), ("terms of either loss", 7, "faint")]
    return ["<p>Loss over training steps.</p>", Panels(charts, keys)]


def _made(report: Report) -> str:
    return (
        "<p>Each folder of the work directory, with its settings, the number of its entries, and the number of photos "
        f"that were dropped.</p>{frame.manifests(report.manifests)}"
        "<p>A missing prediction counts as wrong at every threshold, and as half the Earth's circumference in medians "
        f"and means. {frame.intervals(report.metrics['resamples'])} All figures of this page are in metrics.json in "
        "the same folder.</p>"
    )
