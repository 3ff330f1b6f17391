"""Where photos come from: each source yields photos, and a counted reason for every one that it drops."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photo as the path takes it in. Empty text where a name is unknown; degrees; image: the encoded file.

    captured: when it was taken, in seconds since 1970, UTC as far as that is known; NaN where nothing is said of it.
    What cannot be a time (photos.plausible) is counted as nonsense and becomes NaN.
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
    captured: float = math.nan


@dataclasses.dataclass(frozen=True)
class Drop:
    """A photo that is not taken in, and why: `reason` is a short name that is counted."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a data set is from, and on what terms: what a model card must say of it.

    license: of what is made of the data, as the Hugging Face hub names licenses ("other" and "unknown" are names too).
    origin, terms, citation: sentences; the last may be empty.
    """

    license: str
    origin: str
    terms: str
    citation: str = ""


#: Of a folder of somebody's own: only they know.
UNKNOWN = Provenance(
    "unknown",
    "A folder of photos that whoever trained this has not described.",
    "Not stated: say here under what license the photos are before you give this away.",
)
#: Of sets of photos that were gathered on Flickr.
FLICKR = "Each photo belongs to the Flickr user who took it and is under the license that this user chose."


class Source(Protocol):
    """A set of photos, cut into shards that can be read apart from each other and in any order."""

    @property
    def name(self) -> str:
        """Of the data set."""
        ...

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Where it is from."""
        ...

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos in an order of its own that never changes."""
        ...
