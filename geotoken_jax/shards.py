"""Random access to the records of ArrayRecord shards, with a bound on the number of open files.

grain's ArrayRecordDataSource keeps every shard open, and takes a shard that was cut short for an empty one.
"""

import collections
import concurrent.futures
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from geotoken_jax import disk
from geotoken_jax.errors import UserError

#: Shards that are opened or read at a time. File systems of clusters answer late, but many requests at once.
_THREADS = 32
#: Without readahead: the records of a training batch are in random places.
_OPTIONS = "readahead_buffer_size:0"
_BUFFER = 32_768
#: Bytes of a shard without records, which has two blocks.
_SMALLEST = 1 << 17

#: Number of a Shards and of a shard -> its open reader, the least recently used first.
_open: "collections.OrderedDict[tuple[int, int], Any]" = collections.OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count()


class DamagedError(UserError, RuntimeError):
    """A file or a record of a work directory cannot be read. place: the file, or the record and its file."""

    def __init__(self, message: str, place: str):
        super().__init__(message)
        self.place = place

    def __reduce__(self):
        return type(self), (str(self), self.place)


def damaged(place: str, reason: Any) -> DamagedError:
    """Returns the error for a damaged file or record. place: see DamagedError."""
    return DamagedError(
        f"{place} is damaged ({' '.join(str(reason).split())}): restore the file; in a work directory, `geotoken "
        "verify WORKDIR --mend --config=FILE` makes it again",
        place,
    )


class Shards:
    """The records of several ArrayRecord shards, as one sequence. Instances can be pickled.

    Files are opened on first use. If the process may not open more files, the file that was not used for longest is
    closed; reading it again takes 1.4 ms more.
    """

    def __init__(self, paths: Sequence[os.PathLike | str]):
        self.paths = [os.fspath(path) for path in paths]
        self._forget()

    def _forget(self) -> None:
        self._number = next(_numbers)
        self._starts: np.ndarray | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        weakref.finalize(self, _close, self._number)

    def __getstate__(self) -> list[str]:
        return self.paths

    def __setstate__(self, paths: list[str]) -> None:
        self.paths = paths
        self._forget()

    @property
    def starts(self) -> np.ndarray:
        """First row of each shard, then the number of rows. Raises DamagedError or OSError for an unreadable shard."""
        if self._starts is None:
            lengths = self._each(lambda shard: self._reader(shard).num_records(), range(len(self.paths)))
            self._starts = np.cumsum([0, *lengths])
        return self._starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """Returns the records of some rows, in their order.

        Raises DamagedError that names the first damaged record, and IndexError for a row outside [0, len).
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} are requested of {len(self)}")
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        needed = np.unique(shard).tolist()
        places = [np.flatnonzero(shard == i) for i in needed]
        found: list[bytes] = [b""] * len(rows)
        parts = self._each(lambda i, at: self._records(i, (rows[at] - self.starts[i]).tolist()), needed, places)
        for at, part in zip(places, parts, strict=True):
            for place, record in zip(at.tolist(), part, strict=True):
                found[place] = record
        return found

    def name(self, row: int) -> str:
        """Returns the name of a row for messages: its file, and its number in the file."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"record {row - self.starts[shard]} of {self.paths[shard]}"

    def _each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Returns the results of a function that opens or reads shards, several at a time."""
        if len(arguments[0]) < 2:
            return list(map(function, *arguments))
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "shards")
        return list(self._pool.map(function, *arguments))

    def _records(self, shard: int, positions: list[int]) -> Sequence[bytes]:
        reader = self._reader(shard)
        try:
            return reader.read(positions)
        except RuntimeError:
            for position in positions:
                try:
                    reader.read([position])
                except RuntimeError as error:
                    raise damaged(f"record {position} of {self.paths[shard]}", error) from None
            raise

    def _reader(self, shard: int) -> Any:
        """Returns the open reader of a shard. A reader that `_open` drops closes its file when no thread uses it."""
        key, path = (self._number, shard), self.paths[shard]
        with _lock:
            if key in _open:
                _open.move_to_end(key)
                return _open[key]
        reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
        # A shard that is cut at the first of its blocks looks like an empty one.
        if not reader.ok() or os.path.getsize(path) < _SMALLEST:
            with open(path, "rb") as file:  # the system's own error, such as too many open files
                file.read(1)
            try:
                reader.read([0])
            except (RuntimeError, IndexError) as error:
                raise damaged(path, error) from None
            raise damaged(path, "it is too short")
        with _lock:
            _open[key] = reader
            while len(_open) > _most_open():
                _open.popitem(last=False)
        return reader


def _most_open() -> int:
    """Returns the number of shards that may be open at a time: half of the files that the process may open."""
    return max(_THREADS, disk.open_files_limit() // 2)


def _close(number: int) -> None:
    """Closes all files of one Shards."""
    with _lock:
        for key in [key for key in _open if key[0] == number]:
            del _open[key]
