"""Measures how long an index takes to build, and its speed against exact search. Prints one JSON line.

The default vectors are generated clusters. Their number is the square root of the rows, and their sizes are
heavy-tailed (of a million rows the largest has about 5,000). They spread widely along a few directions, and a little
along all. `--workdir=runs/demo` uses the vectors of a gallery as centers instead. The index is the one that `geotoken
index` builds with configs/common.py; `--set leaves_searched=8` changes a key of index.search. Vectors are generated
when they are read, so they are never all in memory, and the time to generate them is counted separately. A large run
is `--rows=1000000 --width=2304 --queries=100000`.
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

#: Number of directions along which a cluster spreads; rows per block, each of which has its own seed.
_DIRECTIONS, _BLOCK = 64, 4096
#: Spread along these directions, and along all. The 15th neighbor is at a distance of 0.72 among 8,000 photos of
#: EarthView and 0.66 among 32,000. That trend gives 0.53 among a million, and so do these numbers.
_SPREAD, _NOISE = 0.44, 0.14
#: Neighbors per query; rows per block of the exact search (0.3 GB at width 2304).
_NEIGHBORS, _EXACT_ROWS = 20, 32_768


class Made:
    """Unit vectors [N, D] drawn around centers, generated when they are read (geotoken_jax.gallery.index.Vectors).

    rows: N. centers: unit vectors [P, D]. weights: relative probability [P] of each center.
    Attribute seconds: time spent on generating vectors.
    """

    def __init__(self, rows: int, centers: np.ndarray, weights: np.ndarray):
        rng = np.random.default_rng(0)
        first, second = rng.integers(0, len(centers), (2, _DIRECTIONS))
        differences = centers[first] - centers[second]
        self._directions = _SPREAD * differences / np.linalg.norm(differences)
        self._rows, self._centers, self._likely = rows, centers, np.cumsum(weights) / weights.sum()
        self.seconds = 0.0

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Returns the vectors of these rows. rows: a slice, or ascending row numbers."""
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
        """Returns n further vectors of the same distribution: the rows after the last."""
        return self[np.arange(len(self), len(self) + n)]

    def _block(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64([1, number]))
        vectors = self._centers[np.searchsorted(self._likely, rng.random(_BLOCK))]
        vectors += rng.standard_normal((_BLOCK, _DIRECTIONS), np.float32) @ self._directions
        spread = np.float32(_NOISE / vectors.shape[1] ** 0.5)
        vectors += spread * rng.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(options: argparse.Namespace) -> Made:
    """Returns vectors around generated centers, or with --workdir around the vectors of a gallery."""
    if options.workdir:
        centers = index_vectors(Table(epath.Path(options.workdir) / "gallery").embeddings()) / np.float32(3**0.5)
        return Made(options.rows, centers, np.ones(len(centers)))
    rng = np.random.default_rng(1)
    clusters = max(1, int(options.rows**0.5))
    centers = rng.standard_normal((clusters, options.width), np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return Made(options.rows, centers, rng.lognormal(0, 1, clusters))


def measure(options: argparse.Namespace, search: index.IndexSettings) -> dict[str, Any]:
    """Builds the index and searches it. Returns the figures."""
    vectors = make(options)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        built = index.build(vectors, search, folder)
        build_seconds, generating = time.perf_counter() - began, vectors.seconds
        build_peak = _peak_gb()
        size = sum(file.stat().length for file in epath.Path(folder).glob("*/*"))
        queries = vectors.queries(options.queries)
        rows, wanted, seconds, exact_seconds = _side_by_side(vectors, built, queries, options.exact)
    per_second, exact_per_second = len(queries) / seconds, options.exact / exact_seconds
    return {
        "rows": len(vectors),
        "width": queries.shape[1],
        "queries": len(queries),
        "build_seconds": round(build_seconds - generating, 1),
        "making_seconds": round(generating, 1),
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
    """Returns the index's rows for all queries, the exact rows for the first queries, and the seconds of both searches.

    exactly: number of queries that are searched exactly. The two searches take turns, so that a temporary slowdown of
    the machine affects both: one block of vectors for the exact search, then a part of the queries for the index.
    """
    sample = queries[:exactly]
    index.exact(vectors[0:_EXACT_ROWS], sample, _NEIGHBORS)  # compiles
    starts = range(0, len(vectors), _EXACT_ROWS)
    found, wanted, seconds, exact_seconds = [], [], 0.0, 0.0
    for first, part in zip(starts, np.array_split(queries, len(starts)), strict=True):
        block = vectors[first : first + _EXACT_ROWS]
        began = time.perf_counter()
        nearest, scores = index.exact(block, sample, _NEIGHBORS)
        exact_seconds += time.perf_counter() - began
        wanted.append((nearest + first, scores))
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
    parser.add_argument("--exact", type=int, default=500, help="number of queries that are also searched exactly")
    parser.add_argument("--workdir", help="work directory whose gallery vectors are the centers, in place of --width")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of config.index.search")
    options = parser.parse_args()
    config: Any = common.get_config()
    for change in options.set:
        key, _, value = change.partition("=")
        config.index.search[key] = ast.literal_eval(value)
    print(json.dumps(measure(options, settings.read(index.IndexSettings, config.index.search, "index.search"))))


if __name__ == "__main__":
    main()
