"""Reads the user's tables of gallery photos that predictions must not use."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from geotoken_jax import tables
from geotoken_jax.gallery.exclude import Excluded
from geotoken_jax.settings import SettingsError

_AUTHOR = {"id": tables.COLUMNS["id"], "author": ("author", "ownernsid")}
_IDS = {"id": tables.COLUMNS["id"], "excluded_id": ("excluded_id",)}


def read(names: Sequence[str], authors: str | None, ids: str | None) -> dict[str, Excluded]:
    """Returns the gallery photos to exclude, by id of the photo to predict.

    Photos that no table names are left out.

    names: ids of the photos to predict. authors: path of a table with the columns id and author, or None. ids: path of
    a table with the columns id and excluded_id, or None; it may have several rows per photo.

    A row applies to the photo with the row's id. If no photo has this id, the row applies to all photos whose file name
    is the id, with or without its ending. Raises SettingsError if a table names none of the photos, and TableError if a
    table cannot be read.
    """
    by_author, by_ids = _values_by_photo(names, authors, _AUTHOR, "author"), _values_by_photo(names, ids, _IDS, "ids")
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
    """Returns the SHA-256 sums of tables as one text, or "" if all tables are None."""
    sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "" for file in files]
    return " ".join(sums) if any(sums) else ""


def _values_by_photo(
    names: Sequence[str], path: str | None, columns: Mapping[str, Sequence[str]], option: str
) -> dict[str, list[str]]:
    """Returns the values of a table's second column, by photo. Empty values are left out.

    columns: key and accepted headings of the two columns. option: OPTION of the flag --exclude-OPTION, for messages.
    """
    if path is None:
        return {}
    photos: dict[str, list[str]] = {}
    for name in names:
        for form in dict.fromkeys(_spellings(name)):
            photos.setdefault(form, []).append(name)
    exact, listed = set(names), {}
    _, column = columns
    for row in tables.read(path, columns):
        if row.fault:
            raise tables.TableError(f"{path}, {row.place}: the row {row.fault}")
        name, value = str(row.values["id"]).strip(), str(row.values[column] or "").strip()
        matched = (
            [name] if name in exact else [photo for form in _spellings(name)[1:] for photo in photos.get(form, ())]
        )
        for photo in dict.fromkeys(matched):
            listed.setdefault(photo, []).append(value)
    if not listed:
        raise SettingsError(
            f"--exclude-{option}={path} names none of the {len(names):,} photos, such as {names[0]!r}: write the paths "
            "of the photos in their folder, or their file names, into its column id"
        )
    return {photo: [value for value in values if value] for photo, values in listed.items()}


def _spellings(name: str) -> tuple[str, str, str]:
    """Returns the spellings of an id in a table: the id, its file name, and its file name without ending."""
    path = PurePosixPath(name.replace("\\", "/"))
    return name, path.name, path.stem if path.suffix else path.name
