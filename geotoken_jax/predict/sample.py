"""Greedy decoding and sampling of candidates. All candidates of a photo share one copy of the encoder's output."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from geotoken_jax import randomness
from geotoken_jax.model.geotoken import Cache, GeoTokenModel, Memory


class Candidates(NamedTuple):
    """Decoded token sequences with their log-probabilities in nats.

    log_probability: log-probability in the model's own distribution. tempered_log_probability: log-probability in the
    distribution from which samples are drawn, after temperature and top_p.
    """

    tokens: Int[Array, "B K T"]
    log_probability: Float[Array, "B K"]
    tempered_log_probability: Float[Array, "B K"]


def greedy(model: GeoTokenModel, memory: Memory) -> Candidates:
    """Returns one candidate per photo: the most probable token at each position in turn."""
    unused = jax.random.split(randomness.key(0), memory.lengths.shape[0])
    return sample(model, memory, unused, 0, 1.0)


def sample(
    model: GeoTokenModel,
    memory: Memory,
    keys: Key[Array, " B"],
    samples: int,
    temperature: float,
    top_p: float = 1.0,
) -> Candidates:
    """Returns 1 + samples candidates per photo: the greedy one first, then independent samples.

    keys: one random key per photo; a photo's candidates then do not depend on other photos in the batch. temperature:
    divisor of logits, above 0. top_p: probability mass in (0, 1]; each token is drawn from the fewest values that have
    this mass in the tempered distribution (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
    """
    vocabulary = max(model.settings.cells.vocab_sizes)
    return draw(model, memory, lambda t: noise(keys, t, samples, vocabulary), 1 + samples, temperature, top_p)


def noise(keys: Key[Array, " B"], t: Int[Array, ""], samples: int, vocabulary: int) -> Float[Array, "B K V"]:
    """Returns the noise at position t of the tokens, for K = 1 + samples candidates.

    A candidate's token is the one with the largest sum of log-probability and noise. The noise is 0 for the first
    candidate, which is greedy, and drawn from the Gumbel distribution for the others.
    """

    def one(key: Array) -> Array:
        drawn = jax.random.gumbel(jax.random.fold_in(key, t), (samples, vocabulary))
        return jnp.concatenate([jnp.zeros((1, vocabulary)), drawn])

    return jax.vmap(one)(keys)


def draw(
    model: GeoTokenModel,
    memory: Memory,
    noise: Callable[[Int[Array, ""]], Float[Array, "B K V"]],
    candidates: int,
    temperature: float,
    top_p: float,
) -> Candidates:
    """Returns the same as `sample`, with noise from the caller.

    noise: function that returns the noise at position t. candidates: K, the number of candidates.

    At the first positions, there are fewer possible prefixes of tokens than candidates. These positions are decoded
    once per prefix instead of once per candidate, for all prefixes in one step. With S2 cells and 7 to 96 candidates
    there are 7 such prefixes: the empty one at the first position, and the six faces at the second.
    """
    sizes = model.settings.cells.vocab_sizes
    widths = [min(candidates, math.prod(sizes[:t])) for t in range(len(sizes))]
    slots = np.cumsum([0, *widths], dtype=np.int32)
    prefixes = sum(width < candidates for width in widths)  # number of positions at which all prefixes are decoded

    def choose(log_p: Array, t: Array, rows: Array | None = None) -> tuple[Array, Array, Array]:
        tempered = jax.nn.log_softmax(log_p / temperature)
        if top_p < 1.0:
            tempered = nucleus(tempered, top_p)
        if rows is not None:
            log_p, tempered = (jnp.take_along_axis(p, rows[..., None], 1) for p in (log_p, tempered))
        token = jnp.argmax(tempered + noise(t), -1).astype(jnp.int32)
        log_p, tempered = (jnp.take_along_axis(p, token[..., None], -1)[..., 0] for p in (log_p, tempered))
        return token, log_p, tempered

    def step(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        cache, previous = carry
        log_p, cache = model.step(cache, memory, t, previous, slots[prefixes] + (t - prefixes) * candidates)
        token, *taken = choose(log_p, t)
        return (cache, token), (token, *taken)

    chosen, token = [], jnp.zeros((memory.lengths.shape[0], candidates), jnp.int32)
    if prefixes:
        log_p, cache = _decode_prefixes(model, memory, sizes[:prefixes], int(slots[-1]))
        prefix = rows = token
        for t in range(prefixes):
            rows = slots[t] + prefix
            token, *taken = choose(log_p, jnp.int32(t), rows)
            prefix = prefix * sizes[t] + token
            chosen.append([x[None] for x in (token, *taken)])
        cache = cache.continued(rows)
    else:
        cache = model.start(memory, candidates, int(slots[-1]))
    if prefixes < len(sizes):
        chosen.append(jax.lax.scan(step, (cache, token), jnp.arange(prefixes, len(sizes)))[1])
    tokens, log_p, tempered = (jnp.concatenate(parts) for parts in zip(*chosen, strict=True))
    return Candidates(jnp.moveaxis(tokens, 0, -1), log_p.sum(0), tempered.sum(0))


def _decode_prefixes(
    model: GeoTokenModel, memory: Memory, sizes: tuple[int, ...], slots: int
) -> tuple[Float[Array, "B n V"], Cache]:
    """Returns the log-probabilities of the token after each of n prefixes, and the cache of the prefixes.

    The prefixes are all sequences of 0 to len(sizes) - 1 tokens, shorter ones first, and sequences of equal length in
    lexicographic order. sizes: number of tokens at each position. slots: number of slots per photo; prefix i writes
    slot i.
    """
    tokens = [i for t in range(len(sizes)) for i in itertools.product(*map(range, sizes[:t]))]
    index = {prefix: i for i, prefix in enumerate(tokens)}
    seen = np.zeros((len(tokens), slots), bool)
    for i, prefix in enumerate(tokens):
        seen[i, [index[prefix[:t]] for t in range(len(prefix))]] = True
    batch, depth = memory.lengths.shape[0], np.array([len(prefix) for prefix in tokens], np.int32)
    previous = np.array([prefix[-1] if prefix else 0 for prefix in tokens], np.int32)
    cache = model.start(memory, len(tokens), slots)
    agree = cache.agree
    for t in range(len(sizes) - 1):
        at = np.array([prefix[t] if len(prefix) > t else 0 for prefix in tokens], np.int32)
        same = memory.neighbors.tokens[:, None, :, t] == at[:, None]
        agree = agree & (same | (depth <= t)[:, None])
    cache = cache._replace(seen=cache.seen | seen, agree=agree)
    depth, previous = (jnp.broadcast_to(x, (batch, len(x))) for x in (depth, previous))
    return model.step(cache, memory, depth, previous, jnp.int32(0))


def nucleus(log_p: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Returns log-probabilities cut to the nucleus: the fewest most probable values with a mass of top_p or more.

    The nucleus is normalized; all other values are -inf. Values as probable as the last one in the nucleus are in it
    too.
    """
    falling = -jnp.sort(-log_p)
    p = jnp.exp(falling)
    last = jnp.where(jnp.cumsum(p, -1) - p < top_p, falling, jnp.inf).min(-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(log_p >= last, log_p, -jnp.inf))
