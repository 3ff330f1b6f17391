"""Makes the mesh, and shards arrays by a table from logical axis names to mesh axes.

Modules give the axes of their arrays logical names (embed, mlp, heads, vocab, layers, batch). RULES alone maps these
names to mesh axes: data (replicas), fsdp (replicas that shard parameters and optimizer state) and tensor (devices that
share matrix products).
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from geotoken_jax.settings import SettingsError

#: Logical axis -> mesh axes; None if the axis is not split.
RULES: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": None,
    "layers": None,
}

# Variables have logical names only; `shardings` maps the names of a whole state to a mesh.
nnx.use_eager_sharding(False)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """config.mesh. data, fsdp, tensor: sizes of the mesh axes; one of them may be -1, for all remaining devices.
    slices: number of groups of devices, each with a fast network inside, such as TPU slices or GPU nodes. Only data is
    split over slices, because the network between them is slow. If -1, JAX's devices give the number."""

    data: int
    fsdp: int
    tensor: int
    #: configs/common.py sets it. The default serves code that makes a mesh without a configuration.
    slices: int = -1

    def __post_init__(self):
        if self.slices < 1 and self.slices != -1:
            raise ValueError(f"slices is {self.slices}: use 1 or more, or -1 for the number that the devices give")


def make_mesh(settings: MeshSettings, devices: Any = None) -> Mesh:
    """Returns a mesh over devices; over all devices if None.

    Devices that share an index on axis data are in one slice. Raises SettingsError if the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _axis_sizes(settings, len(devices))
    slices = _slices(settings.slices, devices)
    if sizes["data"] % len(slices):
        raise SettingsError(
            f"config.mesh.data is {sizes['data']}, but only data is split over the {len(slices)} slices or nodes of "
            f"devices: set it to a multiple of {len(slices)}, and lower config.mesh.fsdp or config.mesh.tensor"
        )
    shape = (sizes["data"] // len(slices), sizes["fsdp"], sizes["tensor"])
    try:
        # jax.make_mesh refuses several slices, and does not split a physical axis of v4, v5p or v6e over two mesh axes.
        blocks = [mesh_utils.create_device_mesh(shape, one, allow_split_physical_axes=True) for one in slices]
    except AssertionError:  # the coordinates of TPUs are not a cuboid
        raise SettingsError(
            f"config.mesh.slices is {settings.slices}, but {len(slices[0])} devices of one slice do not form a cuboid "
            "of chips: set it to -1, for the number that the devices give"
        ) from None
    return Mesh(np.concatenate(blocks), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _axis_sizes(settings: MeshSettings, devices: int) -> dict[str, int]:
    """Returns the size of each mesh axis, with -1 replaced. devices: number of devices."""
    sizes = {name: getattr(settings, name) for name in ("data", "fsdp", "tensor")}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if known < 1 or len(open_axes) > 1 or devices % known or (not open_axes and known != devices):
        requested = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise SettingsError(
            f"config.mesh ({requested}) does not fit {devices} devices: set the sizes so that their product is "
            f"{devices}; one of them may be -1, for all remaining devices"
        )
    return {name: devices // known if size == -1 else size for name, size in sizes.items()}


def _slices(requested: int, devices: list[Any]) -> list[list[Any]]:
    """Returns the devices of each slice. requested: number of slices; the number of distinct slice_index if -1.

    JAX gives a slice_index to TPUs, and to GPUs by node. Devices without it are in one slice.
    """
    indices = [getattr(device, "slice_index", None) or 0 for device in devices]
    given = sorted(collections.Counter(indices).items())
    count = len(given) if requested == -1 else requested
    if len(devices) % count or (count == len(given) and len({size for _, size in given}) > 1):
        raise SettingsError(
            f"config.mesh.slices is {requested}, but {len(devices)} devices in {len(given)} slices or nodes do not "
            f"divide into {count} slices of equal size: use slices of equal size, or set it to 1"
        )
    ordered = [devices[i] for i in np.argsort(indices, kind="stable")]
    return [ordered[first : first + len(devices) // count] for first in range(0, len(devices), len(devices) // count)]


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array. logical: logical name of each axis; None if the axis is not split."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns x, sharded along its first axes; unchanged if no mesh is in use. logical: see `spec`.

    Without this constraint XLA may split activations in the same way as parameters, so that every device computes on
    all photos.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, split along its first axis."""
    return NamedSharding(mesh, spec("batch"))


@functools.cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, sorted and unique.

    Processes whose devices differ only on axis tensor hold the same rows. Rows need not be consecutive. Raises
    SettingsError if the batch does not divide over the mesh.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise SettingsError(
            f"batch_size is {batch_size}, which does not divide over data x fsdp = {shards} of config.mesh: set it to "
            f"a multiple of {shards}"
        )
    local = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = np.unique([np.arange(batch_size)[index] for index in local])
    rows.flags.writeable = False  # the cache returns it again
    return rows


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Returns a batch as arrays [batch_size, ...] split over the mesh along their first axis.

    batch: arrays with the rows of `local_rows`, in the same order. batch_size: rows over all processes.
    """
    rows, layout = local_rows(mesh, batch_size), batch_sharding(mesh)

    def split(name: str, values: np.ndarray) -> jax.Array:
        if len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} rows: this process must read the {len(rows)} of local_rows")

        def shard(index: Any) -> np.ndarray:  # a tuple of slices
            first, end, _ = index[0].indices(batch_size)
            start = int(np.searchsorted(rows, first))  # a shard's rows are consecutive in the batch, so also here
            return values[start : start + end - first]

        # jax.make_array_from_process_local_data fails if the rows of two processes overlap, or differ in number.
        return jax.make_array_from_callback((batch_size, *values.shape[1:]), layout, shard)

    return {name: split(name, values) for name, values in batch.items()}


def shardings(state: Any, mesh: Mesh) -> Any:
    """Returns nested dicts of NamedShardings for an (abstract) nnx.State, from the logical names of its Variables.

    Raises SettingsError with the parameter's name if an axis does not divide over its mesh axes.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("out_sharding") or ()
        partition = spec(*names)
        for size, axes in zip(variable.shape, partition, strict=False):
            shards = int(np.prod([mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or [])]))
            if size % shards:
                name = "/".join(map(str, path))
                raise SettingsError(
                    f"{name}: axis of {size} does not divide over {axes} = {shards} of config.mesh: choose another "
                    "config.mesh, or another width of the model"
                )
        flat[path] = NamedSharding(mesh, partition)
    return traverse_util.unflatten_dict(flat)


def parameter(key: jax.Array, initializer: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter. axes: logical name of each axis."""
    return nnx.Param(initializer(key, shape, jnp.float32), out_sharding=axes)


def linear(
    d_in: int,
    d_out: int,
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> nnx.Linear:
    """Returns a linear layer [..., d_in] -> [..., d_out]. axes: logical names of the kernel's axes."""
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        kernel_metadata={"out_sharding": axes},
        bias_metadata={"out_sharding": axes[1:]},
    )
