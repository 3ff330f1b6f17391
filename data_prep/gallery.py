"""First step of the stage `index`: makes a table per split, with three embeddings per photo, and the search index.

One or more processes make the tables and the index, shard by shard (data_prep/sharded.py). A process holds one shard in
memory. A shard of a table takes 1.5 GB if embeddings have 768 values. A shard of the index takes 6 GB if
config.index.search.shard_rows is 262,144.
"""

import functools
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep import sharded
from data_prep.sharded import Shard
from geotoken_jax import disk, records
from geotoken_jax.align.heads import AlignModel, embeddings
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import index, table
from geotoken_jax.gallery.index import IndexSettings
from geotoken_jax.gallery.table import IndexVectors, Table, write_shard
from geotoken_jax.manifests import Manifest, Stage, StageError, write_json
from geotoken_jax.records import Records
from geotoken_jax.workdir import GALLERY, Workdir

#: Photos per shard of a table, and per batch of the alignment model.
_SHARD, _BATCH = 1 << 18, 4096
#: Names in place of a split for shards in gallery/: shards of the table, and shards of the index. The names of their
#: ledgers start with these names.
_TABLE, _INDEX = "table", "index"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes gallery/, with the table and the search index of `train`, and queries/SPLIT/, a table per other split.

    Reads features/ and align/. Returns the manifests of gallery/ and queries/. A folder that lacks shards of other
    processes has no manifest yet and is left out.

    Raises StageError if `align` has trained the backbone, because features/ are then outdated. Raises IndexQualityError
    if the index misses too many neighbors.
    """
    if workdir.manifest("align").settings["align"]["pixels"]["tower"] == "trained":
        folder = workdir.path
        raise StageError(
            f"{folder}/align has trained the backbone, but {folder}/features are from the backbone before training: "
            f"embed and align in another --workdir, with --config.embed.huggingface.path={folder}/align/backbone and "
            "--config.align.pixels.tower=cached"
        )
    queries = workdir.begin(config, "queries", (), ["features", "align"])
    gallery = workdir.begin(config, "gallery", ["index.search"], ["features", "align"])
    counts = workdir.counts("features")
    others = {split: numbers for split, numbers in counts.items() if split != GALLERY}
    tables = _tables(config, workdir, queries, others), _tables(config, workdir, gallery, {_TABLE: counts[GALLERY]})
    search, indexed = config.index.search, []
    if not gallery.manifest and sharded.wait(gallery, tables[1]):
        indexed = sharded.divide(gallery, {_INDEX: counts[GALLERY]}, search.shard_rows)
        vectors = IndexVectors(Table(gallery.path))
        needed = sharded.missing(indexed)
        sharded.make(indexed, needed, "index", lambda shard: _index(vectors, search, indexed, shard))
    manifests = [queries.manifest, gallery.manifest]
    if not queries.manifest and sharded.wait(queries, tables[0]):
        totals = {split: numbers[-1] for split, numbers in others.items()}
        manifests[0] = sharded.complete(workdir, queries, lambda: _finish_queries(workdir, queries, totals))
    if indexed and sharded.wait(gallery, indexed):
        total = counts[GALLERY][-1]
        manifests[1] = sharded.complete(
            workdir, gallery, lambda: _finish(workdir, gallery, search, total, len(indexed))
        )
    return [manifest for manifest in manifests if manifest]


def _finish_queries(workdir: Workdir, queries: Stage, counts: Mapping[str, int]) -> Manifest:
    _write_schema(workdir, queries, f"{{split}}/{table.FILES}")
    return queries.finish(counts)


def _write_schema(workdir: Workdir, stage: Stage, files: str) -> None:
    layout = table.layout(workdir.width, workdir.id_bytes("features"), bool(workdir.sources("features")))
    write_json(stage.path / "schema.json", records.schema(layout, files))


def _finish(workdir: Workdir, gallery: Stage, search: IndexSettings, photos: int, shards: int) -> Manifest:
    _write_schema(workdir, gallery, table.FILES)
    facts = index.finish(IndexVectors(Table(gallery.path)), search, gallery.path / "index", shards)
    return gallery.finish({GALLERY: photos}, index=facts)


def _tables(config: Config, workdir: Workdir, stage: Stage, counts: Mapping[str, Sequence[int]]) -> list[Shard]:
    """Makes this process's shards of the tables in one stage's folder. Returns the shards of all processes.

    counts: split, or _TABLE for the gallery's table -> numbers of photos, as in partition.ranges.
    """
    shards = [] if stage.manifest else sharded.divide(stage, counts, _SHARD)
    aligned = functools.cache(lambda: workdir.align_model(config.align.model))

    def write(shard: Shard) -> None:
        split, folder = (GALLERY, stage.path) if shard.split == _TABLE else (shard.split, stage.path / shard.split)
        columns = _columns(workdir.features(split), shard.rows, aligned())
        shard.finish(write_shard(folder, shard.number, shard.count, columns), id_bytes=id_bytes)

    id_bytes = workdir.id_bytes("features")
    sharded.make(shards, sharded.missing(shards, id_bytes=id_bytes), "table", write)
    return shards


def _columns(features: Records, rows: range, aligned: AlignModel) -> dict[str, np.ndarray]:
    """Returns column -> values, for the given rows of features/: the columns of a table (see gallery/table.py)."""
    columns: dict[str, np.ndarray] = {}
    for first in [*rows[::_BATCH]] or [rows.start]:
        batch = features[first : min(first + _BATCH, rows.stop)]
        image = batch.pop("image").astype(np.float32)
        del batch["text"]
        for name in ("id", "author", *(("source",) if "source" in batch else ())):
            batch[f"{name}s"] = batch.pop(name)
        for name, values in {**batch, "embeddings": embeddings(aligned, image)}.items():
            if name not in columns:
                columns[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            columns[name][first - rows.start : first - rows.start + len(values)] = values
    return columns


def _index(vectors: IndexVectors, search: IndexSettings, shards: Sequence[Shard], shard: Shard) -> None:
    folder = shard.stage / "index"
    # Files from an interrupted attempt.
    shutil.rmtree(folder / index.shard_name(shard.number, shard.count), ignore_errors=True)
    built = index.build_shard(vectors, search, folder, [one.rows for one in shards], shard.number)
    shard.finish([built / name for name in disk.files(built)])
