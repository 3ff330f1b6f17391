"""The second part of the stage `index`: for every photo of every split, the rows of its nearest gallery photos."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from data_prep.gallery import GALLERY, open_table
from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

_BATCH = 8192


@dataclasses.dataclass(frozen=True)
class ExcludeSettings:
    """Gallery photos that are no neighbors of a photo, beside itself.

    author: those of its author. cosine_above: those whose image embedding has a higher cosine with its own (near
    duplicates); 1 for none. within_km: those taken nearer to it; 0 for none.
    """

    author: bool
    cosine_above: float
    within_km: float

    def __post_init__(self):
        if not -1 <= self.cosine_above <= 1:
            raise ValueError(
                f"config.index.neighbors: cosine_above is {self.cosine_above}: it must be in [-1, 1], and 1 for none"
            )
        if not self.within_km >= 0:
            raise ValueError(f"config.index.neighbors: within_km is {self.within_km}: it must be 0 (for none) or more")


@dataclasses.dataclass(frozen=True)
class NeighborsSettings:
    """count: kept of each photo. exclude: of photos that are trained on (an author's other photos of a place are far
    easier to find than a stranger's, and a new photo has none). exclude_in_evaluation: of all others."""

    count: int
    exclude: ExcludeSettings
    exclude_in_evaluation: ExcludeSettings


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes neighbors/SPLIT.rows.npy [n, K] int32 and neighbors/SPLIT.scores.npy [n, K] float32, best first.

    A photo is never its own neighbor, nor a neighbor of its views, by id. Where fewer than K are left, rows are -1 and
    scores -inf; the manifest's `fewer` counts these photos.
    """
    path = epath.Path(path)
    options = settings.read(NeighborsSettings, config.index.neighbors, "index.neighbors")
    stage = workdir.begin(path, "neighbors", {"index": {"neighbors": options}}, ["gallery", "queries"])
    if stage.manifest:
        return stage.manifest
    from geotoken_jax.gallery import index  # and jax with it
    from geotoken_jax.gallery.neighbors import find

    searcher = index.load(path / "gallery" / "index", config.index.search.threads)
    splits = workdir.read_manifest(path, "features").counts
    gallery = open_table(path, GALLERY)
    of_gallery = {name: getattr(gallery, name)() for name in ("ids", "authors", "coordinates")}
    fewer = {}
    with Progress("neighbors", sum(splits.values()), "photos") as progress:
        for split in splits:
            table = open_table(path, split)
            rows_file, scores_file = (stage.path / f"{split}.{name}.npy" for name in ("rows", "scores"))
            exclude = options.exclude if split in (views.OF, views.SPLIT) else options.exclude_in_evaluation
            if not scores_file.exists():
                found = []
                for first in range(0, len(table), _BATCH):
                    part = slice(first, first + _BATCH)
                    vectors = index_vectors(table.embeddings(part))
                    rules = _rules(exclude, table, part, gallery, of_gallery)
                    found.append(find(searcher, vectors, options.count, rules))
                    progress.add(len(vectors))
                rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
                records.save_array(rows_file, rows)
                records.save_array(scores_file, scores)
            else:
                progress.add(len(table))
            fewer[split] = int((records.open_array(rows_file)[:, -1] < 0).sum())
    return stage.finish(splits, fewer=fewer)


def _rules(
    exclude: ExcludeSettings, table: Table, part: slice, gallery: Table, of_gallery: dict[str, np.ndarray]
) -> list[Any]:
    """Returns the rules for one part of a split's photos. of_gallery: ids, authors and coordinates of all its rows."""
    from geotoken_jax.gallery.neighbors import NearDuplicate, SameAuthor, SameId, Within

    rules: list[Any] = [SameId(table.ids(part), of_gallery["ids"])]
    if exclude.author:
        rules.append(SameAuthor(table.authors(part), of_gallery["authors"]))
    if exclude.within_km > 0:
        rules.append(Within(table.coordinates(part), of_gallery["coordinates"], exclude.within_km))
    if exclude.cosine_above < 1:
        images = table.embeddings(part)[:, 0]
        rules.append(NearDuplicate(images, lambda rows: gallery.embeddings(rows)[:, 0], exclude.cosine_above))
    return rules
