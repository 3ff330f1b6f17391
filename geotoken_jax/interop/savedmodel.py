"""An export as TensorFlow's SavedModels: its StableHLO with the parameters in it. Needs TensorFlow."""

import safetensors.numpy
import tensorflow as tf
from etils import epath
from jax import export
from jax.experimental import jax2tf

_README = """# TensorFlow

With TensorFlow and numpy alone, from the folder of the export:

    python standalone.py FEATURES.npy targets/savedmodel > answers.jsonl

`align/` and `geotoken/` are SavedModels with a signature `serving_default` for any number of photos: the programs of
`align.stablehlo` and `geotoken.stablehlo`, parameters inside, as XLA's, so what serves them needs XLA (TensorFlow has
it). Arguments of geotoken are query, neighbors, neighbor_tokens, neighbor_count and numbers, which decide the samples.
"""
#: Arguments of each program, in its order.
_ARGUMENTS = {
    "align": ("features",),
    "geotoken": ("query", "neighbors", "neighbor_tokens", "neighbor_count", "numbers"),
}


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes the SavedModels align and geotoken; returns what README.md is to say."""
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
            found = call(*values)
            return found if isinstance(found, dict) else {"vectors": found}

        specs = [
            tf.TensorSpec((None, *shape.shape[1:]), tf.as_dtype(shape.dtype), argument)
            for argument, shape in zip(arguments, shapes, strict=True)
        ]
        concrete = tf.function(named, autograph=False).get_concrete_function(*specs)
        tf.saved_model.save(tf.Module(), str(out / name), signatures=concrete)
    return _README
