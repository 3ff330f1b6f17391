"""Functions that several audits use: scores of a subset of photos, and the methods that an audit compares."""

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
    """Returns the scores of a subset of the photos, in the form of `evaluate.score`.

    rows: rows of `truth`, at least one. reference: variant to compare with; options.reference if empty.
    """
    return evaluate.score_subset(
        methods, truth, rows, dataclasses.replace(options, reference=reference or options.reference)
    )


def main_methods(methods: Sequence[Method]) -> list[Method]:
    """Returns one method per file of predictions: the method with the file's answers.

    Two kinds of methods are left out: the choices of the file's other selectors, and the bound, which takes the
    candidate nearest to the truth.
    """
    return [method for method in methods if method.main]
