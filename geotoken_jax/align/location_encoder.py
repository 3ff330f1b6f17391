"""The location encoder of GeoCLIP and G3: a coordinate as a vector, at several scales at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax import sharding
from geotoken_jax.geo.distance import to_unit_vectors

#: Equal Earth (Savric, Patterson, Jenny 2018): coefficients, and GeoCLIP's factor to about [-1, 1].
_A1, _A2, _A3, _A4 = 1.340264, -0.081106, 0.000893, 0.003796
_EQUAL_EARTH_SCALE = 66.50336 / 180
#: Degrees of latitude at which Web Mercator's y is 1; the poles are at infinity.
_MERCATOR_LIMIT = 85.0511287798


@dataclasses.dataclass(frozen=True)
class LocationSettings:
    """Form of the location encoder; G3's is mercator, (1, 16, 256), 256, 1024, 512, GeoCLIP's with equal_earth.

    projection: one of PROJECTIONS. sigmas: scale of each capsule's frequencies. fourier: frequencies a capsule.
    hidden: width of a capsule's layers. out: width of its output and of the projection head.
    """

    projection: str
    sigmas: tuple[float, ...]
    fourier: int
    hidden: int
    out: int

    def __post_init__(self):
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection is {self.projection!r}: choose one of {', '.join(PROJECTIONS)}")


class Frequencies(nnx.Variable):
    """Fourier frequencies: saved with the weights, and no nnx.Param, so no optimizer moves them."""


class Capsules(nnx.Module):
    """Coordinates -> the sum of the capsules' outputs: the whole of GeoCLIP's encoder, and the first part of G3's."""

    def __init__(self, settings: LocationSettings, *, rngs: nnx.Rngs):
        self.projection = settings.projection
        self.capsules = nnx.List([Capsule(settings, sigma, rngs=rngs) for sigma in settings.sigmas])

    def features(self, coordinates: Float[Array, "B 2"]) -> Float[Array, "B E"]:
        """coordinates: latitude and longitude in degrees."""
        projected = PROJECTIONS[self.projection](coordinates.astype(jnp.float32))
        return sum((capsule(projected) for capsule in self.capsules), start=jnp.zeros(()))


class LocationEncoder(Capsules):
    """Coordinates -> vectors of the backbone's width: the sum of the capsules, then an MLP out-out-C."""

    def __init__(self, settings: LocationSettings, width: int, *, rngs: nnx.Rngs):
        super().__init__(settings, rngs=rngs)
        self.hidden = sharding.linear(settings.out, settings.out, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.out, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, coordinates: Float[Array, "B 2"]) -> Float[Array, "B C"]:
        """coordinates: latitude and longitude in degrees."""
        return self.output(jax.nn.relu(self.hidden(self.features(coordinates))))


class Capsule(nnx.Module):
    """One scale: Gaussian Fourier features (Tancik et al. 2020), then three layers and a linear one."""

    def __init__(self, settings: LocationSettings, sigma: float, *, rngs: nnx.Rngs):
        dimensions = PROJECTIONS[settings.projection](jnp.zeros((1, 2))).shape[-1]
        self.frequencies = Frequencies(sigma * jax.random.normal(rngs.params(), (settings.fourier, dimensions)))
        widths = (2 * settings.fourier, settings.hidden, settings.hidden, settings.hidden)
        axes = (("embed", "mlp"), ("mlp", "embed"), ("embed", "mlp"))
        self.layers = nnx.List(
            [sharding.linear(a, b, names, rngs=rngs) for a, b, names in zip(widths[:-1], widths[1:], axes, strict=True)]
        )
        self.output = sharding.linear(settings.hidden, settings.out, ("mlp", "embed"), rngs=rngs)

    def __call__(self, projected: Float[Array, "B P"]) -> Float[Array, "B E"]:
        # Up to 1,000 turns at sigma 256: the product in full float32 (an accelerator's default keeps 8 bits of it), and
        # whole turns taken off, which is exact, before the sine sees them.
        turns = jnp.matmul(projected, self.frequencies[...].T, precision=jax.lax.Precision.HIGHEST)
        angles = 2 * jnp.pi * (turns - jnp.round(turns))
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.output(x)


def mercator(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    """Returns Web Mercator y and x, both in [-1, 1]; latitudes beyond 85.05 degrees are taken as 85.05."""
    latitude = jnp.deg2rad(coordinates[..., 0].clip(-_MERCATOR_LIMIT, _MERCATOR_LIMIT))
    return jnp.stack([jnp.arctanh(jnp.sin(latitude)) / jnp.pi, coordinates[..., 1] / 180], axis=-1)


def equal_earth(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    """Returns Equal Earth x and y in [-1, 1] and [-0.5, 0.5]."""
    latitude, longitude = jnp.moveaxis(jnp.deg2rad(coordinates), -1, 0)
    theta = jnp.arcsin(np.sqrt(3) / 2 * jnp.sin(latitude))
    square = theta**2
    sixth = square**3
    slope = 3 * (_A1 + 3 * _A2 * square + sixth * (7 * _A3 + 9 * _A4 * square))
    x = 2 * np.sqrt(3) * longitude * jnp.cos(theta) / slope
    y = theta * (_A1 + _A2 * square + sixth * (_A3 + _A4 * square))
    return jnp.stack([x, y], axis=-1) * _EQUAL_EARTH_SCALE


def unit_vector(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 3"]:
    """Returns the point on the unit sphere: no poles, no date line."""
    return jnp.asarray(to_unit_vectors(*jnp.moveaxis(coordinates, -1, 0)))


#: Name in the configuration -> projection before the Fourier features.
PROJECTIONS = {"mercator": mercator, "equal_earth": equal_earth, "unit_vector": unit_vector}
