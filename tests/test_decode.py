"""Decoding: greedy, sampled and beam candidates against the teacher-forced model, and a photo's answer as JSON."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict import beam, sample
from geotoken_jax.predict.decode import Decoder, PredictSettings, answers
from geotoken_jax.predict.sample import Candidates
from tests import fixtures

SETTINGS = PredictSettings(samples=5, temperature=0.7, choice="log_probability", batch_size=4, seed=0)


@pytest.fixture(scope="module")
def model():
    return fixtures.model("ours")


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, SETTINGS)


@pytest.fixture(scope="module")
def candidates(decoder):
    return decoder(fixtures.batch(), np.arange(4))


def teacher_forced(model, tokens, temperature=1.0):
    """Returns log-probabilities [B, T, V] of one candidate a photo."""
    log_p = fixtures.forward(model, {**fixtures.batch(), "tokens": tokens})
    return np.asarray(jax.nn.log_softmax(log_p / temperature))


def test_greedy_takes_the_most_probable_token_at_each_position(model, candidates):
    tokens = candidates.tokens[:, 0]
    np.testing.assert_array_equal(teacher_forced(model, tokens).argmax(-1), tokens)
    decode = nnx.jit(lambda m, b: sample.greedy(m, m.encode(b["query"], fixtures.neighbors(b))))
    alone = decode(model, fixtures.batch())
    assert alone.tokens.shape == (4, 1, 4)
    np.testing.assert_array_equal(alone.tokens[:, 0], tokens)
    np.testing.assert_allclose(alone.log_probability[:, 0], candidates.log_probability[:, 0], atol=1e-5)


def test_log_probabilities_are_those_of_the_model(model, candidates):
    assert candidates.tokens.shape == (4, 6, 4) and candidates.tokens.dtype == np.int32
    assert (candidates.tokens[..., 0] < 6).all()
    for k in range(6):
        tokens = candidates.tokens[:, k]
        for temperature, found in ((1.0, candidates.log_probability), (0.7, candidates.tempered_log_probability)):
            log_p = teacher_forced(model, tokens, temperature)
            expected = np.take_along_axis(log_p, tokens[..., None], -1).sum((1, 2))
            np.testing.assert_allclose(found[:, k], expected, atol=1e-4)


def test_samples_have_the_tempered_distribution(model, candidates):
    count = 2000
    batch = {name: jnp.asarray(value[:2]) for name, value in fixtures.batch().items()}

    @nnx.jit
    def draw(model, batch):
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        return sample.sample(model, memory, jax.random.split(jax.random.key(0), 2), count, 3.0)

    first = np.asarray(draw(model, batch).tokens[:, 1:, 0])
    shares = np.stack([np.bincount(row, minlength=6) for row in first]) / count
    expected = np.exp(teacher_forced(model, fixtures.batch()["tokens"], 3.0)[:2, 0, :6])
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / count))
    assert np.abs(first[0] - first[1]).any()


def test_a_photos_samples_do_not_depend_on_its_batch(decoder, candidates):
    batch, order = fixtures.batch(), np.array([3, 1, 0])
    some = decoder({name: value[order] for name, value in batch.items()}, order)
    np.testing.assert_array_equal(some.tokens, candidates.tokens[order])
    np.testing.assert_allclose(some.log_probability, candidates.log_probability[order], atol=1e-5)
    other_numbers = decoder(batch, np.arange(4) + 100)
    np.testing.assert_array_equal(other_numbers.tokens[:, 0], candidates.tokens[:, 0])
    assert (other_numbers.tokens[:, 1:] != candidates.tokens[:, 1:]).any()


@pytest.mark.parametrize("form", ["ours", "paper"])
def test_a_beam_of_full_width_finds_what_trying_everything_finds(form):
    cells = CellScheme(2, 1)
    model = fixtures.model(form, level=2, group=1)
    batch = fixtures.batch(2, cells)
    every = np.array(list(itertools.product(range(6), range(4), range(4))))

    @nnx.jit(static_argnums=2)
    def search(model, batch, width):
        return beam.search(model, model.encode(batch["query"], fixtures.neighbors(batch)), width)

    found, narrow = search(model, batch, 96), search(model, batch, 3)
    for photo in range(2):
        repeated = {name: np.repeat(value[photo : photo + 1], 96, 0) for name, value in batch.items()}
        log_p = np.asarray(fixtures.forward(model, {**repeated, "tokens": every}))
        scores = np.take_along_axis(log_p, every[..., None], -1).sum((1, 2))
        np.testing.assert_allclose(found.log_probability[photo], np.sort(scores)[::-1], atol=1e-4)
        places = np.asarray(found.tokens[photo]) @ [16, 4, 1]
        assert sorted(places) == list(range(96))
        np.testing.assert_allclose(scores[places], found.log_probability[photo], atol=1e-4)
        assert np.isclose(scores, np.asarray(narrow.log_probability[photo])[:, None], atol=1e-4).any(1).all()


def pool():
    """Two photos, four candidates, the greedy one first; the second photo has one candidate twice."""
    cells = CellScheme(4, 2)
    tokens = np.array([[[0, 1, 2], [5, 0, 0], [3, 3, 3], [1, 15, 7]], [[2, 2, 2], [4, 1, 0], [2, 2, 2], [4, 1, 0]]])
    log_p = np.array([[-3.0, -1.0, -9.0, -2.0], [-4.0, -1.5, -4.0, -1.5]], np.float32)
    tempered = np.array([[-2.0, -0.9, -8.0, -0.5], [-3.0, -1.2, -3.0, -1.2]], np.float32)
    return Candidates(tokens.astype(np.int32), log_p, tempered), cells


def test_answers_merge_and_order_candidates():
    found = answers(*pool(), "log_probability")
    assert json.loads(json.dumps(found)) == found
    one, two = found
    assert [c["tokens"] for c in one["candidates"]] == [[0, 1, 2], [5, 0, 0], [1, 15, 7], [3, 3, 3]]
    assert [c["tokens"] for c in two["candidates"]] == [[2, 2, 2], [4, 1, 0]]
    assert [c["count"] for c in one["candidates"]] == [1] * 4 and [c["count"] for c in two["candidates"]] == [2, 2]
    assert [c["log_probability"] for c in two["candidates"]] == [-4.0, -1.5]
    # Photo 0's best under the tempered distribution is [1, 15, 7], third in the list though last in the pool.
    assert one["choices"] == {"greedy": 0, "log_probability": 2} and two["choices"] == {
        "greedy": 0,
        "log_probability": 1,
    }


@pytest.mark.parametrize("choice", ["greedy", "log_probability"])
def test_an_answer_lies_where_its_chosen_candidate_does(choice):
    candidates, cells = pool()
    for answer in answers(candidates, cells, choice):
        chosen = answer["candidates"][answer["choices"][choice]]
        latitude, longitude = cells.decode(np.array(chosen["tokens"]))
        assert answer["choice"] == choice
        assert (answer["latitude"], answer["longitude"]) == (chosen["latitude"], chosen["longitude"])
        assert (answer["latitude"], answer["longitude"]) == pytest.approx((float(latitude), float(longitude)), abs=1e-6)


@pytest.mark.parametrize(
    "changes, message", [({"choice": "median"}, "config.predict.choice is 'median'"), ({"temperature": 0.0}, "above 0")]
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PredictSettings(**{**SETTINGS.__dict__, **changes})
