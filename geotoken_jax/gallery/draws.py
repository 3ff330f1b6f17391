"""Random draws of gallery photos by whole authors."""

import numpy as np


def rows_by_author(authors: np.ndarray, photos: int, seed: int) -> np.ndarray:
    """Returns the rows of all photos by randomly drawn authors, grouped by author.

    Authors are drawn until they have `photos` photos in all, or half of all photos if that is less. A photo without an
    author counts as an author with one photo.
    """
    _, author = np.unique(authors, return_inverse=True)
    unknown = authors == authors.dtype.type()
    author = np.where(unknown, author.max() + 1 + np.arange(len(authors)), author)
    rank = np.random.default_rng(seed).permutation(author.max() + 1)[author]
    order = np.argsort(rank, kind="stable")
    ends = np.flatnonzero(np.diff(rank[order], append=-1)) + 1
    wanted = min(photos, len(authors) // 2)
    return order[: ends[np.searchsorted(ends, wanted)]] if wanted < len(authors) else order
