"""Uncertainty columns of prediction files: radii, cells, and the probability within each distance."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import MAX_LEVEL, CellScheme
from geotoken_jax.predict.prediction import Cell

_CELL = tuple(field.name for field in dataclasses.fields(Cell))


@dataclasses.dataclass(frozen=True)
class Claims:
    """Stated uncertainty of n answers. Numbers that an answer does not state are NaN.

    within: probability that the truth is within each of THRESHOLDS_KM of the answer. radius_km: radii of the circles
    around the answer that contain 50 and 90 % of the probability. cells: up to F S2 cells per answer, each with level,
    latitude, longitude and probability.
    """

    within: Float[np.ndarray, "n 5"]
    radius_km: Float[np.ndarray, "n 2"]
    cells: Float[np.ndarray, "n F 4"]

    def at(self, rows: np.ndarray, n: int) -> "Claims":
        """Returns the claims of n photos. The photos at `rows` have these claims, all other photos have NaN."""
        expanded = []
        for values in (self.within, self.radius_km, self.cells):
            expanded.append(np.full((n, *values.shape[1:]), np.nan))
            expanded[-1][rows] = values
        return Claims(*expanded)


def pop_claims(row: dict[str, Any]) -> Claims:
    """Removes the uncertainty columns from a row and returns them as Claims of one photo.

    JSON rows have the fields of Prediction: `within`, `radius_km`, `radius_90_km` and `cells`. CSV rows have columns
    radius_km, radius_90_km, within_1, within_25, within_200, within_750 and within_2500. Raises ValueError if a value
    is malformed or out of range.
    """
    within, cells = row.pop("within", {}), row.pop("cells", ())
    if not isinstance(within, Mapping):
        raise ValueError(f'within is {within!r}: write an object that maps km to probability, as in {{"25": 0.5}}')
    shares = [
        _number(within.get(str(km), row.pop(f"within_{km}", None)), f"within {km} km", 1)
        for km in distance.THRESHOLDS_KM
    ]
    radii = [_number(row.pop(name, None), name, math.inf) for name in ("radius_km", "radius_90_km")]
    try:
        table = np.array([[cell[name] for name in _CELL] for cell in cells], np.float64).reshape(-1, 4)
        CellScheme(1, 1).encode(table[:, 1], table[:, 2])  # raises ValueError if degrees are out of range
        if not ((table[:, 0] >= -1) & (table[:, 0] <= MAX_LEVEL) & (table[:, 3] >= 0) & (table[:, 3] <= 1)).all():
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"cells is malformed: write a list of objects with level (-1 to {MAX_LEVEL}), latitude and longitude "
            "(degrees) and probability (0 to 1), or remove it"
        ) from None
    return Claims(np.array([shares]), np.array([radii]), table[None])


def _number(value: Any, name: str, maximum: float) -> float:
    """Returns the value as a float; NaN if it is None or "". Raises ValueError if it is outside of 0 to `maximum`."""
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= maximum:
        allowed = "a number that is 0 or more" if math.isinf(maximum) else f"a number from 0 to {maximum:g}"
        raise ValueError(f"{name} is {value!r}: give {allowed}, or leave it out")
    return number


def concatenate(claims: Sequence[Claims]) -> Claims | None:
    """Returns the claims of several single photos as one Claims; None if no photo states any uncertainty."""
    cells = np.full((len(claims), max(claim.cells.shape[1] for claim in claims), 4), np.nan)
    for n, claim in enumerate(claims):
        cells[n, : claim.cells.shape[1]] = claim.cells[0]
    within, radius = (np.concatenate([getattr(c, name) for c in claims]) for name in ("within", "radius_km"))
    joined = Claims(within, radius, cells)
    return None if all(np.isnan(values).all() for values in dataclasses.astuple(joined)) else joined
