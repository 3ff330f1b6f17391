"""The wire formats between stages: the only place that knows bytes.

photos/ is a TFDS data set of ArrayRecord shards; features/ and tokens/ are ArrayRecord shards of fixed-layout records;
gallery/, queries/ and neighbors/ are flat arrays (.npy), memory-mapped. Shards are written beside and renamed, so a
shard that exists is whole. TensorFlow is never imported.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

#: Level of the S2 tokens on record, each of one quad; a CellScheme takes what it needs of them.
LEVEL = 20
#: Longest id and author, in UTF-8 bytes, that fixed-layout records hold. Longer ones are dropped by `prepare`.
ID_BYTES = 64

#: One record a group: global shuffling reads single records (a group of 256 is 6-7 times slower at that).
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Field:
    """One column of a fixed-layout record: numpy type name (or bfloat16, or S64) and shape within the record."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Fixed-layout records: every record has the same fields at the same offsets, little-endian, unpadded."""

    fields: tuple[Field, ...]

    @property
    def _numpy(self) -> np.dtype:
        stored = [(f.name, "<u2" if f.dtype == "bfloat16" else np.dtype(f.dtype), f.shape) for f in self.fields]
        return np.dtype(stored)

    def encode(self, columns: Mapping[str, np.ndarray]) -> list[bytes]:
        """Returns one record a row. columns: field name -> array [n, *shape]. Raises ValueError on a wrong shape."""
        n = len(next(iter(columns.values())))
        rows = np.zeros(n, self._numpy)
        for field in self.fields:
            values = np.asarray(columns[field.name])
            if values.shape != (n, *field.shape):
                raise ValueError(f"{field.name} has shape {values.shape}, not {(n, *field.shape)}")
            if field.dtype == "bfloat16":
                values = values.astype(ml_dtypes.bfloat16).view(np.uint16)
            rows[field.name] = values
        data = rows.tobytes()
        return [data[i : i + rows.itemsize] for i in range(0, len(data), rows.itemsize)]

    def decode(self, data: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Returns field name -> array [n, *shape]. Raises ValueError if a record is not of this layout."""
        dtype = self._numpy
        if any(len(record) != dtype.itemsize for record in data):
            raise ValueError(
                f"a record of {len(data[0])} bytes where the layout has {dtype.itemsize}: it is torn, or of another "
                "version; make its folder again"
            )
        rows = np.frombuffer(b"".join(data), dtype)
        columns = {}
        for field in self.fields:
            values = np.ascontiguousarray(rows[field.name])
            columns[field.name] = values.view(ml_dtypes.bfloat16) if field.dtype == "bfloat16" else values
        return columns


def feature_layout(width: int) -> Layout:
    """Records of features/: what everything after `embed` needs of a photo, its pixels left behind.

    width: C, of the backbone's image and text features. tokens: level-20 S2 tokens, group 1. captured: when the photo
    was taken, in seconds since 1970, NaN where that is not known.
    """
    return Layout(
        (
            Field("id", f"S{ID_BYTES}"),
            Field("author", f"S{ID_BYTES}"),
            Field("coordinates", "<f8", (2,)),
            Field("tokens", "u1", (1 + LEVEL,)),
            Field("image", "bfloat16", (width,)),
            Field("text", "bfloat16", (width,)),
            Field("captured", "<f8"),
        )
    )


def token_layout(neighbors: int) -> Layout:
    """Records of tokens/: the decoder's training set.

    row: of the photo in its split's table. tokens: level-20 S2 tokens, group 1. neighbors: gallery rows, best first,
    -1 where there are fewer.
    """
    return Layout(
        (
            Field("row", "<i8"),
            Field("tokens", "u1", (1 + LEVEL,)),
            Field("neighbors", "<i4", (neighbors,)),
        )
    )


def shard_path(folder: epath.Path, stem: str, shard: int, shards: int) -> epath.Path:
    """Returns `folder/stem.array_record-00003-of-00016`, the name TFDS gives shard 3 of 16."""
    return folder / f"{stem}.array_record-{shard:05d}-of-{shards:05d}"


def shard_paths(folder: epath.PathLike, stem: str) -> list[epath.Path]:
    """Returns all shards of one stem, in order. Raises FileNotFoundError unless every one is there."""
    folder = epath.Path(folder)
    found = sorted(folder.glob(f"{stem}.array_record-?????-of-?????"))
    wanted = int(found[0].name[-5:]) if found else 0
    if not found or len(found) != wanted:
        raise FileNotFoundError(
            f"{folder} has {len(found)} of {wanted or 'no'} shards of {stem}: make the folder again"
        )
    return found


def write_shard(path: epath.Path, data: Iterable[bytes], options: str = _WRITER_OPTIONS) -> int:
    """Writes one ArrayRecord shard, whole or not at all; returns the number of records."""
    beside = path.parent / f".{path.name}.partial"
    writer = ArrayRecordWriter(str(beside), options)
    n = 0
    try:
        for record in data:
            writer.write(record)
            n += 1
    except BaseException:
        writer.close()
        beside.unlink()
        raise
    writer.close()
    beside.replace(path)
    return n


class Records:
    """Random access to all shards of one stem: `records[rows]` is a dict of arrays, in the order asked for.

    Picklable: files are opened on first use, in whichever process that is.
    """

    def __init__(self, folder: epath.PathLike, stem: str, layout: Layout):
        self.paths = [str(path) for path in shard_paths(folder, stem)]
        self.layout = layout
        self._source = None

    def __getstate__(self):
        return {**self.__dict__, "_source": None}

    @property
    def _open(self) -> Any:
        if self._source is None:
            # grain is heavy to import, and most readers of this module want no records.
            from grain.sources import ArrayRecordDataSource

            self._source = ArrayRecordDataSource(self.paths)
        return self._source

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, rows: Sequence[int] | np.ndarray | slice) -> dict[str, np.ndarray]:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        return self.layout.decode(self._open.__getitems__([int(row) for row in rows]))


def save_array(path: epath.PathLike, values: np.ndarray) -> None:
    """Writes one flat array (.npy), whole or not at all. bfloat16 keeps its two bytes a number."""
    path = epath.Path(path)
    beside = path.parent / f".{path.name}.partial"
    with beside.open("wb") as f:
        np.save(f, values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values)
    beside.replace(path)


def open_array(path: epath.PathLike, dtype: Any = None) -> np.ndarray:
    """Memory-maps a flat array (.npy). dtype: what the stored numbers are, where .npy has no name for it (bfloat16)."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    return values if dtype is None else values.view(dtype)


def photo_features() -> Any:
    """Returns the TFDS features of photos/: coordinates as 8-byte floats (TFDS would store a float64 Scalar as float32,
    an error of up to 0.85 m)."""
    import tensorflow_datasets as tfds  # 0.3 s: only `prepare` and readers of pixels pay it

    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "author": text(),
            "image": tfds.features.Image(),
            "coordinates": tfds.features.Tensor(shape=(2,), dtype=np.float64, encoding="bytes"),
            "tokens": tfds.features.Tensor(shape=(1 + LEVEL,), dtype=np.uint8, encoding="bytes"),
            "captured": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
            **{name: text() for name in PLACE_FIELDS},
        }
    )


PLACE_FIELDS = ("city", "state", "country", "continent")


class Photos:
    """Random access to one split of photos/, in the order of its shards: `photos[i]` is a dict.

    id, author, city, state, country, continent: str. image: the encoded file's bytes. coordinates: float64 [2],
    latitude and longitude in degrees. tokens: uint8 [21]. captured: float64, seconds since 1970, NaN where that is not
    known; photos/ of earlier versions have none.
    """

    def __init__(self, folder: epath.PathLike, split: str):
        self.folder, self.split = str(folder), split
        self._source = None

    def __getstate__(self):
        return {**self.__dict__, "_source": None}

    @property
    def _open(self):
        if self._source is None:
            import tensorflow_datasets as tfds

            builder: Any = tfds.builder_from_directory(self.folder)
            self._source = builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})
        return self._source

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, row: int) -> dict[str, Any]:
        photo = dict(self._open[int(row)])
        return {name: value.decode() if _is_text(name) else value for name, value in photo.items()}


def _is_text(name: str) -> bool:
    return name in ("id", "author", *PLACE_FIELDS)
