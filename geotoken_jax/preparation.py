"""Settings of data preparation: config.photos, config.benchmarks, config.embed and config.index.

They are not declared in data_prep/, because the installed package does not contain that folder, but reads whole
configurations.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from geotoken_jax import settings
from geotoken_jax.backbone import BackboneSettings
from geotoken_jax.backbone.views import ViewsSettings
from geotoken_jax.errors import UserError
from geotoken_jax.gallery.exclude import OWN, ExcludeSettings
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.settings import Added, Runtime


def _check_counts(settings: Any, *names: str) -> None:
    """Raises ValueError if one of the named settings, such as photos_per_shard, is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}: use 1 or more")


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """config.photos.beam: settings of Apache Beam, which can prepare the photos on many machines.

    runner: name of the Beam runner: DirectRunner, FlinkRunner, SparkRunner or DataflowRunner. If empty, Beam is not
    used, and config.photos.workers processes on this machine prepare the photos. options: options of the Beam pipeline,
    such as `--flink_master=host:8081`.
    """

    runner: str
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PlaceholderSettings:
    """config.photos.mp16_pro.placeholder: how to find placeholders, the images that web sites show instead of removed
    photos. `geotoken prepare` drops placeholders.

    hashes: hashes of known placeholders, computed by data_prep.placeholder.dhash, 16 hexadecimal digits each. If empty,
    hashes are not compared. distance: largest number of bits by which the hash of a placeholder differs from one of
    `hashes`. identical: largest number of photos with the same bytes. If more photos have the same bytes, they are
    placeholders.
    """

    hashes: tuple[str, ...]
    distance: int
    identical: int

    def __post_init__(self):
        for value in self.hashes:
            if not re.fullmatch("[0-9a-f]{16}", str(value)):
                raise ValueError(
                    f"config.photos.mp16_pro.placeholder.hashes has {value!r}: write each hash as 16 digits of 0-9a-f"
                )
        if not 0 <= self.distance < 64:
            raise ValueError(f"config.photos.mp16_pro.placeholder.distance is {self.distance}: use 0 to 63 bits")
        if self.identical < 1:
            raise ValueError(f"config.photos.mp16_pro.placeholder.identical is {self.identical}: use 1 or more")


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """config.photos.dataset: name, version and terms of photos/ as a data set of TensorFlow Datasets.

    name: name of the data set, of lower-case letters, digits and `_`. The data set is stored in photos/NAME/VERSION.
    version: three numbers, such as 1.0.0. license, terms, citation, homepage: see data_prep.sources.Provenance. If one
    of these four or the name is empty, it is replaced by the value of the source.
    """

    name: str
    version: str
    license: str
    terms: str
    citation: str
    homepage: str

    def __post_init__(self):
        if self.name and not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name):
            raise ValueError(f"name is {self.name!r}: use lower-case letters, digits and single _, such as my_photos")
        if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", self.version):
            raise ValueError(f"version is {self.version!r}: use three numbers, such as 1.0.0")


@dataclasses.dataclass(frozen=True)
class DuplicateSettings:
    """config.photos.duplicates: how to treat photos that have the same bytes or nearly the same picture.

    difference: largest root-mean-square difference between the thumbnails of two duplicates, in gray levels of 0 to
    255. If 0, only photos with the same bytes are duplicates. keep: whether duplicates may be in several splits. If
    False, duplicates of photos in evaluation splits are left out of `train`, and duplicates of photos in test splits
    are left out of `validation`.
    """

    difference: float
    keep: bool

    def __post_init__(self):
        if not 0 <= self.difference <= 5:
            raise ValueError(f"difference is {self.difference}: use 0 for photos of equal bytes only, or up to 5")


@dataclasses.dataclass(frozen=True)
class EarthViewSettings:
    """config.photos.earthview: a data set of small photos from above, which are made from world maps.

    seed: random seed of the whole data set. places: number of places around which photos are made, drawn from the
    GeoNames places with 1,000 inhabitants or more. The photos of `test_unseen` are made around other places. train,
    validation, test, test_unseen, test_shift: number of photos per split. photos_per_shard: photos per shard; the last
    shard may have fewer.
    """

    seed: int
    places: int
    train: int
    validation: int
    test: int
    test_unseen: int
    test_shift: int
    photos_per_shard: int

    def __post_init__(self):
        _check_counts(self, "places", "photos_per_shard")
        for name in ("train", "validation", "test", "test_unseen", "test_shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use 0 for no photos, or more")


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """config.photos.folder: a folder of a user's own photos.

    path: folder of photos; photos in its subfolders are included. csv: path of a table with the columns id, latitude
    and longitude. Optional columns are author, captured (time of the photo, see data_prep.csv_rows.seconds) and the
    names in records.PLACE_FIELDS. If `csv` is empty, coordinates and time are read from EXIF. train, validation, test:
    share of the authors in each split, 0-1; for a benchmark, test is 1. photos_per_shard: photos per shard; the last
    shard may have fewer.
    """

    path: str
    csv: str
    train: float
    validation: float
    test: float
    photos_per_shard: int

    def __post_init__(self):
        _check_counts(self, "photos_per_shard")
        if min(self.shares.values()) < 0 or not math.isclose(sum(self.shares.values()), 1):
            raise ValueError(
                f"config.photos.folder has the shares {self.shares}: set train, validation and test to 0 or more, with "
                "a sum of 1"
            )

    @property
    def shares(self) -> dict[str, float]:
        """Split -> share of authors."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclasses.dataclass(frozen=True)
class Im2gps3kSettings:
    """config.photos.im2gps3k: the benchmark Im2GPS3k.

    path: folder of the images. The name of an image is its IMG_ID in the CSV. csv: path of im2gps3k_places365.csv.
    photos_per_shard: photos per shard; the last shard may have fewer.
    """

    path: str
    csv: str
    photos_per_shard: int

    def __post_init__(self):
        _check_counts(self, "photos_per_shard")


@dataclasses.dataclass(frozen=True)
class MP16ProSettings:
    """config.photos.mp16_pro: the data set MP16-Pro.

    folder: folder of the downloaded files. metadata: path of the CSV, relative to `folder`. seed: random seed of the
    split of authors. validation: share of authors held out as the validation split, 0 to below 1. photos_per_shard:
    images per shard before any are dropped; the last shard may have fewer.
    """

    folder: str
    metadata: str
    seed: int
    validation: float
    photos_per_shard: int
    placeholder: PlaceholderSettings

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise ValueError(f"config.photos.mp16_pro.validation is {self.validation}: use a share from 0 to below 1")
        _check_counts(self, "photos_per_shard")


@dataclasses.dataclass(frozen=True)
class Osv5mSettings:
    """config.photos.osv5m: the data set OpenStreetView-5M.

    path: folder of the download, which contains images/, train.csv and test.csv.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class YfccSettings:
    """config.photos.yfcc: one of the benchmarks YFCC4k and YFCC26k.

    name: yfcc4k or yfcc26k. path: folder of the images, with names such as ID.jpg. table: path of the table, a CSV
    or info.txt. photos_per_shard: photos per shard; the last shard may have fewer.
    """

    name: str
    path: str
    table: str
    photos_per_shard: int

    def __post_init__(self):
        _check_counts(self, "photos_per_shard")
        if self.name not in ("yfcc4k", "yfcc26k"):
            raise ValueError(f"config.photos.yfcc.name is {self.name!r}: use yfcc4k or yfcc26k")


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """config.benchmarks.photos.NAME: a benchmark, whose photos become the split NAME.

    path: folder of photos; photos in its subfolders are included. If empty, the benchmark is not used.

    table: path of a table with the columns id, latitude and longitude (or IMG_ID, LAT and LON), or of YFCC's info.txt.
    Optional columns are captured (time of the photo) and the names in records.PLACE_FIELDS. If `table` is empty,
    coordinates and time are read from EXIF.

    author: name of the column of `table` that contains authors; if there is no such column, the authors are unknown.
    authors: path of a second table with the columns id and author, for photos without an author in `table`; if empty,
    there is no second table. rows: split to use: only rows with this value in the column `split` of `table`; if empty,
    all rows. photos_per_shard: photos per shard; the last shard may have fewer.
    """

    path: str
    table: str
    author: str
    authors: str
    rows: str
    photos_per_shard: int

    def __post_init__(self):
        _check_counts(self, "photos_per_shard")
        if not self.table and (self.authors or self.rows):
            raise ValueError("table is '': set it to the table that lists the photos, or leave authors and rows empty")


@dataclasses.dataclass(frozen=True)
class BenchmarksSection:
    """config.benchmarks: labeled photos beside the data set, which are predicted with its gallery.

    photos: name -> benchmark. exclude: name -> rules that exclude gallery photos. Each benchmark is predicted once like
    any other split. For each entry of `exclude` it is predicted once more, without the gallery photos that the rules
    of this entry exclude.
    """

    photos: Mapping[str, BenchmarkSettings]
    exclude: Mapping[str, ExcludeSettings]

    def __post_init__(self):
        for key in ("photos", "exclude"):
            for name in getattr(self, key):
                if not re.fullmatch("[a-z][a-z0-9_]*", name):
                    raise ValueError(f"{key} has the name {name!r}: use lower-case letters, digits and _")
        for name in self.photos:
            if name.startswith("train") or name == "validation":
                raise ValueError(f"photos has the name {name!r}, which is a split of training: use another name")

    @property
    def used(self) -> dict[str, BenchmarkSettings]:
        """Name -> benchmark, for the benchmarks that have a folder of photos, sorted by name."""
        return {name: benchmark for name, benchmark in sorted(self.photos.items()) if benchmark.path}


#: Names of the sections of config.photos that are sources.
KINDS = ("earthview", "mp16_pro", "folder", "im2gps3k", "yfcc", "osv5m")


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """config.photos.sources.NAME: one of several sources whose photos are in one gallery.

    kind: name of the source's section in config.photos, such as folder. cap: largest number of train photos, drawn by a
    hash of their ids; 0 for all. origin: name before the authors. Sources of one origin have common authors. section:
    settings of the source, in which other keys of config.photos.sources.NAME replace those of config.photos.KIND.
    """

    kind: str
    cap: int
    origin: str
    section: Any


@contextlib.contextmanager
def keys_of(name: str, kind: str) -> Iterator[None]:
    """Replaces config.photos.KIND by config.photos.sources.NAME in the messages of errors that users can mend."""
    try:
        yield
    except UserError as error:
        message = re.sub(rf"\bconfig\.photos\.{kind}\b", f"config.photos.sources.{name}", str(error))
        raise type(error)(message) from None


@dataclasses.dataclass(frozen=True)
class PhotosSettings:
    """config.photos, with a section per source.

    source: name of the section with the source's settings, such as folder. sources: name -> kind and further keys of
    SourceSettings, for photos of several sources. If it is not empty, it takes the place of `source`. workers: number
    of processes; if 1, the current process prepares the photos. beam: settings of Apache Beam, which can replace the
    processes. max_dropped: share of dropped photos, 0-1, above which `prepare` fails. null_island: whether photos at
    latitude 0, longitude 0 are kept. Usually these coordinates are wrong: the place is open sea, and devices without a
    position write 0, 0. keep_changed: whether a complete photos/ is kept if the source has changed since; if False, a
    change is an error. dataset, duplicates: see DatasetSettings and DuplicateSettings.
    """

    source: str
    workers: Runtime[int]
    beam: Runtime[BeamSettings]
    max_dropped: Runtime[float]
    null_island: bool
    keep_changed: Runtime[bool]
    dataset: DatasetSettings
    duplicates: DuplicateSettings
    earthview: EarthViewSettings
    mp16_pro: MP16ProSettings
    folder: FolderSettings
    im2gps3k: Im2gps3kSettings
    yfcc: YfccSettings
    osv5m: Osv5mSettings
    sources: Annotated[Mapping[str, Any], Added({})]

    def __post_init__(self):
        _check_counts(self, "workers")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is {self.max_dropped}: use a share of the photos, 0 to 1")
        if len(self.sources) == 1:
            raise ValueError(f"sources has only {next(iter(self.sources))!r}: name two sources or more, or use source")
        # A manifest has all settings of each source, also those from the section of its kind.
        flat = {
            name: {"kind": of.kind, "cap": of.cap, "origin": of.origin, **settings.plain(of.section)}
            for name, of in self.mixed.items()
        }
        object.__setattr__(self, "sources", flat)

    @property
    def mixed(self) -> dict[str, SourceSettings]:
        """Name -> settings of each of several sources, by name; empty if there is one source."""
        return {name: self._source(name, section) for name, section in sorted(self.sources.items())}

    def _source(self, name: str, section: Any) -> SourceSettings:
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name) or name == OWN:
            raise settings.SettingsError(
                f"config.photos.sources has the name {name!r}: use up to 32 lower-case letters, digits and _, with a "
                f"letter first, and not {OWN!r}"
            )
        if not isinstance(section, Mapping):
            raise settings.SettingsError(
                f'config.photos.sources.{name} is {section!r}: use a section, as in dict(kind="folder", path="PHOTOS")'
            )
        keys = dict(section)
        kind, cap, origin = keys.pop("kind", None), keys.pop("cap", 0), keys.pop("origin", name)
        if kind not in KINDS:
            raise settings.SettingsError(
                f"config.photos.sources.{name}.kind is {kind!r}: use one of {', '.join(KINDS)}"
            )
        if type(cap) is not int or cap < 0:
            raise settings.SettingsError(
                f"config.photos.sources.{name}.cap is {cap!r}: use the largest number of train photos, or 0 for all"
            )
        if not isinstance(origin, str) or not re.fullmatch("[a-z][a-z0-9_]*", origin):
            raise settings.SettingsError(
                f"config.photos.sources.{name}.origin is {origin!r}: use lower-case letters, digits and _"
            )
        with keys_of(name, kind):
            changed = settings.changed(getattr(self, kind), keys, f"photos.sources.{name}")
        return SourceSettings(kind, cap, origin, changed)


def source_name(photos: Mapping[str, Any]) -> str:
    """Returns the name of the photos' source, or the names of several sources with + between them; "" if unknown.

    photos: section `photos` of the settings in the manifest of photos/.
    """
    return "+".join(sorted(photos["sources"])) if "sources" in photos else photos.get("source", "")


@dataclasses.dataclass(frozen=True)
class EmbedSettings(BackboneSettings):
    """config.embed. threads: number of threads that decode photos. views: settings of the augmented views of train
    photos. For all other keys, see BackboneSettings."""

    threads: Runtime[int]
    views: ViewsSettings

    def __post_init__(self):
        _check_counts(self, "threads")


@dataclasses.dataclass(frozen=True)
class NeighborsSettings:
    """config.index.neighbors: the neighbors of each photo, which are photos of the gallery.

    count: number of neighbors stored per photo. exclude: rules for train photos. They exclude gallery photos from a
    photo's neighbors, such as photos by the same author of the same place. Without the rules, training would get
    neighbors that are much more similar than the neighbors of a new photo. exclude_in_evaluation: rules for the photos
    of all other splits.
    """

    count: int
    exclude: ExcludeSettings
    exclude_in_evaluation: ExcludeSettings

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count is {self.count}: use 0 for no neighbors, or more")


@dataclasses.dataclass(frozen=True)
class IndexSection:
    """config.index. neighbors: settings of the stored neighbors. search: settings of the gallery's index."""

    neighbors: NeighborsSettings
    search: IndexSettings
