"""First step of the stage `index`: tables with three embeddings per photo, and the gallery's search index."""

import contextlib

import numpy as np
from etils import epath

from geotoken_jax.align.heads import AlignModel, embeddings
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import IndexVectors, Table, write_shard
from geotoken_jax.manifests import Manifest, StageError
from geotoken_jax.progress import track
from geotoken_jax.records import Records
from geotoken_jax.workdir import GALLERY, Workdir

_SHARD, _BATCH = 1 << 20, 4096


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes gallery/ (the gallery's table and search index) and, for each other split, its table queries/SPLIT/.

    Reads features/ and align/. Raises StageError if `align` has trained the backbone, because features/ are then
    outdated, and IndexQualityError if the index misses too many neighbors.
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
    manifests = [queries.manifest, gallery.manifest]
    splits = workdir.manifest("features").counts
    aligned = None if all(manifests) else workdir.align_model(config.align.model)
    if aligned and not queries.manifest:
        others = {split: n for split, n in splits.items() if split != GALLERY}
        for split in others:
            _table(workdir.features(split), queries.path / split, split, aligned)
        manifests[0] = queries.finish(others)
    if aligned and not gallery.manifest:
        _table(workdir.features(GALLERY), gallery.path, GALLERY, aligned)
        built = index.build(IndexVectors(Table(gallery.path)), config.index.search, gallery.path / "index")
        manifests[1] = gallery.finish({GALLERY: splits[GALLERY]}, index=built.facts)
    return [manifest for manifest in manifests if manifest]


def _table(features: Records, folder: epath.Path, split: str, aligned: AlignModel) -> None:
    with contextlib.suppress(FileNotFoundError):
        if len(Table(folder)):  # complete, from a run that was interrupted later
            return
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
