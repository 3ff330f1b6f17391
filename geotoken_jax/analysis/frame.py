"""The frame and style sheet that the report and the audits share, and the pieces their pages are made of.

A page opens from disk and needs nothing else. Text that comes from data is escaped by whoever puts it in.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from geotoken_jax import workdir as stages
from geotoken_jax.analysis import worldmap
from geotoken_jax.geo import distance


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a page. anchor: its id. name: in the navigation. title, html: of the section itself."""

    anchor: str
    name: str
    title: str
    html: str


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """Returns a page: headline, navigation, sections in order."""
    links = (f'<a href="#{s.anchor}">{escape(s.name)}</a>' for s in sections)
    bodies = (f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{s.html}</section>' for s in sections)
    parts = {
        "title": escape(title),
        "world": worldmap.background(),
        "headline": headline,
        "nav": "".join(links),
        "sections": "\n".join(bodies),
    }
    return fill("frame.html", parts)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Returns a template that lies beside this module, with each {{name}} replaced by a part."""
    text = epath.resource_path("geotoken_jax.analysis").joinpath(template).read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def table(columns: Sequence[str], bodies: Sequence[str]) -> str:
    """Returns a table that scrolls sideways where it must. bodies: of `body`."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead><tr>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
    )


def body(columns: int, rows: Sequence[str], name: str = "", note: str = "") -> str:
    """Returns a table's body of whole <tr>, under a line with its name where it has one."""
    head = f'{escape(name)} <span class="muted">{escape(note)}</span>'
    line = f'<tr><th scope="rowgroup" colspan="{columns}">{head}</th></tr>' if name else ""
    return f"<tbody>{line}{''.join(rows)}</tbody>"


def folded(parts: Iterable[tuple[str, str, str]]) -> str:
    """Returns parts that open and close by their name, of which the first is open: name, note, HTML."""
    return "".join(
        f"<details{'' if number else ' open'}><summary><b>{escape(name)}</b> "
        f'<span class="muted">{escape(note)}</span></summary>{html}</details>'
        for number, (name, note, html) in enumerate(parts)
    )


def row(name: str, cells: Iterable[str], look: str = "") -> str:
    """Returns a table's row. cells: whole <td>."""
    return f'<tr class="{look}"><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def percents(estimate: Mapping[str, float], look: str = "") -> str:
    """Returns the cell of a fraction, in percent, over its interval."""
    return (
        f"<td{f' class={look}' if look else ''}>{100 * estimate['value']:.1f}"
        f"<small>{100 * estimate['low']:.1f}&ndash;{100 * estimate['high']:.1f}</small></td>"
    )


def points(estimate: Mapping[str, float]) -> str:
    """Returns the cell of a difference of fractions, in points; colored where its interval excludes zero."""
    sure = "up" if estimate["low"] > 0 else "down" if estimate["high"] < 0 else ""
    interval = f"{signed(100 * estimate['low'])} to {signed(100 * estimate['high'])}"
    p = f' title="p = {estimate["p"]:.4f}"' if "p" in estimate else ""
    return f'<td{p}><span class="{sure}">{signed(100 * estimate["value"])}</span><small>{interval}</small></td>'


def thresholds() -> list[str]:
    """Returns the heads of the columns of distance.THRESHOLDS_KM, as HTML."""
    return [f"{km:,}&nbsp;km" for km in distance.THRESHOLDS_KM]


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Returns large figures: what it is, the figure, a note. The note is HTML."""
    listed = (f"<li><small>{escape(a)}</small><strong>{escape(b)}</strong><small>{c}</small></li>" for a, b, c in items)
    return f'<ul class="tiles">{"".join(listed)}</ul>'


def legend(items: Iterable[tuple[str, int, str]]) -> str:
    """Returns the legend of line charts: name, number of the palette, look."""
    lines = (
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="c{color % 8} {look}" d="M0 5h26"/></svg>'
        f"{escape(name)}</li>"
        for name, color, look in items
    )
    return f'<ul class="legend">{"".join(lines)}</ul>'


def figure(caption: str, drawn: str) -> str:
    """Returns a panel with its caption."""
    return f'<figure class="panel"><figcaption>{escape(caption)}</figcaption>{drawn}</figure>'


def made(workdir: epath.Path, folders: Iterable[str]) -> str:
    """Returns what the manifests of folders say, each to be unfolded."""
    parts = []
    for name in folders:
        manifest = stages.read_manifest(workdir, name)
        text = {
            "settings": manifest.settings,
            "counts": manifest.counts,
            "dropped": manifest.dropped,
            **manifest.facts,
        }
        listed = escape(json.dumps(text, indent=1, sort_keys=True, ensure_ascii=False), quote=False)
        parts.append(f"<details><summary>{escape(name)}/</summary><pre>{listed}</pre></details>")
    return "".join(parts)


def intervals(resamples: int) -> str:
    """Returns the sentence that says what the intervals are."""
    return (
        f"Intervals: percentiles 2.5 and 97.5 of {resamples:,} bootstrap resamples of authors, or of photos where "
        "authors are not known."
    )


def km(value: Any) -> str:
    """Returns a distance as people write it: 350 m, 12.3 km, 1,234 km."""
    return f"{1000 * float(value):.0f} m" if value < 1 else f"{number(value)} km"


def number(value: Any) -> str:
    """Returns 12.3 or 1,234."""
    return f"{float(value):.1f}" if value < 100 else f"{float(value):,.0f}"


def percent(share: float) -> str:
    """Returns a share as 12.3 %."""
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else "< 0.1 %"


def signed(value: float) -> str:
    """Returns +1.2, or a true minus sign and 1.2."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "&minus;")
