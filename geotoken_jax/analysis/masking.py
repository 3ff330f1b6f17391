"""Predictions from a subset of the gallery: neighbors are searched in the subset, and the decoder predicts from them.

The audit of coverage leaves out the photos of a region. A scaling study reduces the gallery to a number of photos.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from geotoken_jax import settings
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import index, neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.predict.prediction import coordinates
from geotoken_jax.workdir import Workdir


class MaskedGallery:
    """Predicts photos of one split with neighbors from subsets of the gallery.

    The search is exact and covers the subset only. An index over the whole gallery does not work here: its first
    thousands of results for a photo may all be from the region that is left out.
    """

    def __init__(self, config: Config, workdir: Workdir, variant: str, split: str):
        """variant: name of the decoder. Prediction settings come from the manifest of predictions/VARIANT. Only
        settings that do not change results, such as batch_size, come from config."""
        config = config.variant(variant)
        stored = workdir.manifest(f"predictions/{variant}").settings["predict"]
        predict = settings.restored(stored, config.predict, "predict")
        predict = dataclasses.replace(predict, selectors=(predict.choice,))
        self._answerer = workdir.answerer(dataclasses.replace(config, predict=predict), variant)
        self._queries, self._gallery = workdir.table(split), workdir.gallery
        self._excluded = workdir.exclusions(split)

    def __call__(
        self, rows: Int[np.ndarray, "n"], kept: Int[np.ndarray, "m"], most: int | None = None
    ) -> Float[np.ndarray, "2 n 2"]:
        """Returns two sets of coordinates in degrees: first neighbors, NaN for a photo without neighbors, and answers.

        rows: rows of the split's table. kept: gallery rows that may be neighbors. most: largest number of neighbors
        that the decoder reads; as many as it was trained with if None.
        """
        hidden = np.ones(len(self._gallery), bool)
        hidden[kept] = False
        left_out = self._excluded(rows)
        queries = index_vectors(self._queries.embeddings(rows))
        subset, decoder = _SubsetIndex(self._gallery, kept), self._answerer.decoder
        neighbor_rows, scores = neighbors.search_neighbors(subset, queries, decoder.neighbors, left_out)
        if most is not None:
            neighbor_rows[:, most:], scores[:, most:] = -1, -np.inf
        placed = np.full((2, len(rows), 2), np.nan)
        has_neighbor = neighbor_rows[:, 0] >= 0
        placed[0, has_neighbor] = self._gallery.coordinates(neighbor_rows[has_neighbor, 0])
        for first in range(0, len(rows), decoder.settings.batch_size):
            part = slice(first, first + decoder.settings.batch_size)
            answers = self._answerer.from_neighbors(
                self._queries.embeddings(rows[part]),
                self._queries.captured(rows[part]),
                neighbor_rows[part],
                scores[part],
                [*self._excluded(rows[part]), lambda queries, rows: hidden[rows]],
            )
            placed[1, part] = coordinates(answers.predictions)
        return placed


class _SubsetIndex:
    """Index with exact search over some rows of the gallery (see gallery.index.Index).

    Vectors are computed when they are read.
    """

    def __init__(self, gallery: Table, rows: Int[np.ndarray, "m"]):
        self._gallery, self._rows = gallery, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: Any) -> Float32[np.ndarray, "n D"]:
        return index_vectors(self._gallery.embeddings(self._rows[part]))

    def search(self, queries: Float32[np.ndarray, "n D"], k: int) -> tuple[np.ndarray, np.ndarray]:
        rows, scores = index.exact(self, queries, k)
        return (np.where(rows < 0, -1, self._rows[rows]).astype(np.int32) if len(self) else rows), scores
