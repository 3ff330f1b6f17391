"""Example photos of the report, and lookups of gallery photos and place names for them."""

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

#: Photos per kind: best, median and worst.
_SHOWN = 10
#: Largest distance in km at which a place gets the name of the nearest gallery photo.
_NEAR_KM = 100.0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Photos of a split with the smallest, median and largest errors of one method.

    Attributes:
        split: name of the split.
        name: name of the method.
        kinds: records of photos/ by `best`, `median` and `worst`.
        predictions: row of the file of predictions by photo id.
    """

    split: str
    name: str
    kinds: Mapping[str, Sequence[Mapping[str, Any]]]
    predictions: Mapping[str, Mapping[str, Any]]


def ranked(method: Method, count: int = _SHOWN) -> dict[str, Int[np.ndarray, "n"]]:
    """Returns up to `count` rows of photos each for `best`, `median` and `worst`, by error of the method.

    Photos without a prediction are not ranked.
    """
    order = np.argsort(method.km, kind="stable")[: len(method.km) - method.missing]
    middle = max(0, (len(order) - count) // 2)
    return {"best": order[:count], "median": order[middle : middle + count], "worst": order[::-1][:count]}


class PhotoLookup:
    """Finds photos of one split by id, and place names by coordinates."""

    def __init__(self, photos: Photos, table: Table, wanted: Iterable[str] = ()):
        """photos: records of the split. table: its table, gallery/ or queries/. wanted: ids that `photo` can return."""
        self._photos = photos
        self._ids = np.asarray(table.ids())
        self._vectors = distance.to_unit_vectors(*table.coordinates().T)
        rows = np.flatnonzero(np.isin(self._ids, np.array([name.encode() for name in wanted], self._ids.dtype)))
        self._row = {bytes(self._ids[row]).decode(): int(row) for row in rows}

    def place_near(self, at: Float[np.ndarray, "2"]) -> str:
        """Returns the place name of the nearest photo, or "" if no photo is within 100 km. at: degrees."""
        cosine = self._vectors @ distance.to_unit_vectors(*at)
        nearest = int(np.argmax(cosine))
        is_near = cosine[nearest] >= math.cos(_NEAR_KM / distance.EARTH_RADIUS_KM)
        return place_name(self._photo(nearest)) if is_near else ""

    def photo(self, name: str) -> Mapping[str, Any] | None:
        """Returns the record of a photo by id; None if the photo is not in the table or not in `wanted`."""
        return self._photo(self._row[name]) if name in self._row else None

    def _photo(self, row: int) -> Mapping[str, Any]:
        """Returns the record of a row of the table.

        photos/ has the order of the table, but also has the few photos that `embed` dropped. A photo is therefore at
        the same row of photos/ or at a later row.
        """
        name = bytes(self._ids[row]).decode()
        while (photo := self._photos[row])["id"] != name:
            row += 1
        return photo


def place_name(names: Mapping[str, Any]) -> str:
    """Returns "City, Country"; only one of them if the other is unknown, "" if both are."""
    return ", ".join(str(names[part]) for part in ("city", "country") if names.get(part))
