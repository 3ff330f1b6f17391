"""Opens the contents of a work directory as typed objects. Other modules do not need the names of its files.

Trained models are built from the settings in their own manifests. `Workdir.begin` raises an error if the configuration
differs from the settings of any folder that a stage reads, directly or through other folders.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int

from geotoken_jax import backbone, checkpoint, disk, manifests, records, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Features, Searched, Tokens
from geotoken_jax.gallery import index
from geotoken_jax.gallery.exclude import ExcludeSettings, Exclusion, exclusions, gallery_columns, have_source
from geotoken_jax.gallery.table import Table
from geotoken_jax.manifests import Manifest, Stage, StageError
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict.answer import Answerer
from geotoken_jax.predict.channels import Channels
from geotoken_jax.predict.decode import Decoder, PredictSettings
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.predict.select import TRAINED, SelectorInputs
from geotoken_jax.predict.trained_selectors import selector_loader
from geotoken_jax.predict.uncertainty import UNCALIBRATED, Calibration

#: Split whose photos make up the gallery. Photos of other splits are queries.
GALLERY = views.SOURCE_SPLIT
#: Name of the baseline that predicts the coordinates of the first neighbor.
TOP1 = "top1_neighbor"
#: Split on which predictions are calibrated.
VALIDATION = "validation"
#: Files that are not copied to an export. Most are needed only for training or indexing. captured-*.npy contains the
#: times at which the gallery photos were taken, which are private.
_NOT_EXPORTED = (
    "manifest.json", "begun.json", "checkpoints", "metrics.jsonl", "parameters.txt", "tensorboard",
    "fold-*.safetensors", "captured-*.npy", manifests.LEDGERS,
)  # fmt: skip
#: Names of the files of neighbors/, as a format string.
NEIGHBOR_FILES = "{split}.{field}-{shard:05d}-of-{shards:05d}.npy"
#: Separator in the name of a benchmark's split under exclusion rules, BENCHMARK-RULES (see `Workdir.split_under`).
_UNDER = "-"
#: Names of the arrays in pools/VARIANT.
_POOL_ARRAYS = ("tokens", "log_probability", "tempered_log_probability", "states")


class Workdir:
    """A work directory.

    made: names of the folders that stages make now; these folders were not complete when `begin` opened them. update:
    whether stages add photos that were added to the inputs of their folders.
    """

    def __init__(self, path: epath.PathLike, update: bool = False):
        """Opens a work directory on a local disk. Raises StageError if `path` is a URL."""
        self.path, self.update = manifests.local(path), update
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
        """Opens a folder for its stage; see `manifests.begin`.

        config: whole configuration, without the changes of a variant. If the folder belongs to a variant, the variant's
        changes are applied here. keys: dotted keys of the configuration that the folder depends on. inputs: folders
        that the stage reads. further: section name -> section that the folder also depends on; it replaces a section of
        the same name in `keys`.

        Raises StageError if an input is not complete, or if the configuration differs from the settings of the folder,
        of its inputs, of their inputs, and so on.
        """
        inputs = list(inputs)
        requested = {**_variant_config(config, folder).select(*keys), **further}
        self._check_settings(config, inputs)
        update = self.update and manifests.PATH.get(folder) in manifests.UPDATED
        stage = manifests.begin(self.path, folder, requested, inputs, update)
        if not stage.manifest:
            self.made.add(folder)
        elif stage.manifest.inputs != stage.inputs:
            print(
                f"{stage.path} is kept: it was trained before photos were added; to train with them, "
                f"{manifests.how_to_remake(stage.path, folder)}",
                file=sys.stderr,
            )
        return stage

    def _check_settings(self, config: Config, folders: Iterable[str]) -> None:
        seen, waiting = set(), list(folders)
        while waiting:
            folder = waiting.pop()
            if folder not in seen and (manifest := self.finished(folder)):
                seen.add(folder)
                waiting += manifest.inputs
                self._check_folder(folder, manifest, _variant_config(config, folder))

    def _check_folder(self, folder: str, manifest: Manifest, config: Config) -> None:
        if difference := manifests.first_difference(manifest.settings, settings.result(config)):
            key, stored, requested = difference
            raise manifests.OtherSettingsError(
                f"config.{key} is {requested!r}, but {self.path / folder} was made with {stored!r}: set config.{key} "
                f"to {stored!r}, use another --workdir, or {manifests.how_to_remake(self.path / folder, folder)}",
                self.path / folder,
            )

    def manifest(self, folder: str) -> Manifest:
        """Returns the manifest of a folder. Raises StageError if the folder is not complete."""
        return manifests.read_manifest(self.path, folder)

    def finished(self, folder: str) -> Manifest | None:
        """Returns the manifest of a folder, or None if the folder is not complete."""
        return self.manifest(folder) if (self.path / folder / "manifest.json").exists() else None

    def complete_folders(self) -> list[str]:
        """Returns the names of all complete folders, top-level folders before their subfolders."""
        complete = [folder for folder in self._folders() if (folder / "manifest.json").exists()]
        return [folder.relative_to(self.path).as_posix() for folder in complete]

    def begun_folders(self) -> list[str]:
        """Returns the names of all folders of stages, complete or begun, top-level folders before their subfolders."""
        names = ("manifest.json", "begun.json")
        begun = [folder for folder in self._folders() if any((folder / name).exists() for name in names)]
        return [folder.relative_to(self.path).as_posix() for folder in begun]

    def _folders(self) -> list[epath.Path]:
        """Returns the folders and files in the work directory, then the folders and files in each of these folders."""
        top = disk.matching(self.path, "*")
        return [*top, *(inner for folder in top for inner in disk.matching(folder, "*"))]

    def remove_made_by(self, verb: str) -> Iterator[str]:
        """Removes the folders that a verb makes, and all folders that were made from these, complete or not.

        Yields the name of each folder before it is removed. Studies under experiments/ and scaling/ are kept.
        """
        inputs: dict[str, set[str]] = {}
        for path in self._folders():
            folder = path.relative_to(self.path).as_posix()
            if folder.split("/")[0] in manifests.PATH:
                for file in (path / name for name in ("manifest.json", "begun.json")):
                    if file.exists():
                        inputs.setdefault(folder, set()).update(json.loads(file.read_text())["inputs"])
        removed = {folder for folder in inputs if manifests.PATH[folder.split("/")[0]] == verb}
        while more := {folder for folder, needed in inputs.items() if needed & removed} - removed:
            removed |= more
        for folder in sorted(removed):
            yield folder
            _remove(Path(self.path / folder))

    def counts(self, folder: str) -> dict[str, list[int]]:
        """Returns split -> numbers of photos in a complete folder, ascending.

        The first number is from the time when the folder was made. The others are from after each addition of photos;
        the last one is the present number. partition.ranges computes shards from them.
        """
        manifest = self.manifest(folder)
        states = [*(state["counts"] for state in manifest.facts.get("earlier", [])), manifest.counts]
        return {split: [counts.get(split, 0) for counts in states] for split in manifest.counts}

    def remove_outdated(self, verb: str) -> Iterator[str]:
        """Removes the folders of a verb whose inputs have changed since, for example because photos were added.

        Trained models are kept. Yields the name of each folder before it is removed.
        """
        for folder in self.complete_folders():
            if manifests.PATH.get(folder.split("/")[0]) == verb and manifests.is_outdated(self.path, folder):
                yield folder
                _remove(Path(self.path / folder))

    def digest(self, folder: str) -> str:
        """Returns the SHA-256 of a complete folder's manifest."""
        return manifests.digest(self.path, folder)

    # Photos, features and tables

    def photos(self, split: str) -> records.Photos:
        """Returns the photos of a split."""
        return records.Photos(self.path / "photos", split)

    @property
    def width(self) -> int:
        """C, the width of the backbone's features. Raises StageError if neither features/ nor gallery/ is complete."""
        if features := self.finished("features"):
            return features.facts["width"]
        self.manifest("gallery")
        return self.gallery.width

    def features(self, split: str) -> records.Records:
        """Returns the frozen backbone's features of a split."""
        layout = records.feature_layout(self.width, self.id_bytes("features"), bool(self.sources("features")))
        return records.Records(self.path / "features", split, layout)

    def id_bytes(self, folder: str) -> int:
        """Returns the size of the fields for id and author. folder: "photos" or "features"."""
        return self.manifest(folder).facts.get("id_bytes", records.ID_BYTES)

    def sources(self, folder: str) -> list[str]:
        """Returns the names of several sources; empty if there is one source. folder: "photos" or "features"."""
        return sorted(self.manifest(folder).facts.get("sources", ()))

    def check_backbone(self, options: backbone.BackboneSettings) -> None:
        """Raises StageError if the backbone of features/, or one of its settings, differs from `options`.

        Features depend on the name of the backbone, the contents of its checkpoint, and settings such as dtype. All of
        these are compared. Raises SettingsError if the path in `options` has no checkpoint.
        """
        stored = self.manifest("features").settings["embed"]
        if {**stored, **settings.plain(backbone.feature_settings(options))} != stored:
            raise StageError(
                f"config.embed has another backbone than {self.path / 'features'} was made with, or other settings of "
                f"it: set config.embed.backbone to {stored['backbone']!r} with the settings and the checkpoint that "
                "features/manifest.json records, or embed again in another --workdir"
            )

    @functools.cached_property
    def gallery(self) -> Table:
        """The table of the gallery."""
        return Table(self.path / "gallery")

    def table(self, split: str) -> Table:
        """Returns the table of a split's photos; for GALLERY, this is the gallery."""
        return self.gallery if split == GALLERY else Table(self.path / "queries" / split.partition(_UNDER)[0])

    def index(self, threads: int, part: Sequence[int] = ()) -> index.Index:
        """Returns the index of the gallery. For the arguments, see gallery.index.load."""
        return index.load(self.path / "gallery" / "index", threads, part)

    def index_rows(self) -> list[range]:
        """Returns the gallery rows of each shard of the index."""
        return index.shard_rows(self.path / "gallery" / "index")

    @property
    def training_splits(self) -> list[str]:
        """Splits whose photos are trained on: the train photos and, if there are any, their augmented views."""
        counts = (self.finished("tokens") or self.manifest("features")).counts
        return [split for split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT) if split in counts]

    @property
    def query_counts(self) -> dict[str, int]:
        """Split -> number of photos, for the splits that are predicted: all queries except the augmented views."""
        return {split: n for split, n in self.manifest("queries").counts.items() if split != views.VIEWS_SPLIT}

    @property
    def benchmarks(self) -> list[str]:
        """Splits that are benchmarks, by name; none if photos/ is missing."""
        manifest = self.finished("photos")
        return manifest.facts.get("benchmarks", []) if manifest else []

    @staticmethod
    def split_under(benchmark: str, rules: str) -> str:
        """Returns the name of a benchmark's split under exclusion rules. rules: a key of config.benchmarks.exclude.

        This split has the same photos as the benchmark. Their neighbors are searched without the gallery photos that
        the rules exclude.
        """
        return f"{benchmark}{_UNDER}{rules}"

    @property
    def counts_under_rules(self) -> dict[str, int]:
        """Name of a benchmark's split under exclusion rules -> number of photos; empty if exclusion/ is missing."""
        manifest = self.finished("exclusion")
        return manifest.counts if manifest else {}

    # Neighbors and token records

    @property
    def neighbor_count(self) -> int:
        """Number of neighbors stored per photo."""
        return self.manifest("tokens").facts["neighbors"]

    def neighbors(
        self, split: str, k: int | None = None, rows: slice = slice(None)
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns gallery rows and scores of a split's neighbors, best first; a missing neighbor has row -1.

        k: number of neighbors per photo; if None, all stored neighbors. rows: rows of the split's table. The arrays are
        memory-mapped if each is stored in one file. If not, they are read into memory.
        """
        found, scores = (self._neighbors(split, name, rows)[:, :k] for name in ("rows", "scores"))
        return found, scores

    def _neighbors(self, split: str, name: str, rows: slice) -> np.ndarray:
        folder = self.path / ("exclusion" if _UNDER in split else "neighbors")
        # Arrays in exclusion/, and in neighbors/ of earlier versions, have one file each.
        whole = folder / f"{split}.{name}.npy"
        files = [whole] if whole.exists() else records.numbered(folder, f"{split}.{name}-", ".npy", split)
        parts = [records.open_array(file) for file in files]
        if len(parts) == 1:
            return parts[0][rows]
        starts = np.cumsum([0, *map(len, parts)])
        first, end, _ = rows.indices(starts[-1])
        return np.concatenate(
            [part[max(first - start, 0) : max(end - start, 0)] for part, start in zip(parts, starts[:-1], strict=True)]
        )

    def neighbors_file(self, split: str, name: str, shard: int, shards: int) -> epath.Path:
        """Returns the path of a shard of a split's neighbors. name: "rows" or "scores". shards: number of shards."""
        return self.path / "neighbors" / NEIGHBOR_FILES.format(split=split, field=name, shard=shard, shards=shards)

    def exclusions(self, split: str) -> Callable[[np.ndarray | slice], list[Exclusion]]:
        """Returns a function from rows of a split's table to their exclusions from the gallery.

        Exclusions are objects that decide which gallery photos may not be neighbors of these rows. They follow the
        rules with which neighbors/ was made. For a benchmark's split under exclusion rules (see `split_under`), they
        follow these rules too.
        """
        key = "exclude" if split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT) else "exclude_in_evaluation"
        section = self.manifest("neighbors").settings["index"]["neighbors"][key]
        every = [settings.read(ExcludeSettings, section, f"index.neighbors.{key}")]
        if rules := split.partition(_UNDER)[2]:
            section = self.manifest("exclusion").settings["benchmarks"]["exclude"][rules]
            every.append(settings.read(ExcludeSettings, section, f"benchmarks.exclude.{rules}"))
        return self.exclusions_by(every, split)

    def exclusions_by(
        self, every: Sequence[ExcludeSettings], split: str
    ) -> Callable[[np.ndarray | slice], list[Exclusion]]:
        """Returns a function like `exclusions`, for other rules. every: settings of the rules to apply."""
        queries, gallery = self.table(split), self.gallery
        columns = gallery_columns(gallery, have_source(queries))

        def images(rows: np.ndarray) -> np.ndarray:
            return gallery.embeddings(rows)[:, 0]

        return lambda rows: [rule for one in every for rule in exclusions(one, queries, rows, columns, images)]

    def tokens(self, split: str, model: ModelSettings, gallery: Table | None) -> Tokens:
        """Returns the reader of a split's training examples for the decoder.

        gallery: gallery to read neighbors from; None if the gallery is on the devices.
        """
        if _UNDER in split:
            stored = Searched(self.table(split), self.neighbors(split)[0])
        else:
            stored = records.Records(self.path / "tokens", split, records.token_layout(self.neighbor_count))
        return Tokens(stored, self.table(split), gallery, model.cells, model.neighbors, model.times)

    def pairs(self, split: str) -> Features:
        """Returns the reader of a split's training examples for alignment."""
        return Features(self.features(split))

    # Trained models

    def align_model(self, requested: AlignSettings) -> AlignModel:
        """Returns the trained alignment model. requested: see `aligned_settings`."""
        task = AlignTask(self.aligned_settings(requested), self.width)
        return checkpoint.read_module(self.path / "align" / "parameters.safetensors", task.init)

    def aligned_settings(self, requested: AlignSettings) -> AlignSettings:
        """Returns the settings of the trained alignment model, from its manifest.

        requested: config.align.model. Only its fields of type settings.Runtime are used.
        """
        return settings.restored(self.manifest("align").settings["align"]["model"], requested, "align.model")

    def model_settings(self, variant: str, requested: ModelSettings) -> ModelSettings:
        """Returns the settings of a variant's trained decoder, from its manifest.

        requested: config.model. Only its fields of type settings.Runtime are used.
        """
        return settings.restored(self.manifest(f"geotoken/{variant}").settings["model"], requested, "model")

    def decoder(self, variant: str, requested: ModelSettings) -> GeoTokenModel:
        """Returns the trained decoder of a variant. requested: see `model_settings`."""
        options = self.model_settings(variant, requested)
        file = self.path / "geotoken" / variant / "parameters.safetensors"
        return checkpoint.read_module(file, lambda rngs: GeoTokenModel(options, rngs))

    def selectors(self, config: Config, variant: str) -> dict[str, Any]:
        """Returns name -> model settings, for the trained selectors that config.predict.selectors needs.

        If the reranker is one of them, the settings of the comparator are included, with the name "comparator".
        """
        sections = {"reward": config.reward.model, "reranker": config.reranker.model}
        found = {
            name: settings.restored(
                self.manifest(f"{name}/{variant}").settings[name]["model"], sections[name], f"{name}.model"
            )
            for name in trained_selectors(config.predict)
        }
        if "reranker" in found:
            stored = self.manifest("channels").settings["channels"]["comparator"]
            found["comparator"] = settings.restored(stored, config.channels.comparator, "channels.comparator")
        return found

    def channels(self, config: Config) -> Channels:
        """Returns the channels that config.reranker.model.channels names, opened for search."""
        stored = self.manifest("channels").settings["channels"]["comparator"]
        comparator = settings.restored(stored, config.channels.comparator, "channels.comparator")
        threads = config.index.search.threads
        names = config.reranker.model.channels
        return Channels(names, self.path / "channels", comparator, self.gallery, self.index(threads), threads)

    def answerer(self, config: Config, variant: str, exported: epath.Path | None = None) -> Answerer:
        """Returns an Answerer, which predicts with the trained decoder and selectors of a variant, and the gallery.

        config: configuration with the variant's changes applied. exported: folder of an export, from which the gallery
        and the selectors are read; if None, both are read from the work directory.
        """
        gallery = Table(exported / "gallery") if exported else self.gallery
        model = self.decoder(variant, config.model)
        aligned = functools.cache(lambda: self.align_model(config.align.model))

        def folder(name: str) -> epath.Path:
            if exported or name == "channels":
                return (exported or self.path) / name
            return self.path / name / variant

        def searched() -> tuple[index.Index, int]:
            threads = config.index.search.threads
            return index.load((exported or self.path) / "gallery" / "index", threads), threads

        trained = selector_loader(self.selectors(config, variant), folder, gallery, model, searched)
        return Answerer(Decoder(model, config.predict, gallery), SelectorInputs(config.predict.vote, aligned, trained))

    # Pools

    def save_pools(self, variant: str, rows: np.ndarray, parts: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Writes pools/VARIANT, the candidates of train photos.

        rows: gallery rows of the photos, [n]. parts: one tuple per batch of photos, with four arrays of the candidates:
        tokens, log-probabilities, log-probabilities under the sampling distribution, and states of the decoder.
        """
        folder = self.path / "pools" / variant
        for name, values in zip(_POOL_ARRAYS, zip(*parts, strict=True), strict=True):
            records.save_array(folder / f"{name}.npy", np.concatenate(values))
        records.save_array(folder / "rows.npy", rows)

    def pool_rows(self, variant: str) -> Int[np.ndarray, " n"]:
        """Returns the gallery rows of the photos in pools/VARIANT."""
        return records.open_array(self.path / "pools" / variant / "rows.npy")

    def pools(self, variant: str, requested: ModelSettings) -> tuple[Float32[np.ndarray, "n K D"], Pool]:
        """Returns the decoder's states of all candidates in pools/VARIANT, and the candidates as a Pool.

        The Pool contains no embeddings of neighbors. requested: see `model_settings`.
        """
        folder = self.path / "pools" / variant
        tokens, log_p, tempered, states = (records.open_array(folder / f"{name}.npy") for name in _POOL_ARRAYS)
        options, rows = self.model_settings(variant, requested), self.pool_rows(variant)
        neighbors, scores = (part[rows] for part in self.neighbors(views.SOURCE_SPLIT, options.neighbors))
        pool = Pool(
            Candidates(tokens, log_p, tempered),  # pyright: ignore[reportArgumentType]
            np.stack(options.cells.decode(tokens), -1),
            self.gallery.embeddings(rows),
            np.zeros((len(rows), options.neighbors, 0, self.gallery.width), np.float32),
            self.gallery.coordinates(np.maximum(neighbors, 0)),
            scores,
            (neighbors >= 0).sum(1),
            None,
        )
        return states, pool

    # Predictions, report and export

    def predictions_file(self, name: str, split: str) -> epath.Path:
        """Returns the path of the predictions of a variant or baseline for a split."""
        return self.path / ("excluded" if _UNDER in split else "predictions") / name / f"{split}.jsonl"

    def recall_file(self, variant: str, split: str) -> epath.Path:
        """Returns the path of the file with the recall of a split's candidates. The file exists only if the reranker is
        a selector."""
        return self.path / "predictions" / variant / f"{split}.recall.json"

    def predicted_variants(self) -> list[str]:
        """Returns the variants and baselines whose predictions are complete."""
        folders = disk.matching(self.path / "predictions", "*")
        return [folder.name for folder in folders if (folder / "manifest.json").exists()]

    def excluded_folders(self) -> list[str]:
        """Returns the folders of complete predictions under exclusion rules."""
        return [folder for folder in self.complete_folders() if folder.startswith("excluded/")]

    def exclusion_facts(self) -> dict[str, Any]:
        """Returns benchmark -> facts on its exclusion rules, such as the number of photos that they exclude.

        See stages.exclusion. Returns {} if exclusion/ is missing.
        """
        manifest = self.finished("exclusion")
        return manifest.facts["benchmarks"] if manifest else {}

    def calibration_file(self, variant: str) -> epath.Path:
        """Returns the path of a variant's calibration. The file exists only if the predictions are calibrated."""
        return self.path / "predictions" / variant / "calibration.json"

    def calibration(self, variant: str) -> Calibration:
        """Returns a variant's calibration, or UNCALIBRATED if the predictions are not calibrated."""
        file = self.calibration_file(variant)
        return Calibration.load(file) if file.exists() else UNCALIBRATED

    def training_logs(self) -> list[epath.Path]:
        """Returns the paths of files with training metrics, of the alignment model and all decoders.

        The file of the alignment model may not exist.
        """
        logs = [self.training_log(folder.name) for folder in disk.matching(self.path / "geotoken", "*")]
        return [self.path / "align" / "metrics.jsonl", *(log for log in logs if log.exists())]

    def training_log(self, variant: str) -> epath.Path:
        """Returns the path of the training metrics of a variant's decoder."""
        return self.path / "geotoken" / variant / "metrics.jsonl"

    def metrics(self) -> dict[str, Any]:
        """Returns the contents of report/metrics.json."""
        return json.loads((self.path / "report" / "metrics.json").read_text())

    def copy_trained(self, folder: str, to: epath.Path) -> None:
        """Copies a folder of a trained model into an export, without the files in _NOT_EXPORTED.

        to: path of the copy. If it exists, it is replaced.
        """
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.path / folder, to, ignore=shutil.ignore_patterns(*_NOT_EXPORTED))


def _remove(path: Path) -> None:
    """Removes a folder, or a link to a folder of another work directory."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _variant_config(config: Config, folder: str) -> Config:
    """Returns the configuration, with a variant's changes applied if the folder belongs to the variant."""
    name = folder.partition("/")[2]
    return config.variant(name) if name in config.variants else config


def trained_selectors(options: PredictSettings) -> list[str]:
    """Returns the trained selectors in config.predict.selectors. Each has a folder of the same name."""
    return [name for name in TRAINED if name in options.selectors]
