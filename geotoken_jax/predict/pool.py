"""What selectors choose from: a photo's candidates, its neighbors, and the model's own distribution over places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.predict.sample import Candidates


class PlaceDistribution(NamedTuple):
    """A distribution over the Earth, b photos at once: disjoint S2 cells, most probable first, and behind them coarser
    ones with what is left in each.

    coordinates: of the cells' centers, in degrees. level: of each cell, -1 for the whole Earth. probability: 0 where a
    photo has fewer than F; what they lack to 1 is elsewhere.
    """

    coordinates: Float[np.ndarray, "b F 2"]
    level: Int[np.ndarray, "b F"]
    probability: Float[np.ndarray, "b F"]


class Pool(NamedTuple):
    """Candidates of b photos, and what they may be chosen by.

    coordinates: of the candidates, in degrees. query: the photo's own image, location and text vectors. neighbors,
    neighbor_coordinates, neighbor_scores: the M gallery photos that the model saw, best first, with their inner
    products (at most 3); neighbor_count of them are there. distribution: over places, None if the model was not
    searched. exclude: rules on gallery photos that the neighbors were found by, for selectors that search the gallery
    again. context: numbers of the photos' times, if the model reads them.
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


def subset(pool: Pool, rows: Int[np.ndarray, " n"]) -> Pool:
    """Returns the pool of some of its photos."""
    import jax

    exclude = [lambda queries, near, rule=rule: rule(rows[queries], near) for rule in pool.exclude]
    return jax.tree.map(lambda values: values[rows], pool._replace(exclude=()))._replace(exclude=exclude)
