"""The frame and style sheet of all pages, and the pieces besides tables and charts that pages are made of.

A page opens from disk and needs nothing else. Text from data is escaped where it becomes HTML.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Protocol

from etils import epath

from geotoken_jax.pages import worldmap
from geotoken_jax.workdir import Manifest


class Piece(Protocol):
    """A table, a chart, or a row of charts."""

    def html(self) -> str:
        """Returns the piece as HTML."""
        ...


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of a page. anchor: its id. name: in the navigation. pieces: its content; a string is HTML."""

    anchor: str
    name: str
    title: str
    pieces: Sequence[Piece | str]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the page was made from. manifests: by folder. resamples: of the bootstrap of its intervals."""

    manifests: Mapping[str, Manifest]
    resamples: int


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """Returns a page: headline, navigation, sections in order. headline: HTML."""
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
    """Returns the page of an audit; its last section has the manifests of the folders that it was made from."""
    made = (
        f"<p>{intervals(source.resamples)} A missing prediction counts as wrong. Every number of this page, and those "
        "it leaves out, are in figures.json beside it. The folders it was made from:</p>"
    )
    last = Section("made", "How it was made", "How it was made", [made, manifests(source.manifests)])
    return page(f"GeoToken: {title}", f"<h1>{escape(title)}</h1>{headline}", [*sections, last])


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Returns a template of this folder with each {{name}} replaced by a part."""
    text = epath.resource_path("geotoken_jax.pages").joinpath(template).read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def join(pieces: Iterable[Piece | str]) -> str:
    """Returns pieces as HTML, one after another."""
    return "".join(piece if isinstance(piece, str) else piece.html() for piece in pieces)


def folded(parts: Iterable[tuple[str, str, Sequence[Piece | str]]]) -> str:
    """Returns parts that open and close by their name, of which the first is open: name, note, pieces."""
    return "".join(
        f"<details{'' if number else ' open'}><summary><b>{escape(name)}</b> "
        f'<span class="muted">{escape(note)}</span></summary>{join(pieces)}</details>'
        for number, (name, note, pieces) in enumerate(parts)
    )


def hidden(name: str, *pieces: Piece | str) -> str:
    """Returns pieces that open at a click on their name."""
    return f"<details><summary>{escape(name)}</summary>{join(pieces)}</details>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Returns large figures: name, figure, note."""
    listed = (
        f"<li><small>{escape(name)}</small><strong>{escape(figure)}</strong><small>{escape(note)}</small></li>"
        for name, figure, note in items
    )
    return f'<ul class="tiles">{"".join(listed)}</ul>'


def verdict(text: str, warn: bool = False) -> str:
    """Returns a sentence that sums up a figure. warn: in the color of what should not be so."""
    return f'<p class="verdict{" warn" if warn else ""}">{escape(text)}</p>'


def color_key(items: Iterable[tuple[str, str, str]], lead: str = "") -> str:
    """Returns the key of a map: class and style of a mark, and its name. lead: HTML before them."""
    marks = (f'<span><i class="{look}" style="{style}"></i>{escape(name)}</span> ' for look, style, name in items)
    return f'<p class="key muted">{lead}{"".join(marks)}</p>'


def manifests(found: Mapping[str, Manifest]) -> str:
    """Returns the manifests of folders, each to be unfolded."""
    parts = []
    for name, manifest in found.items():
        kept = {"settings": manifest.settings, "counts": manifest.counts, "dropped": manifest.dropped}
        text = json.dumps({**kept, **manifest.facts}, indent=1, sort_keys=True, ensure_ascii=False)
        parts.append(hidden(f"{name}/", f"<pre>{escape(text, quote=False)}</pre>"))
    return "".join(parts)


def intervals(resamples: int) -> str:
    """Returns the sentence that says what the intervals are."""
    return (
        f"Intervals: percentiles 2.5 and 97.5 of {resamples:,} bootstrap resamples of authors, or of photos where "
        "authors are not known."
    )
