"""IM2GPS3K: the benchmark of 2,997 Flickr photos, as its CSV of scene labels and the folder of its images.

In an older copy of the CSV the names LAT and LON are exchanged: it is refused, with the rows that prove it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from data_prep.csv_rows import read_rows
from data_prep.sources import Drop, Photo
from data_prep.sources.folder import Listing, existing_file, pair, walk

_COLUMNS = {"id": "IMG_ID", "author": "AUTHOR", "latitude": "LAT", "longitude": "LON"}


@dataclasses.dataclass(frozen=True)
class Im2gps3kSettings:
    """path: folder of the images, named IMG_ID. csv: im2gps3k_places365.csv. photos_per_shard: at most."""

    path: str
    csv: str
    photos_per_shard: int


@dataclasses.dataclass(frozen=True)
class Im2gps3k:
    """The benchmark as a source of photos (`data_prep.sources.Source`), all of them in `test`."""

    settings: Im2gps3kSettings
    name = "im2gps3k"

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. Raises SettingsError if the folder or the CSV is not there."""
        return _list(self.settings).splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos in the CSV's order."""
        return _list(self.settings).read(split, shard)


@functools.lru_cache(maxsize=1)
def _list(settings: Im2gps3kSettings) -> Listing:
    rows = read_rows(existing_file(settings.csv, "im2gps3k.csv"), _COLUMNS)
    files = walk(settings.path, "im2gps3k.path")
    return Listing({"test": list(pair(rows, files, lambda name: name))}, settings.photos_per_shard)
