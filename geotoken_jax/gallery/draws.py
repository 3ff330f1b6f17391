"""Draws gallery photos at random: of each author, all photos or none."""

import numpy as np


def rows_by_author(authors: np.ndarray, photos: int, seed: int) -> np.ndarray:
    """Returns the rows of all photos by randomly drawn authors, grouped by author.

    Authors are drawn until they have at least `photos` photos in total, or half of all photos if `photos` is more than
    that. Each photo with an unknown author counts as the only photo of an author of its own.

    authors: author of each photo as bytes, empty if unknown.
    """
    _, author = np.unique(authors, return_inverse=True)
    unknown = authors == authors.dtype.type()
    author = np.where(unknown, author.max() + 1 + np.arange(len(authors)), author)
    rank = np.random.default_rng(seed).permutation(author.max() + 1)[author]
    order = np.argsort(rank, kind="stable")
    ends = np.flatnonzero(np.diff(rank[order], append=-1)) + 1
    wanted = min(photos, len(authors) // 2)
    return order[: ends[np.searchsorted(ends, wanted)]] if wanted < len(authors) else order
