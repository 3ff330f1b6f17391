"""Beam search, on the cache that sampling uses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from geotoken_jax.model.geotoken import GeoTokenModel, Memory
from geotoken_jax.predict.sample import Candidates


def search(model: GeoTokenModel, memory: Memory, width: int) -> Candidates:
    """Returns the `width` best sequences a photo that a beam of that width finds, most probable first."""
    length = model.settings.cells.length
    batch = len(memory.lengths)
    cache = model.start(memory, width)
    # At first all beams are the same: only the first may be extended.
    scores = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1))
    tokens = jnp.zeros((batch, width, length), jnp.int32)

    def step(carry: tuple, t: Array) -> tuple[tuple, None]:
        cache, tokens, scores, previous = carry
        log_p, cache = model.step(cache, memory, t, previous)
        v = log_p.shape[-1]
        scores, best = jax.lax.top_k((scores[..., None] + log_p).reshape(batch, -1), width)
        beam, token = best // v, best % v
        tokens = jnp.take_along_axis(tokens, beam[..., None], 1).at[:, :, t].set(token)
        past = tuple(jnp.take_along_axis(p, beam[None, :, :, None, None, None], 2) for p in cache.past)
        agree = jnp.take_along_axis(cache.agree, beam[..., None], 1)
        return (cache._replace(past=past, agree=agree), tokens, scores, token), None

    start = (cache, tokens, scores, jnp.zeros((batch, width), jnp.int32))
    (_, tokens, scores, _), _ = jax.lax.scan(step, start, jnp.arange(length))
    return Candidates(tokens, scores, scores)
