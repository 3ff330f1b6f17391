"""Backbones with published weights: CLIP and SigLIP 2, from checkpoints in Hugging Face's format."""

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
from geotoken_jax.backbone.tower import Tower
from geotoken_jax.batch import padded, padded_size
from geotoken_jax.settings import SettingsError

#: Value of the key model_type in config.json -> module class.
KINDS = {"clip": Clip, "siglip": Siglip}
#: Texts per batch and device. The number is constant, because matrix products of other shapes round differently.
_TEXTS_PER_DEVICE = 32


class HuggingFace:
    """A backbone from a checkpoint: its image and text tower on a mesh, its image processor and its tokenizer."""

    def __init__(self, settings: HuggingFaceSettings, mesh: Mesh | None = None):
        """Reads the checkpoint. A checkpoint on the hub is downloaded at its first use.

        mesh: local devices to run on. If None, each batch is split over all local devices. Raises SettingsError if a
        setting is invalid, or if a file, key or tensor of the checkpoint is missing or does not belong to CLIP or
        SigLIP 2.
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
        #: Smallest shorter side, in pixels, to which a photo may be reduced when it is decoded (see
        #: preprocess.open_image). `prepare` does not use it.
        self.min_side = 2 * side
        self.processor = _processor(folder, side)
        self.preparation = {"kind": "processor", **self.processor.plain()}
        self.tokenizer = Tokenizer(folder, self.model.text_shape.max_position_embeddings, kind)
        self._images = self._compiled(lambda model, x: model.image_features(self.processor.normalize(x)))
        self._texts = self._compiled(lambda model, x: model.text_features(x))

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo resized and cropped for the image tower.

        The photo is decoded in full size, as in the published image processors.
        """
        return preprocess.prepare(photo, self.preparation)

    def tower(self) -> Tower:
        tower = ImageTower(self, "none")
        return Tower(tower.side, tower.module(tower.parameters), tower.encode)

    def images(self, prepared: UInt8[np.ndarray, "B h w 3"]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of prepared photos, not normalized.

        The features equal the result of `get_image_features` in the library transformers.
        """
        return self._run(self._images, prepared, None)

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of texts, not normalized.

        The features equal the result of `get_text_features` in the library transformers, except that the features of an
        empty text are zeros. A text that is too long for the tower is cut. Equal texts are encoded once. The features
        of a text do not depend on the other texts.
        """
        distinct = sorted({text for text in texts if text})
        rows = {text: row for row, text in enumerate(distinct)}
        features = np.append(
            self._run(self._texts, self.tokenizer(distinct), _TEXTS_PER_DEVICE * self._batch_devices),
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
        """Returns the features of prepared photos or of tokens, computed in batches.

        All batches are started before the first result is read. compiled: function from a batch to its features. rows:
        prepared photos, or tokens of texts. batch_rows: rows per batch; if None, up to settings.batch_size rows.
        """
        batches, most = [], batch_rows or self._batch_size
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            size = batch_rows or padded_size(len(part), most, self._batch_devices)
            batches.append((compiled(padded(part, size)), len(part)))
        features = [np.asarray(batch)[:n] for batch, n in batches]
        return np.concatenate([np.zeros((0, self.width), np.float32), *features])


class ImageTower:
    """The image tower of a checkpoint, for training. The CPU prepares photos. The training step computes features.

    parameters: the published parameters on the mesh, as a pure dict. width: C, the width of features. min_side:
    smallest shorter side, in pixels, to which a photo may be reduced when it is decoded (see preprocess.open_image).
    """

    def __init__(self, backbone: HuggingFace, remat: str):
        """remat: key of stack.REMAT. It selects the activations of each layer that are kept for the backward pass."""
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
        #: Floating-point operations of the forward pass per photo: two per parameter and patch. Products of attention
        #: that have no parameters are left out. They are 4 % of the operations of ViT-L/14.
        self.flops = 2.0 * sum(x.size for x in jax.tree.leaves(state)) * backbone.model.image_shape.patches

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo resized and cropped for the image tower, as `HuggingFace.prepare` does."""
        return self._processor.fit(preprocess.open_image(photo))

    def module(self, parameters: Any) -> nnx.Module:
        """Returns the tower with other parameters. parameters: pure dict with the keys of self.parameters."""
        state = jax.tree.map(lambda x: x, self._shapes)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    def features(self, parameters: Any, prepared: UInt8[jax.Array, "B h w 3"]) -> Float32[jax.Array, "B C"]:
        """Returns the features of prepared photos. Call it in a compiled training step. parameters: see `module`."""
        return self.encode(self.module(parameters), prepared)

    def encode(self, tower: Any, prepared: UInt8[jax.Array, "B h w 3"]) -> Float32[jax.Array, "B C"]:
        """Returns the features of prepared photos. tower: the module with its parameters."""
        with precision(self._dtype):
            return tower.image_features(self._processor.normalize(prepared)).astype(jnp.float32)


def precision(dtype: str) -> Any:
    """Returns a context in which matrix products have the precision that reproduces published features.

    dtype: type of the products, "float32" or "bfloat16".
    """
    # By default GPUs and TPUs multiply float32 with fewer bits. Features then differ by 1e-3 from published features.
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def _processor(folder: pathlib.Path, side: int) -> preprocess.Processor:
    """Returns the image processor of a checkpoint folder.

    It is read from preprocessor_config.json. If this file does not exist, it is read from processor_config.json, which
    transformers 5 writes. side: side of the tower's images, in pixels.
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
