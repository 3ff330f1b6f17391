"""What a row number becomes: records joined with the tables they point into."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.records import Records
from geotoken_jax.settings import SettingsError

#: Seconds of a year, the calendar's mean one (a date of 1970 to 2100 is within two days of its place), and of a day.
_PERIODS = 365.2425 * 86_400, 86_400


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """photos: of those that the decoder could be trained on, so many are, with their views; 0 for all. A smaller set
    lies in each larger one. Neighbors still come from the whole gallery. seed: of the choice."""

    photos: int
    seed: int


class Features:
    """Reads features/ for alignment: image and text [b, C] float32, coordinates [b, 2] float32 in degrees."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self._records[rows]
        return {name: found[name].astype(np.float32) for name in ("image", "text", "coordinates")}


class Tokens:
    """Reads tokens/ for the decoder and joins photo and neighbors by row.

    own: table of the photos themselves (the gallery, for the split that the gallery is made of). gallery: None where it
    lies on the devices (gallery/placement.py). neighbors: M, how many of those on record are taken, best first. times:
    how many numbers of `context` the model reads.
    Returns query [b, 3, C] bfloat16, tokens [b, T] and neighbor_count [b] int32, and of the neighbors either
    neighbors [b, M, 3, C] bfloat16 and neighbor_tokens [b, M, T] int32, or neighbor_rows [b, M] int32 alone; and where
    times are read context [b, times] float32.
    """

    def __init__(
        self, records: Records, own: Table, gallery: Table | None, cells: Scheme, neighbors: int, times: int = 0
    ):
        self._records, self._own, self._gallery = records, own, gallery
        self._cells, self._neighbors, self._times = cells, neighbors, times

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self._records[rows]
        near = found["neighbors"][:, : self._neighbors]
        return {
            # The photo's own always come from the host: 4.6 KB a photo where its neighbors are 15 times that, and a
            # photo of another split than the gallery's is in no table on the devices.
            "query": self._own.embeddings(found["row"]),
            "tokens": self._cells.of_stored(found["tokens"], self._own.coordinates(found["row"])),
            **(neighbor_rows(near) if self._gallery is None else neighbors(self._gallery, near, self._cells)),
            **({"context": context(self._own.captured(found["row"]), self._times)} if self._times else {}),
        }


class Concatenation:
    """Reads several splits as one: the rows of each follow those of the one before it."""

    def __init__(self, parts: Sequence[Features] | Sequence[Tokens]):
        self._parts = parts
        #: First row of each part, and the number of rows.
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(rows)
        part = np.searchsorted(self._starts, rows, side="right") - 1
        asked = np.unique(part)
        if len(asked) == 1:
            return self._parts[asked[0]](rows - self._starts[asked[0]])
        columns: dict[str, np.ndarray] = {}
        for i in asked:
            here = part == i
            for name, values in self._parts[i](rows[here] - self._starts[i]).items():
                columns.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[here] = values
        return columns


class Subset:
    """Reads some rows of another reader: its row i is the other's row rows[i]."""

    def __init__(self, whole: Callable[[np.ndarray], dict[str, np.ndarray]], rows: Int[np.ndarray, "n"]):
        self._whole, self._rows = whole, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._whole(self._rows[rows])


def chosen(ids: Sequence[np.ndarray], settings: DataSettings) -> Int[np.ndarray, "n"]:
    """Returns the rows of the photos that are trained on, ascending, among several splits read as one (Concatenation).

    ids: of each split's photos; the choice is among those of the first, and views have the ids of their photos. Raises
    SettingsError if there are fewer than asked for.
    """
    photos, *_ = ids
    if not 0 < settings.photos <= len(photos):
        raise SettingsError(
            f"config.data.photos is {settings.photos}: there are {len(photos):,} to train on, 0 for all"
        )
    taken = np.random.default_rng(settings.seed).permutation(len(photos))[: settings.photos]
    return np.flatnonzero(np.isin(np.concatenate(ids), photos[taken]))


def context(captured: Float[np.ndarray, " b"], times: int) -> Float[np.ndarray, "b times"]:
    """Returns the first `times` numbers of what a model reads of when photos were taken, float32; all 0 if unknown.

    captured: seconds since 1970, UTC, NaN where unknown. Numbers: 1, for known; sine and cosine of the time of year;
    sine and cosine of the time of day.
    """
    year, day = (2 * np.pi * (captured / period % 1) for period in _PERIODS)
    numbers = np.stack([np.ones_like(captured), np.sin(year), np.cos(year), np.sin(day), np.cos(day)], -1)
    return np.where(np.isnan(captured)[:, None], 0, numbers[:, :times]).astype(np.float32)


def neighbor_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns which gallery rows [b, M] the devices are to look up; missing ones are -1 and come last."""
    return {"neighbor_rows": rows.astype(np.int32), "neighbor_count": _count(rows)}


def neighbors(gallery: Table, rows: np.ndarray, cells: Scheme) -> dict[str, np.ndarray]:
    """Returns what the decoder reads of gallery rows [b, M]; missing ones are -1 and come last."""
    present = np.where(rows < 0, 0, rows)
    return {
        "neighbors": gallery.embeddings(present),
        "neighbor_tokens": cells.of_stored(gallery.tokens(present), gallery.coordinates(present)),
        "neighbor_count": _count(rows),
    }


def _count(rows: np.ndarray) -> np.ndarray:
    return (rows >= 0).sum(1, dtype=np.int32)
