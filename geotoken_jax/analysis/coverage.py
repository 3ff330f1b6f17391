"""`geotoken audit coverage`: where the gallery has photos, and what it costs where it has none."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Shaped
from scipy.spatial import KDTree

from geotoken_jax import records
from geotoken_jax.analysis import audit, charts, evaluate, frame, overlap, places, worldmap
from geotoken_jax.analysis.evaluate import Method, Points
from geotoken_jax.analysis.masking import Masked
from geotoken_jax.artifacts import GALLERY, TOP1, Workdir
from geotoken_jax.configuration import Config, CoverageSettings, EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.progress import track
from geotoken_jax.workdir import StageError

#: A photo that no source placed in a country is taken to be in that of the nearest gallery photo, up to so far.
_NEAR_KM = 100.0
#: Threshold of the charts, and of the map of what is lost without a region, whose photos cannot be placed closely.
_BIN_AT, _LOST_AT = distance.THRESHOLDS_KM.index(200), distance.THRESHOLDS_KM.index(2500)
#: Percent of the accuracy that is lost -> a color of the page's bands.
_LOST = (20, 40, 60, 80, 95)
#: Rows of a table of countries.
_COUNTRIES = 25
#: Distances to the nearest gallery photo.
_BINS = [
    "up to 1 km",
    *(f"{a:,}-{b:,} km" for a, b in itertools.pairwise(distance.THRESHOLDS_KM)),
    f"over {distance.THRESHOLDS_KM[-1]:,} km",
]


def check(config: Config, workdir: Workdir) -> None:
    """Raises StageError if the split whose regions are left out has no predictions."""
    split = config.audit.coverage.split
    if split not in workdir.asked:
        raise StageError(
            f"config.audit.coverage.split is {split!r}, and {workdir.path / 'predictions'} has "
            f"{', '.join(sorted(workdir.asked))}: name one of these"
        )


def make(config: Config, workdir: Workdir, folder: epath.Path) -> audit.Made:
    """Returns what audit/coverage/ holds. folder: keeps what an interrupted audit goes on from."""
    options, scoring = config.audit.coverage, config.evaluate
    split = options.split
    truths, methods = evaluate.read_predictions(workdir, scoring)
    methods = {name: audit.answers(found) for name, found in methods.items()}
    gallery = workdir.gallery
    of_gallery = _gallery_regions(folder, workdir, gallery)
    tree = KDTree(distance.to_unit_vectors(*gallery.coordinates().T))
    nearest = {name: _nearest(tree, gallery, truth) for name, truth in truths.items()}
    regions = {name: _regions(truth, *nearest[name], of_gallery) for name, truth in truths.items()}
    answer = functools.cache(lambda: Masked(config, workdir, scoring.reference, split))
    photos = Regions(truths[split], methods[split], regions[split], of_gallery)
    figures = {
        "gallery": len(gallery),
        "density": _density(gallery, of_gallery, regions, options.level),
        "named_by_nearest": {name: _borrowed(truth, regions[name]) for name, truth in truths.items()},
        "distance": {
            name: _by_distance(nearest[name][1], methods[name], truth, scoring) for name, truth in truths.items()
        },
        "masked": _mask(photos, workdir.table(split), answer, folder, options, scoring),
    }
    html = _page(figures, gallery, truths[split], regions[split], options, scoring.reference)
    counts = {"regions": len(figures["masked"]["regions"]), **{name: len(truth.ids) for name, truth in truths.items()}}
    return audit.Made("What the gallery covers", *html, figures, counts)


class Regions(NamedTuple):
    """A split's photos with the answers for them, and continent and country of each photo and each gallery photo."""

    truth: Points
    methods: Sequence[Method]
    of_photos: Shaped[np.ndarray, "n 2"]
    of_gallery: Shaped[np.ndarray, "N 2"]


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures that matter most, as text."""
    masked = figures["masked"]
    split = masked["split"]
    lines = [f"{split}: percent within 200 km, by distance to the nearest gallery photo"]
    names = [m["name"] for m in figures["distance"][split]["all"]["methods"]]
    lines += [f"  {'':16}{'photos':>8}  " + "  ".join(f"{name[:22]:>22}" for name in names)]
    for found in figures["distance"][split]["bins"]:
        within = [f"{100 * m['accuracy'][_BIN_AT]['value']:22.1f}" for m in found["methods"]]
        lines.append(f"  {found['name']:16}{found['photos']:8,}  " + "  ".join(within))
    lines += ["", f"{split}: percent within 2,500 km, and without the gallery's photos of their region"]
    for region in masked["regions"]:
        pairs = (
            f"{m['name'][:22]} {100 * m['plain'][_LOST_AT]['value']:.1f} -> {100 * m['masked'][_LOST_AT]['value']:.1f}"
            for m in region["methods"]
        )
        lines.append(f"  {region['name'][:18]:18}{region['photos']:6,}  " + ";  ".join(pairs))
    return "\n".join(line.rstrip() for line in lines)


def _gallery_regions(folder: epath.Path, workdir: Workdir, gallery: Table) -> Shaped[np.ndarray, "N 2"]:
    """Returns continent and country of every gallery photo, as UTF-8; read once from photos/ and kept.

    Rows of the gallery are photos of photos/ in their order, less those that `embed` dropped.
    """
    file = folder / "regions.npy"
    if not file.exists():
        found = np.zeros((len(gallery), 2), f"S{records.ID_BYTES}")
        photos, ids, row = workdir.photos(GALLERY), gallery.ids(), 0
        for i in track(range(len(photos)), "places of the gallery", len(photos), "photos"):
            photo = photos[i]
            if row < len(gallery) and photo["id"].encode() == ids[row]:
                found[row] = places.continent(photo).encode(), places.country(photo["country"]).encode()
                row += 1
        if row < len(gallery):
            raise StageError(
                f"{workdir.path / 'photos'} has no photo {bytes(ids[row]).decode()!r} at its place, which gallery/ "
                "has: prepare, embed and index again in another --workdir"
            )
        records.save_array(file, found)
    return records.open_array(file)


def _nearest(tree: KDTree, gallery: Table, truth: Points) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns the row of each photo's nearest gallery photo on the ground, and its distance in km."""
    rows = np.asarray(tree.query(distance.to_unit_vectors(*truth.coordinates.T))[1])
    return rows, np.asarray(distance.great_circle_km(*truth.coordinates.T, *gallery.coordinates(rows).T))


def _regions(
    truth: Points, rows: Int[np.ndarray, "n"], km: Float[np.ndarray, "n"], of_gallery: Shaped[np.ndarray, "N 2"]
) -> Shaped[np.ndarray, "n 2"]:
    """Returns continent and country of each photo, as UTF-8: by its names, else those of a gallery photo nearby."""
    own = [(places.continent(names).encode(), places.country(names["country"]).encode()) for names in truth.extra]
    found = np.array(own, of_gallery.dtype)
    unnamed = (found[:, 1] == places.UNKNOWN.encode()) & (km <= _NEAR_KM)
    found[unnamed] = of_gallery[rows[unnamed]]
    return found


def _borrowed(truth: Points, found: Shaped[np.ndarray, "n 2"]) -> dict[str, int]:
    unnamed = np.array([not names["country"].strip() for names in truth.extra])
    unknown = found[:, 1] == places.UNKNOWN.encode()
    return {"named": int((unnamed & ~unknown).sum()), "unknown": int(unknown.sum())}


def _density(
    gallery: Table,
    of_gallery: Shaped[np.ndarray, "N 2"],
    regions: Mapping[str, Shaped[np.ndarray, "n 2"]],
    level: int,
) -> dict[str, Any]:
    """Counts photos by continent and country, the gallery's and each split's, and the gallery's by S2 cell."""
    scheme = CellScheme(level, 1)
    ids = scheme.cell_ids(np.asarray(scheme.regroup(gallery.tokens())))
    cells, first, cell_of, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    densest = np.argsort(-counts, kind="stable")[:10]
    latitude, longitude = scheme.decode(scheme.tokens_of(cells[densest]))
    found: dict[str, Any] = {
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
    for column, kind in enumerate(("continents", "countries")):
        names, which, photos = np.unique(of_gallery[:, column], return_inverse=True, return_counts=True)
        occupied = np.bincount(np.unique(which * len(cells) + cell_of) // len(cells))
        asked = {
            split: dict(zip(*np.unique(of[:, column], return_counts=True), strict=True))
            for split, of in regions.items()
        }
        lists = [
            {
                "name": name.decode(),
                "photos": int(n),
                "share": round(n / len(gallery), 6),
                "cells": int(c),
                **{split: int(of.get(name, 0)) for split, of in asked.items()},
            }
            for name, n, c in zip(names, photos, occupied, strict=True)
        ]
        found[kind] = sorted(lists, key=lambda region: (-region["photos"], region["name"]))
    return found


def _by_distance(
    km: Float[np.ndarray, "n"], methods: Sequence[Method], truth: Points, scoring: EvaluateSettings
) -> dict[str, Any]:
    """Scores the photos of each of _BINS. km: to the nearest gallery photo."""
    which = np.searchsorted(distance.THRESHOLDS_KM, km)
    bins = []
    for i, name in enumerate(_BINS):
        rows = np.flatnonzero(which == i)
        found = audit.score(methods, truth, rows, scoring)["methods"] if len(rows) else []
        bins.append({"name": name, "photos": len(rows), "share": round(len(rows) / len(km), 6), "methods": found})
    everything = audit.score(methods, truth, np.arange(len(km)), scoring)
    return {"median_km": round(float(np.median(km)), 6), "bins": bins, "all": everything}


def _mask(
    photos: Regions,
    own: Table,
    answer: Callable[[], Masked],
    folder: epath.Path,
    options: CoverageSettings,
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Lets every photo answer again without the gallery's photos of its continent, then of its country.

    Each region's answers are kept as masked-NUMBER.npy, so that an interrupted audit goes on with the next.
    """
    truth, methods, of_photos, of_gallery = photos
    found, both = [], [m for m in methods if m.variant in (TOP1, scoring.reference)]
    row_of = overlap.match(overlap.encoded(truth.ids), own.ids())
    without_continent = np.full((2, len(truth.ids), 2), np.nan)
    chosen = _chosen(of_photos, of_gallery, options.countries)
    for number, (column, name) in enumerate(track(chosen, "without a region", len(chosen), "regions")):
        rows = np.flatnonzero((of_photos[:, column] == name) & (row_of >= 0))
        kept = np.flatnonzero(of_gallery[:, column] != name)
        file = folder / f"masked-{number:03d}.npy"
        if not file.exists():
            records.save_array(file, answer()(row_of[rows], kept))
        placed = np.full_like(without_continent, np.nan)
        placed[:, rows] = records.open_array(file)
        if column == 0:
            without_continent[:, rows] = placed[:, rows]
        asked = np.flatnonzero(of_photos[:, column] == name)
        kind = ("continent", "country")[column]
        lost = _lost(both, placed, truth, asked, scoring)
        found.append({"kind": kind, "name": name.decode(), "gallery": len(of_gallery) - len(kept), **lost})
    asked = np.flatnonzero(np.isin(of_photos[:, 0], [name for column, name in chosen if column == 0]))
    every = _lost(both, without_continent, truth, asked, scoring) if len(asked) else None
    return {"split": options.split, "every_continent": every, "regions": found}


def _chosen(
    of_photos: Shaped[np.ndarray, "n 2"], of_gallery: Shaped[np.ndarray, "N 2"], countries: int
) -> list[tuple[int, bytes]]:
    """Returns the regions to leave out: column and name, those with most photos first."""
    chosen = []
    for column, most in enumerate((None, countries)):
        names, photos = np.unique(of_photos[:, column], return_counts=True)
        known = (names != places.UNKNOWN.encode()) & np.isin(names, of_gallery[:, column])
        order = np.argsort(-photos[known], kind="stable")
        chosen += [(column, bytes(name)) for name in names[known][order][:most]]
    return chosen


def _lost(
    methods: Sequence[Method],
    placed: Float[np.ndarray, "2 n 2"],
    truth: Points,
    rows: Int[np.ndarray, "m"],
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Scores both methods on some photos as they answered, as `placed` says, and the paired difference."""
    found = []
    for method in methods:
        again = placed[int(method.variant != TOP1)]
        km = evaluate.off_km(again, truth, scoring.earth)
        masked = dataclasses.replace(method, variant="masked", coordinates=again, km=km)
        scores = audit.score([method, masked], truth, rows, scoring, reference=method.variant)
        plain, without = (row["accuracy"] for row in scores["methods"])
        lost = scores["differences"][0]["accuracy"]
        found.append(
            {"variant": method.variant, "name": method.name, "plain": plain, "masked": without, "difference": lost}
        )
    return {"photos": len(rows), "methods": found}


def _page(
    figures: Mapping[str, Any],
    gallery: Table,
    truth: Points,
    of_photos: Shaped[np.ndarray, "n 2"],
    options: CoverageSettings,
    reference: str,
) -> tuple[str, list[frame.Section]]:
    """Returns headline and sections. truth, of_photos: of the split whose regions are left out."""
    density, masked, near = figures["density"], figures["masked"], figures["distance"][options.split]
    close = sum(found["share"] for found in near["bins"][:2])
    tiles = [
        ("photos in the gallery", f"{figures['gallery']:,}", f"in {len(density['countries']):,} countries"),
        (
            "cells with a photo",
            frame.percent(density["cells"] / density["of_cells"]),
            f"{density['cells']:,} of {density['of_cells']:,} of level {density['level']}",
        ),
        (f"{options.split} photos within 25 km of one", frame.percent(close), f"median {frame.km(near['median_km'])}"),
    ]
    lead = ""
    if masked["every_continent"]:
        of = next(m for m in masked["every_continent"]["methods"] if m["variant"] == reference)
        before, after = (100 * of[name][_LOST_AT]["value"] for name in ("plain", "masked"))
        lead = (
            f'<p class="lead">Without the gallery\'s photos of its own continent, <b>{escape(of["name"])}</b> places '
            f"{after:.1f} % of {escape(options.split)} within 2,500 km; with them, {before:.1f} %.</p>"
        )
    headline = (
        "<p>A photo is placed by the gallery photos it resembles: this page shows where there are any, how near the "
        f"nearest one is, and what is lost where there are none.</p>{lead}{frame.tiles(tiles)}"
    )
    return headline, [
        frame.Section("density", "Density", "Where the gallery's photos are", _density_html(density, gallery)),
        frame.Section("nearest", "Nearest photo", "Distance to the nearest gallery photo", _nearest_html(figures)),
        frame.Section(
            "masked", "Without a region", "Without a whole region", _masked_html(masked, truth, of_photos, reference)
        ),
    ]


def _density_html(density: Mapping[str, Any], gallery: Table) -> str:
    scheme = CellScheme(density["level"], 1)
    cells, counts = np.unique(scheme.cell_ids(np.asarray(scheme.regroup(gallery.tokens()))), return_counts=True)
    # Powers of ten where the largest cell needs them, else about half as far apart.
    steps = (
        [1, 10, 100, 1_000, 10_000, 100_000, 1_000_000] if counts.max() >= 3_000 else [1, 3, 10, 30, 100, 300, 1_000]
    )
    steps = [step for step in steps if step <= counts.max()]
    shades = np.searchsorted(steps, counts, side="right") - 1
    names = [f"{a:,}-{b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in itertools.pairwise(steps)]
    key = "".join(
        f'<span><i class="shade" style="background:{worldmap.SHADES[i]}"></i>{name}</span> '
        for i, name in enumerate([*names, f"{steps[-1]:,} and more"])
    )
    splits = [name for name in density["continents"][0] if name not in ("name", "photos", "share", "cells")]
    bodies = []
    for kind in ("continents", "countries"):
        listed = density[kind][:_COUNTRIES]
        rows = [
            frame.row(
                region["name"],
                [
                    f"<td>{region['photos']:,}</td><td>{frame.percent(region['share'])}</td><td>{region['cells']:,}</td>",
                    *(f"<td>{region[split]:,}</td>" for split in splits),
                ],
            )
            for region in listed
        ]
        note = f"{len(listed)} of {len(density[kind])}"
        bodies.append(frame.body(4 + len(splits), rows, kind.capitalize(), note))
    largest = [
        frame.row(
            f"{cell['latitude']:.1f}, {cell['longitude']:.1f}",
            [f"<td>{escape(cell['country'])}</td><td>{cell['cell']}</td><td>{cell['photos']:,}</td>"],
        )
        for cell in density["largest_cells"]
    ]
    drawn = worldmap.cell_map(scheme, cells, shades, "Gallery photos in each S2 cell")
    return (
        f"<p>Photos in each S2 cell of level {density['level']}; a cell without color has none.</p>{drawn}"
        f'<p class="key muted">{key}</p>'
        + frame.table(["Region", "Gallery", "Share", "Cells", *map(escape, splits)], bodies)
        + "<h3>The fullest cells</h3>"
        + frame.table(["Center", "Country", "Cell", "Photos"], [frame.body(4, largest)])
    )


def _nearest_html(figures: Mapping[str, Any]) -> str:
    found = figures["distance"]
    none = np.full(len(_BINS), np.nan)
    shares = [
        charts.Bars(split, i, np.array([100 * b["share"] for b in of["bins"]]), none, none)
        for i, (split, of) in enumerate(found.items())
    ]
    names = [*(f"to {km:,}" for km in distance.THRESHOLDS_KM), "beyond"]
    x_label = "distance to the nearest gallery photo, km"
    title = "Percent of each split's photos by distance to the nearest gallery photo"
    histogram = charts.bars(names, shares, title=title, x_label=x_label, y_label="percent of photos")
    panels, bodies = [], []
    for split, of in found.items():
        methods = of["all"]["methods"]
        series = [
            charts.Bars(method["name"], i, *_at(of["bins"], i, ("value", "low", "high")))
            for i, method in enumerate(methods)
        ]
        title = f"Percent of {split} within 200 km of the truth, by distance to the nearest gallery photo"
        drawn = charts.bars(names, series, title=title, x_label=x_label, y_label="percent within 200 km")
        panels.append(frame.figure(split, drawn))
        rows = [
            frame.row(
                b["name"],
                [f"<td>{b['photos']:,}</td>", *(frame.percents(m["accuracy"][_BIN_AT]) for m in b["methods"])],
            )
            for b in of["bins"]
            if b["photos"]
        ]
        bodies.append(frame.body(2 + len(methods), rows, split, f"median {frame.km(of['median_km'])}"))
    columns = [escape(m["name"]) for m in methods]
    named, unknown = (sum(of[key] for of in figures["named_by_nearest"].values()) for key in ("named", "unknown"))
    return (
        "<p>How far each photo is, on the ground, from the nearest photo of the gallery.</p>"
        + _square([(split, i) for i, split in enumerate(found)])
        + f'<div class="charts">{frame.figure("Photos", histogram)}</div>'
        + "<h3>Accuracy against that distance</h3><p>Percent placed within 200 km of the truth; whiskers and small "
        "figures are 95 % intervals. No bar: no photos. figures.json has the other thresholds.</p>"
        + _square([(m["name"], i) for i, m in enumerate(methods)])
        + f'<div class="charts">{"".join(panels)}</div>'
        + frame.table(["Nearest gallery photo", "Photos", *columns], bodies)
        + f"<p>Photos whose source names no country: {named:,} counted with that of the nearest gallery photo, up to "
        f"{_NEAR_KM:.0f} km away; {unknown:,} unknown, for want of one.</p>"
    )


def _at(bins: Sequence[Mapping[str, Any]], method: int, parts: Sequence[str]) -> list[Float[np.ndarray, "bins"]]:
    """Returns parts of one method's estimate in each bin, in percent; NaN where there are no photos."""
    return [
        np.array([100 * b["methods"][method]["accuracy"][_BIN_AT][part] if b["photos"] else np.nan for b in bins])
        for part in parts
    ]


def _square(items: Sequence[tuple[str, int]]) -> str:
    return frame.legend((name, color, "wide") for name, color in items)


def _masked_html(masked: Mapping[str, Any], truth: Points, of_photos: Shaped[np.ndarray, "n 2"], reference: str) -> str:
    split = escape(masked["split"])
    if not masked["regions"]:
        return f"<p>No photo of {split} has a country or continent that the gallery has photos of.</p>"
    columns = ["Left out", "Photos", "Gallery", *frame.thresholds()]
    bodies, maps = [], []
    for column, kind in enumerate(("continent", "country")):
        regions = [region for region in masked["regions"] if region["kind"] == kind]
        if kind == "continent":
            regions.append({"name": "Each photo's own continent", "gallery": None, **masked["every_continent"]})
        for i, method in enumerate(regions[0]["methods"] if regions else []):
            rows = [_masked_row(region, region["methods"][i]) for region in regions]
            note = f"left out, one at a time, for its photos of {masked['split']}"
            bodies.append(frame.body(len(columns), rows, method["name"], f"{kind} {note}"))
        maps.append(_lost_map(kind, column, masked["regions"], truth, of_photos, reference))
    bands = [f"under {_LOST[0]}", *(f"{a}-{b}" for a, b in itertools.pairwise(_LOST)), f"over {_LOST[-1]}"]
    key = "".join(f'<span><i class="band b{i}"></i>{name}</span> ' for i, name in enumerate(bands))
    return (
        f"<p>For the photos of {split} in a region, all photos of that region are taken out of the gallery, neighbors "
        "are found again (exactly), and the first neighbor and the decoder answer again. In each cell: percent within "
        "the distance without the region; below it with the region, and the points lost (&minus;) with their 95 % "
        "interval. Color marks those whose interval excludes zero.</p>"
        + "".join(maps)
        + f'<p class="key muted">Percent of those placed within 2,500 km that no longer are: {key}</p>'
        + frame.table(columns, bodies)
    )


def _masked_row(region: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    gallery = "" if region["gallery"] is None else f"{region['gallery']:,}"
    cells = [f"<td>{region['photos']:,}</td><td>{gallery}</td>"]
    for plain, masked, lost in zip(method["plain"], method["masked"], method["difference"], strict=True):
        sure = "up" if lost["low"] > 0 else "down" if lost["high"] < 0 else ""
        low, high = frame.signed(100 * lost["low"]), frame.signed(100 * lost["high"])
        cells.append(
            f'<td><span class="{sure}">{100 * masked["value"]:.1f}</span>'
            f"<small>of {100 * plain['value']:.1f}</small><small>{low} to {high}</small></td>"
        )
    return frame.row(region["name"], cells)


def _lost_map(
    kind: str,
    column: int,
    regions: Sequence[Mapping[str, Any]],
    truth: Points,
    of_photos: Shaped[np.ndarray, "n 2"],
    reference: str,
) -> str:
    band = np.full(len(truth.ids), -1)
    for region in regions:
        if region["kind"] == kind:
            method = next(m for m in region["methods"] if m["variant"] == reference)
            plain, masked = (method[name][_LOST_AT]["value"] for name in ("plain", "masked"))
            lost = 100 * (1 - masked / plain) if plain else 0
            band[of_photos[:, column] == region["name"].encode()] = np.searchsorted(_LOST, lost)
    points = {"rest": truth.coordinates[band < 0]}
    points |= {f"b{i}": truth.coordinates[band == i] for i in range(len(_LOST) + 1)}
    label = f"Photos, colored by what is lost when their {kind} is left out of the gallery"
    return f"<h3>{label}</h3>{worldmap.dot_map(points, label)}"
