"""A photo's neighbors in the gallery, less those that a rule excludes."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from geotoken_jax.gallery.index import Index
from geotoken_jax.geo.distance import great_circle_km

#: More neighbors asked for than wanted: first, and at most (an album can fill the first hundreds).
_MARGIN, _LARGEST_MARGIN = 8, 2048
#: Pairs of photos compared at a time: 16,384 of three vectors of 768 are 75 MB as they are read.
_PAIRS = 16_384


class Exclusion(Protocol):
    """Says which gallery rows may not be neighbors of which queries."""

    def __call__(self, queries: Int[np.ndarray, "n"], rows: Int[np.ndarray, "n m"]) -> Bool[np.ndarray, "n m"]:
        """queries: their numbers. rows: gallery rows found for each; entries of -1 may be answered either way."""
        ...


class SameId:
    """Excludes the photo itself, by its id: a duplicate of it can outrank it."""

    def __init__(self, query_ids: np.ndarray, gallery_ids: np.ndarray):
        self._queries, self._gallery = np.asarray(query_ids), np.asarray(gallery_ids)

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._gallery[rows] == self._queries[queries][:, None]


class SameAuthor:
    """Excludes the photos of the query's author; an unknown author (empty) is nobody's."""

    def __init__(self, query_authors: np.ndarray, gallery_authors: np.ndarray):
        self._queries, self._gallery = np.asarray(query_authors), np.asarray(gallery_authors)

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        author = self._queries[queries][:, None]
        return (self._gallery[rows] == author) & (author != author.dtype.type())


class NearDuplicate:
    """Excludes photos whose image embedding has a cosine with the query's above a threshold.

    query_images: [n, C]. gallery_images: rows [m] -> [m, C]. Of any length; a query of zeros is nobody's duplicate.
    """

    def __init__(
        self,
        query_images: Float[np.ndarray, "n C"],
        gallery_images: Callable[[np.ndarray], np.ndarray],
        cosine_above: float,
    ):
        self._queries, self._gallery, self._above = query_images, gallery_images, cosine_above

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        excluded = np.zeros(rows.shape, bool)
        query, column = np.nonzero(rows >= 0)
        for first in range(0, len(query), _PAIRS):
            at = query[first : first + _PAIRS], column[first : first + _PAIRS]
            own = _unit(self._queries[queries[at[0]]])
            excluded[at] = (own * _unit(self._gallery(rows[at]))).sum(-1) > self._above
        return excluded


class Within:
    """Excludes photos nearer to the query than a distance in km; coordinates [n, 2] and [N, 2] are in degrees."""

    def __init__(
        self,
        query_coordinates: Float[np.ndarray, "n 2"],
        gallery_coordinates: Float[np.ndarray, "N 2"],
        km: float,
    ):
        self._queries, self._gallery, self._km = query_coordinates, gallery_coordinates, km

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        latitude, longitude = np.moveaxis(self._queries[queries], -1, 0)[..., None]
        km = great_circle_km(latitude, longitude, *np.moveaxis(self._gallery[rows], -1, 0))
        return np.asarray(km) < self._km


def find(
    index: Index, query_vectors: Float32[np.ndarray, "n D"], k: int, exclude: Sequence[Exclusion] = ()
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns gallery rows and scores of each query's k neighbors, best first; -1 and -inf where fewer are left.

    exclude: a row is dropped if any rule excludes it. Queries left with fewer than k are asked for again, with a larger
    margin, until they have k, the gallery has no more, or the margin has reached 2,048.
    """
    rows = np.full((len(query_vectors), k), -1, np.int32)
    scores = np.full((len(query_vectors), k), -np.inf, np.float32)
    queries = np.arange(len(query_vectors))
    margin = _MARGIN if exclude else 0
    while len(queries):
        found, score = index.search(query_vectors[queries], k + margin)
        kept = found >= 0
        for rule in exclude:
            kept &= ~rule(queries, found)
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k]  # those kept, in their order, before those dropped
        kept_first = np.take_along_axis(kept, first, axis=1)
        rows[queries] = np.where(kept_first, np.take_along_axis(found, first, axis=1), -1)
        scores[queries] = np.where(kept_first, np.take_along_axis(score, first, axis=1), -np.inf)
        if not exclude or margin >= _LARGEST_MARGIN:
            break
        queries = queries[~kept_first.all(axis=1) & (found >= 0).all(axis=1)]
        margin = min(4 * margin, _LARGEST_MARGIN)
    return rows, scores


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
