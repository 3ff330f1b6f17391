"""Manifests of a work directory's folders, by which a stage finds out if a folder is complete and fits its settings.

A stage writes `begun.json` first and `manifest.json` last, each atomically (to a temporary file, then renamed); the
manifest marks the folder as complete. Both files contain the settings and the hashes of the input manifests, so that
results of different settings or inputs are never mixed. A manifest depends on neither time nor machine: two runs of one
configuration have equal manifests, interrupted or not.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import disk, settings
from geotoken_jax.errors import UserError

#: Folder of the work directory -> the verb that makes it, in the order in which the verbs run.
PATH = {
    "photos": "prepare",
    "features": "embed",
    "align": "align",
    "gallery": "index",
    "queries": "index",
    "neighbors": "index",
    "tokens": "index",
    "geotoken": "train",
    "pools": "learn",
    "reward": "learn",
    "verifier": "learn",
    "predictions": "predict",
    "report": "evaluate",
    "export": "export",
    "audit": "audit",
}


class StageError(UserError, RuntimeError):
    """A stage cannot run: an input is missing, or the folder was made with other settings or inputs."""


class OtherSettingsError(StageError):
    """The folder `path` was made with other settings or inputs."""

    def __init__(self, message: str, path: epath.Path):
        super().__init__(message)
        self.path = path


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a complete folder's `manifest.json`.

    folder: name in the work directory. settings: sections of the configuration that the folder was made with. inputs:
    input folder -> SHA-256 of the input's manifest. counts: number of records, per split or kind. dropped: reason ->
    number of dropped photos. facts: other results of the stage, such as the width of features.
    """

    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    dropped: dict[str, int]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A folder opened for its stage. If `manifest` is not None the folder is complete and the stage has nothing to do.

    path: the folder. settings, inputs: see Manifest.
    """

    path: epath.Path
    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    manifest: Manifest | None

    def finish(self, counts: Mapping[str, Any], dropped: Mapping[str, int] | None = None, **facts: Any) -> Manifest:
        """Writes the manifest, which marks the folder as complete, and returns it. The arguments: see Manifest."""
        manifest = Manifest(
            self.folder, self.settings, self.inputs, dict(counts), dict(dropped or {}), settings.plain(facts)
        )
        write_json(self.path / "manifest.json", dataclasses.asdict(manifest))
        (self.path / "begun.json").unlink(missing_ok=True)
        disk.unlock(self.path)
        return manifest


def begin(workdir: epath.PathLike, folder: str, config: Mapping[str, Any], inputs: Sequence[str]) -> Stage:
    """Opens a folder for its stage; if the folder is new, makes it and writes `begun.json`.

    config: section name -> section (ConfigDict, dataclass or mapping) that the folder depends on. inputs: folders of
    the work directory that the stage reads; all must be complete.

    Raises StageError if an input is missing, or if the folder was begun or made with other settings or inputs, and
    LockedError if another process writes the folder.
    """
    workdir = local(workdir)
    requested = {"settings": settings.plain(config), "inputs": {name: digest(workdir, name) for name in inputs}}
    path = workdir / folder
    manifest = path / "manifest.json"
    begun = path / "begun.json"
    if manifest.exists():
        stored = _load(manifest, settings.names(Manifest))
        _check_same(path, folder, stored, requested)
        return Stage(path, folder, **requested, manifest=Manifest(**stored))
    if begun.exists():
        _check_same(path, folder, _load(begun, list(requested)), requested)
    path.mkdir(parents=True, exist_ok=True)
    disk.lock(path)
    if not begun.exists():
        write_json(begun, requested)
    return Stage(path, folder, **requested, manifest=None)


def local(path: epath.PathLike) -> epath.Path:
    """Returns the path of a folder on this machine. Raises StageError for a URL, also with one slash (s3:/bucket/run).

    The message contains only the URL's scheme, because the rest may contain a password.
    """
    if url := re.match("([A-Za-z][A-Za-z0-9+.-]+):/", str(path)):
        raise StageError(
            f"--workdir is a URL ({url[1]}://...), but stages read and write local files only: mount the bucket and "
            "use the mounted folder, or use a local folder and copy it afterwards (docs/launch.md)"
        )
    path = os.path.expanduser(path)
    if re.search("[\ud800-\udfff]", path):
        raise StageError(f"--workdir is {path!r}, which is not UTF-8: rename the folder, as record files need UTF-8")
    return epath.Path(path)


def read_manifest(workdir: epath.PathLike, folder: str) -> Manifest:
    """Returns the manifest of a folder. Raises StageError if the folder is not complete."""
    path = epath.Path(workdir) / folder / "manifest.json"
    if not path.exists():
        verb = PATH.get(folder.split("/")[0], folder)
        raise StageError(f"{path.parent} is not complete: run `geotoken {verb}` with the same --workdir first")
    return Manifest(**_load(path, settings.names(Manifest)))


def _load(path: epath.Path, keys: Sequence[str]) -> dict[str, Any]:
    """Returns these keys of a JSON file of a stage. Raises StageError if the file is damaged or lacks one of them."""
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StageError(
            f"{path} is damaged ({error}): restore it, or remove {path.parent} and run its stage again"
        ) from None
    if (
        not isinstance(stored, dict)
        or not stored.keys() >= set(keys)
        or not all(isinstance(stored[key], dict) for key in ("settings", "inputs"))
    ):
        raise StageError(
            f"{path} has not the keys {', '.join(keys)}, so it is damaged or of another version: restore it, or remove "
            f"{path.parent} and run its stage again"
        )
    return {key: stored[key] for key in keys}


def digest(workdir: epath.PathLike, folder: str) -> str:
    """Returns the SHA-256 of a folder's manifest. Raises StageError if the folder is not complete."""
    read_manifest(workdir, folder)
    return hashlib.sha256((epath.Path(workdir) / folder / "manifest.json").read_bytes()).hexdigest()


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file atomically: after a crash `path` is absent, the old file or the whole new file."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", text):
        text = json.dumps(value, indent=1, sort_keys=True)  # a path has bytes that are not UTF-8
    write_bytes(path, (text + "\n").encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically: after a crash `path` is absent, the old file or the whole new file."""
    temporary = disk.partial(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def first_difference(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns the first setting that differs: its dotted key, its stored value and its requested value.

    Only keys that both contain are compared. Returns None if their values are equal.

    stored: settings in a manifest. requested: settings of the current configuration.
    """
    for key in sorted(stored.keys() & requested.keys()):
        old, new = stored[key], requested[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if difference := first_difference(old, new):
                return f"{key}.{difference[0]}", *difference[1:]
        elif old != new:
            return key, old, new
    return None


def how_to_remake(path: epath.Path, folder: str) -> str:
    """Returns the end of a message: how to make a folder of a work directory again. path: the folder."""
    verb = PATH.get(folder.split("/")[0], "audit")
    if verb == "audit":
        return f"remove {path} to make it again"
    return f"make it again with `geotoken all --remake={verb}`"


def _check_same(path: epath.Path, folder: str, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    for part in ("settings", "inputs"):
        difference = _first_difference(stored[part], requested[part], "")
        if difference is None:
            continue
        key, old, new = difference
        problem = (
            f"config.{key} is {new!r}, but {path} was made with {old!r}"
            if part == "settings"
            else f"{path} was made with another {key}/"
        )
        raise OtherSettingsError(f"{problem}: use another --workdir, or {how_to_remake(path, folder)}", path)


def _first_difference(old: Any, new: Any, place: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = _first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if difference:
                return difference
        return None
    return None if old == new else (place, old, new)
