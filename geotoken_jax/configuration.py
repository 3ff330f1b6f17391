"""The configuration as one tree of frozen dataclasses.

The command line reads a file in `configs/` with `read`. Stages receive the whole Config. Networks, losses and the
training loop receive only their own sections. A section that one module reads is declared in that module. Sections that
stages read are declared here.
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
    """config.pools: train photos for which `geotoken learn` stores the decoder's candidates, to train the reward head.

    photos: number of these photos; they are all photos of authors drawn at random. seed: random seed of the draw.
    """

    photos: int
    seed: int

    def __post_init__(self):
        if self.photos < 20:
            raise ValueError(f"config.pools.photos is {self.photos}: use 20 or more")


@dataclasses.dataclass(frozen=True)
class KnnSettings:
    """config.baselines.knn: a baseline that predicts the coordinates of a neighbor.

    Each neighbor is replaced by a weighted Gaussian. The neighbor at which the sum of all Gaussians is highest is the
    prediction.

    neighbors: number of neighbors per photo, at most config.index.neighbors.count. temperature: temperature of the
    neighbors' weights exp(similarity / temperature); similarities are in [-3, 3]. sigma_km: standard deviation, in km,
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
    """config.baselines.geoclip: a baseline that predicts with GeoCLIP.

    candidates: number of candidates stored per photo, the coordinates of gallery photos, best first.
    """

    candidates: int


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """config.align.init: initial parameters of the alignment model.

    location: source of GeoCLIP's weights, which initialize the networks (capsules) of the location encoder. It is a
    name on the Hugging Face hub or the path of GeoCLIP's wheel (see interop.geoclip.read_weights). If empty, the
    networks are initialized at random.
    """

    location: str


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """config.export: contents of the folder that `geotoken export` writes.

    gallery: number type of the gallery's vectors, bfloat16 or int8. int8 takes half the space; the model card reports
    how much accuracy it costs. weights: whether the export contains the checkpoint of a Hugging Face backbone. If
    False, the checkpoint's folder is needed to predict. authors: whether the export contains the authors of the gallery
    photos. `geotoken predict --exclude-author` needs them. thumbnails: longest side, in pixels, of the gallery photos
    that the page of `geotoken serve` shows; 0 exports none. examples: number of `test` photos that visitors of this
    page can try; 0 exports none. For both keys, -1 is the default: 64 pixels and 12 examples for EarthView, whose
    photos show no person, and 0 for any other source.
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
    """config.evaluate: how `geotoken evaluate` scores and compares predictions.

    resamples: number of bootstrap resamples. seed: random seed of the bootstrap. reference: variant that all others are
    compared with. compare: further pairs of methods to compare. A method is VARIANT, or VARIANT:CHOICE for another
    selector than config.predict.choice. labels: variant -> its name in tables. earth: shape of the Earth for distances,
    `sphere` or `ellipsoid`. strict: whether a prediction within a threshold must have a distance below the threshold
    (<) instead of at most the threshold (<=).
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
    """config.audit.leakage: settings of the audit that searches for near-duplicates in different splits.

    cosine_above: cosine of the image embeddings of two photos above which the photos count as near-duplicates.
    """

    cosine_above: float


@dataclasses.dataclass(frozen=True)
class CoverageSettings:
    """config.audit.coverage: settings of the audit of the regions that the gallery covers.

    level: level of the S2 cells in which gallery photos are counted. split: split whose photos are predicted again,
    each without the gallery photos of its region. A region is a continent or a country. countries: number of countries
    that are regions, those with the most photos in `split`. All continents are regions.
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
    """config.experiments.NAME: runs with different settings, which are compared in one table.

    question: question that the experiment answers. note: conclusion from the experiment's table, written by hand after
    the runs. runs: a tuple per run, of the run's name and its changes to the configuration (nested sections and keys).
    A tuple may have a third item, the name of an earlier run. Then nothing is trained: the run uses the trained models
    of the earlier run, and its changes are added to the earlier run's changes. All runs are compared with the first.
    choices: names of the selectors that have a row in the table for each run. "" is the selector in the run's
    config.predict.choice, "ideal" the choice of the best candidate. splits: splits that are scored. curve: whether the
    results include the validations during training.
    """

    question: str
    note: str
    runs: tuple
    choices: tuple
    splits: tuple
    curve: bool


@dataclasses.dataclass(frozen=True)
class ScalingSettings:
    """config.scaling: the study of how loss and accuracy change with the size of the model and of the data.

    Sizes of the model. sizes: pairs of a size's name and its changes to the configuration (nested sections and keys),
    smallest model first. held_out: name of the size that is left out of the fit; its loss is compared with the forecast
    of the fitted law. reference: name of the size for which photos, neighbors, gallery and candidates are varied.

    Compute. budgets: numbers of floating-point operations per training, ascending. Every size except the held-out one
    is trained with each budget, on the most photos. held_out_budget: operations of the held-out run. seeds: further
    random seeds for the corners of this grid: the smallest and the largest size, with the smallest and the largest
    budget. validations: number of validations per training; the one with the smallest loss counts.

    Data. photos: numbers of distinct train photos, ascending; the last is the most. epochs: if 0, the reference size is
    trained with each budget on each smaller number of photos, so that it reads them more often. Otherwise it is trained
    on each number of photos, the most too, and reads each photo and each view this many times. neighbors: further
    numbers of neighbors to train the reference size with, on as many examples as with the middle budget.

    Learning rate. transfer: pairs of a name and changes to the configuration, which set the width and the
    parametrization. rates: learning rates to train each of them with, ascending. transfer_examples: examples of each of
    these trainings.

    Test. split: split that is tested. gallery: numbers of gallery photos at test time; larger galleries contain the
    smaller ones. test_neighbors: numbers of neighbors at test time, up to config.model.neighbors. candidates: numbers
    of candidates per photo at test time, up to config.predict.samples. resamples: number of bootstrap resamples over
    runs. seed: random seed of the bootstrap, and of the choice of gallery photos and candidates.

    Text for docs/scaling.md. note: remarks on the study, written by hand after the runs. limits: conclusions that may
    not hold for other data.
    """

    sizes: tuple[tuple[str, Any], ...]
    held_out: str
    reference: str
    budgets: tuple[float, ...]
    held_out_budget: float
    seeds: tuple[int, ...]
    validations: int
    photos: tuple[int, ...]
    epochs: int
    neighbors: tuple[int, ...]
    transfer: tuple[tuple[str, Any], ...]
    rates: tuple[float, ...]
    transfer_examples: int
    split: str
    gallery: tuple[int, ...]
    test_neighbors: tuple[int, ...]
    candidates: tuple[int, ...]
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
        if self.reference == self.held_out:
            raise ValueError(
                f"config.scaling.reference is {self.reference!r}: choose another size than config.scaling.held_out"
            )
        for key in ("budgets", "photos", "rates"):
            values = getattr(self, key)
            if list(values) != sorted(set(values)) or (not values and key != "rates"):
                raise ValueError(f"config.scaling.{key} is {values}: use one or more numbers in ascending order")

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
    """config.channels: the channels, which search the gallery with different vectors, and their comparator.

    The comparator is a network that maps an image embedding to a vector. Photos of one place get similar vectors.

    kind, dtype: values of `kind` and `reorder_dtype` in gallery.index.IndexSettings. They replace the values in
    config.index.search for the indexes of the channels, except for the channel "index", which has the gallery's index.
    views: settings of further augmented views of the gallery photos. `geotoken learn` makes them in addition to the
    views of config.embed.views. The comparator is trained on all views, and the channel "comparator" searches them.
    comparator: settings of the comparator. train: settings of its training.
    """

    kind: str
    dtype: str
    views: ViewsSettings
    comparator: ComparatorSettings
    train: TrainSettings

    def search(self, gallery: index.IndexSettings) -> index.IndexSettings:
        """Returns the settings of the channels' indexes. gallery: config.index.search, for the gallery's own index."""
        return dataclasses.replace(gallery, kind=self.kind, reorder_dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class RerankerSection:
    """config.reranker. fit: settings of the reranker's fit to the validation photos."""

    model: RerankerSettings
    fit: FitSettings


@dataclasses.dataclass(frozen=True)
class BaselinesSection:
    """config.baselines. train: settings of the classifier's training."""

    knn: KnnSettings
    geoclip: GeoClipSettings
    classifier: ClassifierSettings
    train: TrainSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration.

    name: name of the configuration's file. variants: name of a variant -> its changes to the configuration (nested
    sections and keys). experiments: name -> Experiment. scaling: settings of the scaling study; None if the
    configuration has no scaling study.
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
        return self._variants[name]

    @functools.cached_property
    def _variants(self) -> dict[str, "Config"]:
        return {name: self.changed(changes, f"variants.{name}") for name, changes in self.variants.items()}

    def changed(self, changes: Mapping[str, Any], place: str) -> "Config":
        """Returns the configuration with changes applied; see `settings.changed`."""
        return settings.changed(self, changes, place)

    def at(self, key: str) -> Any:
        """Returns the section or the value of a dotted key, such as `model.width`."""
        return functools.reduce(getattr, key.split("."), self)

    def select(self, *keys: str) -> dict[str, Any]:
        """Returns the sections and values of dotted keys as nested JSON values, e.g. {"model": {"width": 256, ...}}.

        Manifests store settings in this form. Fields of type `settings.Runtime` are left out.
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
    """Returns the Config for the ConfigDict of a configuration file. Checks it with the changes of every variant too.

    Raises SettingsError with the first key that is missing, unknown, of a wrong type or out of range.
    """
    sections = config.copy_and_resolve_references().to_dict()
    experiments = {
        name: settings.read(Experiment, section, f"experiments.{name}")
        for name, section in sections.pop("experiments", {}).items()
    }
    result = settings.read(Config, {"scaling": None, **sections, "experiments": experiments}, "")
    for name in result.variants:
        result.variant(name)  # raises for values that are out of range with the variant's changes
    return result
