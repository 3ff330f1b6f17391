"""What the audits share: their settings, and scores of some of the photos."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.configuration import EvaluateSettings


def score(
    methods: Sequence[Method],
    truth: CoordinateTable,
    rows: Int[np.ndarray, "n"],
    options: EvaluateSettings,
    reference: str = "",
) -> dict[str, Any]:
    """Returns the scores of some rows of the truth, one or more, as `evaluate.score` has them."""
    return evaluate.score_part(
        methods, truth, rows, dataclasses.replace(options, reference=reference or options.reference)
    )


def answers(methods: Sequence[Method]) -> list[Method]:
    """Returns what each set of predictions answers, without its other choices and bounds."""
    return [method for method in methods if method.main]
