"""Reads tables of photos, such as the photos of a source, true coordinates and predictions. All tables are read here.

A table is a CSV file, JSON lines, a JSON array of objects, or Parquet, and may be compressed with gzip. The delimiter
of a CSV is a comma, a semicolon, a tab or a bar; its header decides which. Text is UTF-8 or UTF-16. A table with an
error is refused, or the error is reported with its row.
"""

import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

from etils import epath

from geotoken_jax.errors import UserError, explain

#: Field -> accepted names of its column, in lower case.
COLUMNS = {"id": ("id", "img_id"), "latitude": ("latitude", "lat"), "longitude": ("longitude", "lon", "lng")}
#: Text that is a number. float() alone would accept 1_0 and digits of any script.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
#: Characters that stand for bytes that are not UTF-8, if text is decoded with the error handler surrogateescape.
UNDECODED = re.compile("[\udc80-\udcff]")
_DELIMITERS = ",;\t|"
#: A line with this number of characters or more cannot be a row of a CSV. The longest known rows, from YFCC with
#: descriptions, have less than 0.2 MB.
_LONGEST_LINE = 1 << 20
#: Words that mark a column of predictions, as in LAT_pred.
_PREDICTED = {"pred", "predicted", "prediction"}
#: First bytes of a file that cannot be read as a table -> format of this file, for messages.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh9": "compressed with bzip2",
}
_PARQUET = b"PAR1"


class TableError(UserError, ValueError):
    """A table cannot be read. The message contains the file, the place in the file and the fix."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    place: "line 3" of a CSV or of JSON lines, "item 3" of a JSON array, "row 3" of Parquet. values: value of each
    column, by the name of its field, such as "latitude". A column that belongs to no field has its own name in lower
    case. Values of a CSV are text; values of other formats keep their types. If the row is malformed, `values` is
    empty. fault: error of a malformed row, with the fix, e.g. "has 3 columns, ..."; "" if the row is well-formed.
    """

    place: str
    values: dict[str, Any]
    fault: str = ""


def read(
    path: os.PathLike | str,
    columns: Mapping[str, Sequence[str]] = MappingProxyType(COLUMNS),
    optional: Mapping[str, Sequence[str]] | None = MappingProxyType({}),
    predicted: bool = False,
) -> Iterator[Row]:
    """Yields the rows of a table, in its order.

    columns: field -> accepted names of its column. The table must have exactly one column with one of these names; case
    does not matter. optional: field -> accepted names, for columns that the table may lack. If None, all other columns
    of the table are read too. predicted: whether a column such as LAT_pred takes precedence over LAT.

    Raises TableError if the file cannot be read or has another format, if a column is missing or repeated, if a line
    has 1,048,576 characters or more, or if a quote stays open over several rows.
    """
    chosen = _Columns(os.fspath(path), columns, optional, predicted)
    with _opened(path) as (file, head):
        if head.startswith(_PARQUET):
            yield from _parquet(chosen, file)
            return
        text = io.TextIOWrapper(file, *_encoding(head, chosen.path), newline="")
        lines = _Lines(chosen.path, text)
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("{"):
            yield from _json_lines(chosen, itertools.chain([first], lines), lines)
        elif first.lstrip().startswith("["):
            yield from _json_array(chosen, first + text.read())
        else:
            yield from _csv(chosen, first, lines)


def read_positions(path: os.PathLike | str, positions: Mapping[str, int]) -> Iterator[Row]:
    """Yields the rows of a tab-separated file of UTF-8 text that has neither a header nor quotes.

    positions: field -> position of its column, from 0. Raises TableError if the file cannot be read.
    """
    with _opened(path) as (file, _):
        lines = _Lines(os.fspath(path), io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
        width = 0
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            width = width or len(cells)
            place = f"line {lines.count}"
            if len(cells) != width or width <= max(positions.values()):
                yield Row(place, {}, f"has {len(cells)} columns, and the first line {width}: add or remove columns")
            else:
                yield Row(place, {field: cells[position].strip() for field, position in positions.items()})


def number(value: Any) -> float | None:
    """Returns a cell's value as a number, or None if it is not a number."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@contextlib.contextmanager
def _opened(path: os.PathLike | str) -> Iterator[tuple[IO[bytes], bytes]]:
    """Opens a table for reading. Yields the file, which decompresses gzip, and its first bytes."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(epath.Path(path).open("rb"))
            if not hasattr(file, "peek"):  # from object storage
                file = stack.enter_context(io.BufferedReader(file))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file)))  # pyright: ignore
            head = file.peek(8)
            for start, form in _OTHER_FORMATS.items():
                if head.startswith(start):
                    raise TableError(f"{os.fspath(path)} is {form}: save the table as a CSV, which gzip may compress")
            yield file, head
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{os.fspath(path)} is damaged or cut short ({error}): copy or download it again") from None
    except OSError as error:
        raise TableError(explain(error, path)) from None
    except UnicodeDecodeError as error:
        raise TableError(f"{os.fspath(path)} is not whole UTF-16 text ({error.reason}): save it in UTF-8") from None


def _encoding(head: bytes, path: str) -> tuple[str, str]:
    """Returns the encoding of a text and the name of the handler of its errors. head: first bytes of the text."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise TableError(f"{path} is UTF-32 text: save it in UTF-8")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16", "strict"
    if head[:2].count(0) == 1:
        return "utf-16-be" if head[0] == 0 else "utf-16-le", "strict"
    return "utf-8-sig", "surrogateescape"


class _Lines:
    """Iterates over the lines of a text. count: number of lines read. raw: lines read since it was last cleared."""

    def __init__(self, path: str, text: io.TextIOWrapper):
        self._path, self._text = path, text
        self.count, self.raw = 0, []

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self._text.readline(_LONGEST_LINE)
        if not line:
            raise StopIteration
        self.count += 1
        if len(line) == _LONGEST_LINE:
            raise TableError(
                f"line {self.count} of {self._path} has {_LONGEST_LINE:,} characters or more, so the file is not a "
                "CSV: save the table as a CSV with one row per line"
            )
        self.raw.append(line)
        return line


class _Columns:
    """Finds the positions of the columns to read in the header of a table. For the arguments, see `read`."""

    def __init__(
        self,
        path: str,
        required: Mapping[str, Sequence[str]],
        optional: Mapping[str, Sequence[str]] | None,
        predicted: bool,
    ):
        self.path, self.required, self.optional, self.predicted = path, required, optional, predicted
        self._found: dict[tuple[str, ...], dict[str, int]] = {}

    def find(self, names: tuple[str, ...], place: str = "") -> dict[str, int]:
        """Returns field -> position of its column. The key of a column that is no field is its name in lower case.

        names: names of all columns. place: place in the file, for messages.

        Raises TableError if a column is missing or repeated.
        """
        if names not in self._found:  # kept, because almost all JSON objects of a table have the same names
            self._found[names] = self._find(names, place)
        return self._found[names]

    def _find(self, names: tuple[str, ...], place: str) -> dict[str, int]:
        keys = [name.strip().lower() for name in names]
        accepted = self._accepted(keys)
        found = {}
        for field, columns in accepted.items():
            positions = [i for i, key in enumerate(keys) if key in map(str.lower, columns)]
            if not positions and field in self.required:
                raise TableError(
                    f"{self.path}{place} has no column {columns[0] if len(columns) == 1 else field} among "
                    f"{', '.join(map(str.strip, names))[:200]!r}: add it, or rename one to {' or '.join(columns)}"
                )
            if len(positions) > 1:
                several = ", ".join(names[i] for i in positions)
                raise TableError(
                    f"{self.path}{place} has more than one column {field} ({several}): remove or rename all but one"
                )
            if positions:
                found[field] = positions[0]
        for i, key in enumerate(keys if self.optional is None else []):
            if key and i not in found.values():
                if keys.count(key) > 1:
                    raise TableError(f"{self.path}{place} has more than one column {key}: remove or rename all but one")
                found.setdefault(key, i)
        return found

    def _accepted(self, keys: Sequence[str]) -> dict[str, Sequence[str]]:
        """Returns field -> accepted names of its column. keys: names of the columns in lower case.

        If there are columns of predicted coordinates, no other columns of coordinates are accepted.
        """
        accepted = {**self.required, **(self.optional or {})}
        if self.predicted:
            marked = {
                field: [key for key in keys if _unmarked(key) in accepted[field] and _unmarked(key) != key]
                for field in ("latitude", "longitude")
            }
            if any(marked.values()):
                accepted |= {field: columns or [f"predicted_{field}"] for field, columns in marked.items()}
        return accepted


def _unmarked(key: str) -> str:
    """Returns the name of a column without the word that marks predictions, e.g. `lat` for `lat_pred` and for `lat`."""
    words = re.split(r"[\s_.-]+", key)
    return "_".join(word for word in words if word not in _PREDICTED) if _PREDICTED & set(words) else key


def _csv(columns: _Columns, first: str, lines: _Lines) -> Iterator[Row]:
    path = columns.path
    if "\0" in first or UNDECODED.search(first):
        raise TableError(f"{path} is not UTF-8 text: save it as a CSV in UTF-8")
    delimiter, found, width = _header(columns, first)
    before = lines.count
    lines.raw.clear()
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells, fault = [], f"cannot be read ({error}): double each quote in a value, and put the value in quotes"
        else:
            if cells is None:
                return
            if not cells:
                lines.raw.clear()
                continue
            more = "more" if len(cells) > width else "fewer"
            fault = f"has {more} columns than the header: put values with {delimiter!r} in double quotes"
        if len(lines.raw) > 1:
            _check_quote(path, line, lines.raw, cells, found, width, delimiter)
        lines.raw.clear()
        if len(cells) != width:
            yield Row(f"line {line}", {}, fault)
        else:
            yield Row(f"line {line}", {field: cells[position].strip() for field, position in found.items()})


def _header(columns: _Columns, first: str) -> tuple[str, dict[str, int], int]:
    """Returns the delimiter of a CSV, field -> position of its column, and the number of columns.

    The header has all required columns if it is split at the delimiter. Raises TableError if this is true for no
    delimiter, or for several. first: line of the header.
    """
    possible, problems = [], []
    for delimiter in _DELIMITERS:
        try:
            names = tuple(next(csv.reader([first], delimiter=delimiter, strict=True), []))
            possible.append((delimiter, columns.find(names), len(names)))
        except csv.Error as error:
            problems.append((0, f"{columns.path} has a header that cannot be read ({error}): fix line 1"))
        except TableError as error:
            problems.append((len(names), str(error)))  # pyright: ignore[reportPossiblyUnboundVariable]
    if len(possible) > 1:
        delimiters = " or by ".join(repr(delimiter) for delimiter, *_ in possible)
        raise TableError(
            f"line 1 of {columns.path} has all columns, whether it is separated by {delimiters}: use only one of these "
            "delimiters in this line"
        )
    if not possible:
        raise TableError(max(problems, key=lambda problem: problem[0])[1])
    return possible[0]


def _check_quote(
    path: str, line: int, raw: Sequence[str], cells: Sequence[str], found: Mapping[str, int], width: int, delimiter: str
) -> None:
    """Raises TableError if several rows were read as one row, because a quote in the first of them is never closed.

    This is assumed if the row has a wrong number of cells, if one of its inner lines would be a complete row by itself,
    or if both its first and its last line would be complete rows.

    line: number of the first line. raw: lines of the row. cells: cells of the row. found: field -> position of its
    column. width: number of columns.
    """

    def whole(text: str) -> bool:
        parts = text.split(delimiter)
        return len(parts) == width and all(
            NUMBER.fullmatch(parts[found[field]].strip(' "\r\n')) for field in ("latitude", "longitude")
        )

    if len(cells) != width or any(map(whole, raw[1:-1])) or (whole(raw[0]) and whole(raw[-1])):
        raise TableError(f"{path} has a quote in line {line} that does not close there: fix or remove that line")


def _json_lines(columns: _Columns, texts: Iterator[str], lines: _Lines) -> Iterator[Row]:
    for text in texts:
        lines.raw.clear()
        if not text.strip():
            continue
        place = f"line {lines.count}"
        try:
            item = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TableError(f"{columns.path}, {place}: {error}: write one JSON object per line") from None
        yield _item(columns, item, place)


def _json_array(columns: _Columns, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{columns.path} is not a JSON array ({error}): write an array of objects") from None
    for n, item in enumerate(items, start=1):
        yield _item(columns, item, f"item {n}")


def _item(columns: _Columns, item: Any, place: str) -> Row:
    if not isinstance(item, dict):
        raise TableError(f"{columns.path}, {place}: {item!r:.200} is not a JSON object: write one object per photo")
    found, values = columns.find(tuple(item), f", {place}"), list(item.values())
    return Row(place, {field: values[position] for field, position in found.items()})


def _parquet(columns: _Columns, opened: IO[bytes]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # here, because it takes 0.2 s, and prediction does not need it
    except ModuleNotFoundError:
        raise TableError(f"{columns.path} is Parquet, which needs pyarrow: install pyarrow, or save a CSV") from None
    n = 0
    try:
        with parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches():
                for item in batch.to_pylist():
                    n += 1
                    yield _item(columns, item, f"row {n}")
    except ArrowException as error:
        raise TableError(f"{columns.path} is damaged or cut short ({error}): copy or download it again") from None
