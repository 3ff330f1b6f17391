"""Batches for the train loop: rows are shuffled and cut into global batches, and each process reads its share.

Shuffling and batching move row numbers only, and a batch is read in one call. Grain would read one record at a time,
which is 4-5 times slower (google/grain#688). The sequence of global batches depends on the number of rows, the batch
size and the seed, but not on the number of processes. So a position in the sequence is valid for any number of them.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

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


class _ReadLocal(grain.transforms.MapWithIndex):
    """Reads the rows of a global batch that this process needs. local: see `training`."""

    def __init__(self, read: Read, local: np.ndarray):
        self._read, self._local = read, local

    def map_with_index(self, index: int, rows: np.ndarray) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(self._read, Varying):
            return self._read.vary(rows[self._local], index * len(rows) + self._local)
        return self._read(rows[self._local])


def training(n: int, read: Read, batch_size: int, seed: int, local: np.ndarray | None = None) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled batches. Each epoch has every row once, in a new order.

    `get_state` and `set_state` of the iterator read and set its position. n: number of rows. batch_size: rows per
    batch, over all processes. local [b]: positions in a batch that this process reads, such as `sharding.local_rows`;
    all if None.
    """
    rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    read_local = rows.map_with_index(_ReadLocal(read, np.arange(batch_size) if local is None else local))
    return iter(read_local.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation(n: int, read: Read, batch_size: int, local: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of equal size with every row once, in order; of each batch, the rows that this process reads.

    `valid` [b] is False for rows that only pad the last batch. n: number of rows. batch_size, local: see `training`.
    """
    for first in range(0, n, batch_size):
        rows = first + (np.arange(batch_size) if local is None else local)
        valid = rows < n
        yield {**read(np.where(valid, rows, 0)), "valid": valid}
