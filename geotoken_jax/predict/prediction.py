"""The prediction for a photo: one type for the decoder, prediction files, web page, service and evaluator.

This module does not import jax.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.gallery.table import Table


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate location of a photo, in degrees.

    probability: the model's probability of the candidate's cell; in GeoCLIP's predictor, the probability of this
    location among all locations in GeoCLIP's gallery. log_probability: natural logarithm of `probability`.
    tempered_log_probability: log-probability under the distribution that candidates are sampled from. count: how often
    the candidate was decoded, greedily or by sampling. tokens: tokens of the candidate's cell. A field is None if the
    method, for example a baseline, does not compute it.
    """

    latitude: float
    longitude: float
    probability: float | None = None
    log_probability: float | None = None
    tempered_log_probability: float | None = None
    count: int | None = None
    tokens: tuple[int, ...] | None = None

    @classmethod
    def of(cls, at: Float[np.ndarray, "2"], log_probability: float, **more: Any) -> "Candidate":
        """Returns a candidate with rounded numbers. at: coordinates in degrees. more: fields after log_probability."""
        return cls(*rounded(at), float(f"{math.exp(log_probability):.6g}"), round(log_probability, 5), **more)


@dataclasses.dataclass(frozen=True)
class Neighbor:
    """A gallery photo that is a neighbor of the photo: its id, coordinates in degrees, score and gallery row.

    score: inner product of the two photos' index vectors, at most 3.
    """

    id: str
    latitude: float
    longitude: float
    score: float
    row: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """An S2 cell: its level, its center in degrees, and the model's probability that the photo was taken in it."""

    level: int
    latitude: float
    longitude: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Place:
    """A place that the reranker ranked, in degrees.

    probability: the reranker's probability that this is the photo's place; the probabilities of all ranked places sum
    to 1. channels: name of a source of candidates that lists the place -> rank of the place in this source, from 1, and
    score in this source (see predict.rerank.Candidates).
    """

    latitude: float
    longitude: float
    probability: float
    channels: dict[str, tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to where a photo was taken, latitude and longitude in degrees, with its uncertainty.

    radius_km: radius of the circle around the answer that contains the true location with a probability of 50 %.
    radius_90_km: the same for 90 %. within: distance (1, 25, 200, 750 and 2500 km) -> probability that the true
    location is no farther from the answer.

    If the reranker chooses the answer, the radii and `within` come from the reranker's probabilities. Otherwise they
    come from the decoder's distribution over places, if it was searched. In both cases they are calibrated on the
    validation photos, if there are any. If the distribution was not searched either, `GeoToken.predict` computes the
    radii and `within` from the candidates, weighted by `count`; predictions in a work directory then have radii of NaN
    and an empty `within`. GeoCLIP's predictor computes them from the probabilities in its gallery.

    candidates: distinct candidates; first the greedy one, if there is one, then the others by falling probability.
    cells: the most probable cells, which do not overlap; if their probabilities sum to less than 1, the rest is the
    probability of all other places. neighbors: the photo's neighbors in the gallery, best first. candidates, cells and
    neighbors are empty if the method has none. choice: name of the selector whose choice is the answer. choices:
    selector name -> its choice, an index into `candidates` or coordinates in degrees. place: name of the city nearest
    to the answer, see geo.places.place_names; None in a work directory. places: the most probable places of the
    reranker's ranking; empty if the model has no reranker.
    """

    latitude: float
    longitude: float
    radius_km: float
    radius_90_km: float
    within: dict[int, float]
    candidates: tuple[Candidate, ...]
    cells: tuple[Cell, ...]
    neighbors: tuple[Neighbor, ...]
    choice: str = ""
    choices: dict[str, int | tuple[float, float]] = dataclasses.field(default_factory=dict)
    place: str | None = None
    places: tuple[Place, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Returns the fields for JSON, with text as keys. Fields that are None or NaN are left out."""
        return _present(dataclasses.asdict(self))


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        # NaN is not equal to itself.
        return {str(key): _present(item) for key, item in value.items() if item is not None and item == item}
    return [_present(item) for item in value] if isinstance(value, (list, tuple)) else value


def rounded(at: Float[np.ndarray, "2"]) -> tuple[float, float]:
    """Returns a latitude and a longitude rounded to 7 decimals, about 1 cm."""
    return round(float(at[0]), 7), round(float(at[1]), 7)


def coordinates(predictions: Sequence[Prediction]) -> Float[np.ndarray, "b 2"]:
    """Returns the coordinates of predictions, in degrees."""
    return np.array([(one.latitude, one.longitude) for one in predictions]).reshape(-1, 2)


def neighbors(
    gallery: Table, rows: Int[np.ndarray, "b M"], scores: Float[np.ndarray, "b M"]
) -> list[tuple[Neighbor, ...]]:
    """Returns each photo's neighbors, given by their gallery rows and scores; rows of -1 are left out."""
    present = np.maximum(rows, 0)
    ids, points = gallery.ids(present), gallery.coordinates(present).tolist()
    return [
        tuple(
            Neighbor(name.decode(), *point, score=round(float(score), 6), row=int(row))
            for name, point, score, row in zip(*photo, strict=True)
            if row >= 0
        )
        for photo in zip(ids, points, scores, rows, strict=True)
    ]
