"""An export as ONNX, which onnxruntime answers with. Needs jax2onnx."""

import jax
import jax2onnx
import numpy as np
from etils import epath
from jax.extend.core import jaxpr_as_fun

from geotoken_jax.predict import programs
from geotoken_jax.predict.programs import Program

_README = """# ONNX

With onnxruntime and numpy alone, from the folder of the export:

    python standalone.py FEATURES.npy targets/onnx > answers.jsonl

`align.onnx` makes vectors [b, 3, C] from features [b, C]; `geotoken.onnx` candidates from these, the neighbors' and
`noise.npy` [T, K, V], which is added to the log-probabilities of a token before the largest is taken: with this noise
the candidates are those of `GeoToken.load`; with noise of your own (0 for the first candidate, which is greedy,
Gumbel's for the others) they are others.
"""


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes align.onnx, geotoken.onnx, weights inside, and noise.npy; returns what README.md is to say."""
    read, noise = programs.with_noise(folder)
    for name, program in read.items():
        _convert(program, out / f"{name}.onnx")
    with (out / "noise.npy").open("wb") as file:
        np.save(file, noise)
    return _README


def _convert(program: Program, file: epath.Path) -> None:
    shapes = program.shapes()
    # Traced before jax2onnx puts operations of its own in the place of flax's and jax's.
    traced, result = jax.make_jaxpr(lambda *values: program.run(program.model, *values), return_shape=True)(*shapes)
    jax2onnx.to_onnx(
        jaxpr_as_fun(traced),
        shapes,
        input_names=list(program.arguments),
        output_names=sorted(result) if isinstance(result, dict) else ["vectors"],
        return_mode="file",
        output_path=str(file),
    )
