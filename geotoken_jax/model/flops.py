"""Floating-point operations of one training example, computed from the model's settings."""

from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.layers import GATED


def per_example(s: ModelSettings) -> float:
    """Returns the operations of one example's matrix products, forward and backward, with all M neighbors present.

    A product of [m, k] and [k, n] counts as 2 m k n, and the backward pass as twice the forward pass. Causal attention
    counts as if it had no mask. Other operations do not count. If config.model.remat makes the backward pass compute
    activations again, these operations do not count either.
    """
    d, m, t = s.width, s.neighbors, s.cells.length
    memory = s.memory_form.length
    feed_forward = (3 if s.activation in GATED else 2) * d * s.feed_forward
    projections = 3 * (1 + m) * (s.backbone_width * d + d * d)
    # Multiplications of self-attention over S positions: the projections to queries, keys, values and output take
    # d x d each per position. The scores take S x S x d in all, and their product with the values as many.
    encoder = memory * (4 * d * d + feed_forward) + 2 * memory * memory * d
    decoder = t * (4 * d * d + feed_forward) + 2 * t * t * d
    decoder += (2 * t + 2 * memory) * d * d + 2 * t * memory * d
    products = projections + s.encoder_layers * encoder + s.decoder_layers * decoder + d * sum(s.cells.vocab_sizes)
    if s.similarities:
        products += m * (6 * s.backbone_width + 3 * d + d * d)
    products += s.times * d
    if s.copy_head:
        products += (t + m) * d * d + t * d + t * m * d + t * m * max(s.cells.vocab_sizes)
    return 3.0 * 2.0 * products
