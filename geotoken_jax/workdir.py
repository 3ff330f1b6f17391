"""Stages: each verb makes one folder of the work directory, and the folder is complete when its manifest is there.

A stage writes `begun.json` first and `manifest.json` last, each in one step (written beside, then renamed). Both hold
the settings and the hashes of the input manifests, so a folder made from other settings or other inputs is noticed
before anything is mixed. Nothing in a manifest depends on the clock or the machine: two runs of one configuration
have equal manifests, interrupted or not.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import processes, settings

#: Folder of the work directory -> the verb that makes it, in the order of the path.
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


class StageError(RuntimeError):
    """A stage cannot run here: an input is missing, or the folder belongs to other settings or inputs."""


class OtherSettingsError(StageError):
    """A folder, `path`, belongs to other settings or inputs."""

    def __init__(self, message: str, path: epath.Path):
        super().__init__(message)
        self.path = path


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a complete folder says of itself.

    folder: its name in the work directory. settings: the configuration it was made with. inputs: input folder -> the
    SHA-256 of its manifest. counts: what it holds. dropped: reason -> how many. facts: anything else worth keeping.
    """

    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    dropped: dict[str, int]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A folder that is to be made, or has been: then `manifest` is not None and there is nothing to do."""

    path: epath.Path
    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    manifest: Manifest | None

    def finish(self, counts: Mapping[str, Any], dropped: Mapping[str, int] | None = None, **facts: Any) -> Manifest:
        """Writes the manifest: from here on the folder is complete."""
        manifest = Manifest(
            self.folder, self.settings, self.inputs, dict(counts), dict(dropped or {}), settings.plain(facts)
        )
        write_json(self.path / "manifest.json", dataclasses.asdict(manifest))
        (self.path / "begun.json").unlink(missing_ok=True)
        return manifest


def begin(workdir: epath.PathLike, folder: str, config: Mapping[str, Any], inputs: Sequence[str]) -> Stage:
    """Opens the folder `folder` for its stage.

    config: section name -> section (ConfigDict, dataclass or mapping) that the folder depends on.
    inputs: folders of the work directory that the stage reads; all must be complete.

    Raises StageError if an input is missing, or if the folder holds something made otherwise.
    """
    workdir = local(workdir)
    wanted = {"settings": settings.plain(config), "inputs": {name: digest(workdir, name) for name in inputs}}
    path = workdir / folder
    manifest = path / "manifest.json"
    begun = path / "begun.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        _refuse_other(path, found, wanted)
        return Stage(path, folder, **wanted, manifest=Manifest(**found))
    if begun.exists():
        _refuse_other(path, json.loads(begun.read_text()), wanted)
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_json(begun, wanted)
    return Stage(path, folder, **wanted, manifest=None)


def local(path: epath.PathLike) -> epath.Path:
    """Returns the path of a folder on this machine. Raises StageError for a URL, also for s3:/bucket/run.

    The message leaves out the rest of the URL, which may hold a key.
    """
    if url := re.match("([A-Za-z][A-Za-z0-9+.-]+):/", str(path)):
        raise StageError(
            f"--workdir is a URL ({url[1]}://...), and stages read and write local files only: mount the bucket and "
            "name the mounted folder, or work on a local disk and copy (docs/launch.md)"
        )
    return epath.Path(path)


def read_manifest(workdir: epath.PathLike, folder: str) -> Manifest:
    """Returns the manifest of a complete folder. Raises StageError if it is not complete."""
    path = epath.Path(workdir) / folder / "manifest.json"
    if not path.exists():
        verb = PATH.get(folder.split("/")[0], folder)
        raise StageError(f"{path.parent} is not complete: run `geotoken {verb}` with the same --workdir first")
    return Manifest(**json.loads(path.read_text()))


def digest(workdir: epath.PathLike, folder: str) -> str:
    """Returns the SHA-256 of a complete folder's manifest. Raises StageError if it is not complete."""
    read_manifest(workdir, folder)
    return hashlib.sha256((epath.Path(workdir) / folder / "manifest.json").read_bytes()).hexdigest()


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that `path` is either absent, the old file or the whole new one."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file so that `path` is either absent, the old file or the whole new one."""
    beside = path.parent / f".{path.name}.{processes.index()}.partial"  # several processes may write one file
    beside.write_bytes(data)
    beside.replace(path)


def first_other(made_with: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns the dotted place, the value made with and the value asked for of the first setting that differs.

    made_with: settings of a manifest. asked: what is wanted now; a key of `made_with` that it lacks is not compared.
    """
    for key in sorted(made_with.keys() & asked.keys()):
        old, new = made_with[key], asked[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if found := first_other(old, new):
                return f"{key}.{found[0]}", *found[1:]
        elif old != new:
            return key, old, new
    return None


def _refuse_other(path: epath.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part in ("settings", "inputs"):
        difference = _first_difference(found[part], wanted[part], "")
        if difference is None:
            continue
        key, old, new = difference
        what = f"config.{key} = {old!r}, not {new!r}" if part == "settings" else f"another {key}/"
        raise OtherSettingsError(
            f"{path} was made with {what}: use another --workdir, or remove {path} to make it again", path
        )


def _first_difference(old: Any, new: Any, where: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else (where, old, new)
