"""Random access to the records of ArrayRecord shards, with a limit on the number of open files.

It is used instead of grain's ArrayRecordDataSource, which keeps every shard open, and treats a shard that was cut short
as an empty shard.
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

#: Number of shards that are opened or read at the same time. File systems of clusters answer each request late, but
#: answer many requests at once.
_THREADS = 32
#: Readers do not read ahead, because the records of a training batch are in random places.
_OPTIONS = "readahead_buffer_size:0"
_BUFFER = 32_768
#: Size in bytes of the smallest shard: a shard without records consists of two blocks of 65,536 bytes.
_SMALLEST = 1 << 17

#: (Number of a Shards object, index of a shard in it) -> open reader of the shard, the least recently used first.
_open_readers: "collections.OrderedDict[tuple[int, int], Any]" = collections.OrderedDict()
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

    Files are opened on first use. If too many files are open, the least recently used file is closed (see
    `_most_open`). Opening it again takes 1.4 ms.
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
        """First row of each shard, followed by the number of all rows.

        Raises DamagedError or OSError if a shard cannot be read.
        """
        if self._starts is None:
            lengths = self._map(lambda shard: self._reader(shard).num_records(), range(len(self.paths)))
            self._starts = np.cumsum([0, *lengths])
        return self._starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """Returns the records of `rows`, in the same order.

        Raises DamagedError that names the first damaged record, and IndexError if a row is not in [0, len).
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows are from {rows.min()} to {rows.max()}: use rows from 0 to {len(self) - 1}")
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        needed = np.unique(shard).tolist()
        places = [np.flatnonzero(shard == i) for i in needed]
        found: list[bytes] = [b""] * len(rows)
        parts = self._map(lambda i, at: self._records(i, (rows[at] - self.starts[i]).tolist()), needed, places)
        for at, part in zip(places, parts, strict=True):
            for place, record in zip(at.tolist(), part, strict=True):
                found[place] = record
        return found

    def name(self, row: int) -> str:
        """Returns the name of a row for messages, e.g. "record 7 of runs/demo/tokens/train.array_record-..."."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"record {row - self.starts[shard]} of {self.paths[shard]}"

    def _map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Returns the results of `function` like map. It opens or reads a shard; several calls run at the same time."""
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
        """Returns the open reader of a shard.

        A reader that is removed from `_open_readers` closes its file when no thread uses it any longer.
        """
        key, path = (self._number, shard), self.paths[shard]
        with _lock:
            if key in _open_readers:
                _open_readers.move_to_end(key)
                return _open_readers[key]
        reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
        # A shard that was cut short to fewer than two blocks would look like an empty shard.
        if not reader.ok() or os.path.getsize(path) < _SMALLEST:
            with open(path, "rb") as file:  # the system's own error, such as too many open files
                file.read(1)
            try:
                reader.read([0])
            except (RuntimeError, IndexError) as error:
                raise damaged(path, error) from None
            raise damaged(path, "it is too short")
        with _lock:
            _open_readers[key] = reader
            while len(_open_readers) > _most_open():
                _open_readers.popitem(last=False)
        return reader


def _most_open() -> int:
    """Returns the largest number of open shards: half of the number of files that the process may open."""
    return max(_THREADS, disk.open_files_limit() // 2)


def _close(number: int) -> None:
    """Closes all files of one Shards object. number: number of this object."""
    with _lock:
        for key in [key for key in _open_readers if key[0] == number]:
            del _open_readers[key]
