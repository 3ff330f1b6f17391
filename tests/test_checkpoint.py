"""Checkpoints: which ones stay, restoring on another mesh, skipping damaged ones, and the file of parameters."""

import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from geotoken_jax import sharding
from geotoken_jax.checkpoint import CheckpointError, Checkpoints, read_module, write_parameters


def state(value=0.0, width=8):
    return {"step": jnp.asarray(3, jnp.int32), "params": {"a": jnp.full((width, 8), value)}, "constants": {}}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def folder(tmp_path):
    """Steps 2, 4, 6 with the losses 3, 1, 2."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0)):
            checkpoints.save(step, state(step), {"input": {"next": step}}, loss)
    return tmp_path / "checkpoints"


def test_the_last_and_the_best_are_kept(folder):
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.steps == [4, 6] and checkpoints.best == 4 and checkpoints.loss(4) == 1.0
        checkpoints.save(8, state(8), {"input": {"next": 8}}, 5.0)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [4, 8]
        step, found, position = checkpoints.restore_last(abstract(state()))
        assert (step, position) == (8, {"input": {"next": 8}})
        jax.tree.map(np.testing.assert_array_equal, found, state(8))


def test_an_empty_folder_has_nothing(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.restore_last(abstract(state())) is None
        with pytest.raises(FileNotFoundError, match=r"train first"):
            _ = checkpoints.best


def test_restores_on_another_mesh(folder):
    mesh = sharding.make_mesh(sharding.MeshSettings(2, 2, 2))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), state()["params"])
    whole = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with Checkpoints(folder) as checkpoints:
        found, _ = checkpoints.restore(6, {"step": whole, "params": wanted, "constants": {}})
    assert found["params"]["a"].sharding == split
    np.testing.assert_array_equal(found["params"]["a"], np.full((8, 8), 6.0))


def data_file(step, item):
    return next((step / item / "d").iterdir())


TEARS = {
    "lost data": lambda step: data_file(step, "state").unlink(),
    "cut data": lambda step: data_file(step, "state").write_bytes(data_file(step, "state").read_bytes()[:100]),
    "empty manifest": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b""),
    "cut metadata": lambda step: (step / "state" / "_METADATA").write_text('{"tree_'),
    "no progress": lambda step: shutil.rmtree(step / "progress"),
    "lost loss": lambda step: data_file(step, "progress").unlink(),
    "cut loss": lambda step: data_file(step, "progress").write_bytes(b""),
    "no state": lambda step: shutil.rmtree(step / "state"),
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_a_torn_checkpoint_is_passed_over_and_replaced(folder, caplog, tear):
    tear(folder / "6")
    with Checkpoints(folder) as checkpoints:
        with caplog.at_level(logging.WARNING):
            step, found, position = checkpoints.restore_last(abstract(state()))
        assert (step, position) == (4, {"input": {"next": 4}}) and found["params"]["a"][0, 0] == 4
        assert f"checkpoint 6 in {folder} cannot be read" in caplog.text
        checkpoints.save(6, state(60), {"input": {"next": 6}}, 0.5)  # as when training reaches step 6 again
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_last(abstract(state()))[1]["params"]["a"][0, 0] == 60
        assert checkpoints.best == 6


def test_what_comes_before_a_torn_checkpoint_is_saved_too(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(8, state(8), {"input": {"next": 8}}, 4.0)
    TEARS["cut data"](folder / "6")
    TEARS["cut loss"](folder / "8")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_last(abstract(state()))[0] == 4
        checkpoints.save(6, state(60), {"input": {"next": 6}}, 0.5)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_last(abstract(state()))[1]["params"]["a"][0, 0] == 60
        assert checkpoints.best == 6


def test_a_state_of_another_form_is_an_error_and_not_a_torn_file(folder):
    other = {**state(), "further": jnp.zeros(3)}
    for wanted, reason in (
        (state(width=4), "(4, 8) is not compatible with the stored shape: (8, 8)"),
        (other, "further"),
    ):
        with (
            Checkpoints(folder) as checkpoints,
            pytest.raises(CheckpointError, match=f"in {folder} do not fit this training: end it with the version") as e,
        ):
            checkpoints.restore_last(abstract(wanted))
        assert reason in str(e.value.__cause__.__cause__)


def test_a_full_disk_is_one_sentence_and_loses_nothing(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    values = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)
    try:
        refused = pytest.raises(CheckpointError, match=r"cannot be written .* \(File too large.*: free disk space")
        with refused, Checkpoints(folder) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
            checkpoints.save(8, {"a": values}, {"input": {"next": 8}}, 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [4, 6]  # 2 was deleted when 6 was written
        assert checkpoints.restore_last(abstract(state()))[0] == 6


def test_a_save_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        value = jnp.zeros((256, 256))
        checkpoints.save(1, {"a": value}, {"input": {}}, 1.0)
        for _ in range(20):
            value = add(value)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert not np.asarray(checkpoints.restore(1, abstract({"a": value}))[0]["a"]).any()


class Two(nnx.Module):
    def __init__(self, rngs, out=6):
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, out, rngs=rngs)])
        self.mean = nnx.Variable(jnp.zeros(3))


def test_parameters_come_back_as_a_module(tmp_path):
    module = Two(nnx.Rngs(1))
    module.mean[...] = jnp.arange(3.0)
    path = tmp_path / "parameters.safetensors"
    _, params, rest = nnx.split(module, nnx.Param, ...)
    write_parameters(path, nnx.to_pure_dict(rest), nnx.to_pure_dict(params))
    found = read_module(path, Two)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(found)), nnx.to_pure_dict(nnx.state(module)))
    with pytest.raises(ValueError, match=r"does not fit this configuration: layers/1/"):
        read_module(path, lambda rngs: Two(rngs, out=7))
    write_parameters(path, nnx.to_pure_dict(params))
    with pytest.raises(ValueError, match=r"does not fit this configuration: mean is missing"):
        read_module(path, Two)
