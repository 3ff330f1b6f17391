"""Curves of a training run, from its metrics.jsonl."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def curves(text: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns steps and finite values of each loss, by its name; up to 500 steps per loss.

    A step that was repeated after a restart has the last value. text: JSON lines of metrics; an incomplete line, which
    a killed run may leave, is skipped.
    """
    values: dict[str, dict[int, float]] = {}
    for row in _rows(text):
        for key, value in row.items():
            if key.startswith(("train/loss", "validation/loss")) and math.isfinite(value):
                values.setdefault(key, {})[row["step"]] = value
    curves = {}
    for key, by_step in values.items():
        steps = np.array(sorted(by_step))
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, 500).round().astype(int))]
        curves[key] = steps, np.array([by_step[step] for step in steps.tolist()])
    return curves


def validations(text: str) -> list[dict[str, float]]:
    """Returns one row per validation of a training, in the order of steps.

    A row has the metrics of the validation, named as in train.step.Task, and the latest values of `examples` and
    `processor_s` that the training had logged at that step. text: see `curves`.
    """
    by_step: dict[int, dict[str, float]] = {}
    for row in _rows(text):
        by_step.setdefault(row["step"], {}).update(row)
    found, training = [], {}
    for _, row in sorted(by_step.items()):
        training |= {key: row[key] for key in ("examples", "processor_s") if key in row}
        metrics = {key.removeprefix("validation/"): row[key] for key in row if key.startswith("validation/")}
        if metrics:
            found.append({**training, **metrics})
    return found


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
