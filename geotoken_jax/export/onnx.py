"""Converts an export's program to ONNX for onnxruntime. Needs jax2onnx."""

from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
from etils import epath
from jax import export
from jax.extend.core import jaxpr_as_fun
from jax2onnx.converter import ir_optimizations, output_binding
from onnx_ir import _core

from geotoken_jax.export import program as programs

_README = """# ONNX

With onnxruntime, numpy and pillow alone, from the folder of the export:

    python standalone.py --target=targets/onnx PHOTOS...

`program.onnx` maps photos to answers. ../../signature.json lists its inputs and outputs. It contains the parameters.
The gallery's arrays are inputs, with bfloat16 widened to float32. The random numbers of the samples are constants.
"""


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes program.onnx. Returns the text of README.md."""
    program = programs.load(folder, plain=True)
    names = list(program.gallery)

    def run(*arguments: jax.Array) -> dict[str, jax.Array]:
        *columns, photos = arguments
        outputs = program.run(program.model, dict(zip(names, columns, strict=True)), photos)
        # jax2onnx loses the name of an output that other operations read as well.
        return {name: x * jnp.ones((), x.dtype) for name, x in outputs.items()}

    def plain(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(one.shape, jnp.float32 if one.dtype == jnp.bfloat16 else np.dtype(one.dtype))

    shapes = [*map(plain, program.gallery.values()), program.photos()]
    # Trace before the conversion, during which jax2onnx patches operations of flax and jax.
    traced, outputs = jax.make_jaxpr(run, return_shape=True)(*shapes)
    _patch_jax2onnx()
    jax2onnx.to_onnx(
        jaxpr_as_fun(traced),
        shapes,
        input_names=[*(f"gallery_{name}" for name in names), program.photo[0]],
        output_names=sorted(outputs),
        return_mode="file",
        output_path=str(out / "program.onnx"),
    )
    return _README


def _patch_jax2onnx() -> None:
    """Changes jax2onnx 0.17.1, whose version TARGETS pins, where it stops or takes more than 10 minutes."""
    # Some conversions pass the number of photos as jax's symbolic size, which onnx_ir does not know.
    accepted = _core._maybe_convert_to_symbolic_dim

    def convert(size: Any) -> Any:
        return _core.SymbolicDim(str(size)) if export.is_symbolic_dim(size) else accepted(size)

    _core._maybe_convert_to_symbolic_dim = convert
    # For each operation, jax2onnx looks for its results among the results of all operations.
    connected = output_binding._value_is_graph_connected
    output_binding._value_is_graph_connected = lambda context, value: (
        value.producer() is not None or connected(context, value)
    )
    # jax2onnx's own passes look through the whole program for each operation. onnxruntime has the same passes. The
    # other passes come from onnx_ir.
    ir_optimizations._OPTIMIZER_PASSES = tuple(one for one in ir_optimizations._OPTIMIZER_PASSES if one.model_runner)
