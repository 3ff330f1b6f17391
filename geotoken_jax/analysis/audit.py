"""What the audits share: their settings, scores of some of the photos, and how a page is written.

An audit is a stage: audit/NAME/ holds figures.json, index.html that shows them, and a manifest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Shaped

from geotoken_jax import records, settings, workdir
from geotoken_jax.analysis import evaluate, frame
from geotoken_jax.analysis.evaluate import EvaluateSettings, Method, Points


@dataclasses.dataclass(frozen=True)
class CoverageSettings:
    """level: of the S2 cells whose photos are counted. split: whose photos answer again without their region.
    countries: how many are left out, those with most photos of `split`; continents all are."""

    level: int
    split: str
    countries: int

    def __post_init__(self):
        if not 1 <= self.level <= records.LEVEL:
            raise ValueError(f"config.audit.coverage.level is {self.level}: use one of 1..{records.LEVEL}")


@dataclasses.dataclass(frozen=True)
class LeakageSettings:
    """cosine_above: of two photos' image embeddings, past which they are near-duplicates."""

    cosine_above: float


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """config.audit: a section for each audit that has settings."""

    coverage: CoverageSettings
    leakage: LeakageSettings


def read(config: Any) -> tuple[AuditSettings, EvaluateSettings]:
    """Returns the settings that audits depend on."""
    found = settings.read(AuditSettings, config.audit, "audit")
    return found, settings.read(EvaluateSettings, config.evaluate, "evaluate")


def score(
    methods: Sequence[Method], truth: Points, rows: Int[np.ndarray, "n"], options: EvaluateSettings, reference: str = ""
) -> dict[str, Any]:
    """Returns the scores of some rows of the truth, one or more, as `evaluate.score` has them."""
    part = dataclasses.replace(
        truth,
        ids=[truth.ids[row] for row in rows],
        coordinates=truth.coordinates[rows],
        candidates=truth.candidates[rows],
        extra=[truth.extra[row] for row in rows],
    )
    seen = [dataclasses.replace(m, coordinates=m.coordinates[rows], km=m.km[rows]) for m in methods]
    return evaluate.score(seen, part, reference or options.reference, options.resamples, options.seed)


def answers(methods: Sequence[Method]) -> list[Method]:
    """Returns what each set of predictions answers, without its other choices and bounds."""
    return [method for method in methods if method.main]


def match(wanted: Shaped[np.ndarray, "n"], among: Shaped[np.ndarray, "m"]) -> Int[np.ndarray, "n"]:
    """Returns the first row of `among` that equals each value, -1 where none does."""
    order = np.argsort(among, kind="stable")
    at = np.searchsorted(among, wanted, sorter=order)
    rows = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(wanted), int)
    return np.where(among[rows] == wanted, rows, -1) if len(order) else rows - 1


def encoded(ids: Sequence[str]) -> Shaped[np.ndarray, "n"]:
    """Returns ids or authors as tables hold them."""
    return np.array([name.encode() for name in ids], f"S{records.ID_BYTES}")


def write(
    stage: workdir.Stage,
    title: str,
    headline: str,
    sections: Sequence[frame.Section],
    figures: Mapping[str, Any],
    counts: Mapping[str, Any],
    resamples: int,
) -> workdir.Manifest:
    """Writes figures and page and closes the stage. The page ends with the manifests of what it was made from."""
    root = epath.Path(stage.path).parent.parent
    made = (
        f"<p>{frame.intervals(resamples)} A missing prediction counts as wrong. Every number of this page, and those "
        "it leaves out, are in figures.json beside it. The folders it was made from:</p>"
        + frame.made(root, stage.inputs)
    )
    page = frame.page(
        f"GeoToken: {title}",
        f"<h1>{title}</h1>{headline}",
        [*sections, frame.Section("made", "How it was made", "How it was made", made)],
    )
    workdir.write_json(stage.path / "figures.json", figures)
    workdir.write_bytes(stage.path / "index.html", page.encode())
    return stage.finish(counts)
