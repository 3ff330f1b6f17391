"""Candidates by greedy decoding and by sampling, on a cache that shares one memory among a photo's candidates."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from geotoken_jax.model.geotoken import GeoTokenModel, Memory


class Candidates(NamedTuple):
    """Decoded token sequences [B, K, T] with their log-probability, in nats, under the model itself and under the
    distribution that they were sampled from: tempered, and cut to the nucleus."""

    tokens: Int[Array, "B K T"]
    log_probability: Float[Array, "B K"]
    tempered_log_probability: Float[Array, "B K"]


def greedy(model: GeoTokenModel, memory: Memory) -> Candidates:
    """Returns one candidate a photo: the most probable token at each position in turn."""
    noise_free = jnp.zeros((memory.lengths.shape[0], 2), jnp.uint32)
    return sample(model, memory, jax.random.wrap_key_data(noise_free), 0, 1.0)


def sample(
    model: GeoTokenModel,
    memory: Memory,
    keys: Key[Array, " B"],
    samples: int,
    temperature: float,
    top_p: float = 1.0,
) -> Candidates:
    """Returns 1 + samples candidates a photo: the greedy one first, then independent samples.

    keys: one a photo, so that a photo's candidates do not depend on the batch it is in. temperature: > 0. top_p: in
    (0, 1]; of each token's tempered distribution the fewest values that hold so much are drawn from (nucleus sampling,
    Holtzman et al. 2020, arXiv 1904.09751).
    """
    vocabulary = max(model.settings.cells.vocab_sizes)
    return draw(model, memory, lambda t: noise(keys, t, samples, vocabulary), 1 + samples, temperature, top_p)


def noise(keys: Key[Array, " B"], t: Int[Array, ""], samples: int, vocabulary: int) -> Float[Array, "B K V"]:
    """Returns what is added to the log-probabilities of token t, of which the largest is then taken: 0 for the first of
    K = 1 + samples candidates, which is greedy, and Gumbel's for the others."""

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
    together: bool = False,
) -> Candidates:
    """Returns what `sample` does, with noise that the caller makes, of token t, for K = candidates.

    together: candidates share their slots and look at their own, which takes K times the products, but no axis is as
    long as a multiple of B.
    """
    length = model.settings.cells.length
    slots = jnp.arange(length * candidates)
    own = slots % candidates == jnp.arange(candidates)[:, None]

    def step(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        cache, previous = carry
        place = (t * candidates, (own & (slots // candidates <= t))[None]) if together else ()
        log_p, cache = model.step(cache, memory, t, previous, *place)
        tempered = jax.nn.log_softmax(log_p / temperature)
        if top_p < 1.0:
            tempered = nucleus(tempered, top_p)
        token = jnp.argmax(tempered + noise(t), -1).astype(jnp.int32)
        taken = [jnp.take_along_axis(p, token[..., None], -1)[..., 0] for p in (log_p, tempered)]
        return (cache, token), (token, *taken)

    cache = model.start(memory, candidates, length * candidates if together else None)
    start = (cache, jnp.zeros((memory.lengths.shape[0], candidates), jnp.int32))
    _, (tokens, log_p, tempered) = jax.lax.scan(step, start, jnp.arange(length))
    return Candidates(jnp.moveaxis(tokens, 0, -1), log_p.sum(0), tempered.sum(0))


def nucleus(log_p: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Returns log-probabilities of the fewest most probable values that hold top_p, made to sum to 1; -inf of the
    others. Values as probable as the last of them stay with it."""
    falling = -jnp.sort(-log_p)
    p = jnp.exp(falling)
    last = jnp.where(jnp.cumsum(p, -1) - p < top_p, falling, jnp.inf).min(-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(log_p >= last, log_p, -jnp.inf))
