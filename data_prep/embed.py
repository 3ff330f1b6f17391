"""The stage `embed`: photos in, records of frozen features out; after it nothing needs pixels.

Decoding threads stay ahead of the accelerator, past the ends of shards, so that it waits for no photo. Several
processes share the shards out among them by number, and need not run at one time: whichever makes the last shard
completes the folder.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath

from geotoken_jax import backbone, processes, records, settings
from geotoken_jax.artifacts import Workdir
from geotoken_jax.backbone import views
from geotoken_jax.backbone.preprocess import ImageError, open_image, place_text
from geotoken_jax.configuration import Config
from geotoken_jax.preparation import EmbedSettings
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest, write_json

#: Photos a shard: also what an interrupted run does again.
_SHARD = 4096
_BATCH = 256
#: Batches on the accelerator at a time: one is computed while another is sent there and a third comes back.
_ON_DEVICE = 2

Item = TypeVar("Item")
Made = TypeVar("Made")


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes features/ from photos/, shard by shard; returns no manifest while other processes have shards to make.

    An unreadable photo is dropped and counted. Further views of the photos that are trained on are a split of their
    own, all those of a photo in a row.
    """
    options = config.embed
    seen = options.views if options.views.count else {"count": 0}
    made_with = {"embed": settings.plain({**backbone.made_with(options), "views": settings.result(seen)})}
    stage = workdir.begin(config, "features", (), ["photos"], made_with)
    if stage.manifest:
        return [stage.manifest]
    splits = workdir.manifest("photos").counts
    viewed = {views.SPLIT: splits[views.OF]} if options.views.count else {}
    (stage.path / "ledgers").mkdir(exist_ok=True)
    shards = [shard for split, photos in (splits | viewed).items() for shard in _shards(stage.path, split, photos)]
    own = shards[processes.index() :: processes.count()]
    missing = [shard for shard in own if not shard.whole]
    done = sum(len(shard.rows) for shard in own if shard.whole)
    with Progress("embed", sum(len(shard.rows) for shard in own), "photos", done) as progress:
        if missing:
            _make(missing, options, workdir, progress)
    if not all(shard.whole for shard in shards):
        return []
    counts, dropped, width = dict.fromkeys(splits | viewed, 0), 0, 0
    for shard in shards:
        ledger = json.loads(shard.ledger.read_text())
        width = ledger["width"]
        counts[shard.split] += ledger["records"]
        dropped += len(ledger["failures"]) if shard.split in splits else 0
    return [stage.finish(counts, {"unreadable image": dropped} if dropped else {}, width=width)]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file to make. rows: of its photos in their split of photos/."""

    split: str
    rows: range
    file: epath.Path

    @property
    def ledger(self) -> epath.Path:
        """Says how many records the file has, how wide they are and what failed; it is written last."""
        return self.file.parent / "ledgers" / f"{self.file.name}.json"

    @property
    def whole(self) -> bool:
        return self.ledger.exists() and self.file.exists()


def _shards(folder: epath.Path, split: str, photos: int) -> list[_Shard]:
    n = max(1, math.ceil(photos / _SHARD))
    return [
        _Shard(split, range(k * _SHARD, min((k + 1) * _SHARD, photos)), records.shard_path(folder, split, k, n))
        for k in range(n)
    ]


@dataclasses.dataclass
class _Batch:
    """Photos of a shard on their way. prepared: [n * copies, h, w, 3], None once they are images [n * copies, C]."""

    shard: _Shard
    photos: list[dict[str, Any]]
    failures: list[dict[str, str]]
    prepared: np.ndarray | None
    images: np.ndarray | None = None


def _make(shards: list[_Shard], options: EmbedSettings, workdir: Workdir, progress: Progress) -> None:
    """Writes shards. Photos are decoded in one pool of threads and embedded in another; texts, here."""
    tower = backbone.make(options)
    layout = records.feature_layout(tower.width)
    sources = {shard.split: workdir.photos(_of(shard.split)) for shard in shards}
    looks = {split: _views(tower, options.views) if split == views.SPLIT else _itself(tower) for split in sources}
    texts = _Texts(tower)

    def decode(part: tuple[_Shard, int]) -> _Batch:
        shard, first = part
        batch, seen = _Batch(shard, [], [], None), []
        for row in range(first, min(first + _BATCH, shard.rows.stop)):
            photo = sources[shard.split][row]
            try:
                seen.append(looks[shard.split](photo.pop("image"), row))
                batch.photos.append(photo)
            except ImageError as error:
                batch.failures.append({"id": photo["id"], "reason": str(error)})
        batch.prepared = np.concatenate(seen) if seen else None
        return batch

    def embed(batch: _Batch) -> _Batch:
        if batch.prepared is not None:
            batch.images, batch.prepared = tower.images(batch.prepared), None
        return batch

    def encoded(batches: Iterable[_Batch], ledger: dict[str, Any]) -> Iterator[bytes]:
        for batch in batches:
            rows = _rows(batch, texts, layout)
            ledger["failures"] += batch.failures
            ledger["records"] += len(rows)
            progress.add(len(batch.photos) + len(batch.failures))
            yield from rows

    parts = ((shard, first) for shard in shards for first in shard.rows[::_BATCH] or [shard.rows.start])
    with (
        concurrent.futures.ThreadPoolExecutor(options.threads) as decoders,
        concurrent.futures.ThreadPoolExecutor(_ON_DEVICE) as devices,
    ):
        decoded = _ahead(decoders, decode, parts, options.threads + _ON_DEVICE)
        batches = _ahead(devices, embed, decoded, _ON_DEVICE + 1)
        for shard, of_shard in itertools.groupby(batches, key=lambda batch: batch.shard):
            ledger: dict[str, Any] = {"records": 0, "width": tower.width, "failures": []}
            records.write_shard(shard.file, encoded(of_shard, ledger))
            write_json(shard.ledger, ledger)


def _rows(batch: _Batch, texts: "_Texts", layout: records.Layout) -> list[bytes]:
    """Returns a batch's records: as many of a photo, one after the other, as there are images of it."""
    if batch.images is None:
        return []
    photos = batch.photos
    columns = {name: np.array([photo[name].encode() for photo in photos]) for name in ("id", "author")}
    columns |= {name: np.array([photo[name] for photo in photos]) for name in ("coordinates", "tokens")}
    columns["captured"] = np.array([photo.get("captured", math.nan) for photo in photos])
    columns["text"] = texts([place_text(photo["city"], photo["state"], photo["country"]) for photo in photos])
    each = {name: np.repeat(values, len(batch.images) // len(photos), axis=0) for name, values in columns.items()}
    return layout.encode({**each, "image": batch.images})


class _Texts:
    """Features of texts, each distinct one computed once: places are far fewer than photos."""

    def __init__(self, tower: backbone.Backbone):
        self._tower, self._known = tower, {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self._tower.texts(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def _ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Made], items: Iterable[Item], most: int
) -> Iterator[Made]:
    """Yields function(item) of the items in their order, `most` of them under way or waiting at a time."""
    begun: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    try:
        for item in items:
            if len(begun) == most:
                yield begun.popleft().result()
            begun.append(pool.submit(function, item))
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


#: Encoded file, row of its photo -> what is seen of the photo, prepared [n, h, w, 3]; n is the same for all photos.
_Look = Callable[[bytes, int], np.ndarray]


def _of(split: str) -> str:
    """Returns the split of photos/ that a split of features/ is made from."""
    return views.OF if split == views.SPLIT else split


def _itself(tower: backbone.Backbone) -> _Look:
    return lambda image, row: tower.prepare(image)[None]


def _views(tower: backbone.Backbone, options: views.ViewsSettings) -> _Look:
    side = math.ceil(tower.min_side / options.crop)
    return lambda image, row: np.stack(
        [tower.prepare(view) for view in views.views(open_image(image, side), row, options)]
    )
