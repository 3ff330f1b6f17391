"""What the audits share: their settings, scores of some of the photos, and how a page is written.

An audit is a stage: audit/NAME/ holds figures.json, index.html that shows them, and a manifest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from geotoken_jax import workdir
from geotoken_jax.analysis import evaluate, frame
from geotoken_jax.analysis.evaluate import Method, Points
from geotoken_jax.configuration import EvaluateSettings


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


class Made(NamedTuple):
    """What an audit's folder is to hold: title, headline and sections of its page, its figures, and its counts."""

    title: str
    headline: str
    sections: Sequence[frame.Section]
    figures: Mapping[str, Any]
    counts: Mapping[str, Any]


def write(stage: workdir.Stage, found: Made, resamples: int) -> workdir.Manifest:
    """Writes figures and page and closes the stage. The page ends with the manifests of what it was made from."""
    root = stage.path.parent.parent
    made = (
        f"<p>{frame.intervals(resamples)} A missing prediction counts as wrong. Every number of this page, and those "
        "it leaves out, are in figures.json beside it. The folders it was made from:</p>"
        + frame.made(root, stage.inputs)
    )
    page = frame.page(
        f"GeoToken: {found.title}",
        f"<h1>{found.title}</h1>{found.headline}",
        [*found.sections, frame.Section("made", "How it was made", "How it was made", made)],
    )
    workdir.write_json(stage.path / "figures.json", found.figures)
    workdir.write_bytes(stage.path / "index.html", page.encode())
    return stage.finish(found.counts)
