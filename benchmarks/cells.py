"""Measures how many coordinates per second are converted to S2 tokens, and how many tokens are converted back.

CellScheme with numpy and with jax is compared with s2sphere. `--check=N` instead compares the cells of N random
coordinates with the cells of s2sphere, at levels 20 and 30. Prints one JSON object.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import s2sphere

from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import great_circle_km


def on_sphere(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns n random latitudes and longitudes in degrees, uniform on the sphere."""
    rng = np.random.default_rng(seed)
    return np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def s2_leaf(latitude: float, longitude: float) -> s2sphere.CellId:
    """Returns the level-30 cell of a coordinate in degrees, by s2sphere."""
    return s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(latitude, longitude))


def s2_encode(latitude: float, longitude: float) -> list[int]:
    """Returns the tokens of `CellScheme(20, 2)` by s2sphere."""
    cell = s2_leaf(latitude, longitude).parent(20).id()  # pyright: ignore[reportOptionalMemberAccess]
    return [cell >> 61, *(cell >> shift & 15 for shift in range(57, 20, -4))]


def s2_decode(cell: int) -> tuple[float, float]:
    """Returns a cell's center in degrees by s2sphere."""
    center = s2sphere.CellId(cell).to_lat_lng()
    return center.lat().degrees, center.lng().degrees


def rates(n: int, sample: int, repeats: int) -> dict:
    """Returns coordinates per second, as medians over `repeats` rounds. Every round runs each conversion once.

    In a round, s2sphere converts `sample` coordinates and CellScheme converts `n`. `speedup` is the median over rounds
    of the ratio of their rates. A temporary slowdown of the machine affects both sides of a round.
    """
    scheme = CellScheme(20, 2)
    latitude, longitude = on_sphere(n, 0)
    tokens = scheme.encode(latitude, longitude)
    points = list(zip(latitude[:sample].tolist(), longitude[:sample].tolist(), strict=True))
    cells = scheme.cell_ids(np.asarray(tokens[:sample])).tolist()
    on_device = [jnp.asarray(values) for values in (latitude, longitude, tokens)]
    encode, decode = jax.jit(scheme.encode), jax.jit(scheme.decode)
    runs = {
        "s2sphere_cell": (sample, lambda: [s2_leaf(*point).parent(20) for point in points]),
        "s2sphere_encode": (sample, lambda: [s2_encode(*point) for point in points]),
        "s2sphere_decode": (sample, lambda: [s2_decode(cell) for cell in cells]),
        "numpy_encode": (n, lambda: scheme.encode(latitude, longitude)),
        "numpy_decode": (n, lambda: scheme.decode(tokens)),
        "jax_encode": (n, lambda: jax.block_until_ready(encode(*on_device[:2]))),
        "jax_decode": (n, lambda: jax.block_until_ready(decode(on_device[2]))),
    }
    rounds = []
    for _ in range(1 + repeats):
        rounds.append({name: count / seconds(run) for name, (count, run) in runs.items()})
    rounds = rounds[1:]  # the first round compiles

    def median(rate):
        return statistics.median(rate(one) for one in rounds)

    return {
        "coordinates": n,
        "sample": sample,
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "per_second": {name: round(median(lambda one, name=name: one[name])) for name in runs},
        "speedup": {
            name: round(median(lambda one, name=name: one[name] / one[f"s2sphere_{name.split('_')[1]}"]), 1)
            for name in runs
            if not name.startswith("s2sphere")
        },
        "speedup_numpy_encode_over_cell": round(median(lambda one: one["numpy_encode"] / one["s2sphere_cell"]), 1),
    }


def seconds(run) -> float:
    """Returns the wall-clock seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def check(n: int) -> dict:
    """Returns how many of n random coordinates have another cell in s2sphere, and the largest error of cell centers."""
    latitude, longitude = on_sphere(n, 1)
    points = zip(latitude.tolist(), longitude.tolist(), strict=True)
    leaves = np.fromiter((s2_leaf(*point).id() for point in points), np.uint64, n)
    single = latitude.astype(np.float32), longitude.astype(np.float32)
    report: dict = {"coordinates": n}
    for level in (20, 30):
        scheme = CellScheme(level, 2)
        wanted = scheme.from_cell_ids(leaves)
        with jax.enable_x64(True):
            double = scheme.encode(jnp.asarray(latitude), jnp.asarray(longitude))
        rounded = scheme.encode(jnp.asarray(single[0]), jnp.asarray(single[1]))
        center = [np.asarray(degrees, np.float64) for degrees in scheme.decode(jnp.asarray(wanted))]
        off_km = great_circle_km(center[0], center[1], *scheme.decode(wanted))
        report[f"level_{level}"] = {
            "numpy_differs": differing(scheme.encode(latitude, longitude), wanted),
            "jax_float64_differs": differing(double, wanted),
            "jax_float32_differs": differing(rounded, wanted),
            "jax_float32_differs_from_its_own_numbers_cell": differing(rounded, scheme.encode(*single)),
            "jax_float32_decode_off_by_meters": round(float(np.max(off_km)) * 1000, 3),
        }
    return report


def differing(tokens, wanted) -> int:
    """Returns the number of rows of tokens [n, T] that differ from the wanted ones."""
    return int((np.asarray(tokens) != np.asarray(wanted)).any(-1).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=int, metavar="N", help="compare N random coordinates with s2sphere")
    parser.add_argument("--n", type=int, default=1_000_000, help="coordinates per round")
    parser.add_argument("--sample", type=int, default=20_000, help="coordinates per round for s2sphere")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    arguments = parser.parse_args()
    report = check(arguments.check) if arguments.check else rates(arguments.n, arguments.sample, arguments.repeats)
    print(json.dumps(report))
