"""Numbers that `geotoken audit coverage` reports on the gallery's coverage of the Earth.

They are the number of gallery photos per region, and the accuracy on a region's photos if the gallery has no photos of
the region.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt64
from scipy.spatial import KDTree

from geotoken_jax import manifests, records
from geotoken_jax.analysis import audit, regions
from geotoken_jax.analysis.coordinates import CoordinateTable, Method, off_km
from geotoken_jax.configuration import EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.progress import track
from geotoken_jax.workdir import TOP1

#: A photo without a country name gets the country of the nearest gallery photo, if that photo is within this distance.
NEAR_KM = 100.0
#: Indices into THRESHOLDS_KM. BIN_AT: threshold of the charts by distance to the nearest gallery photo. LOST_AT:
#: threshold of the map of losses. This is the largest threshold, because few photos are placed nearer if the gallery
#: has no photos of their region.
BIN_AT, LOST_AT = distance.THRESHOLDS_KM.index(200), distance.THRESHOLDS_KM.index(2500)
#: Borders between the colors of the map of losses, in percent. A region's loss of 40 % means: without the gallery
#: photos of the region, the share of its photos that are placed within 2,500 km is 40 % smaller.
LOST_BANDS = (20, 40, 60, 80, 95)
#: Kinds of regions, in the order of the columns of SplitPhotos.regions. The last column is there only if there are
#: several sources. All photos of a source count as a region.
_KINDS = ("continent", "country", "source")
#: Names of the bins of distance to the nearest gallery photo.
BINS = [
    "up to 1 km",
    *(f"{a:,}-{b:,} km" for a, b in itertools.pairwise(distance.THRESHOLDS_KM)),
    f"over {distance.THRESHOLDS_KM[-1]:,} km",
]

#: Function that predicts photos of a split with neighbors from a subset of the gallery. Arguments: number of the region
#: that is left out, rows of the photos in the split's table, gallery rows that may be neighbors. Returns two sets of
#: coordinates in degrees: the first neighbors, with NaN for a photo without neighbors, and the decoder's answers.
Answer = Callable[[int, Int[np.ndarray, "m"], Int[np.ndarray, "k"]], Float[np.ndarray, "2 m 2"]]


@dataclasses.dataclass(frozen=True)
class SplitPhotos:
    """Photos of a split with their regions and the predictions for them.

    Attributes:
        truth: coordinates, place names and authors.
        methods: main method of each file of predictions, see audit.main_methods.
        regions: continent and country per photo, as UTF-8; if there are several sources, also the source.
        km: distance from each photo to the nearest gallery photo.
    """

    truth: CoordinateTable
    methods: Sequence[Method]
    regions: Shaped[np.ndarray, "n kinds"]
    km: Float[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Maps:
    """Data of the page's maps.

    Attributes:
        cells: ids of the S2 cells with gallery photos, ascending.
        counts: gallery photos per cell.
        coordinates: true coordinates, in degrees, of the split's photos that are predicted again without their region.
        lost: kind of region -> number of the loss band of each photo's region, from 0 (below
            the first of LOST_BANDS) to len(LOST_BANDS); -1 if the region is not left out.
    """

    cells: UInt64[np.ndarray, "m"]
    counts: Int[np.ndarray, "m"]
    coordinates: Float[np.ndarray, "n 2"]
    lost: Mapping[str, Int[np.ndarray, "n"]]


def split_photos(
    truth: CoordinateTable,
    methods: Sequence[Method],
    tree: KDTree,
    gallery: Table,
    of_gallery: np.ndarray,
    sources: Shaped[np.ndarray, "n"],
) -> SplitPhotos:
    """Returns the photos of a split with their regions, main methods and distances to the gallery.

    tree: search tree of the gallery's coordinates, as unit vectors. of_gallery: result of `gallery_regions`. sources:
    source per photo, empty if unknown; used only if `of_gallery` has sources.
    """
    rows, km = _nearest(tree, gallery, truth)
    regions_of = _regions(truth, rows, km, of_gallery)
    if of_gallery.shape[1] == len(_KINDS):
        named = np.where(sources == b"", regions.UNKNOWN.encode(), sources)
        regions_of = np.column_stack([regions_of, named]).astype(of_gallery.dtype)
    return SplitPhotos(truth, audit.main_methods(methods), regions_of, km)


def figures(
    splits: Mapping[str, SplitPhotos],
    gallery: Table,
    of_gallery: Shaped[np.ndarray, "N kinds"],
    masked: Mapping[str, Any],
    level: int,
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Returns the contents of figures.json: photos per region and cell, accuracy by distance to the nearest gallery
    photo, and accuracy without a region.

    of_gallery: result of `gallery_regions`. masked: result of `score_without_regions`. level: S2 level of
    the cells.
    """
    regions = {name: of.regions for name, of in splits.items()}
    return {
        "gallery": len(gallery),
        "density": _density(gallery, of_gallery, regions, level),
        "named_by_nearest": {name: _count_unnamed(of.truth, of.regions) for name, of in splits.items()},
        "distance": {name: _by_distance(of.km, of.methods, of.truth, scoring) for name, of in splits.items()},
        "masked": masked,
    }


def maps(figures: Mapping[str, Any], gallery: Table, of: SplitPhotos, reference: str) -> Maps:
    """Returns the data of the page's maps.

    figures: result of `figures`. of: photos that are predicted again without their region. reference: variant whose
    losses the map shows.
    """
    scheme = CellScheme(figures["density"]["level"], 1)
    cells, counts = np.unique(scheme.cell_ids(np.asarray(scheme.regroup(gallery.tokens()))), return_counts=True)
    lost = {kind: np.full(len(of.truth.ids), -1) for kind in _KINDS[: of.regions.shape[1]]}
    for region in figures["masked"]["regions"]:
        method = next(m for m in region["methods"] if m["variant"] == reference)
        plain, masked = (method[name][LOST_AT]["value"] for name in ("plain", "masked"))
        share = 100 * (1 - masked / plain) if plain else 0
        rows = of.regions[:, _KINDS.index(region["kind"])] == region["name"].encode()
        lost[region["kind"]][rows] = np.searchsorted(LOST_BANDS, share)
    return Maps(cells, counts, of.truth.coordinates, lost)


def table(figures: Mapping[str, Any]) -> str:
    """Returns text tables: accuracy by distance to the nearest gallery photo, and with and without each region."""
    masked = figures["masked"]
    split = masked["split"]
    lines = [f"{split}: percent within 200 km, by distance to the nearest gallery photo"]
    names = [m["name"] for m in figures["distance"][split]["all"]["methods"]]
    width = max(map(len, names))
    lines += [f"  {'':16}{'photos':>8}  " + "  ".join(f"{name:>{width}}" for name in names)]
    for counted in figures["distance"][split]["bins"]:
        within = [f"{100 * m['accuracy'][BIN_AT]['value']:{width}.1f}" for m in counted["methods"]]
        lines.append(f"  {counted['name']:16}{counted['photos']:8,}  " + "  ".join(within))
    lines += ["", f"{split}: percent within 2,500 km -> with the photos of their region left out of the gallery"]
    names = [f"source {one['name']}" if one["kind"] == "source" else one["name"] for one in masked["regions"]]
    width = max(map(len, names), default=0)
    for name, region in zip(names, masked["regions"], strict=True):
        pairs = (
            f"{m['name']} {100 * m['plain'][LOST_AT]['value']:.1f} -> {100 * m['masked'][LOST_AT]['value']:.1f}"
            for m in region["methods"]
        )
        lines.append(f"  {name:{width}}{region['photos']:6,}  " + ";  ".join(pairs))
    if not masked["regions"]:
        lines.append("  none: the gallery and these photos have no country or continent in common")
    return "\n".join(line.rstrip() for line in lines)


def gallery_regions(photos: records.Photos, gallery: Table) -> Shaped[np.ndarray, "N kinds"]:
    """Returns continent and country of every gallery photo, as UTF-8; if there are several sources, also the source.

    photos: records in the order of the gallery; they include photos that `embed` dropped. Raises StageError if a
    gallery photo is missing among them or has another place in their order.
    """
    names = np.zeros((len(gallery), 2 + ("sources" in gallery.stored)), f"S{records.ID_BYTES}")
    if "sources" in gallery.stored:
        names[:, 2] = gallery.sources()
    ids, row = gallery.ids(), 0
    for i in track(range(len(photos)), "places of the gallery", len(photos), "photos"):
        photo = photos[i]
        if row < len(gallery) and photo["id"].encode() == ids[row]:
            names[row, :2] = regions.continent(photo).encode(), regions.country(photo["country"]).encode()
            row += 1
    if row < len(gallery):
        raise manifests.StageError(
            f"gallery/ has photo {bytes(ids[row]).decode()!r}, but photos/ lacks it or has another order: run prepare, "
            "embed and index again with another --workdir"
        )
    return names


def _nearest(
    tree: KDTree, gallery: Table, truth: CoordinateTable
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns the row of the nearest gallery photo for each photo, and the distance between the two photos in km."""
    rows = np.asarray(tree.query(distance.to_unit_vectors(*truth.coordinates.T))[1])
    return rows, np.asarray(distance.great_circle_km(*truth.coordinates.T, *gallery.coordinates(rows).T))


def _regions(
    truth: CoordinateTable,
    rows: Int[np.ndarray, "n"],
    km: Float[np.ndarray, "n"],
    of_gallery: Shaped[np.ndarray, "N kinds"],
) -> Shaped[np.ndarray, "n 2"]:
    """Returns continent and country per photo, as UTF-8, from its place names.

    A photo without a country name takes both from the nearest gallery photo, if that photo is within NEAR_KM. rows, km:
    row and distance of the gallery photo nearest to each photo. of_gallery: result of `gallery_regions`.
    """
    named = [(regions.continent(names).encode(), regions.country(names["country"]).encode()) for names in truth.extra]
    assigned = np.array(named, of_gallery.dtype)
    unnamed = (assigned[:, 1] == regions.UNKNOWN.encode()) & (km <= NEAR_KM)
    assigned[unnamed] = of_gallery[rows[unnamed], :2]
    return assigned


def _count_unnamed(truth: CoordinateTable, assigned: Shaped[np.ndarray, "n 2"]) -> dict[str, int]:
    """Returns two counts: photos without a country name that have one from a gallery photo, and photos whose country is
    still unknown."""
    unnamed = np.array([not names["country"].strip() for names in truth.extra])
    unknown = assigned[:, 1] == regions.UNKNOWN.encode()
    return {"named": int((unnamed & ~unknown).sum()), "unknown": int(unknown.sum())}


def _density(
    gallery: Table,
    of_gallery: Shaped[np.ndarray, "N kinds"],
    regions: Mapping[str, Shaped[np.ndarray, "n kinds"]],
    level: int,
) -> dict[str, Any]:
    """Returns the S2 cells with most photos, and photos per region in the gallery and in each split.

    of_gallery: result of `gallery_regions`. regions: continent and country per photo, by split. level: S2
    level of the cells.
    """
    scheme = CellScheme(level, 1)
    ids = scheme.cell_ids(np.asarray(scheme.regroup(gallery.tokens())))
    cells, first, cell_of, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    densest = np.argsort(-counts, kind="stable")[:10]
    latitude, longitude = scheme.decode(scheme.from_cell_ids(cells[densest]))
    density: dict[str, Any] = {
        "level": level,
        "cells": len(cells),
        "of_cells": 6 * 4**level,
        "largest_cells": [
            {
                "cell": f"{int(cells[i]):016x}".rstrip("0"),
                "latitude": round(float(latitude[n]), 4),
                "longitude": round(float(longitude[n]), 4),
                "country": of_gallery[first[i], 1].decode(),
                "photos": int(counts[i]),
            }
            for n, i in enumerate(densest)
        ],
    }
    for column, kind in enumerate(("continents", "countries", "sources")[: of_gallery.shape[1]]):
        names, which, photos = np.unique(of_gallery[:, column], return_inverse=True, return_counts=True)
        occupied = np.bincount(np.unique(which * len(cells) + cell_of) // len(cells))
        by_split = {
            split: dict(zip(*np.unique(of[:, column], return_counts=True), strict=True))
            for split, of in regions.items()
        }
        lists = [
            {
                "name": name.decode(),
                "photos": int(n),
                "share": round(n / len(gallery), 6),
                "cells": int(c),
                **{split: int(of.get(name, 0)) for split, of in by_split.items()},
            }
            for name, n, c in zip(names, photos, occupied, strict=True)
        ]
        density[kind] = sorted(lists, key=lambda region: (-region["photos"], region["name"]))
    return density


def _by_distance(
    km: Float[np.ndarray, "n"], methods: Sequence[Method], truth: CoordinateTable, scoring: EvaluateSettings
) -> dict[str, Any]:
    """Returns the scores of the photos in each bin of BINS and of all photos, and the median distance.

    km: distance from each photo to the nearest gallery photo.
    """
    which = np.searchsorted(distance.THRESHOLDS_KM, km)
    bins = []
    for i, name in enumerate(BINS):
        rows = np.flatnonzero(which == i)
        scored = audit.score(methods, truth, rows, scoring)["methods"] if len(rows) else []
        bins.append({"name": name, "photos": len(rows), "share": round(len(rows) / len(km), 6), "methods": scored})
    everything = audit.score(methods, truth, np.arange(len(km)), scoring)
    return {"median_km": round(float(np.median(km)), 6), "bins": bins, "all": everything}


def score_without_regions(
    split: str,
    of: SplitPhotos,
    of_gallery: Shaped[np.ndarray, "N kinds"],
    row_of: Int[np.ndarray, "n"],
    countries: int,
    answer: Answer,
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Returns, per region, the scores of the region's photos with the whole gallery and without that region.

    Regions are all continents, the `countries` countries with the most photos of the split, and all of several sources.
    Regions without gallery photos are skipped. `every_continent` has the scores of all photos, each predicted without
    its own continent; None if there is no continent.

    of: photos of the split. of_gallery: result of `gallery_regions`. row_of: row of each photo in the
    split's table; -1 if the table lacks the photo. answer: see Answer.
    """
    scored, both = [], [m for m in of.methods if m.variant in (TOP1, scoring.reference)]
    without_continent = np.full((2, len(of.truth.ids), 2), np.nan)
    chosen = _masked_regions(of.regions, of_gallery, countries)
    for number, (column, name) in enumerate(track(chosen, "without a region", len(chosen), "regions")):
        rows = np.flatnonzero((of.regions[:, column] == name) & (row_of >= 0))
        kept = np.flatnonzero(of_gallery[:, column] != name)
        placed = np.full_like(without_continent, np.nan)
        placed[:, rows] = answer(number, row_of[rows], kept)
        if column == 0:
            without_continent[:, rows] = placed[:, rows]
        lost = _masked_scores(both, placed, of.truth, np.flatnonzero(of.regions[:, column] == name), scoring)
        left_out = len(of_gallery) - len(kept)
        scored.append({"kind": _KINDS[column], "name": name.decode(), "gallery": left_out, **lost})
    rows = np.flatnonzero(np.isin(of.regions[:, 0], [name for column, name in chosen if column == 0]))
    every = _masked_scores(both, without_continent, of.truth, rows, scoring) if len(rows) else None
    return {"split": split, "every_continent": every, "regions": scored}


def _masked_regions(
    of_photos: Shaped[np.ndarray, "n kinds"], of_gallery: Shaped[np.ndarray, "N kinds"], countries: int
) -> list[tuple[int, bytes]]:
    """Returns the regions to leave out: all continents, then up to `countries` countries, then all of several sources.

    Regions with the most photos of the split come first. Regions without gallery photos are skipped. A region is
    returned as a pair: index of its kind in _KINDS, and name.
    """
    chosen = []
    for column, limit in enumerate((None, countries, None)[: of_gallery.shape[1]]):
        names, photos = np.unique(of_photos[:, column], return_counts=True)
        known = (names != regions.UNKNOWN.encode()) & np.isin(names, of_gallery[:, column])
        order = np.argsort(-photos[known], kind="stable")
        chosen += [(column, bytes(name)) for name in names[known][order][:limit]]
    return chosen


def _masked_scores(
    methods: Sequence[Method],
    placed: Float[np.ndarray, "2 n 2"],
    truth: CoordinateTable,
    rows: Int[np.ndarray, "m"],
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Returns the accuracy of each method with the whole gallery (`plain`) and without a region (`masked`).

    `difference` is the paired difference between the two. methods: first neighbor (TOP1) and reference variant. placed:
    coordinates predicted without the region, by the first neighbor and by the decoder. rows: photos that are scored.
    """
    compared = []
    for method in methods:
        without_region = placed[int(method.variant != TOP1)]
        km = off_km(without_region, truth, scoring.earth)
        masked = dataclasses.replace(method, variant="masked", coordinates=without_region, km=km)
        scores = audit.score([method, masked], truth, rows, scoring, reference=method.variant)
        plain, masked_accuracy = (row["accuracy"] for row in scores["methods"])
        difference = scores["differences"][0]["accuracy"]
        compared.append(
            {
                "variant": method.variant,
                "name": method.name,
                "plain": plain,
                "masked": masked_accuracy,
                "difference": difference,
            }
        )
    return {"photos": len(rows), "methods": compared}
