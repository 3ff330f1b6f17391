"""The location encoder: projections against pyproj and by symmetry, trained parameters, and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax.align import location_encoder
from geotoken_jax.align.location_encoder import LocationEncoder, LocationSettings

PLACES = jnp.array([[48.8584, 2.2945], [-33.8568, 151.2153], [0, 0], [64.1466, -21.9426], [-54.8019, -68.303]])


def make(projection="mercator", sigmas=(1, 16, 256)):
    settings = LocationSettings(projection, sigmas, fourier=8, hidden=16, out=12)
    return LocationEncoder(settings, 24, rngs=nnx.Rngs(0))


def test_mercator_and_equal_earth_are_the_published_ones():
    pyproj = pytest.importorskip("pyproj")
    degrees = (np.asarray(PLACES[:, 1], float), np.asarray(PLACES[:, 0], float))
    x, y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(*degrees)
    mercator = np.stack([y, x], 1) / 20037508.3427892
    np.testing.assert_allclose(location_encoder.mercator(PLACES), mercator, atol=2e-7)
    x, y = pyproj.Proj("+proj=eqearth +R=1")(*degrees)
    equal_earth = np.stack([x, y], 1) * 66.50336 / 180
    np.testing.assert_allclose(location_encoder.equal_earth(PLACES), equal_earth, atol=2e-7)


def test_mercator_is_clamped_at_the_poles():
    poles = location_encoder.mercator(jnp.array([[90.0, 10], [-90, 10], [85.0511287798, 10]]))
    np.testing.assert_allclose(poles[:, 0], [1, -1, 1], atol=1e-5)


def test_unit_vectors_have_neither_date_line_nor_poles():
    east, west, north, north_too = location_encoder.unit_vector(jnp.array([[10.0, 180], [10, -180], [90, 0], [90, 77]]))
    np.testing.assert_allclose(east, west, atol=1e-6)
    np.testing.assert_allclose(north, north_too, atol=1e-6)
    np.testing.assert_allclose(north, [0, 0, 1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("projection", location_encoder.PROJECTIONS)
def test_encodes_the_whole_globe(projection):
    globe = jnp.stack(jnp.meshgrid(jnp.linspace(-90, 90, 19), jnp.linspace(-180, 180, 37)), -1).reshape(-1, 2)

    @nnx.jit
    def encode(encoder, places):
        return encoder(places), jax.grad(lambda places: encoder(places).sum())(places)

    vectors, gradient = encode(make(projection), globe)
    assert vectors.shape == (len(globe), 24)
    assert jnp.isfinite(vectors).all() and jnp.isfinite(gradient).all()


def test_frequencies_are_saved_and_not_trained():
    _, parameters, others = nnx.split(make(), nnx.Param, ...)
    assert not [path for path, _ in nnx.to_flat_state(parameters) if "frequencies" in path]
    kept = [path for path, _ in nnx.to_flat_state(others) if "frequencies" in path]
    assert len(kept) == 3


def test_each_capsule_has_its_sigma():
    settings = LocationSettings("mercator", (1, 16, 256), fourier=512, hidden=4, out=4)
    capsules = LocationEncoder(settings, 4, rngs=nnx.Rngs(0)).capsules
    spread = [float(capsule.frequencies[...].std()) for capsule in capsules]
    np.testing.assert_allclose(spread, [1, 16, 256], rtol=0.1)


def test_high_frequencies_keep_their_precision():
    encoder = make(sigmas=(256,))
    capsule = encoder.capsules[0]
    projected = location_encoder.mercator(PLACES)
    angles = 2 * np.pi * np.asarray(projected, float) @ np.asarray(capsule.frequencies[...], float).T
    exact = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    for layer in capsule.layers:
        exact = np.maximum(exact @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    exact = exact @ np.asarray(capsule.output.kernel[...]) + np.asarray(capsule.output.bias[...])
    np.testing.assert_allclose(jax.jit(encoder.features)(PLACES), exact, atol=5e-4)


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match=r"projection is 'gnomonic'.*mercator, equal_earth, unit_vector"):
        make("gnomonic")
