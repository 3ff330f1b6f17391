"""OpenStreetView-5M: street-level photos in zip shards, `images/{train,test}/NN.zip`, with `train.csv` and `test.csv`.

The zips are read member by member, without unpacking them to disk. The name of a member is never used as a path.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep import images
from data_prep.csv_rows import read_rows
from data_prep.source_files import fingerprint
from data_prep.sources import NOT_DOWNLOADED, Drop, Photo, Provenance
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import Osv5mSettings
from geotoken_jax.settings import SettingsError

SPLITS = ("train", "test")
_COLUMNS = {"id": "id", "author": "creator_id", "latitude": "latitude", "longitude": "longitude"}
#: Field of Photo -> column that the CSV may lack. No cell is converted, so the country "NA" is Namibia, not a missing
#: value.
_OPTIONAL = {"city": "city", "state": "region", "country": "country", "captured": "captured_at"}
_ENCRYPTED = 0x1


@dataclasses.dataclass(frozen=True)
class Osv5m:
    """OpenStreetView-5M as a source of photos (`data_prep.sources.Source`). Each zip is a shard."""

    settings: Osv5mSettings
    name = "osv5m"
    provenance = Provenance(
        "cc-by-sa-4.0",
        "OpenStreetView-5M: street-level images from Mapillary.",
        "CC BY-SA 4.0: credit the data set and Mapillary, and share what you make from it under the same license.",
        "Astruc et al. 2024, OpenStreetView-5M: The Many Roads to Global Visual Geolocation, CVPR.",
        "https://huggingface.co/datasets/osv5m/osv5m",
    )

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. A split that was not downloaded is left out.

        Raises SettingsError if there are no zips.
        """
        splits = {split: len(self._zips(split)) for split in SPLITS}
        if not any(splits.values()):
            raise SettingsError(
                f"config.photos.osv5m.path is {self.settings.path!r}, which has no images/train/*.zip or "
                f"images/test/*.zip: set it to the folder that contains images/{self._unpacked()}"
            )
        return {split: zips for split, zips in splits.items() if zips}

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields the drops for repeated images and ids, then the photos of one zip in the order of the zip.

        Shard 0 also yields a drop for each row without an image in any zip. Such a drop is no fault, because the CSV
        lists the photos of all zips, and a user may download only some zips.

        All rows of the CSV are read, but only the rows of this zip are stored: 40 MB for 50,000 photos, instead of 4 GB
        per process for all of OSV-5M.

        Raises SettingsError if the CSV does not exist, StageError if a zip cannot be read, and the errors of
        `read_rows`.
        """
        zips = self._zips(split)
        with _open(zips[shard]) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for info in (info for info in archive.infolist() if info.filename.lower().endswith(".jpg")):
                if _id(info) in members:
                    yield Drop(_id(info), "repeated image")
                members.setdefault(_id(info), info)
            elsewhere = {name for path in zips[1:] for name in _names(path)} if shard == 0 else set()
            rows: dict[str, Photo | Drop] = {}
            table = Path(self.settings.path) / f"{split}.csv"
            if not table.is_file():
                raise SettingsError(
                    f"config.photos.osv5m.path is {self.settings.path!r}, which has no {split}.csv: download it there"
                )
            for row in read_rows(table, _COLUMNS, _OPTIONAL):
                if row.id in rows:
                    yield Drop(row.id, "repeated id")
                elif row.id in members:
                    rows[row.id] = row
                elif shard == 0 and row.id not in elsewhere:
                    yield row if isinstance(row, Drop) else Drop(row.id, NOT_DOWNLOADED)
            for name, info in members.items():
                row = rows.get(name, Drop(name, "no metadata"))
                yield row if isinstance(row, Drop) else _load(row, archive, info)

    def fingerprint(self) -> dict[str, str]:
        """Returns zip -> size and time, and CSV -> size and SHA-256."""
        files = {f"{split}/{path.name}": str(path) for split in SPLITS for path in self._zips(split)}
        tables = (Path(self.settings.path) / f"{split}.csv" for split in self.splits)
        return fingerprint(files, [str(table) for table in tables if table.is_file()])

    def _unpacked(self) -> str:
        """Returns a text for a message: the settings that read unpacked images; "" if there are no such images."""
        path = Path(self.settings.path)
        split = next((split for split in SPLITS if any((path / "images" / split).glob("*/*.jpg"))), None)
        if split is None:
            return ""
        return (
            f"; for images that were unpacked, set config.photos.source to 'folder', config.photos.folder.path to "
            f"{str(path / 'images' / split)!r} and config.photos.folder.csv to {str(path / f'{split}.csv')!r}"
        )

    def _zips(self, split: str) -> list[Path]:
        return sorted((Path(self.settings.path) / "images" / split).glob("*.zip"))


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise StageError(f"{path} is damaged or cut short ({error}): download it again") from error


def _names(path: Path) -> list[str]:
    with _open(path) as archive:
        return [_id(info) for info in archive.infolist()]


def _id(info: zipfile.ZipInfo) -> str:
    return info.filename.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _load(photo: Photo, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Photo | Drop:
    if info.flag_bits & _ENCRYPTED:
        return Drop(photo.id, "encrypted zip member")
    if info.file_size > images.MAX_BYTES:  # zipfile never unpacks more than file_size
        return Drop(photo.id, "too large")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Drop(photo.id, "damaged zip member")
    try:
        return dataclasses.replace(photo, image=archive.read(info), captured=photo.captured / 1000)  # from ms
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError):
        return Drop(photo.id, "damaged zip member")
