"""Whether the folder of an export is whole: its files against SHA256SUMS, which lies beside them."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

#: Name of the file of `SHA-256  name` lines.
SUMS = "SHA256SUMS"
#: Files that opening an export reads whole anyway; all others are memory-mapped, and may be many gigabytes.
_READ = (".json", ".safetensors")


class ExportError(ValueError):
    """The folder of an export cannot be used; the message names the file and the fix."""


def check(folder: epath.PathLike, everything: bool) -> None:
    """Raises ExportError, naming the first, if a file of an export is missing or is not what it was.

    everything: every file's sum is compared (demo: 0.6 GB); else those of the parameters and settings alone.
    """
    folder = epath.Path(folder)
    for name, expected in sums(folder).items():
        file = folder / name
        if not file.exists():
            raise ExportError(f"{folder} lacks {name}: the export is not whole, so copy it, or make it, again")
        if (everything or file.suffix in _READ) and sha256(file) != expected:
            raise ExportError(f"{file} is not what {SUMS} says: it is damaged or was changed, so copy the export again")


def sums(folder: epath.PathLike) -> dict[str, str]:
    """Returns the SHA-256 of every file of an export, by name. Raises ExportError if it has no such list, or the list
    names what is not in the folder's own tree."""
    folder = epath.Path(folder)
    if not (folder / SUMS).exists():
        raise ExportError(f"{folder} has no {SUMS}: the export is not whole, so copy it, or make it, again")
    found = {}
    for line in (folder / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = pathlib.PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts:
            raise ExportError(f"{folder / SUMS} has the line {line!r}, which no export of ours has: do not trust it")
        found[name] = digest
    return found


def backbone(
    folder: epath.PathLike, section: Mapping[str, Any], referred: Mapping[str, Any] | None, given: epath.PathLike | None
) -> dict[str, Any]:
    """Returns the settings of an export's backbone with the folder that its checkpoint is in.

    section: of config.json. referred: name and sums of a checkpoint that the export does not hold. given: its folder.
    Raises ExportError if it is not given, or is another one.
    """
    referred = referred or {}
    held = section["huggingface"]["path"]
    if section["backbone"] != "huggingface" or (held and given is None):
        path = str(epath.Path(folder) / held) if held else ""
        return {**section, "huggingface": {**section["huggingface"], "path": path}}
    if given is None:
        raise ExportError(
            f"{folder} does not hold its backbone {referred.get('name')}: download that checkpoint and name its "
            "folder, GeoToken.load(..., backbone=DIR) or --backbone=DIR"
        )
    for name, expected in referred.get("sha256", {}).items():
        file = epath.Path(given) / name
        if not file.exists() or sha256(file) != expected:
            raise ExportError(
                f"{file} is {'another file' if file.exists() else 'not there'}: the backbone of {folder} is "
                f"{referred.get('name')}, as SHA-256 sums in its config.json say; download it again"
            )
    return {**section, "huggingface": {**section["huggingface"], "path": str(given)}}


def sha256(file: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(file).open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
