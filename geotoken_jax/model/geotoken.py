"""The encoder-decoder: it reads a photo and its neighbors, and writes a cell's tokens from coarse to fine.

Section 3 of the paper describes it. GeoTokenModel is both the published model and ours; ModelSettings choose between
them. Each token position has its own vocabulary. With S2 cells these are 6 faces at the first position, and 4^group
cells at each later position. Logits have the width of the largest vocabulary; logits outside a position's vocabulary
are -inf.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from geotoken_jax import attention, randomness, sharding, stack
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.geo.schemes import SCHEMES
from geotoken_jax.model import layers
from geotoken_jax.model.memory import CONTEXTS, MemoryBuilder, MemoryForm, Neighbors, drop, sinusoidal
from geotoken_jax.model.parametrization import set_learning_rates

#: Share of training photos whose capture time is hidden. Users seldom give a capture time, so the model must predict
#: well without it, even if all photos of the data set have one.
_TIME_DROPOUT = 0.1
_NEVER = -1e30  # log-probability of an impossible token; finite, so that its gradient is 0 and not NaN


@dataclasses.dataclass(frozen=True)
class ModelSettings(layers.LayerSettings):
    """Settings of the whole model, added to the settings of its layers (LayerSettings).

    scheme: name of the cell scheme in geo.schemes.SCHEMES. level: size of the cells, as the level of S2 cells that are
    about as large. group: number of digits per token. backbone_width: C, width of the backbone's embeddings.
    neighbors: M, number of neighbors per photo. memory: "full" or "compact" (model/memory.py).
    positions: "factored" or "sinusoidal" (MemoryForm).
    tie_tokens: whether neighbors and decoder share one table of token embeddings. copy_head: whether the model has a
    CopyHead. neighbor_tokens, neighbor_embeddings: False hides the neighbors' tokens or embeddings (ablation).
    neighbor_dropout: share of neighbors hidden at random in training. similarities: whether the memory contains the
    cosines between the embeddings of the photo and of each neighbor. context: part of the capture time that the model
    reads: "none", "season" (time of year) or "time" (time of year and time of day, UTC).
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
        SCHEMES[self.scheme](self.level, self.group)  # raises for a bad level or group, or a missing package
        if self.copy_head and not self.neighbor_tokens:
            raise ValueError(
                "config.model.copy_head is True, but there is nothing to copy since config.model.neighbor_tokens is "
                "False: set copy_head to False, or neighbor_tokens to True"
            )

    @property
    def cells(self) -> Scheme:
        return SCHEMES[self.scheme](self.level, self.group)

    @property
    def times(self) -> int:
        """Number of values that describe a photo's capture time (data.join.context); 0 if the model reads none."""
        return CONTEXTS[self.context]

    @property
    def memory_form(self) -> MemoryForm:
        """The layout of the memory sequence."""
        return MemoryForm(
            self.neighbors, self.cells.length, self.memory, self.positions, self.neighbor_tokens,
            self.neighbor_embeddings, self.similarities, self.times,
        )  # fmt: skip


class Memory(NamedTuple):
    """The encoded photos and neighbors, as the decoder reads them.

    keys_values: keys and values of the S memory positions for each decoder layer. lengths: number of positions before
    the padding, per photo. copy_keys: keys of the copy head; None if the model has no copy head. neighbors: the
    neighbors that were encoded.
    """

    keys_values: tuple[Float[Array, "L B S H d"], Float[Array, "L B S H d"]]
    lengths: Int[Array, " B"]
    copy_keys: Float[Array, "B M D"] | None
    neighbors: Neighbors


class Cache(NamedTuple):
    """The state of decoding K candidates per photo.

    past: keys and values of the tokens decoded until now, in E slots per photo. A slot contains one token. The slots
    form a tree: candidates with the same first tokens share the slots of these tokens.
    seen: whether the candidate attends to the slot. A candidate attends to the slots that contain its own tokens.
    agree: whether a neighbor has the candidate's tokens at all decoded positions; False for padding.
    memory: keys and values of the memory, laid out head by head. Decoding does not change them.
    """

    past: tuple[Float[Array, "L B H E d"], Float[Array, "L B H E d"]]
    seen: Bool[Array, "B K E"]
    agree: Bool[Array, "B K M"]
    memory: tuple[Float[Array, "L B H S d"], Float[Array, "L B H S d"]]

    def continued(self, rows: Int[Array, "B n"]) -> "Cache":
        """Returns the cache of n candidates per photo, each of which continues a candidate of this cache.

        rows: index, from 0 to K - 1, of the candidate that each new one continues. Keys and values are not copied.
        """
        seen, agree = (jnp.take_along_axis(x, rows[..., None], 1) for x in (self.seen, self.agree))
        return self._replace(seen=seen, agree=agree)


class CopyHead(nnx.Module):
    """Mixes the decoder's distribution of the next token with the distribution of that token among the neighbors.

    A neighbor agrees if it has the same tokens at all earlier positions. Only agreeing neighbors count. The decoder's
    state attends to their encoded images. A neighbor's attention weight becomes the probability of its next token. A
    learned gate weights the two distributions. If no neighbor agrees, the result is the decoder's distribution.
    """

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        d, dtype = settings.width, jnp.dtype(settings.dtype)
        self.query = sharding.linear(d, d, ("embed", None), rngs=rngs, dtype=dtype)
        self.key = sharding.linear(d, d, ("embed", None), rngs=rngs, dtype=dtype)
        output = nnx.initializers.variance_scaling(settings.width_ratio, "fan_in", "truncated_normal")
        self.gate = sharding.linear(d, 1, ("embed", None), rngs=rngs, dtype=dtype, kernel_init=output)
        self.ratio = settings.width_ratio

    def __call__(
        self,
        logits: Float[Array, "B Q V"],
        states: Float[Array, "B Q D"],
        keys: Float[Array, "B M D"],
        tokens: Int[Array, "B Q M"],
        agree: Bool[Array, "B Q M"],
    ) -> Float[Array, "B Q V"]:
        """Returns log-probabilities. Q is the number of positions (training) or candidates (decoding).

        states: output of the decoder's last layer. logits: output of the decoder's head for these states. keys:
        Memory.copy_keys. tokens: token of each neighbor at the position to predict. agree: whether the neighbor has the
        true tokens (training) or the decoded tokens at all earlier positions.
        """
        weights = jax.nn.softmax(jnp.where(agree, self.scores(states, keys), _NEVER)) * agree
        copied = jnp.einsum("bqm,bqmv->bqv", weights, jax.nn.one_hot(tokens, logits.shape[-1]))
        gate = jnp.where(agree.any(-1, keepdims=True), self.gate(states).astype(jnp.float32), _NEVER)
        log_copied = jnp.where(copied > 0, jnp.log(jnp.where(copied > 0, copied, 1.0)), _NEVER)
        written = jax.nn.log_sigmoid(-gate) + jax.nn.log_softmax(logits)
        # For tokens outside the position's vocabulary `written` is -inf, which would put a NaN into the gradient. The
        # maximum removes the -inf, and the last line restores it.
        mixed = jnp.logaddexp(jnp.maximum(written, _NEVER), jax.nn.log_sigmoid(gate) + log_copied)
        return jnp.where(jnp.isfinite(logits), mixed, -jnp.inf)

    def scores(self, states: Float[Array, "B Q D"], keys: Float[Array, "B M D"]) -> Float[Array, "B Q M"]:
        """Returns the attention logits, in float32. Arguments: see `__call__`."""
        products = jnp.einsum("bqd,bmd->bqm", self.query(states), keys).astype(jnp.float32)
        return products / np.sqrt(keys.shape[-1] / self.ratio)


class GeoTokenModel(nnx.Module):
    """Models p(tokens | photo, neighbors). `__call__` is teacher-forced; `start` and `step` decode token by token."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        s = self.settings = settings
        sizes = np.array(s.cells.vocab_sizes)
        normal = nnx.initializers.normal(0.02)
        # The token table stacks the vocabularies of all positions; position t's rows start at offsets[t].
        self.offsets = tuple(int(o) for o in np.cumsum(sizes) - sizes)
        norm = s.width_ratio**-0.5
        self.memory_builder = MemoryBuilder(s.memory_form, s.backbone_width, s.width, s.dtype, rngs, norm)
        self.start_embedding = sharding.parameter(rngs.params(), normal, (s.width,), (None,))
        # Devices split the token table along its axis "vocab" only. If they split the axis "embed" too, XLA would
        # gather the gradients of all photos before splitting them. MemoryBuilder's vectors are not split for the same
        # reason.
        self.token_table = sharding.parameter(rngs.params(), normal, (int(sizes.sum()), s.width), ("vocab", None))
        if not s.tie_tokens and s.neighbor_tokens:
            self.neighbor_table = sharding.parameter(
                rngs.params(), normal, (int(sizes.sum()), s.width), ("vocab", None)
            )
        if s.positions == "factored":
            self.levels = sharding.parameter(rngs.params(), normal, (len(sizes), s.width), (None, None))
        self.encoder = stack.make(
            lambda r: layers.EncoderLayer(s, r, s.depth_ratio(s.encoder_layers)), s.encoder_layers, rngs
        )
        self.decoder = stack.make(
            lambda r: layers.DecoderLayer(s, r, s.depth_ratio(s.decoder_layers)), s.decoder_layers, rngs
        )
        if s.norm == "pre":
            self.encoder_norm = layers.LayerNorm(s.width, epsilon=1e-5, rngs=rngs)
            self.decoder_norm = layers.LayerNorm(s.width, epsilon=1e-5, rngs=rngs)
        head = nnx.initializers.variance_scaling(s.width_ratio, "fan_in", "truncated_normal", batch_axis=0)
        self.head = sharding.parameter(
            rngs.params(), head, (len(sizes), s.width, int(sizes.max())), (None, "embed", "vocab"), s.dtype
        )
        self.head_bias = sharding.parameter(
            rngs.params(), nnx.initializers.zeros, (len(sizes), int(sizes.max())), (None, "vocab")
        )
        if s.copy_head:
            self.copy = CopyHead(s, rngs)
        if s.width_ratio != 1.0:
            set_learning_rates(self, s.width_ratio)

    def __call__(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        tokens: Int[Array, "B T"],
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the log-probabilities of each position's token, given the true tokens before it.

        key: random key for dropout and for hiding neighbors and times. If it is None, as in evaluation, nothing is
        dropped or hidden. context: see `encode`.
        """
        s = self.settings
        if s.times and context is not None and key is not None:
            shown = jax.random.bernoulli(jax.random.fold_in(key, 4), 1 - _TIME_DROPOUT, (len(context), 1))
            context = context * shown
        neighbors = drop(neighbors, s.neighbor_dropout, None if key is None else jax.random.fold_in(key, 3))
        encode_key, decode_key, embed_key = randomness.split(key, 3)
        memory, lengths, copy_keys = self._encoded(query, neighbors, encode_key, context)
        x = self.embed_tokens(tokens)
        x = sharding.constrain(randomness.dropout(x, s.dropout, _words(embed_key, x)), "batch")

        def body(layer: Any, x: Array, words: Any) -> tuple[Array, None]:
            # `encode` would compute the keys and values of all layers at once. Here they exist for one layer at a time.
            keys_values = layer.memory_attention.keys_values(memory)
            return sharding.constrain(layer(x, keys_values, lengths, words), "batch"), None

        x, _ = stack.scan(self.decoder, body, x, _words(decode_key, x, s.decoder_layers), s.remat)
        agree = None
        if s.copy_head:
            same = tokens[:, :-1, None] == neighbors.tokens.swapaxes(1, 2)[:, :-1]
            same = jnp.concatenate([self._real(neighbors)[:, None], same], 1)
            agree = jnp.cumprod(same, 1).astype(bool)
        neighbor_tokens = neighbors.tokens.swapaxes(1, 2)
        return self._log_probabilities(x, slice(None), copy_keys, neighbor_tokens, agree)

    def encode(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> Memory:
        """Returns the encoded photos and neighbors, computed once for all candidates.

        key: random key for dropout; if None, there is no dropout. context: numbers that describe the photos' capture
        times (data.join.context), for a model that reads them; if None, all times count as unknown.
        """
        x, lengths, copy_keys = self._encoded(query, neighbors, key, context)

        def keys_values(layer: Any, carry: None, _: None) -> tuple[None, Any]:
            return None, layer.memory_attention.keys_values(x)

        _, pairs = stack.scan(self.decoder, keys_values, None, None)
        return Memory(pairs, lengths, copy_keys, neighbors)

    def _encoded(
        self, query: Array, neighbors: Neighbors, key: jax.Array | None, context: Array | None
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"], Float[Array, "B M D"] | None]:
        """Returns the encoder's output, the number of its positions before the padding, and the copy head's keys."""
        x, lengths = self._sequence(query, neighbors, key, context)
        if not self.settings.copy_head:
            return x, lengths, None
        positions = self.memory_builder.first_positions(neighbors.tokens.shape[1])
        return x, lengths, self.copy.key(x[:, positions])

    def sequence(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        key: jax.Array | None = None,
        context: Float[Array, "B times"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """Returns the encoder's output and the number of its positions before the padding. Arguments: see `encode`."""
        x, lengths = self._sequence(query, neighbors, key, context)
        form = self.settings.memory_form
        return x[:, : form.head + neighbors.tokens.shape[1] * form.per_neighbor], lengths

    def _sequence(
        self, query: Array, neighbors: Neighbors, key: jax.Array | None, context: Array | None
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """Returns the encoder's output and the number of its positions before the padding, like `sequence`.

        The output is padded to the number of positions that suits the device (attention.positions).
        """
        s = self.settings
        embed_key, layers_key = randomness.split(key, 2)
        x, lengths = self.embed_memory(query, neighbors, context)
        x = sharding.constrain(randomness.dropout(x, s.dropout, _words(embed_key, x)), "batch")
        words = _words(layers_key, x, s.encoder_layers)
        if padding := attention.positions(x.shape[1]) - x.shape[1]:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            words = None if words is None else jnp.pad(words, ((0, 0), (0, 0), (0, padding)))

        def body(layer: Any, x: Array, words: Any) -> tuple[Array, None]:
            return sharding.constrain(layer(x, lengths, words), "batch"), None

        # On a TPU v5e, the compiler estimates 5.3 ms per encoder layer of the paper for 128 photos if the layers are
        # unrolled, and 7.6 ms in a loop. Compiling unrolled layers takes several times as long, which pays off only in
        # training.
        unroll = key is not None and sharding.platform() == "tpu"
        x, _ = stack.scan(self.encoder, body, x, words, s.remat, unroll)
        return (self.encoder_norm(x) if s.norm == "pre" else x), lengths

    def embed_memory(
        self, query: Float[Array, "B 3 C"], neighbors: Neighbors, context: Float[Array, "B times"] | None = None
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """Returns the encoder's input and the number of its positions before the padding. Arguments: see `encode`."""
        s, embedded = self.settings, None
        if s.neighbor_tokens:
            table = self.token_table if s.tie_tokens else self.neighbor_table
            embedded = self._embed(table, neighbors.tokens)
            if s.positions == "factored":
                embedded = embedded + self.levels[...]
        return self.memory_builder(query, neighbors, embedded, context)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the decoder's input: at each position the embedding of the token before it."""
        start = jnp.broadcast_to(self.start_embedding[...], (len(tokens), 1, self.settings.width))
        x = jnp.concatenate([start, self._embed(self.token_table, tokens[:, :-1])], 1) + self._decoder_positions()
        return x.astype(jnp.dtype(self.settings.dtype))

    def start(self, memory: Memory, candidates: int, slots: int) -> Cache:
        """Returns an empty cache for `candidates` sequences per photo. slots: E, number of slots per photo."""
        s = self.settings
        b = memory.lengths.shape[0]
        past = jnp.zeros((s.decoder_layers, b, s.heads, slots, s.width // s.heads), jnp.dtype(s.dtype))
        seen = jnp.zeros((b, candidates, slots), bool)
        real = self._real(memory.neighbors)[:, None]
        agree = jnp.broadcast_to(real, (b, candidates, real.shape[-1]))
        # With the barrier, the keys and values are transposed once. Without it, XLA transposes the arrays from which it
        # computes the keys and values, at every step. (A small model on a CPU encodes a photo and draws 30 samples in
        # 16 ms with the barrier, in 24 ms without it.)
        by_head = jax.lax.optimization_barrier(tuple(part.swapaxes(2, 3) for part in memory.keys_values))
        return Cache((past, past), seen, agree, by_head)

    def step(
        self,
        cache: Cache,
        memory: Memory,
        t: Int[Array, ""] | Int[Array, "B K"],
        previous: Int[Array, "B K"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K V"], Cache]:
        """Returns the log-probabilities of the token at position t, and the updated cache.

        t: one position for all candidates, or one per candidate. previous: token at t - 1 of each candidate; ignored at
        t = 0. slot: slot for the new keys and values of the first candidate; the other candidates use the slots after
        it.
        """
        s = self.settings
        before = jnp.maximum(t - 1, 0)
        first = (t == 0)[..., None]
        embedded = self.token_table[...][jnp.asarray(self.offsets)[before] + previous]
        x = jnp.where(first, self.start_embedding[...], embedded) + self._decoder_positions()[t]
        x = x.astype(jnp.dtype(s.dtype))
        _, candidates, slots = cache.seen.shape
        seen = cache.seen | (slot + jnp.arange(candidates)[:, None] == jnp.arange(slots))
        real = jnp.arange(cache.memory[0].shape[3]) < memory.lengths[:, None, None, None]

        def body(layer: Any, carry: Any, xs: Any) -> tuple[Any, None]:
            number, keys_values = xs
            return layer.step(*carry, number, slot, seen[:, None], keys_values, real), None

        numbered = (jnp.arange(s.decoder_layers), cache.memory)
        (x, past), _ = stack.scan(self.decoder, body, (x, cache.past), numbered)
        agree, tokens = cache.agree, None
        if s.copy_head:
            neighbor_tokens, at = memory.neighbors.tokens.swapaxes(1, 2), jnp.broadcast_to(t, previous.shape)
            latest, tokens = (
                jnp.take_along_axis(neighbor_tokens, i[..., None], 1) for i in (jnp.maximum(at - 1, 0), at)
            )
            agree = agree & (first | (latest == previous[..., None]))
        log_p = self._log_probabilities(x, t, memory.copy_keys, tokens, agree)
        return log_p, cache._replace(past=past, seen=seen, agree=agree)

    def _log_probabilities(self, x: Array, t: Any, copy_keys: Array | None, tokens: Any, agree: Any) -> Array:
        """Returns the log-probabilities of the tokens at positions t, from the decoder's output x [B, Q, D].

        t: slice(None) if x has all T positions; one position if it is the same for all of x; positions [B, Q] if they
        differ. copy_keys, tokens, agree: see CopyHead; not used without a copy head.
        """
        if self.settings.norm == "pre":
            x = self.decoder_norm(x)
        head = self.head[...].astype(x.dtype)
        if isinstance(t, slice):
            logits: Array = sharding.einsum("btd,tdv->btv", x, self.head[...])
        elif t.ndim == 0:
            logits = x @ head[t]
        else:
            # Each position has its own head. x is multiplied with all heads, 176 columns at group 2. Gathering the one
            # right head per output would copy 8,192 numbers each time.
            logits = jnp.take_along_axis(jnp.einsum("bqd,tdv->bqtv", x, head), t[..., None, None], 2)[:, :, 0]
        logits = jnp.where(self._vocab_mask()[t], logits.astype(jnp.float32) + self.head_bias[...][t], -jnp.inf)
        if copy_keys is None:
            return jax.nn.log_softmax(logits)
        return self.copy(logits, x, copy_keys, tokens, agree)

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
        """Returns the decoder's output at the last position, before the head, for each of K candidates.

        At that position the decoder has read all tokens of the candidate except the last.
        """
        s = self.settings

        def last_state(tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
            def body(layer: Any, x: Array, keys_values: Any) -> tuple[Array, None]:
                return layer(x, keys_values, memory.lengths, None), None

            x = stack.scan(self.decoder, body, self.embed_tokens(tokens), memory.keys_values)[0][:, -1]
            return self.decoder_norm(x) if s.norm == "pre" else x

        # The candidates are computed one after another. All at once would need K copies of the memory.
        return jnp.moveaxis(jax.lax.map(last_state, jnp.moveaxis(tokens, 1, 0)), 0, 1)


def _words(key: Key[Array, ""] | None, x: Float[Array, "B S D"], *layers: int) -> UInt32[Array, "... B S"] | None:
    """Returns random words for dropout, one per position of x; None if key is None.

    layers: number of layers. If given, each layer has its own words, along a leading axis.
    """
    words = randomness.words(key, *layers, *x.shape[:-1])
    # The words are drawn outside the loop over layers. Inside it, each small operation takes about 1,800 cycles of a
    # TPU v5e.
    return None if words is None else sharding.constrain(words, *(None for _ in layers), "batch")
