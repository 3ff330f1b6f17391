"""Gated feed-forward, normalized attention logits, and the layer norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import sharding
from geotoken_jax.model import layers
from tests import fixtures


@pytest.mark.parametrize("activation, let_through", [("swiglu", jax.nn.silu), ("geglu", jax.nn.gelu)])
def test_a_gated_feed_forward_multiplies_two_products(activation, let_through):
    s = fixtures.settings("ours", activation=activation)
    layer = layers.FeedForward(s, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, s.width)).astype(np.float32)
    up, gate, down = (np.asarray(part.kernel[...]) for part in (layer.up, layer.gate, layer.down))
    assert up.shape == gate.shape == (s.width, s.feed_forward)
    np.testing.assert_allclose(layer(x, None), (np.asarray(let_through(x @ gate)) * (x @ up)) @ down, atol=1e-6)
    assert not hasattr(layers.FeedForward(fixtures.settings("ours"), nnx.Rngs(0)), "gate")


def test_normalized_queries_and_keys_bound_the_logits_whatever_the_input():
    s = fixtures.settings("ours", qk_norm=True, dtype="bfloat16")
    layer = layers.Attention(s, nnx.Rngs(0))
    layer.q_norm.scale[...] = jnp.full(8, 3.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, s.width)), jnp.bfloat16)
    for scale in (1.0, 1000.0):
        q, (k, v) = layer.queries(scale * x), layer.keys_values(scale * x)
        assert q.dtype == k.dtype == v.dtype == jnp.bfloat16 and q.shape == k.shape == (2, 5, 2, 8)
        for found, length in ((q, 3.0), (k, 1.0)):
            mean_square = (np.asarray(found, np.float32) ** 2).mean(-1)
            np.testing.assert_allclose(np.sqrt(mean_square), length, rtol=1e-2)
    assert np.abs(np.asarray(v, np.float32)).max() > 100  # values are not normalized


@pytest.mark.slow
def test_gated_and_normalized_on_a_mesh_is_what_it_is_on_one_device():
    s = fixtures.settings("gated")
    graph, state = nnx.split(layers.DecoderLayer(s, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, memory = (rng.normal(size=(8, n, s.width)).astype(np.float32) for n in (4, 7))
    lengths = np.arange(8, dtype=np.int32) % 7 + 1

    @jax.jit
    def gradients(state, x, memory, lengths):
        def total(state):
            layer = nnx.merge(graph, state)
            return jnp.sum(jnp.sin(layer(x, layer.memory_attention.keys_values(memory), lengths, None)))

        return jax.value_and_grad(total)(state)

    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(sharding.MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])
        params = jax.tree.map(jax.device_put, nnx.to_pure_dict(state), sharding.shardings(state, mesh))
        nnx.replace_by_pure_dict(state, params)
        found.append(gradients(state, *jax.device_put((x, memory, lengths), sharding.batch_sharding(mesh))))
    for kernel, split in (("gate", (8, 12)), ("up", (8, 12)), ("down", (12, 8))):  # 16 x 24, over fsdp and tensor
        assert params["feed_forward"][kernel]["kernel"].addressable_shards[0].data.shape == split
    for one, eight in zip(*(jax.tree.leaves(part) for part in found), strict=True):
        assert np.any(one)
        np.testing.assert_allclose(eight, one, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layer_norm_has_the_values_and_gradients_of_flax(dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(1.0, 2.0, size=(3, 5, 16)), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=16), jnp.float32) for _ in range(2))

    def results(kind):
        norm = kind(16, epsilon=1e-5, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = scale, bias
        graph, state = nnx.split(norm)

        def total(state, x):
            y = nnx.merge(graph, state)(x)
            return jnp.sum(y.astype(x.dtype).astype(jnp.float32) * weight.astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x)
        assert gradients[1].dtype == x.dtype
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((y.astype(x.dtype), gradients))]

    assert layers.LayerNorm(16, rngs=nnx.Rngs(0))(x).dtype == x.dtype
    close = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=2**-7, atol=2**-7)
    for found, expected in zip(results(layers.LayerNorm), results(nnx.LayerNorm), strict=True):
        np.testing.assert_allclose(found, expected, **close)
