"""What other runtimes answer with is made in an environment of its own, and answers as the package does.

Run by `make test-targets`, which makes the environments; without one its tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.export import RUN, WITHOUT
from tests import tiny_export

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"onnx": ".onnx", "savedmodel": ".tensorflow"}


@pytest.mark.parametrize("form", [tiny_export.OURS, {}], ids=["ours", "paper"])
@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_a_target_answers_as_the_package(tmp_path: Path, target: str, form: dict):
    folder = ENVIRONMENTS[target]
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{folder} is not there: make test-targets makes it")
    features = tiny_export.write(tmp_path, form)[:11]  # batches of 8 and of 4, of which one only fills up
    np.save(tmp_path / "features.npy", features)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [python, "-m", "geotoken_jax.cli", "export", f"--from={tmp_path}", f"--target={target}"]
    subprocess.run(command, check=True, env=environ, timeout=600)
    run = [python, "-I", "-c", RUN, WITHOUT[target], *(tmp_path / name for name in ("standalone.py", "features.npy"))]
    done = subprocess.run(
        [*run, tmp_path / "targets" / target], check=True, stdout=subprocess.PIPE, text=True, timeout=600
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    tiny_export.compare(told, tiny_export.answers(tmp_path, features), within=1e-3)
