"""What the audits share: their settings, and scores of some of the photos."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from geotoken_jax import records, settings
from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.evaluate import EvaluateSettings
from geotoken_jax.analysis.overlap import OverlapSettings
from geotoken_jax.analysis.points import Method, Points


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
