"""Writes channels/: the indexes of the gallery that the selector `reranker` searches for candidates.

Each index belongs to a channel, a way to find gallery photos of the place in a photo (see model.reranker.CHANNELS). The
channel "comparator" compares image embeddings with a network that this module trains.
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import backbone, checkpoint, records
from geotoken_jax.backbone import views
from geotoken_jax.backbone.preprocess import open_image
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import encodings, index
from geotoken_jax.gallery.augmented import AugmentedGallery, NearestPhotos, Views
from geotoken_jax.gallery.draws import rows_by_author
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import to_unit_vectors
from geotoken_jax.manifests import Manifest
from geotoken_jax.model.comparator import Comparator, ComparatorTask
from geotoken_jax.predict.channels import encode, whitened, whitening
from geotoken_jax.progress import Progress
from geotoken_jax.records import Photos
from geotoken_jax.stages import training
from geotoken_jax.workdir import Workdir

#: Share of the gallery's photos on which the comparator is validated.
_VALIDATION = 0.1
#: Images per block when the gallery is encoded, and photos per block when views are made.
_BLOCK, _PHOTOS = 4096, 256
#: Number of nearest gallery photos from which the second photo of a training pair is drawn. The first photo itself is
#: one of them.
_PAIR_NEIGHBORS = 32
#: File with the embeddings of further views. It is removed when channels/ is finished.
_VIEWS = "views.npy"


def run(config: Config, workdir: Workdir) -> Manifest:
    """Trains the comparator, builds the index of each channel, and writes channels/.

    The folder contains:

    - owner.npy: gallery row of each image in the augmented gallery, which has the gallery's photos and their views.
    - NAME/index: index of the channel NAME. The channel "index" has none here, because it uses the gallery's index.
    - backbone/whitening.npy: see predict.channels.whitening.
    - comparator/parameters.safetensors: parameters of the comparator.
    """
    keys = ["channels", "reranker.model.channels", "index.search"]
    stage = workdir.begin(config, "channels", keys, ["align", "gallery", "queries", "photos"])
    if stage.manifest:
        return stage.manifest
    folder, gallery = stage.path, workdir.gallery
    images = AugmentedGallery(gallery, [*_stored_views(workdir), *_further_views(config, workdir, folder)])
    records.save_array(folder / "owner.npy", images.owner)
    names = config.reranker.model.channels
    facts: dict[str, Any] = {}
    if "backbone" in names:
        matrix = whitening(_sampled_embeddings(gallery))
        (folder / "backbone").mkdir(exist_ok=True)
        records.save_array(folder / "backbone" / "whitening.npy", matrix)
        blocks = (whitened(matrix, gallery.embeddings(part)[:, 0]) for part in _row_blocks(len(gallery)))
        facts["backbone"] = _build_channel(blocks, len(gallery), gallery.width, config, folder / "backbone")
    if "comparator" in names:
        trained = _train_comparator(config, folder, images, gallery)
        blocks = (encode(trained, images.images(part)) for part in _row_blocks(len(images)))
        width = config.channels.comparator.width
        facts["comparator"] = _build_channel(blocks, len(images), width, config, folder / "comparator")
    if "location" in names:
        aligned = workdir.align_model(config.align.model)
        blocks = encodings.encoder(aligned.location, lambda model, block: model(block))(gallery.coordinates())
        facts["location"] = _build_channel(blocks, len(gallery), workdir.width, config, folder / "location")
    (folder / _VIEWS).unlink(missing_ok=True)
    return stage.finish({"photos": len(gallery), "images": len(images)}, recall=facts)


def _stored_views(workdir: Workdir) -> Iterator[Views]:
    """Yields the views of gallery photos that `geotoken embed` made, as one set. Yields nothing if it made no views."""
    if views.VIEWS_SPLIT in workdir.manifest("queries").counts:
        table = workdir.table(views.VIEWS_SPLIT)
        owner = _gallery_rows(workdir, table.ids())
        shown = np.flatnonzero(owner >= 0)
        yield lambda rows: table.embeddings(shown[rows])[:, 0], owner[shown]


def _further_views(config: Config, workdir: Workdir, folder: epath.Path) -> Iterator[Views]:
    """Makes and embeds further views of the gallery's photos, and yields them as one set.

    config.channels.views has their settings. Yields nothing if config.channels.views.count is 0.

    On EarthView, six further views per photo raise the share of photos whose first neighbor in the channel "comparator"
    is within 25 km from 49 to 53 %.
    """
    options, photos = config.channels.views, workdir.photos(views.SOURCE_SPLIT)
    if not options.count:
        return
    rows = _gallery_rows(workdir, np.array([photos[i]["id"].encode() for i in range(len(photos))]))
    shown, file = np.flatnonzero(rows >= 0), folder / _VIEWS
    if not file.exists():
        workdir.check_backbone(config.embed)
        blocks = _embedded_views(config, photos, shown)
        encodings.save(file, blocks, len(shown) * options.count, workdir.gallery.width)
    vectors = encodings.open_encodings(file)
    yield lambda some: vectors[some], np.repeat(rows[shown], options.count)


def _embedded_views(config: Config, photos: Photos, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Makes views of photos and yields the embeddings of the views, block by block. rows: indices into `photos`."""
    options, tower = config.channels.views, backbone.make(config.embed)
    side = math.ceil(tower.min_side / options.crop)

    def prepared(row: int) -> np.ndarray:
        image = open_image(photos[row]["image"], side)
        return np.stack([tower.prepare(view) for view in views.views(image, row, options)])

    with (
        ThreadPoolExecutor(config.embed.threads) as pool,
        Progress("views", len(rows) * options.count, "views") as progress,
    ):
        for first in range(0, len(rows), _PHOTOS):
            pixels = np.concatenate(list(pool.map(prepared, rows[first : first + _PHOTOS].tolist())))
            yield np.asarray(tower.images(pixels), np.float32)
            progress.add(len(pixels))


def _gallery_rows(workdir: Workdir, ids: np.ndarray) -> np.ndarray:
    """Returns the gallery row of each photo, -1 if the gallery lacks it."""
    known = workdir.gallery.ids()
    order = np.argsort(known)
    found = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
    return np.where(known[found] == ids, found, -1)


def _build_channel(blocks: Iterable[np.ndarray], n: int, width: int, config: Config, folder: epath.Path) -> float:
    """Builds the index of one channel, unless it is complete, and returns the recall of the index.

    blocks: the channel's vectors in blocks. n: number of vectors. width: length of a vector. folder: folder of the
    channel.
    """
    file = folder / "vectors.npy"
    if not (folder / "index" / "index.json").exists() and not file.exists():
        folder.mkdir(exist_ok=True)
        encodings.save(file, blocks, n, width)
    recall = _build_index(encodings.open_encodings(file) if file.exists() else (), config, folder)
    file.unlink(missing_ok=True)
    return recall


def _build_index(vectors: Any, config: Config, folder: epath.Path) -> float:
    """Builds an index in the subfolder index/, unless it is complete, and returns the recall of the index."""
    place, options = folder / "index", config.channels.search(config.index.search)
    complete = (place / "index.json").exists()
    built = index.load(place, options.threads) if complete else index.build(vectors, options, place)
    return built.facts["recall"]


def _train_comparator(config: Config, folder: epath.Path, images: AugmentedGallery, gallery: Table) -> Comparator:
    """Trains the comparator, writes comparator/ and returns the comparator.

    The validation photos are all photos by randomly drawn authors.
    """
    options = config.channels.comparator
    task = ComparatorTask(options, _sampled_embeddings(gallery).mean(0))
    held = np.sort(rows_by_author(gallery.authors(), round(_VALIDATION * len(gallery)), config.pools.seed))
    others = np.setdiff1d(np.arange(len(gallery)), held)
    pairs = [_ImagePairs(images, gallery, some, options.same_within_km, config.pools.seed) for some in (others, held)]
    training.fit(task, config, "channels.train", pairs, folder / "comparator", "comparator")
    return checkpoint.read_module(folder / "comparator" / "parameters.safetensors", task.init)


class _ImagePairs:
    """Reads training examples of the comparator. An example is a pair of images from the same place.

    A batch contains `image` [b, C] and `other` [b, C], the embeddings of the two images, and `place` [b, 3], the
    coordinates of the first photo as a unit vector.
    """

    def __init__(self, images: AugmentedGallery, gallery: Table, rows: np.ndarray, km: float, seed: int):
        """rows: rows of the gallery photos in these pairs. km: largest distance between two photos that count as photos
        of the same place. seed: seed of the random draws."""
        self._images, self._rows, self._km, self._seed = images, rows, km, seed
        self._coordinates = gallery.coordinates(rows)
        self._points = np.asarray(to_unit_vectors(*self._coordinates.T), np.float32)
        self._nearest = NearestPhotos(self._coordinates)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.vary(rows, rows)

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns one random pair of images per photo. Each batch is drawn anew (see data.pipeline.Varying).

        The first image is the photo or one of its views. The second image is another photo of the same place, a view of
        such a photo, or another image of the first photo. If the first photo has no views, the second image may be
        equal to the first.

        rows: rows of this reader. examples: number of each example in the order of training; the first number seeds the
        draws.
        """
        rng = np.random.default_rng([self._seed, int(examples[0])])
        neighbors, km = self._nearest(self._coordinates[rows], _PAIR_NEIGHBORS)
        drawn = (rng.random(len(rows)) * (km <= self._km).sum(1)).astype(int)
        other = np.take_along_axis(neighbors, drawn[:, None], 1)[:, 0]
        v = self._images.images_of.shape[1]
        view = rng.integers(v, size=len(rows))
        step = np.where(other == rows, rng.integers(min(1, v - 1), v, size=len(rows)), rng.integers(v, size=len(rows)))
        return {
            "image": self._images.images(self._images.images_of[self._rows[rows], view]),
            "other": self._images.images(self._images.images_of[self._rows[other], (view + step) % v]),
            "place": self._points[rows],
        }


def _sampled_embeddings(gallery: Table) -> np.ndarray:
    """Returns the image embeddings of up to 20,000 gallery photos, evenly spaced in the gallery."""
    rows = np.unique(np.linspace(0, len(gallery) - 1, 20_000).astype(int))
    return np.asarray(gallery.embeddings(rows)[:, 0], np.float32)


def _row_blocks(n: int) -> list[np.ndarray]:
    return [np.arange(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)]
