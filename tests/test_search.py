"""Exact search against enumeration, on trees that are small enough for it."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict import sample
from geotoken_jax.predict.search import SearchResult, distribution, search
from tests import fixtures

PHOTOS = 3
#: The level-3 tree has 127 inner nodes in groups of 1. The first 8 slots contain the root, the next 8 the six faces.
WHOLE = dict(expansions=160, capacity=400)
SHORT = dict(expansions=48, capacity=400)


@functools.cache
def model(form, group):
    return fixtures.model(form, level=3, group=group)


@functools.cache
def batch(group):
    return fixtures.batch(PHOTOS, CellScheme(3, group))


@functools.cache
def leaves(group):
    """Returns the tokens of all 6 * 4^3 cells, [384, T]."""
    return np.array(list(itertools.product(*map(range, CellScheme(3, group).vocab_sizes))))


@functools.cache
def everything(form, group, temperature=1.0):
    """Returns the log-probability [B, 384, T] of each token of all cells."""
    every, found = leaves(group), []
    for photo in range(PHOTOS):
        repeated = {name: np.repeat(value[photo : photo + 1], 384, 0) for name, value in batch(group).items()}
        log_p = jax.nn.log_softmax(fixtures.forward(model(form, group), {**repeated, "tokens": every}) / temperature)
        found.append(np.take_along_axis(np.asarray(log_p, np.float64), every[..., None], -1)[..., 0])
    return np.stack(found)


@nnx.jit(static_argnames=("count", "options"))
def run(model, batch, count, options):
    return search(model, model.encode(batch["query"], fixtures.neighbors(batch)), count, **dict(options))


def found(form, group, count, rows=slice(None), **options) -> SearchResult:
    some = {name: value[rows] for name, value in batch(group).items()}
    return jax.tree.map(np.asarray, run(model(form, group), some, count, tuple(options.items())))


def holds(cell, depth, group):
    """Returns which of all leaves [384] are in a cell."""
    return (leaves(group)[:, :depth] == cell[:depth]).all(1)


@pytest.mark.slow
@pytest.mark.parametrize("form, group", [("ours", 1), ("paper", 1), ("ours", 3), ("paper", 3)])
def test_the_whole_tree_searched_is_everything_tried(form, group):
    each = everything(form, group).sum(-1)
    all_of_it = found(form, group, 384, **WHOLE)
    np.testing.assert_array_equal(all_of_it.proven, 384)
    for photo in range(PHOTOS):
        np.testing.assert_allclose(all_of_it.log_probability[photo, :384], np.sort(each[photo])[::-1], atol=1e-4)
        order = [int(np.flatnonzero(holds(cell, 9, group))[0]) for cell in all_of_it.tokens[photo, :384]]
        assert sorted(order) == list(range(384))
        np.testing.assert_allclose(each[photo, order], all_of_it.log_probability[photo, :384], atol=1e-4)
    assert np.isneginf(all_of_it.log_probability[:, 384:]).all() and (all_of_it.depth[:, 384:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [SHORT, dict(expansions=40, capacity=400), dict(expansions=48, capacity=20)])
def test_what_is_called_proven_is_so_and_nothing_else_is_left_out(options):
    some, each = found("ours", 1, 16, **options), everything("ours", 1).sum(-1)
    for photo, n in enumerate(some.proven):
        log_p, depth = some.log_probability[photo], some.depth[photo]
        np.testing.assert_allclose(log_p[:n], np.sort(each[photo])[::-1][:n], atol=1e-4)
        assert (depth[:n] == 4).all()
        for cell, value in zip(some.tokens[photo, :n], log_p, strict=False):
            assert np.isclose(each[photo][holds(cell, 4, 1)], value, atol=1e-4).all()
        # The next slot is an open node, which may still contain a more probable leaf, or there is none.
        assert n == len(log_p) or depth[n] < 4
    assert (some.proven >= 16).all() if options["expansions"] == 48 else (some.proven < 16).any()
    assert (some.proven > 0).any()


@pytest.mark.parametrize("form", ["ours", "paper"])
def test_what_remains_is_a_partition_with_the_probabilities_of_its_leaves(form):
    some, each = found(form, 1, 16, **SHORT), np.exp(everything(form, 1).sum(-1))
    np.testing.assert_allclose(np.exp(some.log_probability).sum(1), 1, atol=1e-5)
    for photo in range(PHOTOS):
        n = np.isfinite(some.log_probability[photo]).sum()
        assert (np.diff(some.log_probability[photo, :n]) <= 0).all() and np.isfinite(
            some.log_probability[photo, :n]
        ).all()
        assert (some.depth[photo, :n] < 4).any() and (some.depth[photo, :n] > 0).all()
        times = np.zeros(384, int)
        for cell, depth, log_p in zip(*(part[photo, :n] for part in some[:3]), strict=True):
            inside = holds(cell, depth, 1)
            times += inside
            np.testing.assert_allclose(each[photo][inside].sum(), np.exp(log_p), rtol=1e-3)
            assert (cell[depth:] == 0).all()
        np.testing.assert_array_equal(times, 1)


def test_leaves_of_a_length_and_of_a_temperature():
    tokens = everything("ours", 1, 0.7)[..., :3]
    each = tokens.sum(-1)[:, ::4]  # four leaves of one cell differ in the last token only
    some = found("ours", 1, 96, length=3, temperature=0.7, **WHOLE)
    np.testing.assert_array_equal(some.proven, 96)
    assert (some.depth[:, :96] == 3).all() and (some.tokens[..., 3] == 0).all()
    np.testing.assert_allclose(some.log_probability[:, :96], np.sort(each)[:, ::-1], atol=1e-4)


@pytest.mark.slow
def test_the_best_is_no_less_probable_than_greedy_or_ten_thousand_samples():
    decoder, photos = fixtures.model("ours"), fixtures.batch(2)

    @nnx.jit
    def both(model, batch):
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        drawn = sample.sample(model, memory, jax.random.split(jax.random.key(0), 2), 10_000, 0.7)
        return search(model, memory, 1, expansions=256), drawn.log_probability

    best, others = both(decoder, photos)
    assert (best.proven >= 1).all()
    assert (best.log_probability[:, 0] >= others.max(1) - 1e-5).all()
    assert (best.log_probability[:, 0] <= others.max(1) + 2).all()


def test_a_photo_is_searched_as_if_it_were_alone():
    together = found("ours", 1, 16, **SHORT)
    assert len({*together.proven}) > 1, "all are done at once: none waits for another"
    for photo in range(PHOTOS):
        alone = found("ours", 1, 16, [photo, photo], **SHORT)
        np.testing.assert_allclose(alone.log_probability[0], together.log_probability[photo], atol=1e-5)
        for one, other in zip(alone, together, strict=True):
            assert one.dtype == np.float32 or (one[0] == other[photo]).all()


def test_places_are_centers_of_cells():
    scheme = CellScheme(6, 2)
    tokens = np.zeros((3, 70, 4), np.int32)
    depth, log_p = np.zeros((3, 70), np.int32), np.full((3, 70), -np.inf, np.float32)
    tokens[0, :3] = [[2, 5, 9, 1], [4, 7, 0, 0], [3, 0, 0, 0]]
    depth[0, :3], log_p[0, :3] = [4, 2, 1], np.log([0.5, 0.25, 0.125])
    log_p[1, 0] = 0.0  # no information: the whole Earth
    tokens[2, :, 0], tokens[2, :, 1], tokens[2, :, 2] = 1, np.arange(70) // 16, np.arange(70) % 16
    depth[2], log_p[2] = 3, np.log(1 / 70)
    places = distribution(SearchResult(tokens, depth, log_p, np.zeros(3, np.int32)), scheme)
    assert places.coordinates.shape == (3, 64 + 64, 2) and places.coordinates.dtype == np.float64
    np.testing.assert_array_equal(places.level[0, :4], [6, 2, 0, 0])
    np.testing.assert_array_equal(places.level[1, :2], [-1, 0])
    np.testing.assert_allclose(places.probability.sum(1), [0.875, 1, 1], atol=1e-6)
    np.testing.assert_allclose(places.probability[0, :4], [0.5, 0.25, 0.125, 0], atol=1e-7)
    np.testing.assert_allclose(places.coordinates[0, 0], np.stack(scheme.decode(tokens[0, 0]), -1))
    np.testing.assert_allclose(places.coordinates[0, 1], np.stack(CellScheme(2, 2).decode(tokens[0, 1, :2]), -1))
    # The last six of 70 cells are reported as one cell of level 2 that contains them.
    assert places.level[2, 64] == 2 and np.isclose(places.probability[2, 64], 6 / 70)
    np.testing.assert_allclose(places.coordinates[2, 64], np.stack(CellScheme(2, 2).decode(np.array([1, 4])), -1))
    for face in range(6):
        one = SearchResult(np.full((1, 1, 4), face), np.ones((1, 1), int), np.zeros((1, 1)), np.zeros(1))
        center = distribution(one, scheme).coordinates[0, 0]
        assert CellScheme(1, 1).encode(*center)[0] == face or abs(center[0]) == 90
        # The four cells of level 20 around a face's center are all on that face.
        around = CellScheme().encode(
            np.clip(center[0] + [1e-3, -1e-3], -90, 90), center[1] + 1e-3 - 360 * (center[1] == 180)
        )
        assert (around[:, 0] == face).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(expansions=12), "expansions is 12"),
        (dict(expansions=0), "expansions is 0"),
        (dict(capacity=8, count=9), "config.predict.search.leaves is 9: set it to at most 8"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        found("ours", 1, options.pop("count", 1), **options)
