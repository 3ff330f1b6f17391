"""Reads and writes the files in which stages store their results.

photos/ is a TFDS data set of ArrayRecord shards. features/ and tokens/ are ArrayRecord shards of fixed-layout records.
gallery/, queries/ and neighbors/ are memory-mapped arrays (.npy). Files are written to a temporary name and then
renamed, so an existing shard is complete. TensorFlow is never imported.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from geotoken_jax import disk
from geotoken_jax.shards import Shards, damaged

#: Level of the S2 cells of stored tokens. Stored tokens have one level per token (group 1). To use more levels per
#: token, a CellScheme converts them.
LEVEL = 20
#: Size of the fields for id and author in fixed-layout records, in bytes of UTF-8. If a photo of the data set has a
#: longer id or author, the size is a larger multiple of this number, and the manifests of photos/ and features/ contain
#: it as the fact id_bytes.
ID_BYTES = 64
#: Size of the field for the name of a photo's source, in bytes. Only data sets of several sources have this field.
SOURCE_BYTES = 32
#: Largest number of bytes of an id or author. `geotoken prepare` drops photos with a longer id or author.
LONGEST_ID = 1024

#: A group of records is read as a whole. Groups have one record, because shuffled training reads single records; with
#: 256 records per group this takes 6 to 7 times as long.
_WRITER_OPTIONS = "group_size:1,uncompressed"


#: Format string for the names of ArrayRecord shards, as in TFDS. split: beginning of the name, usually a split.
SHARD_FILES = "{split}.array_record-{shard:05d}-of-{shards:05d}"


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a fixed-layout record. dtype: name of a numpy type, or bfloat16. shape: shape within the record."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of records that all have the same fields at the same offsets, little-endian and without padding."""

    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self._numpy.itemsize

    @functools.cached_property
    def _numpy(self) -> np.dtype:
        stored = [(f.name, "<u2" if f.dtype == "bfloat16" else np.dtype(f.dtype), f.shape) for f in self.fields]
        return np.dtype(stored)

    def encode(self, columns: Mapping[str, np.ndarray]) -> list[bytes]:
        """Returns one record per row. columns: field name -> array [n, *shape]. Raises ValueError on a wrong shape."""
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
                f"a record has {len(data[0])} bytes, but the layout has {dtype.itemsize}: the file is damaged or of "
                "another version, so remove its folder and run its stage again"
            )
        rows = np.frombuffer(b"".join(data), dtype)
        columns = {}
        for field in self.fields:
            values = np.ascontiguousarray(rows[field.name])
            columns[field.name] = values.view(ml_dtypes.bfloat16) if field.dtype == "bfloat16" else values
        return columns


def id_facts(longest: int) -> dict[str, int]:
    """Returns the fact id_bytes for a manifest, or {} if ID_BYTES is enough. longest: bytes of longest id or author."""
    return {"id_bytes": -(-longest // ID_BYTES) * ID_BYTES} if longest > ID_BYTES else {}


def feature_layout(width: int, id_bytes: int = ID_BYTES, sources: bool = False) -> Layout:
    """Returns the layout of features/, whose records most later stages read instead of photos.

    width: C, the width of image and text features. id_bytes: size of the fields for id and author. sources: whether the
    photos are of several sources, so that records have the field `source`.

    The field `tokens` contains level-20 S2 tokens of group 1. The field `captured` is the time at which the photo was
    taken, in seconds since 1970, NaN if unknown. The field `source` is the name of the source, empty for a benchmark.
    """
    return Layout(
        (
            Field("id", f"S{id_bytes}"),
            Field("author", f"S{id_bytes}"),
            Field("coordinates", "<f8", (2,)),
            Field("tokens", "u1", (1 + LEVEL,)),
            Field("image", "bfloat16", (width,)),
            Field("text", "bfloat16", (width,)),
            Field("captured", "<f8"),
            *((Field("source", f"S{SOURCE_BYTES}"),) if sources else ()),
        )
    )


def token_layout(neighbors: int) -> Layout:
    """Returns the layout of tokens/, the decoder's training set.

    neighbors: number of neighbors per record.

    The field `row` is the photo's row in its split's table. The field `tokens` contains level-20 S2 tokens of group 1.
    The field `neighbors` contains gallery rows, best first, and -1 for missing neighbors.
    """
    return Layout(
        (
            Field("row", "<i8"),
            Field("tokens", "u1", (1 + LEVEL,)),
            Field("neighbors", "<i4", (neighbors,)),
        )
    )


def neighbor_layout(neighbors: int) -> Layout:
    """Returns the layout of neighbors/, in which each field is an array of its own.

    neighbors: number of neighbors per photo.

    The field `rows` contains the gallery rows of the neighbors, best first; a missing neighbor has row -1. The field
    `scores` contains the scores of the neighbors; a missing neighbor has score -inf.
    """
    return Layout((Field("rows", "<i4", (neighbors,)), Field("scores", "<f4", (neighbors,))))


def schema(layout: Layout, files: str) -> dict[str, Any]:
    """Returns the contents of schema.json, which describes a folder's files for programs without this package.

    files: names of the files, as a format string. If it has `{field}`, each field is stored in .npy files of its own,
    one row per photo; otherwise the files are ArrayRecord, and each record has all fields of one photo.
    """
    columns = "{field}" in files
    dtype, fields = layout._numpy, []
    places: Any = dtype.fields
    for field in layout.fields:
        stored, offset = places[field.name][:2]
        kind = field.dtype if field.dtype == "bfloat16" else stored.base.str
        entry: dict[str, Any] = {"name": field.name, "dtype": kind, "stored_as": stored.base.str}
        entry["shape"] = ["photos", *field.shape] if columns else list(field.shape)
        fields.append(entry if columns else {**entry, "offset": offset, "bytes": stored.itemsize})
    record = {} if columns else {"record_bytes": dtype.itemsize}
    form = {"format": "npy" if columns else "ArrayRecord", "files": files, "byte_order": "little"}
    return {**form, **record, "fields": fields}


def shard_path(folder: epath.Path, stem: str, shard: int, shards: int) -> epath.Path:
    """Returns the path of a shard, named as in TFDS: `folder/stem.array_record-00003-of-00016` for shard 3 of 16."""
    return folder / SHARD_FILES.format(split=stem, shard=shard, shards=shards)


def shard_paths(folder: epath.PathLike, stem: str) -> list[epath.Path]:
    """Returns the paths of all shards in order. Raises FileNotFoundError if one is missing.

    stem: beginning of the files' names, such as a split.
    """
    return numbered(folder, f"{stem}.array_record-", "", stem)


def numbered(folder: epath.PathLike, beginning: str, ending: str, label: str) -> list[epath.Path]:
    """Returns the paths of all files of shards in order. Raises FileNotFoundError if one is missing.

    beginning, ending: texts before and after the numbers of a shard. label: name of the shards, for the error message.
    """
    paths = disk.matching(folder, f"{glob.escape(beginning)}?????-of-?????{ending}")
    count = int(paths[0].name.removesuffix(ending)[-5:]) if paths else 0
    if not paths or len(paths) != count:
        number = f"{len(paths)} of {count}" if paths else "no"
        raise FileNotFoundError(f"{folder} has {number} shards of {label}: remove the folder and run its stage again")
    return paths


def write_shard(path: epath.Path, data: Iterable[bytes], options: str = _WRITER_OPTIONS) -> int:
    """Writes one ArrayRecord shard atomically, and returns the number of records."""
    n, source = 0, iter(data)
    with disk.writing(path) as temporary:
        with _os_errors(temporary):
            writer = ArrayRecordWriter(str(temporary), options)
        try:
            for record in source:
                with _os_errors(temporary):
                    writer.write(record)
                n += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the file is removed, even if its end cannot be written
                writer.close()
            raise
        with _os_errors(temporary):
            writer.close()
    return n


@contextlib.contextmanager
def _os_errors(path: epath.Path) -> Iterator[None]:
    """Turns the errors of a writer into OSErrors with an error number, and removes the file that it was writing.

    The number is missing in the writers' own errors. ArrayRecord raises a RuntimeError that contains the message of the
    operating system. numpy raises an OSError without a number if it cannot write all bytes.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise
        short = errno.ENOSPC if isinstance(error, OSError) else errno.EIO
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(n) in str(error)), short)
        raise OSError(number, os.strerror(number), str(path.parent)) from error


class Records:
    """Random access to the records in all shards of a split. stem: see shard_paths.

    `records[rows]` is a dict of arrays in the order of `rows`; it raises DamagedError that names a damaged record.
    Instances can be pickled: each process opens the files on first use.
    """

    def __init__(self, folder: epath.PathLike, stem: str, layout: Layout):
        self._shards = Shards(shard_paths(folder, stem))
        self.layout = layout

    @property
    def paths(self) -> list[str]:
        return self._shards.paths

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, rows: Sequence[int] | np.ndarray | slice) -> dict[str, np.ndarray]:
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        data = self._shards.read(rows)
        for row, record in zip(rows, data, strict=True):
            if len(record) != self.layout.size:
                raise damaged(self._shards.name(row), f"it has {len(record)} bytes, not {self.layout.size}")
        return self.layout.decode(data)


def save_array(path: epath.PathLike, values: np.ndarray) -> None:
    """Writes an array as .npy atomically. bfloat16 is stored as uint16, because .npy has no name for it."""
    with disk.writing(path) as temporary, _os_errors(temporary), temporary.open("wb") as f:
        np.save(f, values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values)


def save_arrays(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays as one .npz atomically."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.writing(path) as temporary, _os_errors(temporary), temporary.open("wb") as f:
        np.savez(f, **arrays)  # pyright: ignore[reportArgumentType]


def open_array(path: epath.PathLike, dtype: Any = None) -> np.ndarray:
    """Returns a memory-mapped array (.npy). dtype: type of the result, such as bfloat16; the stored type if None.

    Raises DamagedError if the file does not contain an array, or contains more bytes than its array.
    """
    try:
        values: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's reader of headers raises errors of many types, such as TokenError
        raise damaged(os.fspath(path), error) from None
    excess = os.path.getsize(path) - values.offset - values.nbytes if values.nbytes else 0
    if excess:
        raise damaged(os.fspath(path), f"it has {excess:,} bytes more than its array")
    return values if dtype is None else values.view(dtype)


def photo_features(sources: bool = False) -> Any:
    """Returns the TFDS features of photos/. sources: whether the photos are of several sources.

    Coordinates are stored as the bytes of float64 numbers. As a Scalar, TFDS would store them as float32, with an error
    of up to 0.85 m.
    """
    import tensorflow_datasets as tfds  # imported here because the import takes 0.3 s, and few callers need it

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
            **({"source": text()} if sources else {}),
        }
    )


#: Fields with the names of a photo's place; a name is "" if unknown.
PLACE_FIELDS = ("city", "state", "country", "continent", "neighbourhood", "county", "region")


class Photos:
    """Random access to the photos of a split, in the order of the shards. `photos[i]` is a dict.

    id, author and PLACE_FIELDS: strings. image: bytes of the encoded file. coordinates: float64 [2], latitude and
    longitude in degrees. tokens: uint8 [21], level-20 S2 tokens of group 1. captured: float64, seconds since 1970, NaN
    if unknown; missing in photos/ of earlier versions. source: string, the name of the photo's source, empty for a
    benchmark; missing unless there are several sources.

    folder: photos/, which contains the data set as NAME/VERSION/, or the data set's files, as in earlier versions.
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

            folder = _data_set(epath.Path(self.folder))
            try:
                builder: Any = tfds.builder_from_directory(str(folder))
            except OSError:
                raise
            except Exception as error:  # errors of any type, because JSON and protobuf have types of their own
                raise damaged(f"dataset_info.json or features.json in {folder}", error) from None
            shards = Shards([str(path) for path in builder.info.splits[self.split].filepaths])
            decode = functools.partial(
                builder.info.features.deserialize_example_np, decoders={"image": tfds.decode.SkipDecoding()}
            )
            self._source = shards, decode
        return self._source

    def __len__(self) -> int:
        return len(self._open[0])

    def __getitem__(self, row: int) -> dict[str, Any]:
        shards, decode = self._open
        photo = dict(decode(shards.read([row])[0]))
        text = {name: value.decode() if _is_text(name) else value for name, value in photo.items()}
        return {**dict.fromkeys(PLACE_FIELDS, ""), **text}  # photos/ of earlier versions lacks some of PLACE_FIELDS


def _data_set(folder: epath.Path) -> epath.Path:
    """Returns the folder with the files of the TFDS data set in photos/."""
    if (folder / "features.json").exists():
        return folder
    versions = (version for name in disk.matching(folder, "*") for version in disk.matching(name, "*"))
    folders = [version for version in versions if (version / "features.json").exists()]
    if len(folders) != 1:
        raise FileNotFoundError(
            f"{folder} has {len(folders)} data sets of the form NAME/VERSION/features.json, not one: remove the folder "
            "and run `geotoken prepare` again"
        )
    return folders[0]


def _is_text(name: str) -> bool:
    """Returns whether a field of photos/ is text, which TFDS returns as bytes."""
    return name in ("id", "author", "source", *PLACE_FIELDS)
