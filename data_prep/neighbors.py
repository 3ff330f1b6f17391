"""The second part of the stage `index`: for every photo of every split, the rows of its nearest gallery photos."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from data_prep.gallery import GALLERY, open_table
from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

_BATCH = 8192


@dataclasses.dataclass(frozen=True)
class NeighborsSettings:
    """count: kept of each photo. exclude_author: of photos that are trained on, none may be by the photo's own author
    (an author's other photos of a place are far easier to find than a stranger's, and a new photo has none)."""

    count: int
    exclude_author: bool


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes neighbors/SPLIT.rows.npy [n, K] int32 and neighbors/SPLIT.scores.npy [n, K] float32, best first.

    A photo is never its own neighbor, nor a neighbor of its views, by id. Where fewer than K are left, rows are -1 and
    scores -inf.
    """
    path = epath.Path(path)
    options = settings.read(NeighborsSettings, config.index.neighbors, "index.neighbors")
    stage = workdir.begin(path, "neighbors", {"index": {"neighbors": options}}, ["gallery", "queries"])
    if stage.manifest:
        return stage.manifest
    from geotoken_jax.gallery import index  # and jax with it
    from geotoken_jax.gallery.neighbors import SameAuthor, SameId, find

    searcher = index.load(path / "gallery" / "index", config.index.search.threads)
    splits = workdir.read_manifest(path, "features").counts
    gallery = open_table(path, GALLERY)
    gallery_ids, gallery_authors = gallery.ids(), gallery.authors()
    with Progress("neighbors", sum(splits.values()), "photos") as progress:
        for split in splits:
            table = open_table(path, split)
            found = []
            for first in range(0, len(table), _BATCH):
                part = slice(first, first + _BATCH)
                rules: list[Any] = [SameId(table.ids(part), gallery_ids)]
                if options.exclude_author and split in (views.OF, views.SPLIT):
                    rules.append(SameAuthor(table.authors(part), gallery_authors))
                found.append(find(searcher, index_vectors(table.embeddings(part)), options.count, rules))
                progress.add(len(found[-1][0]))
            rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
            records.save_array(stage.path / f"{split}.rows.npy", rows)
            records.save_array(stage.path / f"{split}.scores.npy", scores)
    return stage.finish(splits)
