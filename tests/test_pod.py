"""Training on other devices, in several processes, and killed again and again, is the same training."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geotoken_jax.model import layers
from tests import pod

ROOT = Path(__file__).parents[1]
STEPS = 20


def lines(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        if line[-1] == "\n"
    ]


def sequence(folder: Path, *names: str) -> np.ndarray:
    """Returns values of all steps, in order: [steps, names]."""
    found = [line for line in lines(folder) if names[0] in line]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found})
    return np.array([[line[name] for name in names] for line in found])


LOSSES = ("train/loss", "train/batch", "train/gradient_norm")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    pod.run(folder, (1, 1, 1), "host", STEPS)
    assert sequence(folder, "train/loss")[-5:].mean() < sequence(folder, "train/loss")[:5].mean() - 0.2
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    for names in (LOSSES, ("validation/loss", "validation/loss_level_0")):
        np.testing.assert_allclose(sequence(folder, *names), sequence(expected, *names), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "mesh, where",
    [((8, 1, 1), "host"), ((2, 2, 2), "host"), ((1, 4, 2), "host"), ((2, 2, 2), "replicated"), ((1, 4, 2), "sharded")],
    ids=str,
)
def test_eight_devices_train_as_one_wherever_the_gallery_lies(tmp_path, one_device, mesh, where):
    pod.run(tmp_path, mesh, where, STEPS)
    assert_same(tmp_path, one_device)


def test_a_batch_in_parts_trains_as_the_whole(tmp_path):
    """Without dropout: with it the parts draw other numbers than the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "dropout", lambda x, rate, key: x)
        for name, accumulate, mesh in (("whole", 1, (1, 1, 1)), ("parts", 4, (2, 1, 1))):
            pod.run(tmp_path / name, mesh, "sharded", 6, accumulate=accumulate)
    found, expected = (sequence(tmp_path / name, "train/loss", "train/gradient_norm") for name in ("parts", "whole"))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def start(processes: int, **options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes} --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "tests.pod", json.dumps(options, default=str)]
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, **several, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for i in range(processes)
    ]


def finish(run: list[subprocess.Popen]) -> list[int]:
    outputs = [process.communicate(timeout=240)[0].decode() for process in run]
    codes = [process.returncode for process in run]
    assert not any(codes), "\n".join(outputs)
    return codes


def test_two_processes_train_as_one_and_go_on_as_one_or_four(tmp_path, one_device):
    """Each time on another mesh, with the gallery elsewhere."""
    finish(start(2, folder=tmp_path, mesh=(2, 2, 2), where="sharded", steps=8))
    finish(start(4, folder=tmp_path, mesh=(8, 1, 1), where="host", steps=14))
    pod.run(tmp_path, (1, 4, 2), "replicated", STEPS)
    found, expected = sequence(tmp_path, *LOSSES), sequence(one_device, *LOSSES)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_a_run_killed_twenty_times_is_an_unbroken_one_to_the_bit(tmp_path):
    options = dict(mesh=(2, 2, 2), where="sharded", steps=160, evaluate_every=3)
    finish(start(1, folder=tmp_path / "unbroken", **options))
    rng = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0"))
    killed = 0
    while killed < 20:
        (process,) = start(1, folder=tmp_path / "killed", **options)
        file, began = tmp_path / "killed" / "metrics.jsonl", time.monotonic()
        before = file.stat().st_mtime_ns if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))  # about the time of 6 steps, two of them with a checkpoint
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    finish(start(1, folder=tmp_path / "killed", **options))
    assert killed == 20
    for names in (LOSSES, ("validation/loss", "validation/exact")):
        np.testing.assert_array_equal(sequence(tmp_path / "killed", *names), sequence(tmp_path / "unbroken", *names))
    parameters = [(tmp_path / name / "parameters.safetensors").read_bytes() for name in ("killed", "unbroken")]
    assert parameters[0] == parameters[1]
