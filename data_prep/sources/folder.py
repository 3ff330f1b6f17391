"""A user's folder of photos. Coordinates and times are in a CSV, or in the photos' EXIF.

A photo's id is its path relative to the folder, with `/` between folders. Files are found by walking the folder, and no
path is ever made from an id, so nothing outside the folder is read. Symbolic links are not followed.
"""

import abc
import dataclasses
import functools
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from data_prep import images
from data_prep.csv_rows import read_rows
from data_prep.sources import UNKNOWN, Drop, Photo, Provenance
from geotoken_jax.backbone.exif import gps
from geotoken_jax.backbone.preprocess import ENDINGS
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import FolderSettings
from geotoken_jax.settings import SettingsError

_COLUMNS = {name: name for name in ("id", "latitude", "longitude")}
_OPTIONAL = {name: name for name in ("author", "city", "state", "country", "continent", "captured")}


@dataclasses.dataclass(frozen=True)
class Listing:
    """All photos and drops of a source.

    photos: split -> list of pairs. A pair is a photo without its image, and the path of its file; or a drop, and "".
    exif: if true, a photo's coordinates and time are read from its file's EXIF.
    """

    photos: Mapping[str, list[tuple[Photo | Drop, str]]]
    photos_per_shard: int
    exif: bool = False

    @property
    def splits(self) -> dict[str, int]:
        """Split -> number of shards; a split of no photos is left out."""
        return {split: -(-len(rows) // self.photos_per_shard) for split, rows in self.photos.items() if rows}

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos, with their images, and drops."""
        first = shard * self.photos_per_shard
        for row, file in self.photos[split][first : first + self.photos_per_shard]:
            yield row if isinstance(row, Drop) else _load(row, file, self.exif)


class ListedSource(abc.ABC):
    """A source of photos (`data_prep.sources.Source`) that lists all photos once per process, before it reads any."""

    provenance: Provenance

    @abc.abstractmethod
    def listing(self) -> Listing:
        """Returns all photos of the source.

        Raises SettingsError if the folder or the table does not exist, StageError if one of them cannot be used.
        """

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. Raises the errors of `listing`."""
        return _listing(self).splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops, in the order of the listing."""
        return _listing(self).read(split, shard)


@functools.lru_cache(maxsize=1)
def _listing(source: ListedSource) -> Listing:
    return source.listing()


@dataclasses.dataclass(frozen=True)
class Folder(ListedSource):
    """The folder as a source. No author is in two splits.

    Photos are in the order of the CSV, or sorted by id if there is no CSV.
    """

    settings: FolderSettings
    name = "folder"
    provenance = UNKNOWN

    def listing(self) -> Listing:
        settings = self.settings
        files = walk(settings.path, "folder.path")
        if settings.csv:
            rows = read_rows(existing_file(settings.csv, "folder.csv"), _COLUMNS, _OPTIONAL)
        else:
            rows = (Photo(name, name, b"", math.nan, math.nan) for name in files if name.lower().endswith(ENDINGS))
        photos: dict[str, list] = {split: [] for split in settings.shares}
        for row, file in pair(rows, files, lambda name: name):
            author = row.author if isinstance(row, Photo) else row.id
            photos[split_of(author, settings.shares)].append((row, file))
        return Listing(photos, settings.photos_per_shard, exif=not settings.csv)


def walk(path: str, key: str) -> dict[str, str]:
    """Returns relative path -> path of each file in a folder and its subfolders, sorted; "" as a symbolic link's path.

    key: key in config.photos that names the folder, for messages. Raises SettingsError if the folder does not exist,
    StageError if there are no files in it.
    """
    if not path or not Path(path).is_dir():
        raise SettingsError(f"config.photos.{key} is {path!r}, which is not a folder: set it to the photos' folder")
    files = {}
    pending = [(path, "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_symlink() or entry.is_file():  # neither sockets nor pipes
                    files[prefix + entry.name] = "" if entry.is_symlink() else entry.path
    if not files:
        raise StageError(f"config.photos.{key} is {path!r}, which has no files: set it to the photos' folder")
    return dict(sorted(files.items()))


def existing_file(path: str, key: str) -> Path:
    """Returns the path of a table, or raises SettingsError if it does not exist.

    key: key in config.photos that names the table, for the message.
    """
    if not path or not Path(path).is_file():
        raise SettingsError(
            f"config.photos.{key} is {path!r}, which is not a file: set it to the table that lists the photos"
        )
    return Path(path)


def pair(
    rows: Iterable[Photo | Drop], files: Mapping[str, str], file_name: Callable[[str], str]
) -> Iterator[tuple[Photo | Drop, str]]:
    """Yields each row of a table with the path of its file, or as a drop with "" if its id is repeated or has no file.

    Then yields a drop, with "", for each image file without a row. files: relative path -> path, from `walk`.
    file_name: function that returns the relative path for an id. The result is only looked up in `files`, never opened.
    """
    ids, requested = set(), set()
    for row in rows:
        name = file_name(row.id)
        requested.add(name)
        if isinstance(row, Photo):
            reason = "repeated id" if row.id in ids else _missing(name, files)
            ids.add(row.id)
            row = Drop(row.id, reason) if reason else row
        yield row, "" if isinstance(row, Drop) else files[name]
    for name in files:
        if name not in requested and name.lower().endswith(ENDINGS):
            yield Drop(name, "no metadata"), ""


def _missing(name: str, files: Mapping[str, str]) -> str:
    if name in files:
        return "" if files[name] else "symbolic link"
    parts = PurePosixPath(name.replace("\\", "/"))
    return "outside the folder" if parts.is_absolute() or ".." in parts.parts else "no image"


def split_of(author: str, shares: Mapping[str, float]) -> str:
    """Returns the split of all photos of an author, chosen by a hash of the author.

    shares: split -> share of authors; the sum is 1.
    """
    digest = hashlib.sha256(author.encode(errors="surrogateescape")).digest()
    rest = int.from_bytes(digest[:8]) / 2**64
    for split, share in shares.items():
        if rest < share:
            return split
        rest -= share
    return max(shares, key=lambda split: shares[split])  # rounding can make the sum slightly less than 1


def _load(photo: Photo, file: str, exif: bool) -> Photo | Drop:
    try:
        if os.path.getsize(file) > images.MAX_BYTES:
            return Drop(photo.id, "too large")
        image = Path(file).read_bytes()
    except OSError:
        return Drop(photo.id, "unreadable file")
    if not exif:
        return dataclasses.replace(photo, image=image)
    coordinates = gps(io.BytesIO(image))
    if coordinates is None:
        return Drop(photo.id, images.drop_reason(image) or "no GPS")
    latitude, longitude = coordinates
    captured = images.captured(image)
    return dataclasses.replace(photo, image=image, latitude=latitude, longitude=longitude, captured=captured)
