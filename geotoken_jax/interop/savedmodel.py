"""Converts an export's StableHLO programs and parameters to TensorFlow SavedModels. Needs TensorFlow."""

import safetensors.numpy
import tensorflow as tf
from etils import epath
from jax import export
from jax.experimental import jax2tf

_README = """# TensorFlow

With TensorFlow and numpy alone, from the folder of the export:

    python standalone.py FEATURES.npy targets/savedmodel > answers.jsonl

`align/` and `geotoken/` are SavedModels with the signature `serving_default` for any number of photos. They contain the
programs `align.stablehlo` and `geotoken.stablehlo` with their parameters as XLA programs, so serving needs a runtime
with XLA, such as TensorFlow. The arguments of geotoken are query, neighbors, neighbor_tokens, neighbor_count and
numbers. `numbers` has one seed per photo, for its samples.
"""
#: Name of each program -> names of its arguments, in order.
_ARGUMENTS = {
    "align": ("features",),
    "geotoken": ("query", "neighbors", "neighbor_tokens", "neighbor_count", "numbers"),
}


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes the SavedModels align/ and geotoken/. Returns the text of README.md."""
    for name, arguments in _ARGUMENTS.items():
        program = export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
        parameters = safetensors.numpy.load((folder / f"{name}.safetensors").read_bytes())
        shapes = program.in_avals[-len(arguments) :]
        call = jax2tf.convert(
            lambda *values, program=program, parameters=parameters: program.call(parameters, *values),
            polymorphic_shapes=["b, ..." if len(shape.shape) > 1 else "b" for shape in shapes],
            native_serialization_platforms=program.platforms,
            with_gradient=False,
        )

        def named(*values: tf.Tensor, call=call) -> dict[str, tf.Tensor]:
            output = call(*values)
            return output if isinstance(output, dict) else {"vectors": output}

        specs = [
            tf.TensorSpec((None, *shape.shape[1:]), tf.as_dtype(shape.dtype), argument)
            for argument, shape in zip(arguments, shapes, strict=True)
        ]
        concrete = tf.function(named, autograph=False).get_concrete_function(*specs)
        tf.saved_model.save(tf.Module(), str(out / name), signatures=concrete)
    return _README
