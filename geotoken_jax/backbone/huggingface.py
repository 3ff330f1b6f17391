"""Backbones with published weights, read from a checkpoint of CLIP or SigLIP 2 in Hugging Face's format."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8

from geotoken_jax import sharding
from geotoken_jax.backbone import checkpoint, preprocess
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.backbone.settings import HuggingFaceSettings
from geotoken_jax.backbone.siglip import Siglip
from geotoken_jax.backbone.tokenizer import Tokenizer
from geotoken_jax.batch import padded, padded_size
from geotoken_jax.settings import SettingsError

#: Value of model_type in config.json -> module.
KINDS = {"clip": Clip, "siglip": Siglip}
#: Texts per batch and device. Fixed, because products of other shapes round differently.
_TEXTS = 32


class HuggingFace:
    """The two towers of a checkpoint, its image processor and its tokenizer, on a mesh."""

    def __init__(self, settings: HuggingFaceSettings, mesh: Mesh | None = None):
        """mesh: local devices to run on; if None, all local devices, each with a share of the batch.

        A checkpoint on the hub is downloaded. Raises SettingsError if a setting does not fit, or if a file, key or
        tensor of the checkpoint is missing or is not one of CLIP or SigLIP 2. The message names it.
        """
        if not settings.path:
            raise SettingsError(
                "config.embed.huggingface.path is empty: set it to a folder with a CLIP or SigLIP 2 checkpoint, or to "
                "its name on the Hugging Face hub, such as openai/clip-vit-large-patch14"
            )
        folder = checkpoint.folder(settings.path)
        config = checkpoint.read_json(folder, "config.json")
        kind = checkpoint.kind(settings.path, config)
        self._mesh = mesh or sharding.local_mesh()
        self._batch = sharding.batch_sharding(self._mesh)
        self._batch_devices = self._batch.num_devices // self._mesh.shape["tensor"]
        self._batch_size, self.dtype = settings.batch_size, settings.dtype
        self.model = checkpoint.read_module(
            folder, lambda rngs: KINDS[kind](config, jnp.dtype(settings.dtype), rngs), self._mesh
        )
        #: C, the width of image and text features.
        self.width = self.model.width
        side = self.model.image_shape.image_size
        #: Shorter side, in pixels, at which a photo may be decoded for this tower: min_side of preprocess.open_image.
        self.min_side = 2 * side
        self.processor = _processor(folder, side)
        self.tokenizer = Tokenizer(folder, self.model.text_shape.max_position_embeddings, kind)
        self._images = self._compiled(lambda model, x: model.image_features(self.processor.normalize(x)))
        self._texts = self._compiled(lambda model, x: model.text_features(x))

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo resized and cropped for the image tower. The photo is decoded in full size, as published."""
        return self.processor.fit(preprocess.open_image(photo))

    def images(self, prepared: UInt8[np.ndarray, "B h w 3"]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of prepared photos, not normalized, equal to `get_image_features` of
        transformers."""
        return self._run(self._images, prepared, None)

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of texts, not normalized, equal to `get_text_features` of transformers.

        Features of an empty text are zeros. A text too long for the tower is cut, as published. Every distinct text is
        encoded once, and its features do not depend on the other texts.
        """
        distinct = sorted({text for text in texts if text})
        rows = {text: row for row, text in enumerate(distinct)}
        features = np.append(
            self._run(self._texts, self.tokenizer(distinct), _TEXTS * self._batch_devices),
            np.zeros((1, self.width), np.float32),
            0,
        )
        return features[[rows.get(text, -1) for text in texts]].reshape(-1, self.width)

    def _compiled(self, features: Callable[[Any, jax.Array], jax.Array]) -> Callable[[np.ndarray], jax.Array]:
        graph, state = nnx.split(self.model)

        @jax.jit
        def run(state: Any, batch: jax.Array) -> jax.Array:
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh), precision(self.dtype):
                return features(nnx.merge(graph, state), batch).astype(jnp.float32)

        return lambda batch: run(state, jax.device_put(batch, self._batch))

    def _run(
        self, compiled: Callable[[np.ndarray], jax.Array], rows: np.ndarray, batch_rows: int | None
    ) -> Float32[np.ndarray, "B C"]:
        """Returns the features of rows. All batches are started before the first result is awaited.

        batch_rows: rows per batch. If None, batches have up to batch_size rows.
        """
        batches, most = [], batch_rows or self._batch_size
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            size = batch_rows or padded_size(len(part), most, self._batch_devices)
            batches.append((compiled(padded(part, size)), len(part)))
        features = [np.asarray(batch)[:n] for batch, n in batches]
        return np.concatenate([np.zeros((0, self.width), np.float32), *features])


class ImageTower:
    """The image tower of a checkpoint, for training: the host prepares photos, and the step computes their features.

    parameters: the published parameters on the mesh, as a pure dict. width: C, the width of features. min_side:
    shorter side, in pixels, at which a photo may be decoded for this tower (see preprocess.open_image).
    """

    def __init__(self, backbone: HuggingFace, remat: str):
        """remat: activations of each layer that are kept for the backward pass, a key of stack.REMAT."""
        tower: Any = nnx.merge(*nnx.split(backbone.model))
        for name in ("text_model", "text_projection", "logit_scale", "logit_bias"):
            if hasattr(tower, name):
                delattr(tower, name)
        tower.vision_model.encoder.remat = remat
        self._graph, state = nnx.split(tower)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        self.parameters = nnx.to_pure_dict(state)
        self.width, self.min_side = backbone.width, backbone.min_side
        self._processor, self._dtype = backbone.processor, backbone.dtype
        #: Side of a prepared photo, in pixels.
        self.side = backbone.processor.side
        #: Floating-point operations of the forward pass per photo: two per parameter and patch. Attention's products
        #: without parameters are left out, 4 % at L/14.
        self.flops = 2.0 * sum(x.size for x in jax.tree.leaves(state)) * backbone.model.image_shape.patches

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo resized and cropped for the image tower, as `HuggingFace.prepare` does."""
        return self._processor.fit(preprocess.open_image(photo))

    def module(self, parameters: Any) -> nnx.Module:
        """Returns the tower with other parameters. parameters: pure dict, names and shapes as in self.parameters."""
        state = jax.tree.map(lambda x: x, self._shapes)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    def features(self, parameters: Any, prepared: UInt8[jax.Array, "B h w 3"]) -> Float32[jax.Array, "B C"]:
        """Returns the features of prepared photos, computed with these parameters inside a compiled step."""
        tower: Any = self.module(parameters)
        with precision(self._dtype):
            return tower.image_features(self._processor.normalize(prepared)).astype(jnp.float32)


def precision(dtype: str) -> Any:
    """Returns a context in which products of a dtype have the precision of published features."""
    # By default GPUs and TPUs multiply float32 in fewer bits: features then differ from the published ones by 1e-3.
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def _processor(folder: pathlib.Path, side: int) -> preprocess.Processor:
    """Returns the folder's image processor.

    It is read from preprocessor_config.json or, if there is none, from processor_config.json (transformers 5).
    """
    name = "preprocessor_config.json"
    if (folder / "processor_config.json").exists() and not (folder / name).exists():
        name = "processor_config.json"
    config = checkpoint.read_json(folder, name)
    if name == "processor_config.json":
        config = config.get("image_processor", {})
    try:
        return preprocess.Processor.read(config, side)
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{folder}: its {name} lacks {error}: download it again") from None
