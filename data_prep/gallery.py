"""The first part of the stage `index`: the three vectors of every photo, as tables, and the index over the gallery."""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from geotoken_jax import records, settings, workdir
from geotoken_jax.gallery.table import IndexVectors, Table, write_shard
from geotoken_jax.progress import track
from geotoken_jax.workdir import Manifest

if TYPE_CHECKING:  # jax is not for a stage that has nothing to do
    from geotoken_jax.align.heads import AlignModel

#: The split that the gallery is made of; the others are asked about.
GALLERY = "train"
_SHARD, _BATCH = 1 << 20, 4096


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes queries/SPLIT/ (tables of all splits but the gallery's), then gallery/ with its index, from features/ and
    the trained heads. Raises IndexQualityError if the index misses too many neighbors."""
    path = epath.Path(path)
    splits = workdir.read_manifest(path, "features").counts
    aligned_with = workdir.read_manifest(path, "align").settings.get("align", {})
    if aligned_with.get("pixels", {}).get("tower") == "trained":
        raise workdir.StageError(
            f"{path}/align has trained the backbone, and {path}/features are still of the one before: use another "
            f"--workdir, with --config.embed.huggingface.path={path}/align/backbone, to embed and align there"
        )
    queries = workdir.begin(path, "queries", {}, ["features", "align"])
    gallery = workdir.begin(path, "gallery", {"index": {"search": config.index.search}}, ["features", "align"])
    if queries.manifest and gallery.manifest:
        return gallery.manifest
    from geotoken_jax import checkpoint
    from geotoken_jax.align.heads import AlignSettings
    from geotoken_jax.align.task import AlignTask
    from geotoken_jax.gallery import index

    options = settings.read(index.IndexSettings, config.index.search, "index.search")
    width = workdir.read_manifest(path, "features").facts["width"]
    task = AlignTask(settings.read(AlignSettings, config.align.model, "align.model"), width)
    aligned = checkpoint.read_module(path / "align" / "parameters.safetensors", task.init)
    if not queries.manifest:
        others = {split: n for split, n in splits.items() if split != GALLERY}
        for split in others:
            _table(path, queries.path / split, split, width, aligned)
        queries.finish(others)
    if gallery.manifest:
        return gallery.manifest
    _table(path, gallery.path, GALLERY, width, aligned)
    built = index.build(IndexVectors(Table(gallery.path)), options, gallery.path / "index")
    return gallery.finish({GALLERY: splits[GALLERY]}, index=built.facts)


def open_table(path: epath.PathLike, split: str) -> Table:
    """Returns the table of one split's photos."""
    folder = epath.Path(path)
    return Table(folder / "gallery" if split == GALLERY else folder / "queries" / split)


def _table(path: epath.Path, folder: epath.Path, split: str, width: int, aligned: "AlignModel") -> None:
    with contextlib.suppress(FileNotFoundError):
        if len(Table(folder)):  # whole, of a run that was interrupted later
            return
    from geotoken_jax.align.heads import embeddings

    features = records.Records(path / "features", split, records.feature_layout(width))
    shards = max(1, -(-len(features) // _SHARD))
    for shard in range(shards):
        starts = range(shard * _SHARD, min((shard + 1) * _SHARD, len(features)), _BATCH)
        parts = []
        for start in track(starts, f"table of {split}", len(starts), "batch"):
            part = features[start : min(start + _BATCH, (shard + 1) * _SHARD)]
            image = part.pop("image").astype(np.float32)
            del part["text"]
            parts.append({**part, "embeddings": embeddings(aligned, image)})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns["ids"], columns["authors"] = columns.pop("id"), columns.pop("author")
        write_shard(folder, shard, shards, columns)
