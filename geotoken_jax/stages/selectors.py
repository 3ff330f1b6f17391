"""The stage `learn`: trains what chooses among candidates, on pools of photos that the decoder was trained on.

pools/VARIANT holds the candidates of some photos, all those of their authors; reward/VARIANT and verifier/VARIANT are
trained on them. The verifier's comparator is trained on the other authors' photos, so that it knows those of the pools
as little as it will know a new photo.
"""

import dataclasses

import numpy as np
from etils import epath

from geotoken_jax import checkpoint, records
from geotoken_jax.artifacts import Workdir, needed
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import context, neighbors
from geotoken_jax.gallery import encodings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import great_circle_km, to_unit_vectors
from geotoken_jax.model.reward import RewardTask
from geotoken_jax.model.verifier import Comparator, ComparatorTask, ScorerTask
from geotoken_jax.predict import verify
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.reward import States
from geotoken_jax.predict.verify import AugmentedGallery, NearestPhotos
from geotoken_jax.progress import Progress
from geotoken_jax.stages import training
from geotoken_jax.workdir import Manifest

#: Share of the pools that training is validated on: the last ones, of authors of their own.
_VALIDATION = 0.1
#: AugmentedGallery encoded, and views copied, at once.
_BLOCK = 4096
#: Photos around each, itself among them, of which one within reach is its pair.
_OTHERS = 32
#: What of config.predict decides the candidates, and not which of them is taken.
_SAMPLED = [f"predict.{key}" for key in ("samples", "temperature", "top_p", "beam", "seed")]


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Makes pools/VARIANT, reward/VARIANT and verifier/VARIANT, as far as the variant's selectors need them; each goes
    on where it was interrupted."""
    wanted = needed(config.variant(variant).predict)
    makers = {"reward": reward, "verifier": verifier}
    made = [pools(config, workdir, variant)] if wanted else []
    return made + [makers[name](config, workdir, variant) for name in wanted]


def pools(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Makes pools/VARIANT: rows of the gallery [n], candidates of each, and the decoder's last output for these."""
    inputs = ["tokens", f"geotoken/{variant}", "neighbors"]
    stage = workdir.begin(config, f"pools/{variant}", ["pools", *_SAMPLED], inputs)
    if stage.manifest:
        return stage.manifest
    own, gallery = config.variant(variant), workdir.gallery
    model = workdir.decoder(variant, own.model)
    unsearched = dataclasses.replace(own.predict.search, expansions=0)
    options = dataclasses.replace(own.predict, search=unsearched, selectors=("greedy",), choice="greedy")
    decoder = Decoder(model, options, gallery)
    rows = of_authors(gallery.authors(), own.pools.photos, own.pools.seed)
    near, scores = workdir.neighbors(views.OF, decoder.neighbors)
    states, size, found = States(model), options.batch_size, []
    with Progress(f"pools {variant}", len(rows), "photos") as progress:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = {"query": gallery.embeddings(part), **neighbors(gallery, near[part], decoder.cells)}
            batch["context"] = context(gallery.captured(part), decoder.times)
            pool = decoder(batch, near[part], scores[part], part)
            found.append((*pool.candidates, states(pool)))
            progress.add(len(part))
    workdir.save_pools(variant, rows, found)
    return stage.finish({"photos": len(rows)})


def reward(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Makes reward/VARIANT: the reward head's parameters."""
    stage = workdir.begin(config, f"reward/{variant}", ["reward"], [f"pools/{variant}"])
    if stage.manifest:
        return stage.manifest
    own = config.variant(variant)
    states, pool = workdir.pools(variant, own.model)
    km = _km(pool, workdir.gallery.coordinates(workdir.pool_rows(variant)))
    task = RewardTask(own.reward.model, states.shape[-1])
    training.fit(task, own, "reward.train", _splits(states=states, km=km), stage.path, f"reward {variant}")
    return stage.finish({"photos": len(km)})


def verifier(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Makes verifier/VARIANT: comparator/ and scorer/, trained one after the other, views.npy and owner.npy (see
    `save_views`), and keys.npy, the comparator's vectors of all gallery photos and views."""
    inputs = [f"pools/{variant}", "align", "gallery", "queries", "neighbors"]
    stage = workdir.begin(config, f"verifier/{variant}", ["verifier"], inputs)
    if stage.manifest:
        return stage.manifest
    own, rows, folder = config.variant(variant), workdir.pool_rows(variant), stage.path
    if not (folder / "views.npy").exists():
        save_views(folder, workdir)
    looks = verify.open_augmented_gallery(folder, workdir.gallery)
    comparator = _comparator(own, folder, looks, workdir.gallery, rows)
    _, pool = workdir.pools(variant, own.model)
    if not (folder / "features.npy").exists():
        aligned, keys = workdir.aligned(own.align.model), encodings.open(folder / "keys.npy")
        evidence = verify.CandidateFeatures(own.verifier.model, comparator, keys, looks, workdir.gallery, aligned)
        found = evidence(pool._replace(exclude=workdir.exclusions(views.OF)(rows)))
        records.save_array(folder / "moments.npy", np.stack([found.mean((0, 1)), found.std((0, 1))]))
        records.save_array(folder / "features.npy", found)
    task = ScorerTask(own.verifier.model.scorer, np.load(folder / "moments.npy"))
    km = _km(pool, workdir.gallery.coordinates(rows))
    splits = _splits(features=records.open_array(folder / "features.npy"), km=km)
    training.fit(task, own, "verifier.train_scorer", splits, folder / "scorer", f"scorer {variant}")
    return stage.finish({"photos": len(rows), "looks": len(looks)})


def _comparator(
    config: Config, folder: epath.Path, looks: AugmentedGallery, gallery: Table, rows: np.ndarray
) -> Comparator:
    """Trains the comparator in comparator/ on the gallery photos that no pool is of, and writes keys.npy."""
    options = config.verifier.model.comparator
    task = ComparatorTask(options, _mean(looks))
    others = np.flatnonzero(~np.isin(np.arange(len(gallery)), rows))
    pairs = [
        _Pairs(looks, gallery, some, options.same_within_km, config.pools.seed) for some in (others, np.sort(rows))
    ]
    where = folder / "comparator"
    training.fit(task, config, "verifier.train_comparator", pairs, where, "comparator")
    comparator = checkpoint.read_module(where / "parameters.safetensors", task.init)
    file = folder / "keys.npy"
    if not file.exists():
        parts = (np.arange(first, min(first + _BLOCK, len(looks))) for first in range(0, len(looks), _BLOCK))
        blocks = (verify.encode(comparator, looks.images(part)) for part in parts)
        encodings.save(file, blocks, len(looks), options.width)
    return comparator


def of_authors(authors: np.ndarray, photos: int, seed: int) -> np.ndarray:
    """Returns rows of about so many photos, all those of some authors drawn at random, author by author.

    A photo whose author is unknown (empty) is alone. At most half of all photos are taken.
    """
    _, author = np.unique(authors, return_inverse=True)
    alone = authors == authors.dtype.type()
    author = np.where(alone, author.max() + 1 + np.arange(len(authors)), author)
    lots = np.random.default_rng(seed).permutation(author.max() + 1)[author]
    order = np.argsort(lots, kind="stable")
    ends = np.flatnonzero(np.diff(lots[order], append=-1)) + 1
    wanted = min(photos, len(authors) // 2)
    return order[: ends[np.searchsorted(ends, wanted)]] if wanted < len(authors) else order


class _Pairs:
    """Reads two looks of one place for the comparator: image and other [b, C], and place [b, 3]."""

    def __init__(self, looks: AugmentedGallery, gallery: Table, rows: np.ndarray, km: float, seed: int):
        """rows: of the gallery photos that are compared, with each other. km: those no farther apart are of a place."""
        self._looks, self._rows, self._km, self._seed = looks, rows, km, seed
        self._coordinates = gallery.coordinates(rows)
        self._points = np.asarray(to_unit_vectors(*self._coordinates.T), np.float32)
        self._around = NearestPhotos(self._coordinates)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.vary(rows, rows)

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Another photo of the place, or another view of the photo itself, each time (data.pipeline.Varying)."""
        rng = np.random.default_rng([self._seed, int(examples[0])])
        near, km = self._around(self._coordinates[rows], _OTHERS)
        taken = (rng.random(len(rows)) * (km <= self._km).sum(1)).astype(int)
        other = np.take_along_axis(near, taken[:, None], 1)[:, 0]
        v = self._looks.of.shape[1]
        look = rng.integers(v, size=len(rows))
        step = np.where(other == rows, rng.integers(min(1, v - 1), v, size=len(rows)), rng.integers(v, size=len(rows)))
        return {
            "image": self._looks.images(self._looks.of[self._rows[rows], look]),
            "other": self._looks.images(self._looks.of[self._rows[other], (look + step) % v]),
            "place": self._points[rows],
        }


class _Arrays:
    """Reads rows of arrays."""

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
    """Writes views.npy [W, C], image embeddings of all views of gallery photos, and owner.npy, the rows of these."""
    gallery = workdir.gallery
    owner, blocks = np.zeros(0, np.int64), iter(())
    if views.SPLIT in workdir.manifest("queries").counts:
        table, ids = workdir.table(views.SPLIT), gallery.ids()
        order = np.argsort(ids)
        owner = order[np.minimum(np.searchsorted(ids, table.ids(), sorter=order), len(ids) - 1)]
        kept = np.flatnonzero(ids[owner] == table.ids())  # a photo may have been left out of the gallery
        owner = owner[kept]
        parts = (kept[first : first + _BLOCK] for first in range(0, len(kept), _BLOCK))
        blocks = (table.embeddings(part)[:, 0] for part in parts)
    records.save_array(folder / "owner.npy", owner)
    encodings.save(folder / "views.npy", blocks, len(owner), gallery.width)


def _km(pool: Pool, truth: np.ndarray) -> np.ndarray:
    return np.asarray(great_circle_km(*np.moveaxis(pool.coordinates, -1, 0), *truth.T[..., None]), np.float32)


def _mean(looks: AugmentedGallery) -> np.ndarray:
    return looks.images(np.unique(np.linspace(0, len(looks.of) - 1, 20_000).astype(int))).mean(0)
