"""A generated MP16-Pro: parts of one tar, its CSV, and the ledger of what must become of every photo in it."""

import csv
import dataclasses
import io
import random
import tarfile
from collections import Counter

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from data_prep.placeholder import dhash

HEADER = ["S3", "IMG_ID", "country", "LON", "AUTHOR", "LAT", "neighbourhood", "city", "county", "state", "region",
          "continent", "note"]  # fmt: skip
CSV = "metadata/MP16_Pro_filtered.csv"
#: A photo in this many has the trap of that name.
TRAPS = {"no metadata": 97, "no image": 89, "no country": 83, "small file": 79, "not .jpg": 101, "placeholder": 103,
         "identical bytes": 107, "repeated id": 109, "coordinates not a number": 113,
         "coordinates out of range": 127}  # fmt: skip
IDENTICAL = 3


@dataclasses.dataclass
class Ledger:
    """kept: id -> (author, latitude, longitude, city, image). dropped: reason -> count."""

    kept: dict = dataclasses.field(default_factory=dict)
    dropped: Counter = dataclasses.field(default_factory=Counter)
    photos: int = 0


def picture(rng: random.Random, side=16) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(file, "JPEG", quality=60)
    return file.getvalue()


def padded(image: bytes, size: int) -> bytes:
    """Returns a JPEG of exactly `size` bytes: what follows the end of the image is not read."""
    return image + b"\0" * (size - len(image))


def flickr(side=96) -> bytes:
    """Returns a picture that stands for one that is gone."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    file = io.BytesIO()
    Image.fromarray(((x * y) // 7 % 256).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


class _Parts(io.RawIOBase):
    """Cuts what is written into parts of a given size."""

    def __init__(self, folder, size):
        self.folder, self.size, self.position, self.file = folder, size, 0, None

    def tell(self):
        return self.position

    def write(self, data):
        data = memoryview(data)
        while len(data):
            part, used = divmod(self.position, self.size)
            if not used:
                if self.file:
                    self.file.close()
                self.file = (self.folder / f"mp-16-images{part:02d}").open("wb")
            n = self.file.write(data[: self.size - used])
            self.position += n
            data = data[n:]


def generate(folder, photos, part_size, seed=0, end=True, keep=True, trapped=True) -> Ledger:
    """Writes a data set. end: with the zeros after the last member. keep: the ledger has the photos too."""
    rng, ledger = random.Random(seed), Ledger()
    (folder / "metadata").mkdir(parents=True)
    out = _Parts(folder, part_size)
    pictures = [picture(rng) for _ in range(50)]
    same, gone = padded(pictures[0], 5999), padded(flickr(), 9000)
    with (folder / CSV).open("w", newline="", encoding="utf-8") as text:
        table = csv.DictWriter(text, HEADER, restval="")
        table.writeheader()
        tar = tarfile.TarFile(fileobj=out, mode="w")  # pyright: ignore[reportArgumentType]
        for n in range(photos):
            tar.format = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[n % 3]
            name = f"{rng.randrange(256):02x}/{rng.randrange(256):02x}/{n}_{rng.randrange(16**8):08x}.jpg"
            if n % 50 == 49:  # a long name, in headers of its own
                name = name[:6] + "é" + name[6:]
            trap = next((trap for trap, one in TRAPS.items() if n % one == one - 1), "") if trapped else ""
            image = padded(rng.choice(pictures), rng.randrange(5121, 5990) - 4) + n.to_bytes(4)
            row = {
                "IMG_ID": name, "AUTHOR": "" if n % 11 == 0 else f"{rng.randrange(photos // 4 + 1)}@N00",
                "LAT": rng.uniform(-90, 90), "LON": rng.uniform(-180, 180), "city": 'São "Paulo", SP',
                "country": "Brazil",
                "continent": "" if n % 5 else "South America", "note": "two\nlines" if n % 40 == 0 else "",
            }  # fmt: skip
            member = f"{n % 7:03d}/{n % 5:03d}/{'x' * 120 + '/' if n % 50 == 49 else ''}{name.replace('/', '_')}"
            if trap == "small file":
                image = image[:5120]
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
        if end:
            tar.close()
        out.file.close()
    if 0 < ledger.dropped["identical bytes"] <= IDENTICAL:
        raise ValueError("too few photos for identical ones")
    return ledger


def config(folder, workers=1, **changes) -> ConfigDict:
    config = common.get_config()
    config.photos.update(source="mp16_pro", workers=workers, max_dropped=0.5)
    config.photos.mp16_pro.update(folder=str(folder), metadata=CSV, validation=0.2, photos_per_shard=100)
    config.photos.mp16_pro.placeholder.update(hashes=(f"{dhash(flickr()):016x}",), distance=2, identical=IDENTICAL)
    config.photos.mp16_pro.update(changes)
    return config
