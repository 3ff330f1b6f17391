"""How an answer narrows: the S2 cells around it from the face down, and how probable each of them is."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo.cells import CellScheme, corners
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, from_unit_vectors, great_circle_km, to_unit_vectors
from geotoken_jax.predict.prediction import Prediction

#: Of a candidate, and so the finest there is.
_CELLS = CellScheme(20, 1)
#: Levels end at this probability.
_LEAST = 1e-4
#: Circles around the answer, from a meter to its antipode, and points on each.
_RINGS, _POINTS = 96, 48


@dataclasses.dataclass(frozen=True)
class Quarter:
    """A cell of a level: its corners, as latitude and longitude in degrees, counterclockwise, and its probability. Its
    edges are arcs of great circles."""

    corners: tuple[tuple[float, float], ...]
    probability: float


@dataclasses.dataclass(frozen=True)
class Level:
    """The cell around the answer at an S2 level, the mean length of its edges, and its probability.

    cells: those among which this one was chosen, the most probable first: the quarters of the cell before it, or at
    level 0 the six faces. chosen: which of them it is.
    """

    level: int
    edge_km: float
    probability: float
    cells: tuple[Quarter, ...]
    chosen: int


@dataclasses.dataclass(frozen=True)
class LeveledPrediction(Prediction):
    """A prediction with its levels, coarse to fine: down to the finest of its cells, or to a probability of 0.0001.

    Probabilities are those of the distances (`within`, radius_km and radius_90_km), spread evenly over all directions
    from the answer: calibrated where these are. `cells` would not do: of what a model finds little of, an answer that
    was chosen among the gallery's places may still be likely.
    """

    levels: tuple[Level, ...] = ()


def with_levels(prediction: Prediction) -> LeveledPrediction:
    """Returns the prediction with its levels."""
    points, mass = _spread(prediction)
    paths = np.asarray(_CELLS.encode(*points))
    answer = np.asarray(_CELLS.encode(prediction.latitude, prediction.longitude))
    finest, levels = max((cell.level for cell in prediction.cells), default=_CELLS.level), []
    for n in range(finest + 1):
        levels.append(_level(answer[: 1 + n], paths, mass))
        if levels[-1].probability < _LEAST:
            break
    own = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    return LeveledPrediction(**own, levels=tuple(levels))


def _spread(prediction: Prediction) -> tuple[Float[np.ndarray, "2 n"], Float[np.ndarray, " n"]]:
    """Returns latitudes and longitudes all around an answer, and the probability that each place stands for."""
    half_way = np.pi * EARTH_RADIUS_KM
    known = [*prediction.within.items(), (prediction.radius_km, 0.5), (prediction.radius_90_km, 0.9), (half_way, 1.0)]
    km, share = np.array(sorted((max(float(km), 1e-3), p) for km, p in known)).T
    share = np.maximum.accumulate(share)
    edges = np.geomspace(1e-3, half_way, _RINGS + 1)
    # Straight lines over the logarithm of the distance; within the first of them as the area.
    within = np.where(edges < km[0], share[0] * (edges / km[0]) ** 2, np.interp(np.log(edges), np.log(km), share))
    mass = np.diff(within, prepend=0)  # the first is at the answer
    away = np.sqrt(edges * np.roll(edges, 1)) / EARTH_RADIUS_KM
    away[0] = 0
    bearing = (np.arange(_POINTS) + 0.5) * 2 * np.pi / _POINTS
    up = to_unit_vectors(prediction.latitude, prediction.longitude)
    east = np.array([-np.sin(np.radians(prediction.longitude)), np.cos(np.radians(prediction.longitude)), 0])
    aside = np.sin(bearing)[:, None] * east + np.cos(bearing)[:, None] * np.cross(up, east)
    places = np.cos(away)[:, None, None] * up + np.sin(away)[:, None, None] * aside
    return np.stack(from_unit_vectors(places.reshape(-1, 3))), np.repeat(mass / _POINTS, _POINTS)


def _level(cell: Int[np.ndarray, " Q"], paths: Int[np.ndarray, "n 21"], mass: Float[np.ndarray, " n"]) -> Level:
    """Returns the last level of a cell, by the mass of places that are in it. paths: their tokens."""
    here = len(cell) - 1
    near = (paths[:, :here] == cell[:here]).all(1)
    probability = np.bincount(paths[near, here], mass[near], 4 if here else 6)
    among = np.repeat(cell[None], len(probability), 0)
    among[:, -1] = np.arange(len(among))
    around, own = corners(among), cell[-1]
    order = np.argsort(-probability, kind="stable")
    cells = tuple(Quarter(tuple(map(tuple, around[k].round(6).tolist())), float(probability[k])) for k in order)
    edge_km = float(np.mean(great_circle_km(*around[own].T, *np.roll(around[own], -1, 0).T)))
    return Level(here, edge_km, float(probability[own]), cells, int(np.flatnonzero(order == own)[0]))
