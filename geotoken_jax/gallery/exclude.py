"""Rules that exclude gallery photos from the neighbors of a photo. Any number of rules can be combined."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from geotoken_jax import records
from geotoken_jax.gallery.table import Table
from geotoken_jax.settings import Added, SettingsError
from geotoken_jax.vectors import unit

#: Pairs of photos compared at a time. Reading 16,384 rows of three bfloat16 vectors of width 768 takes 75 MB.
_PAIRS = 16_384
#: Queries, and gallery rows, in a block of compared pairs: 17 MB of float32 cosines.
_BLOCK = 2048
#: Value of ExcludeSettings.source that stands for the source of the photo itself.
OWN = "own"


@dataclasses.dataclass(frozen=True)
class ExcludeSettings:
    """Gallery photos excluded from a photo's neighbors, in addition to the photo itself.

    author: if true, photos by the same author are excluded.
    cosine_above: threshold in [-1, 1]. A gallery photo is excluded as a near duplicate if the cosine of its image
    embedding and the photo's is above the threshold. If 1, near duplicates stay.
    within_km: distance in km, at least 0. Gallery photos closer than this are excluded. If 0, distance does not matter.
    source: name of one of several sources (config.photos.sources), whose photos are excluded. If "own", photos of the
    photo's own source are excluded; a benchmark has no source. If empty, photos of all sources stay.
    """

    author: bool
    cosine_above: float
    within_km: float
    source: Annotated[str, Added("")]

    def __post_init__(self):
        if not -1 <= self.cosine_above <= 1:
            raise ValueError(
                f"cosine_above is {self.cosine_above}: choose a cosine in [-1, 1], or 1 to keep near duplicates"
            )
        if not self.within_km >= 0:
            raise ValueError(f"within_km is {self.within_km}: choose a distance above 0, or 0 to exclude none")


class Excluded(NamedTuple):
    """Gallery photos excluded from the neighbors of a photo that is in no table.

    author: photos by this author are excluded; none if empty. ids: photos with these ids are excluded.
    """

    author: str = ""
    ids: tuple[str, ...] = ()


class Exclusion(Protocol):
    """A rule that excludes gallery rows from the neighbors of queries."""

    def __call__(self, queries: Int[np.ndarray, "n"], rows: Int[np.ndarray, "n m"]) -> Bool[np.ndarray, "n m"]:
        """Returns True for each row that is excluded; the value at a row of -1 (no neighbor) does not matter.

        queries: indices into the queries that the rule was made for. rows: gallery rows to test for each query.
        """
        ...


class SameId:
    """Excludes the query photo itself, recognized by its id. It need not be the first neighbor: a duplicate of the
    photo can come before it."""

    def __init__(self, query_ids: np.ndarray, gallery_ids: np.ndarray):
        self._queries, self._gallery = np.asarray(query_ids), np.asarray(gallery_ids)

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self._gallery[rows] == self._queries[queries][:, None]


class ListedIds:
    """Excludes photos by their ids. query_ids: for each query, an array of the ids to exclude, as bytes."""

    def __init__(self, query_ids: Sequence[np.ndarray], gallery_ids: np.ndarray):
        self._queries, self._gallery = query_ids, gallery_ids

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        excluded = [np.isin(self._gallery[row], self._queries[query]) for query, row in zip(queries, rows, strict=True)]
        return np.array(excluded, bool).reshape(rows.shape)


class SameAuthor:
    """Excludes photos by the query's author. If the author is unknown (empty), nothing is excluded."""

    def __init__(self, query_authors: np.ndarray, gallery_authors: np.ndarray):
        self._queries, self._gallery = np.asarray(query_authors), np.asarray(gallery_authors)

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        author = self._queries[queries][:, None]
        return (self._gallery[rows] == author) & (author != author.dtype.type())


class SameSource(SameAuthor):
    """Excludes photos of one source. The arguments are the source excluded for each query (if empty, nothing is
    excluded), and the source of each gallery photo."""


class NearDuplicate:
    """Excludes photos whose image embedding has a cosine above a threshold with the image embedding of the query.

    query_images: image embeddings [n, C], not necessarily unit vectors; a query of zeros has no duplicates.
    gallery_images: function of gallery rows [m] that returns image embeddings [m, C], not necessarily unit vectors.
    cosine_above: the threshold.
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
            query_images = unit(self._queries[queries[at[0]]])
            excluded[at] = (query_images * unit(self._gallery(rows[at]))).sum(-1) > self._above
        return excluded


class Within:
    """Excludes photos closer to the query than `km`. Coordinates are latitude and longitude in degrees."""

    def __init__(
        self,
        query_coordinates: Float[np.ndarray, "n 2"],
        gallery_coordinates: Float[np.ndarray, "N 2"],
        km: float,
    ):
        self._queries, self._gallery, self._km = query_coordinates, gallery_coordinates, km

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        from geotoken_jax.geo.distance import great_circle_km  # here, because it imports jax

        latitude, longitude = np.moveaxis(self._queries[queries], -1, 0)[..., None]
        km = great_circle_km(latitude, longitude, *np.moveaxis(self._gallery[rows], -1, 0))
        return np.asarray(km) < self._km


def exclusions_of(excluded: Sequence[Excluded], gallery: Table) -> list[Exclusion]:
    """Returns the exclusion rules for photos that are in no table. excluded: gallery photos to exclude, per photo."""
    rules: list[Exclusion] = []
    if any(one.author for one in excluded):
        rules.append(SameAuthor(np.array([one.author.encode() for one in excluded], np.bytes_), gallery.authors()))
    if any(one.ids for one in excluded):
        ids = [np.array([name.encode() for name in one.ids], np.bytes_) for one in excluded]
        rules.append(ListedIds(ids, gallery.ids()))
    return rules


def affected(
    exclude: ExcludeSettings, queries: Table, gallery: Table
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "N"]]:
    """Returns which queries have excluded gallery photos, and which gallery rows are excluded for any query.

    Only the rules that `exclude` turns on count, not SameId. They are applied to all gallery photos, not only to
    neighbors.
    """
    photos, rows = np.zeros(len(queries), bool), np.zeros(len(gallery), bool)
    pairs = []
    if exclude.author:
        pairs.append((queries.authors(), gallery_names(gallery, "authors", have_source(queries))))
    if exclude.source:
        pairs.append((_excluded_sources(exclude, queries), gallery.sources()))
    for own, others in pairs:
        own_known = own[own != own.dtype.type()]
        photos |= np.isin(own, others[others != others.dtype.type()])
        rows |= np.isin(others, own_known)
    if exclude.within_km > 0:
        within = Within(queries.coordinates(), gallery.coordinates(), exclude.within_km)
        _add_pairs(photos, rows, lambda block: lambda some: within(some, np.tile(block, (len(some), 1))))
    if exclude.cosine_above < 1:
        images = unit(queries.embeddings()[:, 0])

        def duplicates(block: np.ndarray) -> _ExcludedFor:
            others = unit(gallery.embeddings(block)[:, 0]).T
            return lambda some: images[some] @ others > exclude.cosine_above

        _add_pairs(photos, rows, duplicates)
    return photos, rows


#: Function from numbers of queries [q] to booleans [q, m]: whether each query excludes each of m gallery rows.
_ExcludedFor = Callable[[np.ndarray], np.ndarray]


def _add_pairs(
    photos: Bool[np.ndarray, "n"], rows: Bool[np.ndarray, "N"], excluded: Callable[[np.ndarray], _ExcludedFor]
) -> None:
    """Sets `photos` to True for queries, and `rows` to True for gallery rows, that are in an excluded pair.

    excluded: function from gallery rows [m] to the _ExcludedFor of these rows.
    """
    for first in range(0, len(rows), _BLOCK):
        block = np.arange(first, min(first + _BLOCK, len(rows)))
        excluded_for = excluded(block)
        for start in range(0, len(photos), _BLOCK):
            some = np.arange(start, min(start + _BLOCK, len(photos)))
            pairs = excluded_for(some)
            photos[some] |= pairs.any(axis=1)
            rows[block] |= pairs.any(axis=0)


def have_source(queries: Table) -> bool:
    """Returns whether the photos of a split are from one of several sources. The photos of a benchmark are not."""
    return bool(queries.sources(slice(0, 1)).any())


def gallery_columns(gallery: Table, sourced: bool, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Returns the columns of gallery rows that `exclusions` needs: ids, authors, coordinates and sources.

    sourced: see `gallery_names`.
    """
    names = {column: gallery_names(gallery, column, sourced, rows) for column in ("ids", "authors")}
    return {**names, "coordinates": gallery.coordinates(rows), "sources": gallery.sources(rows)}


def gallery_names(gallery: Table, column: str, sourced: bool, rows: slice = slice(None)) -> np.ndarray:
    """Returns the ids or the authors of gallery rows, to compare them with other photos.

    If the gallery has several sources, ids and authors begin with the name of a source and `/`. To compare them with
    the photos of a benchmark, this beginning is removed. column: "ids" or "authors". sourced: result of `have_source`
    for the compared photos.
    """
    names = getattr(gallery, column)(rows)
    return names if sourced or "sources" not in gallery.stored else without_source(names)


def without_source(names: np.ndarray) -> np.ndarray:
    """Returns names without their beginning up to the first `/`. names: ids or authors of photos of several sources."""
    width = names.dtype.itemsize
    letters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), width)
    start = (letters == ord("/")).argmax(1) + 1
    at = np.arange(width) + start[:, None]
    shifted = np.take_along_axis(letters, np.minimum(at, width - 1), 1)
    return np.where(at < width, shifted, np.uint8(0)).view(names.dtype)[:, 0]


def _excluded_sources(exclude: ExcludeSettings, queries: Table, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """Returns the source that is excluded for each photo, empty if none."""
    own = queries.sources(rows)
    return own if exclude.source == OWN else np.full(len(own), exclude.source.encode(), f"S{records.SOURCE_BYTES}")


def check_source(exclude: ExcludeSettings, key: str, gallery: Table) -> None:
    """Raises SettingsError if a rule excludes a source that the gallery does not have. key: dotted key of the rules."""
    if not exclude.source:
        return
    if "sources" not in gallery.stored:
        raise SettingsError(
            f"config.{key}.source is {exclude.source!r}, but the gallery has one source: set it to '', or prepare "
            "photos of several sources (config.photos.sources)"
        )
    sources = [name.decode() for name in np.unique(gallery.sources()).tolist()]
    if exclude.source not in (OWN, *sources):
        raise SettingsError(
            f"config.{key}.source is {exclude.source!r}: use {OWN}, one of {', '.join(sources)}, or '' for no source"
        )


def exclusions(
    exclude: ExcludeSettings,
    queries: Table,
    rows: slice | Int[np.ndarray, "n"],
    gallery: Mapping[str, np.ndarray],
    gallery_images: Callable[[np.ndarray], np.ndarray],
) -> list[Exclusion]:
    """Returns the exclusion rules for photos of a split: always SameId, and those that `exclude` turns on.

    queries: table of the split. rows: rows of the photos in that table. gallery: result of `gallery_columns`.
    gallery_images: function of gallery rows [m] that returns image embeddings [m, C].
    """
    exclusions: list[Exclusion] = [SameId(queries.ids(rows), gallery["ids"])]
    if exclude.author:
        exclusions.append(SameAuthor(queries.authors(rows), gallery["authors"]))
    if exclude.source:
        exclusions.append(SameSource(_excluded_sources(exclude, queries, rows), gallery["sources"]))
    if exclude.within_km > 0:
        exclusions.append(Within(queries.coordinates(rows), gallery["coordinates"], exclude.within_km))
    if exclude.cosine_above < 1:
        exclusions.append(NearDuplicate(queries.embeddings(rows)[:, 0], gallery_images, exclude.cosine_above))
    return exclusions
