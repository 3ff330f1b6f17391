"""IM2GPS3K, a benchmark of 2,997 Flickr photos, read from its CSV of scene labels and the folder of images.

In an older copy of the CSV, the column names LAT and LON are exchanged. `read_rows` rejects it with a TableError that
names a row as proof.
"""

import dataclasses

from data_prep.csv_rows import read_rows
from data_prep.sources import FLICKR, Provenance
from data_prep.sources.folder import ListedSource, Listing, existing_file, files_of
from data_prep.sources.matching import pair
from geotoken_jax.preparation import Im2gps3kSettings

_COLUMNS = {"id": "IMG_ID", "author": "AUTHOR", "latitude": "LAT", "longitude": "LON"}


@dataclasses.dataclass(frozen=True)
class Im2gps3k(ListedSource):
    """IM2GPS3K as a source of photos. All photos are in `test`, in the order of the CSV."""

    settings: Im2gps3kSettings
    name = "im2gps3k"
    provenance = Provenance(
        "other", "IM2GPS3K: 2,997 Flickr photos.", FLICKR, "Vo, Jacobs and Hays 2017, Revisiting IM2GPS, ICCV."
    )

    @property
    def places(self) -> tuple[str, str]:
        return self.settings.path, self.settings.csv

    def listing(self) -> Listing:
        rows = read_rows(existing_file(self.settings.csv, f"{self.section}.csv"), _COLUMNS)
        files = files_of(self.settings.path, f"{self.section}.path")
        return Listing({"test": list(pair(rows, files, lambda name: name))}, self.settings.photos_per_shard)
