"""Connects several processes for one training, and ends each process if the others are lost or make no progress.

A launcher sets JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID for every
process. Without these variables there is one process, and this module does not import JAX.
"""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

from geotoken_jax.settings import SettingsError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
#: Exit status of a process that continues when the same command is run again (EX_TEMPFAIL of sysexits.h).
RESTART = 75
#: Seconds that the first process waits before it ends after an error. When it ends, JAX aborts all others (SIGABRT);
#: the wait lets them end by themselves, with a message.
_LINGER_S = 3.0
#: Beginnings of XLA errors that the end of another process can cause. All other errors come from this process.
_LOSSES = ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """config.watch. connect_s: seconds until all processes must be connected. stalled_s: seconds that a step, a read, a
    batch of validation or a checkpoint may take; use more than compiling a step takes."""

    connect_s: float
    stalled_s: float

    def __post_init__(self):
        for name, seconds in dataclasses.asdict(self).items():
            if not 1 <= seconds < 1e6:
                raise SettingsError(f"config.watch.{name} is {seconds}: use 1 second or more, below 1,000,000")


class _Watch(threading.Thread):
    """Ends the process with RESTART if it has reported no progress for too long.

    The thread counts the seconds that it waits. So the clock may be changed, and a process that is suspended (Ctrl-Z)
    and continued does not count as hanging.
    """

    def __init__(self, settings: WatchSettings):
        super().__init__(name="watch", daemon=True)
        self.settings = settings
        self.over = threading.Event()
        self.report("starting")

    def report(self, activity: str, connecting: bool = False) -> None:
        self.activity = activity
        self._last_report = (activity, connecting)  # a new object each time, so that `run` notices every report

    def run(self) -> None:
        report, waited_s, limit_s = None, 0, 1.0
        while waited_s < limit_s:
            if self.over.wait(1.0):
                return
            waited_s += 1
            if report is not self._last_report:
                report, waited_s = self._last_report, 0
                limit_s = self.settings.connect_s if report[1] else self.settings.stalled_s
        if report and report[1]:
            _end(
                RESTART,
                f"was {self.activity} for {limit_s:g} s: check that all processes run and can reach that address",
            )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        _end(RESTART, f"has made no progress for {limit_s:g} s, {self.activity}")


_watch: _Watch | None = None


def count() -> int:
    """Returns the number of processes. Raises SettingsError if an environment variable is missing or wrong."""
    if _ADDRESS not in os.environ:
        return 1
    values = {name: os.environ.get(name, "") for name in (_COUNT, _INDEX)}
    wrong = next((name for name, value in values.items() if not value.isdigit()), None)
    if wrong is None and int(values[_INDEX]) >= int(values[_COUNT]):
        wrong = _INDEX
    if wrong:
        raise SettingsError(
            f"{_ADDRESS} is set, but {wrong} is {values[wrong]!r}: set {_COUNT} to the number of processes and "
            f"{_INDEX} to 0, 1, ... in each of them, or unset all three"
        )
    return int(values[_COUNT])


def index() -> int:
    """Returns the index of this process, from 0. Process 0 writes all files that are not sharded."""
    return int(os.environ[_INDEX]) if count() > 1 else 0


@contextlib.contextmanager
def watched(settings: WatchSettings) -> Iterator[None]:
    """Watches this process: if it makes no progress inside the context, it ends with RESTART.

    Enter the context before calling `start`. If there are several processes, the watch continues after the context,
    because at exit JAX waits for all of them.
    """
    global _watch
    _watch = _Watch(settings)
    _watch.start()
    try:
        yield
    finally:
        if count() == 1:
            _watch.over.set()
            _watch = None


def report_progress(activity: str) -> None:
    """Reports progress to the watch. activity: next thing that may hang, such as "in step 12", for messages."""
    if _watch:
        _watch.report(activity)


def start() -> None:
    """Connects the processes. Call it before JAX initializes its devices.

    Afterwards an uncaught error ends this process at once, because JAX would wait for the other processes while they
    wait for this one. If the end of another process can have caused the error, the exit status is RESTART.
    """
    if count() == 1:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    sys.excepthook = _exit_on_error
    limits: Any = {}
    if _watch:
        _watch.report(f"connecting to the other processes at {os.environ[_ADDRESS]}", connecting=True)
        # After its own limits JAX aborts with a C++ stack and another status, so these must be longer than the watch's.
        connect, heartbeat = (int(2 * s) + 60 for s in (_watch.settings.connect_s, _watch.settings.stalled_s))
        limits = {"initialization_timeout": connect, "heartbeat_timeout_seconds": heartbeat}
    jax.distributed.initialize(os.environ[_ADDRESS], count(), index(), **limits)
    report_progress("starting")


def wait(name: str) -> None:
    """Waits until all processes have called this function with the same name."""
    if count() > 1:
        from jax.experimental import multihost_utils

        report_progress(f"waiting for the other processes: {name}")
        multihost_utils.sync_global_devices(name)


def is_process_loss(error: BaseException | None) -> bool:
    """Returns whether the end of another process can have caused an error, directly or as the cause of its cause."""
    if count() == 1:
        return False
    import jax

    while error:
        if isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_LOSSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(status: int) -> NoReturn:
    """Ends this process after an error. If there are other processes, it ends at once, without Python's cleanup."""
    if count() == 1:
        sys.exit(status)
    _end(status)


def _exit_on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if is_process_loss(error):
        _end(RESTART, f"has lost the other processes, {_watch.activity if _watch else 'after the start'}")
    _end(1)


def _end(status: int, reason: str = "") -> NoReturn:
    try:
        if reason:
            print(f"process {index()} of {count()} {reason}; run the same command again to continue", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if count() > 1 and index() == 0:
            time.sleep(_LINGER_S)
    finally:
        os._exit(status)
