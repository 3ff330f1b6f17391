"""Presentation of the coordinate check (analysis/activations.py): its charts and its table in the terminal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from geotoken_jax.pages.chart import Chart, Series

_QUANTITIES = {"rms": "root mean square of activations", "change": "change of activations since step 0"}


def table(result: Mapping[str, Any]) -> str:
    """Returns the exponents of the width as text, a line per activation. result: see analysis.activations.check."""
    slopes = result["slopes"]
    columns = [(name, quantity) for name in slopes for quantity in _QUANTITIES]
    lines = ["".join([f"{'exponent of the width':26}", *(f"{f'{name} {q}':>18}" for name, q in columns)])]
    for activation in slopes["mup"]:
        values = (slopes[name][activation][quantity] for name, quantity in columns)
        lines.append("".join([f"{activation:26}", *(f"{value:18.2f}" for value in values)]))
    return "\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Returns a chart per parametrization and quantity, with a curve per activation, after the last step.

    The y axis is the logarithm to base 2 of the quantity, relative to its value at the smallest width. A curve is flat
    if the width has no effect. result: see analysis.activations.check.
    """
    return [
        _chart(result, parametrization, quantity, label)
        for quantity, label in _QUANTITIES.items()
        for parametrization in result["slopes"]
    ]


def _chart(result: Mapping[str, Any], parametrization: str, quantity: str, label: str) -> Chart:
    widths, series = np.array(result["widths"], float), []
    rows = [r for r in result["rows"] if (r["parametrization"], r["step"]) == (parametrization, result["steps"])]
    for color, activation in enumerate(result["slopes"][parametrization]):
        means = np.array(
            [
                np.mean([r[quantity] for r in rows if (r["width"], r["activation"]) == (width, activation)])
                for width in result["widths"]
            ]
        )
        y = np.log2(means / means[0])
        notes = [f"{activation}, width {width:g}: {mean:.3g}" for width, mean in zip(widths, means, strict=True)]
        style = "solid" if color < 8 else "dashed"
        series.append(Series(activation, color, y, widths, y, y, style=style, notes=notes))
    caption = f"{parametrization}: {label}"
    return Chart(caption, caption, "width", "log2, relative to the smallest width", series, log_x=True, legend=None)
