"""Programs of an export as StableHLO, which jax compiles for any CPU, GPU or TPU: from features to vectors, and from
these and the neighbors' to candidates. They take their parameters as an argument, so weights lie in the folder once.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from geotoken_jax.align.heads import AlignModel
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.sample import sample

#: What a program is lowered for; none of them needs to be there.
PLATFORMS = ("cpu", "cuda", "tpu")


def embedding(model: AlignModel, width: int) -> bytes:
    """Returns the program (parameters, features [b, C] float32) -> vectors [b, 3, C] float32, not normalized."""
    return _serialized(model, lambda model, features: model.embed(features[None])[0], (((width,), jnp.float32),))


def decoding(model: GeoTokenModel, options: PredictSettings) -> bytes:
    """Returns the program (parameters, query, neighbors, neighbor_tokens, neighbor_count, numbers) -> Candidates, as a
    dict of its names; the arguments are those of predict.decode.Decoder, bfloat16, int32 and, the last, uint32.

    Where options ask for samples they are those that Decoder draws. The model's attention must be "xla". Where it
    reads when a photo was taken, that is unknown here.
    """
    s = model.settings

    def run(model: GeoTokenModel, query: Any, neighbors: Any, tokens: Any, count: Any, number: Any) -> dict[str, Any]:
        memory = model.encode(query[None], Neighbors(neighbors[None], tokens[None], count[None]))
        if options.beam:
            found = beam.search(model, memory, options.beam)
        else:
            key = jax.random.fold_in(jax.random.key(options.seed), number)
            found = sample(model, memory, key[None], options.samples, options.temperature, options.top_p)
        return {name: values[0] for name, values in found._asdict().items()}

    vectors = (3, s.backbone_width)
    arguments = (
        (vectors, jnp.bfloat16),
        ((s.neighbors, *vectors), jnp.bfloat16),
        ((s.neighbors, s.cells.length), jnp.int32),
        ((), jnp.int32),
        ((), jnp.uint32),
    )
    return _serialized(model, run, arguments)


def _serialized(
    model: nnx.Module, run: Callable[..., Any], arguments: tuple[tuple[tuple[int, ...], Any], ...]
) -> bytes:
    """Returns what `run` does with a model and one photo, for any number of photos.

    arguments: shape and type of each, of one photo. The model's code asks for the length of its batch, which must be a
    number: it sees batches of one, and what is mapped over is as long as it may be.
    """
    graph, state = nnx.split(model)
    flat = [("/".join(map(str, key)), key, variable) for key, variable in nnx.to_flat_state(state)]

    def every(parameters: dict[str, jax.Array], *arguments: jax.Array) -> Any:
        filled = nnx.from_flat_state([(key, variable.replace(parameters[name])) for name, key, variable in flat])
        return jax.vmap(lambda *photo: run(nnx.merge(graph, filled), *photo))(*arguments)

    (b,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *shape), dtype) for shape, dtype in arguments]
    parameters = {name: jax.ShapeDtypeStruct(variable.shape, variable.dtype) for name, _, variable in flat}
    with _without_places():
        return bytes(export.export(jax.jit(every), platforms=PLATFORMS)(parameters, *shapes).serialize())


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keeps the files and lines of who calls out of what is lowered meanwhile: jax notes them beside each operation."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
