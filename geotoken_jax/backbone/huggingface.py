"""Backbones with published weights: a checkpoint folder of CLIP or SigLIP 2, as Hugging Face stores it."""

import math
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
from geotoken_jax.batch import filled
from geotoken_jax.settings import SettingsError

#: What config.json may say of itself.
_KINDS = {"clip": Clip, "siglip": Siglip}
#: Texts at once on each device, always: a product of another shape rounds otherwise.
_TEXTS = 32


class HuggingFace:
    """The two towers of a checkpoint with what goes before them, on one device or on all of a mesh."""

    def __init__(self, settings: HuggingFaceSettings, mesh: Mesh | None = None):
        """mesh: of devices of this process; None for its first one.

        Raises SettingsError naming what the folder lacks, or what in it is not CLIP's or SigLIP 2's.
        """
        if not settings.path:
            raise SettingsError(
                "config.embed.huggingface.path is empty: name a folder with a CLIP or SigLIP 2 checkpoint"
            )
        folder = pathlib.Path(settings.path)
        config = checkpoint.read_json(folder, "config.json")
        kind = config.get("model_type")
        if kind not in _KINDS:
            raise SettingsError(
                f"{folder} is of model_type {kind!r}: choose a checkpoint of {' or '.join(_KINDS)} (SigLIP 2 of a "
                "fixed size is siglip)"
            )
        self._mesh = mesh or sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.local_devices()[:1])
        self._batch = sharding.batch_sharding(self._mesh)
        self._ways = self._batch.num_devices // self._mesh.shape["tensor"]
        self._batch_size, self.dtype = settings.batch_size, settings.dtype
        if settings.batch_size % self._ways:
            raise SettingsError(
                f"config.embed.huggingface.batch_size = {settings.batch_size} does not divide over {self._ways} devices"
            )
        self.model = checkpoint.read_module(
            folder, lambda rngs: _KINDS[kind](config, jnp.dtype(settings.dtype), rngs), self._mesh
        )
        #: C, of image and text features.
        self.width = self.model.width
        side = self.model.image_shape.image_size
        #: Shortest side of a photo, in pixels, that suffices.
        self.min_side = 2 * side
        self.processor = _processor(folder, side)
        self.tokenizer = Tokenizer(folder, self.model.text_shape.max_position_embeddings, kind)
        self._images = self._compiled(lambda model, x: model.image_features(self.processor.normalize(x)))
        self._texts = self._compiled(lambda model, x: model.text_features(x))

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns what the tower takes of a photo, which is decoded in full, as published."""
        return self.processor.fit(preprocess.open_image(photo))

    def images(self, prepared: UInt8[np.ndarray, "B h w 3"]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of prepared photos, not normalized: the published `get_image_features`."""
        return self._run(self._images, prepared, None)

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "B C"]:
        """Returns the features of texts, not normalized: the published `get_text_features`; zeros for an empty one.

        A text too long for the tower is cut, as published. Each distinct text goes through the tower once, and has the
        same features whichever others come with it.
        """
        known = sorted({text for text in texts if text})
        rows = {text: row for row, text in enumerate(known)}
        features = np.append(
            self._run(self._texts, self.tokenizer(known), _TEXTS * self._ways), np.zeros((1, self.width), np.float32), 0
        )
        return features[[rows.get(text, -1) for text in texts]].reshape(-1, self.width)

    def _compiled(self, features: Callable[[Any, jax.Array], jax.Array]) -> Callable[[np.ndarray], jax.Array]:
        graph, state = nnx.split(self.model)

        @jax.jit
        def run(state: Any, batch: jax.Array) -> jax.Array:
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh), _exact(self.dtype):
                return features(nnx.merge(graph, state), batch).astype(jnp.float32)

        return lambda batch: run(state, jax.device_put(batch, self._batch))

    def _run(
        self, compiled: Callable[[np.ndarray], jax.Array], rows: np.ndarray, at_once: int | None
    ) -> Float32[np.ndarray, "B C"]:
        """Returns the features of rows, batch by batch; all batches are on their way before the first is waited for.

        at_once: rows of every batch; None for batch_size, and less where there are fewer.
        """
        found, most = [], at_once or self._batch_size
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            # The next power of two, so that a photo alone costs little and few shapes are ever compiled.
            enough = self._ways * 2 ** math.ceil(math.log2(math.ceil(len(part) / self._ways)))
            size = at_once or min(most, enough)
            found.append((compiled(filled(part, size)), len(part)))
        features = [np.asarray(batch)[:n] for batch, n in found]
        return np.concatenate([np.zeros((0, self.width), np.float32), *features])


class ImageTower:
    """The image half of a checkpoint, for whoever trains it: the host prepares photos, the rest is traced.

    parameters: the published ones, on the mesh, as a pure dict. width: C. min_side: as a Backbone's.
    """

    def __init__(self, of: HuggingFace, remat: str):
        """remat: what a backward pass keeps of a layer, see stack.REMAT."""
        tower: Any = nnx.merge(*nnx.split(of.model))
        for name in ("text_model", "text_projection", "logit_scale", "logit_bias"):
            if hasattr(tower, name):
                delattr(tower, name)
        tower.vision_model.encoder.remat = remat
        self._graph, state = nnx.split(tower)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        self.parameters = nnx.to_pure_dict(state)
        self.width, self.min_side, self._processor, self._dtype = of.width, of.min_side, of.processor, of.dtype
        #: Side of a prepared photo, in pixels.
        self.side = of.processor.side
        #: Floating-point operations of one photo's features: each parameter serves every patch. Attention's own
        #: products are left out, 4 % at L/14.
        self.flops = 2.0 * sum(x.size for x in jax.tree.leaves(state)) * of.model.image_shape.patches

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns what HuggingFace.prepare does."""
        return self._processor.fit(preprocess.open_image(photo))

    def module(self, parameters: Any) -> nnx.Module:
        """Returns the tower with these parameters: arrays under the names and with the shapes of its own."""
        state = jax.tree.map(lambda x: x, self._shapes)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    def features(self, parameters: Any, prepared: UInt8[jax.Array, "B h w 3"]) -> Float32[jax.Array, "B C"]:
        """Returns the features of prepared photos by these parameters; to be traced, on a mesh."""
        tower: Any = self.module(parameters)
        with _exact(self._dtype):
            return tower.image_features(self._processor.normalize(prepared)).astype(jnp.float32)


def _exact(dtype: str) -> Any:
    # Without it a GPU or a TPU multiplies float32 in fewer bits, and misses the published features by 1e-3.
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def _processor(folder: pathlib.Path, side: int) -> preprocess.Processor:
    """Returns the image processor, whose settings are a file of their own or, since transformers 5, one with others."""
    if (folder / "processor_config.json").exists() and not (folder / "preprocessor_config.json").exists():
        config = checkpoint.read_json(folder, "processor_config.json").get("image_processor", {})
    else:
        config = checkpoint.read_json(folder, "preprocessor_config.json")
    try:
        return preprocess.Processor.read(config, side)
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{folder}: its preprocessor_config.json lacks {error}: download it again") from None
