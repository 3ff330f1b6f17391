"""Baselines on the features that GeoToken has: each writes predictions/NAME/SPLIT.jsonl in the form of `stage`.

What imports jax is imported once a baseline is known to have work to do, as in `stage`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import Table
from geotoken_jax.predict import stage
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

#: Name of the baseline that answers with the first neighbor.
TOP1 = "top1_neighbor"

#: A split -> each photo's answer; a photo without one is left out, and evaluation counts it as missing.
Answer = Callable[[str], Iterator[dict[str, Any]]]
#: Trains a task on the photos of two splits, training and validation, in a folder, as config.baselines.train says; the
#: library's one loop is of the rank of this module, so that only who is above both can bring them together.
Train = Callable[[Any, list[Any], epath.Path], None]


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


class Baseline(NamedTuple):
    """A way to answer.

    made_with: configuration -> what of it predictions depend on. inputs: folders they are made from. open:
    configuration, work directory, own folder and training -> the answers, and what else the manifest is to say.
    """

    made_with: Callable[[Any], dict[str, Any]]
    inputs: tuple[str, ...]
    open: Callable[[Any, epath.Path, epath.Path, Train | None], tuple[Answer, dict[str, Any]]]


def run(config: Any, path: epath.PathLike, name: str, train: Train | None = None) -> Manifest:
    """Makes predictions/NAME/SPLIT.jsonl for every split that has a table under queries/, but views.

    train: for a baseline that learns. Raises SettingsError if there is no baseline of that name.
    """
    if name not in BASELINES:
        raise settings.SettingsError(f"there is no baseline {name!r}: choose one of {', '.join(BASELINES)}")
    path, baseline = epath.Path(path), BASELINES[name]
    made = workdir.begin(path, f"predictions/{name}", baseline.made_with(config), baseline.inputs)
    if made.manifest:
        return made.manifest
    answer, facts = baseline.open(config, path, made.path, train)
    counts = stage.asked(path)
    with Progress(f"predict {name}", sum(counts.values()), "photos") as progress:
        for split, photos in counts.items():
            file = made.path / f"{split}.jsonl"
            if not file.exists():
                stage.write(file, answer(split))
            progress.add(photos)
    return made.finish(counts, **facts)


def _top1(config: Any, path: epath.Path, folder: epath.Path, train: Train | None) -> tuple[Answer, dict[str, Any]]:
    """Answers with the first neighbor's coordinates; all neighbors are candidates."""
    del folder, train
    gallery = Table(path / "gallery")

    def answer(split: str) -> Iterator[dict[str, Any]]:
        for photo, rows, _ in _near(path, split, config.model.neighbors):
            listed = stage.described(rows, gallery)
            places = [{name: n[name] for name in ("latitude", "longitude")} for n in listed]
            yield {"id": photo, **places[0], "candidates": places, "neighbors": listed}

    return answer, {}


def _knn(config: Any, path: epath.Path, folder: epath.Path, train: Train | None) -> tuple[Answer, dict[str, Any]]:
    """Answers with the neighbor around which the density of all is highest (Vo et al. 2017, section 3)."""
    del folder, train
    from geotoken_jax.predict.select import density

    options = settings.read(KnnSettings, config.baselines.knn, "baselines.knn")
    recorded = workdir.read_manifest(path, "neighbors").settings["index"]["neighbors"]["count"]
    if options.neighbors > recorded:
        raise settings.SettingsError(
            f"config.baselines.knn.neighbors = {options.neighbors} is more than the {recorded} on record: lower it, or "
            "set config.index.neighbors.count and index again in another --workdir"
        )
    gallery = Table(path / "gallery")

    def answer(split: str) -> Iterator[dict[str, Any]]:
        for photo, rows, scores in _near(path, split, options.neighbors):
            coordinates = gallery.coordinates(rows)
            found = density(coordinates, coordinates, scores, options.temperature, options.sigma_km)
            yield _line(photo, coordinates, np.log(found / found.sum()))

    return answer, {}


def _geoclip(config: Any, path: epath.Path, folder: epath.Path, train: Train | None) -> tuple[Answer, dict[str, Any]]:
    """Answers with the gallery's coordinates whose encoding is nearest to the photo's location vector.

    Our alignment in GeoCLIP's way (Vivanco Cepeda et al. 2023); the gallery's encoding is kept in encoded.npy.
    """
    del train
    import jax.numpy as jnp

    from geotoken_jax import checkpoint
    from geotoken_jax.align.heads import AlignSettings
    from geotoken_jax.align.task import AlignTask
    from geotoken_jax.predict import places

    options = settings.read(GeoClipSettings, config.baselines.geoclip, "baselines.geoclip")
    gallery = Table(path / "gallery")
    task = AlignTask(settings.read(AlignSettings, config.align.model, "align.model"), gallery.width)
    aligned = checkpoint.read_module(path / "align" / "parameters.safetensors", task.init)
    coordinates = gallery.coordinates()
    file = folder / "encoded.npy"
    if not file.exists():
        blocks = places.encoder(aligned.location, lambda model, block: model(block))(coordinates)
        places.save(file, blocks, len(gallery), gallery.width)
    encoded = places.open(file)
    scale = float(jnp.exp(aligned.location_scale[...]))

    def answer(split: str) -> Iterator[dict[str, Any]]:
        own = Table(path / "queries" / split)
        location = np.asarray(own.embeddings()[:, 1], np.float32)  # of length 1, as tables hold them
        rows, log_p = places.rank(encoded, scale * location, min(options.candidates, len(gallery)))
        for photo, near, probability in zip(own.ids(), rows, log_p, strict=True):
            yield _line(photo.decode(), coordinates[near], probability)

    return answer, {}


def _classifier(
    config: Any, path: epath.Path, folder: epath.Path, train: Train | None
) -> tuple[Answer, dict[str, Any]]:
    """Answers with the mean place of the gallery's photos in the most probable cell (Weyand et al. 2016, PlaNet)."""
    assert train, "the classifier learns"
    from geotoken_jax import checkpoint
    from geotoken_jax.data.join import Together
    from geotoken_jax.predict import classifier

    options = settings.read(classifier.ClassifierSettings, config.baselines.classifier, "baselines.classifier")
    gallery = Table(path / "gallery")
    cells = classifier.partition(gallery.tokens(), options.max_photos, options.min_photos)
    if not len(cells):
        raise settings.SettingsError(
            f"config.baselines.classifier.min_photos = {options.min_photos} is more than any cell of this gallery "
            "holds: lower it"
        )
    task = classifier.ClassifierTask(options, gallery.width, len(cells))
    trained_on = [gallery]
    if views.SPLIT in workdir.read_manifest(path, "queries").counts:
        trained_on.append(Table(path / "queries" / views.SPLIT))
    parts: list[Any] = [classifier.Photos(table, cells) for table in trained_on]
    train(
        task,
        [Together(parts), classifier.Photos(Table(path / "queries" / "validation"), cells)],
        folder / "training",
    )
    model = checkpoint.read_module(folder / "training" / "parameters.safetensors", task.init)
    held = cells.of(gallery.tokens())
    centers = classifier.centers(gallery.coordinates(), held, len(cells))

    def answer(split: str) -> Iterator[dict[str, Any]]:
        own = Table(path / "queries" / split)
        found, log_p = classifier.rank(model, own, min(options.candidates, len(cells)))
        for photo, best, probability in zip(own.ids(), found, log_p, strict=True):
            yield _line(photo.decode(), centers[best], probability)

    return answer, {"dropped": {"in a cell of fewer than min_photos": int((held < 0).sum())}, "cells": len(cells)}


def _near(path: epath.Path, split: str, k: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields id, gallery rows and scores of each photo that has a neighbor, of at most k, the best first."""
    rows, scores = (
        records.open_array(path / "neighbors" / f"{split}.{name}.npy")[:, :k] for name in ("rows", "scores")
    )
    for photo, row, score in zip(Table(path / "queries" / split).ids(), rows, scores, strict=True):
        if row[0] >= 0:
            yield photo.decode(), row[row >= 0], score[row >= 0]


def _line(photo: str, coordinates: Float[np.ndarray, "K 2"], log_probability: Float[np.ndarray, "K"]) -> dict[str, Any]:
    """Returns an answer as JSON has it: the most probable place, and all of them as candidates, best first."""
    listed = [
        {
            "latitude": round(float(coordinates[k, 0]), 7),
            "longitude": round(float(coordinates[k, 1]), 7),
            "log_probability": round(float(log_probability[k]), 5),
        }
        for k in np.argsort(-log_probability, kind="stable")
    ]
    return {"id": photo, "latitude": listed[0]["latitude"], "longitude": listed[0]["longitude"], "candidates": listed}


def _sections(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda config: {"baselines": {name: settings.outcome(config.baselines[name]) for name in names}}


BASELINES: Mapping[str, Baseline] = {
    TOP1: Baseline(lambda config: {"neighbors": config.model.neighbors}, ("neighbors",), _top1),
    "knn": Baseline(_sections("knn"), ("neighbors",), _knn),
    "geoclip": Baseline(_sections("geoclip"), ("align", "gallery", "queries"), _geoclip),
    "classifier": Baseline(_sections("classifier", "train"), ("gallery", "queries"), _classifier),
}
