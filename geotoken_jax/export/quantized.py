"""Quantizes an export's gallery to int8 and measures the loss of accuracy.

Compared with a bfloat16 gallery, an int8 gallery takes half the bytes, and its index takes less than a third.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import bootstrap, settings
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import index, table
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.gallery.table import IndexVectors, Table
from geotoken_jax.geo import distance
from geotoken_jax.predict.prediction import coordinates
from geotoken_jax.progress import track
from geotoken_jax.workdir import Workdir


def quantize(workdir: Workdir, options: IndexSettings, folder: epath.Path) -> dict[str, Any]:
    """Converts the vectors of an export's gallery and its index to int8.

    The index is built again from the dequantized vectors, with the settings of the work directory's index. Indexes of
    channels are not changed; their type is config.channels.dtype.

    Returns a dict with "bytes", the size of the gallery, and "recall", the recall of its index. Each has two values:
    before and after.

    options: config.index.search. Only its keys that do not affect results, such as the number of threads, are used.
    """
    manifest = workdir.manifest("gallery")
    search = settings.restored(manifest.settings["index"]["search"], options, "index.search")
    before = _folder_size(folder / "gallery")
    table.quantize(folder / "gallery")
    shutil.rmtree(folder / "gallery" / "index")
    search = dataclasses.replace(search, reorder_dtype="int8")
    built = index.build(IndexVectors(Table(folder / "gallery")), search, folder / "gallery" / "index")
    recall = [manifest.facts["index"]["recall"], built.facts["recall"]]
    return {"bytes": [before, _folder_size(folder / "gallery")], "recall": recall}


def cost(config: Config, workdir: Workdir, variant: str, folder: epath.Path) -> dict[str, Any]:
    """Returns the accuracy with the bfloat16 gallery of the work directory, and its change with the int8 gallery.

    Both galleries are evaluated on one split: validation, or the first split by name if there is no validation.
    Neighbors come from the approximate index and no gallery photo is excluded, as in `GeoToken.predict`. Intervals are
    computed by the paired bootstrap over authors.

    config: configuration with the variant's changes applied. folder: folder of the export, with the int8 gallery.
    """
    counts, scoring = workdir.query_counts, config.evaluate
    split = "validation" if "validation" in counts else min(counts)
    queries = workdir.table(split)
    km = []
    for root, exported in ((workdir.path, None), (folder, folder)):
        answerer = workdir.answerer(config, variant, exported)
        searched = index.load(root / "gallery" / "index", config.index.search.threads)
        size = answerer.decoder.settings.batch_size
        rows = [slice(first, first + size) for first in range(0, len(queries), size)]
        kind = "int8" if exported else "bfloat16"
        predicted = [
            coordinates(answerer.from_vectors(searched, queries.embeddings(part), queries.captured(part)).predictions)
            for part in track(rows, f"predict with {kind}", len(rows), "batches")
        ]
        predicted, truth = np.concatenate(predicted), queries.coordinates()
        km.append(np.asarray(distance.EARTHS[scoring.earth](*predicted.T, *truth.T)))
    outcomes = np.stack([bootstrap.outcomes(one, scoring.strict) for one in km], axis=1)
    authors = bootstrap.clusters(*(column.astype(str).tolist() for column in (queries.authors(), queries.ids())))
    samples = bootstrap.resample(outcomes, authors, scoring.resamples, scoring.seed)
    bfloat16, int8 = outcomes.mean(axis=0)
    return {
        "split": split,
        "photos": len(queries),
        "bfloat16": bootstrap.estimates(bfloat16, samples[:, 0]),
        "difference": bootstrap.estimates(int8 - bfloat16, samples[:, 1] - samples[:, 0], p=True),
    }


def _folder_size(path: epath.Path) -> int:
    """Returns the total size of the files in a folder, in bytes."""
    return sum(p.stat().st_size for p in pathlib.Path(path).rglob("*") if p.is_file())
