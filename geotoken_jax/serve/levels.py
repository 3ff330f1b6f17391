"""Computes the levels of a prediction: the S2 cells that contain it, coarse to fine, with their probabilities."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo.cells import CellScheme, corners
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, from_unit_vectors, great_circle_km, to_unit_vectors
from geotoken_jax.predict.prediction import Prediction

#: Encodes coordinates as S2 cells, with one token per level from 0 to 20.
_CELLS = CellScheme(20, 1)
#: Levels with a smaller probability are left out, except the first such level.
_MIN_PROBABILITY = 1e-4
#: Probabilities are summed over sample points on rings around the prediction. The radii of the rings go from one meter
#: to half the Earth's circumference. Number of rings, and number of sample points per ring.
_RINGS, _POINTS = 96, 48


@dataclasses.dataclass(frozen=True)
class LevelCell:
    """One S2 cell of a level.

    corners: latitude and longitude in degrees, counterclockwise. Edges are great-circle arcs. probability: probability
    that the photo was taken in the cell.
    """

    corners: tuple[tuple[float, float], ...]
    probability: float


@dataclasses.dataclass(frozen=True)
class Level:
    """The cell that contains the prediction at one S2 level.

    level: S2 level. edge_km: mean length of the cell's edges. probability: probability that the photo was taken in the
    cell. cells: the cell and its siblings, most probable first. At level 0 these are the six faces of the S2 cube. At
    other levels they are the four quarters of the cell one level coarser. chosen: index of the cell in `cells`.
    """

    level: int
    edge_km: float
    probability: float
    cells: tuple[LevelCell, ...]
    chosen: int


@dataclasses.dataclass(frozen=True)
class LeveledPrediction(Prediction):
    """A prediction with its levels, coarse to fine.

    Levels end at the finest level in `cells`, or at the first level with a probability below 0.0001.

    Probabilities are computed from `within`, radius_km and radius_90_km, as functions of the distance from the
    prediction. All directions are equally probable. Levels are calibrated if `within` and the radii are calibrated. The
    decoder's probabilities in `cells` are not used: the prediction can come from a gallery photo in a cell to which the
    decoder gives a low probability, and still be likely correct.
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
        if levels[-1].probability < _MIN_PROBABILITY:
            break
    values = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    return LeveledPrediction(**values, levels=tuple(levels))


def _spread(prediction: Prediction) -> tuple[Float[np.ndarray, "2 n"], Float[np.ndarray, " n"]]:
    """Returns sample points around a prediction, as latitudes and longitudes in degrees, and their probability mass."""
    antipode_km = np.pi * EARTH_RADIUS_KM
    quantiles = [
        *prediction.within.items(),
        (prediction.radius_km, 0.5),
        (prediction.radius_90_km, 0.9),
        (antipode_km, 1.0),
    ]
    km, share = np.array(sorted((max(float(km), 1e-3), p) for km, p in quantiles)).T
    share = np.maximum.accumulate(share)
    edges = np.geomspace(1e-3, antipode_km, _RINGS + 1)
    # Interpolate linearly over the logarithm of the distance. Below the smallest distance, probability grows with the
    # area of the circle.
    within = np.where(edges < km[0], share[0] * (edges / km[0]) ** 2, np.interp(np.log(edges), np.log(km), share))
    mass = np.diff(within, prepend=0)  # points of the first ring are at the prediction itself
    angle = np.sqrt(edges * np.roll(edges, 1)) / EARTH_RADIUS_KM
    angle[0] = 0
    bearing = (np.arange(_POINTS) + 0.5) * 2 * np.pi / _POINTS
    up = to_unit_vectors(prediction.latitude, prediction.longitude)
    east = np.array([-np.sin(np.radians(prediction.longitude)), np.cos(np.radians(prediction.longitude)), 0])
    aside = np.sin(bearing)[:, None] * east + np.cos(bearing)[:, None] * np.cross(up, east)
    places = np.cos(angle)[:, None, None] * up + np.sin(angle)[:, None, None] * aside
    return np.stack(from_unit_vectors(places.reshape(-1, 3))), np.repeat(mass / _POINTS, _POINTS)


def _level(cell: Int[np.ndarray, " Q"], paths: Int[np.ndarray, "n 21"], mass: Float[np.ndarray, " n"]) -> Level:
    """Returns the `Level` of a cell. Its probabilities are summed over the sample points.

    cell: tokens of the cell. paths: tokens of the sample points. mass: probability mass of the sample points.
    """
    level = len(cell) - 1
    inside = (paths[:, :level] == cell[:level]).all(1)  # in the parent cell
    probability = np.bincount(paths[inside, level], mass[inside], 4 if level else 6)
    siblings = np.repeat(cell[None], len(probability), 0)
    siblings[:, -1] = np.arange(len(siblings))
    vertices, chosen = corners(siblings), cell[-1]
    order = np.argsort(-probability, kind="stable")
    cells = tuple(LevelCell(tuple(map(tuple, vertices[k].round(6).tolist())), float(probability[k])) for k in order)
    edge_km = float(np.mean(great_circle_km(*vertices[chosen].T, *np.roll(vertices[chosen], -1, 0).T)))
    return Level(level, edge_km, float(probability[chosen]), cells, int(np.flatnonzero(order == chosen)[0]))
