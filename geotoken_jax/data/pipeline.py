"""Batches for the train loop: rows are shuffled and cut into global batches, and each process reads its share.

Shuffling and batching move row numbers only, and a batch is read in one call. Grain would read one record at a time,
which is 4-5 times slower (google/grain#688). The sequence of global batches depends on the number of rows, the batch
size and the seed, but not on the number of processes. So a training can continue at a position in the sequence with
another number of processes.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from geotoken_jax.data.damage import Tolerant

#: Function from row numbers [b] to named arrays [b, ...].
Read = Callable[[np.ndarray], dict[str, np.ndarray]]


@runtime_checkable
class Varying(Protocol):
    """A reader that returns other data each time training reads a row, such as another random view of a photo."""

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the data of the rows, varied per example.

        examples [b]: index of each row in the sequence of all training examples, in which rows repeat.
        """
        ...


class _ReadLocal(grain.transforms.MapWithIndex):
    """Reads the rows of a global batch that this process needs. local: positions of these rows in the batch."""

    def __init__(self, read: Read, local: np.ndarray, tolerant: Tolerant):
        self._read, self._local, self._tolerant = read, local, tolerant

    def map_with_index(self, index: int, rows: np.ndarray) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(self._read, Varying):
            examples = index * len(rows) + self._local
            return self._tolerant.read(self._read.vary, rows[self._local], examples)[0]
        return self._tolerant.read(self._read, rows[self._local])[0]


def training(
    n: int, read: Read, batch_size: int, seed: int, local: np.ndarray | None = None, max_damaged: float = 0.0
) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled batches. Each epoch has every row once, in a new order.

    `get_state` and `set_state` of the iterator read and set its position. n: number of rows. batch_size: rows per
    batch, over all processes. local [b]: positions in a batch that this process reads, such as `sharding.local_rows`;
    all if None. max_damaged: largest share of damaged rows. In place of a damaged row, the next row is read.
    """
    rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    local = np.arange(batch_size) if local is None else local
    read_local = rows.map_with_index(_ReadLocal(read, local, Tolerant(n, max_damaged)))
    return iter(read_local.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation(
    n: int, read: Read, batch_size: int, local: np.ndarray | None = None, max_damaged: float = 0.0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of equal size that contain every row once, in order. A process gets its own rows of each batch.

    `valid` [b] is False for rows that only pad the last batch, and for damaged rows. n: number of rows. batch_size,
    local, max_damaged: see `training`.
    """
    tolerant = Tolerant(n, max_damaged)
    for first in range(0, n, batch_size):
        rows = first + (np.arange(batch_size) if local is None else local)
        valid = rows < n
        batch, whole = tolerant.read(read, np.where(valid, rows, 0))
        yield {**batch, "valid": valid & whole}
