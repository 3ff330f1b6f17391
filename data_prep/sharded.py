"""Divides the shards of a stage among processes: process k of n makes the shards k, k + n, k + 2 n and so on.

Processes need not run at the same time. If a process needs shards of other processes, it waits while any process writes
the folder. If no process writes the folder, it ends. The same command, run again, then continues.
"""

import dataclasses
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import disk, partition, processes
from geotoken_jax.manifests import EARLIER, LEDGERS, Manifest, Stage, read_ledger, write_json, write_ledger
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Workdir

#: Seconds between two checks for files of other processes, and seconds to wait for other processes to start.
_POLL_S, _START_S = 1.0, 60.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of rows of a split, whose files are written together by one process.

    stage: folder of the stage. split: name of the split; for shards that belong to no split, another name. rows: rows
    of the split in this shard. number: number of this shard in the split, from 0. count: number of shards of the split.
    """

    stage: epath.Path
    split: str
    rows: range
    number: int
    count: int

    @property
    def ledger(self) -> dict[str, Any] | None:
        """Contents of the ledger, or None if the shard is not complete."""
        return read_ledger(self._ledger)

    def finish(self, files: Sequence[epath.Path], **values: Any) -> None:
        """Writes the ledger, which marks the shard as complete. files, values: see manifests.write_ledger."""
        write_ledger(self._ledger, files, rows=[self.rows.start, self.rows.stop], **values)

    def keep(self, **values: Any) -> bool:
        """Reuses the files of an earlier shard, if one has the same rows. Returns whether there was one.

        Earlier shards were made before photos were added to the stage's inputs. values: keys and values that the
        earlier shard's ledger must contain.
        """
        for path in self.earlier():
            ledger = read_ledger(path)
            if ledger and all(ledger.get(name) == value for name, value in values.items()):
                number = path.stem.removeprefix(f"{self.split}-")
                take_over(path, self._ledger, number, f"{self.number:05d}-of-{self.count:05d}")
                return True
        return False

    def earlier(self) -> Iterator[epath.Path]:
        """Yields the paths of the ledgers of earlier shards with the same rows, the latest shard first.

        Earlier shards were made before photos were added to the stage's inputs.
        """
        folders = [path for path in disk.matching(self.stage / EARLIER, "*") if path.name.isdigit()]
        for folder in sorted(folders, key=lambda path: -int(path.name)):
            # An earlier shard with the same rows has the same number, because adding photos changes no shard before it.
            pattern = f"{glob.escape(self.split)}-{self.number:05d}-of-?????.json"
            for path in disk.matching(folder / LEDGERS, pattern):
                if json.loads(path.read_bytes()).get("rows") == [self.rows.start, self.rows.stop]:
                    yield path

    @property
    def _ledger(self) -> epath.Path:
        return self.stage / LEDGERS / f"{self.split}-{self.number:05d}-of-{self.count:05d}.json"


def divide(stage: Stage, counts: Mapping[str, Sequence[int]], limit: int) -> list[Shard]:
    """Returns the shards of a stage, for all processes.

    counts: split -> numbers of rows, as in partition.ranges. limit: largest number of rows per shard.
    """
    ranges = {split: partition.ranges(numbers, limit) for split, numbers in counts.items()}
    return [
        Shard(stage.path, split, rows, number, len(split_ranges))
        for split, split_ranges in ranges.items()
        for number, rows in enumerate(split_ranges)
    ]


def own(shards: Sequence[Shard]) -> Sequence[Shard]:
    """Returns the shards of this process."""
    return shards[processes.index() :: processes.count()]


def missing(shards: Sequence[Shard], **values: Any) -> list[Shard]:
    """Returns the shards that this process has to make. Earlier shards are reused first; values: see Shard.keep."""
    return [shard for shard in own(shards) if not (shard.ledger or shard.keep(**values))]


def make(shards: Sequence[Shard], needed: Sequence[Shard], label: str, write: Callable[[Shard], None]) -> None:
    """Makes shards of this process, and shows the progress.

    shards: shards of all processes. needed: the shards to make. label: name of the progress bar. write: function that
    makes one shard.
    """
    total = sum(len(shard.rows) for shard in own(shards))
    with Progress(label, total, "photos", total - sum(len(shard.rows) for shard in needed)) as progress:
        for shard in needed:
            write(shard)
            progress.add(len(shard.rows))


def wait(stage: Stage, shards: Sequence[Shard]) -> bool:
    """Waits for the shards of other processes. Returns whether all shards are complete.

    The wait ends when all shards are complete, or when no other process has been writing the folder for _START_S
    seconds. In the second case the missing shards are reported, and this process gives up its lock on the folder.
    """
    left, waited = list(shards), 0.0
    while left := [shard for shard in left if not shard.ledger]:
        if disk.writers(stage.path):
            waited = 0.0
        elif waited >= _START_S:
            print(
                f"made the shards of this process; {stage.path} lacks {len(left):,} of {len(shards):,} shards, which "
                "other processes make: when they have ended, run the same command again",
                flush=True,
            )
            disk.unlock(stage.path)
            return False
        time.sleep(_POLL_S)
        waited += _POLL_S
    return True


def complete(workdir: Workdir, stage: Stage, finish: Callable[[], Manifest]) -> Manifest:
    """Completes a stage after all its shards are complete, and returns the manifest.

    Of the processes that are writing the folder, the first one calls `finish`. The others wait for the manifest.
    finish: function that writes and returns the manifest.
    """
    while True:
        first = min(disk.writers(stage.path), default=processes.count())
        if manifest := workdir.finished(stage.folder):
            disk.unlock(stage.path)
            return manifest
        if processes.index() < first:
            return finish()
        time.sleep(_POLL_S)


def take_over(before: epath.Path, ledger: epath.Path, number: str, own: str) -> None:
    """Makes an earlier shard's files available in the stage's folder, under new names, and writes the new ledger.

    before: path of the earlier ledger. ledger: path of the new ledger. number: shard number and number of shards in the
    names of the earlier files, such as 00000-of-00002. own: the same in the names of the new files.
    """
    source, target = before.parent.parent, ledger.parent.parent
    stored = json.loads(before.read_bytes())
    files = {name.replace(number, own): name for name in stored["files"]}
    for name, old in files.items():
        _link(source / old, target / name)
    ledger.parent.mkdir(exist_ok=True)
    write_json(ledger, {**stored, "files": {name: stored["files"][old] for name, old in files.items()}})


def _link(source: epath.Path, target: epath.Path) -> None:
    """Makes a file available under a second name: by a hard link, or by a copy if the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
