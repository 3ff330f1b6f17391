"""The mesh, the rows of a batch that a process reads, and the table from logical axes to mesh axes."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from geotoken_jax import sharding
from geotoken_jax.plan import topology
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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as JAX describes it. slice_index: number of its node."""

    id: int
    slice_index: int
    process_index: int
    device_kind: str = "NVIDIA H100 80GB HBM3"
    platform: str = "gpu"


def gpus(nodes: int, each: int) -> list[Gpu]:
    """Returns the GPUs of some nodes, in turn from each node, with one process per GPU."""
    return [Gpu(node * each + i, node, node * each + i) for i in range(each) for node in range(nodes)]


@pytest.mark.parametrize("nodes, each", [(2, 8), (4, 4), (1, 16)])
@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_only_data_is_split_over_nodes(nodes, each, fsdp, tensor):
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, fsdp, tensor), gpus(nodes, each))
    assert mesh.devices.shape == (16 // fsdp // tensor, fsdp, tensor)
    of_data = [{device.slice_index for device in group.flat} for group in mesh.devices]
    assert [sorted(found) for found in of_data] == [[i * nodes // len(of_data)] for i in range(len(of_data))]


def test_the_number_of_slices_is_a_choice():
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 16, 1, slices=1), gpus(2, 8))
    assert [device.id for device in mesh.devices.flat] == list(range(16))
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, 4, 1, slices=2), gpus(4, 4))
    assert mesh.devices.shape == (4, 4, 1)
    assert [{device.slice_index // 2 for device in half.flat} for half in np.split(mesh.devices, 2)] == [{0}, {1}]
    cpus = sharding.make_mesh(sharding.MeshSettings(-1, 2, 2, slices=2))  # JAX gives CPUs no slice
    assert cpus.devices.tolist() == sharding.make_mesh(sharding.MeshSettings(-1, 2, 2)).devices.tolist()


@pytest.mark.parametrize(
    "sizes, devices, message",
    [
        ((1, 16, 1), gpus(2, 8), r"config.mesh.data is 1, but the devices are in 2 slices .* multiple of 2,"),
        ((-1, 1, 8), gpus(4, 4), r"config.mesh.data is 2, .* 4 slices"),
        ((-1, 1, 1, 3), gpus(2, 8), r"config.mesh.slices is 3, but 16 devices in 2 slices .* use slices of equal size"),
        ((-1, 1, 1), gpus(4, 4)[:10], r"config.mesh.slices is -1, but 10 devices in 4 slices .* equal size"),
    ],
    ids=["fsdp", "tensor", "a third", "unequal nodes"],
)
def test_slices_that_a_mesh_does_not_fit_are_refused(sizes, devices, message):
    with pytest.raises(SettingsError, match=message):
        sharding.make_mesh(sharding.MeshSettings(*sizes), devices)
    with pytest.raises(ValueError, match="slices is 0: use 1 or more, or -1"):
        sharding.MeshSettings(1, 1, 1, 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v4:4x4x4", "v5p:4x4x4", "v5e:16x16", "v6e:8x8"])
def test_a_tpu_slice_is_laid_out_for_all_sizes_that_divide_it(name):
    devices = topology.devices(topology.read(name))
    for fsdp, tensor in ((fsdp, tensor) for fsdp in (1, 2, 4, 8, 16) for tensor in (1, 2, 4)):
        mesh = sharding.make_mesh(sharding.MeshSettings(-1, fsdp, tensor), devices)
        assert mesh.devices.shape == (len(devices) // fsdp // tensor, fsdp, tensor)
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
        try:
            expected = jax.make_mesh(mesh.devices.shape, mesh.axis_names, devices=devices)
        except NotImplementedError:
            continue  # it does not split a physical axis
        assert (mesh.devices == expected.devices).all()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_is_split_in_its_order(sizes):
    mesh = sharding.make_mesh(sharding.MeshSettings(*sizes), jax.devices()[::-1])
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))
    batch = {"row": np.arange(16), "image": np.arange(48.0, dtype=np.float32).reshape(16, 3)}
    found = sharding.global_batch(batch, mesh, 16)
    for name, values in batch.items():
        assert found[name].sharding.is_equivalent_to(sharding.batch_sharding(mesh), values.ndim)
        np.testing.assert_array_equal(found[name], values)


def test_a_batch_that_does_not_fit_the_mesh_is_refused():
    mesh = sharding.make_mesh(sharding.MeshSettings(2, 2, 2))
    with pytest.raises(SettingsError, match=r"batch_size is 6, which .* data x fsdp = 4 .*: set it to a multiple of 4"):
        sharding.local_rows(mesh, 6)
    with pytest.raises(ValueError, match=r"row has 4 rows: pass the 8 rows of local_rows"):
        sharding.global_batch({"row": np.arange(4)}, mesh, 8)


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
    with pytest.raises(SettingsError, match=r"linear/kernel has an axis of size 9, which does not .* over fsdp = 2"):
        sharding.shardings(state, sharding.make_mesh(sharding.MeshSettings(2, 2, 2)))
