"""Reads a source's table row by row. A row becomes a photo whose image is not yet read.

An error in one row drops that row and counts the reason. An error in the file, after which no row can be trusted,
raises TableError with the fix.
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

#: Share of rows with |latitude| > 90 above which latitude and longitude count as swapped. A smaller share is due to
#: typing errors: if they are swapped and the photos are from all over the world, the share is about 0.3.
_SWAPPED = 0.05
#: Beginning of a field whose value decides whether a row is used. No field of Photo begins so.
_CONDITION = "="
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def read_rows(
    path: os.PathLike | str,
    columns: Mapping[str, str | int | tuple[str, ...]],
    optional: Mapping[str, str] = MappingProxyType({}),
    only: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Photo | Drop]:
    """Yields each row in the file's order, as a photo with an empty image or as a drop.

    columns: field of Photo -> name of its column, or names of which the file has one, at any position and in any case;
    id, latitude and longitude are required. If the columns are numbers instead of names, they are positions from 0, and
    the file is read as separated by tabs, without a header or quotes. optional: field of Photo -> name of a column that
    the file may lack. only: name of a column -> its value in the rows to yield. A photo without an author gets its id
    as author. `captured` is parsed by `seconds`.

    Raises the errors of `tables.read`, and TableError if latitude and longitude are swapped. Swapped columns are
    detected at the end of the file only, so read all rows before using any.
    """
    path = epath.Path(path)
    swaps = _Swaps(path, _label(columns, "latitude"), _label(columns, "longitude"))
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
    """Returns the name of a field's column for messages: the field itself if the column can have several names."""
    return field if isinstance(columns[field], tuple) else str(columns[field])


def _text(value: Any) -> str:
    """Returns a cell as text: a CSV has text, JSON and Parquet have values of any type."""
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
    """Returns a time in seconds since 1970: NaN for an empty text, infinity for a text that is not a time.

    text: number of seconds since 1970, or a date and time in ISO 8601, read as UTC if it has no offset.
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


class _Swaps:
    """Detects that the columns of latitude and longitude are swapped.

    They are if |latitude| > 90 in more than a share _SWAPPED of the rows, and |longitude| > 90 in none.
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
        if not self.disproved and self.beyond > _SWAPPED * self.rows:
            raise TableError(
                f"{self.path} has {self.latitude} and {self.longitude} swapped: {self.beyond} of {self.rows} rows have "
                f"a latitude beyond 90 (the first: {self.first}), and none has a longitude beyond 90: exchange the two "
                "columns"
            )
