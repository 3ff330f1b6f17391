"""Compares the memory of the alignment losses, computed in chunks, with the memory of the plain formula.

Prints one JSON line. Both sides compute loss and gradient. They are compiled for `--devices` CPU devices, but not run.
Figures are bytes on one device, from XLA's memory analysis. `temporary` is the memory besides inputs and results.
"""

import argparse
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs import common
from geotoken_jax import sharding
from geotoken_jax.align import loss
from geotoken_jax.align.loss import Targets
from geotoken_jax.vectors import unit


def plain(
    kind: str, photos: Array, targets: Targets, log_scale: Array, bias: Any = 0.0, reach: float = 0.0,
    queue: Targets | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Returns the result of loss.info_nce or loss.sigmoid, computed by the formula from the whole similarity matrix."""
    rows, columns = targets.key, targets if queue is None else Targets(*map(_join, targets, queue))
    n = len(rows)
    logits = jnp.exp(log_scale) * unit(photos) @ unit(columns.vectors).T + bias
    apart = sum((a[:, None] - b) ** 2 for a, b in zip(rows.T, columns.key.T, strict=True)) > reach**2
    negative = targets.present[:, None] & columns.present & apart
    own = jnp.diagonal(logits)
    logits = jnp.where(negative | jnp.eye(n, len(columns.key), dtype=bool), logits, -jnp.inf)
    if kind == "sigmoid":
        losses = jax.nn.softplus(-own) + jnp.where(negative, jax.nn.softplus(logits), 0).sum(1)
    else:
        both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits[:, :n], axis=0)
        losses = both / 2 - own
    present = jnp.maximum(targets.present.sum(), 1)
    nearest = (own == logits[:, :n].max(0)) & targets.present
    return jnp.where(targets.present, losses, 0).sum() / present, nearest.sum() / present


def _join(a: Array, b: Array) -> Array:
    return jnp.concatenate([a, b])


def ours(kind: str, photos: Array, targets: Targets, log_scale: Array, bias: Any, **options: Any) -> tuple:
    """Returns the result of loss.info_nce or loss.sigmoid."""
    if kind == "sigmoid":
        return loss.sigmoid(photos, targets, log_scale, bias, **options)
    return loss.info_nce(photos, targets, log_scale, **options)


def memory(function: Any, batch: int, width: int, devices: int) -> dict[str, int]:
    """Returns the bytes on one device for function(photos, targets, log_scale, bias) with its gradient."""
    mesh = sharding.make_mesh(sharding.MeshSettings(devices, 1, 1), jax.devices()[:devices])

    def graded(photos: Array, vectors: Array, key: Array, present: Array, scale: Array, bias: Array) -> Any:
        def scored(photos: Array, vectors: Array, scale: Array, bias: Array) -> Array:
            return function(photos, Targets(vectors, key, present), scale, bias)[0]

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(scored, argnums=(0, 1, 2, 3))(photos, vectors, scale, bias)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        placement = sharding.batch_sharding(mesh) if shape else jax.sharding.NamedSharding(mesh, sharding.spec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    vectors, key, present = array(batch, width), array(batch, 4), array(batch, dtype=jnp.bool_)
    like = (vectors, vectors, key, present, array(), array())
    compiled = jax.jit(graded, out_shardings=(None, tuple(x.sharding for x in (vectors, vectors, array(), array()))))
    analysis: Any = compiled.lower(*like).compile().memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }


def main() -> None:
    """Prints one JSON line."""
    config: Any = common.get_config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=config.align.loss.chunk)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_num_cpu_devices", options.devices)
    size = (options.batch, options.width, options.devices)
    result: dict[str, Any] = {**vars(options)}
    for kind in loss.KINDS:
        bytes_used = {
            "ours": memory(lambda *a, kind=kind: ours(kind, *a, chunk=options.chunk), *size),
            "plain": memory(lambda *a, kind=kind: plain(kind, *a), *size),
        }
        result[kind] = {**bytes_used, "ratio": bytes_used["ours"]["temporary"] / bytes_used["plain"]["temporary"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
