"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020). Reads every size published on Hugging Face.

Modules and parameters have the names of the published tensors (see `backbone.transformer`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from geotoken_jax import sharding
from geotoken_jax.backbone import transformer
from geotoken_jax.backbone.transformer import ImageShape, TextShape

#: Values of keys that config.json omits.
_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77,
    "eos_token_id": 49407,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClipTextShape(TextShape):
    """Shape of CLIP's text tower.

    eos_token_id: id of the end token. Text features are read at its position. If it is 2, as in
    old files, the end token of a text is its token with the largest id.
    """

    eos_token_id: int


class ImageTower(nnx.Module):
    """Encodes pixels. Returns the vector at the position of the class token."""

    def __init__(self, shape: ImageShape, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = transformer.PatchEmbeddings(shape, True, dtype, rngs)
        self.pre_layrnorm = transformer.norm(shape, rngs)  # sic: the published name has this spelling
        self.encoder = transformer.Encoder(shape, dtype, rngs)
        self.post_layernorm = transformer.norm(shape, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B D"]:
        x = self.embeddings(pixels)
        x = self.encoder(self.pre_layrnorm(x).astype(x.dtype))
        return self.post_layernorm(x[:, 0])


class TextTower(nnx.Module):
    """Encodes tokens with causal attention. Returns the vector at the position of the end token."""

    def __init__(self, shape: ClipTextShape, dtype: Any, rngs: nnx.Rngs):
        self.eos = shape.eos_token_id
        self.embeddings = transformer.TokenEmbeddings(shape, dtype, rngs)
        self.encoder = transformer.Encoder(shape, dtype, rngs)
        self.final_layer_norm = transformer.norm(shape, rngs)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
        x = self.encoder(self.embeddings(ids), causal=True)  # causal, so padding after the end token has no effect
        end = jnp.argmax(ids if self.eos == 2 else ids == self.eos, axis=1)
        return self.final_layer_norm(x[jnp.arange(x.shape[0]), end])


class Clip(nnx.Module):
    """CLIP's two towers, with projections to one feature space. Features are not normalized."""

    def __init__(self, config: Mapping[str, Any], dtype: Any, rngs: nnx.Rngs):
        """config: contents of config.json. dtype: type in which products are computed.

        Raises SettingsError with the key if a value is invalid.
        """
        self.text_shape = transformer.read_shape(ClipTextShape, config, "text_config", _TEXT)
        self.image_shape = transformer.read_shape(ImageShape, config, "vision_config", _IMAGE)
        #: C, the width of image and text features.
        self.width = config.get("projection_dim", 512)
        self.vision_model = ImageTower(self.image_shape, dtype, rngs)
        self.text_model = TextTower(self.text_shape, dtype, rngs)
        self.visual_projection, self.text_projection = (
            sharding.linear(shape.hidden_size, self.width, ("embed", None), use_bias=False, rngs=rngs, dtype=dtype)
            for shape in (self.image_shape, self.text_shape)
        )
        #: Logarithm of the factor on cosines in CLIP's loss.
        self.logit_scale = sharding.parameter(rngs.params(), nnx.initializers.constant(2.6592), (), ())

    def image_features(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
        """Returns features of photos. pixels: normalized, with the image size of the checkpoint."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Int[Array, "B T"]) -> Float[Array, "B C"]:
        """Returns features of texts. Tokens after the end token have no effect. T: at most max_position_embeddings."""
        return self.text_projection(self.text_model(ids))
