"""YFCC4K and YFCC26k, benchmarks of 4,536 and 25,600 Flickr photos, read from a table and the folder of images.

The table is a CSV. For YFCC4K it can also be the original `info.txt`, which is separated by tabs and has neither quotes
nor a header.
"""

import dataclasses

from data_prep.csv_rows import read_rows
from data_prep.sources import FLICKR, Provenance
from data_prep.sources.folder import ListedSource, Listing, existing_file, files_of
from data_prep.sources.matching import pair
from geotoken_jax.preparation import YfccSettings

_COLUMNS = {"id": "IMG_ID", "latitude": "LAT", "longitude": "LON"}
_AUTHOR = {"author": "OwnerNSID"}
#: Field of Photo -> position of its column in info.txt, from 0.
INFO = {"id": 1, "author": 3, "longitude": 12, "latitude": 13}


@dataclasses.dataclass(frozen=True)
class Yfcc(ListedSource):
    """YFCC4K or YFCC26k as a source of photos. All photos are in `test`, in the order of the table."""

    settings: YfccSettings
    provenance = Provenance(
        "other", "YFCC4K or YFCC26k: Flickr photos in YFCC100M.", FLICKR, "Thomee et al. 2016, YFCC100M, CACM 59(2)."
    )

    @property
    def name(self) -> str:
        """Name of the data set, yfcc4k or yfcc26k."""
        return self.settings.name

    @property
    def section(self) -> str:
        return "photos.yfcc"

    @property
    def places(self) -> tuple[str, str]:
        return self.settings.path, self.settings.table

    def listing(self) -> Listing:
        settings = self.settings
        table = existing_file(settings.table, f"{self.section}.table")
        if table.suffix == ".txt":
            rows = read_rows(table, INFO)
        else:
            rows = read_rows(table, {**_COLUMNS, **(_AUTHOR if settings.name == "yfcc4k" else {})})
        files = files_of(settings.path, f"{self.section}.path")
        return Listing({"test": list(pair(rows, files, _file_name))}, settings.photos_per_shard)


def _file_name(name: str) -> str:
    return name if name.lower().endswith(".jpg") else f"{name}.jpg"
