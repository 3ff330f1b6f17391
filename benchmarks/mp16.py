"""Generates a data set like MP16-Pro: parts of one tar, and a CSV. Tests and `benchmarks.photos` use it.

Layout and names are as published (G3, arXiv 2405.14702). A ledger lists which photos `geotoken prepare` should keep,
and how many it should drop for each reason.
"""

import csv
import dataclasses
import io
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.mp16_pro import SMALL

HEADER = ["S3", "IMG_ID", "country", "LON", "AUTHOR", "LAT", "neighbourhood", "city", "county", "state", "region",
          "continent", "note"]  # fmt: skip
CSV = "metadata/MP16_Pro_filtered.csv"
#: Trap, a defect for which `geotoken prepare` must drop a photo -> n: one in n photos has this defect.
TRAPS = {"no metadata": 97, "no image": 89, "no country": 83, "small file": 79, "not .jpg": 101, "placeholder": 103,
         "identical bytes": 107, "repeated id": 109, "coordinates not a number": 113,
         "coordinates out of range": 127}  # fmt: skip
IDENTICAL = 3


@dataclasses.dataclass
class Ledger:
    """The expected results of `geotoken prepare`.

    photos: number of photos to keep. kept: id -> (author, latitude, longitude, city, image). dropped: reason -> number
    of photos to drop.
    """

    photos: int = 0
    kept: dict[str, tuple] = dataclasses.field(default_factory=dict)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)


def picture(rng: random.Random, side: int = 16) -> bytes:
    """Returns a JPEG of noise, with about 0.5 bytes per pixel if it is large."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(file, "JPEG", quality=60)
    return file.getvalue()


def padded(image: bytes, size: int) -> bytes:
    """Returns the JPEG padded to `size` bytes; readers ignore bytes after the end of the image."""
    return image + b"\0" * (size - len(image))


def flickr(side: int = 96) -> bytes:
    """Returns a JPEG like the placeholder that Flickr shows for deleted photos."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    file = io.BytesIO()
    Image.fromarray(((x * y) // 7 % 256).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


class _Parts(io.RawIOBase):
    """A file whose bytes are written to several files, the parts, of `size` bytes each."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.position, self.file = folder, size, 0, io.BytesIO()

    def tell(self):
        return self.position

    def write(self, data):
        data = memoryview(data)
        while len(data):
            part, used = divmod(self.position, self.size)
            if not used:
                self.file.close()
                self.file = (self.folder / f"mp-16-images{part:02d}").open("wb")
            n = self.file.write(data[: self.size - used])
            self.position += n
            data = data[n:]


def generate(
    folder: Path, photos: int, part_size: int, side: int = 16, keep: bool = True, trapped: bool = True
) -> Ledger:
    """Writes a data set of `photos` pictures in parts of `part_size` bytes, and returns its ledger.

    File sizes vary so that about 50 photos have the same size, which is the largest such number in the real data set.

    side: width and height of a picture in pixels. keep: whether the ledger contains the photos to keep. trapped:
    whether some photos have one of TRAPS.
    """
    rng, ledger = random.Random(0), Ledger()
    (folder / "metadata").mkdir(parents=True)
    out = _Parts(folder, part_size)
    pictures = [picture(rng, side) for _ in range(50)]
    smallest = max(SMALL + 1, max(map(len, pictures)) + 4)
    sizes = range(smallest, smallest + max(869, photos // 50))
    same, gone = padded(pictures[0], 5999), padded(flickr(), 9000)
    with (folder / CSV).open("w", newline="", encoding="utf-8") as text:
        table = csv.DictWriter(text, HEADER, restval="")
        table.writeheader()
        tar = tarfile.TarFile(fileobj=out, mode="w")  # pyright: ignore[reportArgumentType]
        for n in range(photos):
            tar.format = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[n % 3]
            name = f"{rng.randrange(256):02x}/{rng.randrange(256):02x}/{n}_{rng.randrange(16**8):08x}.jpg"
            if n % 50 == 49:  # a long name, which needs extra headers
                name = name[:6] + "é" + name[6:]
            trap = next((trap for trap, one in TRAPS.items() if n % one == one - 1), "") if trapped else ""
            image = padded(rng.choice(pictures), rng.choice(sizes) - 4) + n.to_bytes(4)
            row = {
                "IMG_ID": name, "AUTHOR": "" if n % 11 == 0 else f"{rng.randrange(photos // 4 + 1)}@N00",
                "LAT": rng.uniform(-90, 90), "LON": rng.uniform(-180, 180), "city": 'São "Paulo", SP',
                "country": "Brazil",
                "continent": "" if n % 5 else "South America", "note": "two\nlines" if n % 40 == 0 else "",
            }  # fmt: skip
            member = f"{n % 7:03d}/{n % 5:03d}/{'x' * 120 + '/' if n % 50 == 49 else ''}{name.replace('/', '_')}"
            if trap == "small file":
                image = image[:SMALL]
            elif trap == "identical bytes":
                image = same
            elif trap == "placeholder":
                image = padded(gone, 9000 + n % 1000) + n.to_bytes(4)
            elif trap == "not .jpg":
                member, row["IMG_ID"] = member[:-4] + ".png", name[:-4] + ".png"
            elif trap == "no country":
                row["country"] = " "
            elif trap == "coordinates not a number":
                row["LAT"] = "north"
            elif trap == "coordinates out of range":
                row["LON"] = 180.5
            if trap != "no metadata":
                table.writerow(row)
            if trap == "repeated id":
                table.writerow({**row, "LAT": 0, "LON": 0, "AUTHOR": "later"})
            if trap != "no image":
                info = tarfile.TarInfo(member)
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            if trap:
                ledger.dropped[trap] += 1
            if trap in ("", "repeated id"):
                ledger.photos += 1
                if keep:
                    ledger.kept[name] = (row["AUTHOR"] or name, row["LAT"], row["LON"], row["city"], image)
        tar.close()
        out.file.close()
    if 0 < ledger.dropped["identical bytes"] <= IDENTICAL:
        raise ValueError(
            f"photos is {photos}, too few for {IDENTICAL + 1} identical photos: set it to "
            f"{(IDENTICAL + 1) * TRAPS['identical bytes']} or more"
        )
    return ledger
