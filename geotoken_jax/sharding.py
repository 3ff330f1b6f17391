"""Makes the mesh, and shards arrays by a table from logical axis names to mesh axes.

Modules give the axes of their arrays logical names (features, embed, mlp, heads, vocab, layers, batch). The table RULES
maps these names to mesh axes. There are three mesh axes: data (replicas of the model), fsdp (replicas that split
parameters and optimizer state among them) and tensor (devices that split matrix products among them).
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from geotoken_jax import compiled
from geotoken_jax.settings import SettingsError

#: Logical axis -> mesh axes; None if the axis is not split.
RULES: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "features": "fsdp",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": None,
    "layers": None,
}

#: Mesh axes of the devices that train on different photos, in the order in which `update_spec` splits an axis.
_REPLICAS = ("fsdp", "data")
#: Smallest number of elements per device for which `update_spec` splits an array. It is a tile of float32 numbers in a
#: TPU's memory (8 x 128). A smaller piece would be padded to a tile, and splitting an array costs two collectives.
SMALLEST_SHARD = 1024

# By default, flax would shard each variable when it is made. Here variables only have logical names of their axes, from
# which `shardings` computes the shardings of a whole state.
nnx.use_eager_sharding(False)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """config.mesh.

    data, fsdp, tensor: sizes of the mesh axes; one of them may be -1, for all remaining devices. slices: number of
    slices. A slice is a group of devices with a fast network, such as a TPU slice or a GPU node. Only axis data is
    split over several slices, because the network between them is slow. If -1, the number is read from JAX's devices.
    """

    data: int
    fsdp: int
    tensor: int
    #: configs/common.py sets it. The default serves code that makes a mesh without a configuration.
    slices: int = -1

    def __post_init__(self):
        if self.slices < 1 and self.slices != -1:
            raise ValueError(f"slices is {self.slices}: use 1 or more, or -1 for the number that the devices give")


def make_mesh(settings: MeshSettings, devices: Any = None) -> Mesh:
    """Returns a mesh over `devices`, or over all devices if None.

    Devices with the same index on axis data are in the same slice. Raises SettingsError if the sizes of the axes do not
    fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _axis_sizes(settings, len(devices))
    slices = _slices(settings.slices, devices)
    if sizes["data"] % len(slices):
        raise SettingsError(
            f"config.mesh.data is {sizes['data']}, but the devices are in {len(slices)} slices or nodes, over which "
            f"data must be split: set it to a multiple of {len(slices)}, and lower config.mesh.fsdp or "
            "config.mesh.tensor"
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
    """Returns the devices of each slice. requested: config.mesh.slices.

    JAX's devices have a slice_index: TPUs one per slice, GPUs one per node. Devices without it are in one slice.
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


def local_mesh() -> Mesh:
    """Returns a mesh over the devices of this process, all on axis data."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def over_local_devices(function: Callable[..., Any], state: Any, key: Any = None) -> tuple[Callable[..., Any], int]:
    """Compiles function(state, *arrays) for a fixed state. Returns the compiled function(*arrays), and the number of
    local devices on which it runs.

    Every device has a copy of the state and computes an equal share of the rows. Devices do not communicate, so a loop
    may have more iterations on one device than on another. The leading axis of all arrays and results is the batch. Its
    size must be a multiple of the number of devices (see batch.padded_size).

    key: key of the function in the cache of compiled programs, see compiled.jit. If it is None, or if there are several
    devices, the cache is not used.
    """
    mesh, rows = local_mesh(), spec("batch")
    if mesh.size == 1:
        program = jax.jit(function) if key is None else compiled.jit(function, key)
        return lambda *arrays: program(state, *jax.device_put(arrays)), 1
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def run(state: Any, *arrays: Any) -> Any:
        in_specs = (PartitionSpec(), *[rows] * len(arrays))
        # check_vma would refuse the loops of decoding, because their initial carry is the same on all devices.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(state, *arrays)

    return lambda *arrays: run(state, *jax.device_put(arrays, NamedSharding(mesh, rows))), mesh.size


def platform() -> str | None:
    """Returns the platform of the mesh in use, such as "tpu", or None if no mesh is in use.

    The devices of the mesh need not exist on this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else None


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array. logical: logical name of each axis; None if the axis is not split."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns x, constrained to a sharding of its first axes. logical: logical names of these axes, see `spec`.

    If no mesh is in use, x is returned unchanged. The same holds inside a shard_map, where x is one device's share.

    Without this constraint, XLA may split activations in the same way as parameters. Every device would then compute
    on all photos.
    """
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, split along its first axis."""
    return NamedSharding(mesh, spec("batch"))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch, data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, sorted and unique.

    Two processes hold the same rows if their devices differ only on axis tensor. The rows of a process need not be
    consecutive. Raises SettingsError if the mesh does not divide the batch evenly.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise SettingsError(
            f"batch_size is {batch_size}, which does not divide over data x fsdp = {shards} of config.mesh: set it to "
            f"a multiple of {shards}"
        )
    local = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = np.unique([np.arange(batch_size)[index] for index in local])
    rows.flags.writeable = False  # because all calls with the same arguments return this array
    return rows


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Returns a batch as arrays [batch_size, ...] that are split over the mesh along their first axis.

    batch: arrays with the rows of this process, in the order of `local_rows`. batch_size: number of rows of all
    processes.
    """
    rows, layout = local_rows(mesh, batch_size), batch_sharding(mesh)

    def split(name: str, values: np.ndarray) -> jax.Array:
        if len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} rows: pass the {len(rows)} rows of local_rows")

        def shard(index: Any) -> np.ndarray:  # a tuple of slices
            first, end, _ = index[0].indices(batch_size)
            start = int(np.searchsorted(rows, first))  # a shard's rows are consecutive in the batch, so also in `rows`
            return values[start : start + end - first]

        # jax.make_array_from_process_local_data would fail if two processes hold the same rows, or different numbers of
        # rows.
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
                    f"{name} has an axis of size {size}, which does not divide over {axes} = {shards} of config.mesh: "
                    "choose another config.mesh, or another width of the model"
                )
        flat[path] = NamedSharding(mesh, partition)
    return traverse_util.unflatten_dict(flat)


def update_spec(variable: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec in which the optimizer stores and updates a variable.

    In the model, a variable is split by RULES. In the optimizer, one of its axes is also split over data-parallel
    devices, and each device updates its share (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1).

    The first choice is the axis before the last, because the last axis then keeps whole tiles. The last choice is the
    axis of stacked layers: the loop over layers can split the gradient of a layer, but not the axis over which it
    loops. An axis is split only into parts of equal size, and only if each device stores at least SMALLEST_SHARD
    elements. If there is no such axis, or if the variable has no logical names, the split by RULES is returned.
    """
    names, shape = variable.get_metadata().get("out_sharding") or (), variable.shape
    axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in spec(*names)]
    further = tuple(a for a in _REPLICAS if mesh.shape[a] > 1 and not any(a in split for split in axes))
    order = sorted(range(len(names)), key=lambda i: (names[i] == "layers", i != len(shape) - 2, -i))
    # The variable is split over all further mesh axes at once if possible, else over one of them, the largest first.
    for added in (further, *sorted(((a,) for a in further), key=lambda a: -mesh.shape[a[0]])) if further else ():
        for at in order:
            tried = [split + added * (i == at) for i, split in enumerate(axes)]
            shards = [math.prod(mesh.shape[a] for a in split) for split in tried]
            if shape[at] % shards[at] == 0 and math.prod(shape) >= SMALLEST_SHARD * math.prod(shards):
                return PartitionSpec(*(split if len(split) > 1 else split[0] if split else None for split in tried))
    return spec(*names)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """How the gradient of a variable is summed over devices.

    dtype: type of the sums. layout: sharding of the variable in the model. update: sharding of the variable in the
    optimizer (see `update_spec`), which is also the sharding of the sum.
    """

    dtype: str
    layout: PartitionSpec
    update: PartitionSpec

    def of_layer(self) -> "Gradient":
        """Returns the Gradient of one layer of a stack, without the axis of layers."""
        return Gradient(self.dtype, PartitionSpec(*self.layout[1:]), PartitionSpec(*self.update[1:]))

    def attach(self, x: jax.Array) -> jax.Array:
        """Returns x, converted to `dtype`. The backward pass sums the gradient of x, and shards the sum as `update`.

        The backward pass constrains the gradient to `layout` before it constrains it to `update`. Without the first
        constraint, the compiler split the matrix products that compute the gradient. For the token table, the devices
        then exchanged the gradients of the activations of all photos. On 16 v5e chips, each product was replaced by a
        loop of 16 small products.
        """
        return x if self.layout == self.update and x.dtype == self.dtype else _attach(x, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attach(x: jax.Array, gradient: Gradient) -> jax.Array:
    return x.astype(gradient.dtype)


def _attach_forward(x: jax.Array, gradient: Gradient) -> tuple[jax.Array, jax.Array]:
    return x.astype(gradient.dtype), jnp.zeros((), x.dtype)


def _attach_backward(gradient: Gradient, like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    if not jax.sharding.get_abstract_mesh().empty:
        g = jax.lax.with_sharding_constraint(g, gradient.layout)
        g = jax.lax.with_sharding_constraint(g, gradient.update)
    return (g.astype(like.dtype),)


_attach.defvjp(_attach_forward, _attach_backward)


def attach_gradients(layer: nnx.State) -> nnx.State:
    """Returns the variables of one layer of a stack. If a variable's metadata contain a Gradient, attaches it."""

    def attached(variable: Any) -> Any:
        gradient = variable.get_metadata().get("gradient")
        return variable if gradient is None else variable.replace(gradient.of_layer().attach(variable[...]))

    return jax.tree.map(attached, layer, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, x: jax.Array, parameter: jax.Array) -> jax.Array:
    """Returns the product of activations x and a parameter, computed in the type of x.

    The gradient of the parameter has the type of the parameter. So with a float32 parameter and bfloat16 activations,
    each device's gradient is not rounded to bfloat16 before the gradients are summed over devices.
    """
    return jnp.einsum(subscripts, x, parameter.astype(x.dtype))


def _einsum_forward(subscripts: str, x: jax.Array, parameter: jax.Array) -> tuple[jax.Array, Any]:
    return jnp.einsum(subscripts, x, parameter.astype(x.dtype)), (x, parameter)


def _einsum_backward(subscripts: str, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, parameter), (left, right, out) = saved, subscripts.replace("->", ",").split(",")
    return (
        jnp.einsum(f"{out},{right}->{left}", g, parameter.astype(x.dtype)),
        jnp.einsum(f"{left},{out}->{right}", x, g, preferred_element_type=parameter.dtype),
    )


einsum.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x + bias in the type of x. The bias has the last axes of x, and its gradient has the type of the bias."""
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    if g.dtype != jnp.bfloat16 or bias.ndim > 1:
        return g, g.sum(tuple(range(g.ndim - bias.ndim)), dtype=bias.dtype)
    # The rows are summed by a product with ones, because a TPU's matrix unit adds rows faster than its vector unit.
    # There are eight rows of ones, which fill a register. XLA would replace a product with a single row by a sum.
    rows = g.reshape(-1, g.shape[-1])
    ones = jnp.ones((8, len(rows)), g.dtype)
    return g, jnp.einsum("rn,nd->rd", ones, rows, preferred_element_type=jnp.float32)[0].astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias.astype(x.dtype), bias), _add_bias_backward)


def parameter(
    key: jax.Array, initializer: Any, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any = jnp.float32
) -> nnx.Param:
    """Returns a float32 parameter.

    axes: logical name of each axis. dtype: type to which the model casts the parameter whenever it reads it. During
    training, Trainer casts the parameter to this type once per step.
    """
    return nnx.Param(initializer(key, shape, jnp.float32), out_sharding=axes, compute_dtype=jnp.dtype(dtype))


class Linear(nnx.Linear):
    """A linear layer that is computed with `einsum` and `add_bias` of this module."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        y: Any = einsum("...i,ij->...j", inputs.astype(self.dtype), self.kernel[...])
        if self.bias is not None:
            y = add_bias(y, self.bias[...])
        return y


def linear(
    d_in: int,
    d_out: int,
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008
) -> Linear:
    """Returns a linear layer [..., d_in] -> [..., d_out]. axes: logical names of the kernel's axes."""
    return Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        rngs=rngs,
        kernel_metadata={"out_sharding": axes, "compute_dtype": jnp.dtype(dtype)},
        bias_metadata={"out_sharding": axes[1:], "compute_dtype": jnp.dtype(dtype)},
    )
