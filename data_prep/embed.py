"""The stage `embed`: computes the frozen backbone's features of all photos, and stores them as records.

Threads decode photos before the accelerator needs them. They start on the next shard before the current one ends, so
that the accelerator need not wait between shards. One or more processes make the shards (data_prep/sharded.py). Each
process uses all of its local devices.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from data_prep import sharded
from data_prep.sharded import Shard
from geotoken_jax import backbone, records, settings
from geotoken_jax.backbone import views
from geotoken_jax.backbone.preprocess import ImageError, open_image, place_text
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, Stage, write_json
from geotoken_jax.preparation import EmbedSettings
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Workdir

#: Photos per shard: MP16-Pro's 4.12 million photos have 252 shards. After an interruption an unfinished shard is made
#: again, so at most this number of photos is encoded twice.
_SHARD = 16_384
_BATCH = 256
#: Number of batches on the accelerator at a time: one is computed while another is transferred.
_ON_DEVICE = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes features/ from photos/, shard by shard. Returns an empty list if shards of other processes are missing.

    An unreadable photo is dropped and counted. If config.embed.views.count is above 0, the split `train_views` is added
    with augmented views of the photos in `train`. All views of a photo are consecutive.
    """
    options = config.embed
    view_options = options.views if options.views.count else {"count": 0}
    made_with = {
        "embed": settings.plain({**backbone.feature_settings(options), "views": settings.result(view_options)})
    }
    stage = workdir.begin(config, "features", (), ["photos"], made_with)
    if stage.manifest:
        return [stage.manifest]
    counts, id_bytes, sources = workdir.counts("photos"), workdir.id_bytes("photos"), workdir.sources("photos")
    viewed = {views.VIEWS_SPLIT: counts[views.SOURCE_SPLIT]} if options.views.count else {}
    shards = sharded.divide(stage, counts | viewed, _SHARD)
    missing = sharded.missing(shards, id_bytes=id_bytes)
    total = sum(len(shard.rows) for shard in sharded.own(shards))
    done = total - sum(len(shard.rows) for shard in missing)
    with Progress("embed", total, "photos", done) as progress:
        if missing:
            _write_shards(missing, options, workdir, progress)
    if not sharded.wait(stage, shards):
        return []
    return [sharded.complete(workdir, stage, lambda: _finish(stage, shards, id_bytes, sources))]


def _finish(stage: Stage, shards: Sequence[Shard], id_bytes: int, sources: Sequence[str]) -> Manifest:
    """Writes the manifest from the shards' ledgers.

    id_bytes: size of the field `id` in a record, and of the field `author`, in bytes. sources: names of the sources;
    empty if there is one source.
    """
    counts, dropped, width = dict.fromkeys((shard.split for shard in shards), 0), 0, 0
    for shard in shards:
        ledger = shard.ledger or {}
        width = ledger["width"]
        counts[shard.split] += ledger["records"]
        dropped += len(ledger["failures"]) if shard.split != views.VIEWS_SPLIT else 0
    layout = records.feature_layout(width, id_bytes, bool(sources))
    write_json(stage.path / "schema.json", records.schema(layout, records.SHARD_FILES))
    facts: dict[str, Any] = {"width": width, **records.id_facts(id_bytes), **({"sources": sources} if sources else {})}
    return stage.finish(counts, {"unreadable image": dropped} if dropped else {}, **facts)


@dataclasses.dataclass
class _Batch:
    """A batch of a shard's photos, on its way from the decoder to the backbone.

    photos: metadata of the n readable photos. failures: id and reason of each unreadable photo. prepared: decoded
    pixels, [n * copies, h, w, 3]; None after encoding, or if no photo is readable. images: features from the backbone,
    [n * copies, C]; None before encoding, or if no photo is readable. In `train_views`, `copies` is the number of views
    per photo; in other splits it is 1.
    """

    shard: Shard
    photos: list[dict[str, Any]]
    failures: list[dict[str, str]]
    prepared: np.ndarray | None
    images: np.ndarray | None = None


def _write_shards(shards: list[Shard], options: EmbedSettings, workdir: Workdir, progress: Progress) -> None:
    """Writes shards and their ledgers.

    A pool of threads decodes photos, a second pool runs the backbone on images, and the calling thread runs it on
    texts.
    """
    tower = backbone.make(options)
    id_bytes = workdir.id_bytes("photos")
    layout = records.feature_layout(tower.width, id_bytes, bool(workdir.sources("photos")))
    sources = {shard.split: workdir.photos(_photo_split(shard.split)) for shard in shards}
    prepare = {
        split: _prepare_views(tower, options.views) if split == views.VIEWS_SPLIT else _prepare_photo(tower)
        for split in sources
    }
    texts = _Texts(tower)

    def decode(part: tuple[Shard, int]) -> _Batch:
        shard, first = part
        batch, pixels = _Batch(shard, [], [], None), []
        for row in range(first, min(first + _BATCH, shard.rows.stop)):
            photo = sources[shard.split][row]
            try:
                pixels.append(prepare[shard.split](photo.pop("image"), row))
                batch.photos.append(photo)
            except ImageError as error:
                batch.failures.append({"id": photo["id"], "reason": str(error)})
        batch.prepared = np.concatenate(pixels) if pixels else None
        return batch

    def embed(batch: _Batch) -> _Batch:
        if batch.prepared is not None:
            batch.images, batch.prepared = tower.images(batch.prepared), None
        return batch

    def encoded(batches: Iterable[_Batch], ledger: dict[str, Any]) -> Iterator[bytes]:
        for batch in batches:
            rows = _encode(batch, texts, layout)
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
        for shard, shard_batches in itertools.groupby(batches, key=lambda batch: batch.shard):
            ledger: dict[str, Any] = {"records": 0, "width": tower.width, "failures": []}
            file = records.shard_path(shard.stage, shard.split, shard.number, shard.count)
            records.write_shard(file, encoded(shard_batches, ledger))
            shard.finish([file], id_bytes=id_bytes, **ledger)


def _encode(batch: _Batch, texts: "_Texts", layout: records.Layout) -> list[bytes]:
    """Returns a batch's records, one per image. The records of a photo's views are consecutive."""
    if batch.images is None:
        return []
    photos = batch.photos
    names = [field.name for field in layout.fields if field.name in ("id", "author", "source")]
    columns = {name: np.array([photo[name].encode() for photo in photos]) for name in names}
    columns |= {name: np.array([photo[name] for photo in photos]) for name in ("coordinates", "tokens")}
    columns["captured"] = np.array([photo.get("captured", math.nan) for photo in photos])
    columns["text"] = texts([place_text(photo["city"], photo["state"], photo["country"]) for photo in photos])
    copies = len(batch.images) // len(photos)
    repeated = {name: np.repeat(values, copies, axis=0) for name, values in columns.items()}
    return layout.encode({**repeated, "image": batch.images})


class _Texts:
    """Encodes texts with the backbone, and caches the features: there are far fewer place names than photos."""

    def __init__(self, tower: backbone.Backbone):
        self._tower, self._cache = tower, {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        new = list(dict.fromkeys(text for text in texts if text not in self._cache))
        if new:
            self._cache.update(zip(new, self._tower.texts(new), strict=True))
        return np.stack([self._cache[text] for text in texts])


def _ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[Result]:
    """Yields function(item) for each item, in the order of the items. The calls run in a pool.

    limit: largest number of calls that are running, or whose results were not yet yielded.
    """
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            if len(pending) == limit:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


#: Function that decodes a photo for the backbone: (encoded image, row of the photo) -> pixels [n, h, w, 3]. The n
#: pictures are the photo itself (n = 1), or its n views.
_Prepare = Callable[[bytes, int], np.ndarray]


def _photo_split(split: str) -> str:
    """Returns the split of photos/ from which a split of features/ is made."""
    return views.SOURCE_SPLIT if split == views.VIEWS_SPLIT else split


def _prepare_photo(tower: backbone.Backbone) -> _Prepare:
    return lambda image, row: tower.prepare(image)[None]


def _prepare_views(tower: backbone.Backbone, options: views.ViewsSettings) -> _Prepare:
    side = math.ceil(tower.min_side / options.crop)
    return lambda image, row: np.stack(
        [tower.prepare(view) for view in views.views(open_image(image, side), row, options)]
    )
