"""Converts an export's programs to ONNX for onnxruntime. Needs jax2onnx."""

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

`align.onnx` maps features [b, C] to vectors [b, 3, C]. `geotoken.onnx` maps the vectors of a photo and its neighbors to
candidates. The array `noise.npy` [T, K, V], for T tokens, K candidates and a vocabulary of V, is an input of
`geotoken.onnx`. It is added to the log-probabilities of each token before the argmax. With this noise the candidates
equal the candidates of `GeoToken.load`. For other samples, pass other noise. The first candidate is greedy, so its
noise is 0. The other candidates have Gumbel noise.
"""


def make(folder: epath.Path, out: epath.Path) -> str:
    """Converts an export for --target=onnx: writes align.onnx and geotoken.onnx with the weights, and noise.npy.

    Returns the text of README.md.
    """
    loaded, noise = programs.with_noise(folder)
    for name, program in loaded.items():
        _convert(program, out / f"{name}.onnx")
    with (out / "noise.npy").open("wb") as file:
        np.save(file, noise)
    return _README


def _convert(program: Program, file: epath.Path) -> None:
    shapes = program.shapes()
    # Trace first, because jax2onnx patches operations of flax and jax during the conversion.
    traced, result = jax.make_jaxpr(lambda *values: program.run(program.model, *values), return_shape=True)(*shapes)
    jax2onnx.to_onnx(
        jaxpr_as_fun(traced),
        shapes,
        input_names=list(program.arguments),
        output_names=sorted(result) if isinstance(result, dict) else ["vectors"],
        return_mode="file",
        output_path=str(file),
    )
