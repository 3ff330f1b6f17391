"""Loss curves of a training run, from its metrics.jsonl."""

import json
import math

import numpy as np


def curves(text: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns steps and finite values of each loss, by its name; up to 500 steps per loss.

    A step that was repeated after a restart has the last value. text: JSON lines of metrics; an incomplete line, which
    a killed run may leave, is skipped.
    """
    values: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, value in row.items():
            if key.startswith(("train/loss", "validation/loss")) and math.isfinite(value):
                values.setdefault(key, {})[row["step"]] = value
    curves = {}
    for key, by_step in values.items():
        steps = np.array(sorted(by_step))
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, 500).round().astype(int))]
        curves[key] = steps, np.array([by_step[step] for step in steps.tolist()])
    return curves
