"""The stage `learn`: trains the selectors, which choose among a photo's candidates.

pools/VARIANT contains the decoder's candidates for all training photos of some authors. reward/VARIANT and
verifier/VARIANT are trained on these pools. The verifier's comparator is trained on the photos of all other authors, so
the comparator has not seen the photos of the pools, just as it will not have seen a user's photo.
"""

import dataclasses

import numpy as np
from etils import epath

from geotoken_jax import checkpoint, records
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import context, neighbors
from geotoken_jax.gallery import encodings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import great_circle_km, to_unit_vectors
from geotoken_jax.manifests import Manifest
from geotoken_jax.model.reward import RewardTask
from geotoken_jax.model.verifier import Comparator, ComparatorTask, ScorerTask
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.reward import States
from geotoken_jax.predict.verifier import (
    AugmentedGallery,
    CandidateFeatures,
    NearestPhotos,
    encode,
    open_augmented_gallery,
)
from geotoken_jax.progress import Progress
from geotoken_jax.stages import training
from geotoken_jax.workdir import Workdir, selector_folders

#: Share of the pools used for validation, taken from the end. Pools are grouped by author, so at most one author has
#: photos in both training and validation.
_VALIDATION = 0.1
#: Images per block when encoding the augmented gallery or copying views.
_BLOCK = 4096
#: Nearest photos, the photo itself included, from which a comparator's positive pair is drawn.
_PAIR_NEIGHBORS = 32
#: Keys of config.predict that determine the candidates. The other keys determine the choice among them.
_CANDIDATE_KEYS = [f"predict.{key}" for key in ("samples", "temperature", "top_p", "beam", "seed")]


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Writes pools/VARIANT, reward/VARIANT and verifier/VARIANT, as far as the variant's selectors need them.

    An interrupted folder is completed.
    """
    wanted = selector_folders(config.variant(variant).predict)
    makers = {"reward": reward, "verifier": verifier}
    manifests = [pools(config, workdir, variant)] if wanted else []
    return manifests + [makers[name](config, workdir, variant) for name in wanted]


def pools(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Writes pools/VARIANT: gallery rows [n], and per photo its candidates with the decoder's last output for each."""
    inputs = ["tokens", f"geotoken/{variant}", "neighbors"]
    stage = workdir.begin(config, f"pools/{variant}", ["pools", *_CANDIDATE_KEYS], inputs)
    if stage.manifest:
        return stage.manifest
    variant_config, gallery = config.variant(variant), workdir.gallery
    model = workdir.decoder(variant, variant_config.model)
    unsearched = dataclasses.replace(variant_config.predict.search, expansions=0)
    options = dataclasses.replace(variant_config.predict, search=unsearched, selectors=("greedy",), choice="greedy")
    decoder = Decoder(model, options, gallery)
    rows = rows_by_author(gallery.authors(), variant_config.pools.photos, variant_config.pools.seed)
    neighbor_rows, scores = workdir.neighbors(views.SOURCE_SPLIT, decoder.neighbors)
    states, size, saved = States(model), options.batch_size, []
    with Progress(f"pools {variant}", len(rows), "photos") as progress:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = {"query": gallery.embeddings(part), **neighbors(gallery, neighbor_rows[part], decoder.cells)}
            batch["context"] = context(gallery.captured(part), decoder.times)
            pool = decoder(batch, neighbor_rows[part], scores[part], part)
            saved.append((*pool.candidates, states(pool)))
            progress.add(len(part))
    workdir.save_pools(variant, rows, saved)
    return stage.finish({"photos": len(rows)})


def reward(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Trains the reward head and writes reward/VARIANT."""
    stage = workdir.begin(config, f"reward/{variant}", ["reward"], [f"pools/{variant}"])
    if stage.manifest:
        return stage.manifest
    variant_config = config.variant(variant)
    states, pool = workdir.pools(variant, variant_config.model)
    km = _km(pool, workdir.gallery.coordinates(workdir.pool_rows(variant)))
    task = RewardTask(variant_config.reward.model, states.shape[-1])
    training.fit(task, variant_config, "reward.train", _splits(states=states, km=km), stage.path, f"reward {variant}")
    return stage.finish({"photos": len(km)})


def verifier(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Trains the comparator, then the scorer, and writes verifier/VARIANT.

    The folder contains comparator/ and scorer/; views.npy and owner.npy (see `save_views`); keys.npy, the comparator's
    vectors of all gallery photos and views; features.npy, the scorer's inputs, and moments.npy, their mean and
    standard deviation.
    """
    inputs = [f"pools/{variant}", "align", "gallery", "queries", "neighbors"]
    stage = workdir.begin(config, f"verifier/{variant}", ["verifier"], inputs)
    if stage.manifest:
        return stage.manifest
    variant_config, rows, folder = config.variant(variant), workdir.pool_rows(variant), stage.path
    if not (folder / "views.npy").exists():
        save_views(folder, workdir)
    augmented = open_augmented_gallery(folder, workdir.gallery)
    comparator = _comparator(variant_config, folder, augmented, workdir.gallery, rows)
    _, pool = workdir.pools(variant, variant_config.model)
    if not (folder / "features.npy").exists():
        aligned, keys = workdir.align_model(variant_config.align.model), encodings.open_encodings(folder / "keys.npy")
        featurize = CandidateFeatures(
            variant_config.verifier.model, comparator, keys, augmented, workdir.gallery, aligned
        )
        features = featurize(pool._replace(exclude=workdir.exclusions(views.SOURCE_SPLIT)(rows)))
        records.save_array(folder / "moments.npy", np.stack([features.mean((0, 1)), features.std((0, 1))]))
        records.save_array(folder / "features.npy", features)
    task = ScorerTask(variant_config.verifier.model.scorer, np.load(folder / "moments.npy"))
    km = _km(pool, workdir.gallery.coordinates(rows))
    splits = _splits(features=records.open_array(folder / "features.npy"), km=km)
    training.fit(task, variant_config, "verifier.train_scorer", splits, folder / "scorer", f"scorer {variant}")
    return stage.finish({"photos": len(rows), "looks": len(augmented)})


def _comparator(
    config: Config, folder: epath.Path, augmented: AugmentedGallery, gallery: Table, rows: np.ndarray
) -> Comparator:
    """Trains the comparator on the gallery photos outside the pools, and writes comparator/ and keys.npy.

    Returns the comparator.

    rows: gallery rows of the pools, used for validation.
    """
    options = config.verifier.model.comparator
    task = ComparatorTask(options, _mean(augmented))
    others = np.flatnonzero(~np.isin(np.arange(len(gallery)), rows))
    pairs = [
        _Pairs(augmented, gallery, some, options.same_within_km, config.pools.seed) for some in (others, np.sort(rows))
    ]
    trained = folder / "comparator"
    training.fit(task, config, "verifier.train_comparator", pairs, trained, "comparator")
    comparator = checkpoint.read_module(trained / "parameters.safetensors", task.init)
    file = folder / "keys.npy"
    if not file.exists():
        parts = (np.arange(first, min(first + _BLOCK, len(augmented))) for first in range(0, len(augmented), _BLOCK))
        blocks = (encode(comparator, augmented.images(part)) for part in parts)
        encodings.save(file, blocks, len(augmented), options.width)
    return comparator


def rows_by_author(authors: np.ndarray, photos: int, seed: int) -> np.ndarray:
    """Returns the rows of all photos by randomly drawn authors, grouped by author.

    Authors are drawn until they have `photos` photos in all, or half of all photos if that is less. A photo without an
    author counts as an author with one photo.
    """
    _, author = np.unique(authors, return_inverse=True)
    unknown = authors == authors.dtype.type()
    author = np.where(unknown, author.max() + 1 + np.arange(len(authors)), author)
    rank = np.random.default_rng(seed).permutation(author.max() + 1)[author]
    order = np.argsort(rank, kind="stable")
    ends = np.flatnonzero(np.diff(rank[order], append=-1)) + 1
    wanted = min(photos, len(authors) // 2)
    return order[: ends[np.searchsorted(ends, wanted)]] if wanted < len(authors) else order


class _Pairs:
    """Reads positive pairs for the comparator.

    A batch contains `image` and `other` [b, C], embeddings of two images of one place, and `place` [b, 3], unit vectors
    of the photos' coordinates.
    """

    def __init__(self, augmented: AugmentedGallery, gallery: Table, rows: np.ndarray, km: float, seed: int):
        """rows: gallery rows that form pairs with each other. km: largest distance between two photos of one place."""
        self._augmented, self._rows, self._km, self._seed = augmented, rows, km, seed
        self._coordinates = gallery.coordinates(rows)
        self._points = np.asarray(to_unit_vectors(*self._coordinates.T), np.float32)
        self._nearest = NearestPhotos(self._coordinates)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.vary(rows, rows)

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns one random pair of images per photo.

        The first image is the photo or one of its views. The second image is another photo of the same place, a view of
        one, or another image of the photo itself (the same image if the photo lacks views).

        Called for each batch (see data.pipeline.Varying). rows: rows of this reader. examples: position of each row in
        the order of training. The first position seeds the draws.
        """
        rng = np.random.default_rng([self._seed, int(examples[0])])
        neighbors, km = self._nearest(self._coordinates[rows], _PAIR_NEIGHBORS)
        drawn = (rng.random(len(rows)) * (km <= self._km).sum(1)).astype(int)
        other = np.take_along_axis(neighbors, drawn[:, None], 1)[:, 0]
        v = self._augmented.of.shape[1]
        view = rng.integers(v, size=len(rows))
        step = np.where(other == rows, rng.integers(min(1, v - 1), v, size=len(rows)), rng.integers(v, size=len(rows)))
        return {
            "image": self._augmented.images(self._augmented.of[self._rows[rows], view]),
            "other": self._augmented.images(self._augmented.of[self._rows[other], (view + step) % v]),
            "place": self._points[rows],
        }


class _Arrays:
    """Reads the rows [first, last) of arrays as float32. Row numbers in calls count from `first`."""

    def __init__(self, first: int, last: int, arrays: dict[str, np.ndarray]):
        self._first, self._last, self._arrays = first, last, arrays

    def __len__(self) -> int:
        return self._last - self._first

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(values[self._first + rows], np.float32) for name, values in self._arrays.items()}


def _splits(**arrays: np.ndarray) -> list[_Arrays]:
    n = len(arrays["km"])
    cut = n - max(1, round(_VALIDATION * n))
    return [_Arrays(0, cut, arrays), _Arrays(cut, n, arrays)]


def save_views(folder: epath.Path, workdir: Workdir) -> None:
    """Writes views.npy [W, C], the image embeddings of all augmented views, and owner.npy [W], their gallery rows.

    Views of photos that are not in the gallery are left out.
    """
    gallery = workdir.gallery
    owner, blocks = np.zeros(0, np.int64), iter(())
    if views.VIEWS_SPLIT in workdir.manifest("queries").counts:
        table, ids = workdir.table(views.VIEWS_SPLIT), gallery.ids()
        order = np.argsort(ids)
        owner = order[np.minimum(np.searchsorted(ids, table.ids(), sorter=order), len(ids) - 1)]
        present = np.flatnonzero(ids[owner] == table.ids())  # the gallery may lack a photo
        owner = owner[present]
        parts = (present[first : first + _BLOCK] for first in range(0, len(present), _BLOCK))
        blocks = (table.embeddings(part)[:, 0] for part in parts)
    records.save_array(folder / "owner.npy", owner)
    encodings.save(folder / "views.npy", blocks, len(owner), gallery.width)


def _km(pool: Pool, truth: np.ndarray) -> np.ndarray:
    return np.asarray(great_circle_km(*np.moveaxis(pool.coordinates, -1, 0), *truth.T[..., None]), np.float32)


def _mean(augmented: AugmentedGallery) -> np.ndarray:
    return augmented.images(np.unique(np.linspace(0, len(augmented.of) - 1, 20_000).astype(int))).mean(0)
