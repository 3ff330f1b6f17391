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

#: Number of a filter in Pillow -> its name in tf.image.resize.
_METHODS = {0: "nearest", 1: "lanczos3", 2: "bilinear", 3: "bicubic"}
_README = """# TensorFlow

With TensorFlow, numpy and pillow alone, from the folder of the export:

    python standalone.py --target=targets/savedmodel PHOTOS...

`program/` is a SavedModel whose signature `serving_default` maps any number of photos to answers. ../../signature.json
lists its input and outputs. The signature `encoded` has the same outputs. Its input `encoded` is a vector of the bytes
of JPEG, PNG, GIF or BMP files. TensorFlow decodes and resizes them, so its pixels differ slightly from the pixels
in standalone.py, and it does not turn photos as their EXIF data says.

`program/` contains the program of program.stablehlo with its parameters and the gallery, as an XLA program, so serving
needs a runtime with XLA, such as TensorFlow.
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

    def answer(photos: tf.Tensor) -> dict[str, tf.Tensor]:
        return call(*map(dict, module.arguments), photos)

    signature = standalone.signature(source)
    spec = tf.TensorSpec((None, *photos.shape[1:]), tf.as_dtype(photos.dtype), signature["photos"]["name"])
    functions = {"serving_default": tf.function(answer, autograph=False, input_signature=[spec])}
    if signature["prepare"]:
        pixels = tf.TensorSpec(photos.shape[1:], tf.uint8)

        def decoded(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
            return answer(
                tf.map_fn(lambda one: _prepared(one, signature["prepare"]), encoded, fn_output_signature=pixels)
            )

        spec = tf.TensorSpec((None,), tf.string, "encoded")
        functions["encoded"] = tf.function(decoded, autograph=False, input_signature=[spec])
    tf.saved_model.save(module, str(out / "program"), signatures=functions)
    return _README


def _prepared(encoded: tf.Tensor, how: dict[str, Any]) -> tf.Tensor:
    """Returns the pixels [h, w, 3] uint8 of the bytes of an image file. See preprocess.prepare."""
    # By default TensorFlow decodes JPEG with a faster, less exact transform: the places of 13 % of EarthView's photos
    # moved, and 6 % with this one.
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    size, side = tf.shape(image)[:2], how["side"]
    shorter = tf.reduce_min(size)
    if how["kind"] == "square":
        image = _cropped(image, shorter)
        wanted, method = (side, side), "bicubic"
    else:
        wanted, method = (side, side), _METHODS[how["resample"]]
        if how["shortest"]:
            wanted = tf.maximum(how["shortest"], how["shortest"] * size // shorter)
    image = tf.image.resize(image, wanted, method, antialias=True)
    image = tf.ensure_shape(_cropped(image, side), (side, side, 3))
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)


def _cropped(image: tf.Tensor, side: Any) -> tf.Tensor:
    top, left = tf.unstack((tf.shape(image)[:2] - side) // 2)
    return image[top : top + side, left : left + side]


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
