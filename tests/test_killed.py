"""Stages that are killed at random moments, again and again, also while a second process writes the same folder."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import pod

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [1, 8])
def test_it_ends_as_an_unbroken_run_to_the_bit(tmp_path, kills):
    options = dict(devices=2, mesh=(2, 1, 1), where="sharded", steps=30 * kills, evaluate_every=3)
    pod.finish(1, folder=tmp_path / "unbroken", **options)
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
    pod.finish(1, folder=tmp_path / "killed", **options)
    assert killed == kills
    for names in (pod.LOSSES, ("validation/loss", "validation/exact")):
        np.testing.assert_array_equal(
            pod.sequence(tmp_path / "killed", *names), pod.sequence(tmp_path / "unbroken", *names)
        )
    parameters = [(tmp_path / name / "parameters.safetensors").read_bytes() for name in ("killed", "unbroken")]
    assert parameters[0] == parameters[1]


CONFIG = Path(__file__).with_name("tiny.py")
#: Verb -> folders that it makes.
MADE = {"prepare": ["photos"], "embed": ["features"], "index": ["queries", "gallery", "neighbors", "tokens"]}


def start(verb: str, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "geotoken_jax", verb, f"--config={CONFIG}", f"--workdir={workdir}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=CONFIG.parents[1], stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output.decode()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A work directory that no process was killed in, and the seconds that each verb took."""
    workdir, seconds = tmp_path_factory.mktemp("unbroken"), {}
    for verb in ("prepare", "embed", "align", "index"):
        began = time.monotonic()
        code, output = ended(start(verb, workdir))
        assert code == 0, output
        seconds[verb] = time.monotonic() - began
    return workdir, seconds


def contents(workdir: Path, verb: str) -> dict[str, bytes]:
    """Returns all files of a verb's folders, also partial ones, except locks, which a killed process leaves."""
    files = [file for folder in MADE[verb] for file in (workdir / folder).rglob("*") if file.is_file()]
    kept = [file for file in files if not file.name.startswith(".lock")]
    return {str(file.relative_to(workdir)): file.read_bytes() for file in kept}


@pytest.mark.parametrize("verb", MADE)
def test_two_writers_of_which_one_is_killed_leave_a_whole_folder(tmp_path, unbroken, verb):
    (whole, seconds), kills = unbroken, 4
    for folder in whole.iterdir():
        if folder.name not in itertools.chain(*list(MADE.values())[list(MADE).index(verb) :]):
            (tmp_path / folder.name).symlink_to(folder)
    rng, refused, completed = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0")), 0, 0
    for _ in range(kills):
        writers = [start(verb, tmp_path), start(verb, tmp_path)]
        time.sleep(rng.uniform(0.3, 1.5) * seconds[verb])
        os.killpg(rng.choice(writers).pid, signal.SIGKILL)
        for code, output in map(ended, writers):
            assert code in (0, -signal.SIGKILL) or (code == 2 and "is being written by process" in output), output
            refused += code == 2
        if all((tmp_path / folder / "manifest.json").exists() for folder in MADE[verb]):
            completed += 1
            assert contents(tmp_path, verb) == contents(whole, verb)
            for folder in MADE[verb]:
                shutil.rmtree(tmp_path / folder)
    code, output = ended(start(verb, tmp_path))
    assert code == 0, output
    assert contents(tmp_path, verb) == contents(whole, verb)
    print(f"{verb}: {kills} kills, {refused} writers refused, complete {completed} times before the last run")
