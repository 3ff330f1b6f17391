"""Dropout: its rate, its independence, and the same masks on each mesh and for each generator of JAX."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from geotoken_jax import randomness, sharding
from geotoken_jax.predict import sample
from geotoken_jax.train.step import Trainer
from tests import fixtures

ROWS, COLUMNS = 1 << 14, 128


def dropped(rate: float, seed: int = 1, site: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Returns which numbers of [rows, columns] are dropped."""
    words = randomness.words(randomness.key(seed), rows)
    return np.asarray(randomness.dropout(jnp.ones((rows, columns)), rate, words, site)) == 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_exact_in_all_columns_and_rows(rate):
    found = dropped(rate)
    variance = rate * (1 - rate)
    assert abs(found.mean() - rate) < 4 * np.sqrt(variance / found.size)
    for axis, n in ((0, ROWS), (1, COLUMNS)):
        # The sum of squared deviations has a chi-square distribution: mean m, variance 2 m for m sums.
        m = found.shape[1 - axis]
        chi_square = ((found.sum(axis) - n * rate) ** 2).sum() / (n * variance)
        assert abs(chi_square - m) < 5 * np.sqrt(2 * m)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_no_two_columns_are_correlated(rate):
    found = (dropped(rate) - rate) / np.sqrt(rate * (1 - rate))
    z = (found.T @ found)[np.triu_indices(COLUMNS, 1)] / np.sqrt(ROWS)  # standard normal if independent
    assert abs(z).max() < 6 and z.std() == pytest.approx(1, abs=0.04)


def test_patterns_of_neighbors_in_both_axes_are_as_frequent_as_independent_ones():
    found, rate = dropped(0.3), 0.3
    pattern = found[:-1:2, :-1:2] * 8 + found[:-1:2, 1::2] * 4 + found[1::2, :-1:2] * 2 + found[1::2, 1::2]
    counts = np.bincount(pattern.ravel(), minlength=16)
    ones = np.array([bin(i).count("1") for i in range(16)])
    expected = pattern.size * rate**ones * (1 - rate) ** (4 - ones)
    assert ((counts - expected) ** 2 / expected).sum() < 44  # exceeded by chance once in 10,000 seeds


@pytest.mark.parametrize("other", [dict(site=1), dict(site=254), dict(seed=2)], ids=str)
def test_masks_of_other_sites_and_keys_are_independent(other):
    a, b = dropped(0.1), dropped(0.1, **other)
    for shift in (0, 1):
        z = ((a - 0.1) * (np.roll(b, shift, 1) - 0.1)).sum() / (0.09 * np.sqrt(a.size))
        assert abs(z) < 4.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backward_pass_drops_the_same_numbers_and_the_scale_is_that_of_the_rate(dtype):
    x = jnp.full((50, 40), 3.0, dtype)
    words = randomness.words(randomness.key(0), 50)
    y, back = jax.vjp(lambda x: randomness.dropout(x, 0.1, words), x)
    (gradient,) = back(jnp.full_like(x, 3.0))
    np.testing.assert_array_equal(y, gradient)
    np.testing.assert_allclose(np.unique(np.asarray(y, np.float32)), [0, float(jnp.asarray(3 / 0.9, dtype))], rtol=1e-6)


def test_axes_without_words_of_their_own_have_masks_of_their_own():
    words: Any = randomness.words(randomness.key(0), 6, 50)
    x = jnp.ones((6, 4, 50, 30))
    heads = np.asarray(randomness.dropout(x, 0.5, words[:, None]) == 0)
    for h in range(1, 4):
        assert np.mean(heads[:, 0] == heads[:, h]) == pytest.approx(0.5, abs=0.03)


def test_nothing_is_dropped_without_words_or_rate():
    x, words = jnp.ones((2, 3)), randomness.words(randomness.key(0), 2)
    assert randomness.dropout(x, 0.5, None) is x and randomness.dropout(x, 0.0, words) is x
    assert randomness.words(None, 2) is None and randomness.split(None, 2) == [None, None]


def training(mesh_shape: tuple[int, int, int], steps: int = 4) -> tuple[list[float], str | None]:
    """Returns the losses of a training with dropout, the last of them in evaluation, and the compiled step."""
    model = fixtures.settings("ours", dropout=0.3, neighbor_dropout=0.3, decoder_layers=1)
    mesh = sharding.make_mesh(sharding.MeshSettings(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    trainer = Trainer(fixtures.task(model), optax.sgd(0.05), mesh)
    batch = jax.device_put(fixtures.batch(BATCH), trainer.batch_sharding)
    key = randomness.key(0)
    state, losses = trainer.init(key), []
    compiled = trainer.step.lower(state, batch, key, 0.05, {}).compile()
    for _ in range(steps):
        state, found = compiled(state, batch, key, 0.05, {})
        losses.append(float(found["loss"]))
    sums, n = trainer.evaluate(state, {**batch, "valid": np.ones(BATCH, bool)}, {})
    return [*losses, float(sums["loss"] / n)], compiled.as_text()


BATCH = 56  # a number that no other axis of the tiny model has


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    losses, _ = training((1, 1, 1))
    assert len(set(losses)) == len(losses)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 4, 2)], ids=str)
def test_losses_with_dropout_are_the_same_on_eight_devices_and_each_draws_its_own_rows(one_device, shape):
    losses, program = training(shape)
    assert program
    np.testing.assert_allclose(losses, one_device, rtol=2e-5)
    shapes = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b(?:u32|pred)\[([\d,]+)\]", program)}
    assert [s for s in shapes if BATCH // np.prod(shape[:2]) in s] and not [s for s in shapes if BATCH in s]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1)], ids=str)
def test_a_mask_is_the_same_on_eight_devices(shape):
    mesh = sharding.make_mesh(sharding.MeshSettings(*shape))
    x = np.ones((16, 6, 32), np.float32)

    def run(x, key):
        words = randomness.words(key, *x.shape[:-1])
        return randomness.dropout(x, 0.3, words)

    expected = run(x, randomness.key(3))
    placed = jax.device_put(x, NamedSharding(mesh, sharding.spec("batch", None, "mlp")))
    found = jax.jit(run)(placed, randomness.key(3))
    assert found.sharding.is_equivalent_to(placed.sharding, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_the_default_generator_does_not_change_training_validation_or_samples(one_device, generator):
    model, batch = fixtures.model("ours"), fixtures.batch()
    query = jnp.asarray(batch["query"])

    def candidates():
        keys = jax.vmap(lambda n: jax.random.fold_in(randomness.key(0), n))(jnp.arange(4))
        memory = model.encode(query, fixtures.neighbors(batch))
        return [sample.greedy(model, memory).tokens, sample.sample(model, memory, keys, 5, 1.0).tokens]

    expected = candidates()
    with jax.default_prng_impl(generator):
        assert jax.random.key_data(jax.random.key(0)).shape == (4,)
        np.testing.assert_allclose(training((1, 1, 1))[0], one_device, rtol=1e-6)
        for found, tokens in zip(candidates(), expected, strict=True):
            np.testing.assert_array_equal(found, tokens)
        # A caller's own keys may be of the default generator.
        words = randomness.words(jax.random.key(0), 2000)
        assert np.mean(randomness.dropout(jnp.ones((2000, 20)), 0.1, words) == 0) == pytest.approx(0.1, abs=0.01)
        model = fixtures.model("ours", dropout=0.3)
        assert not np.isnan(fixtures.forward(model, batch, jax.random.key(1))).any()
