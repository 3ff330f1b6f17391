"""SigLIP 2's image and text towers (Tschannen et al. 2025, arXiv 2502.14786), for photos of one fixed size.

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
from geotoken_jax.settings import SettingsError

#: Default values of keys in config.json. The base model's config.json omits nearly all keys.
_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_TEXT = {**_BASE, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 0}
_IMAGE = {**_BASE, "image_size": 224, "patch_size": 16}


@dataclasses.dataclass(frozen=True)
class SiglipTextShape(TextShape):
    """Shape of SigLIP's text tower. projection_size: C, the width of text features; 0 stands for hidden_size."""

    projection_size: int


class AttentionPooling(nnx.Module):
    """Pools patches by attention with one learned query, then applies a feed-forward layer."""

    def __init__(self, shape: ImageShape, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        d = shape.hidden_size
        self.probe = sharding.parameter(rngs.params(), init, (1, 1, d), (None, None, None))
        self.attention = PooledAttention(shape, dtype, rngs)
        self.layernorm = transformer.norm(shape, rngs)
        self.mlp = transformer.FeedForward(shape, dtype, rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        pooled = self.attention(probe, x)[:, 0]
        return pooled + self.mlp(self.layernorm(pooled).astype(x.dtype))


class PooledAttention(nnx.Module):
    """Multi-head attention whose query, key and value projections are stored as one matrix."""

    def __init__(self, shape: ImageShape, dtype: Any, rngs: nnx.Rngs):
        d, init = shape.hidden_size, nnx.initializers.normal(0.02)
        self.heads, self.dtype = shape.num_attention_heads, dtype
        self.in_proj_weight = sharding.parameter(rngs.params(), init, (3 * d, d), ("heads", "embed"))
        self.in_proj_bias = sharding.parameter(rngs.params(), nnx.initializers.zeros, (3 * d,), ("heads",))
        self.out_proj = sharding.linear(d, d, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, queries: Float[Array, "B T D"], x: Float[Array, "B S D"]) -> Float[Array, "B T D"]:
        weights = jnp.split(self.in_proj_weight[...].astype(self.dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(self.dtype), 3)
        q, k, v = (
            (y @ weight.T + bias).reshape(*y.shape[:-1], self.heads, -1)
            for y, weight, bias in zip((queries, x, x), weights, biases, strict=True)
        )
        return self.out_proj(transformer.attend(q, k, v))


class ImageTower(nnx.Module):
    """Encodes pixels. Returns one vector: the patches' vectors, pooled by attention."""

    def __init__(self, shape: ImageShape, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = transformer.PatchEmbeddings(shape, False, dtype, rngs)
        self.encoder = transformer.Encoder(shape, dtype, rngs)
        self.post_layernorm = transformer.norm(shape, rngs)
        self.head = AttentionPooling(shape, dtype, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B D"]:
        x = self.encoder(self.embeddings(pixels))
        return self.head(self.post_layernorm(x).astype(x.dtype))


class TextTower(nnx.Module):
    """Encodes tokens with attention in both directions. Returns a linear projection of the vector at the last position.

    The last position is padding, unless the text has T tokens.
    """

    def __init__(self, shape: SiglipTextShape, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = transformer.TokenEmbeddings(shape, dtype, rngs)
        self.encoder = transformer.Encoder(shape, dtype, rngs)
        self.final_layer_norm = transformer.norm(shape, rngs)
        width = shape.projection_size or shape.hidden_size
        self.head = sharding.linear(shape.hidden_size, width, ("embed", None), rngs=rngs, dtype=dtype)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B C"]:
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids))[:, -1]))


class Siglip(nnx.Module):
    """SigLIP's two towers. Features are not normalized."""

    def __init__(self, config: Mapping[str, Any], dtype: Any, rngs: nnx.Rngs):
        """config: contents of config.json. dtype: type in which products are computed.

        Raises SettingsError with the key if a value is invalid.
        """
        self.text_shape = transformer.read_shape(SiglipTextShape, config, "text_config", _TEXT)
        self.image_shape = transformer.read_shape(ImageShape, config, "vision_config", _IMAGE)
        #: C, the width of image and text features.
        self.width = self.image_shape.hidden_size
        texts = self.text_shape.projection_size or self.text_shape.hidden_size
        if texts != self.width:
            raise SettingsError(
                f"config.json of config.embed.huggingface.path has text features of width {texts} and photo features "
                f"of width {self.width}: choose a checkpoint whose towers have the same width"
            )
        self.vision_model = ImageTower(self.image_shape, dtype, rngs)
        self.text_model = TextTower(self.text_shape, dtype, rngs)
        #: Logarithm of the factor on cosines in SigLIP's loss, and the bias added to the scaled cosines.
        self.logit_scale, self.logit_bias = (
            sharding.parameter(rngs.params(), nnx.initializers.zeros, (1,), (None,)) for _ in range(2)
        )

    def image_features(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
        """Returns features of photos. pixels: normalized, with the image size of the checkpoint."""
        return self.vision_model(pixels)

    def text_features(self, ids: Int[Array, "B T"]) -> Float[Array, "B C"]:
        """Returns features of texts, read at the last position. T: max_position_embeddings (texts are padded)."""
        return self.text_model(ids)
