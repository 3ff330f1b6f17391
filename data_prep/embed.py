"""The stage `embed`: photos in, records of frozen features out; after it nothing needs pixels."""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import backbone, records, settings, workdir
from geotoken_jax.backbone.preprocess import ImageError, place_text
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

#: Photos a shard: also what an interrupted run does again.
_SHARD = 4096
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class EmbedSettings(backbone.BackboneSettings):
    """threads: that decode and embed side by side."""

    threads: int


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes features/ from photos/, split by split and shard by shard. An unreadable photo is dropped and counted."""
    options = settings.read(EmbedSettings, config.embed, "embed")
    made_with = {"embed": {"backbone": options.backbone, options.backbone: getattr(options, options.backbone)}}
    stage = workdir.begin(path, "features", made_with, ["photos"])
    if stage.manifest:
        return stage.manifest
    tower = backbone.make(options)
    splits = workdir.read_manifest(path, "photos").counts
    counts, dropped = {}, 0
    ledgers = stage.path / "ledgers"
    ledgers.mkdir(exist_ok=True)
    with Progress("embed", sum(splits.values()), "photos") as progress:
        for split, photos in splits.items():
            source = records.Photos(epath.Path(path) / "photos", split)
            shards = max(1, math.ceil(photos / _SHARD))
            counts[split] = 0
            for shard in range(shards):
                rows = range(shard * _SHARD, min((shard + 1) * _SHARD, photos))
                file = records.shard_path(stage.path, split, shard, shards)
                ledger = ledgers / f"{file.name}.json"
                if not (file.exists() and ledger.exists()):
                    failures: list[dict[str, str]] = []
                    records.write_shard(file, _embed(source, rows, tower, options.threads, failures))
                    workdir.write_json(ledger, failures)
                failures = json.loads(ledger.read_text())
                counts[split] += len(rows) - len(failures)
                dropped += len(failures)
                progress.add(len(rows))
    return stage.finish(counts, {"unreadable image": dropped} if dropped else {}, width=tower.width)


def _embed(
    source: records.Photos, rows: range, tower: backbone.Backbone, threads: int, failures: list[dict[str, str]]
) -> Iterator[bytes]:
    """Yields the records of some rows, in their order."""
    layout = records.feature_layout(tower.width)

    def batch(first: int) -> tuple[list[bytes], list[dict[str, str]]]:
        photos = [source[row] for row in range(first, min(first + _BATCH, rows.stop))]
        images, kept, failed = [], [], []
        for photo in photos:
            try:
                images.append(tower.images([photo["image"]])[0])
                kept.append(photo)
            except ImageError as error:
                failed.append({"id": photo["id"], "reason": str(error)})
        texts = tower.texts([place_text(photo["city"], photo["state"], photo["country"]) for photo in kept])
        columns = {name: np.array([photo[name].encode() for photo in kept]) for name in ("id", "author")}
        columns |= {name: np.array([photo[name] for photo in kept]) for name in ("coordinates", "tokens")}
        return layout.encode({**columns, "image": np.array(images), "text": texts}) if kept else [], failed

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for encoded, failed in pool.map(batch, range(rows.start, rows.stop, _BATCH)):
            failures.extend(failed)
            yield from encoded
