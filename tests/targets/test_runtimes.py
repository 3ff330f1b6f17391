"""What other runtimes answer with is made in an environment of its own, and answers as the package does.

Run by `make test-targets`, which makes the environments; without one its tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from geotoken_jax import GeoToken
from tests import exports

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"onnx": ".onnx", "savedmodel": ".tensorflow"}


@pytest.fixture(scope="module", params=[exports.of_channels, exports.of_samples], ids=["reranker", "samples"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    exports.write(folder / "export", request.param, program=True)
    (folder / "photos").mkdir()
    for i, photo in enumerate(exports.photos()):
        Image.fromarray(photo).save(folder / "photos" / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_a_target_answers_as_the_package(made: Path, target: str):
    python = ROOT / ENVIRONMENTS[target] / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{ENVIRONMENTS[target]} is not there: make test-targets makes it")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    export = made / "export"
    command = [python, "-m", "geotoken_jax", "export", f"--from={export}", f"--target={target}"]
    subprocess.run(command, check=True, env=environ, timeout=600)
    run = [python, "-I", export / "standalone.py", "--json", f"--target={export / 'targets' / target}", made / "photos"]
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    exports.compare(found, GeoToken.load(export).predict(exports.photos()))
    if target == "savedmodel":
        run = [python, "-c", ENCODED, export, made / "photos"]
        done = subprocess.run(run, check=True, env=environ, stdout=subprocess.PIPE, text=True, timeout=600)
        shape, difference = json.loads(done.stdout)
        assert shape == [len(exports.photos()), 2]
        assert difference < 12  # of 255, in photos of noise: TensorFlow crops half a pixel beside


#: Prints the shape of the answers to encoded photos, and the largest difference of their pixels from standalone.py's.
ENCODED = """
import json, pathlib, sys
import numpy as np, tensorflow as tf
from geotoken_jax.export import savedmodel, standalone
export, photos = map(pathlib.Path, sys.argv[1:])
call = tf.saved_model.load(str(export / "targets" / "savedmodel" / "program")).signatures["encoded"]
files = sorted(photos.iterdir())
found = call(encoded=tf.constant([file.read_bytes() for file in files]))["coordinates"]
how = standalone.signature(export)["prepare"]
own = [standalone.preprocess.prepare(str(file), how) for file in files]
pixels = zip([savedmodel._prepared(file.read_bytes(), how).numpy() for file in files], own)
print(json.dumps([list(found.shape), max(int(np.abs(a.astype(int) - b).max()) for a, b in pixels)]))
"""
