"""Tables of all pages: columns, groups of rows, and cells with a number above its interval.

All text is escaped when a table is drawn, except `Cell.html`, which is HTML.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from geotoken_jax.analysis import formats
from geotoken_jax.geo import distance

#: Column heads for distance.THRESHOLDS_KM.
THRESHOLDS = tuple(f"{km:,}\N{NO-BREAK SPACE}km" for km in distance.THRESHOLDS_KM)
#: Explanations of selectors (predict/select.py) for readers of a page, by value of Method.choice.
_SELECTORS = {
    "greedy": "the most probable token at every step of decoding",
    "log_probability": "the candidate with the highest probability",
    "similarity": "the candidate whose location embedding is most similar to the photo's embedding",
    "consensus": "the candidate with the highest density of neighbors around it",
    **{
        f"{kind}_{goal}": f"the {place} with the highest expected {name} under the decoder's distribution over places"
        for kind, place in (("expected", "candidate"), ("point", "point on Earth, candidate or not,"))
        for goal, name in (
            *((f"{km}_km", f"accuracy within {km:,} km") for km in distance.THRESHOLDS_KM),
            ("geoscore", "GeoScore"),
        )
    },
    "reward": "the candidate that the trained reward head rates highest",
    "reranker": "the candidate or gallery photo with the highest expected accuracy over all thresholds, by the "
    "trained reranker",
    "ideal": "the candidate or neighbor nearest to the truth, which no selector can surpass",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: number or word.
        notes: small lines below the text.
        look: CSS class of the cell; `best` is bold.
        sign: color of the text, `up` for green or `down` for red; if empty, the text has the usual color.
        title: tooltip.
        html: HTML after the text, such as a picture or a gauge.
    """

    text: str = ""
    notes: Sequence[str] = ()
    look: str = ""
    sign: str = ""
    title: str = ""
    html: str = ""

    def inner_html(self) -> str:
        """Returns the content of the cell as HTML."""
        text = f'<span class="{self.sign}">{escape(self.text)}</span>' if self.sign else escape(self.text)
        return text + self.html + "".join(f"<small>{escape(note)}</small>" for note in self.notes)


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of a table: a name and cells. look: CSS class of the row, `reference`, `bound` or `pairs`."""

    name: Cell | str
    cells: Sequence[Cell | str]
    look: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows below a line with the name of the group and a note. If the name is empty, there is no line."""

    rows: Sequence[Row]
    name: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Table that scrolls sideways on a narrow page. It has no head if `columns` is empty."""

    columns: Sequence[str]
    groups: Sequence[Group]

    def html(self) -> str:
        """Returns the HTML of the table."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        bodies = "".join(_group(group, len(self.columns)) for group in self.groups)
        return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{head}{bodies}</table></div>'

    def markdown(self) -> str:
        """Returns the rows of all groups as a Markdown table, all columns but the first aligned right."""
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        lines = [[_text(cell) for cell in (row.name, *row.cells)] for group in self.groups for row in group.rows]
        return "\n".join([_line(self.columns), rule, *map(_line, lines)]) + "\n"


def plain(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Returns a table of text with one group. lines: cells of each row; the first cell is the row's name."""
    return Table(columns, [Group([Row(name, cells) for name, *cells in lines])])


def explanation(choice: str) -> str:
    """Describes how a selector chooses an answer. Returns "" if this package has no selector of this name.

    choice: name of the selector, with underscores.
    """
    return _SELECTORS.get(choice, "")


def method(name: str, choice: str) -> Cell:
    """Returns a cell with the name of a method, and the explanation of its selector as a tooltip."""
    return Cell(name, title=explanation(choice))


def interval(estimate: Mapping[str, float] | None, form: str = ".1f", scale: float = 100, look: str = "") -> Cell:
    """Returns a cell with an estimate above its interval. If the estimate is None, the cell has a dash.

    form: format of the numbers. scale: factor on the numbers, 100 for percent. look: CSS class of the cell.
    """
    if not estimate:
        return Cell("\N{EN DASH}")
    value, low, high = (format(scale * estimate[name], form) for name in ("value", "low", "high"))
    return Cell(value, [f"{low}\N{EN DASH}{high}"], look)


def points(estimate: Mapping[str, float], colored: bool = True) -> Cell:
    """Returns a cell with a difference of shares in percentage points above its interval.

    If the estimate has a p-value, it is the tooltip. colored: whether a difference is green or red if its interval
    excludes zero.
    """
    value, low, high = (formats.signed(100 * estimate[name]) for name in ("value", "low", "high"))
    title = f"p = {estimate['p']:.4f}" if "p" in estimate else ""
    return Cell(value, [f"{low} to {high}"], "", sign(estimate) if colored else "", title)


def sign(estimate: Mapping[str, float]) -> str:
    """Returns `up` or `down` if the interval of a difference excludes zero, else ""."""
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
