"""Transformer layers of the encoder and the decoder: post-norm ReLU as published, or pre-norm, gated, normalized.

Parameters are float32; products run in the settings' dtype, softmax and norms in float32. A key of None means no
dropout. Layers of one kind are stacked (a leading axis of every parameter) and scanned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax import sharding, stack
from geotoken_jax.settings import Runtime, SettingsError


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """Shape of one transformer layer. norm: "pre" or "post". dtype: of the products.

    activation: "relu" or "gelu"; "swiglu" or "geglu" multiply what SiLU or GELU let through with a second product.
    qk_norm: bring queries and keys to length sqrt(d) before their product, so that attention logits stay bounded.
    attention: "xla", or "cudnn" for fused kernels where there are any (a GPU, 16-bit numbers, long sequences).
    remat: what the backward pass keeps of a layer: "none" (everything), "dots" (products), "full" (the layer's input).
    """

    width: int
    heads: int
    feed_forward: int
    dropout: float
    norm: str
    activation: str
    qk_norm: bool
    attention: Runtime[str]
    dtype: str
    remat: Runtime[str]

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"config.model.width = {self.width} does not divide into config.model.heads = {self.heads}"
            )
        for name, choices in (
            ("norm", ("pre", "post")),
            ("activation", ACTIVATIONS),
            ("attention", ("xla", "cudnn")),
            ("remat", stack.REMAT),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"config.model.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        head = self.width // self.heads
        if self.attention == "cudnn" and (self.dtype not in ("bfloat16", "float16") or head % 8 or head > 128):
            raise ValueError(
                "config.model.attention = 'cudnn' takes dtype bfloat16 or float16 and width / heads in 8, 16, ... 128, "
                f"not {self.dtype} and {head}: change those, or use 'xla'"
            )


ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
#: Those that gate a second product (Shazeer 2020, arXiv 2002.05202).
GATED = ("swiglu", "geglu")


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """Zeroes each number with chance `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, n: int) -> Any:
    """Splits a key in n; None stays None n times over."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    *,
    kernel: str,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T H d"]:
    """Softmax attention; position t sees all of S, or only s <= t where causal, and only s < lengths.

    kernel: "xla" or "cudnn". Masks are given as lengths, not as a tensor: fused kernels take these and refuse, or break
    on, the other. Raises SettingsError for "cudnn" without a GPU.
    """
    kernel = choose_kernel(kernel, k.shape[1])
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=kernel)


def attention_by_head(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B H S d"],
    v: Float[Array, "B H S d"],
    seen: Bool[Array, "#B #H #Q S"],
) -> Float[Array, "B H Q d"]:
    """Softmax attention of a few queries, as decoding has them, to keys and values that lie head by head.

    So laid out each product reads them as they are: with the heads inside, as `attention` takes them, every step would
    transpose them first (paper's shape, 31 candidates, CPU: 3.2 against 1.5 ms for the memory, 2.1 against 0.2 ms for
    the tokens, a layer). The same on every device, whatever kernel is asked for.
    """
    logits = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
    return jnp.einsum("bhqs,bhsd->bhqd", weights, v)


def choose_kernel(asked: str, keys: int) -> Literal["xla", "cudnn"]:
    """Returns the kernel for a product with this many keys, "xla" for few of them whichever is asked.

    Raises SettingsError for "cudnn" without a GPU.
    """
    if asked == "cudnn" and jax.default_backend() != "gpu":
        raise SettingsError(
            f"config.model.attention is 'cudnn', which a {jax.default_backend()} does not have: use 'xla'"
        )
    # cuDNN refused the decoder's own 11 and 21 tokens ("Unsupported sequence length") and took 214 keys, the encoder's
    # and the memory's at group 2. Fewer than 64 are less than a tile of its kernels, and logits too small to matter.
    return "cudnn" if asked == "cudnn" and keys >= 64 else "xla"


class Attention(nnx.Module):
    """Multi-head attention: projections of queries, keys, values and output.

    With qk_norm each head's queries and keys are RMS-normalized with a learned scale [d], in float32 (Henry et al.
    2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        d, dtype = settings.width, jnp.dtype(settings.dtype)
        self.heads, self.kernel, self.normalize = settings.heads, settings.attention, settings.qk_norm
        self.q, self.k, self.v = (sharding.linear(d, d, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3))
        self.out = sharding.linear(d, d, ("heads", "embed"), rngs=rngs, dtype=dtype)
        if settings.qk_norm:
            self.q_norm, self.k_norm = (nnx.RMSNorm(d // settings.heads, epsilon=1e-6, rngs=rngs) for _ in range(2))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H d"]:
        q = self._heads(self.q(x))
        return self.q_norm(q).astype(q.dtype) if self.normalize else q

    def keys_values(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H d"]]:
        k, v = self._heads(self.k(x)), self._heads(self.v(x))
        return (self.k_norm(k).astype(k.dtype) if self.normalize else k), v

    def __call__(
        self,
        queries: Float[Array, "B T H d"],
        keys: Float[Array, "B S H d"],
        values: Float[Array, "B S H d"],
        *,
        causal: bool = False,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what the queries find; the masks are those of `attention`."""
        found = attention(queries, keys, values, kernel=self.kernel, causal=causal, lengths=lengths)
        return self.out(found.reshape(*found.shape[:-2], -1))


class FeedForward(nnx.Module):
    """Two linear layers with the activation between them, and where it is a gated one a third beside the first."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        d, f, dtype = settings.width, settings.feed_forward, jnp.dtype(settings.dtype)
        self.up = sharding.linear(d, f, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down = sharding.linear(f, d, ("mlp", "embed"), rngs=rngs, dtype=dtype)
        if settings.activation in GATED:
            self.gate = sharding.linear(d, f, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.settings = settings

    def __call__(self, x: Float[Array, "... D"], key: jax.Array | None) -> Float[Array, "... D"]:
        activate, up = ACTIVATIONS[self.settings.activation], self.up(x)
        hidden = activate(self.gate(x)) * up if self.settings.activation in GATED else activate(up)
        return self.down(dropout(hidden, self.settings.dropout, key))


class _Layer(nnx.Module):
    """What both kinds of layer share: norms, and where they stand around a sublayer."""

    def __init__(self, settings: LayerSettings, norms: int, rngs: nnx.Rngs):
        self.settings = settings
        self.norms = nnx.List([nnx.LayerNorm(settings.width, epsilon=1e-5, rngs=rngs) for _ in range(norms)])

    def _residual(
        self, norm: nnx.LayerNorm, x: Array, sublayer: Callable[[Array], Array], key: jax.Array | None
    ) -> Array:
        dtype = jnp.dtype(self.settings.dtype)
        if self.settings.norm == "pre":
            return x + dropout(sublayer(norm(x).astype(dtype)), self.settings.dropout, key)
        return norm(x + dropout(sublayer(x), self.settings.dropout, key)).astype(dtype)


class EncoderLayer(_Layer):
    """Self-attention over the memory sequence, then feed-forward."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        super().__init__(settings, 2, rngs)
        self.attention = Attention(settings, rngs)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], lengths: Int[Array, " B"] | None, key: jax.Array | None
    ) -> Float[Array, "B S D"]:
        keys = split(key, 3)

        def attend(y: Array) -> Array:
            k, v = self.attention.keys_values(y)
            return self.attention(self.attention.queries(y), k, v, lengths=lengths)

        x = self._residual(self.norms[0], x, attend, keys[0])
        return self._residual(self.norms[1], x, lambda y: self.feed_forward(y, keys[1]), keys[2])


class DecoderLayer(_Layer):
    """Causal self-attention over the tokens so far, attention over the memory, then feed-forward."""

    def __init__(self, settings: LayerSettings, rngs: nnx.Rngs):
        super().__init__(settings, 3, rngs)
        self.attention = Attention(settings, rngs)
        self.memory_attention = Attention(settings, rngs)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: tuple[Float[Array, "B S H d"], Float[Array, "B S H d"]],
        lengths: Int[Array, " B"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """All T tokens at once (training). memory: keys and values of the encoder's output."""

        def attend(y: Array) -> Array:
            k, v = self.attention.keys_values(y)
            return self.attention(self.attention.queries(y), k, v, causal=True)

        def recall(y: Array) -> Array:
            return self.memory_attention(self.memory_attention.queries(y), *memory, lengths=lengths)

        return self._around(x, attend, recall, key)

    def step(
        self,
        x: Float[Array, "B K D"],
        past: tuple[Float[Array, "L G H E d"], Float[Array, "L G H E d"]],
        number: Int[Array, ""],
        slot: Int[Array, ""],
        seen: Bool[Array, "#G #1 #Q E"],
        memory: tuple[Float[Array, "B H S d"], Float[Array, "B H S d"]],
        real: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B K D"], tuple[Float[Array, "L G H E d"], Float[Array, "L G H E d"]]]:
        """One token of each of K candidates that share one memory, by layer `number` of the stack.

        past: keys and values of all layers, of the tokens before; carried whole, so that XLA changes it in place. G is
        B * K where each candidate has slots of its own, or B where the K share theirs; Q = B * K / G of them write, the
        first at `slot`. seen: what each looks at, itself among it. real: the memory's positions that are real.
        """
        groups, heads, _, d = past[0].shape[1:]

        def grouped(y: Array) -> Array:
            return y.reshape(groups, -1, heads, d).swapaxes(1, 2)

        def attend(y: Array) -> Array:
            nonlocal past
            written = [grouped(z)[None] for z in self.attention.keys_values(y)]
            at = (number, 0, 0, slot, 0)
            past = (
                jax.lax.dynamic_update_slice(past[0], written[0], at),
                jax.lax.dynamic_update_slice(past[1], written[1], at),
            )
            found = attention_by_head(grouped(self.attention.queries(y)), past[0][number], past[1][number], seen)
            return self.attention.out(found.swapaxes(1, 2).reshape(y.shape))

        def recall(y: Array) -> Array:
            found = attention_by_head(self.memory_attention.queries(y).swapaxes(1, 2), *memory, real)
            return self.memory_attention.out(found.swapaxes(1, 2).reshape(y.shape))

        return self._around(x, attend, recall, None), past

    def _around(self, x: Array, attend: Callable, recall: Callable, key: jax.Array | None) -> Array:
        keys = split(key, 4)
        x = self._residual(self.norms[0], x, attend, keys[0])
        x = self._residual(self.norms[1], x, recall, keys[1])
        return self._residual(self.norms[2], x, lambda y: self.feed_forward(y, keys[2]), keys[3])
