"""Layout of all pages, and small pieces of pages: tiles, verdicts, map keys and parts that open on a click.

A page is one HTML file that opens from disk and loads nothing else. Functions that build HTML escape text from data.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Protocol

from etils import epath

from geotoken_jax.manifests import Manifest
from geotoken_jax.pages import worldmap


class Piece(Protocol):
    """Part of a page: a table, a chart or a row of charts."""

    def html(self) -> str:
        """Returns the piece as HTML."""
        ...


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of a page.

    anchor: id of the HTML element. name: label in the navigation. title: heading. pieces: content; strings are HTML.
    """

    anchor: str
    name: str
    title: str
    pieces: Sequence[Piece | str]


@dataclasses.dataclass(frozen=True)
class Source:
    """Origin of a page's figures.

    manifests: manifest of each input, by folder. resamples: number of bootstrap resamples.
    """

    manifests: Mapping[str, Manifest]
    resamples: int


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """Returns a page as HTML: headline, navigation and sections. title: plain text. headline: HTML."""
    links = (f'<a href="#{s.anchor}">{escape(s.name)}</a>' for s in sections)
    bodies = (f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{join(s.pieces)}</section>' for s in sections)
    parts = {
        "title": escape(title),
        "world": worldmap.background(),
        "headline": headline,
        "nav": "".join(links),
        "sections": "\n".join(bodies),
    }
    return fill("frame.html", parts)


def audit_page(title: str, headline: str, sections: Sequence[Section], source: Source) -> str:
    """Returns the page of an audit. A last section describes the intervals and lists the folders of the figures."""
    note = (
        f"<p>{intervals(source.resamples)} A missing prediction counts as wrong. All figures of the audit, including "
        "figures that this page does not show, are in figures.json in the same folder. The figures come from these "
        "folders of the work directory:</p>"
    )
    last = Section("made", "How it was made", "How it was made", [note, manifests(source.manifests)])
    return page(f"GeoToken: {title}", f"<h1>{escape(title)}</h1>{headline}", [*sections, last])


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Returns the text of a template file of this package, with each {{name}} replaced by `parts[name]`."""
    text = epath.resource_path("geotoken_jax.pages").joinpath(template).read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def join(pieces: Iterable[Piece | str]) -> str:
    """Returns the HTML of all pieces, in order."""
    return "".join(piece if isinstance(piece, str) else piece.html() for piece in pieces)


def folded(parts: Iterable[tuple[str, str, Sequence[Piece | str]]]) -> str:
    """Returns HTML of parts that open and close when their name is clicked. The first part is open.

    parts: name, note and pieces of each part.
    """
    return "".join(
        f"<details{'' if number else ' open'}><summary><b>{escape(name)}</b> "
        f'<span class="muted">{escape(note)}</span></summary>{join(pieces)}</details>'
        for number, (name, note, pieces) in enumerate(parts)
    )


def hidden(name: str, *pieces: Piece | str) -> str:
    """Returns HTML of pieces that are hidden until the user clicks on `name`."""
    return f"<details><summary>{escape(name)}</summary>{join(pieces)}</details>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Returns HTML of a row of tiles, each with one value in large type. items: name, value as text, note."""
    listed = (
        f"<li><small>{escape(name)}</small><strong>{escape(figure)}</strong><small>{escape(note)}</small></li>"
        for name, figure, note in items
    )
    return f'<ul class="tiles">{"".join(listed)}</ul>'


def verdict(text: str, warn: bool = False) -> str:
    """Returns HTML of a sentence that sums up results. warn: whether it is marked as a problem."""
    return f'<p class="verdict{" warn" if warn else ""}">{escape(text)}</p>'


def color_key(items: Iterable[tuple[str, str, str]], lead: str = "") -> str:
    """Returns HTML of a map's key. items: CSS class and style of a mark, and its name. lead: HTML before the marks."""
    marks = (f'<span><i class="{look}" style="{style}"></i>{escape(name)}</span> ' for look, style, name in items)
    return f'<p class="key muted">{lead}{"".join(marks)}</p>'


def manifests(by_folder: Mapping[str, Manifest]) -> str:
    """Returns HTML of manifests. Each is hidden until the user clicks on its folder."""
    parts = []
    for name, manifest in by_folder.items():
        shown = {"settings": manifest.settings, "counts": manifest.counts, "dropped": manifest.dropped}
        text = json.dumps({**shown, **manifest.facts}, indent=1, sort_keys=True, ensure_ascii=False)
        parts.append(hidden(f"{name}/", f"<pre>{escape(text, quote=False)}</pre>"))
    return "".join(parts)


def intervals(resamples: int) -> str:
    """Returns one sentence on the method of the bootstrap intervals."""
    return (
        f"95 % intervals are percentiles 2.5 and 97.5 of {resamples:,} bootstrap resamples of authors, or of photos "
        "whose author is unknown."
    )
