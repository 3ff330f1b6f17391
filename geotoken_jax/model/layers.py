"""Transformer layers of the encoder and the decoder.

The published layers are post-norm with ReLU. Ours are pre-norm with a gated activation and normalized queries and keys.
Parameters are float32. Matrix products are computed in LayerSettings.dtype, softmax and norms in float32. `words` are
the random words for dropout, one per position (randomness.dropout); if they are None, there is no dropout. The layers
of the encoder are stacked (geotoken_jax/stack.py) and scanned, and so are the layers of the decoder.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from geotoken_jax import attention, sharding, stack
from geotoken_jax.model.parametrization import ShapeSettings
from geotoken_jax.randomness import dropout
from geotoken_jax.settings import Runtime


@dataclasses.dataclass(frozen=True)
class LayerSettings(ShapeSettings):
    """Settings of one transformer layer, added to its shape (ShapeSettings).

    norm: "pre" or "post". dtype: type in which matrix products are computed.
    activation: "relu", "gelu", or a gated one (see GATED): "swiglu" with SiLU, "geglu" with GELU.
    qk_norm: whether queries and keys are RMS-normalized before their product, which bounds the attention logits.
    attention: kernel of attention. "xla" uses XLA's matrix products. "cudnn" is the fused kernel of GPUs. It needs a
    16-bit dtype; with fewer than 64 keys, "xla" is used instead. "auto" is the fused kernel of the TPU or GPU if it
    supports the shapes, else "xla".
    attention_dropout: dropout rate of the attention weights. (PyTorch's layers use the rate `dropout` for them.) Fused
    kernels have no such dropout, so "auto" is "xla" in training if the rate is above 0.
    remat: values of a layer that are stored for the backward pass, which computes all other values again. "none" stores
    all values. "dots" stores the products with parameters, the result of fused attention and the sums that norms read.
    "full" stores only the layer's input.
    """

    feed_forward: int
    dropout: float
    norm: str
    activation: str
    qk_norm: bool
    attention: Runtime[str]
    attention_dropout: float
    dtype: str
    remat: Runtime[str]

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(
                f"config.model.width is {self.width}: make it a multiple of config.model.heads = {self.heads}"
            )
        for name, choices in (
            ("norm", ("pre", "post")),
            ("activation", ACTIVATIONS),
            ("attention", attention.KERNELS),
            ("remat", stack.REMAT),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"config.model.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        head = self.width // self.heads
        if self.attention == "cudnn" and (self.dtype not in ("bfloat16", "float16") or head % 8 or head > 128):
            raise ValueError(
                "config.model.attention is 'cudnn', which needs dtype bfloat16 or float16, and width / heads in 8, "
                f"16, ... 128, but dtype is {self.dtype} and width / heads is {head}: change dtype or heads, or set "
                "attention to 'auto'"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(
                f"config.model.attention_dropout is {self.attention_dropout}: choose a rate of at least 0 and below 1"
            )
        if self.attention == "cudnn" and self.attention_dropout:
            raise ValueError(
                "config.model.attention is 'cudnn', which cannot drop attention weights, but "
                f"config.model.attention_dropout is {self.attention_dropout}: set attention to 'auto', or "
                "attention_dropout to 0"
            )


ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
#: Activations of gated layers: activation(x W) * (x V), with a second matrix V (Shazeer 2020, arXiv 2002.05202).
GATED = ("swiglu", "geglu")


class Site(enum.IntEnum):
    """The dropouts of a layer. All use the same random words, one per position, but each has a mask of its own."""

    ATTENTION = 0
    MEMORY_ATTENTION = 1
    HIDDEN = 2
    FEED_FORWARD = 3
    WEIGHTS = 4
    MEMORY_WEIGHTS = 5


def _flattened(x: Float[Array, "B S D"]) -> Float[Array, "BS D"] | Float[Array, "B S D"]:
    """Returns x with its first two axes merged if S is a multiple of 8, else x unchanged.

    With a multiple of 8, a TPU merges the axes without moving numbers. XLA then reads and writes the arrays of the
    attention kernel directly. With three axes it would put the positions first, and copy the arrays.
    """
    return x if x.shape[1] % 8 else x.reshape(-1, x.shape[-1])


class Attention(nnx.Module):
    """Multi-head attention: projections of queries, keys, values and output.

    With qk_norm each head's queries and keys are RMS-normalized with a learned scale [d], in float32 (Henry et al.
    2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        d, dtype = settings.width, jnp.dtype(settings.dtype)
        self.heads, self.kernel, self.normalize = settings.heads, settings.attention, settings.qk_norm
        self.rate, self.scale = settings.attention_dropout, settings.head_ratio**0.5
        self.q, self.k, self.v = (sharding.linear(d, d, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3))
        self.out = sharding.linear(d, d, ("heads", "embed"), rngs=rngs, dtype=dtype)
        if settings.qk_norm:
            self.q_norm, self.k_norm = (nnx.RMSNorm(d // settings.heads, epsilon=1e-6, rngs=rngs) for _ in range(2))

    def _heads(self, project: Callable, x: Float[Array, "B S D"]) -> Float[Array, "B S H d"]:
        return project(_flattened(x)).reshape(*x.shape[:-1], self.heads, -1)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H d"]:
        q = self._heads(self.q, x)
        q = self.q_norm(q).astype(q.dtype) if self.normalize else q
        # The kernels divide the products by the square root of the head width. For "mup" the queries are scaled, so
        # that the kernels need no change.
        return q if self.scale == 1.0 else q * self.scale

    def keys_values(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H d"]]:
        k, v = self._heads(self.k, x), self._heads(self.v, x)
        return (self.k_norm(k).astype(k.dtype) if self.normalize else k), v

    def __call__(
        self,
        queries: Float[Array, "B T H d"],
        keys: Float[Array, "B S H d"],
        values: Float[Array, "B S H d"],
        words: UInt32[Array, "B T"] | None,
        site: int,
        *,
        causal: bool = False,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the attention of all heads, projected to D.

        words, site: random words and site for dropout of the attention weights (randomness.dropout). causal, lengths:
        keys that each query attends to (attention.attention).
        """
        drop = None
        if words is not None and self.rate:
            rows = words[:, None]
            drop = lambda weights: dropout(weights, self.rate, rows, site)  # noqa: E731
        attended = attention.attention(
            queries, keys, values, kernel=self.kernel, causal=causal, lengths=lengths, drop=drop
        )
        joined = attended.reshape(*attended.shape[:-2], -1)
        return self.out(_flattened(joined)).reshape(joined.shape)


class FeedForward(nnx.Module):
    """Two linear layers with the activation between them; a gated activation (see GATED) adds a third linear layer."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        d, f, dtype = settings.width, settings.feed_forward, jnp.dtype(settings.dtype)
        self.up = sharding.linear(d, f, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down = sharding.linear(f, d, ("mlp", "embed"), rngs=rngs, dtype=dtype)
        if settings.activation in GATED:
            self.gate = sharding.linear(d, f, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.settings = settings

    def __call__(self, x: Float[Array, "B S D"], words: UInt32[Array, "B S"] | None) -> Float[Array, "B S D"]:
        activate, up = ACTIVATIONS[self.settings.activation], self.up(x)
        hidden = activate(self.gate(x)) * up if self.settings.activation in GATED else activate(up)
        return self.down(dropout(hidden, self.settings.dropout, words, Site.HIDDEN))


class LayerNorm(nnx.LayerNorm):
    """A layer norm, computed in float32 (in float64 for float64 input). The output has the type of the input."""

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        assert self.scale is not None and self.bias is not None  # nnx.LayerNorm makes both by default
        return _normalize(x, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    wide, mean, factor = _moments(x, epsilon)
    return ((wide - mean) * (factor * scale) + bias).astype(x.dtype)


def _moments(x: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """Returns x in float32 or float64, its mean, and the reciprocal of its standard deviation, over the last axis."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (wide * wide).mean(-1, keepdims=True) - mean * mean)
    return wide, mean, jax.lax.rsqrt(variance + epsilon)


def _normalize_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    wide, mean, factor = _moments(x, epsilon)
    # Mean and factor are stored, because the backward pass would otherwise read all of x to compute them again. This is
    # not done in `_normalize`, because `stored` represents numbers as integers, which an export to ONNX cannot do.
    mean, factor = stack.stored(mean), stack.stored(factor)
    y = (wide - mean) * (factor * scale) + bias
    return y.astype(x.dtype), (x, scale, mean, factor)


def _normalize_backward(epsilon: float, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, factor = saved
    g, normal = g.astype(mean.dtype), (x.astype(mean.dtype) - mean) * factor
    rows = tuple(range(g.ndim - 1))
    scaled = g * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    dx = factor * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    return dx.astype(x.dtype), (g * normal).sum(rows).astype(scale.dtype), g.sum(rows).astype(scale.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class _Layer(nnx.Module):
    """Base class of EncoderLayer and DecoderLayer: sublayers with residual connections and norms.

    The norm is applied to a sublayer's input ("pre"), or to the sum of its input and output ("post"). branch: factor of
    every sublayer's output.
    """

    def __init__(self, settings: LayerSettings, norms: int, rngs: nnx.Rngs, branch: float):
        self.settings, self.branch = settings, branch
        self.norms = nnx.List([LayerNorm(settings.width, epsilon=1e-5, rngs=rngs) for _ in range(norms)])

    def _residual(
        self, norm: LayerNorm, x: Array, sublayer: Callable[[Array], Array], words: Array | None, site: Site
    ) -> Array:
        pre = self.settings.norm == "pre"
        y = dropout(sublayer(norm(x) if pre else x), self.settings.dropout, words, site)
        total = stack.keep(x + (y if self.branch == 1.0 else y * self.branch))
        return total if pre else norm(total)


class EncoderLayer(_Layer):
    """Self-attention over the memory sequence, then feed-forward."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs, branch: float = 1.0):
        super().__init__(settings, 2, rngs, branch)
        self.attention = Attention(settings, rngs)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], lengths: Int[Array, " B"] | None, words: UInt32[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        def attend(y: Array) -> Array:
            y = y.reshape(x.shape)
            k, v = self.attention.keys_values(y)
            attended = self.attention(self.attention.queries(y), k, v, words, Site.WEIGHTS, lengths=lengths)
            return attended.reshape(rows.shape)

        rows = _flattened(x)
        row_words = None if words is None else words.reshape(rows.shape[:-1])
        rows = self._residual(self.norms[0], rows, attend, row_words, Site.ATTENTION)
        feed_forward = functools.partial(self.feed_forward, words=row_words)
        return self._residual(self.norms[1], rows, feed_forward, row_words, Site.FEED_FORWARD).reshape(x.shape)


class DecoderLayer(_Layer):
    """Causal self-attention over the tokens, then attention to the memory, then feed-forward."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs, branch: float = 1.0):
        super().__init__(settings, 3, rngs, branch)
        self.attention = Attention(settings, rngs)
        self.memory_attention = Attention(settings, rngs)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: tuple[Float[Array, "B S H d"], Float[Array, "B S H d"]],
        lengths: Int[Array, " B"] | None,
        words: UInt32[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the output for all T tokens at once (training). memory: keys and values of the encoder's output."""

        def attend(y: Array) -> Array:
            k, v = self.attention.keys_values(y)
            return self.attention(self.attention.queries(y), k, v, words, Site.WEIGHTS, causal=True)

        def attend_memory(y: Array) -> Array:
            queries = self.memory_attention.queries(y)
            return self.memory_attention(queries, *memory, words, Site.MEMORY_WEIGHTS, lengths=lengths)

        return self._sublayers(x, attend, attend_memory, words)

    def step(
        self,
        x: Float[Array, "B K D"],
        past: tuple[Float[Array, "L B H E d"], Float[Array, "L B H E d"]],
        number: Int[Array, ""],
        slot: Int[Array, ""],
        seen: Bool[Array, "B 1 K E"],
        memory: tuple[Float[Array, "B H S d"], Float[Array, "B H S d"]],
        real: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B K D"], tuple[Float[Array, "L B H E d"], Float[Array, "L B H E d"]]]:
        """Returns the output for one token of each of K candidates per photo, and `past` with that token added.

        past: keys and values of all layers for the earlier tokens, in E slots per photo (see geotoken.Cache). XLA
        updates this array in place. number: index of this layer. slot: first of the K consecutive slots that are
        written. seen: slots that each candidate attends to, including its own. memory: keys and values of the encoder's
        output. real: False for padding of the memory.
        """

        def attend(y: Array) -> Array:
            nonlocal past
            written = [z.swapaxes(1, 2)[None] for z in self.attention.keys_values(y)]
            at = (number, 0, 0, slot, 0)
            past = (
                jax.lax.dynamic_update_slice(past[0], written[0], at),
                jax.lax.dynamic_update_slice(past[1], written[1], at),
            )
            queries = self.attention.queries(y).swapaxes(1, 2)
            attended = attention.by_head(queries, past[0][number], past[1][number], seen)
            return self.attention.out(attended.swapaxes(1, 2).reshape(y.shape))

        def attend_memory(y: Array) -> Array:
            attended = attention.by_head(self.memory_attention.queries(y).swapaxes(1, 2), *memory, real)
            return self.memory_attention.out(attended.swapaxes(1, 2).reshape(y.shape))

        return self._sublayers(x, attend, attend_memory, None), past

    def _sublayers(self, x: Array, attend: Callable, attend_memory: Callable, words: Array | None) -> Array:
        x = self._residual(self.norms[0], x, attend, words, Site.ATTENTION)
        x = self._residual(self.norms[1], x, attend_memory, words, Site.MEMORY_ATTENTION)
        return self._residual(self.norms[2], x, lambda y: self.feed_forward(y, words), words, Site.FEED_FORWARD)
