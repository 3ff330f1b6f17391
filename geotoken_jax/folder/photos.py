"""Finds the photos that a user names, predicts them, and writes the answers to a file that survives interruptions."""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax.backbone.preprocess import ENDINGS, ImageError
from geotoken_jax.folder import outputs
from geotoken_jax.folder.sidecars import Sidecars
from geotoken_jax.pages.answers import place, radii
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
            found.photos[_text(argument)] = argument
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
                name = _text(os.path.relpath(path, folder))
                found.photos[_text(path) if name in found.photos else name] = path


def _text(path: str) -> str:
    """Returns a path as text that all files of answers can contain: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of the answers.

    output: file for the answers (see outputs.FORMATS); if None, they are printed. json: whether they are printed as
    JSON lines. min_within: condition on answers; those that do not meet it become unknown. xmp: whether photos get
    sidecars. dry_run: whether sidecars are printed instead. Raises SettingsError if the values do not fit together.
    """

    output: str | None = None
    json: bool = False
    min_within: outputs.MinWithin | None = None
    xmp: bool = False
    dry_run: bool = False

    def __post_init__(self):
        if self.dry_run and not self.xmp:
            raise SettingsError("--dry-run prints the sidecars that --xmp would write: add --xmp")
        if self.dry_run and self.output:
            raise SettingsError("--dry-run writes no file: leave out --output")


def run(model: Predictor, identity: str, found: Found, form: Form) -> int:
    """Predicts the photos, gives the answers in their form, and returns the exit status.

    The status is 2 if any photo cannot be read or any sidecar cannot be written, else 0. A photo that cannot be read is
    reported on standard error, and the others are predicted. identity: text that is different for different models. If
    the output was begun before, its answers are kept.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can be in any encoding
    file = outputs.Output(Path(form.output), identity) if form.output else None
    sidecars = Sidecars(form.dry_run) if form.xmp else None
    if file and sidecars:
        for answer in file.answers():
            if answer["id"] in found.photos:
                sidecars.add(found.photos[answer["id"]], outputs.judged(answer, form.min_within))
    todo = {name: photo for name, photo in found.photos.items() if not file or name not in file.done}
    shown = len(found.photos) > 1 and (file is not None or not sys.stdout.isatty())
    failed = 0
    with Progress("predict", len(found.photos), "photos", len(found.photos) - len(todo), shown=shown) as progress:
        for name, answer in zip(todo, model.stream(todo.values()), strict=True):
            progress.add()
            if isinstance(answer, ImageError):
                print(f"geotoken predict: {answer}", file=sys.stderr)
                failed += 1
                continue
            whole = {"id": name, **answer.plain()}
            known = outputs.judged(whole, form.min_within)
            beside = sidecars.add(todo[name], known) if sidecars else None
            if file:
                file.add(whole)
            elif beside or not form.dry_run:
                print(_line({**known, "id": beside} if form.dry_run else known, form.json), flush=True)
    for note in itertools.chain(found.notes(), sidecars.notes() if sidecars else ()):
        print(f"geotoken predict: {note}", file=sys.stderr)
    if file:
        written = file.finish(found.photos, form.min_within)
        print(f"{form.output}: {written:,} answers", file=sys.stderr)
    return 2 if failed or found.unreadable or (sidecars and sidecars.failed) else 0


def _line(answer: outputs.Answer, as_json: bool) -> str:
    if as_json:
        return json.dumps(answer)
    return f"{answer['id']}  {place(answer)}  {radii(answer)}"


def identity(model: Any) -> str:
    """Returns a text that is different for different models. model: folder of an export, or a wheel with weights."""
    sums = Path(model) / "SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else str(model)
