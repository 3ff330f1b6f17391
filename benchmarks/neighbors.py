"""Neighbors at scale: what an index takes to build, and its searches a second against exact ones. Prints one JSON line.

By default on generated vectors: as many clusters as the square root of the rows, of heavy-tailed sizes (the largest of
a million rows holds some 5,000), spread along a few directions and a little along all. `--workdir=runs/demo` spreads
that gallery's own vectors instead. The index is what `geotoken index` builds with configs/common.py, whose keys under
index.search `--set leaves_searched=8` changes. Vectors are made anew whenever they are asked for: they are never all in
memory, and the time to make them is told apart. The issue's size is `--rows=1000000 --width=2304 --queries=100000`.
"""

import argparse
import ast
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from configs import common
from geotoken_jax import settings
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import Table, index_vectors

#: Directions along which a cluster spreads; rows made at a time, from a seed of their own.
_DIRECTIONS, _BLOCK = 64, 4096
#: How far it spreads along them, and along all. Of 8,000 and of 32,000 photos of EarthView the 15th nearest is 0.72 and
#: 0.66 away; that trend has it at 0.53 among a million, and so have these.
_SPREAD, _NOISE = 0.44, 0.14
#: Neighbors of each query, and rows searched exactly at a time (0.3 GB at 2304 wide).
_NEIGHBORS, _EXACT_ROWS = 20, 32_768


class Made:
    """Vectors [N, D] of length 1 around centers (geotoken_jax.gallery.index.Vectors); queries are rows past the end.

    centers: [P, D]. weights: [P], of how likely each is. seconds: spent on making vectors.
    """

    def __init__(self, rows: int, centers: np.ndarray, weights: np.ndarray):
        rng = np.random.default_rng(0)
        one, other = rng.integers(0, len(centers), (2, _DIRECTIONS))
        differences = centers[one] - centers[other]
        self._directions = _SPREAD * differences / np.linalg.norm(differences)
        self._rows, self._centers, self._likely = rows, centers, np.cumsum(weights) / weights.sum()
        self.seconds = 0.0

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: Any) -> np.ndarray:
        """rows: a slice, or row numbers in rising order."""
        began = time.perf_counter()
        if isinstance(rows, slice):
            rows = np.arange(rows.start, min(rows.stop, len(self)))
        vectors = np.empty((len(rows), self._centers.shape[1]), np.float32)
        block = rows // _BLOCK
        for number in np.unique(block):
            here = slice(*np.searchsorted(block, [number, number + 1]))
            vectors[here] = self._block(number)[rows[here] - number * _BLOCK]
        self.seconds += time.perf_counter() - began
        return vectors

    def queries(self, n: int) -> np.ndarray:
        """Returns n vectors that are drawn as the others are."""
        return self[np.arange(len(self), len(self) + n)]

    def _block(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64([1, number]))
        vectors = self._centers[np.searchsorted(self._likely, rng.random(_BLOCK))]
        vectors += rng.standard_normal((_BLOCK, _DIRECTIONS), np.float32) @ self._directions
        spread = np.float32(_NOISE / vectors.shape[1] ** 0.5)
        vectors += spread * rng.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(options: argparse.Namespace) -> Made:
    """Returns the generated vectors, or those of a work directory's gallery spread to as many rows."""
    if options.workdir:
        centers = index_vectors(Table(epath.Path(options.workdir) / "gallery").embeddings()) / np.float32(3**0.5)
        return Made(options.rows, centers, np.ones(len(centers)))
    rng = np.random.default_rng(1)
    clusters = max(1, int(options.rows**0.5))
    centers = rng.standard_normal((clusters, options.width), np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return Made(options.rows, centers, rng.lognormal(0, 1, clusters))


def measure(options: argparse.Namespace, search: index.IndexSettings) -> dict[str, Any]:
    """Builds and searches."""
    vectors = make(options)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        built = index.build(vectors, search, folder)
        build_seconds, making = time.perf_counter() - began, vectors.seconds
        build_peak = _peak_gb()
        size = sum(file.stat().length for file in epath.Path(folder).glob("*/*"))
        queries = vectors.queries(options.queries)
        rows, wanted, seconds, exact_seconds = _side_by_side(vectors, built, queries, options.exact)
    per_second, exact_per_second = len(queries) / seconds, options.exact / exact_seconds
    return {
        "rows": len(vectors),
        "width": queries.shape[1],
        "queries": len(queries),
        "build_seconds": round(build_seconds - making, 1),
        "making_seconds": round(making, 1),
        "build_peak_gb": build_peak,
        "peak_gb": _peak_gb(),
        "index_gb": round(size / 1e9, 3),
        "queries_per_second": round(per_second, 1),
        "exact_queries_per_second": round(exact_per_second, 1),
        "ratio": round(per_second / exact_per_second, 1),
        "recall_at_15": round(index.recall(rows[: len(wanted), : index.RECALL_AT], wanted[:, : index.RECALL_AT]), 4),
        "index": built.facts,
    }


def _side_by_side(
    vectors: Made, built: index.Index, queries: np.ndarray, exactly: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Returns the rows found for all queries, the rows wanted for the first ones, and the seconds that each took.

    The two take turns, a block of the vectors (in memory) and a part of the queries each, so that a machine that slows
    down for a while slows both.
    """
    sample = queries[:exactly]
    index.exact(vectors[0:_EXACT_ROWS], sample, _NEIGHBORS)  # compiles
    starts = range(0, len(vectors), _EXACT_ROWS)
    found, wanted, seconds, exact_seconds = [], [], 0.0, 0.0
    for first, part in zip(starts, np.array_split(queries, len(starts)), strict=True):
        block = vectors[first : first + _EXACT_ROWS]
        began = time.perf_counter()
        near, scores = index.exact(block, sample, _NEIGHBORS)
        exact_seconds += time.perf_counter() - began
        wanted.append((near + first, scores))
        began = time.perf_counter()
        found.append(built.search(part, _NEIGHBORS)[0])
        seconds += time.perf_counter() - began
    return np.concatenate(found), index.merge(wanted, _NEIGHBORS)[0], seconds, exact_seconds


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--exact", type=int, default=500, help="queries of those that are searched exactly too")
    parser.add_argument("--workdir", help="whose gallery's vectors are spread, at their own width")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of config.index.search")
    options = parser.parse_args()
    config: Any = common.get_config()
    for change in options.set:
        key, _, value = change.partition("=")
        config.index.search[key] = ast.literal_eval(value)
    print(json.dumps(measure(options, settings.read(index.IndexSettings, config.index.search, "index.search"))))


if __name__ == "__main__":
    main()
