"""What is answered without a region: its photos are asked about again, with none of the gallery's from there."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from geotoken_jax import settings
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.data import join
from geotoken_jax.gallery import index, neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.predict.prediction import coordinates


class MaskedGallery:
    """Answers for photos of one split from a part of the gallery.

    Search is exact, over that part alone: of an index over all of it, the first thousands found for a photo may all be
    of the region that is left out.
    """

    def __init__(self, config: Config, workdir: Workdir, variant: str, split: str):
        """variant: whose decoder answers, with the settings that its predictions were made with."""
        own = config.variant(variant)
        stored = workdir.manifest(f"predictions/{variant}").settings["predict"]
        made_with = settings.restored(stored, own.predict, "predict")
        made_with = dataclasses.replace(made_with, selectors=(made_with.choice,))
        self._answerer = workdir.answerer(dataclasses.replace(own, predict=made_with), variant)
        self._own, self._gallery = workdir.table(split), workdir.gallery
        self._excluded = workdir.exclusions(split)

    def __call__(self, rows: Int[np.ndarray, "n"], kept: Int[np.ndarray, "m"]) -> Float[np.ndarray, "2 n 2"]:
        """Returns the coordinates of the first neighbor, NaN where there is none, and of the decoder's answer.

        rows: of the split's table. kept: gallery rows that may be neighbors.
        """
        hidden = np.ones(len(self._gallery), bool)
        hidden[kept] = False
        left_out = self._excluded(rows)
        queries = index_vectors(self._own.embeddings(rows))
        near, scores = neighbors.find(_Subset(self._gallery, kept), queries, self._answerer.decoder.neighbors, left_out)
        placed = np.full((2, len(rows), 2), np.nan)
        some = near[:, 0] >= 0
        placed[0, some] = self._gallery.coordinates(near[some, 0])
        decoder = self._answerer.decoder
        for first in range(0, len(rows), decoder.settings.batch_size):
            part = slice(first, first + decoder.settings.batch_size)
            query = self._own.embeddings(rows[part])
            batch = {"query": query, **join.neighbors(self._gallery, near[part], decoder.cells)}
            # The row number decides a photo's samples, so they are those of predictions/.
            exclude = [*self._excluded(rows[part]), lambda queries, found: hidden[found]]
            answers, _ = self._answerer(batch, near[part], scores[part], rows[part], exclude=exclude)
            placed[1, part] = coordinates(answers)
        return placed


class _Subset:
    """Some rows of the gallery, searched exactly (index.Index); their vectors are made as they are read."""

    def __init__(self, gallery: Table, rows: Int[np.ndarray, "m"]):
        self._gallery, self._rows = gallery, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: Any) -> Float32[np.ndarray, "n D"]:
        return index_vectors(self._gallery.embeddings(self._rows[part]))

    def search(self, queries: Float32[np.ndarray, "n D"], k: int) -> tuple[np.ndarray, np.ndarray]:
        rows, scores = index.exact(self, queries, k)
        return (np.where(rows < 0, -1, self._rows[rows]).astype(np.int32) if len(self) else rows), scores
