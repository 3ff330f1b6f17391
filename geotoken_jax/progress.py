"""Shows the progress of long work, with rate and time left: a bar on a terminal, a line every 15 s in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")
#: Seconds between two lines in a log.
LOG_EVERY = 15.0


def track(items: Iterable[T], label: str, total: int | None = None, unit: str = "it", step: int = 1) -> Iterator[T]:
    """Yields the items and shows the progress. total: number of units, unknown if None. step: units per item."""
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.add(step)


class Progress:
    """A progress bar on a terminal, and lines in a log.

    label: name of the work. total: number of units, unknown if None. done: number of units that an earlier run has done
    already. shown: whether to print anything; use False if another process shows the same progress.
    """

    def __init__(self, label: str, total: int | None, unit: str = "it", done: int = 0, shown: bool = True):
        self._bar = tqdm.tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=True,
            initial=done,
            disable=not (shown and sys.stderr.isatty()),
            leave=False,
        )
        self._label, self._total, self._unit, self._shown = label, total, unit, shown
        self._done = done
        self._began = self._last = time.monotonic()
        #: Number of units and time at the end of the first `add`. The rate is computed from there, because the first
        #: units include compilation.
        self._start: tuple[int, float] | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()
        if self._shown and not any(error):
            seconds = time.monotonic() - self._began
            print(f"{self._label}: {self._done:,} {self._unit} in {seconds:.0f} s", file=sys.stderr)

    def add(self, n: int = 1, note: str = "") -> None:
        """Counts n more units. note: text shown after the rate, such as a loss."""
        self._done += n
        self._bar.update(n)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        self._start = self._start or (self._done, now)
        if self._shown and self._bar.disable and now - self._last > LOG_EVERY:
            self._last = now
            total = f" of {self._total:,}" if self._total else ""
            text = f"{self._label}: {self._done:,}{total} {self._unit}"
            if gained := self._done - self._start[0]:
                rate = gained / (now - self._start[1])
                left = f", {(self._total - self._done) / rate:.0f} s left" if self._total else ""
                text += f", {rate:,.0f}/s{left}"
            print(f"{text} {note}".rstrip(), file=sys.stderr)
