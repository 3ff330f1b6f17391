"""The stage `prepare`: checks a source's photos, computes their tokens, and stores both as a TFDS data set in photos/.

photos/NAME/VERSION/ contains the data set. Processes write its shards independently: on this machine or, with Apache
Beam, on several machines that share the work directory. Both ways give shards of the same bytes.

Each shard has a ledger, a JSON file with the numbers of photos and drops. The ledger is written after the shard's other
files, and marks the shard as complete. So a run after an interruption makes only the missing shards. Ids and authors
are never used in paths, so an id such as `../../x` does no harm.

After all shards are complete, duplicates are found. If a picture is in several splits, it stays in only one kind of
split: in test splits before `validation`, and in `validation` before `train`. It is removed from the shards of the
other splits. If there are several sources, train photos over the cap of their source are removed too.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from data_prep import dataset, duplicates, extended, images, sharded, source_files
from data_prep.beam import run_tasks
from data_prep.extended import INCOMPLETE, Extended, kept_shards
from data_prep.sources import NOT_DOWNLOADED, Drop, NotedSource, Photo, Source, folder
from data_prep.sources.benchmarks import Benchmark, WithBenchmarks
from data_prep.sources.earthview import EarthView
from data_prep.sources.folder import Folder
from data_prep.sources.im2gps3k import Im2gps3k
from data_prep.sources.mixed import Mixed
from data_prep.sources.mp16_pro import MP16Pro
from data_prep.sources.osv5m import Osv5m
from data_prep.sources.yfcc import Yfcc
from geotoken_jax import disk, records
from geotoken_jax.configuration import Config
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.manifests import EARLIER, LEDGERS, Manifest, Stage, StageError, read_ledger, write_bytes, write_ledger
from geotoken_jax.preparation import BeamSettings, DatasetSettings, DuplicateSettings, PhotosSettings, SourceSettings
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Workdir

#: Name of a source -> its class. The settings of a source are the section of this name in config.photos.
SOURCES = {
    "earthview": EarthView,
    "folder": Folder,
    "im2gps3k": Im2gps3k,
    "yfcc": Yfcc,
    "osv5m": Osv5m,
    "mp16_pro": MP16Pro,
}
#: Number of photos whose tokens are computed at a time.
_BATCH = 256
#: Earliest plausible time of a photo, 3 March 1973, in seconds since 1970. A lower number in a table is usually not a
#: number of seconds, but a zero, a year, a date such as 20150401, or a number of days.
_EARLIEST = 1e8
#: Plausible times are before this one, 19 January 2038. It is fixed because photos/ must not depend on today's date.
#: Some tables write this number for an unknown time. A higher number is usually a number of milliseconds.
_LATEST = 2.0**31 - 1
#: Reason for a drop if another split has the photo's picture. Like NOT_DOWNLOADED, such a drop is not a fault of the
#: source, and does not count for config.photos.max_dropped.
_IN_ANOTHER_SPLIT = "duplicate in another split"
#: Reason for a drop if config.photos.sources.NAME.cap is smaller than the number of the source's train photos. This is
#: no fault either.
_OVER_CAP = "over the cap of its source"
#: Key of a ledger with the photos that were removed from the shard -> reason for these drops.
_REMOVED = {"left_out": _IN_ANOTHER_SPLIT, "over_cap": _OVER_CAP}
#: Split -> rank; every other split is a test split and has _TEST_RANK. If a picture is in several splits, only its
#: photos of the highest rank stay. Test splits rank highest because they must stay complete: otherwise scores on them
#: could not be compared with published ones.
_RANKS = {"train": 0, "validation": 1}
_TEST_RANK = 2
#: Subfolder of photos/ in which Beam's workers write their shards.
_ATTEMPTS = "attempts"
#: Subfolder of photos/ with a folder per source, in which MP16-Pro stores its index if there are several sources.
_SURVEYS = "surveys"


#: Default settings, as in configs/common.py. A manifest of photos/ has these sections only if they are not the default.
_DATASET = DatasetSettings("", "1.0.0", "", "", "", "")
_DUPLICATES = DuplicateSettings(difference=3.0, keep=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of config.photos that change the photos of every source. PhotosSettings explains them.

    mixed: name -> settings of each of several sources; empty if there is one source.
    """

    null_island: bool = False
    keep_changed: bool = False
    dataset: DatasetSettings = _DATASET
    duplicates: DuplicateSettings = _DUPLICATES
    mixed: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes photos/ from config.photos.

    Raises SettingsError for an unknown source, StageError if too many photos are dropped or an id is in two shards.
    """
    photos = config.photos
    if not photos.sources and photos.source not in SOURCES:
        raise SettingsError(f"config.photos.source is {photos.source!r}: use one of {', '.join(SOURCES)}")
    # Only the section of the chosen source is recorded: a change in another section does not make photos/ outdated.
    keys = ["photos.sources"] if photos.sources else ["photos.source", f"photos.{photos.source}"]
    options = Options(**{field.name: getattr(photos, field.name) for field in dataclasses.fields(Options)})
    for name in ("null_island", "dataset", "duplicates"):  # not in the manifests of earlier versions
        if getattr(options, name) != getattr(Options(), name):
            keys.append(f"photos.{name}")
    stage = workdir.begin(config, "photos", keys, inputs=())
    source = _source(photos, stage.path)
    if isinstance(source, EarthView):
        # Duplicates stay in EarthView, because they are no copies: two authors have photographed the same pixels of a
        # map. Otherwise 3 of 32,000 photos of `train` would be removed.
        options = dataclasses.replace(options, duplicates=dataclasses.replace(options.duplicates, keep=True))
    if config.benchmarks.used:
        source = WithBenchmarks(source, tuple(Benchmark(*one) for one in config.benchmarks.used.items()))
    manifest = make(stage, source, photos.workers, photos.max_dropped, photos.beam, options, workdir.update)
    if manifest != stage.manifest:
        workdir.made.add("photos")
    return [manifest]


def _source(photos: PhotosSettings, folder: epath.Path) -> Source:
    """Returns the source that config.photos names. folder: folder of the stage."""

    def one(kind: str, settings: Any, work: epath.Path) -> Source:
        # MP16-Pro also needs a folder, in which it stores an index of its files.
        return MP16Pro(settings, str(work)) if kind == "mp16_pro" else SOURCES[kind](settings)

    if not photos.sources:
        return one(photos.source, getattr(photos, photos.source), folder)
    sources = {name: one(of.kind, of.section, folder / _SURVEYS / name) for name, of in photos.mixed.items()}
    return Mixed.of(sources, photos.mixed)


def make(
    stage: Stage,
    source: Source,
    workers: int,
    max_dropped: float,
    beam: BeamSettings | None = None,
    options: Options = Options(),
    update: bool = False,
) -> Manifest:
    """Fills the folder photos/ from a source and returns its manifest. If the folder is complete, nothing is done.

    workers, max_dropped: see PhotosSettings. beam: see PhotosSettings; if None, only processes on this machine are
    used. options: keys of config.photos that change the photos. update: whether new photos of the source are added to a
    complete folder.

    Raises StageError if too many photos are dropped, if two shards contain the same id, or if Beam does not make all
    shards. Also raises StageError if the source has changed since the folder was completed, unless `update` allows it.
    """
    folder.forget()
    extended.forget()
    if not (stage.manifest or stage.mended or stage.earlier):
        _ = source.splits  # names a missing setting, before the files of the source are compared
    benchmarks = source.benchmarks if isinstance(source, WithBenchmarks) else ()
    unrecorded = source.of_source() if isinstance(source, WithBenchmarks) else None
    stage = source_files.check(stage, source, options.keep_changed, update, unrecorded)
    if stage.manifest:
        return stage.manifest
    if stage.earlier:
        source = Extended(source, str(stage.path / EARLIER / "1"))  # pyright: ignore[reportArgumentType]
    if isinstance(source, NotedSource):
        for note in source.notes():
            print(note, file=sys.stderr)
    tasks = _tasks(stage, source, options)
    _make_missing(stage, tasks, workers, beam)
    ids = _concatenated([task.ids for task in tasks])
    _check_unique_ids(tasks, {benchmark.name for benchmark in benchmarks})
    left_out, found = _find_duplicates(stage, tasks, ids, options.duplicates)
    _add_over_cap(left_out, tasks, options.mixed)
    found |= _remove(tasks, left_out, workers)
    ledgers: dict[str, list[dict[str, Any]]] = {split: [] for split in source.splits}
    for task in tasks:
        ledgers[task.split].append(json.loads(task.ledger.read_text()))
    if isinstance(source, Extended):
        _remove_resolved_drops(tasks, ledgers)
    every = [ledger for split in ledgers.values() for ledger in split]
    counts = {split: sum(ledger["photos"] for ledger in ledgers[split]) for split in ledgers}
    drops = [tuple(drop) for ledger in every for drop in ledger["dropped"]]
    drops += [(name, reason) for ledger in every for _, name, reason in _left_out(ledger)]
    dropped = _check_dropped(stage, drops, counts, max_dropped)
    provenance = dataset.provenance(source.provenance, options.dataset)
    dataset.write(tasks[0].data, tasks[0].name, ledgers, provenance, bool(options.mixed))
    times = {name: sum(ledger[name] for ledger in every) for name in ("captured", "nonsense_times")}
    facts: dict[str, Any] = records.id_facts(max((ledger.get("id_bytes", 0) for ledger in every), default=0))
    if options.mixed:
        facts["sources"] = _count_by_source(ledgers, options.mixed)
    if benchmarks:
        facts["benchmarks"] = [benchmark.name for benchmark in benchmarks]
    return stage.finish(counts, dropped, provenance=dataclasses.asdict(provenance), duplicates=found, **times, **facts)


def _tasks(stage: Stage, source: Source, options: Options) -> list["_Task"]:
    """Returns the task of each shard, in the order of splits and shards."""
    return [
        _Task(str(stage.path), source, split, n, options.null_island, options.dataset, bool(options.mixed))
        for split, shards in source.splits.items()
        for n in range(shards)
    ]


def _make_missing(stage: Stage, tasks: Sequence["_Task"], workers: int, beam: BeamSettings | None) -> None:
    """Makes the shards that are missing."""
    (stage.path / LEDGERS).mkdir(exist_ok=True)
    missing = [task for task in tasks if not (read_ledger(task.ledger) or task.keep())]
    with Progress("photos", len(tasks), "shards", done=len(tasks) - len(missing)) as progress:
        if beam and beam.runner and missing:
            run_tasks(_make_attempt, missing, beam)
            progress.add(len(missing))
            if not all(read_ledger(task.ledger) for task in missing):
                raise StageError(
                    f"{beam.runner} has made all shards, but not all are in {stage.path}: mount this folder, and the "
                    "folder of the source's photos, under the same full path on every machine"
                )
        else:
            for photos in _run_all(_make_shard, missing, workers):
                progress.add(note=f"{photos:,} photos in the last shard")
    if (stage.path / _ATTEMPTS).exists():  # from workers that were killed
        (stage.path / _ATTEMPTS).rmtree()


def _check_dropped(
    stage: Stage, drops: Sequence[tuple[str, str]], counts: Mapping[str, int], max_dropped: float
) -> Counter[str]:
    """Writes dropped.jsonl and returns reason -> number of drops.

    Raises StageError if the share of photos that were dropped for faults exceeds max_dropped.

    drops: pairs of an id and a reason. counts: split -> number of photos that were not dropped.
    """
    lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in drops]
    write_bytes(stage.path / "dropped.jsonl", "".join(lines).encode())
    dropped = Counter(reason for _, reason in drops)
    faults = len(drops) - sum(dropped[reason] for reason in (NOT_DOWNLOADED, _IN_ANOTHER_SPLIT, _OVER_CAP))
    # Photos over a cap are no faults: a small cap must not raise the share.
    share = faults / max(1, faults + sum(counts.values()) + dropped[_OVER_CAP])
    if share > max_dropped:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        raise StageError(
            f"{share:.1%} of the photos were dropped ({reasons}), more than config.photos.max_dropped = "
            f"{max_dropped}{_hint(dict(reversed([(reason, name) for name, reason in drops])))}: read "
            f"{stage.path / 'dropped.jsonl'}, then fix the source or raise the limit"
        )
    return dropped


def _hint(names: Mapping[str, str]) -> str:
    """Returns a text for an error message: how to prevent two common kinds of drops; "" if there are none of them.

    names: reason -> id of the first photo that was dropped for this reason.
    """
    if "no image" in names and "no metadata" in names:
        return (
            f"; the table has {names['no image']!r}, which is no file, and the folder has {names['no metadata']!r}, "
            "which is not in the table"
        )
    if "link out of the folder" in names:
        return (
            f"; {names['link out of the folder']!r} is a link to a file outside the folder, so copy the folder with "
            "cp -rL, or name a folder that has these files too"
        )
    return ""


#: Row in the shard, id, and reason for the drop of a photo that is removed from a shard.
_LeftOut = tuple[int, str, str]


@dataclasses.dataclass(frozen=True)
class _Task:
    """A shard of photos/ to make, and the paths of its four files.

    folder: path of photos/. source: source that the shard is read from. split, shard: split, and number of the shard in
    it. null_island: whether photos at latitude 0, longitude 0 are kept. dataset: see DatasetSettings. sources: whether
    records contain the name of the photo's source. left_out: row, id and reason of each photo to remove.
    """

    folder: str
    source: Source
    split: str
    shard: int
    null_island: bool
    dataset: DatasetSettings
    sources: bool = False
    left_out: tuple["_LeftOut", ...] = ()

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.dataset.name or self.source.name

    @property
    def data(self) -> epath.Path:
        """Folder of the data set, where TFDS looks for it."""
        return epath.Path(self.folder) / self.name / self.dataset.version

    @property
    def shard_path(self) -> epath.Path:
        """Path of the records."""
        return records.shard_path(self.data, f"{self.name}-{self.split}", self.shard, self.source.splits[self.split])

    @property
    def ids(self) -> epath.Path:
        """Path of an array with the ids of all accepted photos, also of those that were removed later as duplicates."""
        return epath.Path(self.folder) / LEDGERS / f"{self.shard_path.name}.ids.npy"

    @property
    def fingerprints(self) -> epath.Path:
        """Path of an array of `duplicates.FINGERPRINT`, one per id in `ids`."""
        return epath.Path(self.folder) / LEDGERS / f"{self.shard_path.name}.fingerprints.npy"

    @property
    def ledger(self) -> epath.Path:
        """Path of a JSON file with counts and drops, written last.

        After photos were removed from the records, its keys in _REMOVED have their rows and ids.
        """
        return epath.Path(self.folder) / LEDGERS / f"{self.shard_path.name}.json"

    @property
    def kept(self) -> bool:
        """Whether this is an earlier shard, made before photos were added to the source."""
        return isinstance(self.source, Extended) and self.shard < kept_shards(self.source.before).get(self.split, 0)

    def keep(self) -> bool:
        """Reuses the files of an earlier shard. Returns False if this is a new shard, which has to be made."""
        if not self.kept:
            return False
        assert isinstance(self.source, Extended)
        before, name = epath.Path(self.source.before), self.ledger.name
        (path,) = disk.matching(before / LEDGERS, f"*-{self.split}.array_record-{self.shard:05d}-of-?????.json")
        sharded.take_over(path, self.ledger, path.name[-19:-5], name[-19:-5])
        return True


def _run_all(function: Callable[[_Task], int], tasks: list[_Task], workers: int) -> Iterator[int]:
    """Yields function(task) for each task, in any order. The calls run in worker processes."""
    if workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _exit_with_parent) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(function, task) for task in tasks]):
                yield done.result()
        except BrokenProcessPool:
            raise StageError(
                f"one of {workers} worker processes was killed, perhaps because the memory is used up: set "
                "config.photos.workers to fewer, and run the same command again"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _exit_with_parent() -> None:
    """Makes this worker process end when its parent process is killed.

    Otherwise the worker could still write a shard while a second run of the command writes the same shard. The worker
    ignores Ctrl-C: the parent process handles it, lets workers finish their current shards and cancels the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()  # pyright: ignore[reportOptionalMemberAccess]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _make_shard(task: _Task) -> int:
    """Writes the four files of a shard. Returns the number of photos."""
    ids: dict[str, None] = {}
    fingerprints: list[np.ndarray] = []
    dropped: list[tuple[str, str]] = []
    sizes: list[int] = []
    longest, source = 0, ""
    times = {"captured": 0, "nonsense_times": 0}

    def accepted() -> Iterator[Photo]:
        nonlocal longest, source
        for item in task.source.read(task.split, task.shard):
            reason = (
                item.reason
                if isinstance(item, Drop)
                else drop_reason(item, task.null_island) or ("repeated id" if item.id in ids else "")
            )
            if isinstance(item, Drop) or reason:
                dropped.append((item.id.encode(errors="backslashreplace").decode(), reason))
            else:
                ids[item.id], source = None, item.source
                fingerprints.append(duplicates.fingerprint(item.image))
                longest = max(longest, len(item.id.encode()), len(item.author.encode()))
                valid = plausible(item.captured)
                times["captured"] += valid
                times["nonsense_times"] += not (valid or math.isnan(item.captured))
                yield item if valid else dataclasses.replace(item, captured=math.nan)

    def encoded() -> Iterator[bytes]:
        for record in encode(accepted(), task.sources):
            sizes.append(len(record))
            yield record

    task.data.mkdir(parents=True, exist_ok=True)
    task.ledger.parent.mkdir(parents=True, exist_ok=True)
    n = records.write_shard(task.shard_path, encoded())
    names = [name.encode() for name in ids]
    records.save_array(task.ids, np.array(names, f"S{max(records.ID_BYTES, *map(len, names), 0)}"))
    records.save_array(task.fingerprints, np.array(fingerprints, duplicates.FINGERPRINT))
    facts = {**records.id_facts(longest), **({"source": source} if source else {})}
    values = {"photos": n, "bytes": sum(sizes), "dropped": dropped, **times, **facts}
    write_ledger(task.ledger, [task.shard_path, task.ids, task.fingerprints], **values)
    return n


def _find_duplicates(
    stage: Stage, tasks: Sequence[_Task], ids: np.ndarray, options: DuplicateSettings
) -> tuple[list[list[_LeftOut]], dict[str, int]]:
    """Finds duplicates. Returns the photos to remove from each shard because their picture is in another split, and
    counts.

    A photo of `train` is removed if its picture is in another split. A photo of `validation` is removed if its picture
    is in a test split. Two test splits may share a picture, because no model is trained on them. If options.keep is
    true, nothing is removed.

    Writes duplicates.jsonl, with one line per group of duplicates.

    ids: ids of all photos, in the order of the tasks.
    """
    groups, equal = duplicates.groups(_concatenated([task.fingerprints for task in tasks]), options.difference)
    starts = np.cumsum([0, *(len(records.open_array(task.ids)) for task in tasks)])
    left_out: list[list[_LeftOut]] = [[] for _ in tasks]
    lines = []
    for group in groups:
        shards = np.searchsorted(starts, group, side="right") - 1
        ranks = [_RANKS.get(tasks[shard].split, _TEST_RANK) for shard in shards]
        photos = []
        for row, shard, rank in zip(group, shards, ranks, strict=True):
            photos.append({"split": tasks[shard].split, "id": bytes(ids[row]).decode()})
            if rank < max(ranks) and not options.keep:
                left_out[shard].append((int(row - starts[shard]), photos[-1]["id"], _IN_ANOTHER_SPLIT))
        lines.append(json.dumps(photos) + "\n")
    write_bytes(stage.path / "duplicates.jsonl", "".join(lines).encode())
    return left_out, {"groups": len(groups), "photos": sum(map(len, groups)), "equal_bytes": equal}


def _add_over_cap(
    left_out: Sequence[list[_LeftOut]], tasks: Sequence[_Task], sources: Mapping[str, SourceSettings]
) -> None:
    """Adds the train photos over the cap of their source to the photos that are removed from each shard.

    Photos with the smallest hashes of their ids stay. So the choice does not depend on shards, and the photos of a
    smaller cap are among the photos of a larger one. sources: name -> settings of the source.
    """
    for name, source in sources.items():
        if not source.cap:
            continue
        shards = [n for n, task in enumerate(tasks) if task.split == "train" and _source_of(task) == name]
        if not shards:
            continue
        names = [np.array(records.open_array(tasks[n].ids)) for n in shards]
        kept = [
            np.delete(np.arange(len(of)), [row for row, *_ in left_out[n]]) for n, of in zip(shards, names, strict=True)
        ]
        shard = np.repeat(np.arange(len(shards)), [len(rows) for rows in kept])
        rows = np.concatenate(kept)
        ids = np.concatenate([of[some] for of, some in zip(names, kept, strict=True)])
        hashes = np.fromiter(map(_hash, ids.tolist()), np.uint64, len(ids))
        for at in np.sort(np.argsort(hashes, kind="stable")[source.cap :]):
            left_out[shards[shard[at]]].append((int(rows[at]), bytes(ids[at]).decode(), _OVER_CAP))


def _source_of(task: _Task) -> str:
    """Returns the name of the source of a complete shard; "" if there is one source, or the shard has no photos."""
    return json.loads(task.ledger.read_text()).get("source", "")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


def _count_by_source(
    ledgers: Mapping[str, Sequence[Mapping[str, Any]]], sources: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Returns source -> split -> number of photos, and prints it. ledgers: split -> contents of the ledgers."""
    counts: dict[str, dict[str, int]] = {name: {} for name in sources}
    for split, of_split in ledgers.items():
        for ledger in of_split:
            if name := ledger.get("source"):
                counts[name][split] = counts[name].get(split, 0) + ledger["photos"]
    for name, of in counts.items():
        print(f"source {name}: {', '.join(f'{split} {n:,}' for split, n in of.items()) or 'no photos'}", flush=True)
    return counts


def _remove(tasks: Sequence[_Task], left_out: list[list[_LeftOut]], workers: int) -> dict[str, int]:
    """Removes photos from shards. Returns counts of duplicates: `left_out`, and `remaining` if it is not 0.

    Earlier shards, made before photos were added to the source, do not change. The count `remaining` is the number of
    their duplicates that should have been removed. left_out: photos to remove from each shard.
    """
    before = [_left_out(json.loads(task.ledger.read_text())) for task in tasks]
    remaining = 0
    for n, task in enumerate(tasks):
        if task.kept:
            remaining += sum(reason == _IN_ANOTHER_SPLIT for *_, reason in set(left_out[n]) - set(before[n]))
            left_out[n] = before[n]
    changes = [n for n, photos in enumerate(left_out) if photos != before[n]]
    for _ in _run_all(
        _remove_left_out, [dataclasses.replace(tasks[n], left_out=tuple(left_out[n])) for n in changes], workers
    ):
        pass
    removed = sum(reason == _IN_ANOTHER_SPLIT for photos in left_out for *_, reason in photos)
    return {"left_out": removed, **({"remaining": remaining} if remaining else {})}


def _concatenated(files: Sequence[epath.Path]) -> np.ndarray:
    """Returns the concatenation of arrays in files. Only one file is open at a time."""
    return np.concatenate([np.array(records.open_array(file)) for file in files])


def _left_out(ledger: Mapping[str, Any]) -> list[_LeftOut]:
    """Returns the photos that were removed from a shard. ledger: contents of its ledger."""
    return [(row, name, reason) for key, reason in _REMOVED.items() for row, name in ledger.get(key, [])]


def _remove_left_out(task: _Task) -> int:
    """Writes a shard again without the photos in `task.left_out`. Returns the number of remaining photos.

    If photos were already removed from the shard, it is first made again from the source.
    """
    if _left_out(json.loads(task.ledger.read_text())):
        _make_shard(task)
    ledger = json.loads(task.ledger.read_text())
    del ledger["files"]
    removed = {row for row, *_ in task.left_out}
    reader = ArrayRecordReader(str(task.shard_path))
    sizes: list[int] = []

    def kept() -> Iterator[bytes]:
        for row in range(reader.num_records()):
            record = reader.read()
            if row not in removed:
                sizes.append(len(record))
                yield record

    if removed:
        records.write_shard(task.shard_path, kept())
        lists = {key: [one[:2] for one in task.left_out if one[2] == reason] for key, reason in _REMOVED.items()}
        changed = {
            "photos": len(sizes),
            "bytes": sum(sizes),
            **{key: photos for key, photos in lists.items() if photos},
        }
        write_ledger(task.ledger, [task.shard_path, task.ids, task.fingerprints], **{**ledger, **changed})
    reader.close()
    return len(sizes)


def _make_attempt(task: _Task) -> None:
    """Writes a shard in a temporary folder, then moves its files into place, the ledger last.

    If a Beam runner loses contact with a machine, it may start the task again on another one. Both attempts can then
    run at the same time, so each needs its own folder.
    """
    folder = epath.Path(task.folder) / _ATTEMPTS / uuid.uuid4().hex
    (folder / LEDGERS).mkdir(parents=True)
    task.data.mkdir(parents=True, exist_ok=True)
    attempt = dataclasses.replace(task, folder=str(folder))
    _make_shard(attempt)
    for source, target in (
        (attempt.shard_path, task.shard_path),
        (attempt.ids, task.ids),
        (attempt.fingerprints, task.fingerprints),
        (attempt.ledger, task.ledger),
    ):
        source.replace(target)
    folder.rmtree()


def drop_reason(photo: Photo, null_island: bool = False) -> str:
    """Returns the reason to drop a photo; "" if it is kept. null_island: see PhotosSettings."""
    coordinates = photo.latitude, photo.longitude
    if not photo.id:
        return "empty id"
    if not photo.id.isprintable():  # contains control characters, or surrogates, which UTF-8 cannot encode
        return "unprintable id"
    if len(photo.id.encode()) > records.LONGEST_ID:
        return "long id"
    if len(photo.author.encode(errors="replace")) > records.LONGEST_ID:
        return "long author"
    if not all(map(math.isfinite, coordinates)):
        return "coordinates not finite"
    if abs(photo.latitude) > 90 or abs(photo.longitude) > 180:
        return "coordinates out of range"
    if not (any(coordinates) or null_island):
        return "null island"
    return images.drop_reason(photo.image)


def plausible(captured: float) -> bool:
    """Returns whether a time in seconds since 1970 is between March 1973 and January 2038."""
    return _EARLIEST <= captured < _LATEST


def encode(photos: Iterable[Photo], sources: bool = False) -> Iterator[bytes]:
    """Yields one record per photo, in the form of `records.photo_features`. sources: see there."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer  # here, as it takes 0.3 s

    features = records.photo_features(sources)
    serializer = ExampleSerializer(features.get_serialized_info())
    scheme = CellScheme(level=20, group=1)
    photos = iter(photos)
    while batch := list(itertools.islice(photos, _BATCH)):
        coordinates = np.array([(photo.latitude, photo.longitude) for photo in batch], np.float64)
        tokens = np.asarray(scheme.encode(coordinates[:, 0], coordinates[:, 1])).astype(np.uint8)
        for photo, position, cells in zip(batch, coordinates, tokens, strict=True):
            names = ("id", "author", *records.PLACE_FIELDS, *(("source",) if sources else ()))
            text = {name: getattr(photo, name) for name in names}
            numbers = {"coordinates": position, "tokens": cells, "captured": np.float64(photo.captured)}
            row = features.encode_example({**text, "image": photo.image, **numbers})
            # By default, the order of a protobuf map differs between processes, and shards would not be reproducible.
            yield serializer.get_tf_example(row).SerializeToString(deterministic=True)


def _remove_resolved_drops(tasks: Sequence[_Task], ledgers: Mapping[str, list[dict[str, Any]]]) -> None:
    """Removes drops from the ledgers of earlier shards, if the missing row or image is now in a new shard.

    Such a drop is for a row without an image, an image without a row, or an incomplete image. It is removed if a new
    shard has a photo or drop with its id.

    ledgers: split -> contents of each shard's ledger.
    """
    new = [task for task in tasks if not task.kept]
    found = {name.decode() for task in new for name in records.open_array(task.ids).tolist()}
    found |= {name for task in new for name, _ in ledgers[task.split][task.shard]["dropped"]}
    for task in tasks:
        ledger = ledgers[task.split][task.shard]
        if task.kept:
            drops = [drop for drop in ledger["dropped"] if drop[1] not in INCOMPLETE or drop[0] not in found]
            ledgers[task.split][task.shard] = {**ledger, "dropped": drops}


def _check_unique_ids(tasks: Sequence[_Task], benchmarks: Collection[str]) -> None:
    """Raises StageError if an id is in two shards of the source, or in two shards of one benchmark.

    benchmarks: names of the benchmarks, each of which is a split.
    """
    parts: dict[str, list[epath.Path]] = {}
    for task in tasks:
        parts.setdefault(task.split if task.split in benchmarks else "", []).append(task.ids)
    for part, files in parts.items():
        ids = _concatenated(files)
        names, counts = np.unique(ids, return_counts=True)
        if len(names) < len(ids):
            repeated = names[counts > 1]
            raise StageError(
                f"{len(repeated)} ids, such as {repeated[0].decode()!r}, are in more than one shard: remove the "
                f"repeated photos from {f'the benchmark {part}' if part else 'the source'}"
            )
