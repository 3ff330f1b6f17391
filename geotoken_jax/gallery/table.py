"""Tables of photos: one row per photo, and one memory-mapped array per column and shard."""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import disk, records
from geotoken_jax.gallery import int8
from geotoken_jax.vectors import unit

#: Column -> numpy type and shape per row. None stands for C, the width of the backbone's features.
COLUMNS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    # The columns ids and authors are wider in a data set with longer ids or authors.
    "captured": (np.dtype(np.float64), ()),
    "embeddings": (np.dtype(ml_dtypes.bfloat16), (3, None)),
    "coordinates": (np.dtype(np.float64), (2,)),
    "tokens": (np.dtype(np.uint8), (21,)),
    "ids": (np.dtype(f"S{records.ID_BYTES}"), ()),
    "authors": (np.dtype(f"S{records.ID_BYTES}"), ()),
    "sources": (np.dtype(f"S{records.SOURCE_BYTES}"), ()),
}
#: Column that may be absent -> value of every row if it is. Tables of earlier versions have no column `captured`.
#: Exports do not have it either, and have `authors` only if config.export.authors is set. Tables have `sources` only if
#: there are several sources.
OPTIONAL: dict[str, Any] = {"captured": np.nan, "authors": np.bytes_(b""), "sources": np.bytes_(b"")}
#: Names of a table's files, as a format string.
FILES = "{field}-{shard:05d}-of-{shards:05d}.npy"
#: Additional column of a table with int8 embeddings: scale of each vector, [n, 3] float32.
SCALES = "scales"
#: Rows converted to index vectors at a time: 38 MB at C = 768.
_ROWS = 4096


def write_shard(folder: epath.PathLike, shard: int, shards: int, columns: Mapping[str, np.ndarray]) -> list[epath.Path]:
    """Writes one shard of a table, and returns its files. Rows are numbered through all shards in order.

    shard: number of this shard, from 0. shards: number of all shards. columns: name in COLUMNS -> array [n, *shape];
    captured and sources are optional. Raises ValueError naming a column with a wrong type or shape.
    """
    n = len(columns["ids"])
    columns = {"captured": np.full(n, np.nan), **columns}
    present = [name for name in COLUMNS if name in columns or name != "sources"]
    for name in present:
        (dtype, shape), values = COLUMNS[name], columns[name]
        fits = len(values.shape) == len(shape) + 1 and len(values) == n
        if not fits or any(want not in (None, got) for want, got in zip(shape, values.shape[1:], strict=True)):
            wanted = ", ".join(map(str, (n, *("C" if size is None else size for size in shape))))
            raise ValueError(
                f"column {name} of the table has shape {list(values.shape)}: pass an array of shape [{wanted}], with "
                f"a row for each of the {n} photos"
            )
        if values.dtype != dtype and not (dtype.kind == values.dtype.kind == "S"):
            raise ValueError(f"column {name} of the table has type {values.dtype}: convert it to {dtype}")
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Columns in OPTIONAL are written first: an interrupted write then lacks a required column.
    for name in sorted(present, key=lambda column: column not in OPTIONAL):
        dtype = COLUMNS[name][0]
        stored = np.promote_types(dtype, columns[name].dtype) if dtype.kind == "S" else dtype
        records.save_array(_path(folder, name, shard, shards), columns[name].astype(stored, copy=False))
    return [_path(folder, name, shard, shards) for name in present]


def layout(width: int, id_bytes: int = records.ID_BYTES, sources: bool = False) -> records.Layout:
    """Returns the layout of a table, whose columns are separate arrays. Arguments: see records.feature_layout."""
    fields = []
    for name, (dtype, shape) in COLUMNS.items():
        if name == "sources" and not sources:
            continue
        stored = (
            f"S{id_bytes}" if name in ("ids", "authors") else dtype.name if dtype == ml_dtypes.bfloat16 else dtype.str
        )
        fields.append(records.Field(name, stored, tuple(width if size is None else size for size in shape)))
    return records.Layout(tuple(fields))


def quantize(folder: epath.PathLike) -> None:
    """Converts a table's embeddings from bfloat16 to int8: from 4,608 to 2,316 bytes per photo at C = 768."""
    for path in disk.matching(folder, "embeddings-*-of-*.npy"):
        scales = path.parent / path.name.replace("embeddings", SCALES)
        int8.write(records.open_array(path, ml_dtypes.bfloat16), path, scales)


class Table:
    """Reads the rows of a table of one or more shards. A pickled Table contains only the folder's name.

    Each column is a method that returns values [..., *shape], with the shapes of COLUMNS. rows: slice or integers
    [...]; all rows by default. The method raises IndexError for an integer outside [0, len), also for -1: mask missing
    neighbors first.
    """

    def __init__(self, folder: epath.PathLike):
        """Raises FileNotFoundError if a shard of a column is missing. Columns in OPTIONAL may be absent."""
        self._folder = str(folder)
        self._columns = {name: self._open(name) for name in COLUMNS}
        if self._columns["embeddings"][0].dtype == np.int8:
            self._columns[SCALES] = self._open(SCALES)
        lengths = [len(part) for part in self._columns["ids"]]
        #: Names of the columns that the folder has.
        self.stored = frozenset(name for name, parts in self._columns.items() if parts)
        for name, unknown in OPTIONAL.items():
            self._columns[name] = self._columns[name] or [np.broadcast_to(unknown, n) for n in lengths]
        #: First row of each shard, then the number of rows.
        self._starts = np.cumsum([0, *lengths])

    def __reduce__(self):
        return Table, (self._folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """C, the width of each embedding."""
        return self._columns["embeddings"][0].shape[2]

    def embeddings(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [..., 3, C] bfloat16: backbone's image embedding, location head's output, text head's output."""
        values = self._take("embeddings", rows)
        if SCALES not in self._columns:
            return values
        return int8.restored(values, self._take(SCALES, rows)).astype(ml_dtypes.bfloat16)

    def coordinates(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [..., 2] float64: latitude and longitude in degrees."""
        return self._take("coordinates", rows)

    def tokens(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [..., 21] uint8: level-20 S2 tokens, group 1."""
        return self._take("tokens", rows)

    def ids(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [...] bytes: ids of the photos."""
        return self._take("ids", rows)

    def authors(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [...] bytes: authors, empty if unknown."""
        return self._take("authors", rows)

    def sources(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [...] bytes: names of the photos' sources, empty if there is one source, and for benchmarks."""
        return self._take("sources", rows)

    def captured(self, rows: Any = slice(None)) -> np.ndarray:
        """Returns [...] float64: capture times in seconds since 1970, NaN if unknown."""
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
                f"{self._folder} has {len(self)} rows, but rows from {rows.min()} to {rows.max()} are requested: leave "
                "out -1, which stands for a missing neighbor, and use only row numbers that a search of this table "
                "returned"
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
        files = disk.matching(folder, f"{name}-*-of-*.npy")
        if not files and name in OPTIONAL:
            return []
        if not files:
            raise FileNotFoundError(f"{folder} has no shards of {name}: make the folder again")
        shards = int(files[0].stem[-5:])
        if len(files) != shards:
            raise FileNotFoundError(f"{folder} has {len(files)} of {shards} shards of {name}: make the folder again")
        parts = [records.open_array(path) for path in files]
        return [part.view(ml_dtypes.bfloat16) if part.dtype == np.uint16 else part for part in parts]


def index_vectors(embeddings: Float[np.ndarray, "B 3 C"]) -> Float[np.ndarray, "B D"]:
    """Returns the vectors that the index stores and searches: each photo's three unit vectors, concatenated.

    They are float32, and D = 3 C. Inner products are in [-3, 3] (as in G3's retrieval).
    """
    vectors = unit(np.asarray(embeddings))
    return vectors.reshape(len(vectors), math.prod(vectors.shape[1:]))  # reshape(B, -1) fails if B is 0


class IndexVectors:
    """Index vectors of a table, as a geotoken_jax.gallery.index.Vectors: computed when rows are read."""

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
    return folder / FILES.format(field=name, shard=shard, shards=shards)
