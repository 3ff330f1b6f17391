"""The mesh and the table from logical axes to mesh axes."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from geotoken_jax import sharding
from geotoken_jax.settings import SettingsError


@pytest.mark.parametrize("sizes, shape", [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))])
def test_an_open_axis_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.make_mesh(sharding.MeshSettings(*sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape


@pytest.mark.parametrize("sizes", [(3, -1, 1), (4, 1, 1), (-1, -1, 1), (16, 1, 1), (0, 1, 1), (-1, 0, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    asked = ", ".join(f"{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True))
    with pytest.raises(SettingsError, match=rf"config\.mesh \({asked}\) does not fit 8 devices"):
        sharding.make_mesh(sharding.MeshSettings(*sizes))


def test_logical_axes_become_mesh_axes():
    assert sharding.spec("layers", "embed", "mlp") == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec("batch", None) == PartitionSpec(("data", "fsdp"), None)


class Two(nnx.Module):
    def __init__(self, rngs, width=8):
        self.linear = sharding.linear(width, 6, ("embed", "mlp"), rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)


def test_a_state_lies_as_its_logical_names_say():
    mesh = sharding.make_mesh(sharding.MeshSettings(2, 2, 2))
    state = nnx.state(nnx.eval_shape(lambda: Two(nnx.Rngs(0))), nnx.Param)
    found = sharding.shardings(state, mesh)
    assert found["linear"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert found["linear"]["bias"].spec == PartitionSpec("tensor")
    assert found["norm"]["scale"].spec == PartitionSpec()
    batch = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_a_width_that_does_not_divide_is_named():
    state = nnx.state(nnx.eval_shape(lambda: Two(nnx.Rngs(0), width=9)), nnx.Param)
    with pytest.raises(SettingsError, match=r"linear/kernel: axis of 9 does not divide over fsdp = 2"):
        sharding.shardings(state, sharding.make_mesh(sharding.MeshSettings(2, 2, 2)))
