"""Losses over the steps of a training run, from its metrics.jsonl."""

import json
import math

import numpy as np


def curves(text: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns loss -> steps and finite values, up to about 500. A step that was run again counts once, as last run.

    text: JSON lines of metrics; half a line, which a killed run may leave, is skipped.
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
    found = {}
    for key, by_step in values.items():
        steps = np.array(sorted(by_step))
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, 500).round().astype(int))]
        found[key] = steps, np.array([by_step[step] for step in steps.tolist()])
    return found
