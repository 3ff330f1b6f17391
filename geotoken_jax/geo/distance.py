"""Computes distances on Earth, taken as a sphere or an ellipsoid, and scores from distances."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

Array = np.ndarray | jax.Array

#: Mean radius of the Earth.
EARTH_RADIUS_KM = 6371.0
#: Radii at which accuracy is reported: street, city, region, country, continent (Im2GPS).
THRESHOLDS_KM = (1, 25, 200, 750, 2500)
#: Distance over which a GeoGuessr score falls by a factor of e, on GeoGuessr's world map.
_GEOSCORE_KM = 1492.7


def great_circle_km(
    lat1: float | Float[Array, "..."],
    lon1: float | Float[Array, "..."],
    lat2: float | Float[Array, "..."],
    lon2: float | Float[Array, "..."],
) -> Float[Array, "..."]:
    """Returns great-circle distances in km (haversine); the four arguments, in degrees, are broadcast.

    numpy computes in float64, jax in the type of its input. The distance of equal points is exactly 0. The distance of
    antipodes is half the circumference, with an error of up to 1 mm (in float32 up to 2 m).
    """
    xp, (lat1, lon1, lat2, lon2) = _arrays(lat1, lon1, lat2, lon2)
    cosines = xp.cos(xp.radians(lat1)) * xp.cos(xp.radians(lat2))
    east = xp.radians(lon2 - lon1) / 2
    # The haversine is precise for short distances. The haversine of the distance to the antipode is precise for long
    # distances.
    haversine = xp.sin(xp.radians(lat2 - lat1) / 2) ** 2 + cosines * xp.sin(east) ** 2
    to_antipode = xp.sin(xp.radians(lat2 + lat1) / 2) ** 2 + cosines * xp.cos(east) ** 2
    return 2 * EARTH_RADIUS_KM * xp.arctan2(xp.sqrt(haversine), xp.sqrt(to_antipode))


def ellipsoid_km(
    lat1: float | Float[np.ndarray, "..."],
    lon1: float | Float[np.ndarray, "..."],
    lat2: float | Float[np.ndarray, "..."],
    lon2: float | Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Returns geodesic distances in km on the WGS84 ellipsoid; the four arguments, in degrees, are broadcast.

    PROJ computes them with an error of up to 15 nanometers (Karney 2013), in 2 microseconds per pair. They differ from
    great_circle_km by up to 0.6 %. NaN gives NaN.
    """
    from pyproj import Geod  # imported here because the import takes 0.1 s

    lon1, lat1, lon2, lat2 = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (lon1, lat1, lon2, lat2)))
    shape = lat1.shape
    if lat1.size == 1:  # pyproj converts arrays of one element to numbers, which numpy deprecates unless they are 0-d
        lon1, lat1, lon2, lat2 = (v.reshape(()) for v in (lon1, lat1, lon2, lat2))
    return np.asarray(Geod(ellps="WGS84").inv(lon1, lat1, lon2, lat2)[2]).reshape(shape) / 1000


#: Shape of the Earth (`config.evaluate.earth`) -> function from coordinates in degrees to distances in km.
EARTHS = {"sphere": great_circle_km, "ellipsoid": ellipsoid_km}


def within(km: Float[np.ndarray, "n 1"], strict: bool = False) -> Bool[np.ndarray, "n 5"]:
    """Returns, for each distance and each of THRESHOLDS_KM, whether the distance is at most the threshold.

    strict: whether the distance must be below the threshold.
    """
    return km < np.array(THRESHOLDS_KM) if strict else km <= np.array(THRESHOLDS_KM)


def geoscore(km: float | Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the GeoGuessr score of answers `km` kilometers from the truth: 5000 * exp(-km / 1492.7), in 0..5000."""
    xp, (km,) = _arrays(km)
    return 5000 * xp.exp(-km / _GEOSCORE_KM)


def to_unit_vectors(lat: float | Float[Array, "..."], lon: float | Float[Array, "..."]) -> Float[Array, "... 3"]:
    """Returns unit vectors of coordinates in degrees: x points to 0 N 0 E, y to 0 N 90 E and z to the north pole."""
    xp, (lat, lon) = _arrays(lat, lon)
    phi, theta = xp.broadcast_arrays(xp.radians(lat), xp.radians(lon))
    return xp.stack([xp.cos(phi) * xp.cos(theta), xp.cos(phi) * xp.sin(theta), xp.sin(phi)], -1)


def from_unit_vectors(vectors: Float[Array, "... 3"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns latitude and longitude, in degrees, of vectors of any length but 0, such as a mean of unit vectors."""
    xp, (vectors,) = _arrays(vectors)
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return xp.degrees(xp.arctan2(z, xp.hypot(x, y))), xp.degrees(xp.arctan2(y, x))


def pairwise_km(a: Float[Array, "... n 2"], b: Float[Array, "... m 2"]) -> Float[Array, "... n m"]:
    """Returns the distances in km between all pairs of coordinates: to 0.1 m in numpy, to 2 m in jax's float32.

    The matrix product that numpy uses takes a tenth of the time of haversines. a, b: latitude and longitude in degrees.
    """
    if namespace(a, b) is jnp:
        return chord_km(*(to_unit_vectors(x[..., 0], x[..., 1]) for x in (a, b)))
    a, b = (np.asarray(to_unit_vectors(x[..., 0], x[..., 1])) for x in (a, b))
    return EARTH_RADIUS_KM * np.arccos(np.clip(a @ np.swapaxes(b, -1, -2), -1, 1))


def chord_km(a: Float[Array, "... n 3"], b: Float[Array, "... m 3"]) -> Float[Array, "... n m"]:
    """Returns the great-circle distances in km of all pairs of unit vectors.

    Differences are squared: an inner product in float32 would be wrong by 2 km for near points.
    """
    xp = namespace(a, b)
    squares = sum((a[..., :, None, i] - b[..., None, :, i]) ** 2 for i in range(3))
    return 2 * EARTH_RADIUS_KM * xp.arcsin(xp.minimum(xp.sqrt(squares) / 2, 1.0))


def namespace(*values: object) -> ModuleType:
    """Returns jax.numpy if any value is a jax array, else numpy."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _arrays(*values) -> tuple[ModuleType, list]:
    """Returns jax.numpy and jax arrays if any value is a jax array, else numpy and float64 arrays."""
    if namespace(*values) is jnp:
        return jnp, [jnp.asarray(value) for value in values]
    return np, [np.asarray(value, np.float64) for value in values]
