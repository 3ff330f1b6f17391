"""Finds the photos that a user names, predicts them, and prints the answers or writes them to a file."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from geotoken_jax import hub
from geotoken_jax.backbone.preprocess import ENDINGS, ImageError
from geotoken_jax.folder import outputs, walk
from geotoken_jax.folder.sidecars import Sidecars
from geotoken_jax.gallery.exclude import Excluded
from geotoken_jax.pages.answers import place, radii
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError


@dataclasses.dataclass
class Found:
    """Photos in the files and folders that the user names.

    photos: path of each photo, by id; for standard input, its bytes. The id of a photo in a named folder is its path
    relative to that folder, because tables of the folder's photos have such paths. The id of a named file is its path
    as given. folders: the named folders.
    """

    photos: dict[str, Any] = dataclasses.field(default_factory=dict)
    folders: list[walk.Files] = dataclasses.field(default_factory=list)

    @property
    def unreadable(self) -> bool:
        """Whether a folder cannot be opened."""
        return any(files.unreadable for files in self.folders)

    def notes(self) -> Iterator[str]:
        """Yields sentences about the files that are left out and the folders that cannot be opened."""
        for files in self.folders:
            yield from files.notes()


def find(arguments: Sequence[str]) -> Found:
    """Returns the photos in files and folders. Folders are searched recursively.

    arguments: paths of files and folders; "-" stands for standard input. Raises SettingsError if there is no photo.
    """
    found = Found()
    for argument in arguments:
        if argument == "-":
            found.photos["-"] = sys.stdin.buffer.read()
        elif os.path.isdir(argument):
            found.folders.append(walk.walk(argument))
            for relative, path in found.folders[-1].photos().items():
                name = _text(relative)
                found.photos[_text(path) if name in found.photos else name] = path
        else:
            found.photos[_text(argument)] = argument
    if not found.photos:
        notes = "; ".join(found.notes())
        raise SettingsError(
            f"{', '.join(arguments)} has no photo{f' ({notes})' if notes else ''}: name a folder with files that end "
            f"in {', '.join(ENDINGS)}, or name single files"
        )
    return found


def _text(path: str) -> str:
    """Returns a path as valid UTF-8 text. Bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class Form:
    """The options of `geotoken predict` for the form of answers.

    output: path of a file for the answers (see outputs.FORMATS); if None, answers are printed. json: whether answers
    are printed as JSON lines. min_within: condition on answers; answers that do not meet it become unknown. xmp:
    whether XMP sidecars are written beside the photos. dry_run: whether sidecars are only listed and not written.
    Raises SettingsError if dry_run is given without xmp or with output.
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


@contextlib.contextmanager
def warnings() -> Iterator[None]:
    """Prints warnings about photos on standard error, with the program's name, as long as the context is open.

    Each warning is printed once, although an HTML page reads the photos again.
    """
    seen: set[str] = set()

    def first(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in seen and not seen.add(text)

    logger, handler = logging.getLogger("geotoken_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("geotoken predict: %(message)s"))
    handler.addFilter(first)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def run(
    model: Predictor, identity: str, found: Found, form: Form, excluded: Mapping[str, Excluded] = MappingProxyType({})
) -> int:
    """Predicts the photos, prints or writes the answers, and returns the exit status.

    The status is 2 if a photo or folder cannot be read or a sidecar cannot be written, else 0. A photo that cannot be
    read is reported on standard error, and the other photos are predicted. Answers that an interrupted run wrote to the
    output are kept.

    identity: text that identifies the model. excluded: gallery photos that a prediction must not use, by id of the
    predicted photo.
    """
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
        stream = model.stream(todo.values(), [excluded.get(name, Excluded()) for name in todo] if excluded else None)
        for name, answer in zip(todo, stream, strict=True):
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
    if excluded:
        print(f"gallery photos were excluded for {len(excluded):,} of {len(found.photos):,} photos", file=sys.stderr)
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
    """Returns a text that identifies a model. model: folder of an export, or of GeoCLIP's weights."""
    sums = Path(model) / "SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else hub.pinned(model) or str(model)
