"""The gallery's table: what is known of each of its photos, in memory-mapped flat arrays."""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import records
from geotoken_jax.gallery import int8
from geotoken_jax.vectors import unit

#: Column -> numpy type, and shape within the row (C, of the backbone, is the width of the data).
COLUMNS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    "captured": (np.dtype(np.float64), ()),  # written first: a table may lack it, and must not because it is torn
    "embeddings": (np.dtype(ml_dtypes.bfloat16), (3, None)),
    "coordinates": (np.dtype(np.float64), (2,)),
    "tokens": (np.dtype(np.uint8), (21,)),
    "ids": (np.dtype(f"S{records.ID_BYTES}"), ()),
    "authors": (np.dtype(f"S{records.ID_BYTES}"), ()),
}
#: The further column of a table whose embeddings are int8: [n, 3] float32, the scale of each vector.
SCALES = "scales"
#: Rows that are made into index vectors at once: 768 wide 38 MB.
_ROWS = 4096


def write_shard(folder: epath.PathLike, shard: int, shards: int, columns: Mapping[str, np.ndarray]) -> None:
    """Writes the rows of shard `shard` of `shards`; rows are numbered through all shards in order.

    columns: every name of COLUMNS -> array [n, *shape]; captured may be left out. Raises ValueError naming a column of
    another type or shape.
    """
    n = len(columns["ids"])
    columns = {"captured": np.full(n, np.nan), **columns}
    for name, (dtype, shape) in COLUMNS.items():
        values = columns[name]
        fits = len(values.shape) == len(shape) + 1 and len(values) == n
        if not fits or any(want not in (None, got) for want, got in zip(shape, values.shape[1:], strict=True)):
            wanted = [n, *("C" if size is None else size for size in shape)]
            raise ValueError(f"column {name} of the table has shape {list(values.shape)}, not {wanted}")
        if values.dtype != dtype and not (dtype.kind == values.dtype.kind == "S"):
            raise ValueError(f"column {name} of the table is {values.dtype}: convert it to {dtype}")
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (dtype, _) in COLUMNS.items():
        records.save_array(_path(folder, name, shard, shards), columns[name].astype(dtype, copy=False))


def quantize(folder: epath.PathLike) -> None:
    """Makes int8 of a table's embeddings: 2,316 bytes a photo 768 wide, not 4,608."""
    for path in sorted(epath.Path(folder).glob("embeddings-*-of-*.npy")):
        scales = path.parent / path.name.replace("embeddings", SCALES)
        int8.write(records.open_array(path, ml_dtypes.bfloat16), path, scales)


class Table:
    """Read access to a table of any number of shards, by row number; picklable, and light to send to a process.

    Each column is a method: rows [...] -> values [..., *shape], or all rows if none are given. Rows are integers in
    [0, len): IndexError otherwise, also for -1, so a missing neighbor must be masked first.
    """

    def __init__(self, folder: epath.PathLike):
        """Raises FileNotFoundError unless every shard of every column, but captured, is there."""
        self._folder = str(folder)
        self._columns = {name: self._open(name) for name in COLUMNS}
        if self._columns["embeddings"][0].dtype == np.int8:
            self._columns[SCALES] = self._open(SCALES)
        lengths = [len(part) for part in self._columns["ids"]]
        # Tables of earlier versions, and of exports, do not say when photos were taken.
        self._columns["captured"] = self._columns["captured"] or [np.broadcast_to(np.nan, n) for n in lengths]
        #: First row of each shard, and the number of rows.
        self._starts = np.cumsum([0, *lengths])

    def __reduce__(self):
        return Table, (self._folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """C, of the embeddings."""
        return self._columns["embeddings"][0].shape[2]

    def embeddings(self, rows: Any = slice(None)) -> np.ndarray:
        """[..., 3, C] bfloat16: backbone's image embedding, location head, text head."""
        values = self._take("embeddings", rows)
        if SCALES not in self._columns:
            return values
        return int8.restored(values, self._take(SCALES, rows)).astype(ml_dtypes.bfloat16)

    def coordinates(self, rows: Any = slice(None)) -> np.ndarray:
        """[..., 2] float64: latitude and longitude in degrees."""
        return self._take("coordinates", rows)

    def tokens(self, rows: Any = slice(None)) -> np.ndarray:
        """[..., 21] uint8: level-20 S2 tokens, group 1."""
        return self._take("tokens", rows)

    def ids(self, rows: Any = slice(None)) -> np.ndarray:
        """[...] bytes."""
        return self._take("ids", rows)

    def authors(self, rows: Any = slice(None)) -> np.ndarray:
        """[...] bytes; empty where unknown."""
        return self._take("authors", rows)

    def captured(self, rows: Any = slice(None)) -> np.ndarray:
        """[...] float64: when the photo was taken, in seconds since 1970; NaN where that is not known."""
        return self._take("captured", rows)

    def _take(self, name: str, rows: Any) -> np.ndarray:
        parts = self._columns[name]
        if isinstance(rows, slice):
            if len(parts) == 1:
                return parts[0][rows]
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of a table of {len(self)}: mask missing neighbors (-1)"
            )
        if len(parts) == 1:
            return np.asarray(parts[0][rows])
        values = np.empty((*rows.shape, *parts[0].shape[1:]), parts[0].dtype)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(shard):
            here = shard == i
            values[here] = parts[i][rows[here] - self._starts[i]]
        return values

    def _open(self, name: str) -> list[np.ndarray]:
        folder = epath.Path(self._folder)
        found = sorted(folder.glob(f"{name}-*-of-*.npy"))
        if not found and name == "captured":
            return []
        shards = int(found[0].stem[-5:]) if found else 0
        if not found or len(found) != shards:
            raise FileNotFoundError(f"{folder} has {len(found)} of {shards or 'no'} shards of {name}: make it again")
        parts = [records.open_array(path) for path in found]
        return [part.view(ml_dtypes.bfloat16) if part.dtype == np.uint16 else part for part in parts]


def index_vectors(embeddings: Float[np.ndarray, "B 3 C"]) -> Float[np.ndarray, "B D"]:
    """Returns what the index holds, and is asked for, of a photo: its three vectors as of length 1, in a row.

    float32, D = 3 C; inner products lie in [-3, 3] (G3's retrieval).
    """
    vectors = unit(np.asarray(embeddings))
    return vectors.reshape(len(vectors), math.prod(vectors.shape[1:]))  # -1 could not be told of none


class IndexVectors:
    """A table's index vectors (geotoken_jax.gallery.index.Vectors), made from what is memory-mapped when asked for."""

    def __init__(self, table: Table):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, rows: Any) -> Float[np.ndarray, "n D"]:
        rows = np.arange(len(self))[rows]
        vectors = np.empty((len(rows), 3 * self._table.width), np.float32)
        for first in range(0, len(rows), _ROWS):
            part = slice(first, first + _ROWS)
            vectors[part] = index_vectors(self._table.embeddings(rows[part]))
        return vectors


def _path(folder: epath.Path, name: str, shard: int, shards: int) -> epath.Path:
    return folder / f"{name}-{shard:05d}-of-{shards:05d}.npy"
