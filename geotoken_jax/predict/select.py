"""Selectors. A selector chooses an answer for every photo of a pool: a candidate, or any other point on Earth.

The arrays of a pool are numpy arrays in the package, and jax arrays inside an export's program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo import distance
from geotoken_jax.geo.distance import Array
from geotoken_jax.predict.pool import PlaceDistribution, Pool, disc_km
from geotoken_jax.predict.rerank import Ranking

#: Choices for b photos: indices [b] into the candidates, points [b, 2] in degrees, or a ranking of further candidates.
Choice = Int[Array, " b"] | Float[Array, "b 2"] | Ranking
Selector = Callable[[Pool], Choice]

#: Selectors that `geotoken learn` trains, each in the folder NAME/VARIANT.
TRAINED = ("reward", "reranker")
#: Number of steps in which `Goal.point` improves a point. An eleventh step improved none of 2,000 photos of EarthView.
_STEPS = 10
#: Smallest divisor, and smallest length of a mean of unit vectors.
_LEAST = 1e-30
_HALF_AROUND_KM = np.pi * distance.EARTH_RADIUS_KM
#: Number of most probable cells whose centers are possible starting points of `Goal.point`, besides the candidates.
_STARTS = 32


@dataclasses.dataclass(frozen=True)
class VoteSettings:
    """Settings of the density of neighbors, by which the selector `consensus` chooses (see `density`).

    temperature: temperature of the neighbors' weights exp(score / temperature); scores are in [-3, 3]. sigma_km:
    standard deviation of the Gaussian around each neighbor.
    """

    temperature: float
    sigma_km: float

    def __post_init__(self):
        for key in ("temperature", "sigma_km"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be above 0")


class SelectorInputs(NamedTuple):
    """Inputs of the functions that make selectors, from a work directory or an export.

    vote: settings of the selector `consensus`. aligned: function that returns the alignment model. trained: function
    that returns the trained selector for a name in TRAINED.
    """

    vote: VoteSettings
    aligned: Callable[[], Any]
    trained: Callable[[str], Selector]


def greedy(pool: Pool) -> Int[Array, " b"]:
    """Returns index 0, the greedy candidate. With beam search (config.predict.beam), it is the most probable beam."""
    return pool.candidates.tokens[:, 0, 0] * 0


def log_probability(pool: Pool) -> Int[Array, " b"]:
    """Returns the index of the candidate most probable under the tempered distribution (paper, section 3.5)."""
    return pool.candidates.tempered_log_probability.argmax(1)


def consensus(vote: VoteSettings) -> Selector:
    """Returns a selector that chooses the candidate with the highest density of neighbors."""

    def select(pool: Pool) -> Int[Array, " b"]:
        xp = distance.namespace(pool.coordinates)
        present = xp.arange(pool.neighbor_scores.shape[1]) < pool.neighbor_count[:, None]
        scores = xp.where(present, pool.neighbor_scores, -np.inf)
        km = distance.pairwise_km(pool.coordinates, pool.neighbor_coordinates)
        return density(km, scores, vote.temperature, vote.sigma_km).argmax(1)

    return select


def density(
    km: Float[Array, "... K M"],
    scores: Float[Array, "... M"],
    temperature: float,
    sigma_km: float,
) -> Float[Array, "... K"]:
    """Returns the density of the neighbors at each of K points, in [0, 1] (Vo et al. 2017, section 3).

    The density is the weighted sum of one Gaussian per neighbor. The weights sum to 1 and grow with the scores. At its
    center, a Gaussian is 1.

    km: distance from each point to each neighbor. scores: scores of the neighbors, -inf if missing. temperature,
    sigma_km: see VoteSettings.
    """
    xp = distance.namespace(km, scores)
    best = xp.max(scores, -1, keepdims=True, initial=-3.0)
    weights = xp.exp((scores - best) / temperature)
    weights = weights / xp.maximum(weights.sum(-1, keepdims=True), _LEAST)
    kernel = xp.exp(-0.5 * (km / sigma_km) ** 2)
    return (kernel @ weights[..., None])[..., 0]


def similarity(aligned: Any) -> Selector:
    """Returns a selector that compares encoded coordinates with the photo's location vector (G3, Jia et al. 2024).

    It chooses the candidate whose encoded coordinates are most similar to that vector.
    """
    from geotoken_jax.gallery import encodings

    encode = encodings.encoder(aligned.location, lambda model, block: model(block))

    def select(pool: Pool) -> Int[np.ndarray, " b"]:
        b, k = pool.coordinates.shape[:2]
        vectors = np.concatenate(list(encode(pool.coordinates.reshape(-1, 2)))).reshape(b, k, -1)
        return np.argmax(np.einsum("bkc,bc->bk", vectors, pool.query[:, 1].astype(np.float32)), axis=1)

    return select


class Goal:
    """The value of an answer as a function of its distance from the truth, and two selectors that maximize it.

    The selectors maximize the expected value under the model's distribution over places (minimum Bayes risk).
    `candidate` chooses the best candidate, `point` the best point that a local search finds. The answer need not be in
    the most probable cell, because a place with much probability around it can have a higher expected value.
    """

    def __init__(self, limit_km: float | None):
        """limit_km: distance within which the value is 1, else 0. If None, the value is GeoGuessr points / 5000."""
        self.limit_km = limit_km

    def expected(self, at: Float[Array, "b n 2"], distribution: PlaceDistribution) -> Float[Array, "b n"]:
        """Returns the expected value of each of n points as the answer, in [0, 1]. at: degrees."""
        value = self._value(distance.pairwise_km(at, distribution.coordinates), distribution)
        return distance.namespace(value).einsum("bnf,bf->bn", value, distribution.probability)

    def candidate(self, pool: Pool) -> Int[Array, " b"]:
        """Returns the index of the candidate with the highest expected value."""
        return self.expected(pool.coordinates, _searched(pool)).argmax(1)

    def point(self, pool: Pool) -> Float[Array, "b 2"]:
        """Returns the point with the highest expected value that a local search finds, in degrees.

        The search starts at the best point among all candidates and the centers of the 32 most probable cells, takes 10
        steps, and returns the best point of all.
        """
        distribution = _searched(pool)
        xp = distance.namespace(pool.coordinates)
        starts = xp.concatenate([pool.coordinates, distribution.coordinates[:, :_STARTS]], 1)
        value = self.expected(starts, distribution)
        best = xp.take_along_axis(starts, value.argmax(1)[:, None, None], 1)[:, 0]
        highest = value.max(1)
        vectors = distance.to_unit_vectors(distribution.coordinates[..., 0], distribution.coordinates[..., 1])
        at = best
        for _ in range(_STEPS):
            km = distance.pairwise_km(at[:, None], distribution.coordinates)[:, 0]
            weights = self._weights(km, distribution) * distribution.probability
            at = xp.stack(distance.from_unit_vectors(xp.einsum("bf,bfx->bx", weights, vectors) + _LEAST), -1)
            value = self.expected(at[:, None], distribution)[:, 0]
            best, highest = xp.where((value > highest)[:, None], at, best), xp.maximum(value, highest)
        return best

    def _value(self, km: Float[Array, "b n F"], distribution: PlaceDistribution) -> Float[Array, "b n F"]:
        if self.limit_km is None:
            return distance.geoscore(_mean_km(km, distribution.level[:, None])) / 5000
        return _share(km, distribution.level[:, None], self.limit_km)

    def _weights(self, km: Float[Array, "b F"], distribution: PlaceDistribution) -> Float[Array, "b F"]:
        """Returns one factor per cell for a step of `point`.

        The next point is the mean of the cells' centers, with factor * probability as weights. If limit_km is None, a
        point that such a step does not move is a stationary point of the expected value. With a limit, the step is a
        heuristic and may lower the value; `point` keeps the best point of all steps.
        """
        if self.limit_km is None:
            xp, mean = distance.namespace(km), _mean_km(km, distribution.level)
            return distance.geoscore(mean) / mean / xp.maximum(xp.sinc(km / _HALF_AROUND_KM), 1e-6)
        return _share(km, distribution.level, self.limit_km)


def _share(km: Float[Array, "*shape"], level: Int[Array, "*shape"], limit_km: float) -> Float[Array, "*shape"]:
    """Returns the share of a cell within limit_km of a point that is `km` from the cell's center.

    A cell counts as a disc of the mean area of its level. If the point is in the disc, the share is the area of the
    circle of radius limit_km around the point, divided by the disc's area, at most 1. If the point is outside, the
    share is 0 for circles that do not reach the disc and 1 for circles that contain it. Between these two radii it
    grows linearly with limit_km.
    """
    xp, radius = distance.namespace(km), disc_km(level)
    crossed = (limit_km - xp.abs(km - radius)) / (2 * xp.minimum(km, radius) + 1e-9)
    return xp.where(km < radius, xp.minimum((limit_km / radius) ** 2, 1), xp.clip(crossed, 0, 1))


def _searched(pool: Pool) -> PlaceDistribution:
    assert pool.distribution is not None, "PredictSettings refuses this selector if the model is not searched"
    return pool.distribution


def _mean_km(km: Float[Array, "*shape"], level: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the approximate mean distance in km from a point to the points of a cell whose center is `km` away.

    A cell counts as a flat disc of the mean area of its level. For this disc the value is exact if km is 0, and its
    relative error goes to 0 as km grows.
    """
    return distance.namespace(km).hypot(km, disc_km(level) * 2 / 3)


_GOALS = {**{f"{km}_km": Goal(km) for km in distance.THRESHOLDS_KM}, "geoscore": Goal(None)}

#: Name in config.predict.selectors and in predictions -> function that makes the selector.
SELECTORS: dict[str, Callable[[SelectorInputs], Selector]] = {
    "greedy": lambda inputs: greedy,
    "log_probability": lambda inputs: log_probability,
    "similarity": lambda inputs: similarity(inputs.aligned()),
    "consensus": lambda inputs: consensus(inputs.vote),
    **{f"expected_{name}": lambda inputs, goal=goal: goal.candidate for name, goal in _GOALS.items()},
    **{f"point_{name}": lambda inputs, goal=goal: goal.point for name, goal in _GOALS.items()},
    **{name: lambda inputs, name=name: inputs.trained(name) for name in TRAINED},
}
#: Selectors that need the model's distribution over places.
SEARCHED = tuple(f"{kind}_{name}" for kind in ("expected", "point") for name in _GOALS)
