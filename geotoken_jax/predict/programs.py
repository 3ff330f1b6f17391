"""What an export answers with, as functions of arrays that any runtime may be given: features to vectors, and these
with the neighbors' to candidates.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import export
from jaxtyping import Float

from geotoken_jax import checkpoint, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, sample
from geotoken_jax.predict.decode import PredictSettings


class Program(NamedTuple):
    """What is done with b photos. arguments: by name, the shape and type of each, of one photo; run: of the model and
    them."""

    model: nnx.Module
    arguments: dict[str, jax.ShapeDtypeStruct]
    run: Callable[..., Any]

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the arguments' own for a number of photos that is left open."""
        (b,) = export.symbolic_shape("b")
        return [
            jax.ShapeDtypeStruct(one.shape if name == "noise" else (b, *one.shape), one.dtype)
            for name, one in self.arguments.items()
        ]


def embedding(model: AlignModel, width: int) -> Program:
    """Returns features [b, C] float32 -> vectors [b, 3, C] float32, not normalized."""
    features = jax.ShapeDtypeStruct((width,), jnp.float32)
    return Program(model, {"features": features}, lambda model, features: model.embed(features))


def decoding(model: GeoTokenModel, options: PredictSettings, *, noise: bool = False) -> Program:
    """Returns query, neighbors, neighbor_tokens, neighbor_count, numbers -> Candidates, as a dict of its names.

    The arguments are those of predict.decode.Decoder, bfloat16, int32 and, the last, uint32; where options ask for
    samples they are those that Decoder draws. noise: for runtimes that know neither jax's random numbers nor bfloat16:
    vectors are float32, the last argument is the noise of all photos' candidates [T, K, V] float32
    (predict.sample.noise), and options ask for no beam. The model's attention must be "xla". Where it reads when a
    photo was taken, that is unknown here.
    """
    s = model.settings

    def run(model: GeoTokenModel, query: Any, neighbors: Any, tokens: Any, count: Any, *last: Any) -> dict[str, Any]:
        memory = model.encode(query, Neighbors(neighbors, tokens, count))
        if options.beam:
            found = beam.search(model, memory, options.beam)
        elif noise:
            found = sample.draw(model, memory, lambda t: last[0][t], 1 + samples, *tempered, together=True)
        else:
            keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(options.seed), number))(last[0])
            found = sample.sample(model, memory, keys, samples, *tempered)
        return found._asdict()

    samples, *tempered = options.samples, options.temperature, options.top_p
    vectors, kind = (3, s.backbone_width), jnp.float32 if noise else jnp.bfloat16
    arguments = {
        "query": jax.ShapeDtypeStruct(vectors, kind),
        "neighbors": jax.ShapeDtypeStruct((s.neighbors, *vectors), kind),
        "neighbor_tokens": jax.ShapeDtypeStruct((s.neighbors, s.cells.length), jnp.int32),
        "neighbor_count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    if noise:
        shape = (s.cells.length, 1 + samples, max(s.cells.vocab_sizes))
        arguments["noise"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    else:
        arguments["numbers"] = jax.ShapeDtypeStruct((), jnp.uint32)
    return Program(model, arguments, run)


def with_noise(folder: epath.PathLike) -> tuple[dict[str, Program], Float[np.ndarray, "T K V"]]:
    """Returns the programs `align` and `geotoken` of an export's folder, for a runtime that is given the noise, and the
    noise of number 0, which `GeoToken.load` draws with.

    Without bfloat16, a model whose products are in it is given float32 for them. Raises SettingsError where candidates
    come from a beam, whose sorting nothing but jax has been given yet.
    """
    folder = epath.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    options = dataclasses.replace(settings.read(ModelSettings, config["model"], "model"), dtype="float32")
    width = options.backbone_width
    aligned = AlignTask(settings.read(AlignSettings, config["align"], "align"), width)
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(options, rngs))
    predict = settings.read(PredictSettings, config["predict"], "predict")
    if predict.beam:
        raise settings.SettingsError(
            f"config.predict.beam is {predict.beam}, and this target has candidates by sampling only: export with 0"
        )
    program = decoding(model, predict, noise=True)
    read = {
        "align": embedding(checkpoint.read_module(folder / "align.safetensors", aligned.init), width),
        "geotoken": program,
    }
    key = jax.random.fold_in(jax.random.key(predict.seed), 0)
    length, candidates, vocabulary = program.arguments["noise"].shape
    drawn = [sample.noise(key[None], jnp.int32(t), candidates - 1, vocabulary)[0] for t in range(length)]
    return read, np.stack(drawn)
