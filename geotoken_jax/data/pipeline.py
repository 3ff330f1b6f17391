"""Batches for the train loop: rows are shuffled and cut into global batches, and each process reads its part.

Shuffling and batching move row numbers only, and a batch is read in one call. Grain would read one record at a time,
which is 4-5 times slower (google/grain#688). The sequence of global batches depends on the number of rows, the batch
size and the seed, but not on the number of processes. So a position in the sequence is valid for any number of them.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from geotoken_jax.settings import SettingsError

#: Function from row numbers [b] to named arrays [b, ...].
Read = Callable[[np.ndarray], dict[str, np.ndarray]]


@runtime_checkable
class Varying(Protocol):
    """A reader that in training returns different data each time it reads a row, such as random views of a photo."""

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the data of the rows, varied per example.

        examples [b]: index of each row in the sequence of all training examples, in which rows repeat.
        """
        ...


class _ReadPart(grain.transforms.MapWithIndex):
    """Reads this process's contiguous part of a global batch of row numbers."""

    def __init__(self, read: Read, process: int, processes: int):
        self._read, self._process, self._processes = read, process, processes

    def map_with_index(self, index: int, rows: np.ndarray) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = len(rows) // self._processes
        part = slice(self._process * size, (self._process + 1) * size)
        if isinstance(self._read, Varying):
            return self._read.vary(rows[part], (index * len(rows) + np.arange(len(rows)))[part])
        return self._read(rows[part])


def training(
    n: int, read: Read, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled batches. Each epoch has every row once, in a new order.

    `get_state` and `set_state` of the iterator read and set its position. n: number of rows. batch_size: rows per
    batch, over all processes. process: index of this process, which gets its part of each batch.

    Raises SettingsError if processes does not divide batch_size, or batch_size is larger than n.
    """
    if batch_size % processes:
        raise SettingsError(f"batch_size is {batch_size}: make it a multiple of {processes}, the number of processes")
    if batch_size > n:
        raise SettingsError(f"batch_size is {batch_size}, but there are only {n} photos: set it to {n} or less")
    rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    read_part = rows.map_with_index(_ReadPart(read, process, processes))
    return iter(read_part.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation(
    n: int, read: Read, batch_size: int, process: int = 0, processes: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of equal size with every row once, in order; of each batch, this process's part.

    `valid` [b] is False for rows that only pad the last batch. n: number of rows. batch_size: rows per batch, over all
    processes; a multiple of `processes`.
    """
    size = batch_size // processes
    for first in range(0, n, batch_size):
        rows = np.arange(first + process * size, first + (process + 1) * size)
        valid = rows < n
        yield {**read(np.where(valid, rows, 0)), "valid": valid}
