"""Notices that the files of a source have changed since photos/ was begun or made from them."""

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

#: Name of the file in photos/ with the fingerprint of the source.
_FILE = "source.json"
#: Bytes of a table that are read at a time.
_BLOCK = 1 << 20


def fingerprint(files: Mapping[str, str], tables: Iterable[str] = ()) -> dict[str, str]:
    """Returns file -> size and time of its last change, and table -> size and SHA-256.

    files: name -> path. tables: paths.
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
    """Compares the source with the one that a folder was begun or made from, and returns the folder's stage.

    If the folder is complete, a change is an error, unless keep_changed. If it is not complete, its shards are removed
    after a change, so that they are made again. With `update`, files that were added to the source are no error: the
    folder is opened again to take them in. unrecorded: fingerprint of the source of a complete folder that has stored
    none; if None, such a folder is not compared.
    """
    complete = stage.manifest or stage.mended
    file = stage.path / _FILE
    if not file.exists() and stage.earlier:  # an update was interrupted
        file = max(disk.matching(stage.path / EARLIER, "*"), key=lambda path: int(path.name)) / _FILE
    known = file.exists() or unrecorded is not None
    if not isinstance(source, FileSource) or (complete and ((keep_changed and not update) or not known)):
        return stage
    try:
        now = source.fingerprint()
    except (UserError, OSError):
        if complete:  # the source was moved away, and is not needed
            return stage
        raise
    before = json.loads(file.read_text()) if file.exists() else unrecorded if complete else now
    assert before is not None  # else `known` is False
    change = _difference(before, now)
    if change and (complete or stage.earlier):
        if not update:
            added = _can_take(source, before, now) and not _not_added(source, before, now)
            raise StageError(
                f"the source of {stage.path} has changed since it was made: {change}: "
                f"{'take this in with --update, ' if added else ''}use another --workdir, make all again "
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
    """Raises StageError unless a source that can grow has changed only by what was added."""
    if not _can_take(source, before, now):
        raise StageError(
            f"--update cannot take in photos that were added to {source.name}, the source of {stage.path}: make all "
            "again with `geotoken all --remake=prepare`, or use another --workdir"
        )
    if change := _not_added(source, before, now):
        raise StageError(
            f"--update takes in only photos that were added, but the source of {stage.path} has {change}: restore "
            "these files, or make all again with `geotoken all --remake=prepare`"
        )


def _can_take(source: Source, before: Mapping[str, str], now: Mapping[str, str]) -> TypeGuard[GrowingSource]:
    """Returns whether a source can grow by all files that were added to it."""
    return isinstance(source, GrowingSource) and all(source.takes(file) for file in now.keys() - before.keys())


def _not_added(source: GrowingSource, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns a text on the files that were removed or changed, except by rows added at their ends; "" if none."""
    changed = [name for name in before if name in now and before[name] != now[name]]
    extended = {name: before[name] for name in changed if source.has_rows_added(name, before[name])}
    return _difference(before, {**now, **extended}, ("removed", "changed"))


def has_rows_added(path: str, before: str) -> bool:
    """Returns whether a table has changed only by rows after its end. before: its text in a fingerprint."""
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
    """Returns a text on the files that were added, removed or changed; "" if there are none."""
    sets = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    return ", ".join(f"{len(sets[kind]):,} {kind}, such as {min(sets[kind])!r}" for kind in kinds if sets[kind])
