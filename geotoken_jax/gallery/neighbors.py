"""A photo's neighbors in the gallery, less those that a rule excludes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index

#: More neighbors asked for than wanted: first, and at most (an album can fill the first hundreds).
_MARGIN, _LARGEST_MARGIN = 8, 2048


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
