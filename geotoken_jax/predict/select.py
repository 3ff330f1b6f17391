"""Selectors: which of a photo's candidates, or which point, is the answer. Any number of them choose from one pool."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo import distance
from geotoken_jax.predict.pool import PlaceDistribution, Pool

#: A choice for each of b photos: an index [b] into the candidates, or points [b, 2] of its own, in degrees.
Choice = Int[np.ndarray, " b"] | Float[np.ndarray, "b 2"]
Selector = Callable[[Pool], Choice]

#: Folder that the stage `learn` makes -> the selectors that it holds; predict/verify.py says what the verifier's are.
TRAINED = {
    "reward": ("reward",),
    "verifier": ("verifier", "comparator", "likeness", "point_comparator", "point_likeness"),
}
#: Rounds of moving a point towards what it gains from; of 2,000 photos of EarthView none gained by an eleventh.
_ROUNDS = 10
_HALF_AROUND_KM = np.pi * distance.EARTH_RADIUS_KM
#: Most probable cells whose centers a point may begin at, beside the candidates.
_STARTS = 32


@dataclasses.dataclass(frozen=True)
class VoteSettings:
    """temperature: of the neighbors' weights, which are exp(similarity / temperature); similarities lie in [-3, 3].
    sigma_km: of the Gaussian around each."""

    temperature: float
    sigma_km: float

    def __post_init__(self):
        for key in ("temperature", "sigma_km"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be above 0")


class SelectorInputs(NamedTuple):
    """What selectors are made of, from a work directory or from an export.

    vote: of the neighbors. aligned: returns the alignment model. learned: the name of a selector that was trained, to
    that selector.
    """

    vote: VoteSettings
    aligned: Callable[[], Any]
    learned: Callable[[str], Selector]


def greedy(pool: Pool) -> Int[np.ndarray, " b"]:
    """Takes the greedy candidate, which comes first in the pool."""
    return np.zeros(len(pool.coordinates), np.int64)


def log_probability(pool: Pool) -> Int[np.ndarray, " b"]:
    """Takes the candidate most probable under the tempered distribution it was sampled from (paper, section 3.5)."""
    return np.argmax(pool.candidates.tempered_log_probability, axis=1)


def consensus(vote: VoteSettings) -> Selector:
    """Returns what takes the candidate around which the density of the neighbors is highest."""

    def select(pool: Pool) -> Int[np.ndarray, " b"]:
        there = np.arange(pool.neighbor_scores.shape[1]) < pool.neighbor_count[:, None]
        scores = np.where(there, pool.neighbor_scores, -np.inf)
        km = distance.pairwise_km(pool.coordinates, pool.neighbor_coordinates)
        found = density(km, scores, vote.temperature, vote.sigma_km)
        return np.argmax(found, axis=1)

    return select


def density(
    km: Float[np.ndarray, "... K M"],
    scores: Float[np.ndarray, "... M"],
    temperature: float,
    sigma_km: float,
) -> Float[np.ndarray, "... K"]:
    """Returns the density of the neighbors at each place, in [0, 1]: 1 where all of their weight is on it.

    km: from each place to each neighbor. A score of -inf is no neighbor. temperature, sigma_km: see VoteSettings (Vo et
    al. 2017, section 3).
    """
    best = np.max(scores, -1, keepdims=True, initial=-3.0)
    weights = np.exp((scores - best) / temperature)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    kernel = np.exp(-0.5 * (km / sigma_km) ** 2)
    return (kernel @ weights[..., None])[..., 0]


def similarity(aligned: Any) -> Selector:
    """Returns what takes the candidate whose place, encoded, is nearest to the photo's location vector (G3)."""
    from geotoken_jax.gallery import encodings

    encode = encodings.encoder(aligned.location, lambda model, block: model(block))

    def select(pool: Pool) -> Int[np.ndarray, " b"]:
        b, k = pool.coordinates.shape[:2]
        vectors = np.concatenate(list(encode(pool.coordinates.reshape(-1, 2)))).reshape(b, k, -1)
        return np.argmax(np.einsum("bkc,bc->bk", vectors, pool.query[:, 1].astype(np.float32)), axis=1)

    return select


class Goal:
    """What an answer is worth by its distance from the truth, and its expectation under the model's own distribution.

    Minimum Bayes risk on the sphere: not the most probable cell, but the place with the most probability around it.
    """

    def __init__(self, limit_km: float | None):
        """limit_km: the answer is worth 1 within so many km, and else nothing; None: a GeoGuessr score."""
        self.limit_km = limit_km

    def expected(self, at: Float[np.ndarray, "b n 2"], places: PlaceDistribution) -> Float[np.ndarray, "b n"]:
        """Returns what each of n places is expected to be worth as the answer."""
        return np.einsum(
            "bnf,bf->bn", self._worth(distance.pairwise_km(at, places.coordinates), places), places.probability
        )

    def candidate(self, pool: Pool) -> Int[np.ndarray, " b"]:
        """Takes the candidate that is expected to be worth the most."""
        return np.argmax(self.expected(pool.coordinates, _searched(pool)), axis=1)

    def point(self, pool: Pool) -> Float[np.ndarray, "b 2"]:
        """Takes the point that is expected to be worth the most: the best of all centers and candidates, moved."""
        places = _searched(pool)
        starts = np.concatenate([pool.coordinates, places.coordinates[:, :_STARTS]], 1)
        each = np.arange(len(starts))
        worth = self.expected(starts, places)
        best = starts[each, worth.argmax(1)]
        most = worth.max(1)
        vectors = distance.to_unit_vectors(*np.moveaxis(places.coordinates, -1, 0))
        at = best
        for _ in range(_ROUNDS):
            pull = self._pull(distance.pairwise_km(at[:, None], places.coordinates)[:, 0], places) * places.probability
            at = np.stack(distance.from_unit_vectors(np.einsum("bf,bfx->bx", pull, vectors) + 1e-300), -1)
            worth = self.expected(at[:, None], places)[:, 0]
            best, most = np.where((worth > most)[:, None], at, best), np.maximum(worth, most)
        return best

    def _worth(self, km: Float[np.ndarray, "b n F"], places: PlaceDistribution) -> Float[np.ndarray, "b n F"]:
        if self.limit_km is None:
            return np.asarray(distance.geoscore(_mean_km(km, places.level[:, None]))) / 5000
        return _share(km, places.level[:, None], self.limit_km)

    def _pull(self, km: Float[np.ndarray, "b F"], places: PlaceDistribution) -> Float[np.ndarray, "b F"]:
        """Returns the weight of each cell in the next mean: where that mean is the point itself, no move is better."""
        if self.limit_km is None:
            mean = _mean_km(km, places.level)
            return np.asarray(distance.geoscore(mean)) / mean / np.maximum(np.sinc(km / _HALF_AROUND_KM), 1e-6)
        return _share(km, places.level, self.limit_km)


def _share(
    km: Float[np.ndarray, "*shape"], level: Int[np.ndarray, "*shape"], limit_km: float
) -> Float[np.ndarray, "*shape"]:
    """Returns how much of a cell lies within a distance of a place `km` from its center; a cell counts as a disc of its
    level's mean area, of which a circle that its edge crosses holds more and more, evenly."""
    radius = _radius_km(level)
    crossed = (limit_km - np.abs(km - radius)) / (2 * np.minimum(km, radius) + 1e-9)
    return np.where(km < radius, np.minimum((limit_km / radius) ** 2, 1), np.clip(crossed, 0, 1))


def _searched(pool: Pool) -> PlaceDistribution:
    assert pool.distribution is not None, "PredictSettings has seen to it that the model is searched"
    return pool.distribution


def _mean_km(km: Float[np.ndarray, "*shape"], level: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns about how far a cell is, on the mean, from a place `km` from its center; exact there and far off."""
    return np.hypot(km, _radius_km(level) * 2 / 3)


def _radius_km(level: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns the radius of a disc of a level's mean area."""
    return 2 * distance.EARTH_RADIUS_KM * np.arcsin(np.sqrt(4.0 ** -np.maximum(level, 0) / 6))


_GOALS = {**{f"{km}_km": Goal(km) for km in distance.THRESHOLDS_KM}, "geoscore": Goal(None)}

#: Name, as in predictions and in `config.predict.selectors` -> what it is made of -> selector.
SELECTORS: dict[str, Callable[[SelectorInputs], Selector]] = {
    "greedy": lambda parts: greedy,
    "log_probability": lambda parts: log_probability,
    "similarity": lambda parts: similarity(parts.aligned()),
    "consensus": lambda parts: consensus(parts.vote),
    **{f"expected_{name}": lambda parts, goal=goal: goal.candidate for name, goal in _GOALS.items()},
    **{f"point_{name}": lambda parts, goal=goal: goal.point for name, goal in _GOALS.items()},
    **{name: lambda parts, name=name: parts.learned(name) for names in TRAINED.values() for name in names},
}
#: Those that need the model's distribution over places.
SEARCHED = tuple(f"{kind}_{name}" for kind in ("expected", "point") for name in _GOALS)
