"""Makes the mesh, and shards arrays by a table from logical axis names to mesh axes.

Modules give the axes of their arrays logical names (embed, mlp, heads, vocab, layers, batch). RULES alone maps these
names to mesh axes: data (replicas), fsdp (replicas that shard parameters and optimizer state) and tensor (devices that
share matrix products).
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
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": None,
    "layers": None,
}

#: Mesh axes of the devices that train on different photos, in the order in which `update_spec` splits an axis.
_REPLICAS = ("fsdp", "data")
#: Smallest number of elements per device for which `update_spec` splits an array: one tile of a TPU's memory in float32
#: (8 x 128). A smaller piece would be padded to a tile, and each further array that is split costs two collectives.
SMALLEST_SHARD = 1024

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


def local_mesh() -> Mesh:
    """Returns a mesh over the devices of this process, all on axis data."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def over_local_devices(function: Callable[..., Any], state: Any, key: Any = None) -> tuple[Callable[..., Any], int]:
    """Returns the compiled function(*arrays) of function(state, *arrays), and the number of local devices it runs on.

    Every device has a copy of the state and computes an equal share of the rows. There is no communication, so a loop
    may take more turns on one device than on another. The leading axis of all arrays and results is the batch, whose
    size must be a multiple of the number of devices (see batch.padded_size).

    key: see compiled.jit. If it is None, or if there are several devices, the function is traced by every process.
    """
    mesh, rows = local_mesh(), spec("batch")
    if mesh.size == 1:
        program = jax.jit(function) if key is None else compiled.jit(function, key)
        return lambda *arrays: program(state, *jax.device_put(arrays)), 1
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def run(state: Any, *arrays: Any) -> Any:
        in_specs = (PartitionSpec(), *[rows] * len(arrays))
        # check_vma refuses the loops of decoding, whose first carry is equal on all devices.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(state, *arrays)

    return lambda *arrays: run(state, *jax.device_put(arrays, NamedSharding(mesh, rows))), mesh.size


def platform() -> str | None:
    """Returns the platform of the mesh in use, whose devices may be absent, or None if no mesh is in use."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else None


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array. logical: logical name of each axis; None if the axis is not split."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns x, sharded along its first axes. logical: see `spec`.

    x is unchanged if no mesh is in use, or inside a shard_map, where x is one device's share.

    Without this constraint XLA may split activations in the same way as parameters, so that every device computes on
    all photos.
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

    Processes whose devices differ only on axis tensor hold the same rows. Rows need not be consecutive. Raises
    SettingsError if the batch does not divide over the mesh.
    """
    shards = batch_shards(mesh)
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


def update_spec(variable: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec in which the optimizer stores and updates a variable.

    Besides the split of RULES the variable is split over data-parallel devices, so that each of them updates its share
    (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1). The axis before the last is split if it divides, because the
    last axis then keeps whole tiles. The axis of stacked layers is the last choice, because the loop over layers can
    split the gradient of a layer, but not the layers. A variable stays as RULES split it if it has no logical names, if
    no axis divides, or if a device would store fewer than SMALLEST_SHARD elements.
    """
    names, shape = variable.get_metadata().get("out_sharding") or (), variable.shape
    axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in spec(*names)]
    further = tuple(a for a in _REPLICAS if mesh.shape[a] > 1 and not any(a in split for split in axes))
    order = sorted(range(len(names)), key=lambda i: (names[i] == "layers", i != len(shape) - 2, -i))
    # All further mesh axes if an axis of the array divides over them, else the largest of them that fits.
    for added in (further, *sorted(((a,) for a in further), key=lambda a: -mesh.shape[a[0]])) if further else ():
        for at in order:
            tried = [split + added * (i == at) for i, split in enumerate(axes)]
            shards = [math.prod(mesh.shape[a] for a in split) for split in tried]
            if shape[at] % shards[at] == 0 and math.prod(shape) >= SMALLEST_SHARD * math.prod(shards):
                return PartitionSpec(*(split if len(split) > 1 else split[0] if split else None for split in tried))
    return spec(*names)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The type in which a variable's gradient is summed over devices, and the sharding of the sum.

    dtype: type of the sums. layout: sharding of the variable in the model. update: sharding in the optimizer.
    """

    dtype: str
    layout: PartitionSpec
    update: PartitionSpec

    def of_layer(self) -> "Gradient":
        """Returns the type and sharding for one layer of a stack."""
        return Gradient(self.dtype, PartitionSpec(*self.layout[1:]), PartitionSpec(*self.update[1:]))

    def attach(self, x: jax.Array) -> jax.Array:
        """Returns x in the type of the sums. The backward pass sums x's gradient and splits it as `update`.

        The gradient is constrained to `layout` first. Otherwise the compiler splits the products that compute it: for
        the token table it exchanged the activations' gradients of all photos, and for 16 v5e chips it replaced each
        product by a loop of 16 small ones.
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
    """Returns the variables of one layer of a stack, each with the Gradient in its metadata attached."""

    def attached(variable: Any) -> Any:
        gradient = variable.get_metadata().get("gradient")
        return variable if gradient is None else variable.replace(gradient.of_layer().attach(variable[...]))

    return jax.tree.map(attached, layer, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, x: jax.Array, parameter: jax.Array) -> jax.Array:
    """Returns the product of activations x and a parameter, computed in the type of x.

    The parameter's gradient has the type of the parameter. With a float32 parameter and bfloat16 activations, the
    gradient of each device is therefore not rounded before it is summed over devices.
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
    # As a product with ones: a TPU's matrix unit adds up rows faster than its vector unit. Eight rows of ones fill a
    # register; XLA would turn one row into a sum.
    rows = g.reshape(-1, g.shape[-1])
    ones = jnp.ones((8, len(rows)), g.dtype)
    return g, jnp.einsum("rn,nd->rd", ones, rows, preferred_element_type=jnp.float32)[0].astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias.astype(x.dtype), bias), _add_bias_backward)


def parameter(
    key: jax.Array, initializer: Any, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any = jnp.float32
) -> nnx.Param:
    """Returns a float32 parameter.

    axes: logical name of each axis. dtype: type to which the model casts the parameter wherever it reads it. Trainer
    casts it to this type once per step.
    """
    return nnx.Param(initializer(key, shape, jnp.float32), out_sharding=axes, compute_dtype=jnp.dtype(dtype))


class Linear(nnx.Linear):
    """A linear layer whose products and sums with its parameters are `einsum` and `add_bias`."""

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
    param_dtype: Any = jnp.float32,
) -> Linear:
    """Returns a linear layer [..., d_in] -> [..., d_out]. axes: logical names of the kernel's axes."""
    return Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        kernel_metadata={"out_sharding": axes, "compute_dtype": jnp.dtype(dtype)},
        bias_metadata={"out_sharding": axes[1:], "compute_dtype": jnp.dtype(dtype)},
    )
