"""The page of `geotoken audit leakage`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.examples import Gallery
from geotoken_jax.analysis.leakage import KINDS, PAIRS
from geotoken_jax.pages import frame, worldmap
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.photos import thumbnail
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval

#: The color of each kind on the map.
_COLORS = dict(zip(KINDS, ("b5", "b4", "b3", "b0"), strict=True))


def page(
    figures: Mapping[str, Any],
    coordinates: Mapping[str, np.ndarray],
    photos: Mapping[str, Gallery],
    gallery: Gallery,
    reference: str,
    source: frame.Source,
) -> str:
    """Returns the page.

    coordinates: of `leakage.worst_kinds`. photos: by split, and gallery: the pictures of the pairs. reference: the
    variant whose rows stand out.
    """
    splits = figures["splits"]
    tiles = [
        (
            f"{split} photos leaked",
            formats.percent(1 - of["clean"] / of["photos"]),
            f"{of['photos'] - of['clean']:,} of {of['photos']:,}",
        )
        for split, of in splits.items()
    ]
    headline = (
        "<p>A photo whose author, place or picture is in the gallery too is easier than a new one. This page counts "
        f"such photos of every evaluated split against the gallery's {figures['gallery']:,}, and scores the "
        f"predictions with them left out.</p>{frame.tiles(tiles)}"
    )
    sections = [
        Section("counts", "Counts", "How many are leaked", _counts(figures)),
        Section("where", "Map", "Where they are", _map(coordinates)),
        Section("accuracy", "Accuracy", "Accuracy with and without them", _accuracy(splits, reference)),
        Section("pairs", "Pairs", "Some pairs", _pairs(splits, photos, gallery)),
    ]
    return frame.audit_page("What leaks from the gallery", headline, sections, source)


def _counts(figures: Mapping[str, Any]) -> list[Piece | str]:
    rows, quantiles = [], []
    for split, of in figures["splits"].items():
        quantiles = list(of["cosine_of_nearest"])
        cells: list[Cell | str] = [f"{of['photos']:,}"]
        cells += [Cell(f"{kind['photos']:,}", [formats.percent(kind["share"])]) for kind in of["kinds"].values()]
        cells.append(Cell(f"{of['clean']:,}", [formats.percent(of["clean"] / of["photos"])]))
        cells += [f"{value:.3f}" for value in of["cosine_of_nearest"].values()]
        rows.append(Row(split, cells))
    columns = ["Split", "Photos", *(kind.capitalize() for kind in KINDS), "Clean"]
    return [
        "<p>Photos with a photo in the gallery of the same id, of the same author (where one is known), at exactly the "
        "same coordinates, or with an image embedding whose cosine with theirs is above "
        f"{figures['cosine_above']:g}. A photo may be leaked in several ways; a clean one is in none. The last columns "
        "are quantiles of the cosine with the most similar gallery photo.</p>",
        Table([*columns, *(f"Cosine, {name}" for name in quantiles)], [Group(rows)]),
    ]


def _map(coordinates: Mapping[str, np.ndarray]) -> list[Piece | str]:
    dots = {"rest": coordinates[""]} | {_COLORS[kind]: coordinates[kind] for kind in reversed(KINDS)}
    label = "Leaked photos of all splits, by the worst way in which they are"
    return [
        f"<p>{label}; small gray dots are clean.</p>",
        worldmap.dot_map(dots, label),
        frame.color_key((f"band {color}", "", kind) for kind, color in _COLORS.items()),
    ]


def _accuracy(splits: Mapping[str, Any], reference: str) -> list[Piece | str]:
    groups = []
    for split, of in splits.items():
        sets = {"all photos": of["accuracy"]["all"]}
        sets |= {f"without {kind}": scores for kind, scores in of["accuracy"]["without"].items() if scores}
        if len(sets) > 2 and of["accuracy"]["clean"]:
            sets["without any"] = of["accuracy"]["clean"]
        for i, method in enumerate(of["accuracy"]["all"]["methods"]):
            look = "reference" if method["variant"] == reference else ""
            rows = [
                Row(name, [f"{scores['photos']:,}", *map(interval, scores["methods"][i]["accuracy"])], look)
                for name, scores in sets.items()
            ]
            groups.append(Group(rows, f"{split}: {method['name']}"))
    return [
        "<p>Percent placed within a distance, on all photos and on those that are left without each kind of leaked "
        "photo; kinds that a split has none of, or that leave none, are not listed.</p>",
        Table(["Photos", "Number", *THRESHOLDS], groups),
    ]


def _pairs(splits: Mapping[str, Any], photos: Mapping[str, Gallery], gallery: Gallery) -> list[Piece | str]:
    groups = []
    for split, of in splits.items():
        rows = []
        for kind in KINDS:
            for pair in of["kinds"][kind]["pairs"]:
                pictures = [
                    Cell(html=thumbnail(held, pair[which]), notes=[pair[which]])
                    for which, held in (("photo", photos[split]), ("gallery", gallery))
                ]
                cosine = f"{pair['cosine']:.3f}" if "cosine" in pair else ""
                rows.append(Row(kind, [*pictures, formats.km(pair["km"]), cosine], "pairs"))
        if rows:
            groups.append(Group(rows, split))
    if not groups:
        return ["<p>No photo is leaked.</p>"]
    return [
        f"<p>Up to {PAIRS} of each kind and split; the most similar first, of near-duplicates.</p>",
        Table(["Kind", "Photo", "Photo of the gallery", "Apart", "Cosine"], groups),
    ]
