"""The gallery in int8: half the bytes, less than a third in its index, and what answers lose by it."""

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import bootstrap, settings
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import encodings, index, table
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.gallery.table import IndexVectors, Table
from geotoken_jax.geo import distance
from geotoken_jax.predict.prediction import coordinates
from geotoken_jax.progress import track

#: What else holds vectors of the gallery's photos, among what was learned.
_LEARNED = ("verifier/keys.npy", "verifier/views.npy")


def quantize(workdir: Workdir, asked: IndexSettings, folder: epath.Path) -> dict[str, Any]:
    """Makes int8 of the vectors in an export's folder: the gallery's, its index's, and what was learned of its photos.

    The index is built again, of the vectors as they are restored, with the settings that the
    gallery's was built with. Returns the bytes of them all before and after, and the index's recall before and after.
    """
    parts = [folder / "gallery", *(folder / name for name in _LEARNED if (folder / name).exists())]
    made_with = workdir.manifest("gallery")
    search = settings.restored(made_with.settings["index"]["search"], asked, "index.search")
    before = sum(map(_bytes, parts))
    table.quantize(folder / "gallery")
    shutil.rmtree(folder / "gallery" / "index")
    search = dataclasses.replace(search, reorder_dtype="int8")
    built = index.build(IndexVectors(Table(folder / "gallery")), search, folder / "gallery" / "index")
    for part in parts[1:]:
        encodings.quantize(part)
    recall = [made_with.facts["index"]["recall"], built.facts["recall"]]
    return {"bytes": [before, sum(map(_bytes, parts))], "recall": recall}


def cost(config: Config, workdir: Workdir, variant: str, folder: epath.Path) -> dict[str, Any]:
    """Returns the accuracy of an export's int8 gallery less that of the work directory's, on one split.

    Both answer for the same photos, of validation where there are any, as `GeoToken` does: by their index, and no
    photo of the gallery is left out. config: with the variant's changes made. The intervals are those of the paired
    bootstrap over authors.
    """
    counts, scoring = workdir.query_counts, config.evaluate
    split = "validation" if "validation" in counts else min(counts)
    own = workdir.table(split)
    km = []
    for root, exported in ((workdir.path, None), (folder, folder)):
        answerer = workdir.answerer(config, variant, exported)
        searched = index.load(root / "gallery" / "index", config.index.search.threads)
        size = answerer.decoder.settings.batch_size
        rows = [slice(first, first + size) for first in range(0, len(own), size)]
        kind = "int8" if exported else "bfloat16"
        found = [
            coordinates(answerer.of_vectors(searched, own.embeddings(part), own.captured(part))[0])
            for part in track(rows, f"answers by {kind}", len(rows), "batches")
        ]
        placed, truth = np.concatenate(found), own.coordinates()
        km.append(np.asarray(distance.EARTHS[scoring.earth](*placed.T, *truth.T)))
    outcomes = np.stack([bootstrap.outcomes(one, scoring.strict) for one in km], axis=1)
    authors = bootstrap.clusters(*(column.astype(str).tolist() for column in (own.authors(), own.ids())))
    samples = bootstrap.resample(outcomes, authors, scoring.resamples, scoring.seed)
    whole, less = outcomes.mean(axis=0)
    return {
        "split": split,
        "photos": len(own),
        "bfloat16": bootstrap.estimates(whole, samples[:, 0]),
        "difference": bootstrap.estimates(less - whole, samples[:, 1] - samples[:, 0], p=True),
    }


def _bytes(path: epath.Path) -> int:
    """Returns the bytes of a file with its scales, or of a folder."""
    if path.is_file():
        return sum(p.stat().st_size for p in pathlib.Path(path).parent.glob(f"{path.stem}.*"))
    return sum(p.stat().st_size for p in pathlib.Path(path).rglob("*") if p.is_file())
