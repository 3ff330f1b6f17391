"""Makes the mesh, and shards arrays by a table from logical axis names to mesh axes.

Modules give the axes of their arrays logical names (embed, mlp, heads, vocab, layers, batch). RULES alone maps these
names to mesh axes: data (replicas), fsdp (replicas that shard parameters and optimizer state) and tensor (devices that
share matrix products).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
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
    """config.mesh: sizes of the mesh axes. One size may be -1, for all remaining devices."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(settings: MeshSettings, devices: Any = None) -> Mesh:
    """Returns a mesh over devices; over all devices if None. Raises SettingsError if the sizes do not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    requested = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if known < 1 or len(open_axes) > 1 or len(devices) % known or (not open_axes and known != len(devices)):
        raise SettingsError(
            f"config.mesh ({requested}) does not fit {len(devices)} devices: set the sizes so that their product is "
            f"{len(devices)}; one of them may be -1, for all remaining devices"
        )
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


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
