"""Divides the shards of a stage among processes: process k of n makes the shards k, k + n, k + 2 n and so on.

Processes need not run at the same time. A process that needs shards of other processes waits as long as one of them
writes the same folder. If none does, it ends, and the same command continues later.
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

#: Seconds between two looks at the files of other processes, and seconds that a process waits for others to start.
_POLL_S, _START_S = 1.0, 60.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some rows of a split, which one process makes at a time.

    stage: the stage's folder. split: the split, or another name of the shards. rows: rows of the split. number, count:
    number of this shard, from 0, and number of all shards of the split.
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
        """Takes this shard over from before photos were added, if it had the same rows. Returns whether it did.

        values: contents that its ledger must have.
        """
        for path in self.earlier():
            ledger = read_ledger(path)
            if ledger and all(ledger.get(name) == value for name, value in values.items()):
                number = path.stem.removeprefix(f"{self.split}-")
                take_over(path, self._ledger, number, f"{self.number:05d}-of-{self.count:05d}")
                return True
        return False

    def earlier(self) -> Iterator[epath.Path]:
        """Yields the ledgers of shards with the same rows from before photos were added, the latest first."""
        folders = [path for path in disk.matching(self.stage / EARLIER, "*") if path.name.isdigit()]
        for folder in sorted(folders, key=lambda path: -int(path.name)):
            # Shards with the same rows have the same number, as no shard before them has changed.
            pattern = f"{glob.escape(self.split)}-{self.number:05d}-of-?????.json"
            for path in disk.matching(folder / LEDGERS, pattern):
                if json.loads(path.read_bytes()).get("rows") == [self.rows.start, self.rows.stop]:
                    yield path

    @property
    def _ledger(self) -> epath.Path:
        return self.stage / LEDGERS / f"{self.split}-{self.number:05d}-of-{self.count:05d}.json"


def divide(stage: Stage, counts: Mapping[str, Sequence[int]], limit: int) -> list[Shard]:
    """Returns all shards of a stage.

    counts: split -> numbers of rows, as in partition.ranges. limit: rows per shard.
    """
    rows = {split: partition.ranges(numbers, limit) for split, numbers in counts.items()}
    return [
        Shard(stage.path, split, part, number, len(parts))
        for split, parts in rows.items()
        for number, part in enumerate(parts)
    ]


def own(parts: Sequence[Shard]) -> Sequence[Shard]:
    """Returns the shards of this process."""
    return parts[processes.index() :: processes.count()]


def missing(parts: Sequence[Shard], **values: Any) -> list[Shard]:
    """Returns the shards of this process that have to be made. Shards are taken over first; values: see Shard.keep."""
    return [part for part in own(parts) if not (part.ledger or part.keep(**values))]


def make(parts: Sequence[Shard], needed: Sequence[Shard], label: str, write: Callable[[Shard], None]) -> None:
    """Makes shards of this process. parts: shards of all processes. needed: those to make. label: name of the work."""
    total = sum(len(part.rows) for part in own(parts))
    with Progress(label, total, "photos", total - sum(len(part.rows) for part in needed)) as progress:
        for part in needed:
            write(part)
            progress.add(len(part.rows))


def wait(stage: Stage, parts: Sequence[Shard]) -> bool:
    """Waits for the shards of other processes, and returns whether all shards are complete.

    If they are not, and no other process writes the folder any more, the missing shards are reported, and this process
    stops writing it.
    """
    left, waited = list(parts), 0.0
    while left := [part for part in left if not part.ledger]:
        if disk.writers(stage.path):
            waited = 0.0
        elif waited >= _START_S:
            print(
                f"made the shards of this process; {stage.path} lacks {len(left):,} of {len(parts):,} shards, which "
                "other processes make: when they have ended, run the same command again",
                flush=True,
            )
            disk.unlock(stage.path)
            return False
        time.sleep(_POLL_S)
        waited += _POLL_S
    return True


def complete(workdir: Workdir, stage: Stage, finish: Callable[[], Manifest]) -> Manifest:
    """Returns the manifest of a stage whose shards are all complete.

    Of the processes that write the folder, the first one calls `finish`, which writes the manifest. The others wait.
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
    """Makes the files of a shard and its ledger available in another stage's folder, under other numbers.

    before, ledger: ledger of the shard, there and here. number, own: number of the shard and number of all shards in
    the names of its files, as 00000-of-00002, there and here.
    """
    source, target = before.parent.parent, ledger.parent.parent
    stored = json.loads(before.read_bytes())
    files = {name.replace(number, own): name for name in stored["files"]}
    for name, old in files.items():
        _link(source / old, target / name)
    ledger.parent.mkdir(exist_ok=True)
    write_json(ledger, {**stored, "files": {name: stored["files"][old] for name, old in files.items()}})


def _link(source: epath.Path, target: epath.Path) -> None:
    """Makes the contents of a file available under a second name, without a copy if the file system can do so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
