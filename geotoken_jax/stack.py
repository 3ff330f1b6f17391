"""Stacks equal layers along a leading axis of every parameter and scans them, so that one layer is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from geotoken_jax import sharding

_KEPT = "kept"

#: Value of `config.model.remat` -> policy for the activations that are stored for gradients; others are recomputed.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(_KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make(layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a stack of `layers` modules: one module whose parameters have a leading axis for the layer."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> nnx.Module:
        return layer(rngs)

    return create(rngs)


def stored(x: jax.Array) -> jax.Array:
    """Returns x, which "dots" of REMAT stores for the backward pass. For the forward rules of jax.custom_vjp.

    The stored array has an integer type, because jax.checkpoint rounds stored floating-point numbers to their own type.
    XLA cannot fuse this with a kernel that computes x, and it takes as long as the largest product of a layer.
    """
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")), _KEPT)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@jax.custom_vjp
def keep(x: jax.Array) -> jax.Array:
    """Returns `stored(x)` with its gradient, which `stored` alone has not."""
    return x


keep.defvjp(lambda x: (stored(x), None), lambda _, g: (g,))


def scan(
    stacked: nnx.Module, body: Callable, carry: Any, xs: Any, remat: str = "none", unroll: bool = False
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` for each layer of a stack; returns the last carry and all ys.

    xs and ys have a leading axis for the layer. remat: key of REMAT, which decides the activations that are stored.
    unroll: whether to compile every layer on its own instead of a loop. The loop copies each stored activation into an
    array of all layers, and back in the backward pass.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Any, layer_and_x: Any) -> tuple[Any, Any]:
        state, x = layer_and_x
        return body(nnx.merge(graph, sharding.attach_gradients(state)), carry, x)

    if remat != "none":
        # Without a loop XLA would find that the backward pass computes the same again, and would store it instead. With
        # "dots" it may, because that takes less memory than the products.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll and remat == "full")
    return jax.lax.scan(step, carry, (state, xs), unroll=unroll)
