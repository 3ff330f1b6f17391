"""Names coordinates by the nearest city and its country. The cities are from GeoNames, in the file cities.json.

`python -m data_prep.world` makes the file.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from geotoken_jax.geo.distance import EARTH_RADIUS_KM, to_unit_vectors

#: File with all cities of at least 100,000 inhabitants, and the capital and the largest city of each country. Districts
#: of larger cities are left out. The largest city comes first. The file has three keys. unit: degrees per unit of
#: coordinates. countries: ISO 3166 code -> English name. cities: one list [name, country code, longitude, latitude] per
#: city, with coordinates in units.
FILE = Path(__file__).with_name("cities.json")
#: Distance in km. The name of a coordinate this far or farther from the city's center includes the distance.
_NEAR_KM = 15


def place_names(points: Float[np.ndarray, "n 2"]) -> list[str]:
    """Returns the name of the nearest city for each point, such as "Conakry, Guinea" or "412 km from Conakry, Guinea".

    The name includes the distance if the city's center is 15 km away or more. points: latitude and longitude in
    degrees.
    """
    tree, names = _cities()
    chord, rows = tree.query(to_unit_vectors(*points.T))
    km = 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))
    return [
        names[row] if away < _NEAR_KM else f"{away:,.0f} km from {names[row]}"
        for row, away in zip(rows, km.tolist(), strict=True)
    ]


@functools.cache
def _cities() -> tuple[Any, list[str]]:
    """Returns a KDTree of the unit vectors of all cities, and their names with the country. Reads the file once."""
    from scipy.spatial import KDTree  # imported here because the import takes a quarter of a second

    listed = json.loads(FILE.read_text(encoding="utf-8"))
    names, codes, longitude, latitude = zip(*listed["cities"], strict=True)
    up = to_unit_vectors(np.array(latitude) * listed["unit"], np.array(longitude) * listed["unit"])
    return KDTree(up), [f"{name}, {listed['countries'][code]}" for name, code in zip(names, codes, strict=True)]
