"""How an answer narrows: the S2 cells around it from the face down, and how probable each of them is."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo.cells import CellScheme, corners
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.predict.predictor import Prediction

#: Of a candidate, and so the finest there is.
_FINEST = 20
_CELLS = CellScheme(_FINEST, 1)


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
class Narrowed(Prediction):
    """A prediction with its levels, coarse to fine, down to the finest of its cells (20 where it has candidates alone).

    Probabilities are those of `cells`, a cell's spread evenly over its area; of the candidates, as shares of what they
    have together, where there are no cells.
    """

    levels: tuple[Level, ...]


def narrowed(prediction: Prediction) -> Narrowed:
    """Returns the prediction with its levels."""
    found = prediction.cells or prediction.candidates
    places = np.array([(place.latitude, place.longitude) for place in found]).reshape(-1, 2)
    mass = np.array([place.probability for place in found])
    level = np.array([getattr(place, "level", _FINEST) for place in found], int)
    if not prediction.cells and len(mass):
        mass = mass / mass.sum()
    paths = np.asarray(_CELLS.encode(*places.T))
    answer = np.asarray(_CELLS.encode(prediction.latitude, prediction.longitude))
    levels = tuple(_level(answer[: 1 + n], paths, level, mass) for n in range(max(level, default=0) + 1))
    own = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    return Narrowed(**own, levels=levels)


def _level(
    cell: Int[np.ndarray, " Q"],
    paths: Int[np.ndarray, "n 21"],
    level: Int[np.ndarray, " n"],
    mass: Float[np.ndarray, " n"],
) -> Level:
    """Returns the last level of a cell. paths: the tokens of other cells' centers, of which `level` and the face
    count."""
    here = len(cell) - 1
    among = np.repeat(cell[None], 4 if here else 6, 0)
    among[:, -1] = np.arange(len(among))
    depth = np.minimum(level, here)
    same = np.cumprod(paths[:, None, : here + 1] == among, -1).sum(-1) > depth[:, None]
    # The whole Earth is four faces and a half.
    share = np.where(level < 0, 1 / 6, 1.0) * 4.0 ** -(here - np.maximum(depth, 0))
    probability = (same * (mass * share)[:, None]).sum(0)
    order = np.argsort(-probability, kind="stable")
    around = corners(among)
    cells = tuple(Quarter(tuple(map(tuple, around[k].round(6).tolist())), float(probability[k])) for k in order)
    own = around[cell[-1]]
    edge_km = float(np.mean(great_circle_km(*own.T, *np.roll(own, -1, 0).T)))
    return Level(here, edge_km, float(probability[cell[-1]]), cells, int(np.flatnonzero(order == cell[-1])[0]))
