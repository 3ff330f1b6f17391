"""Faults on a pod: each is detected in time, reported in one sentence, and ends with the right exit status.

As a program it is one process of a run with a fault: python -m tests.test_faults JSON.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.common import get_config
from geotoken_jax import checkpoint, errors, processes, sharding
from geotoken_jax.data import pipeline
from geotoken_jax.manifests import StageError
from geotoken_jax.settings import SettingsError
from geotoken_jax.train import loop, metrics
from tests import pod
from tests.test_train import OPTIMIZER, Interrupted, LineTask, Stopping, read

#: Steps of a run, the step before which the fault happens, and steps between checkpoints.
STEPS, STRUCK, SAVED = 12, 7, 4
#: What the other processes do then. JAX starts a step before the one before has ended.
IN_STEP = rf"in step ({STRUCK}|{STRUCK + 1})"
#: Seconds without progress after which training ends, once all is compiled; a test waits this long.
STALLED_S = 5.0
DAY_S = 86_400.0


def die(folder: Path) -> None:
    """Kills this process after the first checkpoint is complete."""
    while not (folder / "checkpoints" / str(SAVED)).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


#: Faults of a run's last process: name -> function of the folder, called before a step.
FAULTS: dict[str, Callable[[Path], object]] = {
    "killed": die,
    "hung": lambda folder: threading.Event().wait(),
    "stopped": lambda folder: os.kill(os.getpid(), signal.SIGSTOP),  # as a host that hangs: its sockets stay open
    "unreadable": lambda folder: None,  # see `main`
}


class Struck(Stopping):
    """A training input with a delay per batch. events: number of a batch, from 1 -> function called before it."""

    def __init__(self, batches, events: dict[int, Callable[[], object]], delay_s: float = 0.0):
        super().__init__(batches, 0)
        self._events, self._delay_s = events, delay_s

    def __next__(self):
        self.n += 1
        time.sleep(self._delay_s)
        if self.n in self._events:
            self._events[self.n]()
        return next(self.batches)


def watch(**changes: float) -> processes.WatchSettings:
    """Returns long limits, so that only the changed ones end a run."""
    limits = dict(connect_s=300.0, stalled_s=300.0, step_s=300.0, lost_s=300.0)
    return processes.WatchSettings(**{**limits, **changes})


def hurry() -> None:
    """Shortens the time that a step may take, since all programs are compiled."""
    assert processes._watch
    processes._watch.settings = watch(step_s=STALLED_S)


def train(folder: Path, mesh: tuple[int, int, int] = (-1, 1, 1), make_input=lambda x: x) -> Any:
    """Trains the linear model of test_train, in any number of processes, and returns the training input."""
    options = loop.TrainSettings(
        batch_size=8, accumulate=1, examples=8 * STEPS, evaluate_every=SAVED, log_every=1, seed=0, ema=0.0,
        max_skipped=0, profile=(0, 0), profiler_port=0, save_every_s=0.0, keep=2, wandb="", optimizer=OPTIMIZER,
        gradient_dtype="float32", epochs=0, max_damaged=0.0,
    )  # fmt: skip
    axes = sharding.MeshSettings(*mesh)
    devices = sharding.make_mesh(axes, jax.devices()[: np.prod(mesh)] if min(mesh) > 0 else None)
    local = sharding.local_rows(devices, 8)
    batches = make_input(pipeline.training(20, read, 8, 0, local))
    data = loop.Data(batches, lambda: pipeline.evaluation(12, read, 8, local), 20)
    loop.run(LineTask(), options, devices, folder, data, "train")
    return batches


def unreadable(step: int) -> Callable[..., Any]:
    """Returns a method for Checkpoints that restores all steps but one, as with a stale file handle of NFS."""
    restore = checkpoint.Checkpoints.restore

    def refuse(self: checkpoint.Checkpoints, wanted: int, abstract: Any) -> Any:
        if wanted == step:
            raise OSError(116, "Stale file handle")
        return restore(self, wanted, abstract)

    return refuse


def main() -> None:
    """Runs with the options of the command line. The last process has the fault, and a clock that is a day ahead."""
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    events: dict[int, Callable[[], object]] = {STRUCK - 1: hurry} if options["fault"] == "hung" else {}
    delay_s = 0.0
    if processes.index() == processes.count() - 1:
        events[STRUCK], delay_s = (lambda: FAULTS[options["fault"]](folder)), options["delay_s"]
        true = time.time
        time.time = lambda: true() + DAY_S
        if options["fault"] == "unreadable":
            checkpoint.Checkpoints.restore = unreadable(2 * SAVED)
    with processes.watched(watch(lost_s=options["lost_s"])):
        processes.start()
        batches = train(folder, make_input=lambda batches: Struck(batches, events, delay_s))
    print(f"batches read: {batches.n}")


@contextlib.contextmanager
def cleared(running: list[subprocess.Popen]) -> Iterator[list[subprocess.Popen]]:
    """Leaves no process behind."""
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def several(
    folder: Path, fault: str, n: int = 2, delay_s: float = 0.0, lost_s: float = 300.0
) -> contextlib.AbstractContextManager[list[subprocess.Popen]]:
    """Starts a run in n processes, of which the last has a fault."""
    return cleared(pod.start(n, n, "tests.test_faults", folder=folder, fault=fault, delay_s=delay_s, lost_s=lost_s))


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Returns status and output of a process that ends by itself."""
    output, _ = process.communicate(timeout=240)
    return process.returncode, output.decode()


def losses(folder: Path) -> np.ndarray:
    return pod.sequence(folder, "train/loss", "train/gradient_norm")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> np.ndarray:
    """The losses of a run without faults, in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder)
    return losses(folder)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, int, str]:
    """A run in two processes whose second is killed: its folder, and the first one's exit status and output."""
    folder = tmp_path_factory.mktemp("broken")
    with several(folder, "killed") as (first, second):
        assert ended(second)[0] == -signal.SIGKILL
        began = time.monotonic()
        code, output = ended(first)
        assert time.monotonic() - began < 60
    return folder, code, output


@pytest.mark.slow
def test_a_lost_worker_ends_the_others_to_be_started_again(broken):
    _, code, output = broken
    assert code == processes.RESTART, output
    assert re.search(rf"process 0 of 2 has lost the other processes, {IN_STEP}; run the same command again to", output)


@pytest.mark.slow
def test_clocks_that_are_days_apart_and_a_clock_that_is_set_back_change_nothing(broken, unbroken, monkeypatch):
    folder, _, _ = broken
    before = losses(folder)
    assert SAVED <= len(before) < STEPS
    np.testing.assert_allclose(before, unbroken[: len(before)], rtol=1e-5)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() - 2 * DAY_S)  # the checkpoint is two days ahead of the clock
    # Resumes in one process on other devices, and reads no batch twice.
    train(folder, make_input=lambda batches: Stopping(batches, STEPS - SAVED))
    found = losses(folder)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, unbroken, rtol=1e-5)


@pytest.mark.slow
def test_a_slow_worker_is_named_and_one_that_hangs_ends_all_with_where_it_was(tmp_path):
    with several(tmp_path, "hung", delay_s=0.5) as (first, second):
        outputs = {process: ended(process) for process in (second, first)}
    for i, process, where in ((0, first, IN_STEP), (1, second, f"reading the photos of step {STRUCK}")):
        code, output = outputs[process]
        assert code == processes.RESTART, output
        assert re.search(rf"process {i} of 2 has .*, {where}; run the same command again", output), output
    assert f"has made no progress for {STALLED_S:g} s" in outputs[second][1]
    assert "in __next__" in outputs[second][1]  # the stack
    slow = [line for line in pod.lines(tmp_path) if "slowest_process" in line][1:]  # the first step compiles
    assert len(slow) > 3 and {line["slowest_process"] for line in slow} == {1}
    assert all(0 <= line["input_wait"] < line["slowest_input_wait"] <= 1 for line in slow)


@pytest.mark.slow
def test_a_worker_that_stops_answering_is_lost_after_its_time(tmp_path):
    """Its sockets stay open, so that no collective fails, and the limits of the steps are far away."""
    with several(tmp_path, "stopped", lost_s=10.0) as (first, second):
        os.waitid(os.P_PID, second.pid, os.WSTOPPED)
        began = time.monotonic()
        code, output = ended(first)
        assert time.monotonic() - began < 30
    assert code == processes.RESTART, output
    assert re.search(rf"process 0 of 2 has lost the other processes, {IN_STEP}; run the same command again to", output)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_one_of_four_that_is_lost_ends_the_others_within_two_minutes(tmp_path, fault):
    lost_s = get_config().watch["lost_s"]  # pyright: ignore
    with several(tmp_path, fault, n=4, lost_s=lost_s) as running:
        os.waitid(os.P_PID, running[-1].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        began = time.monotonic()
        outputs = [ended(process) for process in running[:-1]]
        took = time.monotonic() - began
    assert [code for code, _ in outputs] == 3 * [processes.RESTART], outputs
    assert took < 120
    print(f"{fault}: the others have left with {processes.RESTART} after {took:.1f} s")


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_read_by_none(tmp_path, unbroken):
    with pytest.raises(Interrupted):
        train(tmp_path, make_input=lambda batches: Stopping(batches, 2 * SAVED + 1))
    with several(tmp_path, "unreadable") as running:
        outputs = [ended(process) for process in running]
    assert [code for code, _ in outputs] == [0, 0], outputs
    for _, output in outputs:
        assert f"batches read: {STEPS - SAVED}\n" in output
    assert f"process 1 cannot read checkpoint {2 * SAVED} in {tmp_path}" in outputs[0][1]
    assert f"checkpoint {2 * SAVED} in {tmp_path}" in outputs[1][1] and "Stale file handle" in outputs[1][1]
    np.testing.assert_allclose(losses(tmp_path), unbroken, rtol=1e-5)


#: The first of two processes; it waits 2 s for the second, which never starts.
ALONE = """
from geotoken_jax import processes
with processes.watched(processes.WatchSettings(connect_s=2.0, stalled_s=300.0, step_s=300.0, lost_s=300.0)):
    processes.start()
"""

#: One of two processes that are connected and wait.
CONNECTED = """
import threading
from geotoken_jax import processes
with processes.watched(processes.WatchSettings(connect_s=300.0, stalled_s=300.0, step_s=300.0, lost_s=10.0)):
    processes.start()
    print("met", flush=True)
    threading.Event().wait()
"""


def alone(i: int, port: int, code: str = ALONE) -> subprocess.Popen:
    names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
    command, environment = [sys.executable, "-c", code], os.environ | names
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 1], ids=["no one comes", "unreachable coordinator"])
def test_processes_that_do_not_find_each_other_end_in_one_sentence(port, i):
    with cleared([alone(i, port)]) as (process,):
        code, output = ended(process)
    assert code == processes.RESTART, output
    assert output == (
        f"process {i} of 2 was connecting to the other processes at 127.0.0.1:{port} for 2 s: check that all processes "
        "run and can reach that address; run the same command again to continue\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("lost", [0, 1], ids=["first", "second"])
def test_a_process_that_is_lost_ends_the_other_to_be_started_again(port, lost, sent):
    """The first process runs JAX's service, without which JAX aborts the others."""
    with cleared([alone(i, port, CONNECTED) for i in (0, 1)]) as running:
        for process in running:
            assert process.stdout and process.stdout.readline() == b"met\n"
        running[lost].send_signal(sent)
        began = time.monotonic()
        code, output = ended(running[1 - lost])
    assert code == processes.RESTART, output
    assert f"process {1 - lost} of 2 has lost the other processes, starting; run the same command again" in output
    assert time.monotonic() - began < 30


def test_another_abort_keeps_its_status(port):
    code = CONNECTED.replace("threading.Event().wait()", "import os; os.abort()")
    with cleared([alone(0, port, code), alone(1, port, CONNECTED)]) as running:
        code, output = ended(running[0])
    assert code == -signal.SIGABRT and "has lost" not in output


def test_a_full_disk_is_one_sentence_and_room_is_all_it_needs(tmp_path, unbroken):
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"

    def fill() -> None:
        file.rename(kept)
        file.symlink_to("/dev/full")

    sentence = rf"{tmp_path} cannot be written to \(No space left on device\): free some space there, and run the same"
    with pytest.raises(StageError, match=sentence):
        train(tmp_path, make_input=lambda batches: Struck(batches, {STRUCK: fill}))
    assert issubclass(StageError, errors.UserError)  # so it ends with status 2: a restart would find it full again
    kept.rename(file)
    train(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), unbroken, rtol=1e-5)


@pytest.mark.slow
def test_a_job_shrinks_to_half_its_devices_and_grows_again(tmp_path, unbroken):
    for mesh in ((8, 1, 1), (2, 2, 1)):
        with pytest.raises(Interrupted):  # one step after a checkpoint
            train(tmp_path, mesh, lambda batches: Stopping(batches, SAVED + 1))
    train(tmp_path, (4, 2, 1), lambda batches: Stopping(batches, STEPS - 2 * SAVED))
    found = losses(tmp_path)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, unbroken, rtol=1e-5)


@pytest.mark.parametrize("name, seconds", [("connect_s", 0.0), ("stalled_s", -1.0), ("step_s", 0.5), ("lost_s", 0.0)])
def test_a_patience_that_is_none_is_refused(name, seconds):
    with pytest.raises(SettingsError, match=rf"config\.watch\.{name} is {seconds}"):
        watch(**{name: seconds})


if __name__ == "__main__":
    main()


def test_events_for_tensorboard_that_find_no_room_are_an_error_and_no_hang(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"), metrics.Writer(tmp_path, 0) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
            for step in range(1, 1000):
                writer.write(step, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
