"""Second step of the stage `index`: the nearest gallery photos of every photo in every split.

Neighbors are found shard by shard, by one or more processes (data_prep/sharded.py). A process opens one shard of the
index at a time, searches it for the neighbors of all its photos, and merges them with earlier shards' neighbors. Its
memory holds this shard of the index (config.index.search.shard_rows) and 0.2 GB, for any number of photos. An index of
kind `device` is opened as a whole: its vectors are in the memory of the devices.
"""

import dataclasses
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
from geotoken_jax.gallery.exclude import ExcludeSettings, exclusions
from geotoken_jax.gallery.neighbors import merge_neighbors, search_neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.manifests import Manifest, read_ledger, write_json
from geotoken_jax.preparation import NeighborsSettings
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import NEIGHBOR_FILES, Workdir

#: Photos per shard, and per search.
_SHARD, _BATCH = 1 << 16, 8192
#: Subfolder of neighbors/ with shards that are not yet searched for in the whole index.
_UNFINISHED = "unfinished"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes neighbors/: gallery rows [n, K] int32 and scores [n, K] float32 of each split's photos, best first.

    K is config.index.neighbors.count. Excludes gallery photos with the photo's own id, which for a view is the id of
    the original, and those that the rules in config.index.neighbors exclude. If fewer than K neighbors are left, the
    other rows are -1 and their scores -inf; the manifest's `fewer` has the number of such photos per split.

    Returns an empty list if shards of other processes are missing.
    """
    options = config.index.neighbors
    stage = workdir.begin(config, "neighbors", ["index.neighbors"], ["gallery", "queries"])
    if stage.manifest:
        return [stage.manifest]
    counts = workdir.counts("features")
    parts = sharded.divide(stage, counts, _SHARD)
    _search_all([part for part in sharded.own(parts) if not part.ledger], workdir, options, config.index.search.threads)
    if not sharded.wait(stage, parts):
        return []

    def finish() -> Manifest:
        shutil.rmtree(stage.path / _UNFINISHED, ignore_errors=True)
        fewer = dict.fromkeys(counts, 0)
        for part in parts:
            fewer[part.split] += (part.ledger or {})["fewer"]
        schema = records.schema(records.neighbor_layout(options.count), NEIGHBOR_FILES)
        write_json(stage.path / "schema.json", schema)
        return stage.finish({split: numbers[-1] for split, numbers in counts.items()}, fewer=fewer)

    return [sharded.complete(workdir, stage, finish)]


@dataclasses.dataclass
class _Neighbors:
    """Neighbors of a shard's photos in some shards of the index.

    rows, scores: [n, K]. searched: first row and end of each shard of the index that was searched, [m, 2].
    """

    rows: Int32[np.ndarray, "n K"]
    scores: Float32[np.ndarray, "n K"]
    searched: np.ndarray

    @classmethod
    def load(cls, part: Shard, count: int) -> "_Neighbors":
        """Returns the neighbors found before an interruption or before photos were added, or none. count: K."""
        file = _unfinished(part)
        if file.exists():
            with np.load(file, allow_pickle=False) as stored:
                return cls(**stored)
        for path in part.earlier():
            if ledger := read_ledger(path):
                names = sorted(ledger["files"])  # rows, scores
                rows, scores = (np.array(records.open_array(path.parent.parent / name)) for name in names)
                return cls(rows, scores, np.array(ledger["searched"]))
        shape = len(part.rows), count
        return cls(np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32), np.zeros((0, 2), np.int64))

    def save(self, part: Shard, workdir: Workdir, indexed: Sequence[range]) -> None:
        """Writes the neighbors: if all shards of the index were searched, as the files of neighbors/."""
        if self.missing(indexed):
            records.save_arrays(_unfinished(part), **vars(self))
            return
        files = [workdir.neighbors_file(part.split, name, part.number, part.count) for name in ("rows", "scores")]
        for file, values in zip(files, (self.rows, self.scores), strict=True):
            records.save_array(file, values)
        fewer = int((self.rows[:, -1:] < 0).sum())
        part.finish(files, fewer=fewer, searched=[[rows.start, rows.stop] for rows in indexed])
        _unfinished(part).unlink(missing_ok=True)

    def missing(self, indexed: Sequence[range]) -> list[int]:
        """Returns the numbers of the index's shards that were not searched. indexed: rows of each shard."""
        searched = {range(*ends) for ends in self.searched.tolist()}
        return [number for number, rows in enumerate(indexed) if rows not in searched]


def _unfinished(part: Shard) -> epath.Path:
    return part.stage / _UNFINISHED / f"{part.split}-{part.number:05d}-of-{part.count:05d}.npz"


class _Part:
    """Consecutive shards of the index, opened, and the columns of their gallery rows for the exclusion rules."""

    def __init__(self, workdir: Workdir, threads: int, numbers: Sequence[int], indexed: Sequence[range]):
        self._first, end = indexed[numbers[0]].start, indexed[numbers[-1]].stop
        self._index, self._gallery = workdir.index(threads, numbers), workdir.gallery
        names = ("ids", "authors", "coordinates")
        self._columns = {name: getattr(self._gallery, name)(slice(self._first, end)) for name in names}

    def search(self, queries: Table, rows: range, exclude: ExcludeSettings, found: _Neighbors) -> None:
        """Adds neighbors in these shards to those found before. queries: table of the split. rows: rows in it."""
        for first in range(0, len(rows), _BATCH):
            here = slice(first, min(first + _BATCH, len(rows)))
            part = slice(rows.start + here.start, rows.start + here.stop)
            excluded = exclusions(exclude, queries, part, self._columns, self._images)
            before = found.rows[here], found.scores[here]
            vectors = index_vectors(queries.embeddings(part))
            count = found.rows.shape[1]
            least = before[1][:, -1] if count else None
            more, scores = search_neighbors(self._index, vectors, count, excluded, least)
            more = np.where(more < 0, -1, more + self._first)
            found.rows[here], found.scores[here] = merge_neighbors(before, (more, scores))

    def _images(self, rows: np.ndarray) -> np.ndarray:
        return self._gallery.embeddings(rows + self._first)[:, 0]


def _search_all(parts: Sequence[Shard], workdir: Workdir, options: NeighborsSettings, threads: int) -> None:
    """Finds and writes the neighbors of the photos of some shards. threads: number of threads per search."""
    indexed = workdir.index_rows()
    whole = workdir.manifest("gallery").facts["index"]["kind"] == "device"
    plan: dict[tuple[int, ...], list[Shard]] = {}
    for part in parts:
        found = _Neighbors.load(part, options.count)
        missing = found.missing(indexed)
        if not missing:  # photos were added to other splits only
            found.save(part, workdir, indexed)
        for numbers in [tuple(missing)][: len(missing)] if whole else [(number,) for number in missing]:
            plan.setdefault(numbers, []).append(part)
    total = sum(len(part.rows) for some in plan.values() for part in some)
    with Progress("neighbors", total, "searches") as progress:
        for numbers, some in sorted(plan.items()):
            opened = _Part(workdir, threads, numbers, indexed)
            for part in some:
                found = _Neighbors.load(part, options.count)
                train = part.split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT)
                exclude = options.exclude if train else options.exclude_in_evaluation
                opened.search(workdir.table(part.split), part.rows, exclude, found)
                ends = np.array([[indexed[number].start, indexed[number].stop] for number in numbers])
                found.searched = np.concatenate([found.searched, ends])
                found.save(part, workdir, indexed)
                progress.add(len(part.rows))
