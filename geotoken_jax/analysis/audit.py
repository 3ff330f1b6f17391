"""What the audits share: their settings, scores of some of the photos, and how a page is written.

An audit is a stage: audit/NAME/ holds figures.json, index.html that shows them, and a manifest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from geotoken_jax import records, settings, workdir
from geotoken_jax.analysis import evaluate, frame
from geotoken_jax.analysis.evaluate import EvaluateSettings, Method, Points
from geotoken_jax.analysis.overlap import OverlapSettings


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
class AuditSettings:
    """config.audit: a section for each audit that has settings."""

    coverage: CoverageSettings
    leakage: OverlapSettings


def read(config: Any) -> tuple[AuditSettings, EvaluateSettings]:
    """Returns the settings that audits depend on."""
    found = settings.read(AuditSettings, config.audit, "audit")
    return found, settings.read(EvaluateSettings, config.evaluate, "evaluate")


def score(
    methods: Sequence[Method], truth: Points, rows: Int[np.ndarray, "n"], options: EvaluateSettings, reference: str = ""
) -> dict[str, Any]:
    """Returns the scores of some rows of the truth, one or more, as `evaluate.score` has them."""
    return evaluate.score_part(
        methods, truth, rows, dataclasses.replace(options, reference=reference or options.reference)
    )


def answers(methods: Sequence[Method]) -> list[Method]:
    """Returns what each set of predictions answers, without its other choices and bounds."""
    return [method for method in methods if method.main]


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
