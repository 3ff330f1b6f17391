"""The model as functions of arrays, to be converted for other runtimes.

The program from `embedding` maps image features to vectors. The program from `decoding` maps the vectors of a photo and
of its neighbors to candidates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import export
from jaxtyping import Float

from geotoken_jax import checkpoint, randomness, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, export_format, sample
from geotoken_jax.predict.decode import PredictSettings


class Program(NamedTuple):
    """A function of arrays for b photos, with its model.

    arguments: argument name -> shape without the axis of the photos, and type. The argument `noise` has no such axis,
    because all photos share it. run: function of the model, then of the arguments in the order of `arguments`.
    """

    model: nnx.Module
    arguments: dict[str, jax.ShapeDtypeStruct]
    run: Callable[..., Any]

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the arguments' shapes and types for a symbolic number of photos."""
        (b,) = export.symbolic_shape("b")
        return [
            jax.ShapeDtypeStruct(one.shape if name == "noise" else (b, *one.shape), one.dtype)
            for name, one in self.arguments.items()
        ]


def embedding(model: AlignModel, width: int) -> Program:
    """Returns the program that maps features [b, C] to vectors [b, 3, C], both float32. Vectors are not normalized.

    width: C.
    """
    features = jax.ShapeDtypeStruct((width,), jnp.float32)
    return Program(model, {"features": features}, lambda model, features: model.embed(features))


def decoding(model: GeoTokenModel, options: PredictSettings, *, noise: bool = False) -> Program:
    """Returns the program that maps query, neighbors, neighbor_tokens, neighbor_count and numbers to candidates.

    The program takes the arguments of predict.decode.Decoder: vectors in bfloat16, tokens and counts in int32, numbers
    in uint32. The result is a dict with the fields of Candidates; the samples are the same as the Decoder's samples.
    The model's attention must be "xla". If the model reads capture times, every capture time counts as unknown.

    noise: whether the program is for runtimes without bfloat16 and without jax's random numbers. If True, vectors are
    float32, and the argument `numbers` is replaced by `noise` [T, K, V] float32 (see predict.sample.noise), which all
    photos share; options.beam must be 0.
    """
    s = model.settings

    def run(model: GeoTokenModel, query: Any, neighbors: Any, tokens: Any, count: Any, *last: Any) -> dict[str, Any]:
        memory = model.encode(query, Neighbors(neighbors, tokens, count))
        if options.beam:
            candidates = beam.search(model, memory, options.beam)
        elif noise:
            candidates = sample.draw(model, memory, lambda t: last[0][t], 1 + samples, *tempered)
        else:
            keys = jax.vmap(lambda number: jax.random.fold_in(randomness.key(options.seed), number))(last[0])
            candidates = sample.sample(model, memory, keys, samples, *tempered)
        return candidates._asdict()

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
    """Returns an export's programs `align` and `geotoken` for runtimes without random numbers, and the noise to pass.

    The noise is drawn for number 0, as in GeoToken.predict. The model computes in float32, because such runtimes have
    no bfloat16. Raises SettingsError if the export decodes by beam search, because its sorting was tested in jax only.
    """
    folder = epath.Path(folder)
    config = export_format.read_config(folder)
    options = dataclasses.replace(settings.read(ModelSettings, config["model"], "model"), dtype="float32")
    width = options.backbone_width
    aligned = AlignTask(settings.read(AlignSettings, config["align"], "align"), width)
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(options, rngs))
    predict = settings.read(PredictSettings, config["predict"], "predict")
    if predict.beam:
        raise settings.SettingsError(
            f"{folder} decodes by beam search (config.predict.beam is {predict.beam}), but programs for other runtimes "
            "can only sample: set config.predict.beam to 0, and run `geotoken predict` and `geotoken export` again"
        )
    program = decoding(model, predict, noise=True)
    programs = {
        "align": embedding(checkpoint.read_module(folder / "align.safetensors", aligned.init), width),
        "geotoken": program,
    }
    key = jax.random.fold_in(randomness.key(predict.seed), 0)
    length, candidates, vocabulary = program.arguments["noise"].shape
    drawn = [sample.noise(key[None], jnp.int32(t), candidates - 1, vocabulary)[0] for t in range(length)]
    return programs, np.stack(drawn)
