"""Finds the photos that a user names, predicts them, and writes the answers to a file that survives interruptions."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import hub
from geotoken_jax.backbone.preprocess import ENDINGS, ImageError
from geotoken_jax.folder import outputs
from geotoken_jax.pages.answers import radii
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError

#: Files and folders that macOS and Windows add to folders, and beginnings of such names.
_CLUTTER = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
_CLUTTER_PREFIX = "._"


@dataclasses.dataclass
class Found:
    """Photos that the user names.

    photos: id -> path, or bytes of standard input. The id of a photo in a named folder is its path relative to that
    folder, so that tables of the folder fit; the id of a named file is its path as given. skipped: ending -> number of
    files of a folder that have no ending of a photo. unreadable: folders that cannot be opened, with the reason.
    """

    photos: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unreadable: list[str] = dataclasses.field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """Yields a sentence on the files that are left out, and one on each folder that cannot be opened."""
        if self.skipped:
            counts = ", ".join(f"{n:,} {ending}" for ending, n in self.skipped.most_common())
            yield f"left out {sum(self.skipped.values()):,} files that are no photos in a known format: {counts}"
        yield from self.unreadable


def find(arguments: Sequence[str]) -> Found:
    """Returns the photos of a list of files and folders; "-" is standard input. Folders are searched recursively.

    Raises SettingsError if there is no photo.
    """
    found = Found()
    for argument in arguments:
        if argument == "-":
            found.photos["-"] = sys.stdin.buffer.read()
        elif os.path.isdir(argument):
            _search(argument, found)
        else:
            found.photos[argument] = argument
    if not found.photos:
        notes = "; ".join(found.notes())
        raise SettingsError(
            f"{', '.join(arguments)} has no photo{f' ({notes})' if notes else ''}: name a folder with files that end "
            f"in {', '.join(ENDINGS)}, or name single files"
        )
    return found


def _search(folder: str, found: Found) -> None:
    def note(error: OSError) -> None:
        found.unreadable.append(f"{error.filename} cannot be opened ({error.strerror}): check its permissions")

    for parent, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if name not in _CLUTTER)
        for name in sorted(files):
            path = os.path.join(parent, name)
            ending = os.path.splitext(name)[1].lower()
            if name in _CLUTTER or name.startswith(_CLUTTER_PREFIX):
                continue
            if ending not in ENDINGS:
                found.skipped[ending or "without an ending"] += 1
            elif not os.path.isfile(path):
                found.skipped["pipes, sockets or broken links"] += 1
            else:
                relative = os.path.relpath(path, folder)
                found.photos[path if relative in found.photos else relative] = path


def run(model: Predictor, identity: str, found: Found, output: str | None, as_json: bool) -> int:
    """Predicts the photos, prints or writes the answers, and returns the exit status: 2 if any photo failed, else 0.

    A photo that cannot be read is reported on standard error, and the others are predicted. identity: text that is
    different for different models. output: file for the answers (see outputs.FORMATS); if None, they are printed, as
    JSON lines if as_json. If the file was begun before, its answers are kept.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can be in any encoding
    file = outputs.Output(Path(output), identity) if output else None
    todo = {name: photo for name, photo in found.photos.items() if not file or name not in file.done}
    shown = len(found.photos) > 1 and (file is not None or not sys.stdout.isatty())
    failed = 0
    with Progress("predict", len(found.photos), "photos", len(found.photos) - len(todo), shown=shown) as progress:
        for name, answer in zip(todo, model.stream(todo.values()), strict=True):
            progress.add()
            if isinstance(answer, ImageError):
                print(f"geotoken predict: {answer}", file=sys.stderr)
                failed += 1
            elif file:
                file.add(name, answer)
            else:
                print(_line(name, answer, as_json), flush=True)
    for note in found.notes():
        print(f"geotoken predict: {note}", file=sys.stderr)
    if file:
        written = file.finish(found.photos)
        print(f"{output}: {written:,} answers", file=sys.stderr)
    return 2 if failed or found.unreadable else 0


def _line(name: str, answer: Prediction, as_json: bool) -> str:
    if as_json:
        return json.dumps({"id": name, **answer.plain()})
    return f"{name}  {answer.latitude:.5f}, {answer.longitude:.5f}  {radii(answer.plain())}"


def identity(model: Any) -> str:
    """Returns a text that is different for different models. model: folder of an export, or GeoCLIP's weights."""
    sums = Path(model) / "SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else hub.pinned(model) or str(model)
