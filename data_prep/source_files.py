"""Notices that the files of a source have changed since photos/ was begun or made from them."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping

from data_prep.sources import FileSource, Source
from geotoken_jax.errors import UserError
from geotoken_jax.manifests import LEDGERS, Stage, StageError, write_json

#: Name of the file in photos/ with the fingerprint of the source.
_FILE = "source.json"


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


def check(stage: Stage, source: Source, keep_changed: bool) -> None:
    """Compares the source with the one that a folder was begun or made from.

    If the folder is complete, a change is an error, unless keep_changed. If it is not complete, its shards are removed
    after a change, so that they are made again.
    """
    file = stage.path / _FILE
    complete = stage.manifest or stage.mended
    if not isinstance(source, FileSource) or (complete and (keep_changed or not file.exists())):
        return
    try:
        now = source.fingerprint()
    except (UserError, OSError):
        if complete:  # the source was moved away, and is not needed
            return
        raise
    change = _difference(json.loads(file.read_text()), now) if file.exists() else ""
    if change and complete:
        raise StageError(
            f"the source of {stage.path} has changed since it was made: {change}: use another --workdir, make all "
            "again with `geotoken all --remake=prepare`, restore the source, or keep the photos as they were with "
            "config.photos.keep_changed=True"
        )
    if change:
        print(f"the source has changed: {change}; the photos in {stage.path} are made again", file=sys.stderr)
        for path in sorted(stage.path.iterdir()):
            if path.name == LEDGERS:
                path.rmtree()
            elif ".array_record-" in path.name or path.name == "dropped.jsonl":
                path.unlink()
    if change or not file.exists():
        write_json(file, now)


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns a text on the files that were added, removed or changed; "" if there are none."""
    sets = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    return ", ".join(f"{len(names):,} {kind}, such as {min(names)!r}" for kind, names in sets.items() if names)
