"""Stacks layers of equal shapes along a leading axis of every parameter, and scans over the stack.

With the scan, only one layer is compiled.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from geotoken_jax import sharding

_KEPT = "kept"

#: Value of `config.model.remat` -> policy that selects the activations to store for the backward pass, which recomputes
#: all others.
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
    """Returns x, and makes the policy "dots" of REMAT store it. Use it in forward rules of jax.custom_vjp.

    x is stored as integers. For floating-point numbers, jax.checkpoint would add an operation that rounds them to their
    type. XLA cannot fuse this operation with a kernel that computes x, so it takes as long as the largest matrix
    product of a layer.
    """
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")), _KEPT)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@jax.custom_vjp
def keep(x: jax.Array) -> jax.Array:
    """Returns `stored(x)`, and passes its gradient on to x. Without this, the gradient would end at the integers."""
    return x


keep.defvjp(lambda x: (stored(x), None), lambda _, g: (g,))


def scan(
    stacked: nnx.Module, body: Callable, carry: Any, xs: Any, remat: str = "none", unroll: bool = False
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` for each layer of a stack; returns the last carry and all ys.

    xs and ys have a leading axis for the layer. remat: key of REMAT. unroll: whether to compile every layer separately,
    instead of a loop over the layers. Unrolled layers take longer to compile, but run faster: the loop would copy each
    stored activation into an array of all layers, and back in the backward pass.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Any, layer_and_x: Any) -> tuple[Any, Any]:
        state, x = layer_and_x
        return body(nnx.merge(graph, sharding.attach_gradients(state)), carry, x)

    if remat != "none":
        # Without a loop, XLA would find that the backward pass recomputes activations, and would store them instead.
        # prevent_cse forbids this. With "dots" it is allowed, because these activations take less memory than the
        # results of the matrix products.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll and remat == "full")
    return jax.lax.scan(step, carry, (state, xs), unroll=unroll)
