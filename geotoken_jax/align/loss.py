"""The contrastive loss of alignment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def info_nce(
    a: Float[Array, "B C"],
    b: Float[Array, "B C"],
    log_scale: Float[Array, ""],
    present: Bool[Array, "B"],
    same: Bool[Array, "B B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the symmetric InfoNCE loss of the pairs (a_i, b_i), and the share of a_i whose nearest b is b_i.

    Rows need not be normalized. log_scale: logarithm of the factor on cosines. present: pairs that take part; the
    others are neither positives nor negatives. same: pairs (i, j) that have one target, by the data; j is then no
    negative of i. Both results are 0 if no pair is present. (van den Oord et al. 2018; Radford et al. 2021.)
    """
    logits = jnp.exp(log_scale) * _unit(a) @ _unit(b).T
    diagonal = jnp.eye(len(a), dtype=bool)
    logits = jnp.where(diagonal | (present & ~same), logits, -jnp.inf)
    towards_b = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    # `present` masks columns, so the other direction is masked again after the transposition.
    backwards = jnp.where(diagonal | present, logits.T, -jnp.inf)
    towards_a = jnp.diagonal(jax.nn.log_softmax(backwards, axis=1))
    n = jnp.maximum(present.sum(), 1)
    loss = -jnp.where(present, towards_b + towards_a, 0).sum() / (2 * n)
    nearest = jnp.argmax(logits, axis=1) == jnp.arange(len(a))
    return loss, (nearest & present).sum() / n


def same_rows(x: Float[Array, "B C"]) -> Bool[Array, "B B"]:
    """Returns which rows are equal to which: photos of one album share a coordinate, photos of one town a text."""
    return jax.lax.map(lambda row: (x == row).all(axis=1), x)


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-12))
