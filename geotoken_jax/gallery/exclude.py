"""Rules that say which gallery photos may not be neighbors of a photo; they compose."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from geotoken_jax.gallery.table import Table
from geotoken_jax.vectors import unit

#: Pairs of photos compared at a time: 16,384 of three vectors of 768 are 75 MB as they are read.
_PAIRS = 16_384


@dataclasses.dataclass(frozen=True)
class ExcludeSettings:
    """Gallery photos that are no neighbors of a photo, beside itself.

    author: those of its author. cosine_above: those whose image embedding has a higher cosine with its own (near
    duplicates); 1 for none. within_km: those taken nearer to it; 0 for none.
    """

    author: bool
    cosine_above: float
    within_km: float

    def __post_init__(self):
        if not -1 <= self.cosine_above <= 1:
            raise ValueError(f"cosine_above is {self.cosine_above}: it must be in [-1, 1], and 1 for none")
        if not self.within_km >= 0:
            raise ValueError(f"within_km is {self.within_km}: it must be 0 (for none) or more")


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
            own = unit(self._queries[queries[at[0]]])
            excluded[at] = (own * unit(self._gallery(rows[at]))).sum(-1) > self._above
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
        from geotoken_jax.geo.distance import great_circle_km  # and jax with it

        latitude, longitude = np.moveaxis(self._queries[queries], -1, 0)[..., None]
        km = great_circle_km(latitude, longitude, *np.moveaxis(self._gallery[rows], -1, 0))
        return np.asarray(km) < self._km


def rules(
    exclude: ExcludeSettings,
    own: Table,
    part: slice | Int[np.ndarray, "n"],
    of_gallery: Mapping[str, np.ndarray],
    gallery_images: Callable[[np.ndarray], np.ndarray],
) -> list[Exclusion]:
    """Returns the rules for some rows of a split's table: a photo is never its own neighbor, and what `exclude` says.

    of_gallery: ids, authors and coordinates of the rows that are searched. gallery_images: such rows [m] -> [m, C].
    """
    found: list[Exclusion] = [SameId(own.ids(part), of_gallery["ids"])]
    if exclude.author:
        found.append(SameAuthor(own.authors(part), of_gallery["authors"]))
    if exclude.within_km > 0:
        found.append(Within(own.coordinates(part), of_gallery["coordinates"], exclude.within_km))
    if exclude.cosine_above < 1:
        found.append(NearDuplicate(own.embeddings(part)[:, 0], gallery_images, exclude.cosine_above))
    return found
