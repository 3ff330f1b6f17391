"""Writes an export's two programs as StableHLO, which jax compiles for any CPU, GPU or TPU.

`align` maps features to vectors. `geotoken` maps the vectors of a photo and of its neighbors to candidates. Programs
contain no parameters. Parameters are arguments, and the export stores them in its `.safetensors` files.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax import export

from geotoken_jax import checkpoint
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.manifests import write_bytes
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict import programs
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.programs import Program

#: Platforms that a program is lowered for. Lowering does not need the hardware.
PLATFORMS = ("cpu", "cuda", "tpu")


def embedding(model: AlignModel, width: int) -> bytes:
    """Returns the serialized program that maps parameters and features [b, C] to vectors [b, 3, C], for b photos.

    Features and vectors are float32. Vectors are not normalized. width: C.
    """
    return _serialized(programs.embedding(model, width))


def decoding(model: GeoTokenModel, options: PredictSettings) -> bytes:
    """Returns the serialized program that maps parameters, b query photos and their neighbors to Candidates.

    Its arguments are parameters, query, neighbors, neighbor_tokens, neighbor_count and numbers. `arguments` in
    programs.decoding has their shapes for one photo.
    """
    return _serialized(programs.decoding(model, options))


def write(folder: epath.Path, align: AlignSettings, model: ModelSettings, predict: PredictSettings, width: int) -> None:
    """Writes align.stablehlo, geotoken.stablehlo, and standalone.py, which runs the two programs.

    The parameter files must already be in the folder. width: width C of the backbone's features.
    """
    aligned = checkpoint.read_module(folder / "align.safetensors", AlignTask(align, width).init)
    decoder = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(model, rngs))
    write_bytes(folder / "align.stablehlo", embedding(aligned, width))
    write_bytes(folder / "geotoken.stablehlo", decoding(decoder, predict))
    write_bytes(folder / "standalone.py", pathlib.Path(__file__).with_name("standalone.py").read_bytes())


def _serialized(program: Program) -> bytes:
    graph, state = nnx.split(program.model)
    flat = [("/".join(map(str, key)), key, variable) for key, variable in nnx.to_flat_state(state)]

    def run(parameters: dict[str, jax.Array], *arguments: jax.Array) -> Any:
        filled = nnx.from_flat_state([(key, variable.replace(parameters[name])) for name, key, variable in flat])
        return program.run(nnx.merge(graph, filled), *arguments)

    parameters = {name: jax.ShapeDtypeStruct(variable.shape, variable.dtype) for name, _, variable in flat}
    with _without_source_locations():
        return bytes(export.export(jax.jit(run), platforms=PLATFORMS)(parameters, *program.shapes()).serialize())


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Inside the context, jax lowers programs without source locations.

    By default jax stores the file name and line of each operation. The export would then contain local paths.
    """
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
