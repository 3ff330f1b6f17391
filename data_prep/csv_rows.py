"""Reads a source's CSV row by row and checks it strictly. A row becomes a photo whose image is not yet read.

An error in one row drops that row and counts the reason. An error in the file, after which no row can be trusted,
raises StageError with the fix.
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
from geotoken_jax.manifests import StageError

#: Number of characters from which on a line cannot be a row of a CSV. The longest known rows, from YFCC with
#: descriptions, are under 0.2 MB.
_LONGEST_LINE = 1 << 20
#: Share of rows with |latitude| > 90 above which latitude and longitude count as swapped. A smaller share is due to
#: typing errors: if they are swapped and the photos are from all over the world, the share is about 0.3.
_SWAPPED = 0.05
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
#: Bytes that are not UTF-8, in the form in which the error handler surrogateescape decodes them.
_UNDECODED = re.compile("[\udc80-\udcff]")


def read_rows(
    path: Path, columns: Mapping[str, str | int], optional: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Photo | Drop]:
    """Yields each row in the file's order, as a photo with an empty image or as a drop. Reads 180,000 rows per second.

    columns: field of Photo -> name of its column, at any position; id, latitude and longitude are required. If
    the columns are numbers instead of names, they are positions from 0, and the file is read as separated by tabs,
    without a header or quotes. optional: field of
    Photo -> name of a column that the file may lack. A photo without an author gets its id as author. `captured` is
    parsed by `seconds`.

    Raises StageError if the header cannot be read, lacks or repeats a column or has another delimiter, if a line has
    1,048,576 characters or more, if a quote stays open, or if latitude and longitude are swapped. Swapped columns are
    detected at the end of the file only, so read all rows before using any.
    """
    numbers = {field: column for field, column in columns.items() if isinstance(column, int)}
    swaps = _Swaps(path, str(columns["latitude"]), str(columns["longitude"]))
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        form: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if numbers else {}
        reader = csv.reader(_lines(path, text), strict=True, **form)
        positions, width = (numbers, 0) if numbers else _read_header(path, reader, columns, optional)
        for line, cells in _cells(path, reader, width):
            width = width or len(cells)
            if len(cells) != width or width <= max(positions.values()):
                yield Drop(f"{path.name}, line {line}", "malformed row")
                continue
            values = {field: cells[position].strip() for field, position in positions.items()}
            row = _photo(values) if values["id"] else Drop(f"{path.name}, line {line}", "empty id")
            swaps.add(row, line)
            yield row
    swaps.check()


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    n = 0
    while line := text.readline(_LONGEST_LINE):
        n += 1
        if len(line) == _LONGEST_LINE:
            raise StageError(
                f"line {n} of {path} has {_LONGEST_LINE:,} characters or more, so the file is not a CSV: save the "
                "table as a CSV with one row per line"
            )
        yield line


def _cells(path: Path, reader, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the cells of each row, [] if the row cannot be parsed. Skips empty lines.

    Raises StageError for a row over several lines that does not have `width` cells: an unpaired quote has swallowed the
    lines up to the next quote.
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
            raise StageError(f"{path} has a quote in line {line} that does not close there: fix or remove that line")
        yield line, cells


def _read_header(path: Path, reader, columns: Mapping, optional: Mapping) -> tuple[dict[str, int], int]:
    """Returns field -> position of its column, and the number of columns."""
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise StageError(f"{path} has a header that cannot be read ({error}): fix line 1") from None
    line = ",".join(header)
    if _UNDECODED.search(line) or "\0" in line:
        raise StageError(f"{path} is not UTF-8 text: save it as a CSV in UTF-8")
    missing = [column for column in columns.values() if column not in header]
    if missing:
        other = next((char for char in ",;\t|" if all(c in _split(line, char) for c in columns.values())), None)
        if other and other != ",":
            raise StageError(f"{path} is separated by {other!r}: save it separated by commas")
        raise StageError(f"{path} has no column {missing[0]}: add it or rename one; the header is {line[:200]!r}")
    present = {**columns, **{field: column for field, column in optional.items() if column in header}}
    repeated = [column for column in present.values() if header.count(column) > 1]
    if repeated:
        raise StageError(f"{path} has more than one column {repeated[0]}: remove or rename all but one")
    return {field: header.index(column) for field, column in present.items()}, len(header)


def _split(line: str, delimiter: str) -> list[str]:
    return [cell.strip(' "') for cell in line.split(delimiter)]


def _photo(values: dict[str, str]) -> Photo | Drop:
    name, joined = values["id"], "".join(values.values())
    if _UNDECODED.search(joined):
        return Drop(name, "not UTF-8")
    if _CONTROL.search(joined):
        return Drop(name, "control characters")
    coordinates = values.pop("latitude"), values.pop("longitude")
    if not all(coordinates):
        return Drop(name, "no coordinates")
    if not all(map(_NUMBER.fullmatch, coordinates)):  # float() alone would accept 1_0 and digits of any script
        return Drop(name, "coordinates not a number")
    values["author"] = values.get("author") or name
    captured = seconds(values.pop("captured", ""))
    latitude, longitude = map(float, coordinates)
    return Photo(**values, image=b"", latitude=latitude, longitude=longitude, captured=captured)


def seconds(text: str) -> float:
    """Returns a time in seconds since 1970: NaN for an empty text, infinity for a text that is not a time.

    text: number of seconds since 1970, or a date and time in ISO 8601, read as UTC if it has no offset.
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
    """Detects that the columns of latitude and longitude are swapped.

    They are if |latitude| > 90 in more than a share _SWAPPED of the rows, and |longitude| > 90 in none.
    """

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
            self.first = self.first or f"{row.id!r} in line {line}, {self.latitude} {row.latitude}"

    def check(self) -> None:
        if not self.disproved and self.beyond > _SWAPPED * self.rows:
            raise StageError(
                f"{self.path} has {self.latitude} and {self.longitude} swapped: {self.beyond} of {self.rows} rows have "
                f"a latitude beyond 90 (the first: {self.first}), and none has a longitude beyond 90: exchange the two "
                "columns"
            )
