"""Decoding: greedy, sampled and beam candidates against the teacher-forced model, and a photo's prediction as JSON."""

import dataclasses
import itertools
import json
from datetime import datetime, timedelta, timezone

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import sharding
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict import beam, decode, sample
from geotoken_jax.predict.answer import pool_predictions
from geotoken_jax.predict.decode import Decoder, PredictSettings, SearchSettings
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.prediction import Cell
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.predict.select import VoteSettings
from tests import fixtures

SETTINGS = PredictSettings(
    samples=5, temperature=0.7, top_p=1.0, beam=0, search=SearchSettings(64, 6, 8, 8),
    selectors=("greedy", "log_probability"), vote=VoteSettings(0.05, 25.0), choice="log_probability", batch_size=4,
    seed=0,
)  # fmt: skip


ONE_DEVICE = sharding.MeshSettings(1, 1, 1)


class Gallery:
    """Coordinates of neighbors, by row."""

    def coordinates(self, rows):
        return np.stack([rows, 2 * rows], -1).astype(np.float64)


def decoded(decoder, batch, numbers):
    """Returns the pool of a batch whose neighbors are the gallery's rows 0 to M - 1."""
    rows = np.arange(fixtures.M) * np.ones((len(numbers), 1), int)
    return decoder(batch, rows, np.zeros(rows.shape), numbers)


@pytest.fixture(scope="module")
def model():
    return fixtures.model("ours")


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, SETTINGS, Gallery())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def candidates(decoder):
    return decoded(decoder, fixtures.batch(), np.arange(4)).candidates


def teacher_forced(model, tokens, temperature=1.0):
    """Returns log-probabilities [B, T, V] of one candidate per photo."""
    log_p = fixtures.forward(model, {**fixtures.batch(), "tokens": tokens})
    return np.asarray(jax.nn.log_softmax(log_p / temperature))


@pytest.mark.slow
def test_greedy_takes_the_most_probable_token_at_each_position(model, candidates):
    tokens = candidates.tokens[:, 0]
    np.testing.assert_array_equal(teacher_forced(model, tokens).argmax(-1), tokens)
    decode = nnx.jit(lambda m, b: sample.greedy(m, m.encode(b["query"], fixtures.neighbors(b))))
    alone = decode(model, fixtures.batch())
    assert alone.tokens.shape == (4, 1, 4)
    np.testing.assert_array_equal(alone.tokens[:, 0], tokens)
    np.testing.assert_allclose(alone.log_probability[:, 0], candidates.log_probability[:, 0], atol=1e-5)


@pytest.mark.slow
def test_candidates_are_drawn_with_the_times_of_their_photos():
    timed = fixtures.model("ours", context="season")
    decoder = Decoder(timed, SETTINGS, Gallery())  # type: ignore[arg-type]
    batch = {**fixtures.batch(3), "context": np.array([[1, 0, 1], [0, 0, 0], [1, 0, -1]], np.float32)}
    found = decoded(decoder, batch, np.arange(3))
    np.testing.assert_array_equal(found.context, batch["context"])
    expected = fixtures.forward(timed, {**batch, "tokens": found.candidates.tokens[:, 0]})
    log_p = np.take_along_axis(np.asarray(expected), found.candidates.tokens[:, 0, :, None], -1).sum((1, 2))
    np.testing.assert_allclose(found.candidates.log_probability[:, 0], log_p, atol=1e-4)


class Clock(Predictor):
    """Returns the times that it gets as predictions."""

    batch_size, reads_time = 2, True

    def prepare(self, photo):
        return photo

    def predict_prepared(self, photos, captured=None):
        assert captured is not None
        return list(zip(photos, captured.tolist(), strict=True))


def test_a_model_is_told_times_or_none_and_says_what_it_cannot_read():
    zone = timezone(timedelta(hours=2))
    times = [datetime(2001, 9, 9, 1, 46, 40), None, datetime(2001, 9, 9, 3, 46, 41, tzinfo=zone)]
    answers = Clock().predict(["a", "b", "c"], times)
    assert answers[::2] == [("a", 1e9), ("c", 1e9 + 1)] and np.isnan(answers[1][1])
    assert Clock().predict("a", times[0]) == ("a", 1e9) and np.isnan(Clock().predict("a")[1])
    with pytest.raises(ValueError, match="captured has 1 times for 2 photos"):
        Clock().predict(["a", "b"], times[:1])
    timeless = Clock()
    timeless.reads_time = False
    assert np.isnan(timeless.predict(["a"])[0][1])
    with pytest.raises(ValueError, match="does not read when a photo was taken: leave it out"):
        timeless.predict("a", times[0])


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_model(model, candidates):
    assert candidates.tokens.shape == (4, 6, 4) and candidates.tokens.dtype == np.int32
    assert (candidates.tokens[..., 0] < 6).all()
    for k in range(6):
        tokens = candidates.tokens[:, k]
        for temperature, found in ((1.0, candidates.log_probability), (0.7, candidates.tempered_log_probability)):
            log_p = teacher_forced(model, tokens, temperature)
            expected = np.take_along_axis(log_p, tokens[..., None], -1).sum((1, 2))
            np.testing.assert_allclose(found[:, k], expected, atol=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_each_token_is_the_one_that_noise_picks_from_the_model(model, top_p):
    photos, samples, temperature = 32, 30, 0.7
    batch, keys = fixtures.batch(photos), jax.random.split(jax.random.key(3), photos)

    @nnx.jit
    def draw(model, batch):
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        return sample.sample(model, memory, keys, samples, temperature, top_p).tokens

    drawn = np.asarray(draw(model, batch))
    noise = np.stack([sample.noise(keys, jnp.int32(t), samples, 16) for t in range(4)], 2)
    assert len(np.unique(drawn[:, :, 0])) == 6, "not all prefixes occur"
    for k in range(1 + samples):
        log_p = jax.nn.log_softmax(fixtures.forward(model, {**batch, "tokens": drawn[:, k]}) / temperature)
        log_p = sample.nucleus(log_p, top_p) if top_p < 1 else log_p
        np.testing.assert_array_equal((log_p + noise[:, k]).argmax(-1), drawn[:, k])


@pytest.mark.parametrize(("samples", "rows"), [(0, [1]), (5, [1, 6]), (30, [7, 31]), (200, [103, 201]), (2000, [1639])])
def test_candidates_with_the_same_prefix_are_decoded_once(model, monkeypatch, samples, rows):
    real, calls = type(model).step, []

    def step(self, cache, memory, t, previous, slot):
        calls.append(previous.shape[1])
        return real(self, cache, memory, t, previous, slot)

    monkeypatch.setattr(type(model), "step", step)

    def draw(batch, keys):
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        return sample.sample(model, memory, keys, samples, 1.0)

    drawn = jax.eval_shape(draw, fixtures.batch(2), jax.random.split(jax.random.key(0), 2))
    assert drawn.tokens.shape == (2, 1 + samples, 4)
    assert list(dict.fromkeys(calls)) == rows


@pytest.mark.slow
@pytest.mark.parametrize("photos", [1, 4, 11])
def test_all_local_devices_decode_a_share_of_any_batch(model, decoder, monkeypatch, photos):
    batch, numbers = fixtures.batch(photos), np.arange(photos)
    results, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda *arrays: results.append(run(*arrays)) or results[-1])
    found = decoded(decoder, batch, numbers)
    for result in jax.tree.leaves(results):
        shards = [shard.data.shape[0] for shard in result.addressable_shards]
        assert len(shards) == jax.local_device_count() == 8 and sum(shards) == len(result) >= photos
    monkeypatch.setattr(sharding, "local_mesh", lambda: sharding.make_mesh(ONE_DEVICE, jax.local_devices()[:1]))
    alone = decoded(Decoder(model, SETTINGS, Gallery()), batch, numbers)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.candidates.tokens, alone.candidates.tokens)
    np.testing.assert_allclose(found.candidates.log_probability, alone.candidates.log_probability, atol=1e-5)
    np.testing.assert_allclose(found.distribution.probability, alone.distribution.probability, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_log_probability_is_that_of_what_was_drawn_from(model, top_p):
    count, temperature = 200, 1.5

    @nnx.jit
    def draw(model, batch):
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        return sample.sample(model, memory, jax.random.split(jax.random.key(0), 4), count, temperature, top_p)

    drawn = jax.tree.map(np.asarray, draw(model, fixtures.batch()))
    outside = 0
    for k in range(0, 1 + count, 40):
        tokens = drawn.tokens[:, k]
        untempered, p = teacher_forced(model, tokens), np.exp(teacher_forced(model, tokens, temperature))
        falling = -np.sort(-p)
        held = np.cumsum(falling, -1)
        fewest = 1 + (held < top_p - 1e-6).sum(-1)  # the smallest number of tokens with a total probability of top_p
        last = np.take_along_axis(falling, np.minimum(fewest, p.shape[-1])[..., None] - 1, -1)
        kept = np.where(p >= last, p, 0)
        outside += (p[kept == 0] > 0).sum()
        with np.errstate(divide="ignore"):
            expected = np.log(kept / kept.sum(-1, keepdims=True))
        for log_p, found in ((untempered, drawn.log_probability), (expected, drawn.tempered_log_probability)):
            own = np.take_along_axis(log_p, tokens[..., None], -1).sum((1, 2))
            np.testing.assert_allclose(found[:, k], own, atol=1e-4)
    assert (outside > 0) == (top_p < 1)


def test_the_nucleus_is_the_fewest_values_that_hold_top_p():
    log_p = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.4, 0.1, 0.4, 0.1], [0.97, 0.01, 0.01, 0.01]]))
    found = np.exp(sample.nucleus(log_p, 0.7))
    np.testing.assert_allclose(found, [[0, 2 / 3, 0, 1 / 3], [0.5, 0, 0.5, 0], [1, 0, 0, 0]], atol=1e-6)


def test_a_photos_samples_do_not_depend_on_its_batch(decoder, candidates):
    batch, order = fixtures.batch(), np.array([3, 1, 0])
    pool = decoded(decoder, {name: value[order] for name, value in batch.items()}, order)
    some = pool.candidates
    np.testing.assert_array_equal(some.tokens, candidates.tokens[order])
    np.testing.assert_allclose(some.log_probability, candidates.log_probability[order], atol=1e-5)
    other_numbers = decoded(decoder, batch, np.arange(4) + 100).candidates
    np.testing.assert_array_equal(other_numbers.tokens[:, 0], candidates.tokens[:, 0])
    assert (other_numbers.tokens[:, 1:] != candidates.tokens[:, 1:]).any()


@pytest.mark.slow
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


def test_a_pool_says_where_everything_is(model, decoder):
    pool = decoded(decoder, fixtures.batch(), np.arange(4))
    np.testing.assert_allclose(np.stack(decoder.cells.decode(pool.candidates.tokens), -1), pool.coordinates)
    np.testing.assert_array_equal(pool.neighbor_coordinates[:, :, 1], 2 * np.arange(fixtures.M) * np.ones((4, 1)))
    # All cells together: the most probable of 24,576, and coarser cells that were not divided.
    assert (pool.distribution.probability.sum(1) > 0.999).all() and (
        pool.distribution.probability.sum(1) < 1 + 1e-5
    ).all()
    fine = pool.distribution.probability[:, : decode.CELLS]
    assert (np.diff(fine) <= 0).all() and 0.5 < fine.sum(1).min()


@pytest.mark.slow
def test_a_beam_may_make_the_candidates(model):
    made = decoded(Decoder(model, dataclasses.replace(SETTINGS, beam=3), Gallery()), fixtures.batch(), np.arange(4))
    assert made.candidates.tokens.shape == (4, 3, 4)
    assert (np.diff(made.candidates.log_probability) <= 0).all()


def made_up():
    """Two photos, four candidates each, the greedy one first; the second photo has one candidate twice."""
    cells = CellScheme(4, 2)
    tokens = np.array([[[0, 1, 2], [5, 0, 0], [3, 3, 3], [1, 15, 7]], [[2, 2, 2], [4, 1, 0], [2, 2, 2], [4, 1, 0]]])
    log_p = np.array([[-3.0, -1.0, -9.0, -2.0], [-4.0, -1.5, -4.0, -1.5]], np.float32)
    tempered = np.array([[-2.0, -0.9, -8.0, -0.5], [-3.0, -1.2, -3.0, -1.2]], np.float32)
    candidates = Candidates(tokens.astype(np.int32), log_p, tempered)
    places = PlaceDistribution(np.ones((2, 2, 2)), np.full((2, 2), 3), np.array([[0.5, 0.25], [0.75, 0.0]]))
    nothing = np.zeros((2, 0))
    coordinates = np.stack(cells.decode(candidates.tokens), -1)
    pool = Pool(candidates, coordinates, nothing, nothing, nothing, nothing, nothing, places)  # type: ignore[arg-type]
    chosen = {
        "greedy": np.zeros(2, int),
        "log_probability": tempered.argmax(1),
        "point": np.array([[1.5, 2.5], [-3.0, 170.0]]),
    }
    return pool, chosen


def test_answers_merge_and_order_candidates():
    found = pool_predictions(*made_up(), "log_probability")
    plain = [json.loads(json.dumps(answer.plain())) for answer in found]
    assert "radius_km" not in plain[0] and plain[0]["candidates"][0]["tokens"] == [0, 1, 2]
    one, two = found
    assert [c.tokens for c in one.candidates] == [(0, 1, 2), (5, 0, 0), (1, 15, 7), (3, 3, 3)]
    assert [c.tokens for c in two.candidates] == [(2, 2, 2), (4, 1, 0)]
    assert [c.count for c in one.candidates] == [1] * 4 and [c.count for c in two.candidates] == [2, 2]
    assert [c.log_probability for c in two.candidates] == [-4.0, -1.5]
    assert [c.probability for c in two.candidates] == [0.0183156, 0.22313]
    # Photo 0's most probable candidate at the temperature is [1, 15, 7], third in the list, last in the pool.
    assert one.choices == {"greedy": 0, "log_probability": 2, "point": (1.5, 2.5)}
    assert two.choices == {"greedy": 0, "log_probability": 1, "point": (-3.0, 170.0)}
    assert one.cells == (Cell(3, 1.0, 1.0, 0.5), Cell(3, 1.0, 1.0, 0.25)) and two.cells == (Cell(3, 1.0, 1.0, 0.75),)


@pytest.mark.parametrize("choice", ["greedy", "log_probability"])
def test_an_answer_lies_where_its_chosen_candidate_does(choice):
    for answer in pool_predictions(*made_up(), choice):
        chosen = answer.candidates[answer.choices[choice]]
        latitude, longitude = CellScheme(4, 2).decode(np.array(chosen.tokens))
        assert answer.choice == choice
        assert (answer.latitude, answer.longitude) == (chosen.latitude, chosen.longitude)
        assert (answer.latitude, answer.longitude) == pytest.approx((float(latitude), float(longitude)), abs=1e-6)


def test_an_answer_may_be_a_point_of_its_own():
    found = pool_predictions(*made_up(), "point")
    assert [(answer.latitude, answer.longitude) for answer in found] == [(1.5, 2.5), (-3.0, 170.0)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"choice": "median"}, "config.predict.choice is 'median'"),
        ({"selectors": ("median",)}, "config.predict.selectors has 'median'"),
        (
            {"selectors": ("log_probability", "point_25_km"), "search": SearchSettings(0, 6, 8, 8)},
            "but config.predict.search.expansions is 0",
        ),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 0.0}, "config.predict.top_p is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PredictSettings(**{**SETTINGS.__dict__, **changes})
