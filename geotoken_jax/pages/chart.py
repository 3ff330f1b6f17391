"""Charts as inline SVG: small, deterministic, and colored by the page's style sheet for light and dark themes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

#: Size in SVG units, and margins for labels: left, top, right, bottom.
_WIDTH, _HEIGHT = 480, 320
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 14, 22, 46
_BOTTOM_Y = _HEIGHT - _BOTTOM
#: Entry of a legend: name, color number of the palette, style.
Key = tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve, or the bars of one color in a bar chart: one bar per group.

    Attributes:
        name: label in the legend.
        color: color number of the page's palette.
        y: values; no bar is drawn for NaN.
        x: x values of a curve; None if the series is bars.
        low: lower ends of the intervals. A curve with intervals has a dot per point.
        high: upper ends of the intervals. A bar with a NaN end has no interval.
        style: `solid`, `dashed`, `dotted` or `faint`.
        notes: tooltip of each dot; required if there are intervals and `x`.
        listed: whether the legend has an entry for the series.
    """

    name: str
    color: int
    y: Float[np.ndarray, "n"]
    x: Float[np.ndarray, "n"] | None = None
    low: Float[np.ndarray, "n"] | None = None
    high: Float[np.ndarray, "n"] | None = None
    style: str = "solid"
    notes: Sequence[str] = ()
    listed: bool = True


@dataclasses.dataclass(frozen=True)
class Chart:
    """Chart of curves, or of groups of bars that start at zero.

    Attributes:
        caption: heading of the panel.
        title: description for screen readers.
        x_label: name of the x axis.
        y_label: name of the y axis.
        series: curves or bars. The last curve is drawn on top.
        groups: names of the groups of bars. If empty, the series are curves.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis of curves is logarithmic. If not, it contains 0.
        marks: x values of vertical lines.
        legend: entries of the legend below the chart. If None, the entries of the listed series. If empty, there is no
            legend.
    """

    caption: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    groups: Sequence[str] = ()
    log_x: bool = False
    marks: Sequence[float] = ()
    legend: Sequence[Key] | None = ()
    log_y: bool = False

    def entries(self) -> list[Key]:
        """Returns the legend entries of the listed series."""
        return [(s.name, s.color, "wide" if self.groups else s.style) for s in self.series if s.listed]

    def svg(self) -> str:
        """Returns the chart as an <svg> element."""
        opening = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)}">'
        drawn = _bars(self) if self.groups else _curves(self)
        return "".join([opening, *drawn, *_labels(self.x_label, self.y_label), "</svg>"])

    def html(self) -> str:
        """Returns the HTML of a panel with caption, chart and legend."""
        keys = self.entries() if self.legend is None else self.legend
        drawn = self.svg() + (legend(keys) if keys else "")
        return f'<figure class="panel"><figcaption>{escape(self.caption)}</figcaption>{drawn}</figure>'


@dataclasses.dataclass(frozen=True)
class Panels:
    """Charts side by side under one legend.

    legend: entries of the legend; if None, the entries of all listed series. small: whether charts are smaller, with
    more charts in a row.
    """

    charts: Sequence[Chart]
    legend: Sequence[Key] | None = None
    small: bool = False

    def html(self) -> str:
        """Returns the HTML of the legend and the charts."""
        keys = [key for chart in self.charts for key in chart.entries()] if self.legend is None else self.legend
        drawn = "".join(chart.html() for chart in self.charts)
        look = "charts small" if self.small else "charts"
        return (legend(dict.fromkeys(keys)) if keys else "") + f'<div class="{look}">{drawn}</div>'


def legend(keys: Iterable[Key]) -> str:
    """Returns the HTML of a legend."""
    lines = (
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="c{color % 8} {style}" d="M0 5h26"/></svg>'
        f"{escape(name)}</li>"
        for name, color, style in keys
    )
    return f'<ul class="legend">{"".join(lines)}</ul>'


def _curves(chart: Chart) -> list[str]:
    x_all, y_all = (np.concatenate([getattr(s, axis) for s in chart.series]) for axis in ("x", "y"))
    least, most = x_all.min(), x_all.max()
    x_ticks = _decades(least, most) if chart.log_x else [x for x in _ticks(least, most) if least <= x <= most]
    y_low, y_high = y_all.min(), y_all.max()
    if chart.log_y:
        ends = [end for s in chart.series for end in (s.low, s.high) if end is not None]
        y_low, y_high = min([y_low, *(end.min() for end in ends)]), max([y_high, *(end.max() for end in ends)])
        y_ticks = _decades(y_low, y_high)
        y_low, y_high = np.log10(y_low), np.log10(y_high)
    else:
        y_ticks = _ticks(min(0.0, y_low), y_high)
        y_low, y_high = y_ticks[0], y_ticks[-1]
    x_low, x_high = (np.log10(least), np.log10(most)) if chart.log_x else (least, most)

    def across(x):
        x = np.log10(x) if chart.log_x else np.asarray(x)
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y):
        y = np.log10(y) if chart.log_y else np.asarray(y)
        return _BOTTOM_Y - (y - y_low) / ((y_high - y_low) or 1) * (_BOTTOM_Y - _TOP)

    parts = [*_grid(y_ticks, up), *(_tick(across(x), label(x)) for x in x_ticks)]
    for x in chart.marks:
        parts.append(f'<path class="mark" d="M{across(x):.1f} {_TOP}V{_BOTTOM_Y}"/>')
        parts.append(f'<text class="mark" x="{across(x) - 4:.1f}" y="{_TOP + 9}" text-anchor="end">{label(x)}</text>')
    for s in chart.series:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(s.x), up(s.y), strict=True))
        look, name = f"c{s.color % 8} {s.style}", escape(s.name)
        parts.append(f'<polyline class="{look}" points="{points}"><title>{name}</title></polyline>')
        if s.low is not None and s.high is not None:
            for x, y, low, high, note in zip(across(s.x), up(s.y), up(s.low), up(s.high), s.notes, strict=True):
                parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
                dot = f'<path class="c{s.color % 8} at" d="M{x:.1f} {y:.1f}h0">'
                parts.append(f"{dot}<title>{escape(note)}</title></path>")
    return parts


def _bars(chart: Chart) -> list[str]:
    tops = [np.nanmax(s.y if s.high is None else np.fmax(s.y, s.high), initial=0.0) for s in chart.series]
    y_ticks = _ticks(0.0, max(tops))
    room = (_WIDTH - _LEFT - _RIGHT) / len(chart.groups)
    step = 0.8 * room / len(chart.series)

    def up(y):
        return _BOTTOM_Y - y / y_ticks[-1] * (_BOTTOM_Y - _TOP)

    parts = _grid(y_ticks, up)
    for i, group in enumerate(chart.groups):
        parts.append(_tick(_LEFT + (i + 0.5) * room, group))
        for k, s in enumerate(chart.series):
            if np.isnan(s.y[i]):
                continue
            x = _LEFT + (i + 0.1) * room + (k + 0.5) * step
            bar = f'd="M{x:.1f} {_BOTTOM_Y}V{up(s.y[i]):.1f}" stroke-width="{0.86 * step:.1f}"'
            note = f"{s.name}, {group}: {s.y[i]:.1f}"
            parts.append(f'<path class="c{s.color % 8}" {bar}><title>{escape(note)}</title></path>')
            if s.low is not None and s.high is not None and not np.isnan(s.low[i]):
                parts.append(f'<path class="whisker" d="M{x:.1f} {up(s.low[i]):.1f}V{up(s.high[i]):.1f}"/>')
    return parts


def _tick(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{_BOTTOM_Y + 17}" text-anchor="middle">{escape(text)}</text>'


def _grid(ticks: Sequence[float], up: Callable[[float], Any]) -> list[str]:
    """Returns horizontal grid lines with their labels. up: function from a y value to SVG units."""
    return [
        f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{label(y)}</text>'
        for y in ticks
    ]


def _labels(x_label: str, y_label: str) -> list[str]:
    middle, height = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _BOTTOM_Y) / 2
    return [
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="axis" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Returns two to eight evenly spaced round numbers, from `low` or below to `high` or above."""
    rough = (high - low if high > low else 1) / 5  # if all values are 0, the axis is from 0 to 1
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + (1 if high > low else 5)) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten in a range. If there are fewer than three, adds powers of ten times 2 and times 5."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    ticks = [
        m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low * 0.999 <= m * 10.0**e <= high * 1.001
    ]
    whole = [x for x in ticks if math.isclose(math.log10(x), round(math.log10(x)))]
    return whole if len(whole) > 2 else ticks


def label(value: float) -> str:
    """Returns the short text of a number on an axis: 0.5, 25, 10,000, 150k, 10M, 5e11."""
    if abs(value) >= 1e9:
        return f"{value:.0e}".replace("e+", "e")
    if abs(value) > 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1000:g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
