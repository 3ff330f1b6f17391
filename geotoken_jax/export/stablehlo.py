"""Writes an export's program as StableHLO, which jax compiles for any CPU, GPU or TPU.

The program maps photos to answers (see export.program). Its parameters are an argument and are stored in
program.safetensors.
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
from geotoken_jax.backbone import preprocess
from geotoken_jax.export import program as programs
from geotoken_jax.export import standalone
from geotoken_jax.export.program import Program
from geotoken_jax.manifests import write_bytes, write_json

#: Platforms that a program is lowered for. Lowering does not need the hardware.
PLATFORMS = ("cpu", "cuda", "tpu")
#: Requirements of standalone.py.
_REQUIREMENTS = "jax\nnumpy\npillow\nflatbuffers\n"


def write(folder: epath.Path) -> None:
    """Writes the program of an export, its parameters and signature, and standalone.py, which runs it.

    All other files of the export must already be in the folder. The files are program.stablehlo, program.safetensors,
    signature.json, standalone.py with preprocess.py, and standalone-requirements.txt.
    """
    program = programs.load(folder)
    checkpoint.write_parameters(folder / "program.safetensors", nnx.to_pure_dict(nnx.state(program.model)))
    exported = lowered(program)
    write_bytes(folder / "program.stablehlo", bytes(exported.serialize()))
    write_json(folder / "signature.json", signature(program, exported))
    for module in (standalone, preprocess):
        source = pathlib.Path(module.__file__ or "")
        write_bytes(folder / source.name, source.read_bytes())
    write_bytes(folder / "standalone-requirements.txt", _REQUIREMENTS.encode())


def signature(program: Program, exported: export.Exported) -> dict[str, Any]:
    """Returns the contents of signature.json: inputs and outputs of the program, and how photos are prepared.

    exported: result of `lowered`.
    """
    name, photo = program.photo
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)

    def plain(one: Any) -> dict[str, Any]:
        return {"shape": [d if isinstance(d, int) else "B" for d in one.shape], "type": one.dtype.name}

    return {
        "photos": {"name": name, "shape": ["B", *photo.shape], "type": photo.dtype.name},
        "prepare": program.prepare,
        "gallery": {name: plain(one) for name, one in program.gallery.items()},
        "outputs": {name: {**plain(one), "meaning": programs.OUTPUTS[name]} for name, one in outputs.items()},
        "platforms": list(PLATFORMS),
    }


def lowered(program: Program) -> export.Exported:
    """Returns the program (parameters, gallery, photos) -> outputs for PLATFORMS; all but photos are dicts."""
    graph, state = nnx.split(program.model)
    flat = [("/".join(map(str, key)), key, variable) for key, variable in nnx.to_flat_state(state)]

    def run(parameters: dict[str, jax.Array], gallery: dict[str, jax.Array], photos: jax.Array) -> Any:
        filled = nnx.from_flat_state([(key, variable.replace(parameters[name])) for name, key, variable in flat])
        return program.run(nnx.merge(graph, filled), gallery, photos)

    parameters = {name: jax.ShapeDtypeStruct(variable.shape, variable.dtype) for name, _, variable in flat}
    with _without_source_locations():
        return export.export(jax.jit(run), platforms=PLATFORMS)(parameters, program.gallery, program.photos())


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Inside the context, jax lowers programs without source locations.

    By default jax stores the caller's file names and lines with each operation, which would put local paths into the
    export.
    """
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
