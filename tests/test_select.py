"""Selectors: which candidate or point each chooses from a pool made by hand."""

import numpy as np
import pytest

from geotoken_jax.geo.distance import EARTH_RADIUS_KM, geoscore, great_circle_km, pairwise_km
from geotoken_jax.predict import select
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.predict.select import SELECTORS, Goal, SelectorInputs, VoteSettings
from tests import fixtures

PARTS = SelectorInputs(VoteSettings(0.05, 25.0), lambda: None, lambda name: None)  # type: ignore[arg-type]


def places(*photos, level=20):
    """Returns the distribution of photos given as lists of (latitude, longitude, probability); cells are points."""
    table = np.zeros((len(photos), max(map(len, photos)), 3))
    for row, listed in zip(table, photos, strict=True):
        row[: len(listed)] = listed
    return PlaceDistribution(table[..., :2], np.full(table.shape[:2], level), table[..., 2])


def pool(coordinates, searched=None, scores=None, near=None, log_p=None, tempered=None):
    """Returns a pool of b photos with candidates at coordinates [b, K, 2]."""
    coordinates = np.array(coordinates, np.float64)
    b, k, _ = coordinates.shape
    near = np.zeros((b, 2, 2)) if near is None else np.array(near, np.float64)
    m = near.shape[1]
    log_p, tempered = (np.zeros((b, k)) if p is None else np.array(p) for p in (log_p, tempered))
    scores = np.zeros((b, m)) if scores is None else np.array(scores, np.float64)
    vectors = np.ones((b, 3, fixtures.C), np.float32)
    count = np.isfinite(scores).sum(1)
    tokens = np.zeros((b, k, 3), np.int32)
    return Pool(
        Candidates(tokens, log_p, tempered),  # type: ignore[arg-type]
        coordinates, vectors, np.repeat(vectors[:, None], m, 1), near, scores, count, searched,
    )  # fmt: skip


def chosen(name, given):
    return SELECTORS[name](PARTS)(given).tolist()


def test_greedy_is_the_first_and_log_probability_the_tempered_best():
    given = pool(np.zeros((2, 3, 2)), log_p=[[-1, -2, -3], [-3, -2, -1]], tempered=[[-3, -1, -2], [-2, -3, -1]])
    assert chosen("greedy", given) == [0, 0]
    assert chosen("log_probability", given) == [1, 2]


def test_neighbors_agree_on_the_candidate_that_most_of_them_are_near():
    near = [[(0, 0), (50, 60), (50, 60.1)]] * 2
    given = pool([[(0, 0), (50, 60)]] * 2, near=near, scores=[[2.0, 1.98, 1.97], [2.0, 1.98, -np.inf]])
    assert chosen("consensus", given) == [1, 0]  # the second photo has two neighbors, the first of which is nearer
    nobody = pool([[(0, 0), (50, 60)]], near=near[:1], scores=[[-np.inf] * 3])
    assert chosen("consensus", nobody) == [0]


@pytest.mark.parametrize(("temperature", "sigma_km", "best"), [(0.1, 25, 1), (0.001, 25, 0), (0.1, 0.01, 0)])
def test_two_neighbors_outvote_one_where_they_are_near_and_nearly_as_like(temperature, sigma_km, best):
    near = np.array([[10.0, 20], [50, 60], [50, 60.1]])  # the pair is 7.1 km apart
    scores = np.array([2.0, 1.97, 1.95])
    found = select.density(pairwise_km(near, near), scores, temperature, sigma_km)
    weights = np.exp(scores / temperature - 2 / temperature)
    km = EARTH_RADIUS_KM * np.radians(0.1) * np.cos(np.radians(50))
    kernel = np.exp(-(km**2) / 2 / sigma_km**2)
    wanted = [weights[0], weights[1] + kernel * weights[2], weights[2] + kernel * weights[1]]
    np.testing.assert_allclose(found, wanted / weights.sum(), rtol=1e-4)
    assert found.argmax() == best


def test_the_threshold_decides_what_is_expected_of_a_candidate():
    """One probable place far away, and three less probable ones 111 km apart."""
    searched = places([(10, 10, 0.4), (0, 100, 0.2), (0, 101, 0.2), (0, 102, 0.2)])
    given = pool([[(10, 10), (0, 100), (0, 101), (0, 102.5)]], searched)
    assert chosen("expected_25_km", given) == [0]
    assert chosen("expected_200_km", given) == [2]
    assert chosen("expected_geoscore", given) == [2]
    expected = Goal(200).expected(given.coordinates, searched)
    np.testing.assert_allclose(expected, [[0.4, 0.4, 0.6, 0.4]], atol=1e-9)
    km = great_circle_km(0, 101, *searched.coordinates[0].T)
    wanted = (geoscore(km) * searched.probability[0]).sum() / 5000
    np.testing.assert_allclose(Goal(None).expected(given.coordinates, searched)[0, 2], wanted, rtol=1e-6)


def test_a_point_may_lie_where_no_candidate_does():
    """Two places 330 km apart on the equator: the point between them is within 200 km of both, and no candidate is."""
    searched = places([(0, 0, 0.5), (0, 3, 0.5)], [(40, 5, 1.0)])
    given = pool([[(0, 0), (0, 3)], [(40, 5), (41, 5)]], searched)
    assert Goal(200).expected(given.coordinates, searched)[0].max() == pytest.approx(0.5)
    for name, goal in (("point_200_km", Goal(200)), ("point_geoscore", Goal(None))):
        points = np.array(chosen(name, given))
        assert points.shape == (2, 2)
        worth = goal.expected(points[:, None], searched)[:, 0]
        assert (worth >= goal.expected(given.coordinates, searched).max(1) - 1e-12).all()
    np.testing.assert_allclose(chosen("point_200_km", given)[1], (40, 5), atol=1e-6)


def test_no_point_of_a_grid_is_worth_more():
    rng = np.random.default_rng(0)
    searched = places(*(np.concatenate([rng.normal(0, 4, (30, 2)), rng.dirichlet(np.ones(30))[:, None]], 1),) * 2)
    given = pool(rng.normal(0, 4, (2, 5, 2)), searched)
    grid = np.stack(np.meshgrid(np.linspace(-8, 8, 60), np.linspace(-8, 8, 60)), -1).reshape(1, -1, 2).repeat(2, 0)
    for limit in (None, 750):
        best = Goal(limit).expected(Goal(limit).point(given)[:, None], searched)[:, 0]
        assert (best >= 0.97 * Goal(limit).expected(grid, searched).max(1)).all()


def test_a_large_cell_is_shared_out_over_its_area():
    """A level-3 cell, as large as a disc of 650 km, with the prediction at its center."""
    searched = places([(20, 20, 1.0)], level=3)
    at = np.array([[(20.0, 20.0)]])
    radius = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(4.0**-3 / 6))
    for limit in (1, 25, 200):
        np.testing.assert_allclose(Goal(limit).expected(at, searched), (limit / radius) ** 2, rtol=1e-6)
    assert Goal(750).expected(at, searched) == pytest.approx(1)
    a = radius / 1492.7  # the mean of exp(-r / 1492.7) over the disc
    assert Goal(None).expected(at, searched) == pytest.approx(2 / a**2 * (1 - (1 + a) * np.exp(-a)), rel=0.01)
    beside = Goal(200).expected(np.array([[(20 + np.degrees(radius / EARTH_RADIUS_KM), 20.0)]]), searched)
    assert 0 < beside < 0.5


def test_an_empty_distribution_expects_nothing_and_still_answers():
    given = pool([[(1, 2), (3, 4)]], places([(0, 0, 0.0)]))
    assert chosen("expected_25_km", given) == [0]
    assert np.isfinite(chosen("point_25_km", given)).all()
