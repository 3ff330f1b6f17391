"""Page of `geotoken audit coverage`: gallery photos per region, and accuracy if a region has no gallery photos."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.coverage import BIN_AT, LOST_AT, LOST_BANDS, NEAR_KM, Maps
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.pages import frame, worldmap
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval, plain, sign

#: Largest number of rows in a table of countries.
_COUNTRIES = 25


def page(figures: Mapping[str, Any], maps: Maps, reference: str, source: frame.Source) -> str:
    """Returns the page as HTML. figures: result of `coverage.figures`. reference: variant in the headline."""
    density, masked = figures["density"], figures["masked"]
    split = masked["split"]
    nearest = figures["distance"][split]
    within_25 = sum(b["share"] for b in nearest["bins"][:2])
    of_cells = f"{density['cells']:,} of {density['of_cells']:,} of level {density['level']}"
    tiles = [
        ("photos in the gallery", f"{figures['gallery']:,}", f"in {len(density['countries']):,} countries"),
        ("S2 cells with a gallery photo", formats.percent(density["cells"] / density["of_cells"]), of_cells),
        (
            f"{split} photos within 25 km of a gallery photo",
            formats.percent(within_25),
            f"median distance {formats.km(nearest['median_km'])}",
        ),
    ]
    lead = ""
    if masked["every_continent"]:
        of = next(m for m in masked["every_continent"]["methods"] if m["variant"] == reference)
        before, after = (100 * of[name][LOST_AT]["value"] for name in ("plain", "masked"))
        lead = (
            f'<p class="lead"><b>{escape(of["name"])}</b> places {before:.1f} % of the photos of {escape(split)} '
            f"within 2,500 km. If the gallery has no photos of a photo's continent, it places {after:.1f} %.</p>"
        )
    headline = (
        "<p>Predictions rely on similar photos in the gallery. This page shows the places of the gallery's photos, the "
        "distance of evaluated photos to the nearest gallery photo, and the accuracy if the gallery has no photos of a "
        f"region.</p>{lead}{frame.tiles(tiles)}"
    )
    sections = [
        Section("density", "Density", "Places of the gallery's photos", _density(density, maps)),
        Section("nearest", "Nearest photo", "Distance to the nearest gallery photo", _nearest(figures)),
        Section("masked", "Without a region", "Accuracy if the gallery lacks a region", _masked(masked, maps)),
    ]
    return frame.audit_page("Coverage of the gallery", headline, sections, source)


def _density(density: Mapping[str, Any], maps: Maps) -> list[Piece | str]:
    largest_count = maps.counts.max()
    # Seven colors: powers of ten if a cell has 3,000 photos or more, else steps of about half a power.
    steps = [1, 10, 100, 1_000, 10_000, 100_000, 1_000_000]
    steps = steps if largest_count >= 3_000 else [1, 3, 10, 30, 100, 300, 1_000]
    steps = [step for step in steps if step <= largest_count]
    shades = np.searchsorted(steps, maps.counts, side="right") - 1
    names = [f"{a:,}-{b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in itertools.pairwise(steps)]
    names.append(f"{steps[-1]:,} and more")
    scheme = CellScheme(density["level"], 1)
    splits = [name for name in density["continents"][0] if name not in ("name", "photos", "share", "cells")]
    groups = []
    for kind in ("continents", "countries", *(["sources"] if "sources" in density else [])):
        listed = density[kind][:_COUNTRIES]
        rows = []
        for of in listed:
            counts = [f"{of[name]:,}" for name in ("photos", "cells", *splits)]
            rows.append(Row(of["name"], [counts[0], formats.percent(of["share"]), *counts[1:]]))
        groups.append(Group(rows, kind.capitalize(), f"{len(listed)} of {len(density[kind])}"))
    largest = [
        (f"{cell['latitude']:.1f}, {cell['longitude']:.1f}", cell["country"], cell["cell"], f"{cell['photos']:,}")
        for cell in density["largest_cells"]
    ]
    return [
        f"<p>Gallery photos per S2 cell of level {density['level']}. Cells without color have no photos. The table has "
        "gallery photos, their share of the gallery, cells with a gallery photo, and photos of each split.</p>",
        worldmap.cell_map(scheme, maps.cells, shades, "Gallery photos in each S2 cell"),
        frame.color_key(("shade", f"background:{worldmap.SHADES[i]}", name) for i, name in enumerate(names)),
        Table(["Region", "Gallery", "Share", "Cells", *splits], groups),
        "<h3>Cells with the most photos</h3>",
        plain(["Center", "Country", "Cell", "Photos"], largest),
    ]


def _nearest(figures: Mapping[str, Any]) -> list[Piece | str]:
    by_split = figures["distance"]
    names = [*(f"to {km:,}" for km in distance.THRESHOLDS_KM), "beyond"]
    x_label = "distance to the nearest gallery photo, km"
    shares = [np.array([100 * b["share"] for b in of["bins"]]) for of in by_split.values()]
    of_splits = [Series(split, i, share) for i, (split, share) in enumerate(zip(by_split, shares, strict=True))]
    title = "Percent of each split's photos by distance to the nearest gallery photo"
    histogram = Chart("Photos", title, x_label, "percent of photos", of_splits, names)
    charts, groups = [], []
    for split, of in by_split.items():
        methods = of["all"]["methods"]
        series = []
        for i, method in enumerate(methods):
            y, low, high = _within(of["bins"], i)
            series.append(Series(method["name"], i, y, low=low, high=high))
        title = f"Percent of {split} within 200 km of the truth, by distance to the nearest gallery photo"
        charts.append(Chart(split, title, x_label, "percent within 200 km", series, names))
        rows = [
            Row(b["name"], [f"{b['photos']:,}", *(interval(m["accuracy"][BIN_AT]) for m in b["methods"])])
            for b in of["bins"]
            if b["photos"]
        ]
        groups.append(Group(rows, split, f"median {formats.km(of['median_km'])}"))
    named, unknown = (sum(of[key] for of in figures["named_by_nearest"].values()) for key in ("named", "unknown"))
    return [
        "<p>Distance on the ground between the place of each evaluated photo and the nearest place of a gallery "
        "photo.</p>",
        Panels([histogram]),
        "<h3>Accuracy by distance to the nearest gallery photo</h3><p>Percent of photos placed within 200 km of the "
        "truth; whiskers and small numbers are 95 % intervals. A bin without bar has no photos. figures.json has the "
        "other thresholds.</p>",
        Panels(charts),
        Table(["Nearest gallery photo", "Photos", *(m["name"] for m in methods)], groups),
        f"<p>Of the photos whose source names no country, {named:,} count to the country of the nearest gallery photo, "
        f"which is up to {NEAR_KM:.0f} km away. The country of {unknown:,} photos is unknown, because the nearest "
        "gallery photo is farther away or has no country either.</p>",
    ]


def _within(bins: Sequence[Mapping[str, Any]], method: int) -> list[Float[np.ndarray, "bins"]]:
    """Returns the accuracy of one method per bin, and the lower and upper ends of its intervals, in percent.

    A bin without photos has NaN.
    """
    return [
        np.array([100 * b["methods"][method]["accuracy"][BIN_AT][part] if b["photos"] else np.nan for b in bins])
        for part in ("value", "low", "high")
    ]


def _masked(masked: Mapping[str, Any], maps: Maps) -> list[Piece | str]:
    split = masked["split"]
    if not masked["regions"]:
        return [f"<p>The gallery has no photos of the countries and continents of {escape(split)}.</p>"]
    groups, drawn = [], []
    for kind in maps.lost:
        regions = [region for region in masked["regions"] if region["kind"] == kind]
        if kind == "continent" and masked["every_continent"]:
            regions.append({"name": "Each photo's own continent", "gallery": None, **masked["every_continent"]})
        for i, method in enumerate(regions[0]["methods"] if regions else []):
            rows = [_masked_row(region, region["methods"][i]) for region in regions]
            groups.append(Group(rows, method["name"], f"one {kind} left out at a time, accuracy on its {split} photos"))
        drawn.append(_lost_map(kind, maps))
    between = [f"{a}-{b}" for a, b in itertools.pairwise(LOST_BANDS)]
    bands = [f"under {LOST_BANDS[0]}", *between, f"over {LOST_BANDS[-1]}"]
    lead = "Loss of accuracy within 2,500 km without the region, in percent of the accuracy with it: "
    return [
        f"<p>The photos of {escape(split)} in a region are placed again after all photos of that region are removed "
        "from the gallery: neighbors are searched again, exactly, and the first neighbor and the decoder give new "
        "answers. A table cell has the percent of photos within the distance without the region. Below it are the "
        "percent with the whole gallery, and the 95 % interval of the difference in percentage points. It is green or "
        "red if the interval excludes zero.</p>",
        *drawn,
        frame.color_key(((f"band b{i}", "", name) for i, name in enumerate(bands)), lead),
        Table(["Region left out", "Photos", "Gallery photos", *THRESHOLDS], groups),
    ]


def _masked_row(region: Mapping[str, Any], method: Mapping[str, Any]) -> Row:
    gallery = "" if region["gallery"] is None else f"{region['gallery']:,}"
    cells: list[Cell | str] = [f"{region['photos']:,}", gallery]
    for before, after, lost in zip(method["plain"], method["masked"], method["difference"], strict=True):
        low, high = (formats.signed(100 * lost[part]) for part in ("low", "high"))
        notes = [f"with {100 * before['value']:.1f}", f"{low} to {high}"]
        cells.append(Cell(f"{100 * after['value']:.1f}", notes, sign=sign(lost)))
    return Row(region["name"], cells)


def _lost_map(kind: str, maps: Maps) -> str:
    band = maps.lost[kind]
    dots = {"rest": maps.coordinates[band < 0]}
    dots |= {f"b{i}": maps.coordinates[band == i] for i in range(len(LOST_BANDS) + 1)}
    label = f"Photos, colored by the loss of accuracy if the gallery lacks their {kind}"
    return f"<h3>{label}</h3>{worldmap.dot_map(dots, label)}"
