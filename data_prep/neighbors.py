"""Second step of the stage `index`: the nearest gallery photos of every photo in every split."""

import numpy as np

from geotoken_jax import records
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.gallery.exclude import exclusions
from geotoken_jax.gallery.neighbors import search_neighbors
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.manifests import Manifest
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Workdir

_BATCH = 8192


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes neighbors/SPLIT.rows.npy [n, K] int32 and neighbors/SPLIT.scores.npy [n, K] float32, best first.

    K is config.index.neighbors.count. Excludes gallery photos with the photo's own id, which for a view is the id of
    the original, and those that the rules in config.index.neighbors exclude. If fewer than K neighbors are left, the
    other rows are -1 and their scores -inf; the manifest's `fewer` has the number of such photos per split.
    """
    options = config.index.neighbors
    stage = workdir.begin(config, "neighbors", ["index.neighbors"], ["gallery", "queries"])
    if stage.manifest:
        return [stage.manifest]
    searcher, gallery = workdir.index(config.index.search.threads), workdir.gallery
    splits = workdir.manifest("features").counts
    gallery_columns = {name: getattr(gallery, name)() for name in ("ids", "authors", "coordinates")}
    fewer = {}
    with Progress("neighbors", sum(splits.values()), "photos") as progress:
        for split in splits:
            table = workdir.table(split)
            rows_file, scores_file = (workdir.neighbors_file(split, name) for name in ("rows", "scores"))
            exclude = (
                options.exclude if split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT) else options.exclude_in_evaluation
            )
            if not (rows_file.exists() and scores_file.exists()):
                results = []
                for first in range(0, len(table), _BATCH):
                    part = slice(first, first + _BATCH)
                    vectors = index_vectors(table.embeddings(part))
                    excluded = exclusions(
                        exclude, table, part, gallery_columns, lambda rows: gallery.embeddings(rows)[:, 0]
                    )
                    results.append(search_neighbors(searcher, vectors, options.count, excluded))
                    progress.add(len(vectors))
                rows, scores = (np.concatenate(parts) for parts in zip(*results, strict=True))
                records.save_array(rows_file, rows)
                records.save_array(scores_file, scores)
            else:
                progress.add(len(table))
            fewer[split] = int((records.open_array(rows_file)[:, -1] < 0).sum())
    return [stage.finish(splits, fewer=fewer)]
