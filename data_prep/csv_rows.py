"""Reads the table that lists the photos of a source. Each row becomes a Photo without its image, or a Drop.

A fault in one row, such as a missing coordinate, drops only this row. A fault that makes all rows doubtful, such as
swapped columns, raises TableError.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from etils import epath

from data_prep.sources import Drop, Photo
from geotoken_jax import tables
from geotoken_jax.tables import NUMBER, UNDECODED, TableError

#: Latitude and longitude count as swapped if |latitude| > 90 in more than this share of the rows. For swapped columns
#: and photos from all over the world the share is about 0.3. Typing errors give a much smaller share.
_MAX_BEYOND_90 = 0.05
#: Prefix of the keys under which the columns of `only` are read. No field of Photo starts with it.
_CONDITION = "="
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def read_rows(
    path: os.PathLike | str,
    columns: Mapping[str, str | int | tuple[str, ...]],
    optional: Mapping[str, str] = MappingProxyType({}),
    only: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Photo | Drop]:
    """Yields each row of a table in its order: a Photo with an empty image, or a Drop.

    A photo without an author gets its id as author. The column of the field `captured` is parsed by `seconds`.

    columns: field of Photo -> column. A column is a name, or a tuple of names of which the table must have exactly one;
    case does not matter. A column can also be a position, counted from 0. Then all columns must be positions, and the
    table is read as text that is separated by tabs and has neither header nor quotes. The fields id, latitude and
    longitude are required. optional: field of Photo -> name of a column that the table may lack. only: name of a
    column -> value; rows with another value in this column are skipped.

    Raises the errors of `tables.read`, and TableError if latitude and longitude are swapped. A swap is detected only
    after the last row, so a caller must read all rows before it uses any.
    """
    path = epath.Path(path)
    swaps = _SwapDetector(path, _label(columns, "latitude"), _label(columns, "longitude"))
    positions = {field: column for field, column in columns.items() if isinstance(column, int)}
    if positions:
        rows = tables.read_positions(path, positions)
    else:
        names = {field: column if isinstance(column, tuple) else (str(column),) for field, column in columns.items()}
        names |= {_CONDITION + column: (column,) for column in only}
        rows = tables.read(path, names, {field: (column,) for field, column in optional.items()})
    for row in rows:
        place = f"{path.name}, {row.place}"
        if row.fault:
            yield Drop(place, "malformed row")
            continue
        values = {field: _text(value) for field, value in row.values.items()}
        if any([values.pop(_CONDITION + column) != value for column, value in only.items()]):
            continue
        photo = _photo(values) if values["id"] else Drop(place, "empty id")
        swaps.add(photo, row.place)
        yield photo
    swaps.check()


def _label(columns: Mapping[str, Any], field: str) -> str:
    """Returns the name of a field's column, for messages. If the column can have several names, returns the field."""
    return field if isinstance(columns[field], tuple) else str(columns[field])


def _text(value: Any) -> str:
    """Returns the value of a cell as text. Cells of a CSV are text; cells of JSON and Parquet have any type."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def _photo(values: dict[str, str]) -> Photo | Drop:
    name, joined = values["id"], "".join(values.values())
    if UNDECODED.search(joined):
        return Drop(name, "not UTF-8")
    if _CONTROL.search(joined):
        return Drop(name, "control characters")
    coordinates = values.pop("latitude"), values.pop("longitude")
    if not all(coordinates):
        return Drop(name, "no coordinates")
    if not all(map(NUMBER.fullmatch, coordinates)):
        return Drop(name, "coordinates not a number")
    values["author"] = values.get("author") or name
    captured = seconds(values.pop("captured", ""))
    latitude, longitude = map(float, coordinates)
    return Photo(**values, image=b"", latitude=latitude, longitude=longitude, captured=captured)


def seconds(text: str) -> float:
    """Returns the time that a text gives, in seconds since 1970. An empty text gives NaN, an invalid one infinity.

    text: number of seconds since 1970, or date and time in ISO 8601. A date without an offset is read as UTC.
    """
    if not text:
        return math.nan
    if NUMBER.fullmatch(text):
        return float(text)
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.inf


class _SwapDetector:
    """Detects that the columns of latitude and longitude are swapped.

    They count as swapped if |latitude| > 90 in more than _MAX_BEYOND_90 of the rows, and |longitude| > 90 in no row.
    """

    def __init__(self, path: epath.Path, latitude: str, longitude: str):
        self.path, self.latitude, self.longitude = path, latitude, longitude
        self.rows = self.beyond = 0
        self.first = ""
        self.disproved = False

    def add(self, row: Photo | Drop, place: str) -> None:
        if isinstance(row, Drop):
            return
        self.rows += 1
        self.disproved |= abs(row.longitude) > 90
        if 90 < abs(row.latitude) <= 180:
            self.beyond += 1
            self.first = self.first or f"{row.id!r} in {place}, {self.latitude} {row.latitude}"

    def check(self) -> None:
        if not self.disproved and self.beyond > _MAX_BEYOND_90 * self.rows:
            raise TableError(
                f"{self.path} has {self.latitude} and {self.longitude} swapped: {self.beyond} of {self.rows} rows have "
                f"a latitude beyond 90 (the first: {self.first}), and none has a longitude beyond 90: exchange the two "
                "columns"
            )
