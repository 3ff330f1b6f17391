"""The coordinate check: how the size of the decoder's activations depends on its width (Yang et al. 2022, arXiv
2203.03466, appendix D.1).

Models of several widths do a few training steps on one batch of random photos. With a parametrization that transfers
across widths, the root mean square of each activation changes by as much in wide models as in narrow ones. If the
changes grow with the width, the best learning rate falls with the width.

With "mup", the logits of wide models are smaller at first, with exponents of the width down to -0.5, because their
initial weights are random. Training reduces this difference.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from geotoken_jax import randomness, sharding, stack
from geotoken_jax.gallery.placement import GallerySettings, lookup
from geotoken_jax.model.batch import random_batch
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.model.parametrization import PARAMETRIZATIONS
from geotoken_jax.model.task import GeoTokenTask, LossSettings
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer
from geotoken_jax.train.step import Trainer


def check(
    model: ModelSettings, optimizer: OptimizerSettings, widths: Sequence[int], steps: int, seeds: int, photos: int = 32
) -> dict[str, Any]:
    """Returns the sizes of activations of both parametrizations, and how they depend on the width.

    model: settings of the decoder; its width, feed-forward width and parametrization are replaced, and dropout is
    turned off. optimizer: its learning rate is constant in the check. widths: widths of the layers, multiples of
    model.heads; "mup" is the same model as "standard" at the first one. steps: number of training steps. seeds: number
    of initial values per width. photos: number of photos in the batch.

    The result has `widths`, `steps`, `seeds`, `rows` and `slopes`. A row has the keys `parametrization`, `width`,
    `seed`, `step` and `activation` (a name of `activations`), `rms`, its root mean square, and `change`, the root mean
    square of its difference from step 0. `slopes` are nested: parametrization, then activation, then `rms` and
    `change`. A slope is the exponent of the width at the last step, from a linear fit of the logarithms of the means
    over seeds; 0 means that the width has no effect.
    """
    rows = []
    for parametrization in PARAMETRIZATIONS:
        for width in widths:
            sized = _sized(model, parametrization, width, widths[0])
            for seed, step, measured in _trained(sized, optimizer, steps, seeds, photos):
                case = {"parametrization": parametrization, "width": width, "seed": seed, "step": step}
                rows += [{**case, "activation": name, **values} for name, values in measured.items()]
    names = dict.fromkeys(row["activation"] for row in rows)
    slopes = {p: {name: _slopes(rows, p, name, steps) for name in names} for p in PARAMETRIZATIONS}
    return {"widths": list(widths), "steps": steps, "seeds": seeds, "rows": rows, "slopes": slopes}


def _sized(model: ModelSettings, parametrization: str, width: int, base: int) -> ModelSettings:
    return dataclasses.replace(
        model, width=width, feed_forward=model.feed_forward * width // model.width, parametrization=parametrization,
        base_width=base, base_heads=model.heads, base_layers=model.encoder_layers, dtype="float32",
        dropout=0.0, attention_dropout=0.0, neighbor_dropout=0.0, attention="xla",
    )  # fmt: skip


def _trained(
    model: ModelSettings, optimizer: OptimizerSettings, steps: int, seeds: int, photos: int
) -> Iterator[tuple[int, int, dict[str, dict[str, float]]]]:
    """Yields seed, step, and the root mean squares `rms` and `change` of each activation, for each step from 0."""
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    task = GeoTokenTask(model, LossSettings(1.0, 1.0), lookup(GallerySettings("host", -1), mesh))
    trainer = Trainer(task, make_optimizer(optimizer), mesh)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    batch = jax.device_put(random_batch(model, photos), trainer.batch_sharding)

    @jax.jit
    def measure(params: Any) -> dict[str, Array]:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return activations(nnx.merge(graph, state), batch)

    for seed in range(seeds):
        state, first = trainer.init(randomness.key(seed)), None
        for step in range(steps + 1):
            found = jax.device_get(measure(state["params"]))
            first = found if first is None else first
            yield seed, step, {n: {"rms": _rms(x), "change": _rms(x - first[n])} for n, x in found.items()}
            if step < steps:
                state, _ = trainer.step(state, batch, randomness.key(seed), optimizer.learning_rate, {})


def activations(model: GeoTokenModel, batch: dict[str, Array]) -> dict[str, Array]:
    """Returns activations by name, teacher-forced and without dropout.

    These are the inputs of encoder and decoder, the output of each of their layers, the logits of their self-attention
    in all layers, of the copy head if there is one, and of the head. batch: see model.batch.spec, with the gallery on
    the host and no padding of neighbors.
    """
    neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
    x, lengths = model.embed_memory(batch["query"], neighbors, batch.get("context"))
    y = model.embed_tokens(batch["tokens"])
    found = {"encoder input": x, "decoder input": y}

    def encode(layer: Any, x: Array, _: None) -> tuple[Array, Any]:
        after = layer(x, lengths, None)
        return after, (after, _attention_logits(layer, x))

    _, (encoded, logits) = stack.scan(model.encoder, encode, x, None)
    memory, _ = model.sequence(batch["query"], neighbors, context=batch.get("context"))

    def decode(layer: Any, y: Array, _: None) -> tuple[Array, Any]:
        after = layer(y, layer.memory_attention.keys_values(memory), lengths, None)
        return after, (after, _attention_logits(layer, y))

    states, (decoded, decoder_logits) = stack.scan(model.decoder, decode, y, None)
    found |= {f"encoder layer {i + 1}": encoded[i] for i in range(len(encoded))}
    found |= {f"decoder layer {i + 1}": decoded[i] for i in range(len(decoded))}
    found |= {"encoder attention logits": logits, "decoder attention logits": decoder_logits}
    if model.settings.norm == "pre":
        states = model.decoder_norm(states)
    if model.settings.copy_head:
        keys = model.copy.key(memory[:, model.memory_builder.first_positions(neighbors.tokens.shape[1])])
        found["copy logits"] = model.copy.scores(states, keys)
    found["head logits"] = jnp.einsum("btd,tdv->btv", states, model.head[...])
    return found


def _attention_logits(layer: Any, x: Array) -> Array:
    """Returns the logits [B, H, S, S] of a layer's self-attention."""
    x = layer.norms[0](x) if layer.settings.norm == "pre" else x
    queries, (keys, _) = layer.attention.queries(x), layer.attention.keys_values(x)
    return jnp.einsum("bqhd,bkhd->bhqk", queries, keys) / np.sqrt(keys.shape[-1])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _slopes(rows: list[dict[str, Any]], parametrization: str, activation: str, step: int) -> dict[str, float]:
    """Returns the exponents of the width for `rms` and `change`, whose means over seeds are fitted in logarithms."""
    case = (parametrization, activation, step)
    rows = [row for row in rows if (row["parametrization"], row["activation"], row["step"]) == case]
    widths, slopes = sorted({row["width"] for row in rows}), {}
    for quantity in ("rms", "change"):
        means = [np.mean([row[quantity] for row in rows if row["width"] == width]) for width in widths]
        slopes[quantity] = float(np.polyfit(np.log(widths), np.log(means), 1)[0])
    return slopes
