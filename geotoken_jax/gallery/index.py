"""Search for a photo's nearest neighbors in the gallery, exact, on devices or with ScaNN, over one or more shards.

An index folder contains `index.json`, with the facts of `Shards`, and one folder per shard. Each shard's folder
contains an `index.json` too. It is written last, so a shard without it is incomplete. Shards are built independently,
in any order and by any process.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int32

from geotoken_jax import disk, manifests, partition, records
from geotoken_jax.errors import UserError
from geotoken_jax.gallery import int8
from geotoken_jax.gallery.device_search import DeviceSearch
from geotoken_jax.progress import track
from geotoken_jax.settings import Runtime, SettingsError
from geotoken_jax.shards import damaged

#: Queries and gallery rows per block of scores: 34 MB of scores, and 151 MB of gallery vectors of width 2304.
_QUERIES, _ROWS = 512, 16_384
#: Candidates beyond k in the float32 search of `exact`. By float64 scores, one of them can be among the first k.
_SPARE = 8
#: Candidates beyond k in a search with bfloat16 vectors. At D = 2304 the scores have an error of 1e-4, a fraction of
#: the difference between the scores of the neighbors k and k + 1.
_SPARE_BFLOAT16 = 32
#: Number of nearest neighbors over which recall is measured.
RECALL_AT = 15
#: Rows that ScaNN's leaf centers are trained on: 0.9 GB at width 2304, and 200 per leaf of a shard of 262,144 rows.
_TRAINING_ROWS = 100_000
#: Rows that ScaNN's codes (16 per pair of components) are trained on. 100,000 rows give the same recall and take 5 s
#: longer at width 768.
_CODE_ROWS = 10_000
#: Fewest rows of a shard that ScaNN searches. Smaller shards are searched exactly: ScaNN cannot train its 16 codes on
#: fewer rows, and comparing all rows is fast.
_MIN_SCANN_ROWS = 256
#: Lambda of SOAR (Sun et al. 2023), which stores every vector in two leaves, whose centers are in different directions
#: from the vector. With SOAR, searching half as many leaves gives the same recall.
_SOAR = 1.5


class IndexQualityError(UserError, RuntimeError):
    """The index has less recall than config.index.search.min_recall."""


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """Settings of the gallery's index: how it is built and searched.

    kind: "scann"; "exact", which reads the vectors from disk for each batch of queries; or "device", which is exact
    too and keeps the vectors on all local devices. Without an accelerator, "device" uses the CPU and its memory.
    shard_rows: number of gallery rows per shard; the last shard has fewer. Building a shard takes 10 D bytes of memory
    per row of D components: 6 GB at 262,144 rows and D = 2304. Searching takes 4.25 D bytes per row with reorder_dtype
    float32, 2.25 D with bfloat16 and 1.25 D with int8. `geotoken index` has one shard in memory at a time, and a model
    that predicts has all.
    components: number of principal components that ScaNN's tree and codes use. Reordering uses the whole vectors.
    leaves_searched: number of leaves searched in the largest shard, which has sqrt(rows) leaves. The same share of
    leaves is searched in smaller shards. This is an initial value, which `build` doubles until recall reaches
    min_recall.
    reorder: number of candidates that are scored again with the whole vectors, in an index of one shard. In an index of
    S shards, reorder / sqrt(S) candidates of each shard are scored again. If recall is below min_recall although all
    leaves are searched, `build` doubles the number per shard, up to reorder.
    reorder_dtype: type of the whole vectors: float32, bfloat16 or int8. With bfloat16 one neighbor in twenty swaps
    ranks with the next one. An index of kind exact or device is stored in int8 if reorder_dtype is int8, else in
    float32. Kind device keeps 4 D bytes per row on the devices with float32, and 2 D with bfloat16 or int8.
    threads: number of threads per search.
    min_recall: smallest accepted recall of the 15 nearest neighbors, in [0, 1].
    sample: number of gallery photos on which recall is measured.
    """

    kind: str
    shard_rows: int
    components: int
    leaves_searched: int
    reorder: int
    reorder_dtype: str
    threads: Runtime[int]
    min_recall: float
    sample: int

    def __post_init__(self):
        if self.kind not in ("scann", "exact", "device"):
            raise ValueError(f"config.index.search.kind is {self.kind!r}: it must be 'scann', 'exact' or 'device'")
        if self.reorder_dtype not in ("float32", "bfloat16", "int8"):
            raise ValueError(
                f"config.index.search.reorder_dtype is {self.reorder_dtype!r}: it must be 'float32', 'bfloat16' or "
                "'int8'"
            )
        for key in ("shard_rows", "components", "leaves_searched", "reorder", "threads", "sample"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.index.search.{key} is {getattr(self, key)}: it must be 1 or more")
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"config.index.search.min_recall is {self.min_recall}: choose a share from 0 to 1")


class Vectors(Protocol):
    """Float32 vectors [N, D] that are computed or read when rows are requested. A numpy array is a Vectors too."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Float[np.ndarray, "n D"]:
        """Returns some rows. rows: slice or array of row numbers."""
        ...


class Index(Protocol):
    """A searchable set of vectors."""

    def search(
        self, queries: Float32[np.ndarray, "n D"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns the rows of the k largest inner products and these products, best first.

        If fewer than k vectors are found, the last rows are -1 and their products -inf.
        """
        ...


def build(vectors: Vectors, settings: IndexSettings, folder: epath.PathLike) -> "Shards":
    """Builds the index of `vectors`, writes it to `folder` and returns it.

    Complete shards of an interrupted build are kept. Memory holds the vectors of one shard at a time.

    Raises IndexQualityError if recall is below min_recall with all leaves searched.
    """
    rows = partition.ranges([len(vectors)], settings.shard_rows)
    for shard in track(range(len(rows)), "index", len(rows), "shards"):
        build_shard(vectors, settings, folder, rows, shard)
    finish(vectors, settings, folder, len(rows))
    return load(folder, settings.threads)


def build_shard(
    vectors: Vectors, settings: IndexSettings, folder: epath.PathLike, rows: Sequence[range], shard: int
) -> epath.Path:
    """Builds one shard of an index, unless it is complete, and returns its folder.

    If settings.kind is "scann" and ScaNN is not installed (macOS has none), a warning is printed and the index is
    exact.

    rows: rows of each shard. shard: number of the shard to build.
    """
    part = epath.Path(folder) / shard_name(shard, len(rows))
    if not (part / "index.json").exists():
        shutil.rmtree(part, ignore_errors=True)  # an incomplete shard
        part.mkdir(parents=True)
        kind = _kind(settings.kind, str(folder))
        if kind is Scann and len(rows[shard]) < _MIN_SCANN_ROWS:
            kind = Exact
        facts = kind.build(vectors[rows[shard].start : rows[shard].stop], settings, part)
        manifests.write_json(part / "index.json", facts)
    return part


def finish(vectors: Vectors, settings: IndexSettings, folder: epath.PathLike, count: int) -> dict[str, Any]:
    """Measures recall of an index whose shards are built, writes its index.json, and returns the contents.

    Memory holds one shard at a time. count: number of shards.

    Raises IndexQualityError if recall is below min_recall with all leaves searched.
    """
    folder = epath.Path(folder)
    parts = [json.loads((folder / shard_name(shard, count) / "index.json").read_text()) for shard in range(count)]
    leaves = max(part.get("leaves", 0) for part in parts)
    facts = {
        "kind": "scann" if leaves else parts[0]["kind"],
        "rows": sum(part["rows"] for part in parts),
        "shards": count,
        "leaves": leaves,
        "leaves_searched": min(settings.leaves_searched, leaves),
    }
    if leaves:
        facts["reorder"] = math.ceil(settings.reorder / count**0.5)
    _tune(Shards(_Opened(folder, range(count), count, settings.threads), facts), vectors, settings)
    manifests.write_json(folder / "index.json", facts)
    return facts


@functools.cache
def _kind(kind: str, folder: str) -> "type[Scann] | type[Exact] | type[Device]":
    """Returns the class of an index's shards: Scann, Exact or Device.

    If `kind` is "scann" but ScaNN is not installed, returns Exact, and prints a warning once per folder. folder: folder
    of the index.
    """
    if kind == "scann":
        try:
            _import_scann()
            return Scann
        except ImportError as error:
            print(
                f"ScaNN is not available ({error}): {folder} gets an exact index instead, slower and with full recall. "
                f"To use ScaNN, install the package scann (Linux only), remove {folder} and run the same command again",
                file=sys.stderr,
            )
    return Device if kind == "device" else Exact


def load(folder: epath.PathLike, threads: int, part: Sequence[int] = ()) -> "Shards":
    """Returns the index that `build` stored in a folder, which may have been moved since.

    threads: number of threads per search. part: numbers of the shards to open; all if empty. Rows are numbered from the
    first row of the first opened shard.

    Raises FileNotFoundError if the folder has no index, ImportError if the index needs ScaNN and ScaNN is not
    installed, DamagedError that names a damaged shard, and SettingsError if a ScaNN shard contains a pickle.
    """
    folder = epath.Path(folder)
    facts = _facts(folder, {"rows": int, "shards": int, "leaves_searched": int})
    opened = list(_Opened(folder, part or range(facts["shards"]), facts["shards"], threads))
    return Shards(opened, {**facts, "rows": sum(map(len, opened))} if part else facts)


def shard_rows(folder: epath.PathLike) -> list[range]:
    """Returns the rows of each shard of an index."""
    files = [path / "index.json" for path in disk.matching(folder, "?????-of-?????")]
    stops = np.cumsum([0, *(json.loads(file.read_text())["rows"] for file in files)]).tolist()
    return [range(*ends) for ends in itertools.pairwise(stops)]


def exact(
    vectors: Vectors, queries: Float[np.ndarray, "n D"], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns rows and scores of the k largest inner products, best first, ties by row.

    If there are fewer than k vectors, the last rows are -1 and their scores -inf.

    `vectors` can be larger than memory: it is read block by block. The best k + 8 candidates by float32 scores are then
    read again, scored in float64, and sorted by these scores, rounded to float32. Scores computed in float32 change
    slightly with the size of blocks. A sort by them would change the order of close candidates (for 6 of 1,000
    EarthView photos).
    """
    starts = range(0, len(queries), _QUERIES)
    blocks = [jnp.asarray(queries[q : q + _QUERIES], jnp.float32) for q in starts]
    best = [(jnp.zeros((len(part), 0)), jnp.zeros((len(part), 0), jnp.int32)) for part in blocks]
    for v in range(0, len(vectors), _ROWS):
        block = jnp.asarray(vectors[v : v + _ROWS], jnp.float32)
        best = [_merge(part, block, *before, v, k + _SPARE) for part, before in zip(blocks, best, strict=True)]
    candidates = [np.asarray(rows) for _, rows in best]
    return _rescored(vectors, queries, np.concatenate(candidates) if candidates else np.zeros((0, 0), np.int32), k)


def _rescored(
    vectors: Vectors, queries: np.ndarray, candidates: Int32[np.ndarray, "n m"], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns rows and scores of the k best candidates, as `exact` does. Candidates of -1 do not count."""
    rows = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for i, row in enumerate(candidates):
        row = row[row >= 0]
        score = (vectors[row].astype(np.float64) @ np.asarray(queries[i], np.float64)).astype(np.float32)
        order = np.lexsort((row, -score))[:k]
        scores[i, : len(order)], rows[i, : len(order)] = score[order], row[order]
    return rows, scores


@functools.partial(jax.jit, static_argnames="k")
def _merge(
    queries: jax.Array, vectors: jax.Array, scores: jax.Array, rows: jax.Array, first: int, k: int
) -> tuple[jax.Array, jax.Array]:
    products = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    # top_k puts the lower index first among ties. Rows of earlier blocks are lower, so ties are sorted by row.
    new, at = jax.lax.top_k(products, min(k, products.shape[1]))
    scores = jnp.concatenate([scores, new], axis=1)
    rows = jnp.concatenate([rows, at.astype(jnp.int32) + first], axis=1)
    scores, at = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return scores, jnp.take_along_axis(rows, at, axis=1)


def merge(
    results: Sequence[tuple[Int32[np.ndarray, "n _"], Float32[np.ndarray, "n _"]]], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns rows and scores of the k best results of several searches, best first, ties by row.

    results: rows and scores of each search, with at least k columns.
    """
    rows, scores = (np.concatenate(parts, axis=1) for parts in zip(*results, strict=True))
    best = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


class _Opened:
    """Opens the shards of an index during iteration, one at a time, so that memory holds one of them.

    numbers: numbers of the shards to open. count: number of all shards. threads: number of threads per search.
    """

    def __init__(self, folder: epath.Path, numbers: Sequence[int], count: int, threads: int):
        self._folders, self._threads = [folder / shard_name(shard, count) for shard in numbers], threads

    def __iter__(self) -> "Iterator[Exact | Device | Scann]":
        facts = [_facts(folder, {"kind": str, "rows": int}) for folder in self._folders]
        opened = (_open(*part, self._threads) for part in zip(self._folders, facts, strict=True))
        if facts[0]["kind"] == "device":  # one search over all shards, whose candidates are read from disk once
            yield Device.concatenation([shard for shard in opened if isinstance(shard, Device)])
        else:
            yield from opened


class Shards:
    """An index over one or more shards, which hold consecutive ranges of rows.

    facts: contents of the index folder's index.json, with these keys. kind: "scann", "exact" or "device". rows, shards:
    numbers of rows and of shards. leaves: number of leaves of the largest shard. leaves_searched: number of leaves
    searched in the largest shard; in a smaller shard, the same share is searched. Both are 0 if all vectors are
    compared. reorder: number of candidates per shard that are scored again, only for ScaNN. recall: recall of the whole
    index.
    """

    def __init__(self, shards: "Iterable[Exact | Device | Scann]", facts: dict[str, Any]):
        self.shards, self.facts = shards, facts

    def __len__(self) -> int:
        return self.facts["rows"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches all shards and returns their best results, as `Index.search` does."""
        first, results = 0, []
        searched, leaves = self.facts["leaves_searched"], max(self.facts["leaves"], 1)
        for shard in self.shards:
            # In indexes of earlier versions, only the facts of each shard contain `reorder`.
            rows, scores = shard.search(queries, k, -(-searched * shard.leaves // leaves), self.facts.get("reorder", 0))
            results.append((np.where(rows < 0, -1, rows + first), scores))
            first += len(shard)
        return merge(results, k)


class Exact:
    """A shard that is searched exactly."""

    kind, leaves = "exact", 0

    def __init__(self, vectors: Vectors):
        self._vectors = vectors

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings, folder: epath.Path) -> dict[str, Any]:
        """Writes the shard and returns the contents of its index.json."""
        vectors = np.asarray(vectors, np.float32)
        if settings.reorder_dtype == "int8":
            vectors, scale = int8.quantized(vectors)
            records.save_array(folder / "scales.npy", scale)
        records.save_array(folder / "vectors.npy", vectors)
        return {"kind": cls.kind, "rows": len(vectors)}

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: np.ndarray, k: int, *limits: int) -> tuple[np.ndarray, np.ndarray]:
        del limits  # all vectors are compared
        return exact(self._vectors, queries, k)


class Device(Exact):
    """A shard that is searched exactly on all local devices. The first search copies the vectors to the devices."""

    kind = "device"

    def __init__(self, vectors: Vectors, dtype: str):
        super().__init__(vectors)
        self.dtype = dtype

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings, folder: epath.Path) -> dict[str, Any]:
        return {**super().build(vectors, settings, folder), "reorder_dtype": settings.reorder_dtype}

    @classmethod
    def concatenation(cls, shards: "Sequence[Device]") -> "Device":
        """Returns one shard with the rows of all shards."""
        return shards[0] if len(shards) == 1 else cls(_Concatenation([s._vectors for s in shards]), shards[0].dtype)

    @functools.cached_property
    def _on_devices(self) -> DeviceSearch:
        return DeviceSearch(self._vectors, np.float32 if self.dtype == "float32" else jnp.bfloat16)

    def search(self, queries: np.ndarray, k: int, *limits: int) -> tuple[np.ndarray, np.ndarray]:
        del limits
        spare = _SPARE if self.dtype == "float32" else _SPARE_BFLOAT16
        candidates = self._on_devices.candidates(np.asarray(queries, np.float32), k + spare)
        return _rescored(self._vectors, queries, candidates, k)


class _Concatenation:
    """The rows of several `Vectors`, as one."""

    def __init__(self, parts: Sequence[Vectors]):
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "n D"]:
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        part = np.searchsorted(self._starts, rows, side="right") - 1
        vectors = np.empty((len(rows), self._parts[0][:0].shape[1]), np.float32)
        for i in np.unique(part):
            vectors[part == i] = self._parts[i][rows[part == i] - self._starts[i]]
        return vectors


class Scann:
    """A shard searched with ScaNN (Guo et al. 2020): a tree of sqrt(N) leaves, quantized scores, and reordering of the
    best candidates."""

    kind = "scann"

    def __init__(self, searcher: Any, facts: dict[str, Any], threads: int):
        self._searcher, self._rows, self._reorder = searcher, int(facts["rows"]), int(facts["reorder"])
        self.leaves = int(facts["leaves"])
        searcher.set_num_threads(threads)

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings, folder: epath.Path) -> dict[str, Any]:
        """Writes the shard and returns the contents of its index.json."""
        scann = _import_scann()
        leaves = max(1, int(len(vectors) ** 0.5))
        builder = (
            scann.builder(np.ascontiguousarray(vectors, np.float32), min(RECALL_AT, len(vectors)), "dot_product")
            # k-means++ on the training rows: random initialization differs between processes, even on one thread.
            .tree(
                leaves,
                min(settings.leaves_searched, leaves),
                _TRAINING_ROWS,
                random_init=False,
                soar_lambda=_SOAR if leaves > 1 else None,
            )
            .score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=_CODE_ROWS)
            .reorder(settings.reorder, scann.scann_builder.ReorderType[settings.reorder_dtype.upper()])
        )
        if settings.components < vectors.shape[1]:
            builder = builder.pca(settings.components, None)
        with _without_progress_log():
            searcher = builder.build()
        searcher.serialize(str(folder), relative_path=True)
        return {"kind": "scann", "rows": len(vectors), "leaves": leaves, "reorder": settings.reorder}

    def __len__(self) -> int:
        return self._rows

    def search(
        self, queries: np.ndarray, k: int, leaves_searched: int, reorder: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows and scores as `Index.search` does.

        reorder: number of candidates that are scored again; if 0, the number that the shard was built with.
        """
        # k is large if many gallery photos are excluded. Then more leaves are searched, so that they contain 4 k rows
        # on average, or all leaves.
        min_leaves = -(-4 * k * self.leaves // self._rows)
        rows, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32),
            final_num_neighbors=k,
            pre_reorder_num_neighbors=max(reorder or self._reorder, k),
            leaves_to_search=min(max(leaves_searched, min_leaves), self.leaves),
        )
        missing = np.isnan(scores)  # ScaNN pads its results with row 0 and NaN
        return np.where(missing, -1, rows).astype(np.int32), np.where(missing, -np.inf, scores).astype(np.float32)


def shard_name(shard: int, count: int) -> str:
    """Returns the name of a shard's folder. count: number of all shards."""
    return f"{shard:05d}-of-{count:05d}"


def _facts(folder: epath.Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Returns the contents of an index.json. kinds: key -> type. Raises DamagedError if a value is missing."""
    try:
        facts = json.loads((folder / "index.json").read_bytes())
    except ValueError as error:
        raise damaged(str(folder / "index.json"), error) from None
    for key, kind in kinds.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(key), kind) or isinstance(facts[key], bool):
            raise damaged(str(folder / "index.json"), f"it has no {key}")
    return facts


def _open(part: epath.Path, facts: dict[str, Any], threads: int) -> Exact | Device | Scann:
    if facts["kind"] != "scann":
        vectors = records.open_array(part / "vectors.npy")
        if vectors.dtype == np.int8:
            vectors = int8.Int8Vectors(vectors, records.open_array(part / "scales.npy"))
        return Device(vectors, facts["reorder_dtype"]) if facts["kind"] == "device" else Exact(vectors)
    scann = _import_scann()
    if (part / "scann_docids.pkl").exists():  # ScaNN would unpickle it, and so run any code in it
        raise SettingsError(
            f"{part} contains scann_docids.pkl, a pickle that can run code and that no index built here has: do not "
            "trust this folder, and build the index again"
        )
    if not (part / "scann_assets.pbtxt").exists():  # ScaNN would write one
        raise damaged(str(part), "scann_assets.pbtxt is missing")
    try:
        with _without_progress_log():
            return Scann(scann.load_searcher(str(part)), facts, threads)
    except (RuntimeError, ValueError, IndexError) as error:
        raise damaged(str(part), error) from None


def _tune(index: Shards, vectors: Vectors, settings: IndexSettings) -> None:
    """Sets recall in index.facts, measured against exact search.

    Doubles leaves_searched, then reorder, until recall is sufficient. Raises IndexQualityError if recall is below
    settings.min_recall with all leaves searched.
    """
    facts = index.facts
    rounded = facts["kind"] == "device" and settings.reorder_dtype != "float32"
    if not facts["leaves"] and not rounded:
        facts["recall"] = 1.0
        return
    sample = np.unique(np.linspace(0, len(vectors) - 1, settings.sample).astype(np.int64))
    k = min(RECALL_AT + 1, len(vectors))  # every photo finds itself: not counted in recall
    queries = vectors[sample]
    true_rows, _ = exact(vectors, queries, k)
    while True:
        rows, _ = index.search(queries, k)
        facts["recall"] = recall(rows, true_rows, true_rows != sample[:, None])
        if facts["recall"] >= settings.min_recall:
            return
        if rounded:
            raise IndexQualityError(
                f"recall of the {RECALL_AT} nearest neighbors is {facts['recall']:.4f} with "
                f"config.index.search.reorder_dtype={settings.reorder_dtype}, below config.index.search.min_recall="
                f"{settings.min_recall}: set reorder_dtype to float32"
            )
        if facts["leaves_searched"] < facts["leaves"]:
            facts["leaves_searched"] = min(2 * facts["leaves_searched"], facts["leaves"])
        elif facts["reorder"] < settings.reorder:
            facts["reorder"] = min(2 * facts["reorder"], settings.reorder)
        else:
            raise IndexQualityError(
                f"ScaNN's recall of the {RECALL_AT} nearest neighbors is {facts['recall']:.4f} with all "
                f"{facts['leaves']} leaves searched, below config.index.search.min_recall={settings.min_recall}: set "
                f"config.index.search.reorder above {settings.reorder}, or config.index.search.kind=exact"
            )


def recall(found: Int32[np.ndarray, "n _"], wanted: Int32[np.ndarray, "n k"], counted: Any = True) -> float:
    """Returns the share of the wanted rows that were found.

    counted: booleans [n, k], False for wanted rows that do not count; all count by default.
    """
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2)
    counted = np.broadcast_to(counted, wanted.shape)
    return float((hits & counted).sum() / max(counted.sum(), 1))


@contextlib.contextmanager
def _without_progress_log() -> Iterator[None]:
    """Drops the progress log that ScaNN writes to stderr inside the context. No log level turns this log off.

    All other lines are printed when the context ends.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            lines = (line for line in written if not line.startswith((b"I0", b"I1", b"WARNING: All log messages")))
            os.write(2, b"".join(lines))


def _import_scann() -> Any:
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind
