"""The one owner of a work directory: it knows folder and file names, and hands out typed things.

Whatever was trained is built from the settings in its own manifest. `Workdir.begin` refuses a configuration that asks
for other settings than those of any folder that a stage reads, directly or through others.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int

from geotoken_jax import backbone, checkpoint, records, settings, workdir
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Features, Tokens
from geotoken_jax.gallery import index
from geotoken_jax.gallery.exclude import ExcludeSettings, Exclusion, rules
from geotoken_jax.gallery.table import Table
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict.answer import Answerer
from geotoken_jax.predict.decode import Decoder, PredictSettings
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.predict.select import TRAINED, SelectorInputs
from geotoken_jax.predict.trained_selectors import selector_loader
from geotoken_jax.predict.uncertainty import UNCALIBRATED, Calibration
from geotoken_jax.workdir import Manifest, Stage, StageError

#: The split that the gallery is made of; others are asked about.
GALLERY = views.OF
#: Name of the baseline that answers with the first neighbor.
TOP1 = "top1_neighbor"
#: The split that answers are calibrated on.
VALIDATION = "validation"
#: Files that only making a folder needs, or that say when the gallery's photos were taken, which is nobody's business.
_MAKING = (
    "manifest.json", "begun.json", "checkpoints", "metrics.jsonl", "parameters.txt", "tensorboard", "features.npy",
    "captured-*.npy",
)  # fmt: skip
#: Columns of pools/VARIANT.
_POOL = ("tokens", "log_probability", "tempered_log_probability", "states")


class Workdir:
    """A work directory. `made` names the folders that this object's stages completed, and did not find complete."""

    def __init__(self, path: epath.PathLike):
        """Raises StageError for a URL."""
        self.path = workdir.local(path)
        self.made: set[str] = set()

    # Manifests

    def begin(
        self,
        config: Config,
        folder: str,
        keys: Sequence[str],
        inputs: Iterable[str],
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> Stage:
        """Opens a folder for its stage; see `workdir.begin`.

        config: the whole, without the changes of a variant; they are made here, if the folder is a variant's. keys:
        dotted places of the sections and keys that the folder depends on. inputs: folders that the stage reads.
        further: what else it depends on.

        Raises StageError if an input is missing, or the folder or one that it is made from, directly or through others,
        was made with other settings than the configuration has.
        """
        inputs = list(inputs)
        made_with = {**_own(config, folder).select(*keys), **further}
        self._refuse_others(config, inputs)
        stage = workdir.begin(self.path, folder, made_with, inputs)
        if not stage.manifest:
            self.made.add(folder)
        return stage

    def _refuse_others(self, config: Config, folders: Iterable[str]) -> None:
        seen, waiting = set(), list(folders)
        while waiting:
            folder = waiting.pop()
            if folder not in seen and (found := self.finished(folder)):
                seen.add(folder)
                waiting += found.inputs
                self._refuse_other(folder, found, _own(config, folder))

    def _refuse_other(self, folder: str, found: Manifest, config: Config) -> None:
        if other := workdir.first_other(found.settings, settings.result(config)):
            key, made_with, wanted = other
            raise workdir.OtherSettingsError(
                f"config.{key} is {wanted!r}, and {self.path / folder} was made with {made_with!r}: leave "
                f"config.{key} at that, or use another --workdir to make it with other settings",
                self.path / folder,
            )

    def manifest(self, folder: str) -> Manifest:
        """Returns the manifest of a complete folder. Raises StageError if it is not complete."""
        return workdir.read_manifest(self.path, folder)

    def finished(self, folder: str) -> Manifest | None:
        """Returns the manifest of a folder, None if it is not complete."""
        return self.manifest(folder) if (self.path / folder / "manifest.json").exists() else None

    def complete(self) -> list[str]:
        """Returns the names of all complete folders, those of the path before those of variants."""
        found = [file.parent for pattern in ("*", "*/*") for file in sorted(self.path.glob(f"{pattern}/manifest.json"))]
        return [folder.relative_to(self.path).as_posix() for folder in found]

    def digest(self, folder: str) -> str:
        """Returns the SHA-256 of a complete folder's manifest."""
        return workdir.digest(self.path, folder)

    # Photos, features and tables

    def photos(self, split: str) -> records.Photos:
        """Returns the photos of a split."""
        return records.Photos(self.path / "photos", split)

    @property
    def width(self) -> int:
        """C, of the backbone's features."""
        features = self.finished("features")
        return features.facts["width"] if features else self.gallery.width

    def features(self, split: str) -> records.Records:
        """Returns the frozen features of a split."""
        return records.Records(self.path / "features", split, records.feature_layout(self.width))

    def check_backbone(self, options: backbone.BackboneSettings) -> None:
        """Raises StageError if features/ were made with another backbone, or another checkpoint of it."""
        made_with = self.manifest("features").settings["embed"]
        if {**made_with, **settings.plain(backbone.made_with(options))} != made_with:
            raise StageError(
                f"{self.path / 'features'} was made with another backbone than config.embed has: embed again in "
                "another --workdir, or name that backbone's checkpoint in config.embed.huggingface.path"
            )

    @functools.cached_property
    def gallery(self) -> Table:
        """The table of the gallery."""
        return Table(self.path / "gallery")

    def table(self, split: str) -> Table:
        """Returns the table of a split's photos, for GALLERY the gallery's."""
        return self.gallery if split == GALLERY else Table(self.path / "queries" / split)

    def index(self, threads: int) -> index.Index:
        """Returns the index of the gallery. threads: of a search."""
        return index.load(self.path / "gallery" / "index", threads)

    @property
    def training_splits(self) -> list[str]:
        """The splits that training reads: the photos, and their views if there are any."""
        counts = (self.finished("tokens") or self.manifest("features")).counts
        return [split for split in (views.OF, views.SPLIT) if split in counts]

    @property
    def query_counts(self) -> dict[str, int]:
        """The splits that are to be answered, with their numbers of photos: all but those that are trained on."""
        return {split: n for split, n in self.manifest("queries").counts.items() if split != views.SPLIT}

    # Neighbors and token records

    @property
    def neighbor_count(self) -> int:
        """K, the number of neighbors on record for each photo."""
        return self.manifest("tokens").facts["neighbors"]

    def neighbors(self, split: str, k: int | None = None) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns gallery rows and scores of a split's neighbors, best first; rows are -1 where there is none."""
        rows, scores = (records.open_array(self.neighbors_file(split, name))[:, :k] for name in ("rows", "scores"))
        return rows, scores

    def neighbors_file(self, split: str, name: str) -> epath.Path:
        """Returns the file of a split's neighbors; name: "rows" or "scores"."""
        return self.path / "neighbors" / f"{split}.{name}.npy"

    def exclusions(self, split: str) -> Callable[[np.ndarray], list[Exclusion]]:
        """Returns rows of a split's table -> the rules by which neighbors/ left gallery photos out for them."""
        key = "exclude" if split in (views.OF, views.SPLIT) else "exclude_in_evaluation"
        section = self.manifest("neighbors").settings["index"]["neighbors"][key]
        exclude = settings.read(ExcludeSettings, section, f"index.neighbors.{key}")
        own, gallery = self.table(split), self.gallery
        columns = {name: getattr(gallery, name)() for name in ("ids", "authors", "coordinates")}
        return lambda rows: rules(exclude, own, rows, columns, lambda some: gallery.embeddings(some)[:, 0])

    def tokens(self, split: str, model: ModelSettings, gallery: Table | None) -> Tokens:
        """Returns the reader of a split's examples for the decoder. gallery: None where it is on the devices."""
        stored = records.Records(self.path / "tokens", split, records.token_layout(self.neighbor_count))
        return Tokens(stored, self.table(split), gallery, model.cells, model.neighbors, model.times)

    def pairs(self, split: str) -> Features:
        """Returns the reader of a split's examples for alignment."""
        return Features(self.features(split))

    # Trained models

    def aligned(self, asked: AlignSettings) -> AlignModel:
        """Returns the trained alignment model. asked: the section whose runtime fields are taken."""
        task = AlignTask(self.aligned_settings(asked), self.width)
        return checkpoint.read_module(self.path / "align" / "parameters.safetensors", task.init)

    def aligned_settings(self, asked: AlignSettings) -> AlignSettings:
        """Returns the settings that the alignment model was trained with, its runtime fields as asked."""
        return settings.restored(self.manifest("align").settings["align"]["model"], asked, "align.model")

    def model_settings(self, variant: str, asked: ModelSettings) -> ModelSettings:
        """Returns the settings that a variant's decoder was trained with, its runtime fields as asked."""
        return settings.restored(self.manifest(f"geotoken/{variant}").settings["model"], asked, "model")

    def decoder(self, variant: str, asked: ModelSettings) -> GeoTokenModel:
        """Returns the trained decoder of a variant."""
        options = self.model_settings(variant, asked)
        file = self.path / "geotoken" / variant / "parameters.safetensors"
        return checkpoint.read_module(file, lambda rngs: GeoTokenModel(options, rngs))

    def selectors(self, config: Config, variant: str) -> dict[str, Any]:
        """Returns folder -> settings of the model in it, of the trained selectors that config.predict names."""
        sections = {"reward": config.reward.model, "verifier": config.verifier.model}
        return {
            name: settings.restored(
                self.manifest(f"{name}/{variant}").settings[name]["model"], sections[name], f"{name}.model"
            )
            for name in needed(config.predict)
        }

    def answerer(self, config: Config, variant: str, exported: epath.Path | None = None) -> Answerer:
        """Returns what answers with a variant's trained parts.

        config: with the variant's changes made. exported: folder of an export, whose gallery, and what selectors keep
        of it, are read instead of the work directory's.
        """
        gallery = Table(exported / "gallery") if exported else self.gallery
        model = self.decoder(variant, config.model)
        aligned = functools.cache(lambda: self.aligned(config.align.model))

        def folder(name: str) -> epath.Path:
            return exported / name if exported else self.path / name / variant

        trained = selector_loader(self.selectors(config, variant), folder, gallery, model, aligned)
        return Answerer(Decoder(model, config.predict, gallery), SelectorInputs(config.predict.vote, aligned, trained))

    # Pools

    def save_pools(self, variant: str, rows: np.ndarray, parts: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Writes pools/VARIANT: gallery rows [n], and batches of tokens, their log-probabilities and states."""
        folder = self.path / "pools" / variant
        for name, values in zip(_POOL, zip(*parts, strict=True), strict=True):
            records.save_array(folder / f"{name}.npy", np.concatenate(values))
        records.save_array(folder / "rows.npy", rows)

    def pool_rows(self, variant: str) -> Int[np.ndarray, " n"]:
        """Returns the gallery rows of the photos that pools/VARIANT was made of."""
        return records.open_array(self.path / "pools" / variant / "rows.npy")

    def pools(self, variant: str, asked: ModelSettings) -> tuple[Float32[np.ndarray, "n K D"], Pool]:
        """Returns the states and the pools in pools/VARIANT, these without the embeddings of neighbors."""
        folder = self.path / "pools" / variant
        tokens, log_p, tempered, states = (records.open_array(folder / f"{name}.npy") for name in _POOL)
        options, rows = self.model_settings(variant, asked), self.pool_rows(variant)
        near, scores = (part[rows] for part in self.neighbors(views.OF, options.neighbors))
        pool = Pool(
            Candidates(tokens, log_p, tempered),  # pyright: ignore[reportArgumentType]
            np.stack(options.cells.decode(tokens), -1),
            self.gallery.embeddings(rows),
            np.zeros((len(rows), options.neighbors, 0, self.gallery.width), np.float32),
            self.gallery.coordinates(np.maximum(near, 0)),
            scores,
            (near >= 0).sum(1),
            None,
        )
        return states, pool

    # Answers and what is made of them

    def answers(self, name: str, split: str) -> epath.Path:
        """Returns the file of the answers of a variant or baseline for a split."""
        return self.path / "predictions" / name / f"{split}.jsonl"

    def predicted_variants(self) -> list[str]:
        """Returns the variants and baselines whose predictions are complete."""
        return sorted(path.parent.name for path in (self.path / "predictions").glob("*/manifest.json"))

    def calibration_file(self, variant: str) -> epath.Path:
        """Returns the file of a variant's calibration, which is there if its predictions are calibrated."""
        return self.path / "predictions" / variant / "calibration.json"

    def calibration(self, variant: str) -> Calibration:
        """Returns a variant's calibration, UNCALIBRATED if there is none."""
        file = self.calibration_file(variant)
        return Calibration.load(file) if file.exists() else UNCALIBRATED

    def training_logs(self) -> list[epath.Path]:
        """Returns the files that alignment and decoders wrote their metrics to, if they are there."""
        return [self.path / "align" / "metrics.jsonl", *sorted((self.path / "geotoken").glob("*/metrics.jsonl"))]

    def metrics(self) -> dict[str, Any]:
        """Returns the figures of report/."""
        return json.loads((self.path / "report" / "metrics.json").read_text())

    def copy_trained(self, folder: str, to: epath.Path) -> None:
        """Copies a folder as an export holds it: without the files that only making it needs."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.path / folder, to, ignore=shutil.ignore_patterns(*_MAKING))


def _own(config: Config, folder: str) -> Config:
    """Returns the configuration that a folder is made with: with the changes of the variant that it belongs to."""
    name = folder.partition("/")[2]
    return config.variant(name) if name in config.variants else config


def needed(options: PredictSettings) -> list[str]:
    """Returns the folders of trained selectors that the selectors of config.predict are in."""
    return [name for name, selectors in TRAINED.items() if set(selectors) & set(options.selectors)]
