"""Stacks equal layers along a leading axis of every parameter and scans them, so that one layer is compiled."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from geotoken_jax import attention, sharding

#: Value of `config.model.remat` -> policy for the activations that are stored for gradients; others are recomputed.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    # A fused kernel is no product, so its result has a name: without it the backward pass would run the kernel again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.RESULT),
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


def scan(stacked: nnx.Module, body: Callable, carry: Any, xs: Any, remat: str = "none") -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` for each layer of a stack; returns the last carry and all ys.

    xs and ys have a leading axis for the layer. remat: key of REMAT, which decides the activations that are stored.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Any, layer_and_x: Any) -> tuple[Any, Any]:
        state, x = layer_and_x
        return body(nnx.merge(graph, sharding.attach_gradients(state)), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, xs))
