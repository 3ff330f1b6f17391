"""Pools, from which selectors choose: photos' candidates, neighbors and the model's distributions over places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.predict.sample import Candidates


class PlaceDistribution(NamedTuple):
    """Distributions over the Earth of b photos: first disjoint S2 cells, most probable first, then coarser cells.

    The first cells are listed one by one. The probability of a coarser cell is the part inside it that is in no listed
    cell. coordinates: centers of the cells, in degrees. level: S2 level of each cell, -1 for the whole Earth.
    probability: probability of each cell, 0 for padding if a photo has fewer than F cells. If the probabilities of a
    photo's cells sum to less than 1, the rest is elsewhere.
    """

    coordinates: Float[np.ndarray, "b F 2"]
    level: Int[np.ndarray, "b F"]
    probability: Float[np.ndarray, "b F"]


class Pool(NamedTuple):
    """Candidates of b photos, with the data that selectors choose by.

    coordinates: coordinates of the candidates, in degrees. query: image, location and text vectors of the photo.
    neighbors: the same vectors of the M gallery photos that the model read, best first. neighbor_coordinates:
    coordinates of the neighbors, in degrees. neighbor_scores: inner products of the index vectors of photo and
    neighbor, at most 3. neighbor_count: number of neighbors of each photo; the remaining rows are padding.
    distribution: the model's distributions over places; None if the model was not searched. exclude: rules that
    kept gallery photos out of the neighbors; selectors that search the gallery apply them too. context: capture times,
    encoded by data.join.context; None if the model does not read them. fold: number of the fold of each photo that the
    reranker was fitted to (see predict.rerank.folds); None for new photos.
    """

    candidates: Candidates
    coordinates: Float[np.ndarray, "b K 2"]
    query: Float[np.ndarray, "b 3 C"]
    neighbors: Float[np.ndarray, "b M 3 C"]
    neighbor_coordinates: Float[np.ndarray, "b M 2"]
    neighbor_scores: Float[np.ndarray, "b M"]
    neighbor_count: Int[np.ndarray, " b"]
    distribution: PlaceDistribution | None
    exclude: Sequence[Exclusion] = ()
    context: Float[np.ndarray, "b times"] | None = None
    fold: Int[np.ndarray, " b"] | None = None
