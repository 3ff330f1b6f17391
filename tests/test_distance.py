import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geotoken_jax.geo import distance

HALF = np.pi * distance.EARTH_RADIUS_KM


def on_sphere(n, seed):
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


@pytest.mark.parametrize(
    ("a", "b", "km"),
    [
        ((48.8566, 2.3522), (51.5074, -0.1278), 343.6),  # Paris, London
        ((40.7128, -74.0060), (34.0522, -118.2437), 3935.7),  # New York, Los Angeles
        ((-33.8688, 151.2093), (51.5074, -0.1278), 16993.9),  # Sydney, London
        ((35.6762, 139.6503), (37.7749, -122.4194), 8274.6),  # Tokyo, San Francisco, over the date line
        ((0, 179.5), (0, -179.5), 111.195),  # a degree of the equator
        ((89.5, 0), (89.5, 180), 111.195),  # a degree over the pole
    ],
)
def test_known_pairs(a, b, km):
    assert distance.great_circle_km(*a, *b) == pytest.approx(km, abs=0.1)
    assert float(distance.great_circle_km(*jnp.array(a), *jnp.array(b))) == pytest.approx(km, abs=0.2)


@pytest.mark.parametrize(
    ("a", "b", "km"),
    [
        ((0, 0), (0, 1), 111.3194908),  # a degree of the equator: a * pi / 180, a = 6378.137
        ((0, 0), (90, 0), 10001.9657293),  # a quarter of a meridian
        ((0, 0), (0, 180), 20003.9314586),  # antipodes: over the pole
        ((-37.95103342, 144.42486789), (-37.65282114, 143.92649553), 54.972271),  # Geoscience Australia's example
    ],
)
def test_known_pairs_on_the_ellipsoid(a, b, km):
    assert distance.ellipsoid_km(*a, *b) == pytest.approx(km, abs=1e-3)


def test_the_ellipsoid_is_near_the_sphere_and_broadcasts():
    a, b = on_sphere(10_000, 8), on_sphere(10_000, 9)
    ratio = distance.ellipsoid_km(*a, *b) / distance.great_circle_km(*a, *b)
    assert 0.994 < ratio.min() < 0.997 and 1.003 < ratio.max() < 1.006
    pairs = distance.ellipsoid_km(a[0][:4, None], a[1][:4, None], b[0][:3], b[1][:3])
    assert pairs.shape == (4, 3)
    assert pairs[1, 2] == distance.ellipsoid_km(a[0][1], a[1][1], b[0][2], b[1][2])
    nothing = distance.ellipsoid_km([np.nan, 0], [np.nan, 0], 0, 1)
    assert np.isnan(nothing[0]) and nothing[1] > 111


def test_a_threshold_is_within_unless_it_is_strict():
    km = np.array([[1.0], [25.0], [2500.1]])
    assert distance.within(km).sum(1).tolist() == [5, 4, 0]
    assert distance.within(km, strict=True).sum(1).tolist() == [4, 3, 0]


def test_equal_points_are_exactly_zero_apart():
    lat, lon = on_sphere(10_000, 0)
    assert (distance.great_circle_km(lat, lon, lat, lon) == 0).all()
    lat, lon = jnp.asarray(lat, jnp.float32), jnp.asarray(lon, jnp.float32)
    assert (jax.jit(distance.great_circle_km)(lat, lon, lat, lon) == 0).all()


def test_small_distances_keep_their_digits():
    millimeter = np.degrees(1e-6 / distance.EARTH_RADIUS_KM)
    assert distance.great_circle_km(0, 0, millimeter, 0) == pytest.approx(1e-6, rel=1e-12)


def test_antipodes_are_half_the_circumference_apart():
    lat, lon = on_sphere(10_000, 1)
    other = np.where(lon > 0, lon - 180, lon + 180)
    np.testing.assert_allclose(distance.great_circle_km(lat, lon, -lat, other), HALF, rtol=0, atol=1e-6)
    single = [jnp.asarray(values, jnp.float32) for values in (lat, lon, -lat, other)]
    np.testing.assert_allclose(distance.great_circle_km(*single), HALF, rtol=0, atol=2e-3)
    near = np.degrees(1e-3 / distance.EARTH_RADIUS_KM)
    assert HALF - distance.great_circle_km(0, 0, near, 180) == pytest.approx(1e-3, abs=1e-9)


def test_symmetric_and_triangle_inequality():
    points = [on_sphere(10_000, seed) for seed in (2, 3, 4)]
    d = {(a, b): distance.great_circle_km(*points[a], *points[b]) for a, b in itertools.permutations(range(3), 2)}
    np.testing.assert_array_equal(d[0, 1], d[1, 0])
    assert (d[0, 2] <= d[0, 1] + d[1, 2] + 1e-9).all()
    assert all(((km >= 0) & (km <= HALF)).all() for km in d.values())


def test_broadcasts():
    lat, lon = on_sphere(5, 5)
    pairs = distance.great_circle_km(lat[:, None], lon[:, None], lat, lon)
    assert pairs.shape == (5, 5)
    assert pairs[1, 3] == distance.great_circle_km(lat[1], lon[1], lat[3], lon[3])


def test_numpy_stays_float64_and_jax_stays_jax():
    lat, lon = on_sphere(3, 6)
    assert distance.great_circle_km(lat.astype(np.float32), lon, 0, 0).dtype == np.float64
    assert isinstance(distance.great_circle_km(jnp.asarray(lat), lon, 0, 0), jax.Array)


def test_geoscore():
    np.testing.assert_allclose(distance.geoscore([0, 1492.7, 5000]), [5000, 5000 / np.e, 175.4858], rtol=1e-5)
    assert float(distance.geoscore(jnp.float32(0))) == 5000


def test_unit_vectors():
    axes = distance.to_unit_vectors([0, 0, 90, 0], [0, 90, 33, 180])
    np.testing.assert_allclose(axes, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], atol=1e-15)
    lat, lon = on_sphere(1000, 7)
    vectors = distance.to_unit_vectors(lat, lon)
    assert vectors.shape == (1000, 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-15)
    for scale in (1, 0.3):
        back = distance.from_unit_vectors(scale * vectors)
        np.testing.assert_allclose(back, (lat, lon), rtol=0, atol=1e-12)
    back = distance.from_unit_vectors(distance.to_unit_vectors(jnp.asarray(lat), jnp.asarray(lon)))
    np.testing.assert_allclose(back, (lat, lon), rtol=0, atol=1e-4)
    middle = distance.from_unit_vectors(distance.to_unit_vectors([10, 10], [179, -179]).mean(0))
    assert abs(middle[1]) == pytest.approx(180)
