"""Measures how long an index takes to build, and its speed against exact search. Prints one JSON line.

The index is built as by `geotoken index` with configs/common.py. `--set leaves_searched=8` changes a key of
config.index.search.

The vectors are generated. By default they are clusters around random centers. The number of clusters is the square root
of the number of rows, and their sizes are heavy-tailed: of a million rows, the largest cluster has about 5,000.
Clusters spread widely along a few directions, and a little along all. With `--workdir=runs/demo`, the centers are the
vectors of a gallery instead. Vectors are stored on disk in bfloat16, like a gallery, so they are never all in memory.

A large run is `--rows=1000000 --width=2304 --queries=100000`. It needs 15 GB on the disk of --folder.
"""

import argparse
import ast
import json
import resource
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from configs import common
from geotoken_jax import records, settings
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.progress import track

#: Number of directions along which a cluster spreads; vectors generated at a time, each time with a seed of its own.
_DIRECTIONS, _BLOCK = 64, 4096
#: Spread along these directions, and spread along all directions. With these numbers the 15th neighbor among a million
#: vectors is at a distance of 0.53. EarthView has 0.72 among 8,000 photos and 0.66 among 32,000, and this trend also
#: gives 0.53 among a million.
_SPREAD, _NOISE = 0.44, 0.14
#: Neighbors per query; rows per block of the exact search (0.3 GB at width 2304).
_NEIGHBORS, _EXACT_ROWS = 20, 32_768


class Stored:
    """Vectors [N, D] in a file of bfloat16 numbers (geotoken_jax.gallery.index.Vectors)."""

    def __init__(self, file: epath.Path):
        self._values = records.open_array(file, ml_dtypes.bfloat16)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._values[rows].astype(np.float32)


def make(options: argparse.Namespace, folder: epath.Path) -> tuple[Stored, np.ndarray]:
    """Returns unit vectors around generated centers, or with --workdir around the vectors of a gallery, and queries.

    Queries are further vectors of the same distribution. folder: folder in which the vectors are stored.
    """
    if options.workdir:
        centers = index_vectors(Table(epath.Path(options.workdir) / "gallery").embeddings()) / np.float32(3**0.5)
        weights = np.ones(len(centers))
    else:
        rng = np.random.default_rng(1)
        clusters = max(1, int(options.rows**0.5))
        centers = rng.standard_normal((clusters, options.width), np.float32)
        centers /= np.linalg.norm(centers, axis=1, keepdims=True)
        weights = rng.lognormal(0, 1, clusters)
    first, second = np.random.default_rng(0).integers(0, len(centers), (2, _DIRECTIONS))
    differences = centers[first] - centers[second]
    directions = _SPREAD * differences / np.linalg.norm(differences)
    likely = np.cumsum(weights) / weights.sum()

    def block(number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64([1, number]))
        vectors = centers[np.searchsorted(likely, rng.random(_BLOCK))]
        vectors += rng.standard_normal((_BLOCK, _DIRECTIONS), np.float32) @ directions
        spread = np.float32(_NOISE / vectors.shape[1] ** 0.5)
        vectors += spread * rng.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    file, blocks = folder / "vectors.npy", -(-options.rows // _BLOCK)
    stored = np.lib.format.open_memmap(file, "w+", np.uint16, (options.rows, centers.shape[1]))
    for n in track(range(blocks), "vectors", blocks, "blocks"):
        part = stored[n * _BLOCK : (n + 1) * _BLOCK]
        part[:] = block(n)[: len(part)].astype(ml_dtypes.bfloat16).view(np.uint16)
    stored.flush()
    queries = np.concatenate([block(blocks + n) for n in range(-(-options.queries // _BLOCK))])
    return Stored(file), queries[: options.queries]


def measure(options: argparse.Namespace, search: index.IndexSettings) -> dict[str, Any]:
    """Builds the index and searches it. Returns the figures."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        vectors, queries = make(options, epath.Path(folder))
        began = time.perf_counter()
        built = index.build(vectors, search, epath.Path(folder) / "index")
        build_seconds = time.perf_counter() - began
        build_peak = _peak_gb()
        size = sum(file.stat().length for file in epath.Path(folder).glob("index/*/*"))
        rows, wanted, seconds, exact_seconds = _side_by_side(vectors, built, queries, options.exact)
    per_second, exact_per_second = len(queries) / seconds, options.exact / exact_seconds
    return {
        "rows": len(vectors),
        "width": queries.shape[1],
        "queries": len(queries),
        "build_seconds": round(build_seconds, 1),
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
    vectors: Stored, built: index.Index, queries: np.ndarray, exactly: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Returns the index's rows for all queries, the exact rows for the first queries, and the seconds of both searches.

    The two searches take turns: one block of vectors for the exact search, then a part of the queries for the index. A
    temporary slowdown of the machine therefore affects both. exactly: number of queries that are searched exactly.
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
    parser.add_argument("--folder", help="folder for the vectors and the index while the benchmark runs")
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
