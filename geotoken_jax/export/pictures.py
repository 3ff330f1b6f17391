"""Writes and reads an export's files for the web page of `geotoken serve`.

These files are thumbnails of the gallery photos, example photos and page.json. Prediction does not need them.
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

from geotoken_jax import disk, records
from geotoken_jax.backbone import preprocess
from geotoken_jax.configuration import Config
from geotoken_jax.export import card
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.manifests import write_bytes, write_json
from geotoken_jax.predict import bundle
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import GALLERY, Workdir

#: Names of the page's text file, of the folder of thumbnails and of the folder of examples.
PAGE, _THUMBNAILS, _EXAMPLES = "page.json", "thumbnails", "examples"
#: Thumbnails per shard. An interrupted run repeats at most one shard, 60 MB at 64 pixels.
_SHARD_PHOTOS = 65_536
#: Photos per batch of the decoding threads. The files of one batch are in memory together.
_DECODED_AT_ONCE = 256
_THUMBNAIL_QUALITY = 75
#: Longest side of an example photo in pixels, and its JPEG quality. No backbone reads larger photos.
_EXAMPLE_SIDE_AND_QUALITY = (1024, 90)
#: Number of photos at the start of the split `test` from which examples are drawn, and largest error of a correct
#: prediction, in km. 200 km is the usual threshold for the right region.
_TEST_PHOTOS, _CORRECT_KM = 5_000, 200
#: Source of training photos -> sentence on the page about the photos that the model can locate.
_SCOPE = {
    "earthview": "The model was trained on satellite images. Its predictions for photos taken on the ground are wrong."
}


@dataclasses.dataclass(frozen=True)
class Example:
    """An example photo's true coordinates, in degrees, and place name ("" if unknown)."""

    latitude: float
    longitude: float
    place: str


@dataclasses.dataclass(frozen=True)
class About:
    """Information about a model for the web page. `/v1/about` returns it.

    name: name of the model. data: source of the training photos. photos: number of gallery photos. knows: sentence on
    the kind of photos that the model can locate. credit: origin and terms of the photos. thumbnails: whether gallery
    photos have thumbnails. version: digest of the export. The page adds it to picture URLs, because browsers must not
    show cached pictures of another export.
    """

    name: str
    data: str
    photos: int
    knows: str
    credit: str
    thumbnails: bool
    examples: tuple[Example, ...]
    version: str


def write(workdir: Workdir, folder: epath.Path, config: Config, variant: str, ids: np.ndarray) -> dict[str, int]:
    """Writes page.json, thumbnails and examples as config.export asks for. Returns the number of pictures per folder.

    folder: folder of the export. ids: ids of the gallery photos, in the order of the gallery's rows.
    """
    stated, counts = card.source(workdir, config), {}
    side, number = (
        default * (stated["source"] == "earthview") if asked < 0 else asked
        for asked, default in ((config.export.thumbnails, 64), (config.export.examples, 12))
    )
    if side:
        counts[_THUMBNAILS] = write_thumbnails(workdir.photos(GALLERY), ids, side, folder)
    examples = write_examples(workdir, variant, number, folder) if number else []
    if examples:
        counts[_EXAMPLES] = len(examples)
    default = "The model can locate photos similar to its training photos. For other photos it is often wrong."
    words = {
        "name": config.evaluate.labels.get(variant, variant),
        "data": stated["source"],
        "photos": len(ids),
        "knows": _SCOPE.get(stated["source"], default),
        "credit": "" if stated["license"] == "unknown" else f"{stated['origin']} {stated['terms']}",
        "examples": [dataclasses.asdict(example) for example in examples],
    }
    write_json(folder / PAGE, words)
    return counts


class Pictures:
    """Reads the pictures of an export and its page.json. Thumbnails are memory-mapped."""

    def __init__(self, folder: epath.PathLike | None):
        """folder: folder of an export. If it is None or has no pictures, all methods return None."""
        self._folder = epath.Path(folder or "/nowhere")
        files, ends = ([records.open_array(p) for p in _parts(self._folder, name)] for name in ("files", "ends"))
        self._thumbnails = list(zip(files, ends, strict=True))
        words = json.loads((self._folder / PAGE).read_text()) if (self._folder / PAGE).exists() else {}
        listed = tuple(Example(**example) for example in words.pop("examples", ()))
        plain = {"name": "GeoToken", "data": "", "photos": 0, "knows": "", "credit": ""}
        self.about = About(**plain | words, thumbnails=bool(files), examples=listed, version=_version(self._folder))

    def thumbnail(self, row: int) -> bytes | None:
        """Returns the JPEG thumbnail of a gallery photo, or None if the photo has no thumbnail. row: gallery row."""
        shard, k = divmod(row, _SHARD_PHOTOS)
        if not (0 <= shard < len(self._thumbnails) and k < len(self._thumbnails[shard][1])):
            return None
        files, ends = self._thumbnails[shard]
        return files[ends[k - 1] if k else 0 : ends[k]].tobytes() or None

    def example(self, number: int) -> bytes | None:
        """Returns the JPEG of an example photo, or None if the number is not in use. number: index, from 0."""
        return _example(self._folder, number).read_bytes() if 0 <= number < len(self.about.examples) else None


def _version(folder: epath.Path) -> str:
    """Returns a digest of the export's files: 12 hexadecimal digits, or "" if the export has no SHA256SUMS."""
    sums = folder / bundle.SUMS
    return hashlib.sha256(sums.read_bytes()).hexdigest()[:12] if sums.exists() else ""


def _parts(folder: epath.Path, name: str) -> list[epath.Path]:
    return disk.matching(folder / _THUMBNAILS, f"{name}-*-of-*.npy")


def _example(folder: epath.Path, number: int) -> epath.Path:
    return folder / _EXAMPLES / f"{number:02d}.jpg"


def write_thumbnails(photos: records.Photos, ids: np.ndarray, side: int, folder: epath.Path) -> int:
    """Writes the folder thumbnails, shard by shard. Returns the number of photos with a thumbnail.

    A shard has two files: the concatenated JPEGs, and the end offset of each JPEG. The file of offsets is written last.
    A shard with this file is therefore complete, and an interrupted run does not repeat it.

    side: longest side of a thumbnail, in pixels.
    """
    (folder / _THUMBNAILS).mkdir(exist_ok=True)
    starts, total = range(0, len(ids), _SHARD_PHOTOS), 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Progress("thumbnails", len(ids), "photos") as p:
        for shard, first in enumerate(starts):
            shard_ids = ids[first : first + _SHARD_PHOTOS]
            names = (f"{name}-{shard:05d}-of-{len(starts):05d}.npy" for name in ("files", "ends"))
            file, ends = (folder / _THUMBNAILS / name for name in names)
            if not ends.exists():
                jpegs: list[bytes] = []
                images = _images(photos, shard_ids.tolist(), first)
                while block := list(itertools.islice(images, _DECODED_AT_ONCE)):
                    jpegs += pool.map(lambda image: _jpeg(image, side, _THUMBNAIL_QUALITY), block)
                records.save_array(file, np.frombuffer(b"".join(jpegs), np.uint8))
                records.save_array(ends, np.cumsum([len(data) for data in jpegs]))
            total += np.count_nonzero(np.diff(records.open_array(ends), prepend=0))
            p.add(len(shard_ids))
    return int(total)


def _images(photos: records.Photos, ids: Sequence[bytes], first: int) -> Iterator[bytes]:
    """Yields the encoded image of each photo in `ids`.

    photos: all photos of the gallery's split. They have the same order as `ids`, but can contain other photos in
    between. first: row at which the search starts.
    """
    row = first
    for wanted in ids:
        while (photo := photos[row])["id"].encode() != wanted:
            row += 1
        row += 1
        yield photo["image"]


def _jpeg(image: bytes, side: int, quality: int) -> bytes:
    """Returns a photo's JPEG thumbnail, or b"" if the photo cannot be read."""
    try:
        return preprocess.thumbnail(image, side, quality)
    except preprocess.ImageError:
        return b""


def write_examples(workdir: Workdir, variant: str, count: int, folder: epath.Path) -> list[Example]:
    """Writes the folder examples and returns the examples: up to `count` photos of `test`, one per known author.

    Continents take turns. The examples have the same share of correct predictions as the first photos of `test`, so the
    page does not flatter the model. If `test` has no predictions, there are no examples.
    """
    predicted = workdir.predictions_file(variant, "test")
    if not predicted.exists():
        return []
    with predicted.open() as file:
        lines = {line["id"]: line for line in map(json.loads, itertools.islice(file, _TEST_PHOTOS))}
    photos, groups, authors = workdir.photos("test"), {True: {}, False: {}}, set()
    for row in range(min(len(photos), _TEST_PHOTOS)):
        photo = photos[row]
        line, author = lines.get(photo["id"]), photo["author"]
        if line and (not author or author not in authors):
            authors.add(author)
            latitude, longitude = photo["coordinates"]
            km = great_circle_km(latitude, longitude, line["latitude"], line["longitude"])
            groups[bool(km <= _CORRECT_KM)].setdefault(photo["continent"], []).append(row)
    right, wrong = (sum(map(len, group.values())) for group in (groups[True], groups[False]))
    correct = round(count * right / max(right + wrong, 1))
    rows = [*itertools.islice(_round_robin(groups[True]), correct), *_round_robin(groups[False])][:count]
    (folder / _EXAMPLES).mkdir(exist_ok=True)
    examples = []
    for number, row in enumerate(np.random.default_rng(0).permutation(rows)):
        photo = photos[row]
        write_bytes(_example(folder, number), _jpeg(photo["image"], *_EXAMPLE_SIDE_AND_QUALITY))
        latitude, longitude = photo["coordinates"].tolist()
        place = ", ".join(photo[name] for name in ("city", "country") if photo[name])
        examples.append(Example(latitude, longitude, place))
    return examples


def _round_robin(groups: dict[str, list[int]]) -> Iterator[int]:
    """Yields one random row of each group, then another row of each group, and so on."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(groups[name]).tolist() for name in sorted(groups)]
    return (row for turn in itertools.zip_longest(*shuffled) for row in turn if row is not None)
