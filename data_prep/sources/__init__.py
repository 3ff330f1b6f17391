"""The interface of a source: a data set of photos from which `prepare` makes photos/.

A source yields photos. For each photo that it leaves out, it yields a Drop: an id and a reason.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo with its metadata.

    id: name of the photo, unique in the data set. author: name of the author; if unknown, the photo's id. image: bytes
    of the encoded file. latitude, longitude: degrees. city, state, country, continent, neighbourhood, county, region:
    names of the place, empty if unknown. captured: capture time in seconds since 1970; NaN if unknown. It is UTC if the
    time zone is known, else local time. If the time cannot be true (photos.plausible), `prepare` stores NaN instead.
    source: name of the photo's source if there are several sources, else empty.
    """

    id: str
    author: str
    image: bytes
    latitude: float
    longitude: float
    city: str = ""
    state: str = ""
    country: str = ""
    continent: str = ""
    neighbourhood: str = ""
    county: str = ""
    region: str = ""
    captured: float = math.nan
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Drop:
    """A photo, file or table row that is left out of photos/.

    id: id of the photo, name of the file, or place in the table, such as "photos.csv, line 3". reason: a few words,
    such as "no image". Drops are counted per reason.
    """

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Origin and terms of a data set. The card of a model that is trained on it must state them.

    license: license for the card of a model made from the data, as an identifier of the Hugging Face hub, such as
    "cc-by-4.0", "other" or "unknown". origin: sentences on the photos. terms: sentences on the use of the photos.
    citation: sentences, or empty. homepage: URL, or empty.
    """

    license: str
    origin: str
    terms: str
    citation: str = ""
    homepage: str = ""


#: Provenance of a user's own folder. Only the user can describe it, in config.photos.dataset.
UNKNOWN = Provenance(
    "unknown",
    "A folder of photos that the person who trained this model has not described.",
    "Not stated: write the license of the photos here before you publish this model.",
)
#: Terms of photos from Flickr.
FLICKR = "Each photo belongs to the Flickr user who took it and is under the license that this user chose."


#: Reason for dropping a row whose photo was not downloaded. A user may download only a part of a data set, so these
#: drops do not count for config.photos.max_dropped.
NOT_DOWNLOADED = "not in a downloaded zip"


class Readable(Protocol):
    """Photos in shards. Shards can be read independently of each other and in any order."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards."""
        ...

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops, always in the same order."""
        ...


class Named(Protocol):
    """A data set with a name and a provenance."""

    @property
    def name(self) -> str:
        """Name of the data set."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Origin and terms of the photos."""
        ...


class Source(Readable, Named, Protocol):
    """A data set of photos that can be read."""


@runtime_checkable
class FileSource(Protocol):
    """A source that reads files, so that a change of the files can be detected."""

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes, such as its size and time."""
        ...


@runtime_checkable
class NotedSource(Protocol):
    """A source that may leave out files."""

    def notes(self) -> Iterator[str]:
        """Yields sentences on files that are left out, for messages."""
        ...


@runtime_checkable
class GrowingSource(Named, FileSource, Protocol):
    """A source that finds the photos which were added to it, for `geotoken prepare --update`.

    It has no property `splits`, because isinstance() can evaluate properties, and this one would list all photos.
    """

    def has_rows_added(self, file: str, before: str) -> bool:
        """Returns whether rows were added at the end of a file, and nothing else in it has changed.

        before: text of the file in an earlier fingerprint.
        """
        ...

    def takes(self, file: str) -> bool:
        """Returns whether the source supports the addition of this file."""
        ...

    def added(self, before: str) -> Readable:
        """Returns the new photos and drops. before: folder that contains the earlier files of photos/."""
        ...
