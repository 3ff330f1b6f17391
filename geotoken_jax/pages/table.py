"""The tables of all pages: columns, groups of rows, and cells that are a number over its interval.

Text is plain and is escaped here; `Cell.html` alone is HTML.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from geotoken_jax.analysis import formats
from geotoken_jax.geo import distance

#: The columns of distance.THRESHOLDS_KM.
THRESHOLDS = tuple(f"{km:,}\N{NO-BREAK SPACE}km" for km in distance.THRESHOLDS_KM)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: the number or the word.
        notes: small lines below it.
        look: class of the cell in the style sheet; `best` is bold.
        sign: color of the text, `up` or `down`.
        title: note that a pointer shows.
        html: picture or gauge after the text.
    """

    text: str = ""
    notes: Sequence[str] = ()
    look: str = ""
    sign: str = ""
    title: str = ""
    html: str = ""

    def inner_html(self) -> str:
        """Returns the content of the cell's element."""
        text = f'<span class="{self.sign}">{escape(self.text)}</span>' if self.sign else escape(self.text)
        return text + self.html + "".join(f"<small>{escape(note)}</small>" for note in self.notes)


@dataclasses.dataclass(frozen=True)
class Row:
    """A name and its cells. look: `reference`, `bound` or `pairs` of the style sheet."""

    name: Cell | str
    cells: Sequence[Cell | str]
    look: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows under a line with their name and a note; without a name there is no line."""

    rows: Sequence[Row]
    name: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that scrolls sideways on a narrow page. No columns: no head."""

    columns: Sequence[str]
    groups: Sequence[Group]

    def html(self) -> str:
        """Returns the table as HTML."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        bodies = "".join(_group(group, len(self.columns)) for group in self.groups)
        return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{head}{bodies}</table></div>'

    def markdown(self) -> str:
        """Returns the rows of all groups as a Markdown table; numbers are on the right."""
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        lines = [[_text(cell) for cell in (row.name, *row.cells)] for group in self.groups for row in group.rows]
        return "\n".join([_line(self.columns), rule, *map(_line, lines)]) + "\n"


def plain(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Returns a table of text; the first cell of each line is its name."""
    return Table(columns, [Group([Row(name, cells) for name, *cells in lines])])


def interval(estimate: Mapping[str, float] | None, form: str = ".1f", scale: float = 100, look: str = "") -> Cell:
    """Returns an estimate over its interval; a dash for None. form: of `format`. scale: 100 for percent."""
    if not estimate:
        return Cell("\N{EN DASH}")
    value, low, high = (format(scale * estimate[name], form) for name in ("value", "low", "high"))
    return Cell(value, [f"{low}\N{EN DASH}{high}"], look)


def points(estimate: Mapping[str, float], colored: bool = True) -> Cell:
    """Returns a difference of shares, in points, over its interval. colored: where its interval excludes zero."""
    value, low, high = (formats.signed(100 * estimate[name]) for name in ("value", "low", "high"))
    title = f"p = {estimate['p']:.4f}" if "p" in estimate else ""
    return Cell(value, [f"{low} to {high}"], "", sign(estimate) if colored else "", title)


def sign(estimate: Mapping[str, float]) -> str:
    """Returns `up` or `down` if the interval of a difference excludes zero, else nothing."""
    return "up" if estimate["low"] > 0 else "down" if estimate["high"] < 0 else ""


def _group(group: Group, columns: int) -> str:
    note = f'{escape(group.name)} <span class="muted">{escape(group.note)}</span>'
    line = f'<tr><th scope="rowgroup" colspan="{columns}">{note}</th></tr>' if group.name else ""
    rows = (f"<tr{_attribute('class', row.look)}>{_cells(row)}</tr>" for row in group.rows)
    return f"<tbody>{line}{''.join(rows)}</tbody>"


def _cells(row: Row) -> str:
    cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in (row.name, *row.cells)]
    return "".join(
        f"<{tag}{_attribute('class', cell.look)}{_attribute('title', cell.title)}>{cell.inner_html()}</{tag[:2]}>"
        for tag, cell in zip(['th scope="row"', *["td"] * len(row.cells)], cells, strict=True)
    )


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: Cell | str) -> str:
    return cell.text if isinstance(cell, Cell) else cell
