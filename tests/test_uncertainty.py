"""Radii and probabilities of a prediction, against samples drawn from its distribution."""

import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from geotoken_jax.geo import distance
from geotoken_jax.predict import uncertainty
from geotoken_jax.predict.answer import with_radii
from geotoken_jax.predict.pool import PlaceDistribution
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.uncertainty import MASSES, UNCALIBRATED, Calibration

KM = 1 / 111.19493  # degrees of latitude
FARTHEST = np.pi * distance.EARTH_RADIUS_KM


def cells(*listed):
    """PlaceDistribution of one photo: level, latitude, longitude, probability of each."""
    table = np.array([listed], float)
    return PlaceDistribution(table[..., 1:3], table[..., 0].astype(int), table[..., 3])


def mass(places, at, *km):
    return uncertainty.mass_within(places, np.array([at], float), np.array(km, float))[0]


def around(latitude, longitude, km, rng):
    """Returns points uniformly distributed over a disc around each place."""
    angle, bearing = np.asarray(km) / distance.EARTH_RADIUS_KM, rng.uniform(0, 2 * np.pi, len(latitude))
    away = np.arccos(1 - rng.random(len(latitude)) * (1 - np.cos(angle)))
    lat = np.radians(latitude)
    y = np.arcsin(np.sin(lat) * np.cos(away) + np.cos(lat) * np.sin(away) * np.cos(bearing))
    x = np.arctan2(np.sin(bearing) * np.sin(away) * np.cos(lat), np.cos(away) - np.sin(lat) * np.sin(y))
    return np.degrees(y), (np.degrees(x) + longitude + 180) % 360 - 180


def disc_km(level):
    return distance.EARTH_RADIUS_KM * np.arccos(1 - 4.0**-level / 3)


@pytest.mark.parametrize(
    ("level", "away"),
    [(0, 0), (0, 2000), (0, 9000), (3, 0), (3, 300), (3, 600), (8, 0), (8, 15), (8, 200), (20, 0.003)],
)
def test_the_mass_is_the_share_of_a_disc_that_a_circle_holds(level, away):
    rng = np.random.default_rng(0)
    center = np.array([30.0, 40.0])
    places = cells([level, *center, 1.0])
    at = center - (away * KM, 0)
    points = around(np.full(20_000, center[0]), center[1], disc_km(level), rng)
    off = distance.great_circle_km(*at, *points)
    grid = np.linspace(0, away + 1.5 * disc_km(level), 60)
    found, drawn = mass(places, at, *grid), (off[:, None] <= grid).mean(0)
    # The linear rise differs by up to 0.13 from the exact mass of a disc; a jump at the edge would differ by 0.5.
    np.testing.assert_allclose(found, drawn, atol=0.14)
    np.testing.assert_allclose(found[[0, -1]], [0, 1], atol=1e-6)
    if not away:
        np.testing.assert_allclose(found, drawn, atol=0.015)
    assert (np.diff(found) >= 0).all()


def test_what_the_cells_lack_is_spread_over_the_earth():
    places = cells([20, 0, 0, 0.25])
    cap = (1 - np.cos(2500 / distance.EARTH_RADIUS_KM)) / 2
    assert mass(places, (0, 0), 0.02, 2500, FARTHEST) == pytest.approx([0.25, 0.25 + 0.75 * cap, 1], abs=1e-6)
    assert mass(places, (45, 90), 2500) == pytest.approx([0.75 * cap])
    everything = cells([-1, 12, 34, 1.0])  # the cell is the whole Earth, so its stated center has no effect
    most = (1 - np.cos(15_000 / distance.EARTH_RADIUS_KM)) / 2
    assert mass(everything, (-60, 10), 2500, 15_000) == pytest.approx([cap, most])


def places_at_random(b, rng, held):
    level = rng.integers(-1, 21, (b, 6))
    probability = rng.dirichlet(np.full(6, 0.3), b) * np.asarray(held)[:, None]
    coordinates = np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, (b, 6)))), rng.uniform(-180, 180, (b, 6))], -1)
    coordinates[:, 1:3] = coordinates[:, :1] + rng.normal(0, 0.5, (b, 2, 2)).clip(-1, 1)
    coordinates[..., 0] = coordinates[..., 0].clip(-90, 90)
    return PlaceDistribution(coordinates, level, probability), coordinates[:, 0]


@pytest.mark.parametrize("held", [0.0, 1e-3, 0.4, 1.0])
def test_the_radius_is_the_inverse_of_the_mass(held):
    rng = np.random.default_rng(1)
    places, at = places_at_random(1500, rng, np.full(1500, held))  # more than one block of the computation
    masses = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    radius = uncertainty.radius_km(places, at, masses)
    assert (np.diff(radius, axis=1) >= 0).all() and (radius <= FARTHEST).all()
    assert (radius[:, 0] == 0).all()
    back = uncertainty.mass_within(places, at, radius)
    less = uncertainty.mass_within(places, at, np.maximum(radius - 1e-3, 0))
    assert (back[:, 1:] >= masses[1:] - 1e-9).all()  # the radius contains the mass,
    assert (less[:, 1:] <= masses[1:] + 1e-9).all()  # and a radius one meter smaller contains less
    alone = uncertainty.radius_km(PlaceDistribution(*(part[7:8] for part in places)), at[7:8], masses)
    np.testing.assert_allclose(alone[0], radius[7])


def world(n, seed, spread=1.0, share=1.0):
    """Photos whose truth is drawn from places that a model then reports wrongly.

    The answer is the first cell, which often is not the most probable. spread: the model's probabilities are the true
    ones to this power; share: of the truths that lie in a listed cell.
    """
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.full(8, 0.5), n)
    level = rng.integers(4, 12, (n, 8))
    latitude = np.degrees(np.arcsin(rng.uniform(-0.9, 0.9, (n, 8))))
    longitude = rng.uniform(-180, 180, (n, 8))
    near = rng.random((n, 8)) < 0.5
    latitude = np.where(near, latitude[:, :1] + rng.normal(0, 3, (n, 8)), latitude).clip(-85, 85)
    longitude = np.where(near, longitude[:, :1] + rng.normal(0, 3, (n, 8)), longitude).clip(-180, 180)
    taken = (rng.random((n, 1)) > true.cumsum(1)).sum(1).clip(0, 7)
    each = np.arange(n)
    truth = np.stack(around(latitude[each, taken], longitude[each, taken], disc_km(level[each, taken]), rng), -1)
    lost = rng.random(n) > share
    truth[lost] = np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)], -1)[lost]
    said = true**spread
    said *= 0.999 / said.sum(1, keepdims=True)
    places = PlaceDistribution(np.stack([latitude, longitude], -1), level, said)
    return places, np.stack([latitude[:, 0], longitude[:, 0]], -1), truth


@pytest.mark.parametrize(("spread", "share"), [(1, 1), (2.5, 1), (0.4, 1), (1, 0.7), (2.5, 0.6)])
def test_calibrated_radii_hold_what_they_say_on_other_photos(spread, share):
    calibration = uncertainty.fit(*world(2000, 0, spread, share))
    places, at, truth = world(4000, 1, spread, share)
    km = distance.great_circle_km(*at.T, *truth.T)
    radius, within = calibration.radius_km(places, at), calibration.within(places, at)
    held = (km[:, None] <= radius).mean(0)
    np.testing.assert_allclose(held, np.array(MASSES) / 100, atol=0.03)
    near = km[:, None] <= np.array(distance.THRESHOLDS_KM)
    np.testing.assert_allclose(within.mean(0), near.mean(0), atol=0.03)
    assert (np.diff(within, axis=1) >= 0).all() and (within >= 0).all() and (within <= 1).all()
    if spread != 1 or share != 1:

        def loss(p):
            p = p.clip(1e-3, 1 - 1e-3)
            return -np.log(np.where(near, p, 1 - p)).mean()

        assert loss(within) < loss(UNCALIBRATED.within(places, at))


def test_the_temperature_undoes_what_the_model_exaggerates():
    calibrations = [uncertainty.fit(*world(2000, 0, spread)) for spread in (0.5, 1, 2)]
    np.testing.assert_allclose([c.temperature for c in calibrations], [0.5, 1, 2], rtol=0.25)


def test_a_model_that_is_always_sure_of_one_cell_is_calibrated_too():
    """Half of its truths are in the cell, the others up to thousands of kilometers away."""

    def photos(n, seed):
        rng = np.random.default_rng(seed)
        km = np.where(rng.random(n) < 0.5, 0.003, rng.exponential(1500, n).clip(5, 8000))
        at = np.stack([rng.uniform(-10, 10, n), rng.uniform(-100, 100, n)], -1)
        places = PlaceDistribution(at[:, None], np.full((n, 1), 20), np.ones((n, 1)))
        return places, at, np.stack([at[:, 0] + km * KM, at[:, 1]], -1), km

    *fitted, _ = photos(2000, 0)
    calibration = uncertainty.fit(*fitted)
    places, at, _, km = photos(4000, 1)
    radius = calibration.radius_km(places, at)
    np.testing.assert_allclose((km <= radius[:, 1]).mean(), 0.9, atol=0.03)
    assert 1000 < np.median(radius[:, 1]) < 5000
    np.testing.assert_allclose(calibration.within(places, at).mean(0)[-1], (km <= 2500).mean(), atol=0.03)


def test_a_calibration_is_kept_as_json_and_none_changes_nothing(tmp_path):
    places, at, truth = world(300, 0, 2)
    calibration = uncertainty.fit(places, at, truth)
    assert calibration.photos == 300
    calibration.save(epath.Path(tmp_path / "calibration.json"))
    assert Calibration.load(epath.Path(tmp_path / "calibration.json")) == calibration
    assert uncertainty.fit(PlaceDistribution(*(part[:0] for part in places)), at[:0], truth[:0]) == UNCALIBRATED
    plain = uncertainty.mass_within(places, at, np.array(distance.THRESHOLDS_KM))
    np.testing.assert_allclose(UNCALIBRATED.within(places, at), plain, atol=1e-9)
    np.testing.assert_allclose(
        UNCALIBRATED.radius_km(places, at), uncertainty.radius_km(places, at, np.array(MASSES) / 100)
    )


def test_answers_get_radii_and_probabilities():
    places, at, _ = world(3, 0)
    bare = [Prediction(*place, np.nan, np.nan, {}, (), (), ()) for place in at.tolist()]
    found = with_radii(bare, places, UNCALIBRATED)
    radii = UNCALIBRATED.radius_km(places, at)
    np.testing.assert_allclose([(one.radius_km, one.radius_90_km) for one in found], radii, atol=6e-4)
    assert list(found[0].within) == list(distance.THRESHOLDS_KM)
    assert found[2].within[750] == pytest.approx(UNCALIBRATED.within(places, at)[2, 3], abs=1e-5)
    assert with_radii(bare, None, UNCALIBRATED) == bare


def test_what_cells_lack_to_1_is_elsewhere():
    places = PlaceDistribution(
        np.zeros((3, 2, 2)), np.array([[20, 0], [0, 0], [-1, 0]]), np.array([[0.5, 0.25], [0, 0], [1, 0]])
    )
    assert uncertainty.mass_within(places, np.zeros((3, 2)), np.array([FARTHEST])) == pytest.approx(1)


def test_no_jax_comes_with_the_module():
    code = "import sys; from geotoken_jax.predict import uncertainty; print({'jax', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
