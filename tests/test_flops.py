"""Counted operations against the compiler's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from geotoken_jax.model import flops
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from tests import fixtures

# Wide enough that operations other than products are 1 to 1.5 %. One layer: the compiler counts a loop's body once.
SIZES = dict(
    level=8, backbone_width=192, width=192, heads=2, feed_forward=288, neighbors=6, encoder_layers=1, decoder_layers=1
)


def compiled(s) -> float:
    """Returns the operations that XLA counts in one example's forward pass."""
    b = 2
    graph, state = nnx.split(nnx.eval_shape(lambda: GeoTokenModel(s, nnx.Rngs(0))))
    shape = jax.ShapeDtypeStruct
    tokens, near = shape((b, s.cells.length), jnp.int32), shape((b, s.neighbors, s.cells.length), jnp.int32)
    query, embeddings = (shape((b, *n, 3, s.backbone_width), jnp.float32) for n in ((), (s.neighbors,)))

    def forward(state, query, embeddings, near, tokens):
        neighbors = Neighbors(embeddings, near, jnp.full(b, s.neighbors))
        return nnx.merge(graph, state)(query, neighbors, tokens)

    return jax.jit(forward).lower(state, query, embeddings, near, tokens).cost_analysis()["flops"] / b


@pytest.mark.parametrize("form", fixtures.FORMS)
def test_counts_are_the_compilers(form):
    s = fixtures.settings(form, **SIZES)
    assert flops.per_example(s) / 3 == pytest.approx(compiled(s), rel=0.03)


def test_layers_and_neighbors_count():
    s = fixtures.settings("paper", **SIZES)
    one, two, three = (flops.per_example(dataclasses.replace(s, encoder_layers=n, decoder_layers=n)) for n in (1, 2, 3))
    assert two - one == three - two > 0
    assert flops.per_example(dataclasses.replace(s, neighbors=7)) > one
