"""Search for leaked photos: evaluated photos that share id, image, coordinates or author with a gallery photo."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from geotoken_jax.analysis.coordinates import CoordinateTable
from geotoken_jax.gallery.exclude import gallery_names, have_source
from geotoken_jax.gallery.table import Table
from geotoken_jax.vectors import unit
from geotoken_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Leaks:
    """Gallery photos that share something with the n photos of a split.

    rows: kind of leak -> for each photo, the row of a gallery photo that leaks it, -1 if there is none. The kinds are
    "same id", "near-duplicate", "same coordinates" and "same author". cosine: cosine between the image embeddings of
    each photo and its most similar gallery photo; NaN if the photo has no embedding.
    """

    rows: Mapping[str, Int[np.ndarray, "n"]]
    cosine: Float32[np.ndarray, "n"]

    def leaked(self, *kinds: str) -> Bool[np.ndarray, "n"]:
        """Returns whether each photo has a leak of at least one of these kinds. Without arguments, all kinds count."""
        return np.any([self.rows[kind] >= 0 for kind in kinds or self.rows], axis=0)


def find_leaks(workdir: Workdir, truths: Mapping[str, CoordinateTable], above: float) -> dict[str, Leaks]:
    """Returns the leaked photos of every split, by comparison with the whole gallery. The gallery is read once.

    truths: photos by split, with authors in `extra`. above: cosine above which two photos are near-duplicates, see
    config.audit.leakage.cosine_above.
    """
    from geotoken_jax.gallery import index  # imports jax, which other functions of this module do not need

    gallery = workdir.gallery
    names = list(truths)
    ids = encoded([name for truth in truths.values() for name in truth.ids])
    authors = encoded([str(row["author"]) for truth in truths.values() for row in truth.extra])
    coordinates = np.concatenate([truth.coordinates for truth in truths.values()])
    queries = np.zeros((len(ids), gallery.width), np.float32)  # a photo without an embedding stays zero: cosine NaN
    starts = np.cumsum([0, *(len(truth.ids) for truth in truths.values())])
    for split, first in zip(names, starts, strict=False):
        table = workdir.table(split)
        row = match(encoded(truths[split].ids), table.ids())
        embedded = np.flatnonzero(row >= 0)
        queries[first + embedded] = unit(table.embeddings(row[embedded])[:, 0])
    nearest, cosine = (column[:, 0] for column in index.exact(_GalleryImages(gallery), queries, 1))
    cosine = np.where(queries.any(axis=1), cosine, np.nan)
    sourced = np.repeat([have_source(workdir.table(split)) for split in names], np.diff(starts))

    def matched(column: str, values: np.ndarray) -> np.ndarray:
        found = np.full(len(values), -1)
        for flag in np.unique(sourced):
            found[sourced == flag] = match(values[sourced == flag], gallery_names(gallery, column, bool(flag)))
        return found

    rows = {
        "same id": matched("ids", ids),
        "near-duplicate": np.where(cosine > above, nearest, -1),
        "same coordinates": match(_complex(coordinates), _complex(gallery.coordinates())),
        "same author": np.where(authors != b"", matched("authors", authors), -1),
    }
    parts = {split: slice(starts[i], starts[i + 1]) for i, split in enumerate(names)}
    return {split: Leaks({kind: of[part] for kind, of in rows.items()}, cosine[part]) for split, part in parts.items()}


def match(wanted: Shaped[np.ndarray, "n"], among: Shaped[np.ndarray, "m"]) -> Int[np.ndarray, "n"]:
    """Returns, for each value of `wanted`, the index of the first equal value in `among`; -1 if there is none."""
    order = np.argsort(among, kind="stable")
    at = np.searchsorted(among, wanted, sorter=order)
    rows = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(wanted), int)
    return np.where(among[rows] == wanted, rows, -1) if len(order) else rows - 1


def encoded(ids: Sequence[str]) -> Shaped[np.ndarray, "n"]:
    """Returns ids or authors as fixed-width bytes, the form that tables store."""
    return np.array([name.encode() for name in ids], np.bytes_)


class _GalleryImages:
    """Image embeddings of the gallery, scaled to length 1 when they are read (gallery.index.Vectors)."""

    def __init__(self, gallery: Table):
        self._gallery = gallery

    def __len__(self) -> int:
        return len(self._gallery)

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "n C"]:
        return unit(self._gallery.embeddings(rows)[:, 0])


def _complex(coordinates: np.ndarray) -> Shaped[np.ndarray, "n"]:
    """Returns latitude + i longitude, so that `match` compares both at once."""
    return coordinates[:, 0] + 1j * coordinates[:, 1]
