"""Sections of the report on uncertainty: calibration of probabilities and radii, abstention, and area to search."""

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
    """Returns the section on calibration and abstention.

    splits: result of `figures` in analysis.reliability, by split. It is None if the predictions of a split have no
    uncertainty.
    """
    known = {split: figures for split, figures in splits.items() if figures}
    if not known:
        return ["<p>The predictions of the reference state no uncertainty.</p>"]
    name = next(iter(known.values()))["name"]
    lead = (
        f"<p>Uncertainty that <b>{escape(name)}</b> states, compared with its errors. The truth should be within the "
        f"stated radii for {' and '.join(map(str, MASSES))} % of photos. Of photos with a stated probability of 70 % "
        "to be within a distance, 70 % should be within it. Such dots are on the diagonal. The calibration error is "
        "the mean distance of the dots from the diagonal, in percentage points. Bars and small numbers are 95 % "
        "intervals, which assume independent photos.</p>"
    )
    parts = []
    for split, figures in known.items():
        diagrams = [_diagram(split, of) for of in figures["reliability"] if of]
        pieces = ["<h3>Stated and observed probability</h3>", Panels(diagrams, (), small=True)] if diagrams else []
        note = "calibration, and accuracy of the most certain photos"
        parts.append((split, note, [*pieces, *_abstention(split, figures["abstention"])]))
    return [lead, _summary(known), frame.folded(parts)]


def _summary(known: Mapping[str, Any]) -> Table:
    columns = ["Split"]
    for mass in MASSES:
        columns += [f"percent within {mass}\N{NO-BREAK SPACE}% radius", "median radius"]
    rows = []
    for split, figures in known.items():
        cells: list[Cell | str] = []
        for of in figures["radii"]:
            cells += [interval(of["holds"]), formats.km(of["median_km"])] if of else ["", ""]
        cells += [f"{100 * of['error']:.1f}" if of else "" for of in figures["reliability"]]
        rows.append(Row(split, cells))
    return Table([*columns, *(f"calibration error, {km}" for km in THRESHOLDS)], [Group(rows)])


def _diagram(split: str, of: Mapping[str, Any]) -> Chart:
    predicted = np.array([100 * b["predicted"] for b in of["bins"]])
    value, low, high = (np.array([100 * b["observed"][part] for b in of["bins"]]) for part in ("value", "low", "high"))
    notes = [
        f"{b['photos']:,} photos: stated {x:.1f} %, observed {y:.1f} %"
        for b, x, y in zip(of["bins"], predicted, value, strict=True)
    ]
    whole = np.array([0.0, 100.0])
    return Chart(
        f"Within {of['km']:,} km: error {100 * of['error']:.1f} points",
        f"Observed percent of photos of {split} within {of['km']:,} km, by stated percent",
        "stated percent",
        "observed percent",
        [
            Series("stated equals observed", 7, whole, whole, style="dashed"),
            Series("observed", 0, value, predicted, low, high, notes=notes),
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
        Series(f"ordered by {name}", i, np.array([row["geoscore"] for row in curve]), answered)
        for i, (name, curve) in enumerate(curves.items())
    ]
    x_label = "percent of photos answered, most certain first"
    title = f"Percent of the answered photos of {split} within a distance, by percent of photos answered"
    of_scores = f"GeoScore of the answered photos of {split}, by percent of photos answered"
    panels = [
        Chart(f"Accuracy, ordered by {first}", title, x_label, "percent within", within, legend=None),
        Chart("GeoScore", of_scores, x_label, "GeoScore", scores, legend=None),
    ]
    return ["<h3>Accuracy if the least certain photos are not answered</h3>", Panels(panels, ())]


def area(splits: Mapping[str, Any]) -> list[Piece | str]:
    """Returns the section on the area that is searched until the place is found.

    splits: result of `figures` in analysis.reliability, by split. It is None if the predictions of a split have no
    uncertainty.
    """
    charts, rows, areas = [], [], []
    for split, figures in splits.items():
        if not figures:
            continue
        areas = [of["km2"] for of in figures["area"]]
        kinds = {"circle around the answer": "circle", "most probable cells": "cells"}
        kinds = {name: key for name, key in kinds.items() if figures["area"][0][key] is not None}
        curves = {name: np.array([100 * of[key] for of in figures["area"]]) for name, key in kinds.items()}
        title = f"Percent of the photos of {split} that were taken in the searched area, by its size"
        series = [Series(name, i, curve, np.array(areas)) for i, (name, curve) in enumerate(curves.items())]
        x_label = "searched area, square kilometers"
        charts.append(Chart(split, title, x_label, "percent of photos", series, log_x=True))
        rows += [Row(f"{split}: {name}", [f"{y:.1f}" for y in curve]) for name, curve in curves.items()]
    if not charts:
        return ["<p>The predictions of the reference state no uncertainty, so there is no order of search.</p>"]
    columns = ["Percent found within", *(f"{label(of)}\N{NO-BREAK SPACE}km\N{SUPERSCRIPT TWO}" for of in areas)]
    return [
        "<p>Percent of photos whose place is found after an area of the Earth is searched. One search is a circle that "
        "grows around the answer. The other takes the cells of the model's distribution in the order of their "
        "probability per square kilometer; its curve ends below 100 % if the truth is in none of the stated cells.</p>",
        Panels(charts),
        frame.hidden("Figures of the charts", Table(columns, [Group(rows)])),
    ]
