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

import jax
import numpy as np
import pytest

from geotoken_jax import cli, processes, sharding
from geotoken_jax.data import pipeline
from geotoken_jax.manifests import StageError
from geotoken_jax.settings import SettingsError
from geotoken_jax.train import loop, metrics
from tests import pod
from tests.test_train import OPTIMIZER, Interrupted, LineTask, Stopping, read

#: Steps of a run, the step before which the fault happens, and steps between checkpoints.
STEPS, STRUCK, SAVED = 12, 7, 4
#: Seconds without progress after which training ends, once all is compiled; a test waits this long.
STALLED_S = 5.0
DAY_S = 86_400.0


def die(folder: Path) -> None:
    """Kills this process after the first checkpoint is complete."""
    while not (folder / "checkpoints" / str(SAVED)).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


#: Faults of a run's second process: name -> function of the folder.
FAULTS: dict[str, Callable[[Path], object]] = {"killed": die, "hung": lambda folder: threading.Event().wait()}


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


def hurry() -> None:
    """Shortens the time that this process may stand still, since all programs are compiled."""
    assert processes._watch
    processes._watch.settings = processes.WatchSettings(connect_s=300.0, stalled_s=STALLED_S)


def train(folder: Path, mesh: tuple[int, int, int] = (-1, 1, 1), make_input=lambda x: x) -> None:
    """Trains the linear model of test_train, in any number of processes."""
    options = loop.TrainSettings(
        batch_size=8, accumulate=1, examples=8 * STEPS, evaluate_every=SAVED, log_every=1, seed=0, ema=0.0,
        max_skipped=0, profile=(0, 0), wandb="", optimizer=OPTIMIZER,
    )  # fmt: skip
    axes = sharding.MeshSettings(*mesh)
    devices = sharding.make_mesh(axes, jax.devices()[: np.prod(mesh)] if min(mesh) > 0 else None)
    local = sharding.local_rows(devices, 8)
    batches = make_input(pipeline.training(20, read, 8, 0, local))
    data = loop.Data(batches, lambda: pipeline.evaluation(12, read, 8, local), 20)
    loop.run(LineTask(), options, devices, folder, data, "train")


def main() -> None:
    """Runs with the options of the command line. The second process has the fault, or a clock that is a day ahead."""
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    events: dict[int, Callable[[], object]] = {STRUCK - 1: hurry} if options["fault"] == "hung" else {}
    delay_s = 0.0
    if processes.index():
        events[STRUCK], delay_s = (lambda: FAULTS[options["fault"]](folder)), options["delay_s"]
        true = time.time
        time.time = lambda: true() + DAY_S
    with processes.watched(processes.WatchSettings(connect_s=300.0, stalled_s=300.0)):
        processes.start()
        train(folder, make_input=lambda batches: Struck(batches, events, delay_s))


@contextlib.contextmanager
def cleared(running: list[subprocess.Popen]) -> Iterator[list[subprocess.Popen]]:
    """Leaves no process behind."""
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def two(folder: Path, fault: str, delay_s: float = 0.0) -> contextlib.AbstractContextManager[list[subprocess.Popen]]:
    """Starts a run in two processes, of which the second has a fault."""
    return cleared(pod.start(2, 2, "tests.test_faults", folder=folder, fault=fault, delay_s=delay_s))


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
    with two(folder, "killed") as (first, second):
        assert ended(second)[0] == -signal.SIGKILL
        began = time.monotonic()
        code, output = ended(first)
        assert time.monotonic() - began < 60  # JAX by itself would end with SIGABRT after 100 s
    return folder, code, output


def test_a_lost_worker_ends_the_others_to_be_started_again(broken):
    _, code, output = broken
    assert code == processes.RESTART, output
    assert f"process 0 of 2 has lost the other processes, in step {STRUCK}; run the same command again to" in output


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


def test_a_slow_worker_is_named_and_one_that_hangs_ends_all_with_where_it_was(tmp_path):
    with two(tmp_path, "hung", delay_s=0.05) as (first, second):
        outputs = {process: ended(process) for process in (second, first)}
    for i, process, where in ((0, first, f"in step {STRUCK}"), (1, second, f"reading the photos of step {STRUCK}")):
        code, output = outputs[process]
        assert code == processes.RESTART, output
        assert re.search(rf"process {i} of 2 has .*, {where}; run the same command again", output), output
    assert f"has made no progress for {STALLED_S:g} s" in outputs[second][1]
    assert "in __next__" in outputs[second][1]  # the stack
    slow = [line for line in pod.lines(tmp_path) if "slowest_process" in line][1:]  # the first step compiles
    assert len(slow) > 3 and {line["slowest_process"] for line in slow} == {1}
    assert all(0 <= line["input_wait"] < line["slowest_input_wait"] <= 1 for line in slow)


#: The first of two processes; it waits 2 s for the second, which never starts.
ALONE = """
from geotoken_jax import processes
with processes.watched(processes.WatchSettings(connect_s=2.0, stalled_s=300.0)):
    processes.start()
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


@pytest.mark.parametrize("i", [0, 1], ids=["no one comes", "unreachable coordinator"])
def test_processes_that_do_not_find_each_other_end_in_one_sentence(port, i):
    with cleared([alone(i, port)]) as (process,):
        code, output = ended(process)
    assert code == processes.RESTART, output
    assert output == (
        f"process {i} of 2 was connecting to the other processes at 127.0.0.1:{port} for 2 s: check that all processes "
        "run and can reach that address; run the same command again to continue\n"
    )


def test_a_lost_first_process_ends_the_others(port):
    """JAX ends them, because the first process ran its service. None of our code runs after that."""
    code = "import threading; from geotoken_jax import processes; processes.start(); print('met', flush=True)\n"
    with cleared([alone(i, port, code + "threading.Event().wait()") for i in (0, 1)]) as running:
        for process in running:
            assert process.stdout and process.stdout.readline() == b"met\n"
        running[0].kill()
        began = time.monotonic()
        code, output = ended(running[1])
    assert code == -signal.SIGABRT and "Terminating process because the JAX distributed service" in output
    assert time.monotonic() - began < 60


def test_a_full_disk_is_one_sentence_and_room_is_all_it_needs(tmp_path, unbroken):
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"

    def fill() -> None:
        file.rename(kept)
        file.symlink_to("/dev/full")

    sentence = rf"{tmp_path} cannot be written to \(No space left on device\): free some space there, and run the same"
    with pytest.raises(StageError, match=sentence):
        train(tmp_path, make_input=lambda batches: Struck(batches, {STRUCK: fill}))
    assert StageError in cli._refusals()  # so it ends with status 2: a restart would find the disk full again
    kept.rename(file)
    train(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), unbroken, rtol=1e-5)


def test_a_job_shrinks_to_half_its_devices_and_grows_again(tmp_path, unbroken):
    for mesh in ((8, 1, 1), (2, 2, 1)):
        with pytest.raises(Interrupted):  # one step after a checkpoint
            train(tmp_path, mesh, lambda batches: Stopping(batches, SAVED + 1))
    train(tmp_path, (4, 2, 1), lambda batches: Stopping(batches, STEPS - 2 * SAVED))
    found = losses(tmp_path)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, unbroken, rtol=1e-5)


@pytest.mark.parametrize("name, seconds", [("connect_s", 0.0), ("stalled_s", -1.0)])
def test_a_patience_that_is_none_is_refused(name, seconds):
    with pytest.raises(SettingsError, match=rf"config\.watch\.{name} is {seconds}"):
        processes.WatchSettings(**{"connect_s": 300.0, "stalled_s": 300.0, name: seconds})


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
