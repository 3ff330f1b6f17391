"""Baselines on the features of GeoToken. Each writes predictions/NAME/SPLIT.jsonl, as `geotoken predict` does."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import checkpoint
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Concatenation
from geotoken_jax.gallery import encodings
from geotoken_jax.geo.distance import pairwise_km
from geotoken_jax.manifests import Manifest
from geotoken_jax.predict import classifier
from geotoken_jax.predict.prediction import Candidate, Neighbor, Prediction, neighbors
from geotoken_jax.predict.select import density
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import training
from geotoken_jax.stages.predict import write
from geotoken_jax.workdir import TOP1, VALIDATION, Workdir

#: Function of a split's name that yields photo ids and predictions. It leaves out photos without a prediction, which
#: evaluation counts as missing.
Answer = Callable[[str], Iterator[tuple[bytes, Prediction]]]


class Baseline(NamedTuple):
    """One baseline: its settings, its inputs and the function that prepares it.

    keys: dotted configuration keys that the predictions depend on. inputs: folders that the baseline reads. open:
    function of the configuration, the work directory and the output folder; returns the function that predicts a split,
    and additional facts for the manifest.
    """

    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    open: Callable[[Config, Workdir, epath.Path], tuple[Answer, dict[str, Any]]]


def run(config: Config, workdir: Workdir, name: str) -> list[Manifest]:
    """Writes predictions/NAME/SPLIT.jsonl for every split with a table in queries/, except augmented views.

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
            file = workdir.predictions_file(name, split)
            if not file.exists():
                write(file, answer(split))
            progress.add(photos)
    return [stage.finish(counts, **facts)]


def run_excluded(config: Config, workdir: Workdir, name: str) -> list[Manifest]:
    """Predicts the benchmarks again with the neighbors in exclusion/.

    Writes excluded/NAME/BENCHMARK-RULES.jsonl for every benchmark and set of rules in exclusion/. Returns an empty list
    if exclusion/ is missing, or if the baseline reads no neighbors.
    """
    baseline, counts = BASELINES[name], workdir.counts_under_rules
    if not counts or "neighbors" not in baseline.inputs:
        return []
    stage = workdir.begin(config, f"excluded/{name}", baseline.keys, ["exclusion", f"predictions/{name}"])
    if stage.manifest:
        return [stage.manifest]
    answer, _ = baseline.open(config, workdir, stage.path)
    for split in counts:
        write(workdir.predictions_file(name, split), answer(split))
    return [stage.finish(counts)]


def _top1(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Returns a function that predicts the photos of a split, and an empty dict: the manifest gets no facts.

    The prediction is the place of the best neighbor. All neighbors are candidates.
    """
    del folder

    gallery = workdir.gallery

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        for photo, rows, scores in _neighbor_rows(workdir, split, config.model.neighbors):
            (nearest,) = neighbors(gallery, rows[None], scores[None])
            yield photo, _prediction([Candidate(n.latitude, n.longitude) for n in nearest], nearest)

    return answer, {}


def _knn(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Returns a function that predicts the photos of a split, and an empty dict: the manifest gets no facts.

    The prediction is the neighbor at whose place the density of all neighbors is highest (Vo et al. 2017, section 3).

    Raises SettingsError if neighbors/ has too few neighbors per photo.
    """
    del folder
    options = config.baselines.knn
    recorded = workdir.manifest("neighbors").settings["index"]["neighbors"]["count"]
    if options.neighbors > recorded:
        raise SettingsError(
            f"config.baselines.knn.neighbors is {options.neighbors}, but {workdir.path / 'neighbors'} has {recorded} "
            f"per photo: set it to at most {recorded}, or set config.index.neighbors.count to at least "
            f"{options.neighbors} and run `geotoken index` in another --workdir"
        )
    gallery = workdir.gallery

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        for photo, rows, scores in _neighbor_rows(workdir, split, options.neighbors):
            coordinates = gallery.coordinates(rows)
            densities = density(pairwise_km(coordinates, coordinates), scores, options.temperature, options.sigma_km)
            yield photo, _ranked(coordinates, np.log(densities / densities.sum()))

    return answer, {}


def _geoclip(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Returns a function that predicts the photos of a split, and an empty dict: the manifest gets no facts.

    The prediction is the coordinates of a gallery photo: those whose encoding is most similar to the photo's location
    vector. This is GeoCLIP's method (Vivanco Cepeda et al. 2023) with GeoToken's alignment model. The encoded
    coordinates are stored in encoded.npy.
    """
    options, gallery = config.baselines.geoclip, workdir.gallery
    aligned = workdir.align_model(config.align.model)
    coordinates = gallery.coordinates()
    file = folder / "encoded.npy"
    if not file.exists():
        blocks = encodings.encoder(aligned.location, lambda model, block: model(block))(coordinates)
        encodings.save(file, blocks, len(gallery), gallery.width)
    encoded = encodings.open_encodings(file)
    scale = float(jnp.exp(aligned.location_scale[...]))

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        queries = workdir.table(split)
        location = np.asarray(queries.embeddings()[:, 1], np.float32)  # tables store unit vectors
        rows, log_p = encodings.rank(encoded, scale * location, min(options.candidates, len(gallery)))
        for photo, best, log_probability in zip(queries.ids(), rows, log_p, strict=True):
            yield photo, _ranked(coordinates[best], log_probability)

    return answer, {}


def _classifier(config: Config, workdir: Workdir, folder: epath.Path) -> tuple[Answer, dict[str, Any]]:
    """Trains a classifier of cells. Returns a function that predicts the photos of a split, and facts for the manifest.

    The prediction is the mean position of the gallery photos in the most probable cell (PlaNet, Weyand et al. 2016).
    The facts are the number of cells, and the number of gallery photos in none of them.
    """
    options, gallery = config.baselines.classifier, workdir.gallery
    cells = classifier.partition(gallery.tokens(), options.max_photos, options.min_photos)
    if not len(cells):
        raise SettingsError(
            f"config.baselines.classifier.min_photos is {options.min_photos}, and no cell of this gallery has that "
            "many photos: set it to a smaller number"
        )
    task = classifier.ClassifierTask(options, gallery.width, len(cells))
    names = [
        split
        for split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT)
        if split in (views.SOURCE_SPLIT, *workdir.manifest("queries").counts)
    ]
    train, validation = (
        [classifier.Photos(workdir.table(split), cells) for split in splits] for splits in (names, [VALIDATION])
    )
    splits, trained = [Concatenation(train), *validation], folder / "training"  # pyright: ignore[reportArgumentType]
    training.fit(task, config, "baselines.train", splits, trained, "train classifier")
    model = checkpoint.read_module(trained / "parameters.safetensors", task.init)
    cell = cells.of(gallery.tokens())
    centers = classifier.centers(gallery.coordinates(), cell, len(cells))

    def answer(split: str) -> Iterator[tuple[bytes, Prediction]]:
        queries = workdir.table(split)
        ranked, log_p = classifier.rank(model, queries, min(options.candidates, len(cells)))
        for photo, best, log_probability in zip(queries.ids(), ranked, log_p, strict=True):
            yield photo, _ranked(centers[best], log_probability)

    return answer, {"dropped": {"in a cell of fewer than min_photos": int((cell < 0).sum())}, "cells": len(cells)}


def _neighbor_rows(workdir: Workdir, split: str, k: int) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """Yields the id of each photo, and the gallery rows and scores of its k best neighbors, best first.

    Photos without neighbors are skipped. A photo may have fewer than k neighbors.
    """
    for photo, row, score in zip(workdir.table(split).ids(), *workdir.neighbors(split, k), strict=True):
        if row[0] >= 0:
            yield photo, row[row >= 0], score[row >= 0]


def _ranked(coordinates: Float[np.ndarray, "K 2"], log_probability: Float[np.ndarray, "K"]) -> Prediction:
    """Returns the prediction at the most probable coordinates, with all coordinates as candidates."""
    order = np.argsort(-log_probability, kind="stable")
    return _prediction([Candidate.of(coordinates[k], float(log_probability[k])) for k in order])


def _prediction(candidates: Sequence[Candidate], nearest: tuple[Neighbor, ...] = ()) -> Prediction:
    """Returns the prediction at the first candidate. Its radii are NaN: baselines do not estimate their error."""
    best = candidates[0]
    return Prediction(best.latitude, best.longitude, math.nan, math.nan, {}, tuple(candidates), (), nearest)


BASELINES: Mapping[str, Baseline] = {
    TOP1: Baseline(("model.neighbors",), ("neighbors",), _top1),
    "knn": Baseline(("baselines.knn",), ("neighbors",), _knn),
    "geoclip": Baseline(("baselines.geoclip",), ("align", "gallery", "queries"), _geoclip),
    "classifier": Baseline(("baselines.classifier", "baselines.train"), ("gallery", "queries"), _classifier),
}
