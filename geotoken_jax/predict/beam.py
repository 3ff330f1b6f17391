"""Beam search over tokens. All beams of a photo share one cache of keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from geotoken_jax.model.geotoken import GeoTokenModel, Memory
from geotoken_jax.predict.sample import Candidates


def search(model: GeoTokenModel, memory: Memory, width: int) -> Candidates:
    """Returns the `width` most probable token sequences per photo that beam search finds, most probable first.

    If two beams continue the same beam, its keys and values are not copied: both attend to its slots in the cache. The
    distribution is not tempered, so `tempered_log_probability` of a candidate is equal to `log_probability`.
    """
    length = model.settings.cells.length
    batch = memory.lengths.shape[0]
    cache = model.start(memory, width, length * width)
    # All beams are empty at first: without the -inf, every beam would become the same sequence.
    scores = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1))
    tokens = jnp.zeros((batch, width, length), jnp.int32)

    def step(carry: tuple, t: Array) -> tuple[tuple, None]:
        cache, tokens, scores, previous = carry
        log_p, cache = model.step(cache, memory, t, previous, t * width)
        v = log_p.shape[-1]
        scores, best = jax.lax.top_k((scores[..., None] + log_p).reshape(batch, -1), width)
        beam, token = best // v, best % v
        tokens = jnp.take_along_axis(tokens, beam[..., None], 1).at[:, :, t].set(token)
        return (cache.continued(beam), tokens, scores, token), None

    start = (cache, tokens, scores, jnp.zeros((batch, width), jnp.int32))
    (_, tokens, scores, _), _ = jax.lax.scan(step, start, jnp.arange(length))
    return Candidates(tokens, scores, scores)
