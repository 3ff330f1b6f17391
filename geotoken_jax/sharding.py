"""The mesh, and the one table from logical axes of arrays to its axes.

Modules name what an axis is (embed, mlp, heads, vocab, layers, batch); only this table says over which mesh axes it is
split. Mesh axes: data (replicas), fsdp (replicas that share out parameters and optimizer), tensor (one product split).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from geotoken_jax.settings import SettingsError

#: Logical axis -> mesh axes. An axis that is not here, or None, is not split.
RULES: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": None,
    "layers": None,
}

# Variables carry logical names and get their sharding when a whole state is made on a mesh, in `shardings`.
nnx.use_eager_sharding(False)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh axes; one of them may be -1: all devices that are left."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(settings: MeshSettings, devices: Any = None) -> Mesh:
    """Returns the mesh over all devices. Raises SettingsError if their number does not divide as asked."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(settings)
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if known < 1 or len(open_axes) > 1 or len(devices) % known or (not open_axes and known != len(devices)):
        raise SettingsError(
            f"config.mesh ({asked}) does not fit {len(devices)} devices: the product must be that number"
        )
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the partition of an array whose axes have these logical names."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns x, laid over the mesh by the logical names of its first axes; x itself where no mesh is in use.

    Without it XLA may split activations as it does the parameters they meet, and every device then works on all photos.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns how a batch lies on the mesh: split by its first axis."""
    return NamedSharding(mesh, spec("batch"))


def shardings(state: Any, mesh: Mesh) -> Any:
    """Returns a pure dict of NamedShardings for an (abstract) nnx.State, by the logical names its Variables carry.

    Raises SettingsError naming the parameter if a split axis does not divide.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("out_sharding") or ()
        partition = spec(*names)
        for size, axes in zip(variable.shape, partition, strict=False):
            ways = int(np.prod([mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or [])]))
            if size % ways:
                name = "/".join(map(str, path))
                raise SettingsError(
                    f"{name}: axis of {size} does not divide over {axes} = {ways}: choose another mesh or width"
                )
        flat[path] = NamedSharding(mesh, partition)
    return traverse_util.unflatten_dict(flat)


def parameter(key: jax.Array, initializer: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter whose axes have these logical names."""
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
    """Returns a linear layer [..., d_in] -> [..., d_out] whose kernel axes have these logical names."""
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
