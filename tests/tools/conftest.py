"""A tiny work directory for the tests of this folder."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole path for the one variant, without the ablations."""
    path = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "geotoken_jax", "all", "--variant=geotoken"]
    command += [f"--config={ROOT / 'tests/tiny.py'}", f"--workdir={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    return path
