"""Page of `geotoken audit leakage`: evaluated photos with the same author, place or picture as a gallery photo.

The page also has the accuracy without these photos.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.examples import PhotoLookup
from geotoken_jax.analysis.leakage import KINDS, PAIRS
from geotoken_jax.pages import frame, worldmap
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.photos import thumbnail
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval

#: Color class of each kind of leak on the map.
_COLORS = dict(zip(KINDS, ("b5", "b4", "b3", "b0"), strict=True))


def page(
    figures: Mapping[str, Any],
    coordinates: Mapping[str, np.ndarray],
    photos: Mapping[str, PhotoLookup],
    gallery: PhotoLookup,
    reference: str,
    source: frame.Source,
) -> str:
    """Returns the page as HTML.

    figures: result of `leakage.figures`. coordinates: result of `leakage.worst_kinds`. photos: lookup of evaluated
    photos, by split. gallery: lookup of gallery photos. Both lookups must have the pairs of photos that the page shows.
    reference: variant whose rows are bold.
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
        "<p>A photo is easier to place if the gallery has a photo with the same author, place or picture. Such a photo "
        f"is leaked. This page compares every evaluated split with the {figures['gallery']:,} photos of the gallery, "
        f"counts leaked photos, and reports accuracy without them.</p>{frame.tiles(tiles)}"
    )
    sections = [
        Section("counts", "Counts", "Number of leaked photos", _counts(figures)),
        Section("where", "Map", "Places of leaked photos", _map(coordinates)),
        Section("accuracy", "Accuracy", "Accuracy with and without leaked photos", _accuracy(splits, reference)),
        Section("pairs", "Pairs", "Examples of leaked photos", _pairs(splits, photos, gallery)),
    ]
    return frame.audit_page("Photos leaked from the gallery", headline, sections, source)


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
        "<p>A photo is leaked if a gallery photo has the same id, the same known author or exactly the same "
        f"coordinates, or if the cosine between their image embeddings is above {figures['cosine_above']:g} "
        "(near-duplicate). A photo can be leaked in several ways. A clean photo is not leaked. The last columns "
        "are quantiles of the cosine with the most similar gallery photo.</p>",
        Table([*columns, *(f"Cosine, {name}" for name in quantiles)], [Group(rows)]),
    ]


def _map(coordinates: Mapping[str, np.ndarray]) -> list[Piece | str]:
    dots = {"rest": coordinates[""]} | {_COLORS[kind]: coordinates[kind] for kind in reversed(KINDS)}
    label = "Leaked photos of all splits, colored by kind of leak"
    return [
        f"<p>{label}. A photo with several kinds has the color of the first of them in the key. Small gray dots are "
        "clean photos.</p>",
        worldmap.dot_map(dots, label),
        frame.color_key((f"band {color}", "", kind) for kind, color in _COLORS.items()),
    ]


def _accuracy(splits: Mapping[str, Any], reference: str) -> list[Piece | str]:
    groups = []
    for split, of in splits.items():
        sets = {"all photos": of["accuracy"]["all"]}
        sets |= {f"without {kind}": scores for kind, scores in of["accuracy"]["without"].items() if scores}
        if len(sets) > 2 and of["accuracy"]["clean"]:
            sets["without all leaked photos"] = of["accuracy"]["clean"]
        for i, method in enumerate(of["accuracy"]["all"]["methods"]):
            look = "reference" if method["variant"] == reference else ""
            rows = [
                Row(name, [f"{scores['photos']:,}", *map(interval, scores["methods"][i]["accuracy"])], look)
                for name, scores in sets.items()
            ]
            groups.append(Group(rows, f"{split}: {method['name']}"))
    return [
        "<p>Percent of photos placed within a distance of the truth, on all photos and without each kind of leaked "
        "photo. A kind is not listed if a split has no such photos or no other photos.</p>",
        Table(["Photos", "Number", *THRESHOLDS], groups),
    ]


def _pairs(splits: Mapping[str, Any], photos: Mapping[str, PhotoLookup], gallery: PhotoLookup) -> list[Piece | str]:
    groups = []
    for split, of in splits.items():
        rows = []
        for kind in KINDS:
            for pair in of["kinds"][kind]["pairs"]:
                pictures = [
                    Cell(html=thumbnail(lookup, pair[side]), notes=[pair[side]])
                    for side, lookup in (("photo", photos[split]), ("gallery", gallery))
                ]
                cosine = f"{pair['cosine']:.3f}" if "cosine" in pair else ""
                rows.append(Row(kind, [*pictures, formats.km(pair["km"]), cosine], "pairs"))
        if rows:
            groups.append(Group(rows, split))
    if not groups:
        return ["<p>No photo is leaked.</p>"]
    return [
        f"<p>Up to {PAIRS} leaked photos per kind and split, each with its gallery photo and the distance between "
        "their places. Near-duplicates are the most similar.</p>",
        Table(["Kind", "Photo", "Gallery photo", "Distance", "Cosine"], groups),
    ]
