"""Names of coordinates: the nearest city, with its country and its distance."""

import json

import numpy as np

from geotoken_jax.geo import places
from geotoken_jax.geo.distance import great_circle_km


def test_a_point_is_named_after_the_nearest_city():
    points = [[9.55, -13.66], [48.86, 2.35], [64.1, -21.9], [-43.53, 172.63]]
    assert places.place_names(np.array(points)) == [
        "Conakry, Guinea", "Paris, France", "Reykjavík, Iceland", "Christchurch, New Zealand",
    ]  # fmt: skip


def test_a_far_city_is_named_with_its_distance():
    (name,) = places.place_names(np.array([[0.0, 0.0]]))
    km, _, city = name.partition(" km from ")
    assert 500 < int(km) < 700 and city.endswith(", Ghana")
    assert places.place_names(np.zeros((0, 2))) == []


def test_names_are_those_of_a_search_through_all_cities():
    listed = json.loads(places.FILE.read_text(encoding="utf-8"))
    names, codes, longitude, latitude = zip(*listed["cities"], strict=True)
    cities = np.stack([latitude, longitude], -1) * listed["unit"]
    rng = np.random.default_rng(0)
    points = np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, 200))), rng.uniform(-180, 180, 200)], -1)
    points = np.concatenate([points, [[90, 0], [-90, 0], [-18, 180], [-18, -180]]])
    km = great_circle_km(*points.T[..., None], *cities.T)
    for at, off, name in zip(km.argmin(1), km.min(1), places.place_names(points), strict=True):
        city = f"{names[at]}, {listed['countries'][codes[at]]}"
        assert name == (city if off < 15 else f"{off:,.0f} km from {city}")
