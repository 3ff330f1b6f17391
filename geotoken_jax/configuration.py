"""The whole configuration as one tree of frozen dataclasses: the one list of its sections.

`configs/*.py` are inert; the command line reads one of them once, with `read`, and from there on functions take the
section that they need. Networks declare their settings beside them, stages here.
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
from geotoken_jax.data.join import DataSettings
from geotoken_jax.gallery.placement import GallerySettings
from geotoken_jax.geo import distance
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.model.task import LossSettings
from geotoken_jax.predict.classifier import ClassifierSettings
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.judge import JudgeSettings
from geotoken_jax.predict.verify import VerifierSettings
from geotoken_jax.processes import WatchSettings
from geotoken_jax.sharding import MeshSettings
from geotoken_jax.train.loop import TrainSettings


@dataclasses.dataclass(frozen=True)
class PoolsSettings:
    """photos: that have pools made of them, of authors drawn at random. seed: of that draw."""

    photos: int
    seed: int

    def __post_init__(self):
        if self.photos < 20:
            raise ValueError(f"config.pools.photos is {self.photos}: make it at least 20")


@dataclasses.dataclass(frozen=True)
class KnnSettings:
    """neighbors: of each photo, at most so many as are on record. temperature: of their weights, which are
    exp(similarity / temperature); similarities lie in [-3, 3]. sigma_km: of the Gaussian around each."""

    neighbors: int
    temperature: float
    sigma_km: float

    def __post_init__(self):
        for key in ("neighbors", "temperature", "sigma_km"):
            if getattr(self, key) <= 0:
                raise ValueError(f"config.baselines.knn.{key} is {getattr(self, key)}: it must be above 0")


@dataclasses.dataclass(frozen=True)
class GeoClipSettings:
    """candidates: places of the gallery that are written down, best first."""

    candidates: int


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """location: GeoCLIP's wheel, or what else `read_weights` takes, whose capsules the location encoder begins with; ""
    for random ones."""

    location: str


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """config.export. gallery: numbers of its vectors, bfloat16 or int8, which costs what the model card says. weights:
    the checkpoint of a Hugging Face backbone is copied in; else it is referred to, and needed again to answer.
    thumbnails: pixels of the longest side of the gallery photos that the service's page shows beside an answer, 0 for
    none. examples: photos of `test` to try there, 0 for none."""

    gallery: str
    weights: bool
    thumbnails: int
    examples: int

    def __post_init__(self):
        if self.gallery not in ("bfloat16", "int8"):
            raise ValueError(f"config.export.gallery is {self.gallery!r}: it must be 'bfloat16' or 'int8'")
        for name in ("thumbnails", "examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.export.{name} is {getattr(self, name)}: use 0 for none, or more")


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """config.evaluate. resamples: of the bootstrap. reference: the variant that the others are compared with. compare:
    further pairs of methods to compare, each by its variant, or by VARIANT:CHOICE. labels: variant -> the name that
    people read. earth: what distances are taken on, `sphere` or `ellipsoid`. strict: a threshold's own distance is
    outside of it."""

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
                raise ValueError(f'config.evaluate.compare has {pair!r}: give pairs, as in (("geotoken", "knn"),)')


@dataclasses.dataclass(frozen=True)
class OverlapSettings:
    """config.audit.leakage. cosine_above: of two photos' image embeddings, past which they are near-duplicates."""

    cosine_above: float


@dataclasses.dataclass(frozen=True)
class CoverageSettings:
    """level: of the S2 cells whose photos are counted. split: whose photos answer again without their region.
    countries: how many are left out, those with most photos of `split`; continents all are."""

    level: int
    split: str
    countries: int

    def __post_init__(self):
        if not 1 <= self.level <= records.LEVEL:
            raise ValueError(f"config.audit.coverage.level is {self.level}: use one of 1..{records.LEVEL}")


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """config.audit: a section for each audit that has settings."""

    coverage: CoverageSettings
    leakage: OverlapSettings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """question: that it answers. note: what its table says, written by who has read it. runs: the name of each, the
    sections and keys that it changes and, where it trains nothing, the name of the run before it whose trained parts
    it takes, and whose changes its own are added to; the first is what the others are compared with. choices: of each
    run that the table shows: names of selectors, "" for the run's own, "ideal" for the bound. splits: that are
    scored."""

    question: str
    note: str
    runs: tuple
    choices: tuple
    splits: tuple


@dataclasses.dataclass(frozen=True)
class ScalingSettings:
    """sizes: name, and the sections and keys that make it, smallest first. held_out: the one that is not fitted, and
    held_out_photos: of `photos`, which it is trained on. photos: so many are trained on, fewest first, and so many
    examples of them are seen, until the loss falls no longer. validations: of a run, of which the best counts.
    reference: the size at which all that follows is varied. neighbors: beside the configuration's. seeds: beside the
    configuration's, at the fewest photos. budgets: floating-point operations of training, each spent on every size but
    the held-out one. gallery: photos in it at test time, a smaller one in each larger. candidates: of a photo at test
    time, up to config.predict.samples. split: that is tested. resamples, seed: of the bootstrap over runs, and of the
    choice among gallery and candidates. note, limits: what the document says of the study and, line by line, of what
    does not transfer from it, by who has read it."""

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
                    f"config.scaling.{key} is {getattr(self, key)!r}: choose one of config.scaling.sizes, which are "
                    f"{', '.join(dict(self.sizes))}"
                )
        if self.held_out_photos not in dict(self.photos):
            raise ValueError(
                f"config.scaling.held_out_photos is {self.held_out_photos}: choose one of config.scaling.photos, which "
                f"are {', '.join(map(str, dict(self.photos)))}"
            )
        if self.reference == self.held_out:
            raise ValueError(f"config.scaling.reference is the held-out size, {self.held_out}: choose another")

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
class VerifierSection:
    """config.verifier: its comparator is trained first, then its scorer."""

    model: VerifierSettings
    train_comparator: TrainSettings
    train_scorer: TrainSettings


@dataclasses.dataclass(frozen=True)
class BaselinesSection:
    """config.baselines. train: of the classifier."""

    knn: KnnSettings
    geoclip: GeoClipSettings
    classifier: ClassifierSettings
    train: TrainSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration.

    name: of its file. variants: name -> sections and keys that it changes. experiments: name -> Experiment. scaling:
    None where the configuration has no study.
    """

    name: str
    mesh: MeshSettings
    watch: WatchSettings
    photos: preparation.PhotosSettings
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
    verifier: VerifierSection
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
        """Returns the configuration with the changes of a variant made. Raises SettingsError if there is none."""
        if name not in self.variants:
            raise settings.SettingsError(f"config.variants has no {name!r}: choose one of {', '.join(self.variants)}")
        return self.changed(self.variants[name], f"variants.{name}")

    def changed(self, changes: Mapping[str, Any], where: str) -> "Config":
        """Returns the configuration with changes (sections and keys, nested) made; where: they stand in it."""
        return settings.changed(self, changes, where)

    def at(self, place: str) -> Any:
        """Returns the section or key at a dotted place."""
        return functools.reduce(getattr, place.split("."), self)

    def select(self, *keys: str) -> dict[str, Any]:
        """Returns sections and keys, each by its dotted place, as a manifest records them: without runtime fields."""
        found: dict[str, Any] = {}
        for key in keys:
            *parents, last = key.split(".")
            section = found
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = settings.result(self.at(key))
        return found


def read(config: ConfigDict) -> Config:
    """Returns a configuration file's ConfigDict as a Config, every variant of it tried.

    Raises SettingsError naming the first key that is missing, unread, of another type, or refused by its reader.
    """
    sections = config.copy_and_resolve_references().to_dict()
    experiments = {
        name: settings.read(Experiment, section, f"experiments.{name}")
        for name, section in sections.pop("experiments", {}).items()
    }
    found = settings.read(Config, {"scaling": None, **sections, "experiments": experiments}, "")
    for name in found.variants:
        found.variant(name)
    return found
