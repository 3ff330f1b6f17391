"""The neighbors of photos in the gallery, without those that a rule excludes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index

#: Neighbors searched beyond k, to replace excluded ones: at first and at most. One album can fill the first hundreds of
#: a query's neighbors.
_MARGIN, _LARGEST_MARGIN = 8, 2048


def search_neighbors(
    index: Index, query_vectors: Float32[np.ndarray, "n D"], k: int, exclude: Sequence[Exclusion] = ()
) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns gallery rows and scores of each query's k nearest neighbors that no rule excludes, best first.

    If fewer than k remain, the last rows are -1 and their scores -inf.

    exclude: rules; a neighbor is dropped if any rule excludes it. Queries left with fewer than k neighbors are searched
    again with more candidates: until they have k, the gallery is exhausted, or k + 2,048 candidates were searched.
    """
    rows = np.full((len(query_vectors), k), -1, np.int32)
    scores = np.full((len(query_vectors), k), -np.inf, np.float32)
    queries = np.arange(len(query_vectors))
    margin = _MARGIN if exclude else 0
    while len(queries):
        candidates, candidate_scores = index.search(query_vectors[queries], k + margin)
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
