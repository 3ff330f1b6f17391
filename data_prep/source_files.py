"""Detects that the files of a source have changed since photos/ was begun or completed.

photos/source.json contains the fingerprint of the files: a mapping from each file to a text, such as its size and time.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from data_prep.sources import FileSource, GrowingSource, Source
from geotoken_jax import disk, manifests
from geotoken_jax.errors import UserError
from geotoken_jax.manifests import EARLIER, LEDGERS, Stage, StageError, write_json

#: File in photos/ that contains the fingerprint of the source.
_FILE = "source.json"
#: Number of bytes of a table that are read at a time.
_BLOCK = 1 << 20


def fingerprint(files: Mapping[str, str], tables: Iterable[str] = ()) -> dict[str, str]:
    """Returns the fingerprint of some files: name -> size and time of its last change, and table -> size and SHA-256.

    files: name of a file -> its path. tables: paths of tables.
    """
    found = {}
    for name, path in files.items():
        try:
            status = os.stat(path)
        except OSError as error:
            found[name] = error.strerror or str(error)
        else:
            found[name] = f"{status.st_size} {status.st_mtime_ns}"
    for path in tables:
        with open(path, "rb") as file:
            found[path] = f"{os.path.getsize(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return found


def check(
    stage: Stage,
    source: Source,
    keep_changed: bool,
    update: bool = False,
    unrecorded: Mapping[str, str] | None = None,
) -> Stage:
    """Compares the source's files with those from which photos/ was begun or completed. Returns the stage.

    If the files have changed and photos/ is not complete, its shards are removed, so that they are made again. If
    photos/ is complete, a change raises StageError, with two exceptions: keep_changed and update.

    keep_changed: whether changes are ignored if photos/ is complete. update: whether a complete photos/ is opened again
    if files or rows were added to the source. unrecorded: fingerprint to compare with if a complete photos/ has no
    source.json; if None, nothing is compared then.
    """
    complete = stage.manifest or stage.mended
    file = stage.path / _FILE
    if not file.exists() and stage.earlier:  # an earlier run with --update was interrupted
        file = max(disk.matching(stage.path / EARLIER, "*"), key=lambda path: int(path.name)) / _FILE
    known = file.exists() or unrecorded is not None
    if not isinstance(source, FileSource) or (complete and ((keep_changed and not update) or not known)):
        return stage
    try:
        now = source.fingerprint()
    except (UserError, OSError):
        if complete:  # the source was moved away, but a complete photos/ does not need it
            return stage
        raise
    before = json.loads(file.read_text()) if file.exists() else unrecorded if complete else now
    assert before is not None  # `known` is True here
    change = _difference(before, now)
    if change and (complete or stage.earlier):
        if not update:
            added = _can_take(source, before, now) and not _not_added(source, before, now)
            raise StageError(
                f"the source of {stage.path} has changed since it was made: {change}: "
                f"{'add the new photos with --update, ' if added else ''}use another --workdir, make all again "
                "with `geotoken all --remake=prepare`, restore the source, or keep the photos as they were with "
                "config.photos.keep_changed=True"
            )
        _check_added(stage, source, before, now)
        requested = {"settings": stage.settings, "inputs": stage.inputs}
        stage = manifests.reopen_to_extend(stage.path.parent, stage.folder, requested)
    elif change:
        print(f"the source has changed: {change}; the photos in {stage.path} are made again", file=sys.stderr)
        for path in sorted(stage.path.iterdir()):
            if path.name == LEDGERS or any(Path(path).glob("*/*.array_record-*")):
                path.rmtree()
            elif path.name in ("dropped.jsonl", "duplicates.jsonl"):
                path.unlink()
    if change or not (stage.path / _FILE).exists():
        write_json(stage.path / _FILE, now)
    return stage


def _check_added(stage: Stage, source: Source, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises StageError unless files and rows were only added to the source, and the source supports that."""
    if not _can_take(source, before, now):
        raise StageError(
            f"--update cannot add new photos of {source.name}, the source of {stage.path}: make all "
            "again with `geotoken all --remake=prepare`, or use another --workdir"
        )
    if change := _not_added(source, before, now):
        raise StageError(
            f"--update only adds new photos, but the source of {stage.path} has {change}: restore "
            "these files, or make all again with `geotoken all --remake=prepare`"
        )


def _can_take(source: Source, before: Mapping[str, str], now: Mapping[str, str]) -> TypeGuard[GrowingSource]:
    """Returns whether the source supports the addition of all new files. before, now: fingerprints."""
    return isinstance(source, GrowingSource) and all(source.takes(file) for file in now.keys() - before.keys())


def _not_added(source: GrowingSource, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns a text that counts the removed and changed files, such as "2 removed, such as 'a.jpg'"; "" if none.

    A table to which rows were only added at its end is not counted.
    """
    changed = [name for name in before if name in now and before[name] != now[name]]
    extended = {name: before[name] for name in changed if source.has_rows_added(name, before[name])}
    return _difference(before, {**now, **extended}, ("removed", "changed"))


def has_rows_added(path: str, before: str) -> bool:
    """Returns whether rows were added at the end of a table, and nothing else in it has changed.

    before: text of the table in an earlier fingerprint, "SIZE SHA-256".
    """
    size, _, digest = before.partition(" ")
    found = hashlib.sha256()
    with open(path, "rb") as file:
        left, last = int(size), b""
        while left and (data := file.read(min(left, _BLOCK))):
            found.update(data)
            left, last = left - len(data), data[-1:]
        ended = last == b"\n" or file.read(1) in (b"\n", b"\r")
    return not left and found.hexdigest() == digest and ended


def _difference(
    before: Mapping[str, str], now: Mapping[str, str], kinds: Sequence[str] = ("added", "removed", "changed")
) -> str:
    """Returns a text that counts the files of each kind of difference; "" if there is no difference.

    An example is "3 added, such as 'a.jpg', 1 removed, such as 'b.jpg'". before, now: fingerprints.
    """
    sets = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    return ", ".join(f"{len(sets[kind]):,} {kind}, such as {min(sets[kind])!r}" for kind in kinds if sets[kind])
