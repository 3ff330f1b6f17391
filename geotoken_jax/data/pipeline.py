"""Batches for the train loop: shuffle rows, cut global batches, take this process's part, read it, in that order.

Shuffling and batching move row numbers only, and a batch is read in one call: grain would read one record at a time,
which is 4-5 times slower (google/grain#688). The global batch sequence depends on the seed alone: any number of
processes sees the same batches, so the position in it is one number, valid on any of them.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from geotoken_jax.settings import SettingsError

#: Row numbers [b] -> named arrays [b, ...].
Read = Callable[[np.ndarray], dict[str, np.ndarray]]


@runtime_checkable
class Varying(Protocol):
    """A reader that in training gives something else of a row each time."""

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """examples [b]: how many rows training takes before each of them, on all processes, from its beginning."""
        ...


class _ReadPart(grain.transforms.MapWithIndex):
    """Reads this process's contiguous part of a global batch of row numbers."""

    def __init__(self, read: Read, process: int, processes: int):
        self._read, self._process, self._processes = read, process, processes

    def map_with_index(self, index: int, rows: np.ndarray) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = len(rows) // self._processes
        own = slice(self._process * size, (self._process + 1) * size)
        if isinstance(self._read, Varying):
            return self._read.vary(rows[own], (index * len(rows) + np.arange(len(rows)))[own])
        return self._read(rows[own])


def training(
    n: int, read: Read, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled batches; every row comes once an epoch, in another order each time.

    batch_size: of all processes together. Its `get_state` and `set_state` hold the position.
    Raises SettingsError if the batch does not divide over the processes or is larger than the data.
    """
    if batch_size % processes:
        raise SettingsError(f"batch_size is {batch_size}, which does not divide over {processes} processes")
    if batch_size > n:
        raise SettingsError(f"batch_size is {batch_size}, more than the {n} photos there are: make it smaller")
    rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    read_part = rows.map_with_index(_ReadPart(read, process, processes))
    return iter(read_part.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation(
    n: int, read: Read, batch_size: int, process: int = 0, processes: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order, in batches of one size; `valid` [b] is False for what fills up the last one."""
    size = batch_size // processes
    for first in range(0, n, batch_size):
        rows = np.arange(first + process * size, first + (process + 1) * size)
        valid = rows < n
        yield {**read(np.where(valid, rows, 0)), "valid": valid}
