"""The neighbors of photos in the gallery, without those that a rule excludes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index, merge

#: Number of neighbors beyond k that are searched to replace excluded ones: in the first search, and at most. The first
#: hundreds of a query's neighbors can all be photos of one album.
_MARGIN, _LARGEST_MARGIN = 8, 2048


#: Rows [n, k] and scores [n, k] of neighbors, best first; -1 and -inf if there are fewer.
Neighbors = tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]


def search_neighbors(
    index: Index,
    query_vectors: Float32[np.ndarray, "n D"],
    k: int,
    exclude: Sequence[Exclusion] = (),
    least: Float32[np.ndarray, " n"] | None = None,
) -> Neighbors:
    """Returns gallery rows and scores of each query's k nearest neighbors that no rule excludes, best first.

    If fewer than k remain, the last rows are -1 and their scores -inf.

    exclude: rules; a neighbor is dropped if any rule excludes it. A query with fewer than k neighbors left is searched
    again with more candidates. This ends when it has k neighbors, or when the candidates are the whole gallery, or when
    they are k + 2,048.
    least: smallest score of a neighbor, per query. Gallery photos with smaller scores are no neighbors. If None, there
    is no such limit.
    """
    rows = np.full((len(query_vectors), k), -1, np.int32)
    scores = np.full((len(query_vectors), k), -np.inf, np.float32)
    queries = np.arange(len(query_vectors))
    margin = _MARGIN if exclude else 0
    while len(queries):
        candidates, candidate_scores = index.search(query_vectors[queries], k + margin)
        if least is not None:
            candidates = np.where(candidate_scores < least[queries, None], -1, candidates)
        allowed = candidates >= 0
        for rule in exclude:
            allowed &= ~rule(queries, candidates)
        first = np.argsort(~allowed, axis=1, kind="stable")[:, :k]  # allowed candidates first, best first
        present = np.take_along_axis(allowed, first, axis=1)
        rows[queries] = np.where(present, np.take_along_axis(candidates, first, axis=1), -1)
        scores[queries] = np.where(present, np.take_along_axis(candidate_scores, first, axis=1), -np.inf)
        if not exclude or margin >= _LARGEST_MARGIN:
            break
        queries = queries[~present.all(axis=1) & (candidates >= 0).all(axis=1)]
        margin = min(4 * margin, _LARGEST_MARGIN)
    return rows, scores


def merge_neighbors(one: Neighbors, other: Neighbors) -> Neighbors:
    """Returns the k best neighbors of two searches for k neighbors each. A photo that both found counts once."""
    rows, scores = other
    repeated = (rows[:, :, None] == one[0][:, None, :]).any(axis=2)
    unique = np.where(repeated, -1, rows), np.where(repeated, -np.inf, scores).astype(np.float32)
    return merge([one, unique], rows.shape[1])
