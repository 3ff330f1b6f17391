"""MP16-Pro: 4.7 million Flickr photos with place names, read from the files as they were downloaded.

The files `mp-16-images00`, `mp-16-images01`, ... are consecutive parts of one tar, on a disk or in a bucket. A CSV has
one row per photo.

Before the first photo is read, a survey reads the CSV and all headers in the tar. It stores the rows and an index of
the tar (see `Survey`) in the folder photos/survey/. A row takes 0.2 KB there, and the survey needs about 100 bytes of
memory per photo. Each photo is then read once, at its offset in the index.

As in G3 (arXiv 2405.14702), a photo is dropped if its row has no country, if its file name does not end in `.jpg`, or
if its file has at most 5,120 bytes. Placeholders and unusable files are dropped too.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import tarfile
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Int, UInt8

from data_prep import csv_rows, images, tar_parts
from data_prep.placeholder import is_placeholder, repeated_files
from data_prep.sources import FLICKR, Drop, Photo, Provenance
from geotoken_jax import disk, manifests, records
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import MP16ProSettings
from geotoken_jax.progress import Progress, track
from geotoken_jax.settings import SettingsError

PARTS = "mp-16-images"
#: Field of Photo -> column of the CSV.
COLUMNS = {"id": "IMG_ID", "author": "AUTHOR", "latitude": "LAT", "longitude": "LON"}
_PLACES = {name: name for name in records.PLACE_FIELDS}
_FIELDS = (*COLUMNS, *_PLACES)
#: Photos with at most this number of bytes are dropped, as in G3.
SMALL = 5120
#: Reasons for which the survey drops a member of the tar. A member with the empty reason is not dropped.
REASONS = (
    *("", "not a file", "not .jpg", "truncated", "small file", "too large"),  # found from the member's header
    *("no metadata", "repeated id", "identical bytes"),
)
_REPEATED = REASONS.index("repeated id")
#: Scheme of a bucket's URL, such as s3 in s3://bucket -> package that reads such buckets.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
#: Type of a member of the tar during the survey. offset: position of the member's first header in the tar. size: bytes
#: of its data. key: hash of its file name without .jpg. fate: index in REASONS, or _FOLDER if the member is a folder.
_MEMBER = np.dtype([("offset", "i8"), ("size", "i8"), ("key", "u8"), ("fate", "u1")])
_FOLDER = 255


@dataclasses.dataclass(frozen=True)
class MP16Pro:
    """The data set MP16-Pro as a source of photos (`data_prep.sources.Source`).

    No author is in two splits. If a row has no author, its id is used as the author. A shard contains consecutive
    members of its split, in the order of the tar. The drops for members without a row, and for rows without a member,
    are in the shards of `train`.

    work: folder in which the subfolder survey/ is made. since: folder that contains the earlier files of photos/; if
    not empty, only photos that were added since then are read.
    """

    settings: MP16ProSettings
    work: str
    since: str = ""
    name = "mp16_pro"
    provenance = Provenance(
        "other",
        "MP16-Pro: the Flickr photos of MP-16, a subset of YFCC100M, with the names of their places.",
        f"Academic use only: everyone who receives MP16-Pro agrees to this. {FLICKR}",
        "Jia et al. 2024, G3, arXiv 2405.14702. Larson et al. 2017, The Benchmarking Initiative for Multimedia "
        "Evaluation, IEEE MultiMedia 24. Thomee et al. 2016, YFCC100M, CACM 59(2).",
        "https://huggingface.co/datasets/Jia-py/MP16-Pro",
    )

    def __reduce__(self):
        return type(self), (
            self.settings,
            self.work,
            self.since,
        )  # without the survey, whose arrays each process maps from disk

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. If no photo is in `validation`, this split is left out."""
        members, _ = self._chosen
        held = int(self._survey.held[members].sum())
        shards = {"train": len(members) - held, "validation": held}
        shards = {split: -(-n // self.settings.photos_per_shard) for split, n in shards.items()}
        train = shards["train"] if self.since else max(1, shards["train"])
        return {"train": train, **({"validation": shards["validation"]} if held else {})}

    def has_rows_added(self, file: str, before: str) -> bool:
        """Returns whether the CSV has become longer. Its earlier rows are compared later, by `added`."""
        return file == self._metadata.name and int(self.fingerprint()[file]) > int(before)

    def takes(self, file: str) -> bool:
        """Returns True: parts may be added to the tar."""
        del file
        return True

    def added(self, before: str) -> "MP16Pro":
        """Returns a source with only the new members and rows. before: folder with the earlier files of photos/.

        A member counts as new if it was cut short earlier and is complete now, or if it had no row and has one now.
        Raises StageError if an earlier row of the CSV has changed.
        """
        source = dataclasses.replace(self, since=before)
        _ = source._survey  # writes the rows
        with (epath.Path(before) / "survey" / self._rows.name).open("rb") as old, self._rows.open("rb") as new:
            while data := old.read(tar_parts.MAX_READ):
                if new.read(len(data)) != data:
                    raise StageError(
                        f"{self._metadata} has other rows than when {self.work} was made: --update allows new rows "
                        "only at its end, so restore the file, or make all again with `geotoken all "
                        "--remake=prepare`"
                    )
        return source

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields a photo or a drop for each member of one shard, in the order of the tar.

        Rows without a member are distributed over the shards of `train`. After its members, a shard of `train` yields a
        drop for each of these rows.
        """
        survey, n, dense = self._survey, self.settings.photos_per_shard, split == "train"
        chosen, rest = self._chosen
        members = chosen[survey.held[chosen] != dense][shard * n : (shard + 1) * n]
        with self._parts(ahead=dense) as parts, self._rows.open("rb") as rows:
            for member in members.tolist():
                yield self._load(parts, member, rows)
            spare = slice(shard, None, self.splits["train"]) if dense else slice(0)
            for offset, repeated in zip(survey.spare[rest][spare], survey.repeated[rest][spare], strict=True):
                row = _row(rows, offset)
                yield row if isinstance(row, Drop) else Drop(row.id, "repeated id" if repeated else "no image")

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> size, for the parts and the CSV. `_survey` raises an error if these sizes have changed."""
        parts, metadata = self._parts(), self._metadata
        sizes = dict(zip((path.name for path in parts.paths), map(str, parts.lengths), strict=True))
        return {**sizes, metadata.name: str(metadata.stat().length)}

    def _load(self, parts: tar_parts.Parts, member: int, rows: IO[bytes]) -> Photo | Drop:
        """Returns the photo of a member, or a drop.

        If a row has several members, its first usable member is the photo. The later usable members are dropped as
        repeated ids. member: number of the member in the survey. rows: opened rows.jsonl.
        """
        fate = self._survey.fate[member]
        if fate not in (0, _REPEATED):
            return Drop(tar_parts.member(parts, int(self._survey.member[member])).name, REASONS[fate])
        photo = self._read(parts, member, rows)
        same_row = self._same_row_members.get(int(self._survey.row[member]), [])
        if not same_row or isinstance(photo, Drop):
            return photo
        if reason := images.drop_reason(photo.image):
            return Drop(photo.id, reason)
        for other in same_row[: same_row.index(member)]:
            earlier = self._read(parts, other, rows)
            if isinstance(earlier, Photo) and not images.drop_reason(earlier.image):
                return Drop(photo.id, REASONS[_REPEATED])
        return photo

    def _read(self, parts: tar_parts.Parts, member: int, rows: IO[bytes]) -> Photo | Drop:
        info = tar_parts.member(parts, int(self._survey.member[member]))
        row = _row(rows, self._survey.row[member])
        if _stem(row.id) != _stem(info.name.rpartition("/")[2]):  # different names with the same hash
            return Drop(info.name, "no metadata")
        if isinstance(row, Drop):
            return row
        if not row.country:
            return Drop(row.id, "no country")
        image = tar_parts.data(parts, info)
        if is_placeholder(image, self.settings.placeholder):
            return Drop(row.id, "placeholder")
        return dataclasses.replace(row, image=image)

    @functools.cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices in the survey of the members, and of the rows without a member, that this source reads.

        These are all, or only the new ones if `since` is not empty.
        """
        survey = self._survey
        if not self.since:
            return np.arange(len(survey.member)), np.arange(len(survey.spare))
        before = _read_survey(epath.Path(self.since) / "survey")
        at = np.minimum(np.searchsorted(before.member, survey.member), len(before.member) - 1)
        incomplete = np.isin(before.fate[at], [REASONS.index(reason) for reason in ("truncated", "no metadata")])
        added = (before.member[at] != survey.member) | (incomplete & (before.fate[at] != survey.fate))
        return np.flatnonzero(added), np.flatnonzero(~np.isin(survey.spare, before.spare))

    @functools.cached_property
    def _same_row_members(self) -> dict[int, list[int]]:
        """Row -> its members, for each row with several. Members that are dropped for other reasons are left out."""
        survey, same_row = self._survey, {}
        repeated = np.isin(survey.row, survey.row[survey.fate == _REPEATED])
        for member in np.flatnonzero(repeated & np.isin(survey.fate, (0, _REPEATED))).tolist():
            same_row.setdefault(int(survey.row[member]), []).append(member)
        return same_row

    def _parts(self, ahead: bool = False) -> tar_parts.Parts:
        """Returns the parts of the tar. ahead: see tar_parts.Parts.

        Raises StageError if a part is missing, SettingsError if the package that reads the bucket is not installed.
        """
        folder = epath.Path(self.settings.folder)
        _check_storage(folder)
        paths = disk.matching(folder, f"{PARTS}[0-9][0-9]") if self.settings.folder else []
        if not paths:
            raise StageError(
                f"config.photos.mp16_pro.folder is {self.settings.folder!r}, which has no {PARTS}00: set it to the "
                "folder of the tar's parts"
            )
        for n, path in enumerate(paths):
            if path.name != f"{PARTS}{n:02d}":
                raise StageError(f"{folder} has {path.name} but no {PARTS}{n:02d}: download the missing part there")
        return tar_parts.Parts(paths, ahead)

    @property
    def _metadata(self) -> epath.Path:
        path = epath.Path(self.settings.folder) / self.settings.metadata
        if not path.exists():
            raise StageError(
                f"{path} does not exist: set config.photos.mp16_pro.metadata to the CSV, relative to "
                "config.photos.mp16_pro.folder"
            )
        return path

    @property
    def _rows(self) -> epath.Path:
        return epath.Path(self.work) / "survey" / "rows.jsonl"

    @functools.cached_property
    def _survey(self) -> "Survey":
        """The survey, read from disk. If it is not on disk, it is made and stored first.

        Raises StageError if the files have changed since the survey was made: a part was added or removed, or the size
        of a part or of the CSV is another.
        """
        parts, metadata, folder = self._parts(), self._metadata, self._rows.parent
        files = {path.name: length for path, length in zip(parts.paths, parts.lengths, strict=True)}
        files[metadata.name] = metadata.stat().length
        done = folder / "files.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with parts:
                survey = _make_survey(parts, _index_rows(metadata, self._rows, self.settings), self.settings)
            for name, values in dataclasses.asdict(survey).items():
                records.save_array(folder / f"{name}.npy", values)
            manifests.write_json(done, files)
        surveyed = json.loads(done.read_text())
        for name in sorted(surveyed.keys() | files.keys()):
            if surveyed.get(name) != files.get(name):
                raise StageError(
                    f"in {self.settings.folder}, {name} has {files.get(name, 'no')} bytes, but had "
                    f"{surveyed.get(name, 'no')} when {self.work} was begun: restore the file, or remove {self.work} "
                    "and prepare again from the files as they are"
                )
        return _read_survey(folder)


def _check_storage(folder: epath.Path) -> None:
    """Raises SettingsError if a folder is in a bucket and the package that reads such buckets is not installed."""
    if tar_parts.is_url(folder):
        package = _PACKAGES[os.fspath(folder).split("://")[0]]
        try:
            folder.exists()
        except ImportError:
            raise SettingsError(
                f"config.photos.mp16_pro.folder is {os.fspath(folder)!r}, which needs the package {package}: install "
                f"it with `pip install {package}`, or copy the files to a disk"
            ) from None


@dataclasses.dataclass(frozen=True)
class Survey:
    """An index of the tar's members and of the rows in survey/rows.jsonl, as flat arrays.

    Four arrays have one value per member, in the order of the tar. member: offset of the member's first header in the
    tar. row: offset of the member's row in rows.jsonl, or -1 if it has none. fate: index in REASONS of the reason to
    drop the member. held: whether the member is in the split `validation`.

    Two arrays have one value per row without a member. spare: offset of the row in rows.jsonl. repeated: whether an
    earlier row has the same id.
    """

    member: Int[np.ndarray, " members"]
    row: Int[np.ndarray, " members"]
    fate: UInt8[np.ndarray, " members"]
    held: Bool[np.ndarray, " members"]
    spare: Int[np.ndarray, " spare"]
    repeated: Bool[np.ndarray, " spare"]


def _read_survey(folder: epath.Path) -> Survey:
    return Survey(*(records.open_array(folder / f"{field.name}.npy") for field in dataclasses.fields(Survey)))


def _make_survey(parts: tar_parts.Parts, rows: tuple[np.ndarray, ...], settings: MP16ProSettings) -> Survey:
    """Returns the survey. parts: the opened tar. rows: result of `_index_rows`."""
    row_offset, row_key, row_held = rows
    members = _index_members(parts)
    offset, size, member_key, fate = (np.array(members[name]) for name in ("offset", "size", "key", "fate"))
    keys, first = np.unique(row_key, return_index=True)  # of rows with the same id, the first is used
    position = np.minimum(np.searchsorted(keys, member_key), len(keys) - 1)
    row = np.where(keys[position] == member_key, first[position], -1)
    fate[(fate == 0) & (row < 0)] = REASONS.index("no metadata")

    kept = np.flatnonzero(fate == 0)

    def read(n: int) -> bytes:
        return tar_parts.data(parts, tar_parts.member(parts, int(offset[kept[n]])))

    fate[kept[repeated_files(size[kept], read, settings.placeholder.identical)]] = REASONS.index("identical bytes")
    kept = np.flatnonzero(fate == 0)
    first_of_row = np.unique(row[kept], return_index=True)[1]
    fate[np.delete(kept, first_of_row)] = _REPEATED
    taken, earliest = np.zeros(len(row_key), bool), np.zeros(len(row_key), bool)
    taken[row[row >= 0]] = True
    earliest[first] = True
    has_row = row >= 0
    return Survey(
        member=offset,
        row=np.where(has_row, row_offset[row], -1),
        fate=fate,
        held=has_row & row_held[row],
        spare=row_offset[~taken],
        repeated=~earliest[~taken],
    )


def _index_members(parts: tar_parts.Parts) -> np.ndarray:
    """Returns an array of _MEMBER with all members of the tar except folders, in the order of the tar.

    The parts are read in parallel, because most of the time is spent waiting for the disk. The first header of a part
    is not known at that time, so reading starts at the first block that looks like a header. Afterwards the last member
    of the part before gives the position of the true first header. If no member was found at this position, the guess
    was wrong, and the part is read again from there.
    """
    starts = [0, *itertools.accumulate(parts.lengths)]
    pieces, position, ended = [], 0, threading.Event()
    with concurrent.futures.ThreadPoolExecutor(len(starts)) as pool, Progress("headers", parts.length, "B") as progress:
        guesses = pool.map(functools.partial(_guess_members, parts.paths, ended), starts[:-1], starts[1:])
        try:
            for (start, end), piece in zip(itertools.pairwise(starts), guesses, strict=True):
                if position <= end:  # otherwise one member covers the whole part, or the tar has ended before it
                    if position not in piece["offset"]:
                        piece = _read_members(parts, ended, position, end)
                    piece = piece[piece["offset"] >= position]
                    pieces.append(piece[piece["offset"] < end])
                    last = int(piece["offset"].max(initial=-1))
                    position = last if last >= end else parts.length + 1
                progress.add(end - start)
        finally:
            ended.set()  # after an error or Ctrl-C: stops the threads of the other parts
    members = np.concatenate(pieces)
    return members[members["fate"] != _FOLDER]


def _guess_members(paths: Sequence[epath.Path], ended: threading.Event, start: int, end: int) -> np.ndarray:
    """Returns the members from the first block in [start, end) that looks like a header. See `_read_members`.

    Returns an empty array if the tar cannot be read from this block on.
    """
    with tar_parts.Parts(paths) as parts:
        try:
            return _read_members(parts, ended, tar_parts.find_header(parts, start, end), end)
        except StageError:
            return np.empty(0, _MEMBER)


def _read_members(parts: tar_parts.Parts, ended: threading.Event, start: int, end: int) -> np.ndarray:
    """Returns an array of _MEMBER with the members from the header at `start` on.

    Stops after the first member that begins at or after `end`. ended: event that another thread sets to stop this call
    early.
    """
    offset, size, key, fate = array("q"), array("q"), array("Q"), array("B")
    for info in tar_parts.members(parts, start):
        offset.append(info.offset)
        size.append(info.size)
        key.append(_key(_stem(info.name.rpartition("/")[2])))
        fate.append(_FOLDER if info.isdir() else REASONS.index(_fault(info, parts.length)))
        if info.offset >= end or ended.is_set():
            break
    rows = np.empty(len(offset), _MEMBER)
    rows["offset"], rows["size"], rows["key"], rows["fate"] = offset, size, key, fate
    return rows


def _fault(info: tarfile.TarInfo, length: int) -> str:
    if not info.isreg() or info.issparse():
        return "not a file"
    if not info.name.endswith(".jpg"):
        return "not .jpg"
    if info.offset_data + info.size > length:
        return "truncated"
    if info.size <= SMALL:
        return "small file"
    return "too large" if info.size > tar_parts.MAX_READ else ""


def _index_rows(path: epath.Path, saved: epath.Path, settings: MP16ProSettings) -> tuple[np.ndarray, ...]:
    """Writes each row of the CSV as a line of JSON into the file `saved`.

    Returns three arrays with one value per row: its offset in that file, the hash of its id, and whether its author is
    in the split `validation`.
    """
    offset, key, held = array("q"), array("Q"), array("B")
    limit = settings.validation * 2**64
    with saved.open("wb") as file:
        rows: Any = csv_rows.read_rows(path, COLUMNS, _PLACES)  # pyright: ignore[reportArgumentType]
        for row in track(rows, "rows", unit="rows"):
            offset.append(file.tell())
            key.append(_key(_stem(row.id)))
            held.append(isinstance(row, Photo) and _key(row.author, settings.seed) < limit)
            values = (row.id, row.reason) if isinstance(row, Drop) else [getattr(row, field) for field in _FIELDS]
            file.write(json.dumps(values).encode() + b"\n")
    if not offset:
        raise StageError(f"{path} has a header and no rows: download it again")
    return np.asarray(offset), np.asarray(key), np.asarray(held).astype(bool)


def _stem(name: str) -> str:
    """Returns a name in which `/` is replaced by `_` and `.jpg` is removed.

    In this form, the id of a row equals the file name of its member.
    """
    return name.replace("/", "_").removesuffix(".jpg")


def _key(text: str, seed: int = 0) -> int:
    """Returns a 64-bit hash of a text.

    The probability that any two of 4.7 million names have the same hash is 1 / 1.7 million.
    """
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8, key=seed.to_bytes(8, signed=True))
    return int.from_bytes(digest.digest())


def _row(file: IO[bytes], offset: Any) -> Photo | Drop:
    file.seek(int(offset))
    values = json.loads(file.readline())
    return Drop(*values) if len(values) == 2 else Photo(image=b"", **dict(zip(_FIELDS, values, strict=True)))
