"""How sure rows of predictions say they are: probabilities, radii and cells."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import MAX_LEVEL, CellScheme
from geotoken_jax.predict.uncertainty import MASSES

#: A cell's names where it is an object.
_CELL = ("level", "latitude", "longitude", "probability")


@dataclasses.dataclass(frozen=True)
class Claims:
    """How sure answers say they are; NaN where one says nothing.

    within: probabilities that the truth is within each of THRESHOLDS_KM. radius_km: around the answer, of each of
    MASSES percent. cells: level, latitude, longitude and probability of S2 cells.
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

    JSON: `within` {"25": p}, `radius_km` {"50": km} or a number (of 50 %), `cells` [[level, latitude, longitude, p]];
    and as `geotoken predict --json` has it: `radius_90_km` beside it, cells as objects. CSV: columns within_25,
    radius_km_50, radius_km. Raises ValueError with the fix on anything else.
    """
    within, radius, cells = row.pop("within", {}), row.pop("radius_km", {}), row.pop("cells", ())
    if not isinstance(radius, Mapping):
        radius = {str(MASSES[0]): radius}
        if "radius_90_km" in row:
            radius["90"] = row.pop("radius_90_km")
    if not isinstance(within, Mapping):
        raise ValueError(f'within is {within!r}: write an object of km and probability, as in {{"25": 0.5}}')
    shares = [_value(row, within, "within", km, 1) for km in distance.THRESHOLDS_KM]
    radii = [_value(row, radius, "radius_km", mass, math.inf) for mass in MASSES]
    try:
        cells = [[cell[name] for name in _CELL] if isinstance(cell, Mapping) else cell for cell in cells]
        table = np.array(cells, np.float64).reshape(-1, 4)
        CellScheme(1, 1).encode(table[:, 1], table[:, 2])  # looks at the degrees
        if not ((table[:, 0] >= -1) & (table[:, 0] <= MAX_LEVEL) & (table[:, 3] >= 0) & (table[:, 3] <= 1)).all():
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"cells must be a list of [level -1..{MAX_LEVEL}, latitude, longitude, probability]: mend or remove it"
        ) from None
    return Claims(np.array([shares]), np.array([radii]), table[None])


def _value(row: dict[str, Any], held: Mapping[str, Any], name: str, key: int, most: float) -> float:
    """Returns what is under a key, or in the column NAME_KEY; NaN for neither."""
    value = held.get(str(key), row.pop(f"{name}_{key}", None))
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= most:
        raise ValueError(f"{name} of {key} is {value!r}: give a number from 0 to {most:g}, or leave it out")
    return number


def concatenate(claims: Sequence[Claims]) -> Claims | None:
    """Returns the claims of single rows as one Claims; None where no row has any."""
    cells = np.full((len(claims), max(claim.cells.shape[1] for claim in claims), 4), np.nan)
    for n, claim in enumerate(claims):
        cells[n, : claim.cells.shape[1]] = claim.cells[0]
    within, radius = (np.concatenate([getattr(c, name) for c in claims]) for name in ("within", "radius_km"))
    found = Claims(within, radius, cells)
    return None if all(np.isnan(values).all() for values in dataclasses.astuple(found)) else found
