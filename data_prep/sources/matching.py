"""Finds the file of each row of a table, among the files of a folder."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from data_prep.sources import Drop, Photo
from geotoken_jax.backbone.preprocess import ENDINGS
from geotoken_jax.folder.walk import Files


def pair(
    rows: Iterable[Photo | Drop], files: Files, file_name: Callable[[str], str]
) -> Iterator[tuple[Photo | Drop, str]]:
    """Yields pairs: a photo and the path of its file, or a drop and "".

    First yields a pair for each row of the table. A row is dropped if its id is repeated, or if it has no file in the
    folder. Then yields a drop for each photo without a row, and for each subfolder that cannot be opened.

    rows: rows of the table. files: files of the folder. file_name: function that returns the relative path for an id.
    The path is only looked up in `files`, never opened, because it comes from the table.
    """
    rows = list(rows)
    names = [file_name(row.id) for row in rows]
    found = _find(names, files.paths)
    ids = set()
    for row, name in zip(rows, names, strict=True):
        file = found.get(name, "")
        if isinstance(row, Photo):
            reason = "repeated id" if row.id in ids else _reason(name, file, files)
            ids.add(row.id)
            row = Drop(row.id, reason) if reason else row
        yield row, "" if isinstance(row, Drop) else files.paths[file]
    used = set(found.values())
    for name in files.photos():
        if name not in used:
            yield Drop(name, "link out of the folder" if name in files.outside else "no metadata"), ""
    for name in files.unreadable:
        yield Drop(name or files.folder, "unreadable folder"), ""


def _reason(name: str, file: str, files: Files) -> str:
    if file:
        return "link out of the folder" if file in files.outside else ""
    return "outside the folder" if _is_outside(name) else "no image"


def _is_outside(name: str) -> bool:
    """Returns whether a relative path leads out of the folder, such as ../a.jpg or /a.jpg."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts


def _find(names: Sequence[str], paths: Mapping[str, str]) -> dict[str, str]:
    """Returns name in the table -> relative path of its file, for the names that have a file.

    A name that equals no path is compared with the paths in several forms, such as in lower case (_FORMS). A match in
    such a form is used only if it is unique: only one name and one path have this form, and no other name has this file
    already.
    """
    found = {name: name for name in names if name in paths}
    rest = [name for name in dict.fromkeys(names) if name not in paths and not _is_outside(name)]
    free = paths.keys() - found.keys()
    for of_name, of_path in _FORMS if rest else ():
        by_name, by_path = _grouped(rest, of_name), _grouped(paths, of_path)
        for form, [name, *others] in by_name.items():
            same = by_path.get(form, [])
            if form and not others and len(same) == 1 and same[0] in free:
                found[name] = same[0]
        rest = [name for name in rest if name not in found]
        free = free - set(found.values())
    return found


def _grouped(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return groups


def _spelled(name: str) -> str:
    """Returns a path with composed Unicode characters (NFC), `/` between folders, and no `./`."""
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).as_posix()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _spelled(name).casefold())


def _without_ending(path: str) -> str:
    stem, ending = os.path.splitext(_folded(path))
    return stem if ending in ENDINGS else ""


def _without_folder(name: str) -> str:
    """Returns the form `_folded` of a name without a folder, or "" if the name has a folder."""
    return "" if "/" in _spelled(name) else _folded(name)


#: Forms in which a name in the table is compared with the path of a file, such as in lower case or without the ending.
#: The strictest form is first. A form is a pair of functions: the first simplifies the name, the second the path. If a
#: function returns "", nothing is compared.
_FORMS: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (_spelled, _spelled),
    (_folded, _folded),
    (_folded, _without_ending),
    (_without_folder, lambda path: _folded(path).rsplit("/", 1)[-1]),
    (_without_folder, lambda path: _without_ending(path).rsplit("/", 1)[-1]),
)
