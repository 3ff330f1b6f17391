"""What a row number becomes: records joined with the tables they point into."""

import numpy as np

from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.records import Records


class Features:
    """Reads features/ for alignment: image and text [b, C] float32, coordinates [b, 2] float32 in degrees."""

    def __init__(self, records: Records):
        self._records = records

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self._records[rows]
        return {name: found[name].astype(np.float32) for name in ("image", "text", "coordinates")}


class Tokens:
    """Reads tokens/ for the decoder and joins photo and neighbors by row.

    own: table of the photos themselves (the gallery, for the split that the gallery is made of). neighbors: M, how many
    of those on record are taken, best first. Returns query [b, 3, C] and neighbors [b, M, 3, C] bfloat16,
    neighbor_tokens [b, M, T] and tokens [b, T] int32, neighbor_count [b] int32.
    """

    def __init__(self, records: Records, own: Table, gallery: Table, cells: CellScheme, neighbors: int):
        self._records, self._own, self._gallery = records, own, gallery
        self._cells, self._neighbors = cells, neighbors

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self._records[rows]
        return {
            "query": self._own.embeddings(found["row"]),
            "tokens": np.asarray(self._cells.regroup(found["tokens"])),
            **neighbors(self._gallery, found["neighbors"][:, : self._neighbors], self._cells),
        }


def neighbors(gallery: Table, rows: np.ndarray, cells: CellScheme) -> dict[str, np.ndarray]:
    """Returns what the decoder reads of gallery rows [b, M]; missing ones are -1 and come last."""
    present = np.where(rows < 0, 0, rows)
    return {
        "neighbors": gallery.embeddings(present),
        "neighbor_tokens": np.asarray(cells.regroup(gallery.tokens(present))),
        "neighbor_count": (rows >= 0).sum(1, dtype=np.int32),
    }
