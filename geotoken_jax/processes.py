"""Several processes that train as one: who they are, how they wait for each other, and how each leaves without them.

A launcher gives every process JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
Without them a process is alone, and JAX is not even imported.
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
#: Exit status of what goes on when the same command is started again (sysexits' EX_TEMPFAIL).
RESTART = 75
#: Seconds that the first process stays once it has failed: JAX aborts (SIGABRT) those that are left without it, and
#: until then they may have noticed themselves.
_LINGER_S = 3.0
#: How an error of XLA begins where it can come of another process's end; others are this process's own.
_LOSSES = ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """connect_s: seconds that the processes have to find each other. stalled_s: seconds that one may stand still in a
    step, a read, a batch of validation or a checkpoint: more than compiling a step takes."""

    connect_s: float
    stalled_s: float

    def __post_init__(self):
        for name, seconds in dataclasses.asdict(self).items():
            if not 1 <= seconds < 1e6:
                raise SettingsError(f"config.watch.{name} is {seconds}: it is seconds, from 1 to a million")


class _Watch(threading.Thread):
    """Ends the process, with RESTART, once nothing has been heard of it for too long.

    It counts seconds that it has waited itself: nobody's clock matters, and a process that was stopped as a whole
    (Ctrl-Z) and goes on is not taken for one that hangs.
    """

    def __init__(self, settings: WatchSettings):
        super().__init__(name="watch", daemon=True)
        self.settings = settings
        self.over = threading.Event()
        self.hear("starting")

    def hear(self, doing: str, meeting: bool = False) -> None:
        self.doing = doing
        self._heard = (doing, meeting)  # another object each time, and set in one step

    def run(self) -> None:
        heard, quiet_s, limit_s = None, 0, 1.0
        while quiet_s < limit_s:
            if self.over.wait(1.0):
                return
            quiet_s += 1
            if heard is not self._heard:
                heard, quiet_s = self._heard, 0
                limit_s = self.settings.connect_s if heard[1] else self.settings.stalled_s
        if heard and heard[1]:
            _end(RESTART, f"was {self.doing} for {limit_s:g} s: see that all run and reach that address")
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        _end(RESTART, f"has stood still for {limit_s:g} s, {self.doing}")


_watch: _Watch | None = None


def count() -> int:
    """Returns how many processes there are. Raises SettingsError if the environment names them in part, or wrongly."""
    if _ADDRESS not in os.environ:
        return 1
    values = {name: os.environ.get(name, "") for name in (_COUNT, _INDEX)}
    wrong = next((name for name, value in values.items() if not value.isdigit()), None)
    if wrong is None and int(values[_INDEX]) >= int(values[_COUNT]):
        wrong = _INDEX
    if wrong:
        raise SettingsError(
            f"{_ADDRESS} is set and {wrong} is {values[wrong]!r}: set {_COUNT} to the number of processes and {_INDEX} "
            "to 0, 1, ... in each of them, or unset them all"
        )
    return int(values[_COUNT])


def index() -> int:
    """Returns this process's number; the first one writes what only one may write."""
    return int(os.environ[_INDEX]) if count() > 1 else 0


@contextlib.contextmanager
def watched(settings: WatchSettings) -> Iterator[None]:
    """Ends this process with RESTART where it stands still inside. Goes around `start`: one of several processes is
    watched to its very end, where all of them meet once more."""
    global _watch
    _watch = _Watch(settings)
    _watch.start()
    try:
        yield
    finally:
        if count() == 1:
            _watch.over.set()
            _watch = None


def alive(doing: str) -> None:
    """Says what this process does next, of all that may hang, such as "in step 12"."""
    if _watch:
        _watch.hear(doing)


def start() -> None:
    """Connects the processes; must come before JAX looks for devices.

    From here on an error that nobody catches ends this process at once: JAX would first wait for the others, which wait
    for this one. Where the error can come of another process's end, the status is RESTART.
    """
    if count() == 1:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    sys.excepthook = _leave_by
    limits: Any = {}
    if _watch:
        _watch.hear(f"looking for the others at {os.environ[_ADDRESS]}", meeting=True)
        # At the end of its own limits JAX aborts, with a stack of C++ and no status of ours: ours come first.
        connect, heartbeat = (int(2 * s) + 60 for s in (_watch.settings.connect_s, _watch.settings.stalled_s))
        limits = {"initialization_timeout": connect, "heartbeat_timeout_seconds": heartbeat}
    jax.distributed.initialize(os.environ[_ADDRESS], count(), index(), **limits)
    alive("starting")


def wait(where: str) -> None:
    """Returns when all processes have come to the same place."""
    if count() > 1:
        from jax.experimental import multihost_utils

        alive(f"waiting for the others: {where}")
        multihost_utils.sync_global_devices(where)


def is_loss(error: BaseException | None) -> bool:
    """Says whether an error, or what it came of, can come of another process's end."""
    if count() == 1:
        return False
    import jax

    while error:
        if isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_LOSSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(status: int) -> NoReturn:
    """Ends this process because it has failed; where there are others, at once, for they wait for it in vain."""
    if count() == 1:
        sys.exit(status)
    _end(status)


def _leave_by(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if is_loss(error):
        _end(RESTART, f"has lost the others, {_watch.doing if _watch else 'at work'}")
    _end(1)


def _end(status: int, why: str = "") -> NoReturn:
    try:
        if why:
            print(f"process {index()} of {count()} {why}; the same command goes on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if count() > 1 and index() == 0:
            time.sleep(_LINGER_S)
    finally:
        os._exit(status)
