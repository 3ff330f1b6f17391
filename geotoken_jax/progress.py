"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")
#: Seconds between two plain lines.
LOG_EVERY = 15.0


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "it", step: int = 1) -> Iterator[T]:
    """Yields the items, showing how many of `total` are done; one item counts `step` units."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.add(step)


class Progress:
    """Counts up to `total` units of `what`; `note` shows beside the rate (a loss, a reason).

    shown: False where another process shows the same.
    """

    def __init__(self, what: str, total: int | None, unit: str = "it", done: int = 0, shown: bool = True):
        self._bar = tqdm.tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=True,
            initial=done,
            disable=not (shown and sys.stderr.isatty()),
            leave=False,
        )
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._first, self._done = done, done
        self._began = self._last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bar.close()
        if self._shown and not any(error):
            seconds = time.monotonic() - self._began
            print(f"{self._what}: {self._done:,} {self._unit} in {seconds:.0f} s", file=sys.stderr)

    def add(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._bar.update(n)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._last > LOG_EVERY:
            self._last = now
            rate = (self._done - self._first) / (now - self._began)
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
            total = f" of {self._total:,}" if self._total else ""
            print(
                f"{self._what}: {self._done:,}{total} {self._unit}, {rate:,.0f}/s{left} {note}".rstrip(),
                file=sys.stderr,
            )
