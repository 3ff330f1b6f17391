"""The encoder-decoder that reads a photo and its neighbors and writes S2 tokens, coarse to fine (paper, section 3).

One class holds the published form and ours; the settings choose: norm, activation, positions, tied token tables, full
or compact memory, copy head. Position t has a vocabulary of its own (of S2 6, then 4^group); logits past it are -inf.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax import sharding, stack
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.geo.schemes import SCHEMES
from geotoken_jax.model import layers
from geotoken_jax.model.memory import CONTEXTS, MemoryBuilder, MemoryForm, Neighbors, drop, sinusoidal

#: Share of the photos whose time is hidden in training: who asks seldom tells it, and a data set may know every one.
_TIMELESS = 0.1
_NEVER = -1e30  # a log-probability of nothing; finite, so that its gradient is zero and not NaN


@dataclasses.dataclass(frozen=True)
class ModelSettings(layers.LayerSettings):
    """Everything that shapes the parameters; the layers' own are in LayerSettings.

    scheme: name of the tokens' own, in geo.schemes; level, group: of it. backbone_width: C. neighbors: M. memory:
    "full" or "compact". positions: "factored" or "sinusoidal". tie_tokens: neighbors and decoder share one token table.
    copy_head: mix in the next tokens of the neighbors that agree with the tokens so far. neighbor_tokens,
    neighbor_embeddings: False hides these of the neighbors (ablation). neighbor_dropout: share of the neighbors that
    are hidden in training, at random. similarities: tell how near each neighbor is to the photo. context: what is read
    of when it was taken, "none", "season" (the time of year) or "time" (of year and of day, UTC).
    """

    scheme: str
    level: int
    group: int
    backbone_width: int
    neighbors: int
    encoder_layers: int
    decoder_layers: int
    memory: str
    positions: str
    tie_tokens: bool
    copy_head: bool
    neighbor_tokens: bool
    neighbor_embeddings: bool
    neighbor_dropout: float
    similarities: bool
    context: str

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (
            ("scheme", tuple(SCHEMES)),
            ("memory", ("full", "compact")),
            ("positions", ("factored", "sinusoidal")),
            ("context", tuple(CONTEXTS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"config.model.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        SCHEMES[self.scheme](self.level, self.group)  # says what is wrong with them, or what is not installed
        if self.copy_head and not self.neighbor_tokens:
            raise ValueError(
                "config.model.copy_head copies neighbors' tokens: set it False where neighbor_tokens is False"
            )

    @property
    def cells(self) -> Scheme:
        return SCHEMES[self.scheme](self.level, self.group)

    @property
    def times(self) -> int:
        """How many numbers of a photo's time are read."""
        return CONTEXTS[self.context]

    @property
    def memory_form(self) -> MemoryForm:
        """The parts of the memory sequence and its length."""
        return MemoryForm(
            self.neighbors, self.cells.length, self.memory, self.positions, self.neighbor_tokens,
            self.neighbor_embeddings, self.similarities, self.times,
        )  # fmt: skip


class Memory(NamedTuple):
    """What the decoder looks back at: keys and values [L, B, S, H, d] of every decoder layer, how many of the S
    positions are real [B], and, for the copy head, its keys [B, M, D] with the neighbors themselves."""

    keys_values: tuple[Float[Array, "L B S H d"], Float[Array, "L B S H d"]]
    lengths: Int[Array, " B"]
    copy_keys: Float[Array, "B M D"] | None
    neighbors: Neighbors


class Cache(NamedTuple):
    """Decoding so far: keys and values [L, G, H, E, d] of the tokens in E slots, which neighbors agree with those of
    each candidate, and the memory's keys and values head by head, which stay as they are.

    G is B * K where each candidate has slots of its own, one a token, and B where the candidates of a photo share them
    as the nodes of a tree.
    """

    past: tuple[Float[Array, "L G H E d"], Float[Array, "L G H E d"]]
    agree: Bool[Array, "B K M"]
    memory: tuple[Float[Array, "L B H S d"], Float[Array, "L B H S d"]]


class CopyHead(nnx.Module):
    """Mixes in the next token of the neighbors whose tokens so far are the decoder's own.

    The decoder's state attends over the neighbors' encoded images among those that agree; a learned gate mixes the two
    distributions. Where no neighbor agrees the gate is closed.
    """

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        d, dtype = settings.width, jnp.dtype(settings.dtype)
        self.query = sharding.linear(d, d, ("embed", None), rngs=rngs, dtype=dtype)
        self.key = sharding.linear(d, d, ("embed", None), rngs=rngs, dtype=dtype)
        self.gate = sharding.linear(d, 1, ("embed", None), rngs=rngs, dtype=dtype)

    def __call__(
        self,
        logits: Float[Array, "B Q V"],
        states: Float[Array, "B Q D"],
        keys: Float[Array, "B M D"],
        tokens: Int[Array, "B Q M"],
        agree: Bool[Array, "B Q M"],
    ) -> Float[Array, "B Q V"]:
        """Returns log-probabilities; Q is positions (training) or candidates (decoding). tokens: what each neighbor
        has at the position in question."""
        scores = jnp.einsum("bqd,bmd->bqm", self.query(states), keys).astype(jnp.float32) / np.sqrt(keys.shape[-1])
        weights = jax.nn.softmax(jnp.where(agree, scores, _NEVER)) * agree
        copied = jnp.einsum("bqm,bqmv->bqv", weights, jax.nn.one_hot(tokens, logits.shape[-1]))
        gate = jnp.where(agree.any(-1, keepdims=True), self.gate(states).astype(jnp.float32), _NEVER)
        log_copied = jnp.where(copied > 0, jnp.log(jnp.where(copied > 0, copied, 1.0)), _NEVER)
        written = jax.nn.log_sigmoid(-gate) + jax.nn.log_softmax(logits)
        # A product of two minus infinities is past the vocabulary: leave it so, without a NaN in the gradient.
        mixed = jnp.logaddexp(jnp.maximum(written, _NEVER), jax.nn.log_sigmoid(gate) + log_copied)
        return jnp.where(jnp.isfinite(logits), mixed, -jnp.inf)


class GeoTokenModel(nnx.Module):
    """p(tokens | photo, neighbors), teacher-forced (`__call__`) or step by step on a cache (`start`, `step`)."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        s = self.settings = settings
        sizes = np.array(s.cells.vocab_sizes)
        normal = nnx.initializers.normal(0.02)
        # Position t's slice of the token table starts after those of the positions before it.
        self.offsets = tuple(int(o) for o in np.cumsum(sizes) - sizes)
        self.memory_builder = MemoryBuilder(s.memory_form, s.backbone_width, s.width, s.dtype, rngs)
        self.start_embedding = sharding.parameter(rngs.params(), normal, (s.width,), (None,))
        # Not split by "embed", as neither are the memory's vectors: to split its gradient XLA would gather all photos'.
        self.token_table = sharding.parameter(rngs.params(), normal, (int(sizes.sum()), s.width), ("vocab", None))
        if not s.tie_tokens and s.neighbor_tokens:
            self.neighbor_table = sharding.parameter(
                rngs.params(), normal, (int(sizes.sum()), s.width), ("vocab", None)
            )
        if s.positions == "factored":
            self.levels = sharding.parameter(rngs.params(), normal, (len(sizes), s.width), (None, None))
        self.encoder = stack.make(lambda r: layers.EncoderLayer(s, r), s.encoder_layers, rngs)
        self.decoder = stack.make(lambda r: layers.DecoderLayer(s, r), s.decoder_layers, rngs)
        if s.norm == "pre":
            self.encoder_norm = nnx.LayerNorm(s.width, epsilon=1e-5, rngs=rngs)
            self.decoder_norm = nnx.LayerNorm(s.width, epsilon=1e-5, rngs=rngs)
        head = nnx.initializers.lecun_normal(batch_axis=0)
        self.head = sharding.parameter(
            rngs.params(), head, (len(sizes), s.width, int(sizes.max())), (None, "embed", "vocab")
        )
        self.head_bias = sharding.parameter(
            rngs.params(), nnx.initializers.zeros, (len(sizes), int(sizes.max())), (None, "vocab")
        )
        if s.copy_head:
            self.copy = CopyHead(s, rngs)

    def __call__(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        tokens: Int[Array, "B T"],
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns log-probabilities of every position's token given the true tokens before it."""
        s = self.settings
        if s.times and context is not None and key is not None:
            told = jax.random.bernoulli(jax.random.fold_in(key, 4), 1 - _TIMELESS, (len(context), 1))
            context = context * told
        neighbors = drop(neighbors, s.neighbor_dropout, None if key is None else jax.random.fold_in(key, 3))
        encode_key, decode_key, embed_key = layers.split(key, 3)
        memory = self.encode(query, neighbors, encode_key, context)
        start = jnp.broadcast_to(self.start_embedding[...], (len(tokens), 1, s.width))
        x = jnp.concatenate([start, self._embed(self.token_table, tokens[:, :-1])], 1) + self._decoder_positions()
        x = sharding.constrain(layers.dropout(x.astype(jnp.dtype(s.dtype)), s.dropout, embed_key), "batch")

        def body(layer: Any, x: Array, xs: Any) -> tuple[Array, None]:
            keys_values, key = xs
            return sharding.constrain(layer(x, keys_values, memory.lengths, key), "batch"), None

        keys = None if decode_key is None else jax.random.split(decode_key, s.decoder_layers)
        x, _ = stack.scan(self.decoder, body, x, (memory.keys_values, keys), s.remat)
        agree = None
        if s.copy_head:
            same = tokens[:, :-1, None] == neighbors.tokens.swapaxes(1, 2)[:, :-1]
            same = jnp.concatenate([self._real(neighbors)[:, None], same], 1)
            agree = jnp.cumprod(same, 1).astype(bool)
        near = neighbors.tokens.swapaxes(1, 2)
        return self._log_probabilities(x, slice(None), memory, near, agree)

    def encode(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> Memory:
        """Reads the photo and its neighbors once; the result serves every candidate. context: of the photos' times
        (data.join.context), where the model reads them; None where all are unknown."""
        s = self.settings
        x, lengths = self.sequence(query, neighbors, key, context)
        copy_keys = None
        if s.copy_head:
            positions = self.memory_builder.first_positions(neighbors.tokens.shape[1], x.shape[1])
            copy_keys = self.copy.key(x[:, positions])

        def keys_values(layer: Any, carry: None, _: None) -> tuple[None, Any]:
            return None, layer.memory_attention.keys_values(x)

        _, pairs = stack.scan(self.decoder, keys_values, None, None)
        return Memory(pairs, lengths, copy_keys, neighbors)

    def sequence(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """Returns the encoder's output and how many of its positions are real."""
        s = self.settings
        embed_key, layers_key = layers.split(key, 2)
        embedded = None
        if s.neighbor_tokens:
            table = self.token_table if s.tie_tokens else self.neighbor_table
            embedded = self._embed(table, neighbors.tokens)
            if s.positions == "factored":
                embedded = embedded + self.levels[...]
        x, lengths = self.memory_builder(query, neighbors, embedded, context)
        x = sharding.constrain(layers.dropout(x, s.dropout, embed_key), "batch")

        def body(layer: Any, x: Array, key: Any) -> tuple[Array, None]:
            return sharding.constrain(layer(x, lengths, key), "batch"), None

        keys = None if layers_key is None else jax.random.split(layers_key, s.encoder_layers)
        x, _ = stack.scan(self.encoder, body, x, keys, s.remat)
        return (self.encoder_norm(x).astype(x.dtype) if s.norm == "pre" else x), lengths

    def start(self, memory: Memory, candidates: int, shared: int | None = None) -> Cache:
        """Returns the empty cache of `candidates` decodings a photo, with T slots each, or `shared` slots together."""
        s = self.settings
        b = memory.lengths.shape[0]
        groups, slots = (b, shared) if shared else (b * candidates, s.cells.length)
        past = jnp.zeros((s.decoder_layers, groups, s.heads, slots, s.width // s.heads), jnp.dtype(s.dtype))
        real = self._real(memory.neighbors)[:, None]
        agree = jnp.broadcast_to(real, (b, candidates, real.shape[-1]))
        # Without the barrier XLA turns what the encoder is made of instead, and again at every step (a small model's 30
        # samples with their encoding, CPU: 24 against 16 ms).
        by_head = jax.lax.optimization_barrier(tuple(part.swapaxes(2, 3) for part in memory.keys_values))
        return Cache((past, past), agree, by_head)

    def step(
        self,
        cache: Cache,
        memory: Memory,
        t: Int[Array, ""] | Int[Array, "B K"],
        previous: Int[Array, "B K"],
        slot: Int[Array, ""] | None = None,
        seen: Bool[Array, "B K E"] | None = None,
    ) -> tuple[Float[Array, "B K V"], Cache]:
        """Returns log-probabilities of token t, and the cache after it. previous: token t - 1; anything at t = 0.

        Where candidates share their slots each may stand at a t of its own; slot: where the first of them writes, the
        others following it; seen: the slots that each looks at, its own among them.
        """
        s = self.settings
        before = jnp.maximum(t - 1, 0)
        first = (t == 0)[..., None]
        embedded = self.token_table[...][jnp.asarray(self.offsets)[before] + previous]
        x = jnp.where(first, self.start_embedding[...], embedded) + self._decoder_positions()[t]
        x = x.astype(jnp.dtype(s.dtype))
        if seen is None:
            slot, visible = t, (jnp.arange(s.cells.length) <= t)[None, None, None]
        else:
            visible = seen[:, None]
        real = jnp.arange(cache.memory[0].shape[3]) < memory.lengths[:, None, None, None]

        def body(layer: Any, carry: Any, xs: Any) -> tuple[Any, None]:
            number, keys_values = xs
            return layer.step(*carry, number, slot, visible, keys_values, real), None

        numbered = (jnp.arange(s.decoder_layers), cache.memory)
        (x, past), _ = stack.scan(self.decoder, body, (x, cache.past), numbered)
        agree, tokens = cache.agree, None
        if s.copy_head:
            near, at = memory.neighbors.tokens.swapaxes(1, 2), jnp.broadcast_to(t, previous.shape)
            latest, tokens = (jnp.take_along_axis(near, i[..., None], 1) for i in (jnp.maximum(at - 1, 0), at))
            agree = agree & (first | (latest == previous[..., None]))
        log_p = self._log_probabilities(x, t, memory, tokens, agree)
        return log_p, cache._replace(past=past, agree=agree)

    def _log_probabilities(self, x: Array, t: Any, memory: Memory, tokens: Any, agree: Any) -> Array:
        """t: the position that the states [B, Q, D] stand at: all T, slice(None); one; or each its own [B, Q]."""
        if self.settings.norm == "pre":
            x = self.decoder_norm(x).astype(x.dtype)
        head = self.head[...].astype(x.dtype)
        if isinstance(t, slice):
            logits = jnp.einsum("btd,tdv->btv", x, head)
        elif t.ndim == 0:
            logits = x @ head[t]
        else:  # the heads of all positions, 176 columns at group 2, where to gather each state's own is 8,192 numbers
            logits = jnp.take_along_axis(jnp.einsum("bqd,tdv->bqtv", x, head), t[..., None, None], 2)[:, :, 0]
        logits = jnp.where(self._vocab_mask()[t], logits.astype(jnp.float32) + self.head_bias[...][t], -jnp.inf)
        if memory.copy_keys is None:
            return jax.nn.log_softmax(logits)
        return self.copy(logits, x, memory.copy_keys, tokens, agree)

    def _embed(self, table: nnx.Param, tokens: Int[Array, "... T"]) -> Float[Array, "... T D"]:
        return table[...][tokens + np.array(self.offsets[: tokens.shape[-1]])]

    def _decoder_positions(self) -> Float[Array, "T D"]:
        if self.settings.positions == "factored":
            return self.levels[...]
        return jnp.asarray(sinusoidal(self.settings.cells.length, self.settings.width))

    def _vocab_mask(self) -> Bool[Array, "T V"]:
        sizes = np.array(self.settings.cells.vocab_sizes)
        return jnp.asarray(np.arange(sizes.max()) < sizes[:, None])

    def _real(self, neighbors: Neighbors) -> Bool[Array, "B M"]:
        return jnp.arange(neighbors.tokens.shape[1]) < neighbors.count[:, None]

    def states(self, memory: Memory, tokens: Int[Array, "B K T"]) -> Float[Array, "B K D"]:
        """Returns the decoder's last output for each candidate, which all tokens but the last have gone into."""
        s = self.settings

        def one(tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
            start = jnp.broadcast_to(self.start_embedding[...], (len(tokens), 1, s.width))
            x = jnp.concatenate([start, self._embed(self.token_table, tokens[:, :-1])], 1) + self._decoder_positions()

            def body(layer: Any, x: Array, keys_values: Any) -> tuple[Array, None]:
                return layer(x, keys_values, memory.lengths, None), None

            x = stack.scan(self.decoder, body, x.astype(jnp.dtype(s.dtype)), memory.keys_values)[0][:, -1]
            return self.decoder_norm(x).astype(x.dtype) if s.norm == "pre" else x

        # One candidate after another: all of them at once would repeat the memory K times.
        return jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(tokens, 1, 0)), 0, 1)
