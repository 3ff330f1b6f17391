"""The interface of a source of photos. A source yields photos, and a named reason for each dropped photo."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo with its metadata.

    id: unique in the data set. author: the id if the author is unknown. image: bytes of the encoded file. latitude,
    longitude: degrees. city, state, country, continent, neighbourhood, county, region: names, empty if unknown.
    captured: time in seconds since 1970, in UTC if the time zone is known; NaN if the time is unknown. The stage
    `prepare` counts a time that cannot be true (photos.plausible) as nonsense and stores NaN.
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


@dataclasses.dataclass(frozen=True)
class Drop:
    """A photo, file or table row that is left out.

    id: id of the photo, name of the file, or line of the table. reason: short name under which such drops are counted.
    """

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Origin and terms of a data set, which a model card must state.

    license: license of a model made from the data, by its name on the Hugging Face hub, which may be "other" or
    "unknown". origin, terms: sentences. citation: sentences, may be empty. homepage: URL, may be empty.
    """

    license: str
    origin: str
    terms: str
    citation: str = ""
    homepage: str = ""


#: Provenance of a user's own folder, which only the user can describe.
UNKNOWN = Provenance(
    "unknown",
    "A folder of photos that the person who trained this model has not described.",
    "Not stated: write the license of the photos here before you publish this model.",
)
#: Terms of photos from Flickr.
FLICKR = "Each photo belongs to the Flickr user who took it and is under the license that this user chose."


#: Reason of rows whose photo was not downloaded. A subset is no fault, so such drops do not count for max_dropped.
NOT_DOWNLOADED = "not in a downloaded zip"


class Readable(Protocol):
    """Photos in shards, which can be read independently and in any order."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards."""
        ...

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops, always in the same order."""
        ...


class Named(Protocol):
    """A data set."""

    @property
    def name(self) -> str:
        """Name of the data set."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Origin and terms of the photos."""
        ...


class Source(Readable, Named, Protocol):
    """A data set of photos."""


@runtime_checkable
class FileSource(Protocol):
    """A source that reads files, which can change."""

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes."""
        ...


@runtime_checkable
class GrowingSource(Named, FileSource, Protocol):
    """A source that can tell which photos were added to it. Checking for it reads no photos, as a Source would."""

    def has_rows_added(self, file: str, before: str) -> bool:
        """Returns whether a file has changed only by rows after its end. before: its text in an earlier fingerprint."""
        ...

    def takes(self, file: str) -> bool:
        """Returns whether the source can grow by a file that was added."""
        ...

    def added(self, before: str) -> Readable:
        """Returns the photos and drops that were added. before: folder with the files of photos/ before."""
        ...
