"""Generates an album: a folder of photos in all formats, with broken files and other files among them.

Its ledger lists how `geotoken predict FOLDER` should treat each file.
"""

import collections
import dataclasses
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from geotoken_jax.backbone.preprocess import ENDINGS

#: Ending -> Pillow's name of the format; JPEG for the others.
_FORMATS = {
    ".mpo": "MPO", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
    ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".avif": "AVIF",
}  # fmt: skip
_FOLDERS = ("", "2024 trip", "2024 trip/sub", "ü 日本 [1]")
#: Number of different pictures per ending. The photos are copies of them.
_PICTURES = 3


@dataclasses.dataclass
class Ledger:
    """The files of an album.

    answered: ids of the photos that can be read. refused: ids of the files with a photo's ending that cannot be read.
    left_out: kind of a file that is no photo -> number of such files. clutter: number of files that operating systems
    add to folders.
    """

    answered: set[str] = dataclasses.field(default_factory=set)
    refused: set[str] = dataclasses.field(default_factory=set)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    clutter: int = 0


def make(root: Path, photos: int, others: int, size: tuple[int, int], seed: int = 0) -> Ledger:
    """Writes an album and returns its ledger.

    photos: number of photos that can be read, equally many per ending. others: number of all other files.
    size: width and height of the photos in pixels.
    """
    rng = np.random.default_rng(seed)
    ledger, seen = Ledger(), set()
    for folder in (*_FOLDERS, "__MACOSX"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    encoded = {ending: [_encoded(ending, size, rng) for _ in range(_PICTURES)] for ending in ENDINGS}
    for number in range(photos):
        ending = ENDINGS[number % len(ENDINGS)]
        name = os.path.join(_FOLDERS[number % len(_FOLDERS)], f"IMG_{number:04}{_cased(ending, number)}")
        (root / name).write_bytes(encoded[ending][number // len(ENDINGS) % _PICTURES])
        ledger.answered.add(name)
    broken = _broken({ending: pictures[0] for ending, pictures in encoded.items()})
    for number in range(others):
        kind, number = number % 3, number // 3
        if kind == 0:
            name, data = broken[number % len(broken)]
            name = f"broken{number:03}{name}"
            (root / name).write_bytes(data)
            (ledger.answered if name.endswith("nearly whole.jpg") else ledger.refused).add(name)
        elif kind == 1:
            ledger.left_out[_foreign(root, number)] += 1
        else:
            clutter = (f"._IMG_{number:04}.JPG", f"__MACOSX/IMG_{number:04}.jpg", ".DS_Store", "Thumbs.db")
            path = root / clutter[number % len(clutter)]
            ledger.clutter += path not in seen
            seen.add(path)
            path.write_bytes(b"\0\5\26\7")
    return ledger


def _cased(ending: str, number: int) -> str:
    return ending.upper() if number % 5 == 0 else ending


def _encoded(ending: str, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    file, name = io.BytesIO(), _FORMATS.get(ending, "JPEG")
    if name == "HEIF":
        pillow_heif.from_pillow(image).save(file, quality=60)
    else:
        image.save(file, name, **{"AVIF": {"speed": 10}}.get(name, {}))
    return file.getvalue()


def _broken(whole: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Returns pairs for broken files: end of the name, and contents. whole: ending -> contents of a readable photo."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    cut = [(f" cut{ending}", whole[ending][: len(whole[ending]) // 2]) for ending in dict.fromkeys(ENDINGS)]
    nearly = whole[".jpg"][:-20]
    return [
        (" empty.png", b""),
        (" text.jpg", b"no photo"),
        (" page.webp", b"<!doctype html><html></html>"),
        (" archive.jpeg", archive.getvalue()),
        (" nearly whole.jpg", nearly),
        (" zeros.heic", bytes(4096)),
        *cut,
    ]


def _foreign(root: Path, number: int) -> str:
    """Writes a file that is no photo, and returns its kind, as in Ledger.left_out."""
    endings = (".cr2", ".mov", ".jxl", ".txt", "")
    kind = number % (len(endings) + 2)
    if kind < len(endings):
        (root / f"foreign{number:03}{endings[kind]}").write_bytes(b"x")
        return endings[kind] or "without an ending"
    if kind == len(endings) and not (root / f"pipe{number:03}.jpg").exists():
        os.mkfifo(root / f"pipe{number:03}.jpg")
    elif kind > len(endings) and not (root / f"link{number:03}.jpg").is_symlink():
        (root / f"link{number:03}.jpg").symlink_to(root / "nothing.jpg")
    return "pipes, sockets, broken links or linked folders"
