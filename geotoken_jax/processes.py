"""Connects the processes of one training. Ends a process if it makes no progress, or if another process is lost.

A launcher sets the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
JAX_PROCESS_ID for every process. Without these variables there is one process, and this module does not import JAX.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

from geotoken_jax.settings import SettingsError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
#: Exit status of a process that ends early, if the same command continues its work (EX_TEMPFAIL of sysexits.h).
RESTART = 75
#: Seconds that process 0 waits after an error before it ends. When process 0 has ended, JAX ends all other processes.
#: During the wait they can end by themselves, with their own messages.
_LINGER_S = 3.0
#: If JAX's coordination service does not answer within this number of seconds, it is lost. Usually it takes 0.001 s.
_ANSWER_S = 2.0
_IMPORT_TIME = time.monotonic()
#: Beginnings of XLA errors that the end of another process can cause. All other errors come from this process.
_LOSS_ERRORS = ("UNAVAILABLE:", "UNKNOWN:", "INTERNAL:", "ABORTED:", "CANCELLED:", "DEADLINE_EXCEEDED:")


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """config.watch: limits in seconds. A process that exceeds a limit ends.

    connect_s: limit for connecting all processes. stalled_s: limit for the first step, the first batch of validation
    and every checkpoint; compiling a step must take less. step_s: limit for each later step, read or batch of
    validation. lost_s: limit for the time without a heartbeat of a process; then this process is lost, and all others
    end.
    """

    connect_s: float
    stalled_s: float
    step_s: float
    lost_s: float

    def __post_init__(self):
        for name, seconds in dataclasses.asdict(self).items():
            if not 1 <= seconds < 1e6:
                raise SettingsError(f"config.watch.{name} is {seconds}: use 1 second or more, below 1,000,000")


class _Watch(threading.Thread):
    """Ends the process with exit status RESTART if it has reported no progress for too long.

    The thread adds up its waits of one second, and does not read the clock. So a change of the clock has no effect, and
    the time for which a process was suspended (Ctrl-Z) is not counted.
    """

    def __init__(self, settings: WatchSettings):
        super().__init__(name="watch", daemon=True)
        self.settings = settings
        self.over = threading.Event()
        self.report("starting")

    def report(self, activity: str, limit: str = "stalled_s") -> None:
        self.activity = activity
        self._last_report = (activity, limit)  # a new object each time, so that `run` notices every report

    def run(self) -> None:
        report, waited_s, limit_s = None, 0, 1.0
        while waited_s < limit_s:
            if self.over.wait(1.0):
                return
            waited_s += 1
            if report is not self._last_report:
                report, waited_s = self._last_report, 0
                limit_s = getattr(self.settings, report[1])
                if count() > 1:
                    _catch_abort()  # after every report, because libtpu replaces the handler when it finds its devices
        if report and report[1] == "connect_s":
            _end(
                RESTART,
                f"was {self.activity} for {limit_s:g} s: check that all processes run and can reach that address",
            )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        _end(RESTART, f"has made no progress for {limit_s:g} s, {self.activity}")


#: The watch of this process, and the start time that `take_start` returns on its next call.
_watch: _Watch | None = None
_untaken_start: float | None = None


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
    """Watches this process. If it makes no progress inside the context, it ends with exit status RESTART.

    Enter the context before calling `start`. If there are several processes, the watch continues after the context,
    because at exit JAX waits for the other processes.
    """
    global _watch, _untaken_start
    _watch, _untaken_start = _Watch(settings), _IMPORT_TIME
    _watch.start()
    try:
        yield
    finally:
        if count() == 1:
            _watch.over.set()
            _watch = None


def report_progress(activity: str, repeated: bool = False) -> None:
    """Reports progress to the watch.

    activity: text for messages on the work that begins now, such as "in step 12". repeated: whether this process has
    done the same work before. Then nothing must be compiled, and the limit is WatchSettings.step_s instead of
    stalled_s.
    """
    if _watch:
        _watch.report(activity, "step_s" if repeated else "stalled_s")


def take_start() -> float:
    """Returns the time (time.monotonic) from which the caller measures a duration.

    The first call inside `watched` returns the time at which this process started, so the duration includes imports and
    connecting. Every other call returns the present time.
    """
    global _untaken_start
    start, _untaken_start = _untaken_start, None
    return time.monotonic() if start is None else start


def start() -> None:
    """Connects the processes. Call it before JAX initializes its devices.

    After this call, an uncaught error ends this process at once. JAX would wait for the other processes at exit, while
    they wait for this process. If the end of another process can have caused the error, the exit status is RESTART.
    """
    if count() == 1:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    sys.excepthook = _exit_on_error
    limits: Any = {}
    if _watch:
        _watch.report(f"connecting to the other processes at {os.environ[_ADDRESS]}", "connect_s")
        limits = {
            # After this time JAX ends the process without our message, so it is longer than the limit of the watch.
            "initialization_timeout": int(2 * _watch.settings.connect_s) + 60,
            # JAX sends heartbeats from a thread in C++. Python code that runs for long does not delay them.
            "heartbeat_timeout_seconds": math.ceil(_watch.settings.lost_s),
        }
    jax.distributed.initialize(os.environ[_ADDRESS], count(), index(), **limits)
    _catch_abort()
    report_progress("starting")


def wait(name: str) -> None:
    """Waits until all processes have called this function with the same name."""
    if count() > 1:
        from jax.experimental import multihost_utils

        report_progress(f"waiting for the other processes: {name}")
        multihost_utils.sync_global_devices(name)


def first(value: Any) -> Any:
    """Returns the value of process 0 in all processes. All must call this function. value: any JSON value."""
    if count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    same_length = np.frombuffer(text[:length].ljust(length), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(same_length), np.uint8)))


def gather(number: int) -> list[int]:
    """Returns the numbers of all processes, in the order of their indices. All must call this function."""
    if count() == 1:
        return [number]
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.int32(number))).tolist()


def is_process_loss(error: BaseException | None) -> bool:
    """Returns whether the end of another process can have caused an error, directly or through its chain of causes."""
    if count() == 1:
        return False
    import jax

    while error:
        # If a step has failed, JAX raises XLA's error as a ValueError when the step's results are copied to the host.
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and str(error).startswith(_LOSS_ERRORS):
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


def _catch_abort() -> None:
    """Makes this process end with exit status RESTART if another process or JAX's coordination service is lost.

    In this case JAX calls abort() in a thread of its own. JAX has an option for a callback instead, but a callback in
    Python fails with std::bad_cast. Aborts for other reasons have their usual effect.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))  # signal.signal cannot stop an abort


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    if _is_service_lost():
        _end(RESTART, f"has lost the other processes, {_watch.activity if _watch else 'after the start'}")


def _is_service_lost() -> bool:
    """Returns whether JAX has lost its coordination service.

    Calls to the service then fail, or they hang, because JAX holds a lock while it aborts the process.
    """
    import jax
    from jax._src import distributed

    answered = threading.Event()

    def ask() -> None:
        try:
            distributed.global_state.client.key_value_try_get("geotoken")  # pyright: ignore
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("NOT_FOUND"):
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return not answered.wait(_ANSWER_S)


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
