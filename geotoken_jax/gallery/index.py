"""Search for the gallery's photos nearest to a photo: exactly, or with ScaNN, in shards; one interface.

A folder of an index is `index.json` (what is worth knowing, and how to search) and a folder a shard, each complete when
its own `index.json` is there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int32

from geotoken_jax import records, workdir
from geotoken_jax.gallery import int8
from geotoken_jax.progress import track
from geotoken_jax.settings import Runtime

#: Rows of a product at a time: 512 queries against 16,384 rows are 34 MB of scores, and 2304 wide the rows 151 MB.
_QUERIES, _ROWS = 512, 16_384
#: Neighbors found in float32 beyond those asked for, which may be among them in float64.
_SPARE = 8
#: Neighbors whose recall is measured.
RECALL_AT = 15
#: Rows that ScaNN's centers are trained on: at 2304 wide 0.9 GB, and 200 for each of the 512 leaves of 262,144 rows.
_TRAINING_ROWS = 100_000
#: And the 16 codes of each pair of numbers: 100,000 find the same share of neighbors, and take 5 s longer at 768 wide.
_CODE_ROWS = 10_000
#: Every vector is in a second leaf, which lies on another side of it than the first (SOAR, Sun et al. 2023, with its
#: lambda): half as many leaves then hold as many of the nearest.
_SOAR = 1.5


class IndexQualityError(RuntimeError):
    """The index does not find the neighbors that exact search finds."""


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """How the gallery is searched.

    kind: scann or exact. shard_rows: of the gallery, at most, in one shard. Building one takes, at D numbers a row,
    10 D bytes a row: 6 GB at 262,144 rows of 2304; searching takes 4.25 D bytes a row of all shards together, 2.25 D
    with reorder_dtype bfloat16, by which one neighbor in twenty changes places with its next, 1.25 D with int8.
    components: principal ones of the vectors, which are all that leaves and codes see; the best are scored again by all
    of their numbers. leaves_searched: of the sqrt(rows) leaves of each shard's tree, to begin with. reorder: candidates
    of a shard that are scored again. reorder_dtype: in float32, bfloat16 or int8. threads: of a search. min_recall:
    least share of the 15 nearest that must be found, in [0, 1]. sample: gallery photos on which that is measured.
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
        if self.kind not in ("scann", "exact"):
            raise ValueError(f"config.index.search.kind is {self.kind!r}: it must be 'scann' or 'exact'")
        if self.reorder_dtype not in ("float32", "bfloat16", "int8"):
            raise ValueError(
                f"config.index.search.reorder_dtype is {self.reorder_dtype!r}: it must be 'float32', 'bfloat16' or "
                "'int8'"
            )
        for key in ("shard_rows", "components"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.index.search.{key} is {getattr(self, key)}: it must be 1 or more")


class Vectors(Protocol):
    """Vectors [N, D] float32 that are made or read as they are asked for; an array is one too."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Float[np.ndarray, "n D"]:
        """rows: a slice, or an array of row numbers."""
        ...


class Index(Protocol):
    """A searchable set of vectors."""

    def search(
        self, queries: Float32[np.ndarray, "n D"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns the rows of the k largest inner products and these products, best first; -1 and -inf where fewer."""
        ...


def build(vectors: Vectors, settings: IndexSettings, folder: epath.PathLike) -> "Shards":
    """Makes the index of the vectors in a folder, shard by shard; shards that are there whole are kept.

    Exact, saying so, where ScaNN is asked for and not installed (it has no macOS). No more than one shard's vectors are
    in memory. Raises IndexQualityError, with the figures, if recall stays below min_recall with all leaves searched.
    """
    folder = epath.Path(folder)
    kind: type[Scann] | type[Exact] = Exact
    if settings.kind == "scann":
        try:
            _import_scann()
            kind = Scann
        except ImportError as error:
            print(
                f"ScaNN is not available ({error}): searching exactly, which is slower and finds no less",
                file=sys.stderr,
            )
    shards = max(1, -(-len(vectors) // settings.shard_rows))
    size = -(-len(vectors) // shards)
    for shard in track(range(shards), "index", shards, "shards"):
        part = _part(folder, shard, shards)
        if not (part / "index.json").exists():
            part.mkdir(parents=True, exist_ok=True)
            facts = kind.build(vectors[shard * size : (shard + 1) * size], settings, part)
            workdir.write_json(part / "index.json", facts)
    index = Shards.open(folder, shards, settings.threads, settings.leaves_searched)
    _tune(index, vectors, settings)
    workdir.write_json(folder / "index.json", index.facts)
    return index


def load(folder: epath.PathLike, threads: int) -> "Shards":
    """Opens what `build` has made; the folder can be moved.

    Raises FileNotFoundError if there is none, ImportError if it is ScaNN's and ScaNN is not installed.
    """
    folder = epath.Path(folder)
    facts = json.loads((folder / "index.json").read_text())
    index = Shards.open(folder, int(facts["shards"]), threads, int(facts["leaves_searched"]))
    return Shards(index.shards, facts)


def exact(
    vectors: Vectors, queries: Float[np.ndarray, "n D"], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns rows and scores of the k largest inner products, best first, equal ones by row; -1 and -inf past N.

    Blocked over vectors and queries, so `vectors`, which is read once, may be of any length. The best are put in order
    in float64: in float32 the order of near ones depends on how a product is blocked (6 of 1,000 photos of EarthView).
    """
    starts = range(0, len(queries), _QUERIES)
    asked = [jnp.asarray(queries[q : q + _QUERIES], jnp.float32) for q in starts]
    best = [(jnp.zeros((len(part), 0)), jnp.zeros((len(part), 0), jnp.int32)) for part in asked]
    for v in range(0, len(vectors), _ROWS):
        block = jnp.asarray(vectors[v : v + _ROWS], jnp.float32)
        best = [_merge(part, block, *before, v, k + _SPARE) for part, before in zip(asked, best, strict=True)]
    rows = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for q, (_, row) in zip(starts, best, strict=True):
        for i, near in enumerate(np.asarray(row), q):
            score = (vectors[near].astype(np.float64) @ np.asarray(queries[i], np.float64)).astype(np.float32)
            order = np.lexsort((near, -score))[:k]
            scores[i, : len(order)], rows[i, : len(order)] = score[order], near[order]
    return rows, scores


@functools.partial(jax.jit, static_argnames="k")
def _merge(
    queries: jax.Array, vectors: jax.Array, scores: jax.Array, rows: jax.Array, first: int, k: int
) -> tuple[jax.Array, jax.Array]:
    products = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    # top_k puts the lower index first among equals, and rows found before are lower: ties are broken by row.
    new, at = jax.lax.top_k(products, min(k, products.shape[1]))
    scores = jnp.concatenate([scores, new], axis=1)
    rows = jnp.concatenate([rows, at.astype(jnp.int32) + first], axis=1)
    scores, at = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return scores, jnp.take_along_axis(rows, at, axis=1)


def merge(
    found: Sequence[tuple[Int32[np.ndarray, "n _"], Float32[np.ndarray, "n _"]]], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns the k best of several searches' rows and scores, equal scores by row; each has at least k columns."""
    rows, scores = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    best = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


class Shards:
    """An index in parts, which follow each other in the order of their rows.

    facts: kind, rows, shards, and leaves of the largest shard, leaves_searched of each (both 0 where search is exact)
    and recall, which is of the whole.
    """

    def __init__(self, shards: "Sequence[Exact | Scann]", facts: dict[str, Any]):
        self.shards, self.facts = shards, facts

    @classmethod
    def open(cls, folder: epath.Path, shards: int, threads: int, leaves_searched: int) -> "Shards":
        """Opens a folder's shards; nothing is known of their recall yet."""
        parts = [_open(_part(folder, shard, shards), threads) for shard in range(shards)]
        leaves = max(part.leaves for part in parts)
        facts = {
            "kind": "scann" if leaves else "exact",
            "rows": sum(map(len, parts)),
            "shards": shards,
            "leaves": leaves,
            "leaves_searched": min(leaves_searched, leaves),
        }
        return cls(parts, facts)

    def __len__(self) -> int:
        return self.facts["rows"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Index has it; the shards' results are merged by score, equal ones by row."""
        first, found = 0, []
        for shard in self.shards:
            rows, scores = shard.search(queries, k, self.facts["leaves_searched"])
            found.append((np.where(rows < 0, -1, rows + first), scores))
            first += len(shard)
        return merge(found, k)


class Exact:
    """Exact search."""

    leaves = 0

    def __init__(self, vectors: Vectors):
        self._vectors = vectors

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings, folder: epath.Path) -> dict[str, Any]:
        """Writes the shard; returns what its index.json is to say."""
        vectors = np.asarray(vectors, np.float32)
        if settings.reorder_dtype == "int8":
            vectors, scale = int8.quantized(vectors)
            records.save_array(folder / "scales.npy", scale)
        records.save_array(folder / "vectors.npy", vectors)
        return {"kind": "exact", "rows": len(vectors)}

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: np.ndarray, k: int, leaves_searched: int = 0) -> tuple[np.ndarray, np.ndarray]:
        del leaves_searched
        return exact(self._vectors, queries, k)


class Scann:
    """Search with ScaNN (Guo et al. 2020): a tree of sqrt(N) leaves, quantized scores, the best scored again."""

    def __init__(self, searcher: Any, facts: dict[str, Any], threads: int):
        self._searcher, self._rows, self._reorder = searcher, int(facts["rows"]), int(facts["reorder"])
        self.leaves = int(facts["leaves"])
        searcher.set_num_threads(threads)

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings, folder: epath.Path) -> dict[str, Any]:
        """Writes the shard; returns what its index.json is to say."""
        scann = _import_scann()
        leaves = max(1, int(len(vectors) ** 0.5))
        builder = (
            scann.builder(np.ascontiguousarray(vectors, np.float32), min(RECALL_AT, len(vectors)), "dot_product")
            # k-means++ from the sample: ScaNN's random start differs from process to process, even on one thread.
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
        with _without_notes():
            searcher = builder.build()
        searcher.serialize(str(folder), relative_path=True)
        return {"kind": "scann", "rows": len(vectors), "leaves": leaves, "reorder": settings.reorder}

    def __len__(self) -> int:
        return self._rows

    def search(self, queries: np.ndarray, k: int, leaves_searched: int) -> tuple[np.ndarray, np.ndarray]:
        # Who asks for many (photos with much to exclude) finds them only in leaves that hold as many.
        enough = -(-4 * k * self.leaves // self._rows)
        rows, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32),
            final_num_neighbors=k,
            pre_reorder_num_neighbors=max(self._reorder, k),
            leaves_to_search=min(max(leaves_searched, enough), self.leaves),
        )
        missing = np.isnan(scores)  # ScaNN fills up with row 0 and NaN
        return np.where(missing, -1, rows).astype(np.int32), np.where(missing, -np.inf, scores).astype(np.float32)


def _part(folder: epath.Path, shard: int, shards: int) -> epath.Path:
    return folder / f"{shard:05d}-of-{shards:05d}"


def _open(part: epath.Path, threads: int) -> Exact | Scann:
    facts = json.loads((part / "index.json").read_text())
    if facts["kind"] == "exact":
        vectors = records.open_array(part / "vectors.npy")
        if vectors.dtype == np.int8:
            return Exact(int8.Quantized(vectors, records.open_array(part / "scales.npy")))
        return Exact(vectors)
    scann = _import_scann()
    if (part / "scann_docids.pkl").exists():  # ScaNN would unpickle it, which runs whatever it says
        raise ValueError(f"{part} holds scann_docids.pkl, which no index of ours has: do not trust this folder")
    with _without_notes():
        return Scann(scann.load_searcher(str(part)), facts, threads)


def _tune(index: Shards, vectors: Vectors, settings: IndexSettings) -> None:
    """Searches twice as many leaves until recall, against exact search in all vectors, suffices."""
    facts = index.facts
    if not facts["leaves"]:
        facts["recall"] = 1.0
        return
    sample = np.unique(np.linspace(0, len(vectors) - 1, settings.sample).astype(np.int64))
    k = min(RECALL_AT + 1, len(vectors))  # each finds itself, which proves nothing: recall is of the others
    queries = vectors[sample]
    wanted, _ = exact(vectors, queries, k)
    while True:
        found, _ = index.search(queries, k)
        facts["recall"] = recall(found, wanted, wanted != sample[:, None])
        if facts["recall"] >= settings.min_recall:
            return
        if facts["leaves_searched"] == facts["leaves"]:
            raise IndexQualityError(
                f"ScaNN finds {facts['recall']:.4f} of the {RECALL_AT} nearest with all {facts['leaves']} leaves "
                f"searched, less than index.search.min_recall={settings.min_recall}: raise index.search.reorder "
                f"({settings.reorder}), or set index.search.kind=exact"
            )
        facts["leaves_searched"] = min(2 * facts["leaves_searched"], facts["leaves"])


def recall(found: Int32[np.ndarray, "n _"], wanted: Int32[np.ndarray, "n k"], counted: Any = True) -> float:
    """Returns the share of the wanted rows that were found. counted: [n, k], False for those that do not count."""
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2)
    counted = np.broadcast_to(counted, wanted.shape)
    return float((hits & counted).sum() / max(counted.sum(), 1))


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Keeps what C++ writes to stderr meanwhile, but for its notes on progress, which no log level turns off."""
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
            kept = (line for line in written if not line.startswith((b"I0", b"I1", b"WARNING: All log messages")))
            os.write(2, b"".join(kept))


def _import_scann() -> Any:
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind
