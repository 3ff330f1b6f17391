"""Settings of data preparation, config.photos, config.embed and config.index: what data_prep/ reads.

They are declared here and not in data_prep/, because the installed package reads whole configurations without it.
"""

import dataclasses
import math
import re

from geotoken_jax.backbone import BackboneSettings
from geotoken_jax.backbone.views import ViewsSettings
from geotoken_jax.gallery.exclude import ExcludeSettings
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.settings import Runtime


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """runner: of the pipeline (DirectRunner, FlinkRunner, SparkRunner, DataflowRunner); "" is no Beam: `workers`
    processes of this machine. options: of the pipeline, handed on as they are, such as `--flink_master=host:8081`."""

    runner: str
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PlaceholderSettings:
    """hashes: of known placeholders, as `dhash` makes them, in 16 hexadecimal digits; none: no photo is decoded.
    distance: bits in which a placeholder may differ from its hash. identical: photos that may have the same bytes;
    where more do, all of them are placeholders."""

    hashes: tuple[str, ...]
    distance: int
    identical: int

    def __post_init__(self):
        for value in self.hashes:
            if not re.fullmatch("[0-9a-f]{16}", str(value)):
                raise ValueError(
                    f"config.photos.mp16_pro.placeholder.hashes has {value!r}: write each as 16 of the digits 0-9a-f"
                )
        if not 0 <= self.distance < 64:
            raise ValueError(f"config.photos.mp16_pro.placeholder.distance is {self.distance}: use 0 to 63 bits")
        if self.identical < 1:
            raise ValueError(f"config.photos.mp16_pro.placeholder.identical is {self.identical}: use 1 or more")


@dataclasses.dataclass(frozen=True)
class EarthViewSettings:
    """seed: decides everything. places: GeoNames places that authors visit, from those of 1,000 inhabitants or more.
    train ... test_shift: photos of each split. photos_per_shard: at most; the last shard has the rest."""

    seed: int
    places: int
    train: int
    validation: int
    test: int
    test_unseen: int
    test_shift: int
    photos_per_shard: int


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """path: the folder; subfolders are part of it. csv: file of id, latitude and longitude, and author, city, state,
    country, continent and captured (csv_rows.seconds) where it has them; empty takes coordinates and time from EXIF.
    train, validation, test: shares of authors, 0-1; all of test makes a benchmark. photos_per_shard: at most; the last
    shard has the rest."""

    path: str
    csv: str
    train: float
    validation: float
    test: float
    photos_per_shard: int

    def __post_init__(self):
        if min(self.shares.values()) < 0 or not math.isclose(sum(self.shares.values()), 1):
            raise ValueError(f"config.photos.folder has shares {self.shares}: none below 0, together 1")

    @property
    def shares(self) -> dict[str, float]:
        """Split -> share of authors."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclasses.dataclass(frozen=True)
class Im2gps3kSettings:
    """path: folder of the images, named IMG_ID. csv: im2gps3k_places365.csv. photos_per_shard: at most."""

    path: str
    csv: str
    photos_per_shard: int


@dataclasses.dataclass(frozen=True)
class MP16ProSettings:
    """folder: with the parts. metadata: path of the CSV, from that folder. seed: of the choice of authors. validation:
    share of authors, 0-1, held out as that split. photos_per_shard: members of a shard, at most; some of them may be
    dropped."""

    folder: str
    metadata: str
    seed: int
    validation: float
    photos_per_shard: int
    placeholder: PlaceholderSettings

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise ValueError(f"config.photos.mp16_pro.validation is {self.validation}: use a share from 0 to below 1")
        if self.photos_per_shard < 1:
            raise ValueError(f"config.photos.mp16_pro.photos_per_shard is {self.photos_per_shard}: use 1 or more")


@dataclasses.dataclass(frozen=True)
class Osv5mSettings:
    """path: folder that holds images/, train.csv and test.csv, as downloaded."""

    path: str


@dataclasses.dataclass(frozen=True)
class YfccSettings:
    """name: of the data set, yfcc4k or yfcc26k. path: folder of the images, named ID.jpg. table: the CSV, or info.txt.
    photos_per_shard: at most."""

    name: str
    path: str
    table: str
    photos_per_shard: int

    def __post_init__(self):
        if self.name not in ("yfcc4k", "yfcc26k"):
            raise ValueError(f"config.photos.yfcc.name is {self.name!r}: use yfcc4k or yfcc26k")


@dataclasses.dataclass(frozen=True)
class PhotosSettings:
    """source: name of the section that is read. workers: processes; 1 is this one. beam: the engine instead of them.
    max_dropped: share of photos, 0-1, above which dropping them is an error. Each source has its section."""

    source: str
    workers: Runtime[int]
    beam: Runtime[BeamSettings]
    max_dropped: Runtime[float]
    earthview: EarthViewSettings
    mp16_pro: MP16ProSettings
    folder: FolderSettings
    im2gps3k: Im2gps3kSettings
    yfcc: YfccSettings
    osv5m: Osv5mSettings


@dataclasses.dataclass(frozen=True)
class EmbedSettings(BackboneSettings):
    """threads: that decode photos. views: further ones of each photo that is trained on."""

    threads: Runtime[int]
    views: ViewsSettings


@dataclasses.dataclass(frozen=True)
class NeighborsSettings:
    """count: kept of each photo. exclude: of photos that are trained on (an author's other photos of a place are far
    easier to find than a stranger's, and a new photo has none). exclude_in_evaluation: of all others."""

    count: int
    exclude: ExcludeSettings
    exclude_in_evaluation: ExcludeSettings


@dataclasses.dataclass(frozen=True)
class IndexSection:
    """config.index. neighbors: which are recorded. search: how the gallery is searched."""

    neighbors: NeighborsSettings
    search: IndexSettings
