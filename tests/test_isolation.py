"""Tests do not see the machine's environment, and a session that leaves files in the repository fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests import isolation

ROOT = Path(__file__).parents[1]
#: Tests for another repository: one checks its environment, one writes where it must not.
TESTS = """
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]

def test_sees_nothing(tmp_path):
    assert Path.cwd() == tmp_path and not Path("runs").exists()
    assert os.environ["JAX_PLATFORMS"] == "cpu" and "SECRET" not in str(dict(os.environ))
    assert Path.home() != Path(os.environ["FORMER_HOME"]) and not list(Path.home().iterdir())
    os.environ["WANDB_MODE"] = "left by a test"

def test_sees_nothing_of_the_test_before():
    assert "WANDB_MODE" not in os.environ

def test_writes():
    if os.environ["WRITES"]:
        path = ROOT / os.environ["WRITES"]
        path.write_text("left by a test")
"""


def test_folders_and_platform_are_the_sessions():
    assert jax.default_backend() in (os.environ["JAX_PLATFORMS"], "gpu") and len(jax.devices()) in (1, 8)
    home = Path(os.environ["HOME"])
    assert Path.home() == home and home.parent.name.startswith("geotoken-tests-")
    assert jax.config.jax_compilation_cache_dir == str(home.parent / "compiled")


def test_a_test_runs_in_its_own_folder(tmp_path: Path):
    assert Path.cwd() == tmp_path and tmp_path not in [ROOT, *ROOT.parents]


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers, writes", [("0", ""), ("0", "runs/demo/left"), ("0", "left"), ("2", "runs/demo/export/config.json")]
)
def test_a_session_is_apart_from_its_surroundings_and_fails_if_it_leaves_something(tmp_path, workers, writes):
    repository, home = tmp_path / "repository", tmp_path / "home"
    for folder in (repository / "runs/demo/export", repository / "tests", home / ".cache/huggingface"):
        folder.mkdir(parents=True)
    (repository / "runs/demo/export/config.json").write_text("SECRET")
    (home / ".cache/huggingface/token").write_text("SECRET")
    for name in ("__init__.py", "conftest.py", "isolation.py"):
        shutil.copy(ROOT / "tests" / name, repository / "tests")
    (repository / "tests/test_it.py").write_text(TESTS)
    hostile = {f"{prefix}NAME": "SECRET" for prefix in isolation.PREFIXES}
    hostile |= {"JAX_PLATFORMS": "bogus", "XLA_FLAGS": "--bogus", "HF_HOME": "SECRET", "XDG_CACHE_HOME": "SECRET"}
    hostile |= {"HOME": str(home), "FORMER_HOME": str(home), "WRITES": writes, "PYTHONPATH": "."}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, "tests"]
    done = subprocess.run(
        command, cwd=repository, env={**os.environ, **hostile}, capture_output=True, text=True, timeout=120
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == bool(writes), done.stdout
    assert (f"was changed while the tests ran, and no test may: {writes}\n" in done.stdout) == bool(writes)
