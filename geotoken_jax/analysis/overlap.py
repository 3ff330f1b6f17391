"""Which evaluated photos the gallery already knows: by id, picture, place or author."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from geotoken_jax import records
from geotoken_jax.analysis.coordinates import CoordinateTable
from geotoken_jax.artifacts import Workdir
from geotoken_jax.gallery.table import Table
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class Leaks:
    """The gallery photo that each photo of a split leaks from, by kind: a row of the gallery, -1 for none.

    cosine: of each photo's image embedding with the most similar one of the gallery; NaN where it has no embedding.
    """

    rows: Mapping[str, Int[np.ndarray, "n"]]
    cosine: Float32[np.ndarray, "n"]

    def leaked(self, *kinds: str) -> Bool[np.ndarray, "n"]:
        """Says which photos are leaked in one of these ways, or of all ways where none is named."""
        return np.any([self.rows[kind] >= 0 for kind in kinds or self.rows], axis=0)


def find(workdir: Workdir, truths: Mapping[str, CoordinateTable], above: float) -> dict[str, Leaks]:
    """Compares the photos of all splits with the whole gallery of a work directory, which is read once.

    truths: by split, with each photo's author in `extra`. above: see config.audit.leakage.
    """
    from geotoken_jax.gallery import index  # and jax with it

    gallery = workdir.gallery
    names = list(truths)
    ids = encoded([name for truth in truths.values() for name in truth.ids])
    authors = encoded([str(row["author"]) for truth in truths.values() for row in truth.extra])
    coordinates = np.concatenate([truth.coordinates for truth in truths.values()])
    queries = np.zeros((len(ids), gallery.width), np.float32)  # a photo without an embedding is near nothing
    starts = np.cumsum([0, *(len(truth.ids) for truth in truths.values())])
    for split, first in zip(names, starts, strict=False):
        own = workdir.table(split)
        row = match(encoded(truths[split].ids), own.ids())
        has = np.flatnonzero(row >= 0)
        queries[first + has] = unit(own.embeddings(row[has])[:, 0])
    nearest, cosine = (found[:, 0] for found in index.exact(_Images(gallery), queries, 1))
    cosine = np.where(queries.any(axis=1), cosine, np.nan)
    rows = {
        "same id": match(ids, gallery.ids()),
        "near-duplicate": np.where(cosine > above, nearest, -1),
        "same coordinates": match(_complex(coordinates), _complex(gallery.coordinates())),
        "same author": np.where(authors != b"", match(authors, gallery.authors()), -1),
    }
    parts = {split: slice(starts[i], starts[i + 1]) for i, split in enumerate(names)}
    return {split: Leaks({kind: of[part] for kind, of in rows.items()}, cosine[part]) for split, part in parts.items()}


def match(wanted: Shaped[np.ndarray, "n"], among: Shaped[np.ndarray, "m"]) -> Int[np.ndarray, "n"]:
    """Returns the first row of `among` that equals each value, -1 where none does."""
    order = np.argsort(among, kind="stable")
    at = np.searchsorted(among, wanted, sorter=order)
    rows = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(wanted), int)
    return np.where(among[rows] == wanted, rows, -1) if len(order) else rows - 1


def encoded(ids: Sequence[str]) -> Shaped[np.ndarray, "n"]:
    """Returns ids or authors as tables hold them."""
    return np.array([name.encode() for name in ids], f"S{records.ID_BYTES}")


class _Images:
    """The gallery's image embeddings as of length 1 (index.Vectors), made as they are read."""

    def __init__(self, gallery: Table):
        self._gallery = gallery

    def __len__(self) -> int:
        return len(self._gallery)

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "n C"]:
        return unit(self._gallery.embeddings(rows)[:, 0])


def _complex(coordinates: np.ndarray) -> Shaped[np.ndarray, "n"]:
    """Returns one number a coordinate, so that pairs are compared as wholes."""
    return coordinates[:, 0] + 1j * coordinates[:, 1]
