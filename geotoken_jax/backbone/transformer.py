"""Modules of the CLIP and SigLIP towers: pre-norm transformer layers, patch embeddings and token embeddings.

Modules and parameters have the names of the published tensors, so checkpoints are read without a table of names. There
are two differences: `weight` is called kernel, scale or embedding here, and layers are stacked. For example, the
published tensor `vision_model.encoder.layers.0.mlp.fc1.weight`, transposed, is row 0 of the parameter
`vision_model/encoder/layers/mlp/fc1/kernel`.

Parameters are float32. Matrix products are computed in the tower's dtype, norms and softmax in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from geotoken_jax import attention, settings, sharding, stack

ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_init = nnx.initializers.normal(0.02)
S = TypeVar("S", bound="Shape")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of one tower. Fields have the names of the keys in a checkpoint's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: choose a checkpoint with {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which does not divide into num_attention_heads = "
                f"{self.num_attention_heads}: download config.json again"
            )


@dataclasses.dataclass(frozen=True)
class ImageShape(Shape):
    """Shape of an image tower. image_size: side of a photo in pixels. patch_size: side of a patch in pixels."""

    image_size: int
    patch_size: int

    @property
    def patches(self) -> int:
        """Number of whole patches per photo. Pixels left over at the right and bottom edges are ignored."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextShape(Shape):
    """Shape of a text tower.

    vocab_size: V, the number of tokens. max_position_embeddings: T, the largest number of tokens per text.
    """

    vocab_size: int
    max_position_embeddings: int


def read_shape(kind: type[S], config: Mapping[str, Any], section: str, published: Mapping[str, Any]) -> S:
    """Returns the shape of a tower from a section of a checkpoint's config.json.

    kind: class of the shape. config: contents of config.json. section: key of the section. published: default values of
    keys that the section omits. Raises SettingsError with the key if a value is invalid.
    """
    stated = config.get(f"{section}_dict") or config.get(section) or {}  # old files have both: _dict is valid
    present = {name: stated[name] for name in settings.names(kind) if stated.get(name) is not None}
    return settings.read(kind, {**published, **present}, f"json: {section}")


def norm(shape: Shape, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a layer norm in float32. The fast variance of nnx is off, because large channels make it inexact."""
    return nnx.LayerNorm(shape.hidden_size, epsilon=shape.layer_norm_eps, use_fast_variance=False, rngs=rngs)


def attend(
    q: Float[Array, "B T H d"], k: Float[Array, "B S H d"], v: Float[Array, "B S H d"], causal: bool = False
) -> Float[Array, "B T D"]:
    """Returns the result of softmax attention, with heads concatenated. Uses a fused kernel if there is one."""
    mixed = attention.attention(q, k, v, kernel="auto", causal=causal)
    return mixed.reshape(*mixed.shape[:-2], -1)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, shape: Shape, dtype: Any, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (
            sharding.linear(d, d, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3)
        )
        self.out_proj = sharding.linear(d, d, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"], causal: bool) -> Float[Array, "B T D"]:
        q, k, v = (proj(x).reshape(*x.shape[:-1], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, causal))


class FeedForward(nnx.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, shape: Shape, dtype: Any, rngs: nnx.Rngs):
        d, f = shape.hidden_size, shape.intermediate_size
        self.activation = shape.hidden_act
        self.fc1 = sharding.linear(d, f, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.fc2 = sharding.linear(f, d, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Pre-norm transformer layer: self-attention, then feed-forward, each with a residual connection."""

    def __init__(self, shape: Shape, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1, self.layer_norm2 = norm(shape, rngs), norm(shape, rngs)
        self.self_attn = Attention(shape, dtype, rngs)
        self.mlp = FeedForward(shape, dtype, rngs)

    def __call__(self, x: Float[Array, "B T D"], causal: bool) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x).astype(x.dtype), causal)
        return x + self.mlp(self.layer_norm2(x).astype(x.dtype))


class Encoder(nnx.Module):
    """The stack of layers of one tower."""

    def __init__(self, shape: Shape, dtype: Any, rngs: nnx.Rngs):
        self.layers = stack.make(lambda r: Layer(shape, dtype, r), shape.num_hidden_layers, rngs)
        #: Key of stack.REMAT. It selects the activations of each layer that are kept for the backward pass.
        self.remat = "none"

    def __call__(self, x: Float[Array, "B T D"], causal: bool = False) -> Float[Array, "B T D"]:
        def body(layer: Layer, x: Array, _: None) -> tuple[Array, None]:
            return sharding.constrain(layer(x, causal), "batch"), None

        return stack.scan(self.layers, body, sharding.constrain(x, "batch"), None, self.remat)[0]


class PatchEmbedding(nnx.Module):
    """Maps each patch to a vector. This is a convolution, computed as one matrix product."""

    def __init__(self, shape: ImageShape, use_bias: bool, dtype: Any, rngs: nnx.Rngs):
        side, d = shape.patch_size, shape.hidden_size
        self.kernel = sharding.parameter(rngs.params(), _init, (side, side, 3, d), (None, None, None, "embed"))
        self.bias = sharding.parameter(rngs.params(), _init, (d,), ("embed",)) if use_bias else None
        self.dtype = dtype

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B S D"]:
        side, d = self.kernel.shape[0], self.kernel.shape[-1]
        b, (rows, columns) = pixels.shape[0], (n // side for n in pixels.shape[1:3])
        patches = pixels[:, : rows * side, : columns * side].reshape(b, rows, side, columns, side, 3)
        patches = patches.swapaxes(2, 3).reshape(b, rows * columns, -1).astype(self.dtype)
        x = patches @ self.kernel[...].reshape(-1, d).astype(self.dtype)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """A table of embeddings, one row per token or position."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        # Only rows are sharded. If the width were sharded, every look-up would gather from all devices.
        self.embedding = sharding.parameter(rngs.params(), _init, (rows, width), ("vocab", None))


class PatchEmbeddings(nnx.Module):
    """Maps patches to vectors and adds position embeddings.

    If has_class is True, as in CLIP, the first vector is a learned class token.
    """

    def __init__(self, shape: ImageShape, has_class: bool, dtype: Any, rngs: nnx.Rngs):
        d = shape.hidden_size
        self.class_embedding = sharding.parameter(rngs.params(), _init, (d,), (None,)) if has_class else None
        self.patch_embedding = PatchEmbedding(shape, not has_class, dtype, rngs)
        self.position_embedding = Embedding(shape.patches + has_class, d, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B S D"]:
        x = self.patch_embedding(pixels)
        if self.class_embedding is not None:
            first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([first, x], 1)
        return x + self.position_embedding.embedding[...].astype(x.dtype)


class TokenEmbeddings(nnx.Module):
    """Maps tokens to vectors and adds position embeddings."""

    def __init__(self, shape: TextShape, dtype: Any, rngs: nnx.Rngs):
        self.token_embedding = Embedding(shape.vocab_size, shape.hidden_size, rngs)
        self.position_embedding = Embedding(shape.max_position_embeddings, shape.hidden_size, rngs)
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.token_embedding.embedding[...][ids] + self.position_embedding.embedding[: ids.shape[1]]
        return x.astype(self.dtype)
