"""Search for the gallery's photos nearest to a photo: exactly, or with ScaNN; one interface."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int32

#: Rows of a product at a time: 512 queries against 65,536 rows are 134 MB of scores.
_QUERIES, _ROWS = 512, 65_536
#: Neighbors whose recall is measured.
_RECALL_AT = 15


class IndexQualityError(RuntimeError):
    """The index does not find the neighbors that exact search finds."""


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """How the gallery is searched.

    kind: scann or exact. leaves_searched: of the sqrt(N) leaves of ScaNN's tree, to begin with. reorder: candidates
    that are scored again exactly. threads: of a search. min_recall: least share of the 15 nearest that must be found,
    in [0, 1]. sample: gallery photos on which that is measured.
    """

    kind: str
    leaves_searched: int
    reorder: int
    threads: int
    min_recall: float
    sample: int


class Index(Protocol):
    """A searchable set of vectors. facts: what is worth keeping in a manifest."""

    facts: dict[str, str | int | float]

    def search(
        self, queries: Float32[np.ndarray, "n D"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns the rows of the k largest inner products and these products, best first; -1 and -inf where fewer."""
        ...

    def save(self, folder: epath.PathLike) -> None:
        """Writes the index; the folder can be moved, and `load` needs nothing else."""
        ...


def build(vectors: Float32[np.ndarray, "N D"], settings: IndexSettings) -> Index:
    """Returns an index of the vectors; exact, saying so, where ScaNN is asked for and not installed (it has no macOS).

    Raises IndexQualityError, with the figures, if recall stays below min_recall with all leaves searched.
    """
    if settings.kind not in ("scann", "exact"):
        raise ValueError(f"index.kind is {settings.kind!r}: it must be 'scann' or 'exact'")
    if settings.kind == "scann":
        try:
            return Scann.build(vectors, settings)
        except ImportError as error:
            print(
                f"ScaNN is not available ({error}): searching exactly, which is slower and finds no less",
                file=sys.stderr,
            )
    return Exact(vectors)


def load(folder: epath.PathLike, threads: int) -> Index:
    """Opens a saved index.

    Raises FileNotFoundError if there is none, ImportError if it is ScaNN's and ScaNN is not installed.
    """
    folder = epath.Path(folder)
    facts = json.loads((folder / "index.json").read_text())
    if facts["kind"] == "exact":
        return Exact(np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False))
    return Scann.load(folder, facts, threads)


def exact(
    vectors: Float[np.ndarray, "N D"], queries: Float[np.ndarray, "n D"], k: int
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns rows and scores of the k largest inner products, best first, equal ones by row; -1 and -inf past N.

    Blocked over queries and vectors, so `vectors` may be a memory map of any length.
    """
    rows = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for q in range(0, len(queries), _QUERIES):
        block = jnp.asarray(queries[q : q + _QUERIES], jnp.float32)
        best = (jnp.zeros((len(block), 0), jnp.float32), jnp.zeros((len(block), 0), jnp.int32))
        for v in range(0, len(vectors), _ROWS):
            best = _merge(block, jnp.asarray(vectors[v : v + _ROWS], jnp.float32), *best, v, k)
        found = best[0].shape[1]
        scores[q : q + _QUERIES, :found], rows[q : q + _QUERIES, :found] = best
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


class Exact:
    """Exact search."""

    def __init__(self, vectors: Float[np.ndarray, "N D"]):
        self._vectors = vectors
        self.facts: dict[str, str | int | float] = {"kind": "exact", "recall": 1.0}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact(self._vectors, queries, k)

    def save(self, folder: epath.PathLike) -> None:
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "vectors.npy").open("wb") as file:
            np.save(file, np.asarray(self._vectors, np.float32))
        (folder / "index.json").write_text(json.dumps(self.facts))


class Scann:
    """Search with ScaNN (Guo et al. 2020): a tree of sqrt(N) leaves, quantized scores, the best scored again."""

    def __init__(self, searcher: Any, facts: dict[str, str | int | float], threads: int):
        self._searcher, self.facts = searcher, facts
        searcher.set_num_threads(threads)

    @classmethod
    def build(cls, vectors: Float32[np.ndarray, "N D"], settings: IndexSettings) -> "Scann":
        """Raises IndexQualityError; ImportError if ScaNN is not installed."""
        scann = _import_scann()
        vectors = np.ascontiguousarray(vectors, np.float32)
        leaves = max(1, int(len(vectors) ** 0.5))
        searched = min(settings.leaves_searched, leaves)
        builder = (
            scann.builder(vectors, min(_RECALL_AT, len(vectors)), "dot_product")
            # k-means++ from all rows: ScaNN's random start differs from process to process, even on one thread.
            .tree(leaves, searched, training_sample_size=len(vectors), random_init=False)
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(settings.reorder)
        )
        with _without_notes():
            searcher = builder.build()
        facts = {"kind": "scann", "leaves": leaves, "leaves_searched": searched, "reorder": settings.reorder}
        index = cls(searcher, facts, settings.threads)
        index._tune(vectors, settings)
        return index

    @classmethod
    def load(cls, folder: epath.Path, facts: dict[str, str | int | float], threads: int) -> "Scann":
        scann = _import_scann()
        if (folder / "scann_docids.pkl").exists():  # ScaNN would unpickle it, which runs whatever it says
            raise ValueError(f"{folder} holds scann_docids.pkl, which no index of ours has: do not trust this folder")
        return cls(scann.load_searcher(str(folder)), facts, threads)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32),
            final_num_neighbors=k,
            pre_reorder_num_neighbors=max(int(self.facts["reorder"]), k),
            leaves_to_search=int(self.facts["leaves_searched"]),
        )
        missing = np.isnan(scores)  # ScaNN fills up with row 0 and NaN
        return np.where(missing, -1, rows).astype(np.int32), np.where(missing, -np.inf, scores).astype(np.float32)

    def save(self, folder: epath.PathLike) -> None:
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._searcher.serialize(str(folder), relative_path=True)
        (folder / "index.json").write_text(json.dumps(self.facts))

    def _tune(self, vectors: np.ndarray, settings: IndexSettings) -> None:
        """Searches twice as many leaves until recall suffices."""
        sample = np.unique(np.linspace(0, len(vectors) - 1, settings.sample).astype(np.int64))
        k = min(_RECALL_AT + 1, len(vectors))  # each finds itself, which proves nothing: recall is of the others
        wanted, _ = exact(vectors, vectors[sample], k)
        while True:
            found, _ = self.search(vectors[sample], k)
            self.facts["recall"] = recall = _recall(found, wanted, sample)
            if recall >= settings.min_recall:
                return
            searched, leaves = int(self.facts["leaves_searched"]), int(self.facts["leaves"])
            if searched == leaves:
                raise IndexQualityError(
                    f"ScaNN finds {recall:.4f} of the {_RECALL_AT} nearest with all {leaves} leaves searched, less "
                    f"than index.min_recall={settings.min_recall}: raise index.reorder ({settings.reorder}), or set "
                    "index.kind=exact"
                )
            self.facts["leaves_searched"] = min(2 * searched, leaves)


def _recall(found: np.ndarray, wanted: np.ndarray, own: np.ndarray) -> float:
    others = wanted != own[:, None]
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2)
    return float((hits & others).sum() / max(others.sum(), 1))


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
