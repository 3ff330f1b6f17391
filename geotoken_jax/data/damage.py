"""Reads training data in which some records are damaged."""

import itertools
import sys
import threading
from collections.abc import Callable

import numpy as np

from geotoken_jax.settings import SettingsError
from geotoken_jax.shards import DamagedError

#: Function from row numbers [b] to named arrays [b, ...]. A function `vary` (data.pipeline.Varying) takes the index of
#: each example too, [b].
_ReadRows = Callable[..., dict[str, np.ndarray]]


class Tolerant:
    """Reads rows. In place of a damaged row it reads the next row that is not damaged.

    This replacement depends only on the data, so a resumed training reads the same rows. Each damaged row is named on
    standard error and counted once.

    n: number of rows. share: largest accepted share of damaged rows; if 0, the error of a damaged row is raised.
    """

    def __init__(self, n: int, share: float):
        self._n, self._share = n, share
        self._lock = threading.Lock()
        #: Damaged row -> the row that is read instead.
        self.replaced: dict[int, int] = {}

    def read(
        self, function: _ReadRows, rows: np.ndarray, *more: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns function(rows, *more) with damaged rows replaced, and for each row whether it is not replaced.

        Raises SettingsError if the share of damaged rows found until now is too large.
        """
        while True:
            taken = np.array([self.replaced.get(int(row), row) for row in rows], np.int64) if self.replaced else rows
            try:
                return function(taken, *more), taken == rows
            except DamagedError:
                if not self._share or not self._examine(function, rows, taken, more):
                    raise

    def _examine(self, function: _ReadRows, rows: np.ndarray, taken: np.ndarray, more: tuple[np.ndarray, ...]) -> bool:
        """Finds the damaged rows in `taken`, and sets their replacements.

        Returns whether the replacement of a requested row has changed, so that another attempt makes sense. rows:
        requested rows. taken: rows that were read for them, each the requested row or its replacement at that time.
        """
        with self._lock:
            for i, row in enumerate(taken.tolist()):
                if row not in self.replaced:
                    self._find(row, lambda at, i=i: function(np.array([at]), *(part[i : i + 1] for part in more)))
            return [self.replaced.get(row, row) for row in rows.tolist()] != taken.tolist()

    def _find(self, row: int, read: Callable[[int], object]) -> None:
        """Tests whether a row is damaged. If so, sets the row to read in its place."""
        damaged = []
        for candidate in itertools.chain(range(row, self._n), range(row)):
            if candidate in self.replaced:
                continue
            try:
                read(candidate)
            except DamagedError as error:
                damaged.append(candidate)
                self._report(error, len(self.replaced) + len(damaged))
            else:
                self.replaced.update(dict.fromkeys(damaged, candidate))
                return

    def _report(self, error: DamagedError, count: int) -> None:
        if count > self._share * self._n:
            raise SettingsError(
                f"max_damaged is {self._share}, but {count:,} of {self._n:,} records are damaged, the last one "
                f"{error.place}: make them again with `geotoken verify WORKDIR --mend --config=FILE`, or raise "
                "max_damaged"
            ) from None
        print(
            f"skipped {error.place}, which is damaged; {count:,} of {self._n:,} records are damaged so far",
            file=sys.stderr,
        )
