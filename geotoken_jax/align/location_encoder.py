"""The location encoder of GeoCLIP and G3, which encodes coordinates as vectors at several scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax import sharding
from geotoken_jax.geo.distance import to_unit_vectors

#: Coefficients of the Equal Earth projection (Savric, Patterson, Jenny 2018), and GeoCLIP's factor, with which x is in
#: about [-1, 1].
_A1, _A2, _A3, _A4 = 1.340264, -0.081106, 0.000893, 0.003796
_EQUAL_EARTH_SCALE = 66.50336 / 180
#: Latitude in degrees at which Web Mercator's y is 1. At the poles, y is infinite.
_MERCATOR_LIMIT = 85.0511287798


@dataclasses.dataclass(frozen=True)
class LocationSettings:
    """Architecture of the location encoder.

    A capsule encodes coordinates at one scale. The settings of G3 are projection="mercator", sigmas=(1, 16, 256),
    fourier=256, hidden=1024 and out=512. GeoCLIP has projection="equal_earth", and the other settings of G3.

    projection: a key of PROJECTIONS. sigmas: standard deviation of the Fourier frequencies of each capsule.
    fourier: number of frequencies per capsule. hidden: width of a capsule's hidden layers. out: width of a capsule's
    output and of the hidden layer after the sum of capsules.
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
    """Fourier frequencies. They are saved with the weights. Optimizers change only variables of type nnx.Param, so they
    leave them as they are."""


class Capsules(nnx.Module):
    """Encodes coordinates as the sum of the outputs of all capsules. This is GeoCLIP's whole location encoder."""

    def __init__(self, settings: LocationSettings, *, rngs: nnx.Rngs):
        self.projection = settings.projection
        self.capsules = nnx.List([Capsule(settings, sigma, rngs=rngs) for sigma in settings.sigmas])

    def features(self, coordinates: Float[Array, "B 2"]) -> Float[Array, "B E"]:
        """Returns the sum of the capsules' outputs. coordinates: latitude and longitude in degrees."""
        projected = PROJECTIONS[self.projection](coordinates.astype(jnp.float32))
        return sum((capsule(projected) for capsule in self.capsules), start=jnp.zeros(()))


class LocationEncoder(Capsules):
    """G3's location encoder: the capsules, then an MLP of widths out, out and C, the width of the backbone."""

    def __init__(self, settings: LocationSettings, width: int, *, rngs: nnx.Rngs):
        super().__init__(settings, rngs=rngs)
        self.hidden = sharding.linear(settings.out, settings.out, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.out, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, coordinates: Float[Array, "B 2"]) -> Float[Array, "B C"]:
        """Returns the vectors of coordinates, latitude and longitude in degrees."""
        return self.output(jax.nn.relu(self.hidden(self.features(coordinates))))


class Capsule(nnx.Module):
    """Encoder at one scale: Gaussian Fourier features (Tancik et al. 2020), three ReLU layers and a linear layer."""

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
        # Angles reach 1,000 turns at sigma 256. So the product needs full float32; by default accelerators would round
        # its factors to 8 bits. Before sine and cosine, whole turns are subtracted, which is exact.
        turns = jnp.matmul(projected, self.frequencies[...].T, precision=jax.lax.Precision.HIGHEST)
        angles = 2 * jnp.pi * (turns - jnp.round(turns))
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.output(x)


def mercator(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
    """Returns Web Mercator y and x, both in [-1, 1]; latitudes are clipped to +-85.05 degrees."""
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
    """Returns points on the unit sphere, which has no singularity at the poles or the date line."""
    return jnp.asarray(to_unit_vectors(*jnp.moveaxis(coordinates, -1, 0)))


#: Value of LocationSettings.projection -> projection of coordinates before the Fourier features.
PROJECTIONS = {"mercator": mercator, "equal_earth": equal_earth, "unit_vector": unit_vector}
