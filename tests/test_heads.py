"""The alignment model: its form, dropout by argument, and that a few steps align."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.align.task import AlignTask


def settings(dropout=0.0):
    return AlignSettings(hidden=32, dropout=dropout, location=LocationSettings("mercator", (1, 16), 8, 16, 12))


def batch(n=32):
    image, text, coordinates = jax.random.split(jax.random.key(1), 3)
    return {
        "image": jax.random.normal(image, (n, 24)),
        "text": jax.random.normal(text, (n, 24)),
        "coordinates": jax.random.uniform(coordinates, (n, 2), minval=-80, maxval=80),
    }


def test_embeds_in_the_order_image_location_text():
    model = AlignModel(settings(), 24, rngs=nnx.Rngs(0))
    image = batch()["image"]
    embeddings = nnx.jit(AlignModel.embed)(model, image)
    assert embeddings.shape == (32, 3, 24)
    np.testing.assert_array_equal(embeddings[:, 0], image)
    np.testing.assert_allclose(embeddings[:, 1], model.image_to_location(image), atol=1e-6)
    np.testing.assert_allclose(embeddings[:, 2], model.image_to_text(image), atol=1e-6)
    assert float(model.text_scale[...]) == float(model.location_scale[...]) == pytest.approx(3.99)


def test_dropout_acts_only_where_randomness_is_given():
    task = AlignTask(settings(0.5), 24)
    model = task.init(nnx.Rngs(0))

    @nnx.jit
    def loss(model, key=None):
        return task.loss(model, batch(), key)[0]

    losses = [float(loss(model, *key)) for key in ((), (), *((jax.random.key(seed),) for seed in (1, 1, 2)))]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len(set(losses)) == 3


def test_training_aligns_and_leaves_frequencies_alone():
    task, data = AlignTask(settings(), 24), batch()
    graph, parameters, rest = nnx.split(task.init(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(parameters, state):
        def loss(parameters):
            return task.loss(nnx.merge(graph, parameters, rest), data, None)

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, metrics

    state = optimizer.init(parameters)
    for _ in range(150):
        parameters, state, metrics = step(parameters, state)
    assert {name: float(value) for name, value in metrics.items() if "accuracy" in name} == {
        "text_accuracy": 1.0,
        "location_accuracy": 1.0,
    }
    assert metrics["text_loss"] < 0.1 and metrics["location_loss"] < 0.3


def test_photos_without_text_train_no_text_head():
    task, data = AlignTask(settings(), 24), batch()
    data["text"] = jnp.zeros_like(data["text"])
    model = task.init(nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda model: task.loss(model, data, None)[0]))(model)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((gradient["text"], gradient["image_to_text"])))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.any(gradient["image_to_location"]["hidden"]["kernel"][...])


def test_rows_that_fill_a_batch_up_change_nothing():
    task, data = AlignTask(settings(), 24), batch()
    model = task.init(nnx.Rngs(0))
    filled = {name: jnp.concatenate([rows, jnp.zeros((8, *rows.shape[1:]))]) for name, rows in data.items()}
    filled["valid"] = jnp.arange(40) < 32
    loss = nnx.jit(lambda model, batch: task.loss(model, batch, None))
    for one, other in zip(jax.tree.leaves(loss(model, data)), jax.tree.leaves(loss(model, filled)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
