"""Readers that turn row numbers into training data: records joined with the tables that their rows refer to."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.records import Records
from geotoken_jax.settings import SettingsError

#: Seconds in a mean calendar year, and in a day. With the mean year, the time of year is at most two days wrong for
#: dates from 1970 to 2100.
_PERIODS = 365.2425 * 86_400, 86_400


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Choice of the photos that the decoder is trained on.

    photos: number of photos, which are used with their views; all photos if 0. Neighbors still come from the whole
    gallery. seed: seed of the random choice. With the same seed, a larger choice contains every smaller one.
    split_validation: whether only every second validation photo, in the even rows, chooses the best step of a training.
    The metrics of the other photos begin with `scored/`. They are unbiased, because these photos choose nothing.
    """

    photos: int
    seed: int
    split_validation: bool


class Features:
    """Reads rows of features/ for alignment: image and text [b, C] float32, coordinates [b, 2] float32 in degrees."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        records = self._records[rows]
        return {name: records[name].astype(np.float32) for name in ("image", "text", "coordinates")}


class Searched:
    """Reads rows of a table with their neighbors, in the form of the records of tokens/.

    neighbors: gallery rows of each photo's neighbors, [n, K].
    """

    def __init__(self, table: Table, neighbors: Int[np.ndarray, "n K"]):
        self._table, self._neighbors = table, neighbors

    def __len__(self) -> int:
        return len(self._neighbors)

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"row": rows, "tokens": self._table.tokens(rows), "neighbors": self._neighbors[rows]}


class Tokens:
    """Reads rows of tokens/ for the decoder, joined with the embeddings of the photos and their neighbors.

    own: table of the photos themselves. For the split that the gallery is built from, this is the gallery's table.
    gallery: table of the neighbors; None if it is on the devices (gallery/placement.py).
    neighbors: M, number of recorded neighbors to read, best first.
    times: number of values that describe the capture time (see `context`); if 0, no context is read.

    A call returns query [b, 3, C] bfloat16, tokens [b, T] int32 and neighbor_count [b] int32. If `gallery` is given, it
    also returns neighbors [b, M, 3, C] bfloat16 and neighbor_tokens [b, M, T] int32, else neighbor_rows [b, M] int32.
    If `times` is above 0, it also returns context [b, times] float32.
    """

    def __init__(
        self,
        records: Records | Searched,
        own: Table,
        gallery: Table | None,
        cells: Scheme,
        neighbors: int,
        times: int = 0,
    ):
        self._records, self._own, self._gallery = records, own, gallery
        self._cells, self._neighbors, self._times = cells, neighbors, times

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        records = self._records[rows]
        best = records["neighbors"][:, : self._neighbors]
        return {
            # The photo's own embeddings always come from the host, even if the gallery is on the devices. They are
            # 4.6 KB, a 15th of the embeddings of 15 neighbors. Photos of other splits are not in the gallery.
            "query": self._own.embeddings(records["row"]),
            "tokens": self._cells.from_stored(records["tokens"], self._own.coordinates(records["row"])),
            **(neighbor_rows(best) if self._gallery is None else neighbors(self._gallery, best, self._cells)),
            **({"context": context(self._own.captured(records["row"]), self._times)} if self._times else {}),
        }


class Concatenation:
    """Reads several splits as one. Row numbers run through the first split, then the second, and so on."""

    def __init__(self, parts: Sequence[Features] | Sequence[Tokens]):
        self._parts = parts
        #: First row of each part; the last entry is the total number of rows.
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(rows)
        part = np.searchsorted(self._starts, rows, side="right") - 1
        requested = np.unique(part)
        if len(requested) == 1:
            return self._parts[requested[0]](rows - self._starts[requested[0]])
        columns: dict[str, np.ndarray] = {}
        for i in requested:
            here = part == i
            for name, values in self._parts[i](rows[here] - self._starts[i]).items():
                columns.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[here] = values
        return columns


class Subset:
    """Reads a subset of another reader: row i of the subset is row rows[i] of `whole`."""

    def __init__(self, whole: Callable[[np.ndarray], dict[str, np.ndarray]], rows: Int[np.ndarray, "n"]):
        self._whole, self._rows = whole, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._whole(self._rows[rows])


def choose_rows(ids: Sequence[np.ndarray], settings: DataSettings) -> Int[np.ndarray, "n"]:
    """Returns the rows of randomly chosen photos and their views in a Concatenation of splits, in ascending order.

    ids: ids of each split. The photos are chosen from the first split. The other splits contain views, which have the
    ids of their photos.

    Raises SettingsError unless settings.photos is between 1 and the size of the first split.
    """
    photos, *_ = ids
    if not 0 < settings.photos <= len(photos):
        raise SettingsError(
            f"config.data.photos is {settings.photos}: set it to 1 ... {len(photos)}, or to 0 for all photos"
        )
    taken = np.random.default_rng(settings.seed).permutation(len(photos))[: settings.photos]
    return np.flatnonzero(np.isin(np.concatenate(ids), photos[taken]))


def context(captured: Float[np.ndarray, " b"], times: int) -> Float[np.ndarray, "b times"]:
    """Returns numbers that describe when each photo was taken, float32; all 0 for a photo whose time is unknown.

    They are the first `times` of these five: 1 (the time is known), sine and cosine of the time of year, sine and
    cosine of the time of day. captured: seconds since 1970, UTC; NaN if unknown.
    """
    year, day = (2 * np.pi * (captured / period % 1) for period in _PERIODS)
    numbers = np.stack([np.ones_like(captured), np.sin(year), np.cos(year), np.sin(day), np.cos(day)], -1)
    return np.where(np.isnan(captured)[:, None], 0, numbers[:, :times]).astype(np.float32)


def neighbor_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the gallery rows [b, M] that the devices look up, and the number of neighbors per photo.

    rows: gallery rows of the neighbors; missing ones are -1 and come last.
    """
    return {"neighbor_rows": rows.astype(np.int32), "neighbor_count": _count(rows)}


def neighbors(gallery: Table, rows: np.ndarray, cells: Scheme) -> dict[str, np.ndarray]:
    """Returns embeddings and tokens of gallery rows [b, M], and the number of neighbors per photo.

    rows: gallery rows of the neighbors; missing ones are -1 and come last.
    """
    present = np.where(rows < 0, 0, rows)
    return {
        "neighbors": gallery.embeddings(present),
        "neighbor_tokens": cells.from_stored(gallery.tokens(present), gallery.coordinates(present)),
        "neighbor_count": _count(rows),
    }


def _count(rows: np.ndarray) -> np.ndarray:
    return (rows >= 0).sum(1, dtype=np.int32)
