"""Reads and writes the manifests of a work directory's folders.

A manifest is the file `manifest.json` of a folder, which a stage writes last. It marks the folder as complete. The
stage writes `begun.json` first. Both files contain the settings and the SHA-256 of the manifests of the input folders,
so results of different settings or inputs are never mixed. Both are written atomically: to a temporary file, which is
then renamed. A manifest depends on neither time nor machine: two runs of one configuration by one version of the code
have equal manifests, interrupted or not.

A manifest contains the size and the SHA-256 of each file in its folder. If a stage writes shards, each shard has a
ledger: a JSON file in the subfolder ledgers/, written after the shard's files, with their sizes and SHA-256. A stage
compares the sizes when it begins. `geotoken verify` compares the SHA-256 too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import disk, processes, settings
from geotoken_jax.errors import UserError
from geotoken_jax.version import __version__

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
    "channels": "learn",
    "reranker": "learn",
    "predictions": "predict",
    "exclusion": "predict",
    "excluded": "predict",
    "report": "evaluate",
    "export": "export",
    "audit": "audit",
}


#: Version of the file formats in a work directory. It increases if earlier releases cannot read or continue a folder.
#: 1: no checksums. 2: checksums, larger shards of features, and photos/ with the subfolders NAME/VERSION.
FORMAT = 2
#: Subfolder of a stage's folder for ledgers: JSON files with the sizes and SHA-256 of the files of a shard.
LEDGERS = "ledgers"
#: Subfolder that a stage's folder has while photos are added to it. It contains the folder's files from before.
EARLIER = "earlier"
#: Verbs that can add photos to their folders after photos were added to the source.
UPDATED = ("prepare", "embed", "index")
#: Folders of trained models, or of data to train them. They stay valid if photos are added to their inputs, because a
#: model that was trained on fewer photos can still be used.
_TRAINED = ("align", "geotoken", "pools", "reward", "channels", "reranker")
#: Files that a manifest does not record, because they depend on time and machine, or change after the stage.
_UNRECORDED = (
    "manifest.json", "begun.json", "checkpoints", "metrics.jsonl", "tensorboard", "profile", "source.json", "judge",
    "targets",
)  # fmt: skip


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

    folder: name of the folder in the work directory. settings: sections of the configuration that the folder was made
    with. inputs: input folder -> SHA-256 of its manifest. counts: split, or kind of record -> number of records.
    dropped: reason -> number of dropped photos. facts: other results of the stage, such as the width of features.
    files: path in the folder -> size and SHA-256; empty in format 1. format: see FORMAT. code: version of this package
    that made the folder; `digest` leaves it out.
    """

    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    dropped: dict[str, int]
    facts: dict[str, Any]
    files: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    format: int = 1
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A folder that is opened for its stage.

    path, folder: path, and name in the work directory. settings, inputs: see Manifest. manifest: manifest of the folder
    if it is complete; then the stage has nothing to do. mended: manifest from before files of the folder were damaged,
    if the stage makes these files again; else None. earlier: the earlier manifests of the folder, one before each
    addition of photos, oldest first. A manifest is given as a dict with its SHA-256 and its counts.
    """

    path: epath.Path
    folder: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    manifest: Manifest | None
    mended: Manifest | None = None
    earlier: Sequence[Mapping[str, Any]] = ()

    def finish(self, counts: Mapping[str, Any], dropped: Mapping[str, int] | None = None, **facts: Any) -> Manifest:
        """Writes the manifest, which marks the folder as complete, and returns it. For the arguments, see Manifest.

        Raises StageError if files that were damaged and made again differ from the files before the damage. Later
        stages were made from those files.
        """
        shutil.rmtree(self.path / EARLIER, ignore_errors=True)
        facts |= {"earlier": self.earlier} if self.earlier else {}
        results = dict(counts), dict(dropped or {}), settings.plain(facts)
        manifest = Manifest(self.folder, self.settings, self.inputs, *results, self._files(), FORMAT, __version__)
        if self.mended:
            self._check_mended(manifest)
            manifest = self.mended
        write_json(self.path / "manifest.json", dataclasses.asdict(manifest))
        (self.path / "begun.json").unlink(missing_ok=True)
        disk.unlock(self.path)
        return manifest

    def _check_mended(self, made: Manifest) -> None:
        before = self.mended
        assert before
        if dataclasses.replace(made, code=before.code) == before:
            return
        names = sorted(made.files.keys() | before.files.keys())
        other = [name for name in names if made.files.get(name) != before.files.get(name)]
        raise StageError(
            f"{self.path / (other or ['manifest.json'])[0]} was made again, but its contents differ from before, "
            "because the version of this package, a library or the machine is another: restore the file, or make its "
            f"stage and all later stages again with `geotoken all --remake={PATH[self.folder.split('/')[0]]}`"
        )

    def _files(self) -> dict[str, list[Any]]:
        """Returns path -> size and SHA-256 for all files, from ledgers; computes them for files without a ledger."""
        names = disk.files(self.path, _UNRECORDED)
        known = _in_ledgers(self.path)
        if wrong := _wrong_size(self.path, known):
            raise StageError(
                f"{self.path / wrong[0]} {wrong[1]}, unlike when this file was written: run the same command again, "
                "which makes the file again"
            )
        return {**known, **disk.checksums(self.path, set(names) - known.keys())}


def write_ledger(path: epath.Path, files: Sequence[epath.Path], **values: Any) -> None:
    """Writes the ledger of a shard, which marks the shard as complete.

    path: path of the ledger, ledgers/NAME.json in the stage's folder. files: paths of the shard's files, which must be
    complete. values: further contents of the ledger. The key `files` of the ledger is a dict: path in the stage's
    folder -> size and SHA-256.
    """
    folder = path.parent.parent
    path.parent.mkdir(exist_ok=True)
    names = [file.relative_to(folder).as_posix() for file in files]
    write_json(path, {**values, "files": disk.checksums(folder, names)})


def read_ledger(path: epath.Path) -> dict[str, Any] | None:
    """Returns the contents of a shard's ledger, or None if the shard has to be made again.

    It has to be made again if the ledger is missing or damaged, or if a file is missing or has another size.
    """
    try:
        ledger = json.loads(path.read_bytes())
        complete = not _wrong_size(path.parent.parent, ledger["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ledger if complete else None


def recorded(folder: epath.Path) -> dict[str, list[Any]]:
    """Returns path -> size and SHA-256 for the files that a begun folder must have.

    These are the files that its ledgers record. If the folder was complete and damaged files are made again, these are
    also all files of its earlier manifest.
    """
    before = _load(folder / "begun.json", ["mended"])["mended"]["files"] if is_mended(folder) else {}
    return {**before, **_in_ledgers(folder)}


def _in_ledgers(folder: epath.Path) -> dict[str, list[Any]]:
    known: dict[str, list[Any]] = {}
    for path in disk.matching(folder / LEDGERS, "*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged ledger: its shard is made again
            known |= json.loads(path.read_bytes())["files"]
    return known


def is_mended(folder: epath.Path) -> bool:
    """Returns whether a folder was complete, and is now opened again to make its damaged files again."""
    begun = folder / "begun.json"
    return begun.exists() and bool(_load(begun, ["mended"])["mended"])


def reopen(workdir: epath.Path, folder: str, bad: Collection[str]) -> None:
    """Removes the bad files of a folder, and marks the folder as not complete. Its stage then makes only these files.

    The ledgers of bad files are removed too. If a bad file in a subfolder has no ledger, all files of this subfolder
    that have no ledger are removed, because a stage writes such files together.

    bad: paths of the bad files in the folder.
    """
    path = workdir / folder
    disk.lock(path)
    complete = (path / "manifest.json").exists()
    if complete and "manifest.json" not in bad:
        manifest = dataclasses.asdict(read_manifest(workdir, folder))
        begun = {key: manifest[key] for key in ("settings", "inputs", "format")}
        write_json(path / "begun.json", {**begun, "mended": manifest})
    in_ledgers: set[str] = set()
    for ledger in disk.matching(path / LEDGERS, "*.json"):
        try:
            names = set(json.loads(ledger.read_bytes())["files"])
        except (ValueError, KeyError, TypeError):
            names = set()
        in_ledgers |= names
        if not names or names & set(bad) or f"{LEDGERS}/{ledger.name}" in bad:
            ledger.unlink()
    removed = set(bad)
    for name in set(bad) - in_ledgers:
        parent = os.path.dirname(name)
        if parent and parent != LEDGERS:
            removed |= {
                f"{parent}/{file.name}" for file in disk.matching(path / parent, "*") if file.is_file()
            } - in_ledgers
    for name in removed:
        (path / name).unlink(missing_ok=True)
    (path / "manifest.json").unlink(missing_ok=True)


def check_sizes(workdir: epath.Path, folder: str, manifest: Manifest) -> None:
    """Raises StageError if a file in a manifest is missing or has another size; the message names the first one."""
    if wrong := _wrong_size(workdir / folder, manifest.files):
        name, found = wrong
        cure = how_to_remake(workdir / folder, folder)
        if PATH.get(folder) in UPDATED:  # its shards can be made again one by one
            cure = f"make it again with `geotoken verify {workdir} --mend --config=FILE`"
        raise StageError(
            f"{workdir / folder / name} {found}, but {manifest.files[name][0]:,} bytes were written: restore it, or "
            f"{cure}"
        )


def _wrong_size(folder: epath.PathLike, files: Mapping[str, Sequence[Any]]) -> tuple[str, str] | None:
    """Returns the first file that is missing or has a wrong size, with a text such as "is missing".

    Returns None if all sizes are right. files: path in the folder -> size and SHA-256.
    """
    for name, (size, *_) in files.items():
        try:
            found = os.stat(os.path.join(folder, name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return name, "is missing"
        if found != size:
            return name, f"has {found:,} bytes"
    return None


def begin(
    workdir: epath.PathLike, folder: str, config: Mapping[str, Any], inputs: Sequence[str], update: bool = False
) -> Stage:
    """Opens a folder for its stage. If the folder is new, makes it and writes `begun.json`.

    config: section name -> section (ConfigDict, dataclass or mapping) that the folder depends on. inputs: folders of
    the work directory that the stage reads; all must be complete. update: whether the stage adds photos that were added
    to the inputs after the folder was made. If False, such a folder is refused, unless it contains a trained model.

    Raises StageError if an input is not complete, if a file of the folder or of an input is missing or has another size
    than was recorded, or if the folder was begun or made with other settings or inputs. Raises LockedError if another
    process writes the folder.
    """
    workdir = local(workdir)
    requested = {"settings": settings.plain(config), "inputs": {name: digest(workdir, name) for name in inputs}}
    for name in inputs:
        check_sizes(workdir, name, read_manifest(workdir, name))
    path = workdir / folder
    begun = path / "begun.json"
    if update:
        _reopen_grown(workdir, folder, requested)
    if (path / "manifest.json").exists():
        manifest = read_manifest(workdir, folder)
        grown = _has_grown(workdir, manifest.inputs, requested["inputs"])
        accepted = {"inputs": manifest.inputs} if grown and folder.split("/")[0] in _TRAINED else {}
        _check_same(path, folder, dataclasses.asdict(manifest), {**requested, **accepted}, grown)
        check_sizes(workdir, folder, manifest)
        return Stage(path, folder, **requested, manifest=manifest)
    stored: dict[str, Any] = {"mended": None, "earlier": []}
    if begun.exists():
        stored = _load(begun, [*requested, "mended", "earlier", "moves"])
        _check_same(path, folder, stored, requested, _has_grown(workdir, stored["inputs"], requested["inputs"]))
        if stored["format"] != FORMAT:
            raise StageError(
                f"{path} was begun in format {stored['format']}, which this release cannot continue (it writes format "
                f"{FORMAT}): remove it and run its stage again, or finish it with the release that began it"
            )
    path.mkdir(parents=True, exist_ok=True)
    disk.lock(path)
    if not begun.exists():
        write_json(begun, {**requested, "format": FORMAT})
    _move_earlier(path, stored.get("moves", 0))
    mended = Manifest(**stored["mended"]) if stored["mended"] else None
    earlier = mended.facts.get("earlier", []) if mended else stored["earlier"]
    return Stage(path, folder, **requested, manifest=None, mended=mended, earlier=earlier)


def _has_grown(workdir: epath.Path, stored: Mapping[str, str], requested: Mapping[str, str]) -> bool:
    """Returns whether inputs have changed, and only because photos were added to them.

    stored, requested: input folder -> SHA-256 of its manifest when the folder was made, and now.
    """
    if stored == requested or stored.keys() != requested.keys():
        return False
    return all(
        stored[name] == requested[name]
        or stored[name] in [state["sha256"] for state in read_manifest(workdir, name).facts.get("earlier", [])]
        for name in stored
    )


def is_outdated(workdir: epath.Path, folder: str) -> bool:
    """Returns whether the inputs of a complete folder have changed since it was made.

    Returns False for the folder of a trained model, which stays valid.
    """
    inputs = read_manifest(workdir, folder).inputs
    now = {name: digest(workdir, name) if (workdir / name / "manifest.json").exists() else "" for name in inputs}
    return inputs != now and folder.split("/")[0] not in _TRAINED


def _reopen_grown(workdir: epath.Path, folder: str, requested: Mapping[str, Any]) -> None:
    """Opens a complete or begun folder again if photos were added to its inputs.

    Process 0 opens the folder; other processes wait. requested: present settings and inputs of the folder.
    """
    path = workdir / folder
    while True:
        manifest = read_manifest(workdir, folder) if (path / "manifest.json").exists() else None
        if manifest:
            settings_before, inputs = manifest.settings, manifest.inputs
        elif (path / "begun.json").exists():
            stored = _load(path / "begun.json", [*requested, "earlier", "moves", "mended"])
            settings_before, inputs = stored["settings"], stored["inputs"]
        else:
            return
        if settings_before != requested["settings"] or not _has_grown(workdir, inputs, requested["inputs"]):
            return
        if not processes.index():
            reopen_to_extend(workdir, folder, requested)
            return
        time.sleep(1.0)


def reopen_to_extend(workdir: epath.PathLike, folder: str, requested: Mapping[str, Any]) -> Stage:
    """Opens a folder again to add photos to it, and returns it as a Stage.

    The files of the folder are moved to its subfolder EARLIER/NUMBER. If the folder is not complete, its shards are
    moved too, so they are not lost. requested: new settings and inputs of the folder.
    """
    path = local(workdir) / folder
    disk.lock(path)
    begun = {"earlier": [], "moves": 0}
    if (path / "begun.json").exists():
        begun = _load(path / "begun.json", list(begun))
    if (path / "manifest.json").exists():
        manifest = read_manifest(workdir, folder)
        state = {"sha256": digest(workdir, folder), "counts": manifest.counts}
        begun = {"earlier": [*manifest.facts.get("earlier", []), state], "moves": 0}
    else:
        _move_earlier(path, begun["moves"])  # the previous move may have been interrupted
    begun = {**begun, "moves": begun["moves"] + 1}
    write_json(path / "begun.json", {**requested, **begun, "format": FORMAT})
    (path / "manifest.json").unlink(missing_ok=True)
    _move_earlier(path, begun["moves"])
    return Stage(path, folder, **requested, manifest=None, earlier=begun["earlier"])


def _move_earlier(path: epath.Path, number: int) -> None:
    """Moves the files of a folder into its subfolder EARLIER/NUMBER, unless they have been moved.

    Process 0 moves the files; other processes wait. If `number` is 0, nothing is moved.
    """
    folder = path / EARLIER / str(number)
    moved = folder / "moved"
    while number and not moved.exists():
        if processes.index():
            time.sleep(1.0)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry.name not in ("begun.json", "manifest.json", EARLIER) and not entry.name.startswith("."):
                entry.replace(folder / entry.name)
        write_bytes(moved, b"")


def local(path: epath.PathLike) -> epath.Path:
    """Returns the path of a local folder, with ~ replaced by the home folder.

    Raises StageError if the path is a URL, also with a single slash (s3:/bucket/run), or is not UTF-8. The message
    contains only the scheme of the URL, because the rest may contain a password.
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


#: Key that files of earlier releases can lack -> value of the key for such a file.
_DEFAULTS = {"files": {}, "format": 1, "code": "", "mended": None, "earlier": [], "moves": 0}


def _load(path: epath.Path, keys: Sequence[str]) -> dict[str, Any]:
    """Returns the values of some keys in `manifest.json` or `begun.json`, and of the key `format`.

    Raises StageError if the file is damaged or lacks a key, or if its format is newer than FORMAT.
    """
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StageError(
            f"{path} is damaged ({error}): restore it, or remove {path.parent} and run its stage again"
        ) from None
    if isinstance(stored, dict):
        stored = {**_DEFAULTS, **stored}
        if isinstance(stored.get("settings"), dict):
            stored["settings"] = settings.completed(stored["settings"])
        if isinstance(stored["format"], int) and stored["format"] > FORMAT:
            raise StageError(
                f"{path} has format {stored['format']}, written by version {stored['code'] or 'unknown'}, and this "
                f"release ({__version__}) reads up to format {FORMAT}: install that version or a later one"
            )
    if (
        not isinstance(stored, dict)
        or not stored.keys() >= set(keys)
        or not isinstance(stored["format"], int)
        or not isinstance(stored["files"], dict)
        or not all(isinstance(stored.get(key, {}), dict) for key in ("settings", "inputs"))
    ):
        raise StageError(
            f"{path} lacks one of the keys {', '.join(keys)}, or has a value of a wrong type, so the file is damaged "
            f"or of another version: restore it, or remove {path.parent} and run its stage again"
        )
    return {key: stored[key] for key in {**dict.fromkeys(keys), "format": None}}


def digest(workdir: epath.PathLike, folder: str) -> str:
    """Returns the SHA-256 of a folder's manifest, without its key `code`.

    Raises StageError if the folder is not complete.
    """
    read_manifest(workdir, folder)
    stored = json.loads((epath.Path(workdir) / folder / "manifest.json").read_bytes())
    return hashlib.sha256(_json({key: value for key, value in stored.items() if key != "code"})).hexdigest()


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file atomically: after a crash, the file is missing, unchanged or complete."""
    write_bytes(path, _json(value))


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", text):
        text = json.dumps(value, indent=1, sort_keys=True)  # a path has bytes that are not UTF-8
    return (text + "\n").encode()


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically: after a crash, the file is missing, unchanged or complete."""
    with disk.writing(path) as temporary:
        temporary.write_bytes(data)


def first_difference(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns the first setting that differs: its dotted key, its stored value and its requested value.

    Only keys that are in both are compared. Returns None if their values are equal.

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
    """Returns the advice at the end of an error message: how to make a folder again.

    path, folder: path of the folder, and its name in the work directory.
    """
    verb = PATH.get(folder.split("/")[0], "audit")
    if verb == "audit":
        return f"remove {path} to make it again"
    return f"make it again with `geotoken all --remake={verb}`"


def _check_same(
    path: epath.Path, folder: str, stored: Mapping[str, Any], requested: Mapping[str, Any], grown: bool
) -> None:
    """Raises OtherSettingsError if settings or inputs differ. grown: whether photos were added to the inputs."""
    for part in ("settings", "inputs"):
        difference = _any_difference(stored[part], requested[part], "")
        if difference is None:
            continue
        key, old, new = difference
        problem = (
            f"config.{key} is {new!r}, but {path} was made with {old!r}"
            if part == "settings"
            else f"{path} was made from other files in {key}/ than the present ones"
        )
        if part == "inputs" and grown and PATH.get(folder) in UPDATED:
            raise OtherSettingsError(
                f"{path} was made before photos were added to {key}/: take them in with --update, or "
                f"{how_to_remake(path, folder)}",
                path,
            )
        raise OtherSettingsError(f"{problem}: use another --workdir, or {how_to_remake(path, folder)}", path)


def _any_difference(old: Any, new: Any, place: str) -> tuple[str, Any, Any] | None:
    """Returns the dotted key, the old and the new value of the first difference, also if only one side has the key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = _any_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if difference:
                return difference
        return None
    return None if old == new else (place, old, new)
