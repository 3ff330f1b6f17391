"""The stage `prepare`: photos of a source, checked, with their tokens, as a TFDS data set in photos/.

Processes write shards independently of each other, on this machine or, by Apache Beam, on several that share the work
directory. A shard is done when its ledger is there, which is written last, so an interrupted run makes only what is
missing and ends in the same bytes, whichever engine each run has. Ids and authors are never used as paths or
parts of them: an id like `../../x` is just a name.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from data_prep import images
from data_prep.beam import run_tasks
from data_prep.sources import Drop, Photo, Source
from data_prep.sources.earthview import EarthView
from data_prep.sources.folder import Folder
from data_prep.sources.im2gps3k import Im2gps3k
from data_prep.sources.mp16_pro import MP16Pro
from data_prep.sources.osv5m import Osv5m
from data_prep.sources.yfcc import Yfcc
from geotoken_jax import records
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.preparation import BeamSettings
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Manifest, Stage, StageError, write_bytes, write_json

#: Name of a source, and of its section of config.photos -> the source.
SOURCES = {
    "earthview": EarthView,
    "folder": Folder,
    "im2gps3k": Im2gps3k,
    "yfcc": Yfcc,
    "osv5m": Osv5m,
    "mp16_pro": MP16Pro,
}
#: Photos whose tokens are computed together.
_BATCH = 256
#: What a number of seconds must reach to be a time, that of March 1973: below are zeros, years, dates and days.
_EARLIEST = 1e8
#: Folder of the shards that Beam has begun.
_ATTEMPTS = "attempts"


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes photos/ from config.photos.

    Raises SettingsError for an unknown source, StageError if too many photos are dropped or two have one id.
    """
    photos = config.photos
    if photos.source not in SOURCES:
        raise SettingsError(f"config.photos.source is {photos.source!r}: use one of {', '.join(SOURCES)}")
    chosen = getattr(photos, photos.source)
    # Other sources are not read.
    stage = workdir.begin(config, "photos", ["photos.source", f"photos.{photos.source}"], inputs=())
    kind = SOURCES[photos.source]
    # MP16-Pro is surveyed once; what was found is kept beside the shards that are cut by it.
    source = MP16Pro(chosen, str(stage.path)) if kind is MP16Pro else kind(chosen)
    return [make(stage, source, photos.workers, photos.max_dropped, photos.beam)]


def make(stage: Stage, source: Source, workers: int, max_dropped: float, beam: BeamSettings | None = None) -> Manifest:
    """Fills a stage's folder from a source unless it is complete; see PhotosSettings for the arguments."""
    if stage.manifest:
        return stage.manifest
    tasks = [_Task(str(stage.path), source, split, n) for split, shards in source.splits.items() for n in range(shards)]
    (stage.path / "ledgers").mkdir(exist_ok=True)
    missing = [task for task in tasks if not (task.ledger.exists() and task.shard_path.exists())]
    with Progress("photos", len(tasks), "shard", done=len(tasks) - len(missing)) as progress:
        if beam and beam.runner and missing:
            run_tasks(_make_apart, missing, beam)
            progress.add(len(missing))
            if not all(task.ledger.exists() for task in missing):
                raise StageError(
                    f"{beam.runner} has made all shards, but not all are in {stage.path}: every machine must have this "
                    "folder, and the photos', under the same full path"
                )
        else:
            for photos in _run_all(missing, workers):
                progress.add(note=f"{photos:,} photos in the last")
    if (stage.path / _ATTEMPTS).exists():  # those that were killed
        (stage.path / _ATTEMPTS).rmtree()

    ledgers: dict[str, list[dict[str, Any]]] = {split: [] for split in source.splits}
    for task in tasks:
        ledgers[task.split].append(json.loads(task.ledger.read_text()))
    every = [ledger for split in ledgers.values() for ledger in split]
    drops = [drop for ledger in every for drop in ledger["dropped"]]
    lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in drops]
    write_bytes(stage.path / "dropped.jsonl", "".join(lines).encode())
    dropped = Counter(reason for _, reason in drops)
    counts = {split: sum(ledger["photos"] for ledger in ledgers[split]) for split in ledgers}
    share = len(drops) / max(1, len(drops) + sum(counts.values()))
    if share > max_dropped:
        raise StageError(
            f"{share:.1%} of the photos were dropped ({dict(dropped)}), more than config.photos.max_dropped = "
            f"{max_dropped}: look at {stage.path / 'dropped.jsonl'}, then mend the source or raise the limit"
        )
    _refuse_repeated(tasks)
    _describe(stage.path, source.name, ledgers)
    times = {name: sum(ledger[name] for ledger in every) for name in ("captured", "nonsense_times")}
    return stage.finish(counts, dropped, provenance=dataclasses.asdict(source.provenance), **times)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to make. ids: of its photos, in order; ledger: its counts and drops, written last of the three."""

    folder: str
    source: Source
    split: str
    shard: int

    @property
    def shard_path(self) -> epath.Path:
        stem = f"{self.source.name}-{self.split}"
        return records.shard_path(epath.Path(self.folder), stem, self.shard, self.source.splits[self.split])

    @property
    def ids(self) -> epath.Path:
        return epath.Path(self.folder) / "ledgers" / f"{self.shard_path.name}.ids.npy"

    @property
    def ledger(self) -> epath.Path:
        return epath.Path(self.folder) / "ledgers" / f"{self.shard_path.name}.json"


def _run_all(tasks: list[_Task], workers: int) -> Iterator[int]:
    if workers == 1 or len(tasks) < 2:
        yield from map(_make_shard, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _end_with_parent) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(_make_shard, task) for task in tasks]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process when its parent is killed: two runs must never write one shard at a time.

    An interrupt from the keyboard is the parent's to handle: it lets begun shards end and cancels the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()  # pyright: ignore[reportOptionalMemberAccess]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _make_shard(task: _Task) -> int:
    """Writes the shard, its ids and its ledger; returns the number of photos."""
    ids: dict[str, None] = {}
    dropped: list[tuple[str, str]] = []
    sizes: list[int] = []
    times = {"captured": 0, "nonsense_times": 0}

    def kept() -> Iterator[Photo]:
        for item in task.source.read(task.split, task.shard):
            reason = item.reason if isinstance(item, Drop) else fault(item) or ("repeated id" if item.id in ids else "")
            if isinstance(item, Drop) or reason:
                dropped.append((item.id.encode(errors="backslashreplace").decode(), reason))
            else:
                ids[item.id] = None
                known = plausible(item.captured)
                times["captured"] += known
                times["nonsense_times"] += not (known or math.isnan(item.captured))
                yield item if known else dataclasses.replace(item, captured=math.nan)

    def encoded() -> Iterator[bytes]:
        for record in encode(kept()):
            sizes.append(len(record))
            yield record

    n = records.write_shard(task.shard_path, encoded())
    records.save_array(task.ids, np.array([name.encode() for name in ids], f"S{records.ID_BYTES}"))
    write_json(task.ledger, {"photos": n, "bytes": sum(sizes), "dropped": dropped, **times})
    return n


def _make_apart(task: _Task) -> None:
    """Makes the shard in a folder of its own and moves it from there, the ledger last.

    A runner may do a task again while it takes a first attempt's machine for lost: two writers of one file.
    """
    folder = epath.Path(task.folder) / _ATTEMPTS / uuid.uuid4().hex
    (folder / "ledgers").mkdir(parents=True)
    attempt = dataclasses.replace(task, folder=str(folder))
    _make_shard(attempt)
    for one, other in ((attempt.shard_path, task.shard_path), (attempt.ids, task.ids), (attempt.ledger, task.ledger)):
        one.replace(other)
    folder.rmtree()


def fault(photo: Photo) -> str:
    """Returns why a photo cannot be taken in, or an empty string."""
    coordinates = photo.latitude, photo.longitude
    if not photo.id:
        return "empty id"
    if not photo.id.isprintable():  # control characters, and what UTF-8 cannot encode
        return "unprintable id"
    if len(photo.id.encode()) > records.ID_BYTES:
        return "long id"
    if len(photo.author.encode(errors="replace")) > records.ID_BYTES:
        return "long author"
    if not all(map(math.isfinite, coordinates)):
        return "coordinates not finite"
    if abs(photo.latitude) > 90 or abs(photo.longitude) > 180:
        return "coordinates out of range"
    return images.fault(photo.image)


def plausible(captured: float) -> bool:
    """Says whether a number of seconds since 1970 can be when a photo was taken: from March 1973 to a day from now."""
    return _EARLIEST <= captured <= time.time() + 86_400  # a clock without an offset may be 14 hours ahead


def encode(photos: Iterable[Photo]) -> Iterator[bytes]:
    """Yields photos' records, in the form of `records.photo_features`."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer  # 0.3 s: see `records.photo_features`

    features = records.photo_features()
    serializer = ExampleSerializer(features.get_serialized_info())
    scheme = CellScheme(level=20, group=1)
    photos = iter(photos)
    while batch := list(itertools.islice(photos, _BATCH)):
        coordinates = np.array([(photo.latitude, photo.longitude) for photo in batch], np.float64)
        tokens = np.asarray(scheme.encode(coordinates[:, 0], coordinates[:, 1])).astype(np.uint8)
        for photo, where, cells in zip(batch, coordinates, tokens, strict=True):
            text = {name: getattr(photo, name) for name in ("id", "author", *records.PLACE_FIELDS)}
            numbers = {"coordinates": where, "tokens": cells, "captured": np.float64(photo.captured)}
            row = features.encode_example({**text, "image": photo.image, **numbers})
            # An example is a protobuf map, whose order differs between processes unless it is asked not to.
            yield serializer.get_tf_example(row).SerializeToString(deterministic=True)


def _refuse_repeated(tasks: list[_Task]) -> None:
    ids = np.concatenate([records.open_array(task.ids) for task in tasks])
    names, counts = np.unique(ids, return_counts=True)
    if len(names) < len(ids):
        repeated = names[counts > 1]
        raise StageError(
            f"{len(repeated)} ids are in more than one shard, {repeated[0].decode()!r} first: a photo must be in one "
            "split, once; mend the source"
        )


def _describe(folder: epath.Path, name: str, ledgers: dict[str, list[dict[str, Any]]]) -> None:
    """Writes TFDS's metadata: from here on `tfds.builder_from_directory(folder)` reads the data set.

    name: of the data set. ledgers: split -> ledger of each of its shards.
    """
    import tensorflow_datasets as tfds

    split_infos = []
    for split, of_split in ledgers.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        split_infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[ledger["photos"] for ledger in of_split],
                num_bytes=sum(ledger["bytes"] for ledger in of_split),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=records.photo_features(),
        split_infos=split_infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        description=f"Photos of {name} with their coordinates, place names and level-20 S2 tokens.",
        check_data=False,  # its check is by tf.data, and there is no TensorFlow here
    )
