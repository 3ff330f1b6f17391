"""Baselines on the features that GeoToken has: each writes predictions/NAME/SPLIT.jsonl in the form of `predict`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import checkpoint
from geotoken_jax.artifacts import TOP1, VALIDATION, Workdir
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Concatenation
from geotoken_jax.gallery import encodings
from geotoken_jax.geo.distance import pairwise_km
from geotoken_jax.predict import classifier
from geotoken_jax.predict.prediction import Candidate, Neighbor, Prediction, neighbors
from geotoken_jax.predict.select import density
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import training
from geotoken_jax.stages.predict import write
from geotoken_jax.workdir import Manifest

#: A split -> ids and answers; a photo without an answer is left out, and evaluation counts it as missing.
Answer = Callable[[str], Iterator[tuple[bytes, Prediction]]]


class Baseline(NamedTuple):
    """A way to answer.

    keys: dotted places of what predictions depend on. inputs: folders they are made from. open: configuration, work
    directory and own folder -> the answers, and what else the manifest is to say.
    """

    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    open: Callable[[Config, Workdir, epath.Path], tuple[Answer, dict[str, Any]]]


def run(config: Config, workdir: Workdir, name: str) -> list[Manifest]:
    """Makes predictions/NAME/SPLIT.jsonl for every split that has a table under queries/, but views.

    Raises SettingsError if there is no baseline of that name.
    """
    if name not in BASELINES:
        raise SettingsError(f"there is no baseline {name!r}: choose one of {', '.join(BASELINES)}")
    baseline = BASELINES[name]
    stage = workdir.begin(config, f"predictions/{name}", baseline.keys, baseline.inputs)
    if stage.manifest:
        return [stage.manifest]
    answer, facts = baseline.open(config, workdir, stage.path)
    counts = workdir.query_counts
    with Progress(f"predict {name}", sum(counts.values()), "photos") as progress:
        for split, photos in counts.items():
            file = workdir.answers(name, split)
            if not file.exists():
                write(file, answer(split))
            progress.add(photos)
    return [stage.finish(counts, **facts)]


def _top1(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Answers with the first neighbor's coordinates; all neighbors are candidates."""
    del folder

    gallery = workdir.gallery

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        for photo, rows, scores in _near(workdir, split, config.model.neighbors):
            (near,) = neighbors(gallery, rows[None], scores[None])
            yield photo, _prediction([Candidate(one.latitude, one.longitude) for one in near], near)

    return answer, {}


def _knn(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Answers with the neighbor around which the density of all is highest (Vo et al. 2017, section 3)."""
    del folder
    options = config.baselines.knn
    recorded = workdir.manifest("neighbors").settings["index"]["neighbors"]["count"]
    if options.neighbors > recorded:
        raise SettingsError(
            f"config.baselines.knn.neighbors = {options.neighbors} is more than the {recorded} on record: lower it, or "
            "set config.index.neighbors.count and index again in another --workdir"
        )
    gallery = workdir.gallery

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        for photo, rows, scores in _near(workdir, split, options.neighbors):
            coordinates = gallery.coordinates(rows)
            found = density(pairwise_km(coordinates, coordinates), scores, options.temperature, options.sigma_km)
            yield photo, _ranked(coordinates, np.log(found / found.sum()))

    return answer, {}


def _geoclip(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Answers with the gallery's coordinates whose encoding is nearest to the photo's location vector.

    Our alignment in GeoCLIP's way (Vivanco Cepeda et al. 2023); the gallery's encoding is kept in encoded.npy.
    """
    options, gallery = config.baselines.geoclip, workdir.gallery
    aligned = workdir.aligned(config.align.model)
    coordinates = gallery.coordinates()
    file = folder / "encoded.npy"
    if not file.exists():
        blocks = encodings.encoder(aligned.location, lambda model, block: model(block))(coordinates)
        encodings.save(file, blocks, len(gallery), gallery.width)
    encoded = encodings.open(file)
    scale = float(jnp.exp(aligned.location_scale[...]))

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        own = workdir.table(split)
        location = np.asarray(own.embeddings()[:, 1], np.float32)  # of length 1, as tables hold them
        rows, log_p = encodings.rank(encoded, scale * location, min(options.candidates, len(gallery)))
        for photo, near, probability in zip(own.ids(), rows, log_p, strict=True):
            yield photo, _ranked(coordinates[near], probability)

    return answer, {}


def _classifier(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Answers with the mean place of the gallery's photos in the most probable cell (Weyand et al. 2016, PlaNet)."""
    options, gallery = config.baselines.classifier, workdir.gallery
    cells = classifier.partition(gallery.tokens(), options.max_photos, options.min_photos)
    if not len(cells):
        raise SettingsError(
            f"config.baselines.classifier.min_photos = {options.min_photos} is more than any cell of this gallery "
            "holds: lower it"
        )
    task = classifier.ClassifierTask(options, gallery.width, len(cells))
    names = [split for split in (views.OF, views.SPLIT) if split in (views.OF, *workdir.manifest("queries").counts)]
    train, validation = (
        [classifier.Photos(workdir.table(split), cells) for split in splits] for splits in (names, [VALIDATION])
    )
    splits, where = [Concatenation(train), *validation], folder / "training"  # pyright: ignore[reportArgumentType]
    training.fit(task, config, "baselines.train", splits, where, "train classifier")
    model = checkpoint.read_module(where / "parameters.safetensors", task.init)
    held = cells.of(gallery.tokens())
    centers = classifier.centers(gallery.coordinates(), held, len(cells))

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        own = workdir.table(split)
        found, log_p = classifier.rank(model, own, min(options.candidates, len(cells)))
        for photo, best, probability in zip(own.ids(), found, log_p, strict=True):
            yield photo, _ranked(centers[best], probability)

    return answer, {"dropped": {"in a cell of fewer than min_photos": int((held < 0).sum())}, "cells": len(cells)}


def _near(workdir: Workdir, split: str, k: int) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """Yields id, gallery rows and scores of each photo that has a neighbor, of at most k, the best first."""
    for photo, row, score in zip(workdir.table(split).ids(), *workdir.neighbors(split, k), strict=True):
        if row[0] >= 0:
            yield photo, row[row >= 0], score[row >= 0]


def _ranked(coordinates: Float[np.ndarray, "K 2"], log_probability: Float[np.ndarray, "K"]) -> Prediction:
    """Returns the answer at the most probable place, with all of them as candidates."""
    order = np.argsort(-log_probability, kind="stable")
    return _prediction([Candidate.of(coordinates[k], float(log_probability[k])) for k in order])


def _prediction(candidates: Sequence[Candidate], near: tuple[Neighbor, ...] = ()) -> Prediction:
    """Returns the answer at the first candidate, which says nothing of its radii."""
    best = candidates[0]
    return Prediction(best.latitude, best.longitude, math.nan, math.nan, {}, tuple(candidates), (), near)


BASELINES: Mapping[str, Baseline] = {
    TOP1: Baseline(("model.neighbors",), ("neighbors",), _top1),
    "knn": Baseline(("baselines.knn",), ("neighbors",), _knn),
    "geoclip": Baseline(("baselines.geoclip",), ("align", "gallery", "queries"), _geoclip),
    "classifier": Baseline(("baselines.classifier", "baselines.train"), ("gallery", "queries"), _classifier),
}
