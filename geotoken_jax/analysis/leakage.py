"""`geotoken audit leakage`: what the gallery already knows of the photos that are evaluated, and what that is worth."""

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
#: Pairs per kind and split that are shown.
PAIRS = 5
#: Of the cosine with the most similar gallery photo.
_QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "largest": 1.0}
#: Threshold of the printed table.
_AT = distance.THRESHOLDS_KM.index(25)


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


def figures(
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    found: Mapping[str, Leaks],
    gallery: Table,
    above: float,
    scoring: EvaluateSettings,
) -> dict[str, Any]:
    """Returns counts, pairs and scores of every split. found: of `overlap.find`, with this `above`."""
    splits = {
        split: _figures(truth, audit.answers(methods[split]), found[split], gallery, scoring)
        for split, truth in truths.items()
    }
    return {"cosine_above": above, "gallery": len(gallery), "splits": splits}


def worst_kinds(
    truths: Mapping[str, CoordinateTable], found: Mapping[str, Leaks]
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Returns coordinates of the photos of all splits by the worst kind they are, those of no kind under ""."""
    coordinates = np.concatenate([truth.coordinates for truth in truths.values()])
    kind_of = np.full(len(coordinates), len(KINDS))
    for i, kind in reversed(list(enumerate(KINDS))):
        kind_of[np.concatenate([found[split].leaked(kind) for split in truths])] = i
    return {kind: coordinates[kind_of == i] for i, kind in enumerate([*KINDS, ""])}


def _figures(
    truth: CoordinateTable, methods: Sequence[Method], found: Leaks, gallery: Table, scoring: EvaluateSettings
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


def _pairs(truth: CoordinateTable, found: Leaks, kind: str, gallery: Table) -> list[dict[str, Any]]:
    """Returns some leaked photos with what they leak from: the most similar first, for near-duplicates."""
    leaked = np.flatnonzero(found.leaked(kind))
    if kind == "near-duplicate":
        leaked = leaked[np.argsort(-found.cosine[leaked], kind="stable")]
    pairs = []
    for photo in leaked[:PAIRS].tolist():
        row = int(found.rows[kind][photo])
        km = distance.great_circle_km(*truth.coordinates[photo], *gallery.coordinates(row))
        pair = {"photo": truth.ids[photo], "gallery": bytes(gallery.ids(row)).decode(), "km": round(float(km), 6)}
        pairs.append(pair | ({"cosine": round(float(found.cosine[photo]), 6)} if kind == "near-duplicate" else {}))
    return pairs
