"""Finds the photos that a user names, predicts them, and writes the answers to a file that survives interruptions."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import hub
from geotoken_jax.backbone.preprocess import ENDINGS, ImageError
from geotoken_jax.folder import outputs, walk
from geotoken_jax.pages.answers import place, radii
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError


@dataclasses.dataclass
class Found:
    """Photos that the user names.

    photos: id -> path, or bytes of standard input. The id of a photo in a named folder is its path relative to that
    folder, so that tables of the folder fit; the id of a named file is its path as given. folders: the named folders.
    """

    photos: dict[str, Any] = dataclasses.field(default_factory=dict)
    folders: list[walk.Files] = dataclasses.field(default_factory=list)

    @property
    def unreadable(self) -> bool:
        """Whether a folder cannot be opened."""
        return any(files.unreadable for files in self.folders)

    def notes(self) -> Iterator[str]:
        """Yields sentences on the files that are left out, and on folders that cannot be opened."""
        for files in self.folders:
            yield from files.notes()


def find(arguments: Sequence[str]) -> Found:
    """Returns the photos of a list of files and folders; "-" is standard input. Folders are searched recursively.

    Raises SettingsError if there is no photo.
    """
    found = Found()
    for argument in arguments:
        if argument == "-":
            found.photos["-"] = sys.stdin.buffer.read()
        elif os.path.isdir(argument):
            found.folders.append(walk.walk(argument))
            for relative, path in found.folders[-1].photos().items():
                found.photos[path if relative in found.photos else relative] = path
        else:
            found.photos[argument] = argument
    if not found.photos:
        notes = "; ".join(found.notes())
        raise SettingsError(
            f"{', '.join(arguments)} has no photo{f' ({notes})' if notes else ''}: name a folder with files that end "
            f"in {', '.join(ENDINGS)}, or name single files"
        )
    return found


def run(model: Predictor, identity: str, found: Found, output: str | None, as_json: bool) -> int:
    """Predicts the photos, prints or writes the answers, and returns the exit status: 2 if any photo failed, else 0.

    A photo that cannot be read is reported on standard error, and the others are predicted. identity: text that is
    different for different models. output: file for the answers (see outputs.FORMATS); if None, they are printed, as
    JSON lines if as_json. If the file was begun before, its answers are kept.
    """
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
    return f"{name}  {place(answer.plain())}  {radii(answer.plain())}"


def identity(model: Any) -> str:
    """Returns a text that is different for different models. model: folder of an export, or GeoCLIP's weights."""
    sums = Path(model) / "SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else hub.pinned(model) or str(model)
