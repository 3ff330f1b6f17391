"""The report's sections on uncertainty: reliability, radii, abstention, and recall against the area searched."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series, label
from geotoken_jax.pages.frame import Piece
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval
from geotoken_jax.predict.uncertainty import MASSES


def reliability(splits: Mapping[str, Any]) -> list[Piece | str]:
    """Returns the section on reliability and abstention. splits: figures of analysis.reliability, or None."""
    known = {split: found for split, found in splits.items() if found}
    if not known:
        return ["<p>The predictions of the reference do not say how sure they are.</p>"]
    name = next(iter(known.values()))["name"]
    lead = (
        f"<p>How sure <b>{escape(name)}</b> says it is, against what came true. Its radii should hold "
        f"{' and '.join(map(str, MASSES))} % of the photos, and of those it gives 70 % for a distance, 70 % should be "
        "within it: dots on the diagonal. The calibration error is their mean distance from it, in points. Bars and "
        "small figures are 95 % intervals, photos taken as independent.</p>"
    )
    drawn = []
    for split, found in known.items():
        diagrams = [_diagram(split, of) for of in found["reliability"] if of]
        pieces = ["<h3>Reliability</h3>", Panels(diagrams, (), small=True)] if diagrams else []
        drawn.append((split, "reliability and abstention", [*pieces, *_abstention(split, found["abstention"])]))
    return [lead, _summary(known), frame.folded(drawn)]


def _summary(known: Mapping[str, Any]) -> Table:
    columns = ["Split"]
    for mass in MASSES:
        columns += [f"{mass}\N{NO-BREAK SPACE}% radius holds", "its median"]
    rows = []
    for split, found in known.items():
        cells: list[Cell | str] = []
        for of in found["radii"]:
            cells += [interval(of["holds"]), formats.km(of["median_km"])] if of else ["", ""]
        cells += [f"{100 * of['error']:.1f}" if of else "" for of in found["reliability"]]
        rows.append(Row(split, cells))
    return Table([*columns, *(f"error at {km}" for km in THRESHOLDS)], [Group(rows)])


def _diagram(split: str, of: Mapping[str, Any]) -> Chart:
    predicted = np.array([100 * b["predicted"] for b in of["bins"]])
    value, low, high = (np.array([100 * b["observed"][part] for b in of["bins"]]) for part in ("value", "low", "high"))
    notes = [
        f"{b['photos']:,} photos: said {x:.1f} %, was {y:.1f} %"
        for b, x, y in zip(of["bins"], predicted, value, strict=True)
    ]
    whole = np.array([0.0, 100.0])
    return Chart(
        f"Within {of['km']:,} km: error {100 * of['error']:.1f} points",
        f"Percent of photos of {split} within {of['km']:,} km, against the percent that was predicted",
        "percent predicted",
        "percent that were",
        [
            Series("as sure as it says", 7, whole, whole, style="dashed"),
            Series("what came true", 0, value, predicted, low, high, notes=notes),
        ],
    )


def _abstention(split: str, curves: Mapping[str, Any]) -> list[Piece | str]:
    if not curves:
        return []
    first = next(iter(curves))
    accuracy = np.array([row["accuracy"] for row in curves[first]])
    answered = np.array([100 * row["answered"] for row in curves[first]])
    within = [Series(f"{km:,} km", i, 100 * accuracy[:, i], answered) for i, km in enumerate(distance.THRESHOLDS_KM)]
    scores = [
        Series(f"GeoScore by {name}", i, np.array([row["geoscore"] for row in curve]), answered)
        for i, (name, curve) in enumerate(curves.items())
    ]
    x_label = "percent answered, the surest first"
    title = f"Percent of the answered photos of {split} within a distance, against the percent answered"
    of_scores = f"GeoScore of the answered photos of {split} against the percent answered"
    panels = [
        Chart(f"Accuracy, surest by {first}", title, x_label, "percent within", within, legend=None),
        Chart("GeoScore, surest by either", of_scores, x_label, "GeoScore", scores, legend=None),
    ]
    return ["<h3>Leaving out the least sure</h3>", Panels(panels, ())]


def area(splits: Mapping[str, Any]) -> list[Piece | str]:
    """Returns the section on recall against area. splits: figures of analysis.reliability, or None."""
    charts, rows, areas = [], [], []
    for split, found in splits.items():
        if not found:
            continue
        areas = [of["km2"] for of in found["area"]]
        kinds = {"circle around the answer": "circle", "most probable cells": "cells"}
        kinds = {name: key for name, key in kinds.items() if found["area"][0][key] is not None}
        curves = {name: np.array([100 * of[key] for of in found["area"]]) for name, key in kinds.items()}
        title = f"Percent of the photos of {split} that were taken in the area searched, against its size"
        series = [Series(name, i, curve, np.array(areas)) for i, (name, curve) in enumerate(curves.items())]
        x_label = "area searched, square kilometers"
        charts.append(Chart(split, title, x_label, "percent of photos", series, log_x=True))
        rows += [Row(f"{split}: {name}", [f"{y:.1f}" for y in curve]) for name, curve in curves.items()]
    if not charts:
        return ["<p>The predictions of the reference say nothing of where else to search.</p>"]
    columns = ["Percent found in", *(f"{label(of)}\N{NO-BREAK SPACE}km\N{SUPERSCRIPT TWO}" for of in areas)]
    return [
        "<p>How much of the Earth must be searched until the place is found: by a circle that grows around the answer, "
        "or cell by cell of the model's own distribution, those with the most probability a square kilometer first; "
        "where its curve ends, the truth is in none of the cells listed.</p>",
        Panels(charts),
        frame.hidden("In figures", Table(columns, [Group(rows)])),
    ]
