"""The alignment model and its task: architecture, dropout by argument, state of the losses, and a short training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from geotoken_jax import checkpoint, sharding
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.align.loss import LossSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.train.step import Trainer


def settings(dropout=0.0, whiten=0.0):
    return AlignSettings(
        hidden=32, dropout=dropout, whiten=whiten, location=LocationSettings("mercator", (1, 16), 8, 16, 12)
    )


def make_task(dropout=0.0, start=None, whiten=0.0, **changes) -> Any:
    loss = {"kind": "info_nce", "chunk": 5, "queue": 0, "same_within_km": 0.0, **changes}
    return AlignTask(settings(dropout, whiten), 24, LossSettings(**loss), start)


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


@pytest.mark.slow
def test_whitened_features_vary_alike_in_all_directions_and_do_so_once_read_again(tmp_path):
    rng = np.random.default_rng(0)
    image = (rng.normal(size=(4000, 24)) * np.linspace(0.1, 1, 24) + 3).astype(np.float32)
    model = AlignModel(settings(whiten=1e-4), 24, rngs=nnx.Rngs(0))
    assert model.whitening
    model.whitening.fit(image, 1e-4)
    whitened = np.asarray(model.whitening(jnp.asarray(image)))
    np.testing.assert_allclose(np.linalg.norm(whitened, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(24 * np.cov(whitened, rowvar=False), np.eye(24), atol=0.15)

    def start(new):
        new.whitening.fit(image, 1e-4)

    trainer = make_trainer(whiten=1e-4, start=start)
    checkpoint.write_parameters(tmp_path / "parameters.safetensors", *trainer.exported(trainer.init(KEY)))
    read = checkpoint.read_module(tmp_path / "parameters.safetensors", AlignTask(settings(whiten=1e-4), 24).init)
    assert read.whitening
    np.testing.assert_array_equal(read.whitening.matrix[...], model.whitening.matrix[...])
    assert read.image_to_text.whitening is read.image_to_location.whitening is read.whitening


def test_dropout_acts_only_where_randomness_is_given():
    task = make_task(0.5)
    model = task.init(nnx.Rngs(0))

    @nnx.jit
    def loss(model, key=None):
        return task.loss(model, batch(), key)[0]

    losses = [float(loss(model, *key)) for key in ((), (), *((jax.random.key(seed),) for seed in (1, 1, 2)))]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_training_aligns_and_leaves_frequencies_alone(kind):
    task, data = make_task(kind=kind), batch()
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


def test_the_sigmoid_loss_begins_as_siglip():
    model = make_task(kind="sigmoid").init(nnx.Rngs(0))
    for name in ("text", "location"):
        scale, bias = (float(getattr(model, f"{name}_{part}")[...]) for part in ("scale", "bias"))
        assert (np.exp(scale), bias) == (pytest.approx(10), -10)


def test_photos_of_near_places_are_no_negatives():
    data = batch(8)
    data["coordinates"] = data["coordinates"].at[1].set(data["coordinates"][0] + jnp.array([0.1, 0]))  # 11 km
    model = make_task().init(nnx.Rngs(0))

    @nnx.jit
    def losses(model):
        return [make_task(same_within_km=km).loss(model, data, None)[1]["location_loss"] for km in (0.0, 10.0, 12.0)]

    none, ten, twelve = map(float, losses(model))
    assert none == ten > twelve


def make_trainer(accumulate=1, **changes):
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 2, 1), jax.devices()[:2])
    return Trainer(make_task(0.1, **changes), optax.adam(1e-2), mesh, accumulate)


@pytest.mark.slow
def test_a_start_is_what_training_begins_from():
    def start(model):
        model.location.output.bias[...] = jnp.arange(24.0)

    params = make_trainer(start=start).init(jax.random.key(0))["params"]
    np.testing.assert_array_equal(params["location"]["output"]["bias"], np.arange(24.0))


@pytest.mark.slow
def test_what_the_losses_alone_need_is_not_kept(tmp_path):
    trainer = make_trainer(kind="sigmoid", queue=8)
    state = trainer.init(jax.random.key(0))
    assert {"text_bias", "location_bias"} < state["params"].keys() and "queue" in state["constants"]
    checkpoint.write_parameters(tmp_path / "parameters.safetensors", *trainer.exported(state))
    model = checkpoint.read_module(tmp_path / "parameters.safetensors", AlignTask(settings(), 24).init)
    np.testing.assert_array_equal(model.text_scale[...], state["params"]["text_scale"])
    np.testing.assert_array_equal(
        model.location.capsules[1].frequencies[...], state["constants"]["location"]["capsules"][1]["frequencies"]
    )


KEY, RATE = jax.random.key(0), 0.01


def photos(rows):
    """A batch of photos with different latitudes, a tenth of a degree per row."""
    image, text = np.random.default_rng(0).normal(size=(2, 40, 24)).astype(np.float32)[:, rows]
    return {"image": image, "text": text, "coordinates": np.stack([rows / 10, rows * 0], 1).astype(np.float32)}


@pytest.fixture(scope="module")
def queued():
    return make_trainer(queue=12)


def run(trainer, state, steps):
    for step in steps:
        state, metrics = trainer.step(state, photos(np.arange(8 * step, 8 * step + 8)), KEY, RATE, {})
    return state, metrics


@pytest.mark.slow
def test_a_queue_holds_the_last_photos_and_is_resumed_bit_for_bit(tmp_path, queued):
    state, _ = run(queued, queued.init(KEY), (0, 1))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {}, None)
    whole, _ = run(queued, state, (2, 3))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        resumed, _ = run(queued, checkpoints.restore(2, queued.abstract)[0], (2, 3))
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(whole["constants"]["queue"][:, 0], np.r_[24:32, 16:20] / 10)


@pytest.mark.slow
def test_photos_of_the_past_are_negatives(queued):
    state, _ = run(queued, queued.init(KEY), (0,))
    empty = jax.tree.map(jnp.copy, state)  # a copy, because a step reuses the memory of its state
    empty["constants"]["queue"] *= jnp.nan
    (_, alone), (_, beside) = run(queued, empty, (1,)), run(queued, state, (1,))
    assert float(beside["location_loss"]) > float(alone["location_loss"]) + 0.01
    assert float(beside["text_loss"]) == float(alone["text_loss"])


def test_a_step_left_out_does_not_enter_the_queue(queued):
    batch = {**photos(np.arange(8)), "image": np.full((8, 24), np.nan, np.float32)}
    state, _ = queued.step(queued.init(KEY), batch, KEY, RATE, {})
    assert state["skipped"] == 1 and not np.isfinite(state["constants"]["queue"]).any()


@pytest.mark.slow
def test_parts_of_a_batch_enter_the_queue_one_after_another():
    trainer = make_trainer(accumulate=2, queue=8)
    state, _ = run(trainer, trainer.init(KEY), (0,))
    np.testing.assert_allclose(state["constants"]["queue"][:, 0], np.array([1, 3, 5, 7, 0, 2, 4, 6]) / 10)


def test_photos_without_text_train_no_text_head():
    task, data = make_task(), batch()
    data["text"] = jnp.zeros_like(data["text"])
    model = task.init(nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda model: task.loss(model, data, None)[0]))(model)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((gradient["text"], gradient["image_to_text"])))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.any(gradient["image_to_location"]["hidden"]["kernel"][...])


def test_rows_that_fill_a_batch_up_change_nothing():
    task, data = make_task(), batch()
    model = task.init(nnx.Rngs(0))
    filled = {name: jnp.concatenate([rows, jnp.zeros((8, *rows.shape[1:]))]) for name, rows in data.items()}
    filled["valid"] = jnp.arange(40) < 32
    loss = nnx.jit(lambda model, batch: task.loss(model, batch, None))
    for one, other in zip(jax.tree.leaves(loss(model, data)), jax.tree.leaves(loss(model, filled)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
