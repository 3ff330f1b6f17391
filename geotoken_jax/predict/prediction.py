"""A photo's answer: one type from the decoder to the file, the page, the service and the evaluator.

No jax is imported with this module.
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
    """A place that was considered: degrees.

    probability: the model's, of the level-20 cell around it (GeoCLIP's: of this place among those of its gallery).
    log_probability: its logarithm. tempered_log_probability: under the distribution it was sampled from. count: how
    often it was drawn, the greedy one among them. tokens: of its cell. A baseline's candidate lacks what its method
    does not have.
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
        """Returns a candidate with rounded numbers. at: degrees. more: fields after log_probability."""
        return cls(*rounded(at), float(f"{math.exp(log_probability):.6g}"), round(log_probability, 5), **more)


@dataclasses.dataclass(frozen=True)
class Neighbor:
    """A gallery photo that was looked at: id, degrees, the inner product of the index vectors (at most 3), and its row
    in the gallery."""

    id: str
    latitude: float
    longitude: float
    score: float
    row: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """An S2 cell that the photo may be from: its level, its center in degrees, and the model's probability of it."""

    level: int
    latitude: float
    longitude: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Where a photo was taken: degrees.

    radius_km, radius_90_km: of the circles around the answer that hold half and 90 % of the probability. within: the
    probability that the answer is no farther off than 1, 25, 200, 750 and 2500 km. A model whose places were searched
    has these calibrated on its validation photos; else they are shares of the samples (GeoCLIP's: of its gallery's
    probability). A line of a work directory's predictions leaves those shares out, and radii are NaN.

    candidates: distinct ones, the greedy one first, then by falling probability. cells: disjoint ones, most probable
    first; what they lack to 1 is elsewhere. neighbors: best first. None of these where a model has none. choice: the
    selector whose choice the answer is. choices: selector -> its choice, an index into candidates or a point in
    degrees.
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

    def plain(self) -> dict[str, Any]:
        """Returns the fields for JSON. Those that are None or NaN are left out, in candidates too."""
        return _present(dataclasses.asdict(self))


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(held) for key, held in value.items() if held is not None and held == held}
    return [_present(held) for held in value] if isinstance(value, (list, tuple)) else value


def rounded(at: Float[np.ndarray, "2"]) -> tuple[float, float]:
    """Returns a latitude and a longitude to 7 digits, a centimeter."""
    return round(float(at[0]), 7), round(float(at[1]), 7)


def coordinates(predictions: Sequence[Prediction]) -> Float[np.ndarray, "b 2"]:
    """Returns the coordinates of answers, in degrees."""
    return np.array([(one.latitude, one.longitude) for one in predictions]).reshape(-1, 2)


def neighbors(
    gallery: Table, rows: Int[np.ndarray, "b M"], scores: Float[np.ndarray, "b M"]
) -> list[tuple[Neighbor, ...]]:
    """Returns the Neighbors of each photo by their rows in the gallery; rows of -1 are left out."""
    there = np.maximum(rows, 0)
    ids, places = gallery.ids(there), gallery.coordinates(there).tolist()
    return [
        tuple(
            Neighbor(name.decode(), *place, score=round(float(score), 6), row=int(row))
            for name, place, score, row in zip(*photo, strict=True)
            if row >= 0
        )
        for photo in zip(ids, places, scores, rows, strict=True)
    ]
