"""Exported programs run without the package, and a broken export says which file is broken."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import checkpoint
from geotoken_jax.align.heads import AlignModel, AlignSettings, embeddings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.export import stablehlo, standalone
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict import exported
from tests import fixtures, test_decode


def standing(level: int, group: int) -> standalone.Model:
    model = object.__new__(standalone.Model)
    model.level, model.group = level, group
    return model


@pytest.mark.parametrize(("level", "group"), [(20, 2), (20, 4), (12, 3), (5, 1)])
def test_cells_are_those_of_the_package(level: int, group: int):
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-90, 90, 500), rng.uniform(-180, 180, 500)
    cells, model = CellScheme(level, group), standing(level, group)
    tokens = cells.encode(latitude, longitude)
    np.testing.assert_allclose(model.centers(tokens), np.stack(cells.decode(tokens), -1), atol=1e-9)
    quads = CellScheme(20, 1).encode(latitude, longitude).astype(np.uint8)
    np.testing.assert_array_equal(model.cell_tokens(quads), tokens)


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["flatbuffers"] = None  # as where it is not installed
import numpy as np, standalone
from pathlib import Path
call = standalone._program(Path(sys.argv[1]), "align")
np.save(sys.argv[1] + "/found.npy", call(np.load(sys.argv[1] + "/features.npy")))
assert not [name for name in sys.modules if name.split(".")[0] in ("geotoken_jax", "flax")]
"""


def test_a_program_runs_without_the_package_and_without_flatbuffers(tmp_path: Path):
    location = LocationSettings(projection="mercator", sigmas=(1.0,), fourier=4, hidden=4, out=4)
    model = AlignModel(AlignSettings(8, 0.0, 0.0, location), 6, rngs=nnx.Rngs(0))
    program = stablehlo.embedding(model, 6)
    assert b".py" not in program  # nor the folders of who made it
    (tmp_path / "align.stablehlo").write_bytes(program)
    (tmp_path / "standalone.py").write_bytes(Path(standalone.__file__).read_bytes())
    checkpoint.write_parameters(tmp_path / "align.safetensors", nnx.to_pure_dict(nnx.state(model)))
    features = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    subprocess.run([sys.executable, "-I", "-c", RUN, str(tmp_path)], check=True, timeout=300)
    found = np.load(tmp_path / "found.npy")
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, embeddings(model, features).astype(np.float32), atol=0.02)  # bfloat16's


def test_a_program_of_a_model_that_reads_times_takes_them_as_unknown():
    model, batch = fixtures.model("ours", context="season"), fixtures.batch(2)
    program = standalone.deserialize(stablehlo.decoding(model, dataclasses.replace(test_decode.SETTINGS, samples=0)))
    parameters = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    given = [batch[name].astype(ml_dtypes.bfloat16) for name in ("query", "neighbors")]
    found = program.call(parameters, *given, batch["neighbor_tokens"], batch["neighbor_count"], np.zeros(2, np.uint32))
    seen = dict(zip(("query", "neighbors"), given, strict=True))
    unknown = {**batch, **seen, "tokens": found["tokens"][:, 0], "context": np.zeros((2, 3), np.float32)}
    log_p = np.take_along_axis(np.asarray(fixtures.forward(model, unknown)), unknown["tokens"][..., None], -1)
    np.testing.assert_allclose(found["log_probability"][:, 0], log_p.sum((1, 2)), atol=1e-4)


def test_a_broken_export_names_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "large.npy").write_bytes(b"numbers")
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        exported.check(tmp_path, everything=False)
    sums = "".join(f"{exported.sha256(tmp_path / name)}  {name}\n" for name in ("config.json", "large.npy"))
    (tmp_path / "SHA256SUMS").write_text(sums)
    exported.check(tmp_path, everything=True)
    (tmp_path / "large.npy").write_bytes(b"others!")
    exported.check(tmp_path, everything=False)
    with pytest.raises(ValueError, match=r"large\.npy is not what SHA256SUMS says"):
        exported.check(tmp_path, everything=True)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not what"):
        exported.check(tmp_path, everything=False)
    (tmp_path / "large.npy").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks large\.npy"):
        exported.check(tmp_path, everything=False)
