"""The configuration as one tree of frozen dataclasses.

The command line reads one file of `configs/` with `read`. Stages receive the whole Config; networks, losses and the
training loop receive only their own sections. Settings that a single module reads are declared there; the settings of
stages are declared here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from geotoken_jax import preparation, records, settings
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.loss import LossSettings as AlignLossSettings
from geotoken_jax.align.pixels import PixelsSettings
from geotoken_jax.backbone.views import ViewsSettings
from geotoken_jax.data.join import DataSettings
from geotoken_jax.gallery import index
from geotoken_jax.gallery.placement import GallerySettings
from geotoken_jax.geo import distance
from geotoken_jax.model.comparator import ComparatorSettings
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.reranker import RerankerSettings
from geotoken_jax.model.reranker_fit import FitSettings
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.model.task import LossSettings
from geotoken_jax.predict.classifier import ClassifierSettings
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.judge import JudgeSettings
from geotoken_jax.processes import WatchSettings
from geotoken_jax.sharding import MeshSettings
from geotoken_jax.train.loop import TrainSettings


@dataclasses.dataclass(frozen=True)
class PoolsSettings:
    """config.pools: train photos whose candidates are stored for training the reward head.

    photos: number of these photos; their authors are drawn at random. seed: random seed of the draw.
    """

    photos: int
    seed: int

    def __post_init__(self):
        if self.photos < 20:
            raise ValueError(f"config.pools.photos is {self.photos}: use 20 or more")


@dataclasses.dataclass(frozen=True)
class KnnSettings:
    """config.baselines.knn.

    neighbors: number of neighbors per photo, at most config.index.neighbors.count. temperature: softness of the
    neighbors' weights, exp(similarity / temperature); similarities are in [-3, 3]. sigma_km: standard deviation, in km,
    of the Gaussian around each neighbor.
    """

    neighbors: int
    temperature: float
    sigma_km: float

    def __post_init__(self):
        for key in ("neighbors", "temperature", "sigma_km"):
            if getattr(self, key) <= 0:
                raise ValueError(f"config.baselines.knn.{key} is {getattr(self, key)}: use a number above 0")


@dataclasses.dataclass(frozen=True)
class GeoClipSettings:
    """config.baselines.geoclip. candidates: number of gallery coordinates stored per photo, best first."""

    candidates: int


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """config.align.init. location: GeoCLIP's weights, such as its name on the Hugging Face hub or its wheel (see
    interop.geoclip.read_weights), which initialize the location encoder's capsules; if empty, the capsules are
    initialized at random."""

    location: str


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """config.export.

    gallery: number type of the gallery's vectors, bfloat16 or int8; the model card reports the accuracy that int8
    costs. weights: whether the export contains the checkpoint of a Hugging Face backbone; if False, the export needs
    the checkpoint's folder to predict. authors: whether the export contains the authors of the gallery's photos, which
    `geotoken predict --exclude-author` needs. thumbnails: longest side, in pixels, of the gallery photos on the
    service's page. examples: number of `test` photos to try on that page. With 0 none of these photos are exported. The
    default, -1, exports photos of EarthView only, which show no person: thumbnails of 64 pixels, and 12 examples.
    """

    gallery: str
    weights: bool
    authors: bool
    thumbnails: int
    examples: int

    def __post_init__(self):
        if self.gallery not in ("bfloat16", "int8"):
            raise ValueError(f"config.export.gallery is {self.gallery!r}: use 'bfloat16' or 'int8'")
        for name in ("thumbnails", "examples"):
            if getattr(self, name) < -1:
                raise ValueError(
                    f"config.export.{name} is {getattr(self, name)}: use 0 for none, more than 0, or -1 for the default"
                )


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """config.evaluate.

    resamples: number of bootstrap resamples. seed: random seed of the bootstrap. reference: variant that all others are
    compared with. compare: further pairs of methods to compare, each method as VARIANT or VARIANT:CHOICE. labels:
    variant -> name in tables. earth: shape on which distances are computed, `sphere` or `ellipsoid`. strict: whether a
    distance must be below a threshold (<) instead of at most the threshold (<=).
    """

    resamples: int
    seed: int
    reference: str
    compare: tuple[tuple[str, str], ...]
    labels: Mapping[str, str]
    earth: str
    strict: bool

    def __post_init__(self):
        if self.earth not in distance.EARTHS:
            raise ValueError(f"config.evaluate.earth is {self.earth!r}: use {' or '.join(distance.EARTHS)}")
        for pair in self.compare:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f'config.evaluate.compare has {pair!r}: use pairs, as in (("geotoken", "knn"),)')


@dataclasses.dataclass(frozen=True)
class OverlapSettings:
    """config.audit.leakage. cosine_above: cosine of two photos' image embeddings above which the photos count as
    near-duplicates."""

    cosine_above: float


@dataclasses.dataclass(frozen=True)
class CoverageSettings:
    """config.audit.coverage.

    level: level of the S2 cells in which gallery photos are counted. split: split whose photos are predicted again,
    each without the gallery photos of its region. countries: number of countries treated as regions, beginning with the
    one with most photos of `split`; all continents are regions too.
    """

    level: int
    split: str
    countries: int

    def __post_init__(self):
        if not 1 <= self.level <= records.LEVEL:
            raise ValueError(f"config.audit.coverage.level is {self.level}: use 1..{records.LEVEL}")


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """config.audit, with a section per audit that has settings."""

    coverage: CoverageSettings
    leakage: OverlapSettings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """config.experiments.NAME.

    question: question that the experiment answers. note: conclusion from its table, added by hand after the runs. runs:
    tuples of a run's name and its changes (nested sections and keys). A third item, if there is one, names an earlier
    run whose trained models are used; then nothing is trained, and the changes are added to the earlier run's changes.
    The first run is compared with all others. choices: rows of the table per run: names of selectors, "" for the run's
    config.predict.choice, "ideal" for the best candidate. splits: splits that are scored. curve: whether results
    include the runs' validations during training.
    """

    question: str
    note: str
    runs: tuple
    choices: tuple
    splits: tuple
    curve: bool


@dataclasses.dataclass(frozen=True)
class ScalingSettings:
    """config.scaling.

    sizes: pairs of a model's name and its changes (nested sections and keys), smallest model first. held_out: size left
    out of the fit, for a forecast. held_out_photos: number of photos that the held-out size is trained on, one of
    `photos`. photos: pairs of a number of train photos and the number of examples until the loss stops falling, fewest
    photos first. validations: number of validations per run; the best one counts. reference: size at which neighbors,
    seeds, gallery and candidates are varied. neighbors: further numbers of neighbors. seeds: further seeds, run at the
    fewest photos. budgets: floating-point operations of a training; every size except the held-out one is trained with
    each budget. gallery: numbers of gallery photos at test time; each gallery contains the smaller ones. candidates:
    numbers of candidates per photo at test time, up to config.predict.samples. split: split that is tested. resamples:
    number of bootstrap resamples over runs. seed: random seed of the bootstrap and of the choice of gallery photos and
    candidates. note: remarks on the study, printed in docs/scaling.md and written by hand after the runs. limits:
    conclusions that may not transfer to other data, also printed in docs/scaling.md.
    """

    sizes: tuple[tuple[str, Any], ...]
    held_out: str
    held_out_photos: int
    photos: tuple[tuple[int, int], ...]
    validations: int
    reference: str
    neighbors: tuple[int, ...]
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    gallery: tuple[int, ...]
    candidates: tuple[int, ...]
    split: str
    resamples: int
    seed: int
    note: str
    limits: tuple[str, ...]

    def __post_init__(self):
        for key in ("held_out", "reference"):
            if getattr(self, key) not in dict(self.sizes):
                raise ValueError(
                    f"config.scaling.{key} is {getattr(self, key)!r}: choose a name in config.scaling.sizes: "
                    f"{', '.join(dict(self.sizes))}"
                )
        if self.held_out_photos not in dict(self.photos):
            raise ValueError(
                f"config.scaling.held_out_photos is {self.held_out_photos}: choose a number of photos in "
                f"config.scaling.photos: {', '.join(map(str, dict(self.photos)))}"
            )
        if self.reference == self.held_out:
            raise ValueError(
                f"config.scaling.reference is {self.reference!r}: choose another size than config.scaling.held_out"
            )

    @property
    def fitted(self) -> list[str]:
        return [name for name, _ in self.sizes if name != self.held_out]


@dataclasses.dataclass(frozen=True)
class AlignSection:
    """config.align."""

    model: AlignSettings
    loss: AlignLossSettings
    init: InitSettings
    pixels: PixelsSettings
    train: TrainSettings


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """config.reward."""

    model: RewardSettings
    train: TrainSettings


@dataclasses.dataclass(frozen=True)
class ChannelsSection:
    """config.channels.

    kind, dtype: how the channels' indexes are built, in place of config.index.search.kind and reorder_dtype; see
    gallery.index.IndexSettings. views: further views of gallery photos that `geotoken learn` makes, beside those of
    config.embed.views; the comparator is trained on all views, and two channels search them. comparator: the
    comparator. train: its training.
    """

    kind: str
    dtype: str
    views: ViewsSettings
    comparator: ComparatorSettings
    train: TrainSettings

    def search(self, gallery: index.IndexSettings) -> index.IndexSettings:
        """Returns settings of the channels' indexes. gallery: those of the gallery's index, config.index.search."""
        return dataclasses.replace(gallery, kind=self.kind, reorder_dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class RerankerSection:
    """config.reranker. fit: fit to the validation photos."""

    model: RerankerSettings
    fit: FitSettings


@dataclasses.dataclass(frozen=True)
class BaselinesSection:
    """config.baselines. train: training of the classifier."""

    knn: KnnSettings
    geoclip: GeoClipSettings
    classifier: ClassifierSettings
    train: TrainSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration.

    name: name of its file. variants: name -> changes (nested sections and keys). experiments: name -> Experiment.
    scaling: settings of the scaling study; None if the configuration has no study.
    """

    name: str
    mesh: MeshSettings
    watch: WatchSettings
    photos: preparation.PhotosSettings
    benchmarks: preparation.BenchmarksSection
    embed: preparation.EmbedSettings
    align: AlignSection
    index: preparation.IndexSection
    gallery: GallerySettings
    data: DataSettings
    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    pools: PoolsSettings
    reward: RewardSection
    channels: ChannelsSection
    reranker: RerankerSection
    variants: Mapping[str, Any]
    predict: PredictSettings
    judge: JudgeSettings
    baselines: BaselinesSection
    evaluate: EvaluateSettings
    audit: AuditSettings
    export: ExportSettings
    experiments: Mapping[str, Experiment]
    scaling: ScalingSettings | None

    def variant(self, name: str) -> "Config":
        """Returns the configuration with a variant's changes applied. Raises SettingsError if the name is unknown."""
        if name not in self.variants:
            raise settings.SettingsError(f"config.variants has no {name!r}: choose one of {', '.join(self.variants)}")
        return self.changed(self.variants[name], f"variants.{name}")

    def changed(self, changes: Mapping[str, Any], place: str) -> "Config":
        """Returns the configuration with changes applied; see `settings.changed`."""
        return settings.changed(self, changes, place)

    def at(self, key: str) -> Any:
        """Returns the section or the value of a dotted key, such as `model.width`."""
        return functools.reduce(getattr, key.split("."), self)

    def select(self, *keys: str) -> dict[str, Any]:
        """Returns the sections and values of dotted keys as nested JSON values, without runtime fields.

        Manifests store settings in this form.
        """
        selected: dict[str, Any] = {}
        for key in keys:
            *parents, last = key.split(".")
            section = selected
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = settings.result(self.at(key))
        return selected


def read(config: ConfigDict) -> Config:
    """Returns the Config of a configuration file's ConfigDict, after checking it with the changes of every variant.

    Raises SettingsError with the first key that is missing, unknown, of a wrong type or out of range.
    """
    sections = config.copy_and_resolve_references().to_dict()
    experiments = {
        name: settings.read(Experiment, section, f"experiments.{name}")
        for name, section in sections.pop("experiments", {}).items()
    }
    result = settings.read(Config, {"scaling": None, **sections, "experiments": experiments}, "")
    for name in result.variants:
        result.variant(name)
    return result
