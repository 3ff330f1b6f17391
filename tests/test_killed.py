"""Training that is killed at random moments, again and again."""

import os
import random
import signal
import time

import numpy as np
import pytest

from tests import pod


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_it_ends_as_an_unbroken_run_to_the_bit(tmp_path, kills):
    options = dict(devices=2, mesh=(2, 1, 1), where="sharded", steps=30 * kills, evaluate_every=3)
    pod.finish(pod.start(1, folder=tmp_path / "unbroken", **options))
    rng = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0"))
    killed = 0
    while killed < kills:
        (process,) = pod.start(1, folder=tmp_path / "killed", **options)
        file, began = tmp_path / "killed" / "metrics.jsonl", time.monotonic()
        before = file.stat().st_mtime_ns if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))  # about the duration of 6 steps, two of them with a checkpoint
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    pod.finish(pod.start(1, folder=tmp_path / "killed", **options))
    assert killed == kills
    for names in (pod.LOSSES, ("validation/loss", "validation/exact")):
        np.testing.assert_array_equal(
            pod.sequence(tmp_path / "killed", *names), pod.sequence(tmp_path / "unbroken", *names)
        )
    parameters = [(tmp_path / name / "parameters.safetensors").read_bytes() for name in ("killed", "unbroken")]
    assert parameters[0] == parameters[1]
