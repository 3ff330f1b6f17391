"""The pool: the candidates of a batch of photos, with all data by which selectors choose an answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.geo import distance
from geotoken_jax.geo.distance import Array
from geotoken_jax.predict.sample import Candidates


class PlaceDistribution(NamedTuple):
    """For each of b photos, the probabilities that the photo was taken in each of F S2 cells.

    A search of the decoder's distribution lists the most probable cells first, which do not overlap. Coarse cells
    follow, with the remaining probability: the probability of a coarse cell is the sum over the cells inside it that
    are not in the list themselves.

    coordinates: centers of the cells, in degrees. level: S2 level of each cell, -1 for the whole Earth. probability:
    probability of each cell, 0 for padding if a photo has fewer than F cells. If the probabilities of a photo sum to
    less than 1, the rest is the probability of all other places.
    """

    coordinates: Float[np.ndarray, "b F 2"]
    level: Int[np.ndarray, "b F"]
    probability: Float[np.ndarray, "b F"]


def disc_km(level: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the radius in km of a disc with the mean area of a level's cells. Levels below 0 count as level 0."""
    xp = distance.namespace(level)
    return 2 * distance.EARTH_RADIUS_KM * xp.arcsin(xp.sqrt(4.0 ** -xp.maximum(level, 0) / 6))


class Pool(NamedTuple):
    """K candidates and M neighbors for each of b photos.

    candidates: token sequences that the decoder generated. coordinates: coordinates of the candidates, in degrees.
    query: image, location and text vector of each photo. neighbors: image, location and text vector of each gallery
    photo that the decoder read as a neighbor, best neighbor first. neighbor_coordinates: coordinates of the neighbors,
    in degrees. neighbor_scores: similarity of photo and neighbor, the inner product of their index vectors, at most 3.
    neighbor_count: number of neighbors of each photo; the other entries are padding. distribution: the decoder's
    probabilities of cells; None if the decoder's distribution was not searched. exclude: rules that exclude gallery
    photos from the neighbors; selectors that search the gallery apply the same rules. context: capture times, encoded
    by data.join.context; None if the decoder does not read capture times. fold: fold of each photo (see
    predict.rerank.folds) if they are the validation photos, to which the reranker is fitted; otherwise None.
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
