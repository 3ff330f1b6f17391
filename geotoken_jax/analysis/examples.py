"""Photos to show: those placed best and worst, their neighbors, and the names of places near them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.analysis.coordinates import Method
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.records import Photos

#: Photos of each kind.
_SHOWN = 10
#: A place is named by the nearest gallery photo within this distance.
_NEAR_KM = 100.0


@dataclasses.dataclass(frozen=True)
class Examples:
    """The photos of a split that one method placed best, in the middle of its ranking, and worst.

    Attributes:
        split: where the photos are from.
        name: the method's.
        kinds: `best`, `median` and `worst` -> records of photos/.
        predictions: id -> row of the file of predictions.
    """

    split: str
    name: str
    kinds: Mapping[str, Sequence[Mapping[str, Any]]]
    predictions: Mapping[str, Mapping[str, Any]]


def ranked(method: Method, count: int = _SHOWN) -> dict[str, Int[np.ndarray, "n"]]:
    """Returns `best`, `median` and `worst` -> up to `count` rows of the photos that have a prediction."""
    order = np.argsort(method.km, kind="stable")[: len(method.km) - method.missing]
    middle = max(0, (len(order) - count) // 2)
    return {"best": order[:count], "median": order[middle : middle + count], "worst": order[::-1][:count]}


class Gallery:
    """Photos of a split by id, and the name of the place of the nearest one."""

    def __init__(self, photos: Photos, table: Table, wanted: Iterable[str] = ()):
        """photos: the split's records. table: its gallery/ or queries/. wanted: ids of the photos to be asked for."""
        self._photos = photos
        self._ids = np.asarray(table.ids())
        self._vectors = distance.to_unit_vectors(*table.coordinates().T)
        rows = np.flatnonzero(np.isin(self._ids, np.array([name.encode() for name in wanted], self._ids.dtype)))
        self._row = {bytes(self._ids[row]).decode(): int(row) for row in rows}

    def near(self, at: Float[np.ndarray, "2"]) -> str:
        """Returns the place of the nearest photo, or "" if there is none within 100 km. at: degrees."""
        similarity = self._vectors @ distance.to_unit_vectors(*at)
        nearest = int(np.argmax(similarity))
        near = similarity[nearest] >= math.cos(_NEAR_KM / distance.EARTH_RADIUS_KM)
        return place_name(self._photo(nearest)) if near else ""

    def photo(self, name: str) -> Mapping[str, Any] | None:
        """Returns the record of a photo, None for one that is not in the table."""
        return self._photo(self._row[name]) if name in self._row else None

    def _photo(self, row: int) -> Mapping[str, Any]:
        """Returns the photo of a row; photos/ has the same order, and also the few photos that `embed` dropped."""
        name = bytes(self._ids[row]).decode()
        while (photo := self._photos[row])["id"] != name:
            row += 1
        return photo


def place_name(names: Mapping[str, Any]) -> str:
    """Returns city and country, as far as they are known."""
    return ", ".join(str(names[part]) for part in ("city", "country") if names.get(part))
