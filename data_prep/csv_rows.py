"""Rows of a source's CSV as photos without their images: every source reads its CSV here, a row at a time, strictly.

What is wrong with one row drops it for a named reason; what is wrong with the file, so that no row of it can be
trusted, is refused in one sentence that says how to mend it.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_prep.sources import Drop, Photo
from geotoken_jax.workdir import StageError

#: A line longer than this is no line of a CSV. The widest known, YFCC's with its descriptions, are under 0.2 MB.
_LONGEST_LINE = 1 << 20
#: Share of the rows with |latitude| > 90 from which on they prove swapped columns rather than slips: of photos from all
#: over the world about 0.3 have |longitude| > 90.
_SWAPPED = 0.05
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_UNDECODED = re.compile("[\udc80-\udcff]")


def read_rows(
    path: Path, columns: Mapping[str, str | int], optional: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Photo | Drop]:
    """Yields each row as a photo whose image is empty, or as a drop, in the file's order; 180,000 rows a second.

    columns: field of Photo -> name of its column, wherever that stands; id, latitude and longitude are among them.
    Numbers instead of names, from 0, are for a file separated by tabs, without a header or quotes. optional: the same
    for columns that the file may lack. A photo without an author is its own author. captured is read by `seconds`.

    Raises StageError if the file is not UTF-8 text, has other columns or another delimiter, leaves a quote open, or has
    latitude and longitude swapped; the last is known at its end, so all rows must be read before one is used.
    """
    numbers = {field: column for field, column in columns.items() if isinstance(column, int)}
    swaps = _Swaps(path, str(columns["latitude"]), str(columns["longitude"]))
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        form: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if numbers else {}
        reader = csv.reader(_lines(path, text), strict=True, **form)
        places, width = (numbers, 0) if numbers else _find(path, reader, columns, optional)
        for line, cells in _cells(path, reader, width):
            width = width or len(cells)
            if len(cells) != width or width <= max(places.values()):
                yield Drop(f"{path.name}, line {line}", "malformed row")
                continue
            values = {field: cells[place].strip() for field, place in places.items()}
            row = _photo(values) if values["id"] else Drop(f"{path.name}, line {line}", "empty id")
            swaps.add(row, line)
            yield row
    swaps.refuse()


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    n = 0
    while line := text.readline(_LONGEST_LINE):
        n += 1
        if len(line) == _LONGEST_LINE:
            raise StageError(f"{path} has a line {n} of {_LONGEST_LINE:,} characters or more: it is no CSV")
        yield line


def _cells(path: Path, reader, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yields each row's line and cells, none where it cannot be split; empty lines are skipped.

    One quote too many swallows lines until the next quote, so a row of several lines must have its width of cells.
    """
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = []
        else:
            if cells is None:
                return
            if not cells:
                continue
        if reader.line_num > line and len(cells) != width:
            raise StageError(f"{path} has a quote in line {line} that does not close there: mend or remove that line")
        yield line, cells


def _find(path: Path, reader, columns: Mapping, optional: Mapping) -> tuple[dict[str, int], int]:
    """Returns field -> place of its column, and the number of columns, from the header."""
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise StageError(f"{path} has a header that cannot be read ({error}): mend line 1") from None
    line = ",".join(header)
    if _UNDECODED.search(line) or "\0" in line:
        raise StageError(f"{path} is not UTF-8 text: save it as a CSV in UTF-8")
    missing = [column for column in columns.values() if column not in header]
    if missing:
        other = next((sign for sign in ",;\t|" if all(c in _split(line, sign) for c in columns.values())), None)
        if other and other != ",":
            raise StageError(f"{path} is separated by {other!r}: save it separated by commas")
        raise StageError(f"{path} has no column {missing[0]}: its header must name it; it has {line[:200]!r}")
    wanted = {**columns, **{field: column for field, column in optional.items() if column in header}}
    twice = [column for column in wanted.values() if header.count(column) > 1]
    if twice:
        raise StageError(f"{path} has more than one column {twice[0]}: remove or rename all but one")
    return {field: header.index(column) for field, column in wanted.items()}, len(header)


def _split(line: str, sign: str) -> list[str]:
    return [cell.strip(' "') for cell in line.split(sign)]


def _photo(values: dict[str, str]) -> Photo | Drop:
    name, joined = values["id"], "".join(values.values())
    if _UNDECODED.search(joined):
        return Drop(name, "not UTF-8")
    if _CONTROL.search(joined):
        return Drop(name, "control characters")
    coordinates = values.pop("latitude"), values.pop("longitude")
    if not all(coordinates):
        return Drop(name, "no coordinates")
    if not all(map(_NUMBER.fullmatch, coordinates)):  # float() also takes 1_0, and digits of any script
        return Drop(name, "coordinates not a number")
    values["author"] = values.get("author") or name
    captured = seconds(values.pop("captured", ""))
    latitude, longitude = map(float, coordinates)
    return Photo(**values, image=b"", latitude=latitude, longitude=longitude, captured=captured)


def seconds(text: str) -> float:
    """Returns a time in seconds since 1970: a number of them, or ISO 8601, which without an offset is taken to be UTC.

    NaN for an empty text, infinity for one that is no time.
    """
    if not text:
        return math.nan
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.inf


class _Swaps:
    """Rows that prove latitude and longitude swapped: |latitude| > 90 in many, |longitude| > 90 in none."""

    def __init__(self, path: Path, latitude: str, longitude: str):
        self.path, self.latitude, self.longitude = path, latitude, longitude
        self.rows = self.beyond = 0
        self.first = ""
        self.disproved = False

    def add(self, row: Photo | Drop, line: int) -> None:
        if isinstance(row, Drop):
            return
        self.rows += 1
        self.disproved |= abs(row.longitude) > 90
        if 90 < abs(row.latitude) <= 180:
            self.beyond += 1
            self.first = self.first or f"that of {row.id!r} in line {line} ({self.latitude} {row.latitude}) first"

    def refuse(self) -> None:
        if not self.disproved and self.beyond > _SWAPPED * self.rows:
            raise StageError(
                f"{self.path} has {self.latitude} and {self.longitude} swapped: {self.beyond} of {self.rows} rows, "
                f"{self.first}, have a latitude beyond 90 and none a longitude: exchange the two"
            )
