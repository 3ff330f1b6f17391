"""Numbers that `geotoken audit leakage` reports: leaked photos per kind, and accuracy without them.

A leaked photo shares its id, image, coordinates or author with a photo of the gallery.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from geotoken_jax.analysis import audit
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.analysis.overlap import Leaks
from geotoken_jax.configuration import EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance

#: Kinds of leaked photos, worst first.
KINDS = ("same id", "near-duplicate", "same coordinates", "same author")
#: Example pairs per kind and split.
PAIRS = 5
#: Reported quantiles of the cosine with the most similar gallery photo.
_QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "largest": 1.0}
#: Index of the printed table's threshold, 25 km.
_AT = distance.THRESHOLDS_KM.index(25)


def table(figures: Mapping[str, Any]) -> str:
    """Returns text tables: leaked photos by kind, and accuracy with and without the leaked photos."""
    width = 1 + max(map(len, figures["splits"]), default=0)
    lines = [f"{'':{width}}{'photos':>8}" + "".join(f"{kind:>18}" for kind in KINDS) + f"{'clean':>8}"]
    for split, of in figures["splits"].items():
        kinds = "".join(f"{of['kinds'][kind]['photos']:18,}" for kind in KINDS)
        lines.append(f"{split:{width}}{of['photos']:8,}{kinds}{of['clean']:8,}")
    lines += ["", "Percent within 25 km: all photos -> without leaked photos"]
    for split, of in figures["splits"].items():
        for i, method in enumerate(of["accuracy"]["all"]["methods"]):
            clean = of["accuracy"]["clean"]
            without = f"{100 * clean['methods'][i]['accuracy'][_AT]['value']:.1f}" if clean else "no photos left"
            value = 100 * method["accuracy"][_AT]["value"]
            lines.append(f"{split:{width}}{method['name']:50}{value:6.1f} -> {without}")
    return "\n".join(lines)


def figures(
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    leaks: Mapping[str, Leaks],
    gallery: Table,
    above: float,
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Returns the contents of figures.json: counts, example pairs and scores of every split. Mappings are by split.

    leaks: result of `overlap.find_leaks`. above: cosine above which `leaks` has near-duplicates.
    """
    splits = {
        split: _figures(truth, audit.main_methods(methods[split]), leaks[split], gallery, scoring)
        for split, truth in truths.items()
    }
    return {"cosine_above": above, "gallery": len(gallery), "splits": splits}


def worst_kinds(
    truths: Mapping[str, CoordinateTable], leaks: Mapping[str, Leaks]
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Returns kind of leak -> coordinates of the photos of all splits whose worst kind this is.

    KINDS has the kinds from worst to least. The key "" has the photos that are not leaked.
    """
    coordinates = np.concatenate([truth.coordinates for truth in truths.values()])
    kind_of = np.full(len(coordinates), len(KINDS))
    for i, kind in reversed(list(enumerate(KINDS))):
        kind_of[np.concatenate([leaks[split].leaked(kind) for split in truths])] = i
    return {kind: coordinates[kind_of == i] for i, kind in enumerate([*KINDS, ""])}


def _figures(
    truth: CoordinateTable, methods: Sequence[Method], leaks: Leaks, gallery: Table, scoring: EvaluateSettings
) -> dict[str, Any]:
    """Returns the entry of one split in figures.json.

    `accuracy` has scores of all photos, of the photos without each kind of leak, and of clean photos. Scores are None
    if no photo has that kind of leak, or if no photo is left.
    """

    def scores(kept: Bool[np.ndarray, "n"]) -> dict[str, Any] | None:
        return audit.score(methods, truth, np.flatnonzero(kept), scoring) if kept.any() else None

    n = len(truth.ids)
    kinds = {
        kind: {
            "photos": int(leaks.leaked(kind).sum()),
            "share": round(float(leaks.leaked(kind).mean()), 6),
            "pairs": _pairs(truth, leaks, kind, gallery),
        }
        for kind in KINDS
    }
    without = {kind: scores(~leaks.leaked(kind)) if kinds[kind]["photos"] else None for kind in KINDS}
    return {
        "photos": n,
        "clean": int((~leaks.leaked()).sum()),
        "kinds": kinds,
        "cosine_of_nearest": _quantiles(leaks.cosine),
        "accuracy": {"all": scores(np.ones(n, bool)), "without": without, "clean": scores(~leaks.leaked())},
    }


def _quantiles(cosine: Float32[np.ndarray, "n"]) -> dict[str, float]:
    known = cosine[~np.isnan(cosine)]
    return {name: round(float(np.quantile(known, q)), 6) if len(known) else 0.0 for name, q in _QUANTILES.items()}


def _pairs(truth: CoordinateTable, leaks: Leaks, kind: str, gallery: Table) -> list[dict[str, Any]]:
    """Returns up to PAIRS leaked photos with their gallery photos; near-duplicates by falling cosine."""
    leaked = np.flatnonzero(leaks.leaked(kind))
    if kind == "near-duplicate":
        leaked = leaked[np.argsort(-leaks.cosine[leaked], kind="stable")]
    pairs = []
    for photo in leaked[:PAIRS].tolist():
        row = int(leaks.rows[kind][photo])
        km = distance.great_circle_km(*truth.coordinates[photo], *gallery.coordinates(row))
        pair = {"photo": truth.ids[photo], "gallery": bytes(gallery.ids(row)).decode(), "km": round(float(km), 6)}
        pairs.append(pair | ({"cosine": round(float(leaks.cosine[photo]), 6)} if kind == "near-duplicate" else {}))
    return pairs
