"""Checks the files of an export, and the checkpoint of its backbone, against their SHA-256 sums."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from geotoken_jax import disk
from geotoken_jax.errors import UserError

#: Name of the file with one line `SHA-256  name` per file of the export.
SUMS = "SHA256SUMS"
#: Types of files whose sums are always checked when an export is opened, because these files are read in full. Other
#: files are memory-mapped and may have many gigabytes.
_READ_IN_FULL = (".json", ".safetensors")

#: Advice at the end of messages about a bad file.
_AGAIN = "copy the export again, or make it again with `geotoken export`"


class ExportError(UserError, ValueError):
    """An export cannot be used; the message names the file and the fix."""


@contextlib.contextmanager
def reading(folder: epath.PathLike) -> Iterator[None]:
    """Context manager that turns errors from the contents of an export, e.g. a missing key, into ExportError."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{folder} cannot be used ({type(error).__name__}: {error}): it was edited, or made by another version; "
            f"{_AGAIN}"
        ) from error


def check(folder: epath.PathLike, everything: bool) -> None:
    """Raises ExportError, naming the first bad file, if a file of an export is missing or does not match its sum.

    everything: if True, the sum of every file is compared (demo: 0.6 GB); if False, only the sums of parameters and
    settings.
    """
    folder = epath.Path(folder)
    for name, expected in sums(folder).items():
        file = folder / name
        if not file.exists():
            raise ExportError(f"{folder} lacks {name}, which is in its {SUMS}: {_AGAIN}")
        if (everything or file.suffix in _READ_IN_FULL) and sha256(file) != expected:
            raise ExportError(f"{file} does not match its sum in {SUMS}: it is damaged or was edited; {_AGAIN}")


def write_sums(folder: epath.PathLike) -> dict[str, str]:
    """Writes SHA256SUMS for all files of an export, and returns file name -> SHA-256.

    Hidden files and begun.json are left out. Hidden files are locks, or were left by interrupted processes; begun.json
    belongs to the stage `export`.
    """
    folder = epath.Path(folder)
    files = (file for file in sorted(pathlib.Path(folder).rglob("[!.]*")) if file.is_file())
    digests = {str(file.relative_to(folder)): sha256(file) for file in files if file.name not in (SUMS, "begun.json")}
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    with disk.writing(folder / SUMS) as temporary:
        temporary.write_bytes(lines.encode())
    return digests


def sums(folder: epath.PathLike) -> dict[str, str]:
    """Returns file name -> SHA-256 for all files that SHA256SUMS of an export lists. The files themselves are not read.

    Raises ExportError if SHA256SUMS is missing, or if a line has no name or names a file outside the folder.
    """
    folder = epath.Path(folder)
    if not (folder / SUMS).exists():
        raise ExportError(f"{folder} has no {SUMS}: {_AGAIN}")
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except UnicodeDecodeError:
        raise ExportError(f"{folder / SUMS} is damaged because it is not UTF-8: {_AGAIN}") from None
    digests = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        path = pathlib.PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            raise ExportError(
                f"{folder / SUMS} has the line {line!r}, which names no file inside the folder: do not use this export"
            )
        digests[name] = digest
    return digests


def backbone(
    folder: epath.PathLike, section: Mapping[str, Any], referred: Mapping[str, Any] | None, given: epath.PathLike | None
) -> dict[str, Any]:
    """Returns the settings of an export's backbone, with the folder of its checkpoint filled in.

    section: settings of the backbone in the export's config.json. referred: name, commit and SHA-256 sums of the
    backbone's checkpoint; None if the backbone has no checkpoint. given: folder of that checkpoint, or its name on the
    hub; if None, the copy in the export is used. For a backbone without a checkpoint, `given` is ignored.

    Raises ExportError if there is neither a checkpoint nor a copy, or if a file of the checkpoint is missing or does
    not match its sum. Raises SettingsError if the checkpoint cannot be downloaded.
    """
    referred = referred or {}
    copy = section["huggingface"]["path"]
    if section["backbone"] != "huggingface" or (copy and given is None):
        path = str(epath.Path(folder) / copy) if copy else ""
        return {**section, "huggingface": {**section["huggingface"], "path": path}}
    required = "@".join(referred[key] for key in ("name", "commit") if key in referred)
    if given is None:
        raise ExportError(
            f"{folder} does not contain its backbone {required}: give that name on the Hugging Face hub, or a folder "
            "with the checkpoint, as --backbone=DIR or GeoToken.load(..., backbone=DIR)"
        )
    from geotoken_jax.backbone import checkpoint  # its imports take a second

    given = checkpoint.folder(str(given))
    for name, expected in referred.get("sha256", {}).items():
        file = epath.Path(given) / name
        if not file.exists() or sha256(file) != expected:
            raise ExportError(
                f"{file} {'does not match its SHA-256 sum' if file.exists() else 'is missing'}: "
                f"{folder} requires the backbone {required}, with the sums in {folder}/config.json; give the folder or "
                "the name of this backbone"
            )
    return {**section, "huggingface": {**section["huggingface"], "path": str(given)}}


def sha256(file: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(file).open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
