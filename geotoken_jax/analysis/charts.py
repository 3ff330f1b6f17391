"""Line charts as inline SVG: small, the same bytes every time, and colored by the page's style sheet in both themes."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

#: Size in SVG units, and the room for labels: left, top, right, bottom.
_WIDTH, _HEIGHT = 480, 320
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 14, 22, 46


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. color: number of the page's palette. look: `solid`, `dashed`, `dotted` or `faint`."""

    name: str
    color: int
    look: str
    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Returns a chart as <svg>. log_x: decades instead of equal steps. marks: x values with a vertical line."""
    x_all = np.concatenate([s.x for s in series])
    y_all = np.concatenate([s.y for s in series])
    x_ticks = _decades(x_all.min(), x_all.max()) if log_x else _ticks(x_all.min(), x_all.max())
    y_ticks = _ticks(min(0.0, y_all.min()), y_all.max())
    x_low, x_high = (np.log10(x_all.min()), np.log10(x_all.max())) if log_x else (x_all.min(), x_all.max())

    def across(x):
        x = np.log10(x) if log_x else np.asarray(x)
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y):
        span = y_ticks[-1] - y_ticks[0]
        return _HEIGHT - _BOTTOM - (np.asarray(y) - y_ticks[0]) / span * (_HEIGHT - _TOP - _BOTTOM)

    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 17}" text-anchor="middle">{_number(x)}</text>')
    for x in marks:
        parts.append(f'<path class="mark" d="M{across(x):.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="mark" x="{across(x) - 4:.1f}" y="{_TOP + 9}" text-anchor="end">{_number(x)}</text>')
    for s in series:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(s.x), up(s.y), strict=True))
        parts.append(
            f'<polyline class="c{s.color % 8} {s.look}" points="{points}"><title>{escape(s.name)}</title></polyline>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text></svg>"
    )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers that enclose the range."""
    rough = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _number(value: float) -> str:
    """Returns a tick's label: 0.5, 25, 10,000, 150k."""
    return f"{value / 1000:g}k" if abs(value) > 10_000 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
