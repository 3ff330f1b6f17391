"""A user's folder of photos. Coordinates and times are in a CSV, or in the photos' EXIF.

A photo's id is its path relative to the folder, with `/` between folders. Files are found by a walk through the folder.
No path is ever made from an id of the CSV, so nothing outside the folder is read. Links to files in the folder are
followed.
"""

import abc
import dataclasses
import functools
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep import images
from data_prep.csv_rows import read_rows
from data_prep.extended import Known
from data_prep.source_files import fingerprint, has_rows_added
from data_prep.sources import UNKNOWN, Drop, Photo, Provenance
from data_prep.sources.matching import pair
from geotoken_jax import records
from geotoken_jax.backbone.exif import gps
from geotoken_jax.backbone.preprocess import ENDINGS
from geotoken_jax.folder.walk import Files, walk
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import FolderSettings
from geotoken_jax.settings import SettingsError

_COLUMNS = {name: name for name in ("id", "latitude", "longitude")}
#: Field of Photo -> column that a table may lack.
OPTIONAL = {name: name for name in ("author", *records.PLACE_FIELDS, "captured")}


@dataclasses.dataclass(frozen=True)
class Listing:
    """All photos and drops of a source, before any image is read.

    photos: split -> list of pairs: a photo without its image and the path of its file, or a drop and "".
    photos_per_shard: photos per shard; the last shard may have fewer. exif: whether coordinates and times are read from
    the EXIF of the files.
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
    """Base class of sources (`data_prep.sources.Source`) that list all photos before they read the first one.

    The listing is made once per process.
    """

    name: str
    provenance: Provenance

    @property
    def section(self) -> str:
        """Dotted key of the source's settings, for messages."""
        return f"photos.{self.name}"

    @abc.abstractmethod
    def listing(self) -> Listing:
        """Returns all photos of the source.

        Raises SettingsError if the folder or the table does not exist, StageError if one of them cannot be used.
        """

    @property
    @abc.abstractmethod
    def places(self) -> tuple[str, str]:
        """Path of the folder, and path of the table that lists the photos; "" if there is no table."""

    def notes(self) -> Iterator[str]:
        """Yields sentences on files of the folder that are left out, for messages.

        Yields nothing if there is a table: then the table decides which files are used.
        """
        folder, table = self.places
        if not table:
            yield from files_of(folder, f"{self.section}.path").notes()

    def fingerprint(self) -> dict[str, str]:
        """Returns a dict: photo -> size and time of its file, and table -> size and SHA-256.

        Raises the errors of `files_of`, and FileNotFoundError if the table is missing.
        """
        folder, table = self.places
        return fingerprint(files_of(folder, f"{self.section}.path").photos(), [table] if table else [])

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. Raises the errors of `listing`."""
        return _listing(self).splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops, in the order of the listing."""
        return _listing(self).read(split, shard)


@functools.cache  # not lru_cache(1): a source and its benchmarks are listed alternately
def _listing(source: ListedSource) -> Listing:
    return source.listing()


@functools.cache
def _walk(path: str) -> Files:
    return walk(path)


def forget() -> None:
    """Clears the caches, so that sources list their files and photos again: they may have changed."""
    _listing.cache_clear()
    _walk.cache_clear()


@dataclasses.dataclass(frozen=True)
class Folder(ListedSource):
    """A user's folder as a source of photos. No author is in two splits.

    Photos are in the order of the CSV. Without a CSV they are sorted by id.
    """

    settings: FolderSettings
    name = "folder"
    provenance = UNKNOWN

    @property
    def places(self) -> tuple[str, str]:
        return self.settings.path, self.settings.csv

    def has_rows_added(self, file: str, before: str) -> bool:
        """Returns whether rows were added at the end of the CSV, and nothing else in it has changed."""
        return file == self.settings.csv and has_rows_added(file, before)

    def takes(self, file: str) -> bool:
        """Returns True: any file may be added to a folder."""
        del file
        return True

    def added(self, before: str) -> Listing:
        """Returns the new photos and drops. before: folder that contains the earlier files of photos/."""
        known, listing = Known.load(before, self.settings.shares), _listing(self)
        photos = {split: [item for item in items if not known.has(item[0])] for split, items in listing.photos.items()}
        return dataclasses.replace(listing, photos=photos)

    def listing(self) -> Listing:
        settings = self.settings
        files = files_of(settings.path, f"{self.section}.path")
        if settings.csv:
            rows = read_rows(existing_file(settings.csv, f"{self.section}.csv"), _COLUMNS, OPTIONAL)
        else:
            rows = (Photo(name, name, b"", math.nan, math.nan) for name in files.photos())
        photos: dict[str, list] = {split: [] for split in settings.shares}
        for row, file in pair(rows, files, lambda name: name):
            author = row.author if isinstance(row, Photo) else row.id
            photos[split_of(author, settings.shares)].append((row, file))
        if not any(photos.values()):
            notes = "; ".join(files.notes())
            raise StageError(
                f"config.photos.folder.path is {settings.path!r}, which has no photos ({notes}): set it to a folder "
                f"with files that end in {', '.join(ENDINGS)}"
            )
        return Listing(photos, settings.photos_per_shard, exif=not settings.csv)


def files_of(path: str, key: str) -> Files:
    """Returns the files of a folder, and the files that are left out.

    key: dotted key of the setting with the folder's path, for messages. Raises SettingsError if the folder does not
    exist, StageError if there are no files in it.
    """
    if not path or not Path(path).is_dir():
        raise SettingsError(f"config.{key} is {path!r}, which is not a folder: set it to the photos' folder")
    files = _walk(path)
    if not files.paths:
        notes = "; ".join(files.notes())
        raise StageError(
            f"config.{key} is {path!r}, which has no files{f' ({notes})' if notes else ''}: set it to the "
            "photos' folder"
        )
    return files


def existing_file(path: str, key: str) -> Path:
    """Returns the path of a table. Raises SettingsError if the file does not exist.

    key: dotted key of the setting with the path, for the message.
    """
    if not path or not Path(path).is_file():
        raise SettingsError(f"config.{key} is {path!r}, which is not a file: set it to the table that lists the photos")
    return Path(path)


def split_of(author: str, shares: Mapping[str, float]) -> str:
    """Returns the split for an author's photos. A hash of the author's name decides.

    shares: split -> share of authors. The sum of the shares is 1.
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
