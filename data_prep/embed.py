"""The stage `embed`: photos in, records of frozen features out; after it nothing needs pixels."""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import backbone, records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.backbone.preprocess import ImageError, open_image, place_text
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

#: Photos a shard: also what an interrupted run does again.
_SHARD = 4096
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class EmbedSettings(backbone.BackboneSettings):
    """threads: that decode and embed side by side. views: further ones of each photo that is trained on."""

    threads: int
    views: views.ViewsSettings


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes features/ from photos/, split by split and shard by shard. An unreadable photo is dropped and counted.

    Further views of the photos that are trained on are a split of their own, all those of a photo in a row.
    """
    options = settings.read(EmbedSettings, config.embed, "embed")
    made_with = {"backbone": options.backbone, options.backbone: getattr(options, options.backbone)}
    if options.views.count:
        made_with["views"] = options.views
    stage = workdir.begin(path, "features", {"embed": made_with}, ["photos"])
    if stage.manifest:
        return stage.manifest
    tower = backbone.make(options)
    splits = workdir.read_manifest(path, "photos").counts
    viewed = {views.SPLIT: splits[views.OF]} if options.views.count else {}
    counts = {}
    ledgers = stage.path / "ledgers"
    ledgers.mkdir(exist_ok=True)
    with Progress("embed", sum(splits.values()) + sum(viewed.values()), "photos") as progress:
        for split, photos in {**splits, **viewed}.items():
            of, copies, look = split, 1, _itself(tower)
            if split in viewed:
                of, copies, look = views.OF, options.views.count, _views(tower, options.views)
            source = records.Photos(epath.Path(path) / "photos", of)
            shards = max(1, math.ceil(photos / _SHARD))
            counts[split] = 0
            for shard in range(shards):
                rows = range(shard * _SHARD, min((shard + 1) * _SHARD, photos))
                file = records.shard_path(stage.path, split, shard, shards)
                ledger = ledgers / f"{file.name}.json"
                if not (file.exists() and ledger.exists()):
                    failures: list[dict[str, str]] = []
                    records.write_shard(file, _embed(source, rows, tower, look, options.threads, failures))
                    workdir.write_json(ledger, failures)
                failures = json.loads(ledger.read_text())
                counts[split] += (len(rows) - len(failures)) * copies
                progress.add(len(rows))
    dropped = sum(splits.values()) - sum(counts[split] for split in splits)
    return stage.finish(counts, {"unreadable image": dropped} if dropped else {}, width=tower.width)


#: Encoded file, row of its photo -> features [n, C] of what is seen of the photo, n the same for all photos.
_Look = Callable[[bytes, int], np.ndarray]


def _itself(tower: backbone.Backbone) -> _Look:
    return lambda image, row: tower.images([image])


def _views(tower: backbone.Backbone, options: views.ViewsSettings) -> _Look:
    side = math.ceil(tower.min_side / options.crop)
    return lambda image, row: tower.images(views.views(open_image(image, side), row, options))


def _embed(
    source: records.Photos,
    rows: range,
    tower: backbone.Backbone,
    look: _Look,
    threads: int,
    failures: list[dict[str, str]],
) -> Iterator[bytes]:
    """Yields the records of what is seen of the photos of some rows, in their order."""
    layout = records.feature_layout(tower.width)

    def batch(first: int) -> tuple[list[bytes], list[dict[str, str]]]:
        images, kept, failed = [], [], []
        for row in range(first, min(first + _BATCH, rows.stop)):
            photo = source[row]
            try:
                images.append(look(photo["image"], row))
                kept.append(photo)
            except ImageError as error:
                failed.append({"id": photo["id"], "reason": str(error)})
        if not kept:
            return [], failed
        columns = {name: np.array([photo[name].encode() for photo in kept]) for name in ("id", "author")}
        columns |= {name: np.array([photo[name] for photo in kept]) for name in ("coordinates", "tokens")}
        columns["text"] = tower.texts([place_text(photo["city"], photo["state"], photo["country"]) for photo in kept])
        each = {name: np.repeat(values, len(images[0]), axis=0) for name, values in columns.items()}
        return layout.encode({**each, "image": np.concatenate(images)}), failed

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for encoded, failed in pool.map(batch, range(rows.start, rows.stop, _BATCH)):
            failures.extend(failed)
            yield from encoded
