"""Reads the gallery photos to exclude for each photo from tables that a user names."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from geotoken_jax import tables
from geotoken_jax.gallery.exclude import Excluded
from geotoken_jax.settings import SettingsError

_AUTHOR = {"id": tables.COLUMNS["id"], "author": ("author", "ownernsid")}
_IDS = {"id": tables.COLUMNS["id"], "excluded_id": ("excluded_id",)}


def read(names: Sequence[str], authors: str | None, ids: str | None) -> dict[str, Excluded]:
    """Returns the gallery photos to exclude of each photo that a table names.

    names: ids of the photos. authors: table with id and author, or None. ids: table with id and excluded_id, any number
    of rows per photo, or None. A row is about the photo with its id or, if there is none, about the photos with this
    file name, with or without ending. Raises SettingsError if a table names none of the photos, and TableError if it
    cannot be read.
    """
    by_author, by_ids = _listed(names, authors, _AUTHOR, "author"), _listed(names, ids, _IDS, "ids")
    found = {}
    for name in names:
        written = set(by_author.get(name, ()))
        if len(written) > 1:
            raise tables.TableError(
                f"{authors} names several authors of {name!r}, such as {min(written)!r} and {max(written)!r}: keep one "
                "row per photo"
            )
        if written or name in by_ids:
            found[name] = Excluded(min(written, default=""), tuple(by_ids.get(name, ())))
    return found


def digest(files: Sequence[str | None]) -> str:
    """Returns a text that is different for different tables; "" if all are None."""
    sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "" for file in files]
    return " ".join(sums) if any(sums) else ""


def _listed(
    names: Sequence[str], path: str | None, columns: Mapping[str, Sequence[str]], option: str
) -> dict[str, list[str]]:
    """Returns photo -> values of the second column in its rows; empty values are left out."""
    if path is None:
        return {}
    photos: dict[str, list[str]] = {}
    for name in names:
        for form in dict.fromkeys(_forms(name)):
            photos.setdefault(form, []).append(name)
    exact, listed = set(names), {}
    _, column = columns
    for row in tables.read(path, columns):
        if row.fault:
            raise tables.TableError(f"{path}, {row.place}: the row {row.fault}")
        name, value = str(row.values["id"]).strip(), str(row.values[column] or "").strip()
        matched = [name] if name in exact else [photo for form in _forms(name)[1:] for photo in photos.get(form, ())]
        for photo in dict.fromkeys(matched):
            listed.setdefault(photo, []).append(value)
    if not listed:
        raise SettingsError(
            f"--exclude-{option}={path} names none of the {len(names):,} photos, such as {names[0]!r}: write the paths "
            "of the photos in their folder, or their file names, into its column id"
        )
    return {photo: [value for value in values if value] for photo, values in listed.items()}


def _forms(name: str) -> tuple[str, str, str]:
    """Returns an id as it is, its file name, and its file name without ending."""
    path = PurePosixPath(name.replace("\\", "/"))
    return name, path.name, path.stem if path.suffix else path.name
