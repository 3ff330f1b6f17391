"""Charts as inline SVG: small, the same bytes every time, and colored by the page's style sheet in both themes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

#: Size in SVG units, and the room for labels: left, top, right, bottom.
_WIDTH, _HEIGHT = 480, 320
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 14, 22, 46


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. color: number of the page's palette. look: `solid`, `dashed`, `dotted` or `faint`. low, high: an
    interval at each point, which is then a dot with one of `notes`."""

    name: str
    color: int
    look: str
    x: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"] | None = None
    high: Float[np.ndarray, "n"] | None = None
    notes: Sequence[str] = ()


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
    least, most = x_all.min(), x_all.max()
    x_ticks = _decades(least, most) if log_x else [x for x in _ticks(least, most) if least <= x <= most]
    y_ticks = _ticks(min(0.0, y_all.min()), y_all.max())
    x_low, x_high = (np.log10(least), np.log10(most)) if log_x else (least, most)

    def across(x):
        x = np.log10(x) if log_x else np.asarray(x)
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y):
        span = y_ticks[-1] - y_ticks[0]
        return _HEIGHT - _BOTTOM - (np.asarray(y) - y_ticks[0]) / span * (_HEIGHT - _TOP - _BOTTOM)

    bottom = _HEIGHT - _BOTTOM
    parts = [_opening(title), *_across(y_ticks, up)]
    for x in x_ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 17}" text-anchor="middle">{label(x)}</text>')
    for x in marks:
        parts.append(f'<path class="mark" d="M{across(x):.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="mark" x="{across(x) - 4:.1f}" y="{_TOP + 9}" text-anchor="end">{label(x)}</text>')
    for s in series:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(s.x), up(s.y), strict=True))
        parts.append(
            f'<polyline class="c{s.color % 8} {s.look}" points="{points}"><title>{escape(s.name)}</title></polyline>'
        )
        if s.low is not None and s.high is not None:
            for x, y, low, high, note in zip(across(s.x), up(s.y), up(s.low), up(s.high), s.notes, strict=True):
                parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
                parts.append(
                    f'<path class="c{s.color % 8} at" d="M{x:.1f} {y:.1f}h0"><title>{escape(note)}</title></path>'
                )
    return "".join([*parts, *_labels(x_label, y_label), "</svg>"])


@dataclasses.dataclass(frozen=True)
class Bars:
    """One bar in each group, and its interval (NaN for none). color: number of the page's palette. NaN draws no bar."""

    name: str
    color: int
    values: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]


def bars(groups: Sequence[str], series: Sequence[Bars], *, title: str, x_label: str, y_label: str) -> str:
    """Returns a chart of bars from zero, side by side in their groups, as <svg>."""
    y_ticks = _ticks(0.0, max(np.nanmax(np.fmax(s.values, s.high), initial=0.0) for s in series))
    bottom = _HEIGHT - _BOTTOM
    room = (_WIDTH - _LEFT - _RIGHT) / len(groups)
    step = 0.8 * room / len(series)

    def up(y):
        return bottom - y / y_ticks[-1] * (bottom - _TOP)

    parts = [_opening(title), *_across(y_ticks, up)]
    for i, group in enumerate(groups):
        x = _LEFT + (i + 0.5) * room
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(group)}</text>')
        for k, s in enumerate(series):
            if np.isnan(s.values[i]):
                continue
            x = _LEFT + (i + 0.1) * room + (k + 0.5) * step
            bar = f'd="M{x:.1f} {bottom}V{up(s.values[i]):.1f}" stroke-width="{0.86 * step:.1f}"'
            value = f"{s.name}, {group}: {s.values[i]:.1f}"
            parts.append(f'<path class="c{s.color % 8}" {bar}><title>{escape(value)}</title></path>')
            if not np.isnan(s.low[i]):
                parts.append(f'<path class="whisker" d="M{x:.1f} {up(s.low[i]):.1f}V{up(s.high[i]):.1f}"/>')
    return "".join([*parts, *_labels(x_label, y_label), "</svg>"])


def _opening(title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'


def _across(ticks: Sequence[float], up: Callable[[float], Any]) -> list[str]:
    """Returns the horizontal lines and their numbers. up: value -> SVG units."""
    return [
        f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{label(y)}</text>'
        for y in ticks
    ]


def _labels(x_label: str, y_label: str) -> list[str]:
    middle, height = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="axis" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers that enclose the range."""
    rough = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten in a range, and where these are fewer than three their doubles and fives too."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    found = [
        m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low * 0.999 <= m * 10.0**e <= high * 1.001
    ]
    whole = [x for x in found if math.isclose(math.log10(x), round(math.log10(x)))]
    return whole if len(whole) > 2 else found


def label(value: float) -> str:
    """Returns a tick's label: 0.5, 25, 10,000, 150k, 10M, 5e11."""
    if abs(value) >= 1e9:
        return f"{value:.0e}".replace("e+", "e")
    if abs(value) > 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1000:g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
