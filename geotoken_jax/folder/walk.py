"""Finds the files in a folder of photos, for the commands `prepare` and `predict`."""

import collections
import dataclasses
import os
from collections.abc import Iterator

from geotoken_jax.backbone.preprocess import ENDINGS

#: Names of files and folders that macOS and Windows add to folders, and a prefix of more such names.
_CLUTTER = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
_CLUTTER_PREFIX = "._"
#: The sidecar of a photo has the photo's name and this ending.
SIDECAR = ".xmp"


@dataclasses.dataclass
class Files:
    """The files of a folder and its subfolders, without clutter.

    paths: path of each file, by its relative path. Relative paths have `/` between folders. outside: path of each file
    outside the folder to which a link leads, by the relative path of the link. These links are in `paths` too. special:
    number of pipes, sockets, broken links and linked folders. unreadable: reason why a folder cannot be opened, by its
    relative path.
    """

    folder: str
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    special: int = 0
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    def photos(self) -> dict[str, str]:
        """Returns the path of each file with the ending of a photo, by relative path."""
        return {name: path for name, path in self.paths.items() if name.lower().endswith(ENDINGS)}

    @property
    def skipped(self) -> collections.Counter[str]:
        """Number of files that are not photos, by ending. Sidecars of photos, such as a.jpg.xmp, do not count."""
        photos = self.photos()
        others = (name for name in self.paths if name not in photos and name.removesuffix(SIDECAR) not in photos)
        endings = (os.path.splitext(name)[1].lower() for name in others)
        skipped = collections.Counter(ending or "without an ending" for ending in endings)
        return skipped + collections.Counter({"pipes, sockets, broken links or linked folders": self.special})

    def notes(self) -> Iterator[str]:
        """Yields a sentence that counts the files that are not photos, and one per folder that cannot be opened."""
        if skipped := self.skipped:
            counts = ", ".join(f"{n:,} {ending}" for ending, n in skipped.most_common())
            yield f"left out {sum(skipped.values()):,} files that are not photos in a known format: {counts}"
        for name, reason in self.unreadable.items():
            yield f"{os.path.join(self.folder, name)} cannot be opened ({reason}): check its permissions"


def walk(folder: str) -> Files:
    """Returns the files of a folder, sorted by relative path. Links to files are followed, links to folders are not."""
    found = Files(folder)
    inside = os.path.join(os.path.realpath(folder), "")
    pending = [(folder, "")]
    while pending:
        parent, prefix = pending.pop()
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    _add(found, entry, prefix + entry.name, inside, pending)
        except OSError as error:
            found.unreadable[prefix] = error.strerror or str(error)
    found.paths = dict(sorted(found.paths.items()))
    return found


def _add(found: Files, entry: os.DirEntry, name: str, inside: str, pending: list[tuple[str, str]]) -> None:
    if entry.name in _CLUTTER or entry.name.startswith(_CLUTTER_PREFIX):
        return
    if entry.is_dir(follow_symlinks=False):
        pending.append((entry.path, f"{name}/"))
    elif not _is_file(entry):
        found.special += 1
    else:
        found.paths[name] = entry.path
        if entry.is_symlink() and not (target := os.path.realpath(entry.path)).startswith(inside):
            found.outside[name] = target


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False
