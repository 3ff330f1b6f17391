"""Second step of the stage `index`: finds the nearest gallery photos of every photo in every split.

One or more processes divide the photos among themselves (data_prep/sharded.py). A process opens the shards of the
search index one after another. It searches each of them for neighbors of all its photos, and merges the result with
the neighbors from the shards before. For any number of photos, its memory holds one shard of the index
(config.index.search.shard_rows) and 0.2 GB more. An index of kind `device` is opened as a whole, because its vectors
are in the memory of the devices.
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float32, Int32

from data_prep import sharded
from data_prep.sharded import Shard
from geotoken_jax import records
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.gallery.exclude import ExcludeSettings, check_source, exclusions, gallery_columns, have_source
from geotoken_jax.gallery.neighbors import merge_neighbors, search_neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.manifests import Manifest, read_ledger, write_json
from geotoken_jax.preparation import NeighborsSettings
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import NEIGHBOR_FILES, Workdir

#: Number of photos per shard, and number of photos per search.
_SHARD, _BATCH = 1 << 16, 8192
#: Subfolder of neighbors/ for shards whose photos were not yet compared with the whole index.
_UNFINISHED = "unfinished"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes neighbors/: for each split the neighbors' gallery rows [n, K] int32 and scores [n, K] float32, best first.

    K is config.index.neighbors.count. A photo is no neighbor of itself: gallery photos with its id are excluded, and a
    view has the id of its original. The rules in config.index.neighbors exclude further gallery photos. If fewer than K
    neighbors are left, the remaining rows are -1 and their scores -inf. The manifest's `fewer` is the number of such
    photos per split.

    Returns an empty list if shards of other processes are missing.
    """
    options = config.index.neighbors
    stage = workdir.begin(config, "neighbors", ["index.neighbors"], ["gallery", "queries"])
    if stage.manifest:
        return [stage.manifest]
    for key in ("exclude", "exclude_in_evaluation"):
        check_source(getattr(options, key), f"index.neighbors.{key}", workdir.gallery)
    counts = workdir.counts("features")
    shards = sharded.divide(stage, counts, _SHARD)
    _search_all(
        [shard for shard in sharded.own(shards) if not shard.ledger], workdir, options, config.index.search.threads
    )
    if not sharded.wait(stage, shards):
        return []

    def finish() -> Manifest:
        shutil.rmtree(stage.path / _UNFINISHED, ignore_errors=True)
        fewer = dict.fromkeys(counts, 0)
        for shard in shards:
            fewer[shard.split] += (shard.ledger or {})["fewer"]
        schema = records.schema(records.neighbor_layout(options.count), NEIGHBOR_FILES)
        write_json(stage.path / "schema.json", schema)
        return stage.finish({split: numbers[-1] for split, numbers in counts.items()}, fewer=fewer)

    return [sharded.complete(workdir, stage, finish)]


@dataclasses.dataclass
class _Neighbors:
    """The best neighbors of a shard's photos in those shards of the index that were searched.

    rows, scores: gallery rows and scores of the neighbors, [n, K]. searched: start and stop of the gallery rows of each
    searched shard of the index, [m, 2].
    """

    rows: Int32[np.ndarray, "n K"]
    scores: Float32[np.ndarray, "n K"]
    searched: np.ndarray

    @classmethod
    def load(cls, shard: Shard, count: int) -> "_Neighbors":
        """Returns the neighbors that were found earlier, to continue from them.

        They are from before an interruption, or from before photos were added. If there are none, all rows are -1.
        count: number K of neighbors per photo.
        """
        file = _unfinished(shard)
        if file.exists():
            with np.load(file, allow_pickle=False) as stored:
                return cls(**stored)
        for path in shard.earlier():
            if ledger := read_ledger(path):
                names = sorted(ledger["files"])  # rows, scores
                rows, scores = (np.array(records.open_array(path.parent.parent / name)) for name in names)
                return cls(rows, scores, np.array(ledger["searched"]))
        shape = len(shard.rows), count
        return cls(np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32), np.zeros((0, 2), np.int64))

    def save(self, shard: Shard, workdir: Workdir, indexed: Sequence[range]) -> None:
        """Writes the neighbors into the shard's final files if the whole index was searched, else into _UNFINISHED.

        indexed: gallery rows of each shard of the index.
        """
        if self.missing(indexed):
            records.save_arrays(_unfinished(shard), **vars(self))
            return
        files = [workdir.neighbors_file(shard.split, name, shard.number, shard.count) for name in ("rows", "scores")]
        for file, values in zip(files, (self.rows, self.scores), strict=True):
            records.save_array(file, values)
        fewer = int((self.rows[:, -1:] < 0).sum())
        shard.finish(files, fewer=fewer, searched=[[rows.start, rows.stop] for rows in indexed])
        _unfinished(shard).unlink(missing_ok=True)

    def missing(self, indexed: Sequence[range]) -> list[int]:
        """Returns the numbers of the index's shards that were not searched. indexed: gallery rows of each shard."""
        searched = {range(*ends) for ends in self.searched.tolist()}
        return [number for number, rows in enumerate(indexed) if rows not in searched]


def _unfinished(shard: Shard) -> epath.Path:
    return shard.stage / _UNFINISHED / f"{shard.split}-{shard.number:05d}-of-{shard.count:05d}.npz"


class _OpenedIndex:
    """Consecutive shards of the index, opened, with the columns of the gallery's table that exclusion rules need.

    threads: number of threads per search. numbers: numbers of the shards. indexed: gallery rows of each shard of the
    whole index.
    """

    def __init__(self, workdir: Workdir, threads: int, numbers: Sequence[int], indexed: Sequence[range]):
        self._first, end = indexed[numbers[0]].start, indexed[numbers[-1]].stop
        self._index, self._gallery = workdir.index(threads, numbers), workdir.gallery
        self._columns = functools.cache(
            lambda sourced: gallery_columns(self._gallery, sourced, slice(self._first, end))
        )

    def search(self, queries: Table, rows: range, exclude: ExcludeSettings, found: _Neighbors) -> None:
        """Searches these shards, and merges the neighbors into `found`.

        queries: table of the photos' split. rows: rows of the photos in this table. exclude: rules that exclude gallery
        photos. found: neighbors from other shards of the index.
        """
        columns = self._columns(have_source(queries))
        for first in range(0, len(rows), _BATCH):
            here = slice(first, min(first + _BATCH, len(rows)))
            at = slice(rows.start + here.start, rows.start + here.stop)
            excluded = exclusions(exclude, queries, at, columns, self._images)
            before = found.rows[here], found.scores[here]
            vectors = index_vectors(queries.embeddings(at))
            count = found.rows.shape[1]
            least = before[1][:, -1] if count else None
            more, scores = search_neighbors(self._index, vectors, count, excluded, least)
            more = np.where(more < 0, -1, more + self._first)
            found.rows[here], found.scores[here] = merge_neighbors(before, (more, scores))

    def _images(self, rows: np.ndarray) -> np.ndarray:
        return self._gallery.embeddings(rows + self._first)[:, 0]


def _search_all(shards: Sequence[Shard], workdir: Workdir, options: NeighborsSettings, threads: int) -> None:
    """Finds and writes the neighbors of the photos in the given shards. threads: number of threads per search."""
    indexed = workdir.index_rows()
    whole = workdir.manifest("gallery").facts["index"]["kind"] == "device"
    plan: dict[tuple[int, ...], list[Shard]] = {}
    for shard in shards:
        found = _Neighbors.load(shard, options.count)
        missing = found.missing(indexed)
        if not missing:  # photos were added to other splits only
            found.save(shard, workdir, indexed)
        for numbers in [tuple(missing)][: len(missing)] if whole else [(number,) for number in missing]:
            plan.setdefault(numbers, []).append(shard)
    total = sum(len(shard.rows) for some in plan.values() for shard in some)
    with Progress("neighbors", total, "searches") as progress:
        for numbers, some in sorted(plan.items()):
            opened = _OpenedIndex(workdir, threads, numbers, indexed)
            for shard in some:
                found = _Neighbors.load(shard, options.count)
                train = shard.split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT)
                exclude = options.exclude if train else options.exclude_in_evaluation
                opened.search(workdir.table(shard.split), shard.rows, exclude, found)
                ends = np.array([[indexed[number].start, indexed[number].stop] for number in numbers])
                found.searched = np.concatenate([found.searched, ends])
                found.save(shard, workdir, indexed)
                progress.add(len(shard.rows))
