"""`geotoken audit leakage`: what the gallery already knows of the photos that are evaluated, and what that is worth."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32

from geotoken_jax.analysis import audit, evaluate, frame, overlap, worldmap
from geotoken_jax.analysis.evaluate import Method, Points
from geotoken_jax.analysis.overlap import Found
from geotoken_jax.analysis.report import Gallery
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance

#: Kinds of leaked photos, worst first, and the color of each on the map.
KINDS = {"same id": "b5", "near-duplicate": "b4", "same coordinates": "b3", "same author": "b0"}
#: Pairs of each kind and split that are shown.
_PAIRS = 5
#: Of the cosine with the most similar gallery photo.
_QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "largest": 1.0}
#: Threshold of the printed table.
_AT = distance.THRESHOLDS_KM.index(25)


def make(config: Config, workdir: Workdir, folder: epath.Path) -> audit.Made:
    """Returns what audit/leakage/ holds."""
    del folder
    above, scoring = config.audit.leakage.cosine_above, config.evaluate
    truths, methods = evaluate.read_predictions(workdir, scoring)
    found = overlap.find(workdir, truths, above)
    gallery = workdir.gallery
    splits = {
        split: _figures(truth, audit.answers(methods[split]), found[split], gallery, scoring)
        for split, truth in truths.items()
    }
    figures = {"cosine_above": above, "gallery": len(gallery), "splits": splits}
    counts = {f"leaked of {split}": int(found[split].leaked().sum()) for split in truths}
    html = _page(figures, workdir.path, truths, found, scoring.reference)
    return audit.Made("What leaks from the gallery", *html, figures, counts)


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures that matter most, as text."""
    lines = [f"{'':16}{'photos':>8}" + "".join(f"{kind:>18}" for kind in KINDS) + f"{'clean':>8}"]
    for split, of in figures["splits"].items():
        kinds = "".join(f"{of['kinds'][kind]['photos']:18,}" for kind in KINDS)
        lines.append(f"{split[:15]:16}{of['photos']:8,}{kinds}{of['clean']:8,}")
    lines += ["", "Percent within 25 km on all photos, and without the leaked ones"]
    for split, of in figures["splits"].items():
        for i, method in enumerate(of["accuracy"]["all"]["methods"]):
            clean = of["accuracy"]["clean"]
            without = f"{100 * clean['methods'][i]['accuracy'][_AT]['value']:.1f}" if clean else "no photos left"
            lines.append(
                f"{split[:15]:16}{method['name'][:50]:52}{100 * method['accuracy'][_AT]['value']:6.1f} -> {without}"
            )
    return "\n".join(lines)


def _figures(
    truth: Points, methods: Sequence[Method], found: Found, gallery: Table, scoring: EvaluateSettings
) -> dict[str, Any]:
    """Counts and scores one split. accuracy: None where nothing is left out, or no photo is left."""

    def scores(kept: Bool[np.ndarray, "n"]) -> dict[str, Any] | None:
        return audit.score(methods, truth, np.flatnonzero(kept), scoring) if kept.any() else None

    n = len(truth.ids)
    kinds = {
        kind: {
            "photos": int(found.leaked(kind).sum()),
            "share": round(float(found.leaked(kind).mean()), 6),
            "pairs": _pairs(truth, found, kind, gallery),
        }
        for kind in KINDS
    }
    without = {kind: scores(~found.leaked(kind)) if kinds[kind]["photos"] else None for kind in KINDS}
    return {
        "photos": n,
        "clean": int((~found.leaked()).sum()),
        "kinds": kinds,
        "cosine_of_nearest": _quantiles(found.cosine),
        "accuracy": {"all": scores(np.ones(n, bool)), "without": without, "clean": scores(~found.leaked())},
    }


def _quantiles(cosine: Float32[np.ndarray, "n"]) -> dict[str, float]:
    known = cosine[~np.isnan(cosine)]
    return {name: round(float(np.quantile(known, q)), 6) if len(known) else 0.0 for name, q in _QUANTILES.items()}


def _pairs(truth: Points, found: Found, kind: str, gallery: Table) -> list[dict[str, Any]]:
    """Returns some leaked photos with what they leak from: the most similar first, for near-duplicates."""
    leaked = np.flatnonzero(found.leaked(kind))
    if kind == "near-duplicate":
        leaked = leaked[np.argsort(-found.cosine[leaked], kind="stable")]
    pairs = []
    for photo in leaked[:_PAIRS].tolist():
        row = int(found.rows[kind][photo])
        km = distance.great_circle_km(*truth.coordinates[photo], *gallery.coordinates(row))
        pair = {"photo": truth.ids[photo], "gallery": bytes(gallery.ids(row)).decode(), "km": round(float(km), 6)}
        pairs.append(pair | ({"cosine": round(float(found.cosine[photo]), 6)} if kind == "near-duplicate" else {}))
    return pairs


def _page(
    figures: Mapping[str, Any],
    path: epath.Path,
    truths: Mapping[str, Points],
    found: Mapping[str, Found],
    reference: str,
) -> tuple[str, list[frame.Section]]:
    splits = figures["splits"]
    tiles = [
        (
            f"{split} photos leaked",
            frame.percent(1 - of["clean"] / of["photos"]),
            f"{of['photos'] - of['clean']:,} of {of['photos']:,}",
        )
        for split, of in splits.items()
    ]
    headline = (
        "<p>A photo whose author, place or picture is in the gallery too is easier than a new one. This page counts "
        f"such photos of every evaluated split against the gallery's {figures['gallery']:,}, and scores the "
        f"predictions with them left out.</p>{frame.tiles(tiles)}"
    )
    return headline, [
        frame.Section("counts", "Counts", "How many are leaked", _counts_html(figures)),
        frame.Section("where", "Map", "Where they are", _map_html(truths, found)),
        frame.Section("accuracy", "Accuracy", "Accuracy with and without them", _accuracy_html(splits, reference)),
        frame.Section("pairs", "Pairs", "Some pairs", _pairs_html(figures, path)),
    ]


def _counts_html(figures: Mapping[str, Any]) -> str:
    rows = []
    for split, of in figures["splits"].items():
        cells = [f"<td>{of['photos']:,}</td>"]
        cells += [
            f"<td>{kind['photos']:,}<small>{frame.percent(kind['share'])}</small></td>" for kind in of["kinds"].values()
        ]
        cells.append(f"<td>{of['clean']:,}<small>{frame.percent(of['clean'] / of['photos'])}</small></td>")
        cells += [f"<td>{value:.3f}</td>" for value in of["cosine_of_nearest"].values()]
        rows.append(frame.row(split, cells))
    columns = ["Split", "Photos", *(kind.capitalize() for kind in KINDS), "Clean"]
    columns += [f"Cosine, {name}" for name in _QUANTILES]
    return (
        "<p>Photos with a photo in the gallery of the same id, of the same author (where one is known), at exactly the "
        "same coordinates, or with an image embedding whose cosine with theirs is above "
        f"{figures['cosine_above']:g}. A photo may be leaked in several ways; a clean one is in none. The last columns "
        "are quantiles of the cosine with the most similar gallery photo.</p>"
        + frame.table(columns, [frame.body(len(columns), rows)])
    )


def _map_html(truths: Mapping[str, Points], found: Mapping[str, Found]) -> str:
    coordinates = np.concatenate([truth.coordinates for truth in truths.values()])
    kind_of = np.full(len(coordinates), len(KINDS))
    for i, kind in reversed(list(enumerate(KINDS))):
        kind_of[np.concatenate([found[split].leaked(kind) for split in truths])] = i
    points = {"rest": coordinates[kind_of == len(KINDS)]}
    points |= {color: coordinates[kind_of == i] for i, color in reversed(list(enumerate(KINDS.values())))}
    key = "".join(f'<span><i class="band {color}"></i>{kind}</span> ' for kind, color in KINDS.items())
    label = "Leaked photos of all splits, by the worst way in which they are"
    return f'<p>{label}; small gray dots are clean.</p>{worldmap.dot_map(points, label)}<p class="key muted">{key}</p>'


def _accuracy_html(splits: Mapping[str, Any], reference: str) -> str:
    columns = ["Photos", "Number", *frame.thresholds()]
    bodies = []
    for split, of in splits.items():
        sets = {"all photos": of["accuracy"]["all"]}
        sets |= {f"without {kind}": scores for kind, scores in of["accuracy"]["without"].items() if scores}
        if len(sets) > 2 and of["accuracy"]["clean"]:
            sets["without any"] = of["accuracy"]["clean"]
        for i, method in enumerate(of["accuracy"]["all"]["methods"]):
            look = "reference" if method["variant"] == reference else ""
            rows = [
                frame.row(
                    name,
                    [f"<td>{scores['photos']:,}</td>", *map(frame.percents, scores["methods"][i]["accuracy"])],
                    look,
                )
                for name, scores in sets.items()
            ]
            bodies.append(frame.body(len(columns), rows, f"{split}: {method['name']}"))
    return (
        "<p>Percent placed within a distance, on all photos and on those that are left without each kind of leaked "
        "photo; kinds that a split has none of, or that leave none, are not listed.</p>" + frame.table(columns, bodies)
    )


def _pairs_html(figures: Mapping[str, Any], path: epath.Path) -> str:
    bodies = []
    for split, of in figures["splits"].items():
        pairs = [(kind, pair) for kind in KINDS for pair in of["kinds"][kind]["pairs"]]
        if not pairs:
            continue
        own = Gallery(path, [pair["photo"] for _, pair in pairs], split)
        gallery = Gallery(path, [pair["gallery"] for _, pair in pairs])
        rows = []
        for kind, pair in pairs:
            cosine = f"{pair['cosine']:.3f}" if "cosine" in pair else ""
            photos = (
                f"<td>{photos.image(pair[which])}<small>{escape(pair[which])}</small></td>"
                for which, photos in (("photo", own), ("gallery", gallery))
            )
            rows.append(frame.row(kind, [*photos, f"<td>{frame.km(pair['km'])}</td><td>{cosine}</td>"], "pairs"))
        bodies.append(frame.body(5, rows, split))
    if not bodies:
        return "<p>No photo is leaked.</p>"
    return f"<p>Up to {_PAIRS} of each kind and split; the most similar first, of near-duplicates.</p>" + frame.table(
        ["Kind", "Photo", "Photo of the gallery", "Apart", "Cosine"], bodies
    )
