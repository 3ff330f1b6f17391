"""Converts an export's StableHLO program, parameters and gallery to a TensorFlow SavedModel. Needs TensorFlow."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath
from jax import export, tree
from jax._src.interpreters import mlir
from jax._src.lib.mlir.dialects import hlo
from jax.experimental import jax2tf
from jaxlib.mlir import passmanager
from jaxlib.mlir.dialects import stablehlo

from geotoken_jax.export import standalone

_README = """# TensorFlow

With TensorFlow, numpy and pillow alone, from the folder of the export:

    python standalone.py --target=targets/savedmodel PHOTOS...

`program/` is a SavedModel whose signature `serving_default` maps any number of photos to answers. ../../signature.json
lists its input and outputs. It contains the program of program.stablehlo with its parameters and the gallery, as an XLA
program, so serving needs a runtime with XLA, such as TensorFlow.
"""


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes the SavedModel program/. Returns the text of README.md."""
    source = pathlib.Path(folder)
    program = export.deserialize(bytearray((source / "program.stablehlo").read_bytes()))
    wanted, _ = tree.unflatten(program.in_tree, program.in_avals)
    module: Any = tf.Module()
    files = (standalone.read_safetensors(source / "program.safetensors"), standalone.arrays(source))
    module.arguments = [
        {name: _variable(values[name], avals[name].dtype, name) for name in avals}
        for values, avals in zip(files, wanted[:2], strict=True)
    ]
    photos = wanted[2]
    program = _for_older_readers(program)
    call = jax2tf.convert(
        program.call,
        polymorphic_shapes=[None, None, "b, ..."],
        native_serialization_platforms=program.platforms,
        with_gradient=False,
    )
    name = standalone.signature(source)["photos"]["name"]
    spec = tf.TensorSpec((None, *photos.shape[1:]), tf.as_dtype(photos.dtype), name)
    function = tf.function(
        lambda photos: call(*map(dict, module.arguments), photos), autograph=False, input_signature=[spec]
    )
    tf.saved_model.save(module, str(out / "program"), signatures=function)
    return _README


def _for_older_readers(program: export.Exported) -> export.Exported:
    """Returns the program without composite operations, and makes jax write it as StableHLO 1.13.

    TensorFlow 2.21 reads StableHLO up to 1.13, and jax writes 1.15, the version of 4 weeks before its release. The
    version of 12 weeks before is 1.13. jax has no setting for this. TensorFlow also does not find out the sizes inside
    composite operations, so calls of their definitions replace them.
    """
    written = hlo.get_version_from_compatibility_requirement(hlo.StablehloCompatibilityRequirement.WEEK_12)
    hlo.get_version_from_compatibility_requirement = lambda _: written
    with mlir.make_ir_context() as context:
        stablehlo.register_stablehlo_passes()
        module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
        passes = "builtin.module(func.func(stablehlo-legalize-composite-to-call),inline)"
        passmanager.PassManager.parse(passes).run(module.operation)
        text = stablehlo.serialize_portable_artifact(module, written)
    return dataclasses.replace(program, mlir_module_serialized=text)


def _variable(values: Any, dtype: np.dtype, name: str) -> tf.Variable:
    values = values.view(dtype) if values.dtype == np.uint16 else values.astype(dtype)
    return tf.Variable(values, trainable=False, name=name.replace("/", "_"))
