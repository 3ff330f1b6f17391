"""How sure rows of predictions say they are: probabilities, radii and cells."""

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
    """How sure answers say they are; NaN where one says nothing.

    within: probabilities that the truth is within each of THRESHOLDS_KM. radius_km: around the answer, of 50 and 90 %.
    cells: level, latitude, longitude and probability of S2 cells.
    """

    within: Float[np.ndarray, "n 5"]
    radius_km: Float[np.ndarray, "n 2"]
    cells: Float[np.ndarray, "n F 4"]

    def at(self, rows: np.ndarray, n: int) -> "Claims":
        """Returns the claims of n photos of which these are some rows."""
        placed = []
        for values in (self.within, self.radius_km, self.cells):
            placed.append(np.full((n, *values.shape[1:]), np.nan))
            placed[-1][rows] = values
        return Claims(*placed)


def pop_claims(row: dict[str, Any]) -> Claims:
    """Removes from a row, and returns, what it says of how sure it is (n = 1).

    JSON: the fields of Prediction. CSV: columns radius_km, radius_90_km, within_25 and so on. Raises ValueError with
    the fix on anything else.
    """
    within, cells = row.pop("within", {}), row.pop("cells", ())
    if not isinstance(within, Mapping):
        raise ValueError(f'within is {within!r}: write an object of km and probability, as in {{"25": 0.5}}')
    shares = [
        _number(within.get(str(km), row.pop(f"within_{km}", None)), f"within {km} km", 1)
        for km in distance.THRESHOLDS_KM
    ]
    radii = [_number(row.pop(name, None), name, math.inf) for name in ("radius_km", "radius_90_km")]
    try:
        table = np.array([[cell[name] for name in _CELL] for cell in cells], np.float64).reshape(-1, 4)
        CellScheme(1, 1).encode(table[:, 1], table[:, 2])  # looks at the degrees
        if not ((table[:, 0] >= -1) & (table[:, 0] <= MAX_LEVEL) & (table[:, 3] >= 0) & (table[:, 3] <= 1)).all():
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"cells must be a list of objects with level -1..{MAX_LEVEL}, latitude, longitude, probability: mend or "
            "remove it"
        ) from None
    return Claims(np.array([shares]), np.array([radii]), table[None])


def _number(value: Any, name: str, most: float) -> float:
    """Returns a number from 0 to `most`; NaN for None and ""."""
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= most:
        raise ValueError(f"{name} is {value!r}: give a number from 0 to {most:g}, or leave it out")
    return number


def concatenate(claims: Sequence[Claims]) -> Claims | None:
    """Returns the claims of single rows as one Claims; None where no row has any."""
    cells = np.full((len(claims), max(claim.cells.shape[1] for claim in claims), 4), np.nan)
    for n, claim in enumerate(claims):
        cells[n, : claim.cells.shape[1]] = claim.cells[0]
    within, radius = (np.concatenate([getattr(c, name) for c in claims]) for name in ("within", "radius_km"))
    found = Claims(within, radius, cells)
    return None if all(np.isnan(values).all() for values in dataclasses.astuple(found)) else found
