"""What an export has for the page that `geotoken serve` shows: thumbnails of the gallery's photos, photos to try, and a
few words on all of them. Nothing here is needed to answer.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from geotoken_jax import records
from geotoken_jax.artifacts import GALLERY, Workdir
from geotoken_jax.backbone import preprocess
from geotoken_jax.configuration import Config
from geotoken_jax.export import card
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.predict import bundle
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import write_bytes, write_json

#: Name of the file of words, and of the folders of pictures.
PAGE, _THUMBNAILS, _EXAMPLES = "page.json", "thumbnails", "examples"
#: Thumbnails a shard: what an interrupted run makes again, 60 MB at 64 pixels.
_SHARD = 65_536
#: Photos that are decoded side by side: that many files are in memory.
_TOGETHER = 256
_QUALITY = 75
#: Longest side of an example, in pixels, and the quality of its JPEG: no backbone sees more of it.
_EXAMPLE = (1024, 90)
#: Photos of `test` that examples are chosen from, and the distance up to which an answer is a right one: a region.
_AMONG, _RIGHT_KM = 5_000, 200
#: Source -> what a model of its photos knows.
_KNOWS = {
    "earthview": "It knows views from above, as of a satellite: a photo from the ground is placed somewhere, and "
    "wrongly."
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A photo to try: where it was taken, in degrees, and what that place is called ("" where nobody says)."""

    latitude: float
    longitude: float
    place: str


@dataclasses.dataclass(frozen=True)
class About:
    """What a model says of itself: its name, the source of its photos and how many its gallery has, what it knows, who
    has made the photos; whether neighbors have thumbnails; photos to try; and a mark that other exports do not have."""

    name: str
    data: str
    photos: int
    knows: str
    credit: str
    thumbnails: bool
    examples: tuple[Example, ...]
    version: str


def write(workdir: Workdir, folder: epath.Path, config: Config, variant: str, ids: np.ndarray) -> dict[str, int]:
    """Writes page.json and the pictures that config.export asks for; returns how many there are of each.

    folder: of the export. ids: of the gallery's photos.
    """
    side, counts = config.export.thumbnails, {}
    if side:
        counts[_THUMBNAILS] = write_thumbnails(workdir.photos(GALLERY), ids, side, folder)
    examples = write_examples(workdir, variant, config.export.examples, folder) if config.export.examples else []
    if examples:
        counts[_EXAMPLES] = len(examples)
    stated = card.source(workdir, config)
    others = "It knows photos like those it was trained on: others are often placed wrongly."
    words = {
        "name": config.evaluate.labels.get(variant, variant),
        "data": stated["source"],
        "photos": len(ids),
        "knows": _KNOWS.get(stated["source"], others),
        "credit": "" if stated["license"] == "unknown" else f"{stated['origin']} {stated['terms']}",
        "examples": [dataclasses.asdict(example) for example in examples],
    }
    write_json(folder / PAGE, words)
    return counts


class Pictures:
    """The pictures of an export, memory-mapped."""

    def __init__(self, folder: epath.PathLike | None):
        """folder: of an export, or None; one without pictures has none."""
        self._folder = epath.Path(folder or "/nowhere")
        files, ends = ([records.open_array(p) for p in _parts(self._folder, name)] for name in ("files", "ends"))
        self._thumbnails = list(zip(files, ends, strict=True))
        words = json.loads((self._folder / PAGE).read_text()) if (self._folder / PAGE).exists() else {}
        listed = tuple(Example(**example) for example in words.pop("examples", ()))
        plain = {"name": "GeoToken", "data": "", "photos": 0, "knows": "", "credit": ""}
        self.about = About(**plain | words, thumbnails=bool(files), examples=listed, version=_version(self._folder))

    def thumbnail(self, row: int) -> bytes | None:
        """Returns the JPEG of a gallery photo, None where there is none."""
        shard, k = divmod(row, _SHARD)
        if not (0 <= shard < len(self._thumbnails) and k < len(self._thumbnails[shard][1])):
            return None
        files, ends = self._thumbnails[shard]
        return files[ends[k - 1] if k else 0 : ends[k]].tobytes() or None

    def example(self, number: int) -> bytes | None:
        """Returns the JPEG of an example, None where there is none."""
        return _example(self._folder, number).read_bytes() if 0 <= number < len(self.about.examples) else None


def _version(folder: epath.Path) -> str:
    """Returns a mark of the export's contents: in another one a row is another photo."""
    sums = folder / bundle.SUMS
    return hashlib.sha256(sums.read_bytes()).hexdigest()[:12] if sums.exists() else ""


def _parts(folder: epath.Path, name: str) -> list[epath.Path]:
    return sorted((folder / _THUMBNAILS).glob(f"{name}-*-of-*.npy"))


def _example(folder: epath.Path, number: int) -> epath.Path:
    return folder / _EXAMPLES / f"{number:02d}.jpg"


def write_thumbnails(photos: records.Photos, ids: np.ndarray, side: int, folder: epath.Path) -> int:
    """Writes thumbnails/, shard by shard; returns how many photos have one.

    A shard is all its JPEGs in a row, and where each ends. The latter is written last: with it a shard is whole.
    """
    (folder / _THUMBNAILS).mkdir(exist_ok=True)
    starts, made = range(0, len(ids), _SHARD), 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Progress("thumbnails", len(ids), "photos") as p:
        for shard, first in enumerate(starts):
            own = ids[first : first + _SHARD]
            names = (f"{name}-{shard:05d}-of-{len(starts):05d}.npy" for name in ("files", "ends"))
            file, ends = (folder / _THUMBNAILS / name for name in names)
            if not ends.exists():
                found: list[bytes] = []
                images = _images(photos, own.tolist(), first)
                while together := list(itertools.islice(images, _TOGETHER)):
                    found += pool.map(lambda image: _jpeg(image, side, _QUALITY), together)
                records.save_array(file, np.frombuffer(b"".join(found), np.uint8))
                records.save_array(ends, np.cumsum([len(data) for data in found]))
            made += np.count_nonzero(np.diff(records.open_array(ends), prepend=0))
            p.add(len(own))
    return int(made)


def _images(photos: records.Photos, ids: Sequence[bytes], first: int) -> Iterator[bytes]:
    """Yields the file of each photo. photos: in the same order, with others among them. first: none is before that."""
    row = first
    for wanted in ids:
        while (photo := photos[row])["id"].encode() != wanted:
            row += 1
        row += 1
        yield photo["image"]


def _jpeg(image: bytes, side: int, quality: int) -> bytes:
    """Returns a photo's thumbnail; nothing if the photo cannot be read."""
    try:
        return preprocess.thumbnail(image, side, quality)
    except preprocess.ImageError:
        return b""


def write_examples(workdir: Workdir, variant: str, count: int, folder: epath.Path) -> list[Example]:
    """Writes examples/, photos of `test` by an author each; returns them.

    They come from the continents by turns, and are answered rightly as often as all of them are.
    """
    predicted = workdir.answers(variant, "test")
    if not predicted.exists():
        return []
    with predicted.open() as file:
        lines = {line["id"]: line for line in map(json.loads, itertools.islice(file, _AMONG))}
    photos, groups, authors = workdir.photos("test"), {True: {}, False: {}}, set()
    for row in range(min(len(photos), _AMONG)):
        photo = photos[row]
        line, author = lines.get(photo["id"]), photo["author"]
        if line and (not author or author not in authors):
            authors.add(author)
            latitude, longitude = photo["coordinates"]
            km = great_circle_km(latitude, longitude, line["latitude"], line["longitude"])
            groups[bool(km <= _RIGHT_KM)].setdefault(photo["continent"], []).append(row)
    right, wrong = (sum(map(len, group.values())) for group in (groups[True], groups[False]))
    rights = round(count * right / max(right + wrong, 1))
    rows = [*itertools.islice(_by_turns(groups[True]), rights), *_by_turns(groups[False])][:count]
    (folder / _EXAMPLES).mkdir(exist_ok=True)
    examples = []
    for number, row in enumerate(np.random.default_rng(0).permutation(rows)):
        photo = photos[row]
        write_bytes(_example(folder, number), _jpeg(photo["image"], *_EXAMPLE))
        latitude, longitude = photo["coordinates"].tolist()
        place = ", ".join(photo[name] for name in ("city", "country") if photo[name])
        examples.append(Example(latitude, longitude, place))
    return examples


def _by_turns(groups: dict[str, list[int]]) -> Iterator[int]:
    """Yields one of each group, then another of each, and so on; in a group they come in a random order."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(groups[name]).tolist() for name in sorted(groups)]
    return (row for turn in itertools.zip_longest(*shuffled) for row in turn if row is not None)
