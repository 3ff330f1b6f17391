"""The stage `learn`: what chooses among candidates, trained on the pools of photos that the decoder was trained on.

pools/VARIANT holds the candidates of some photos, all those of their authors; reward/VARIANT and verifier/VARIANT are
trained on them. The verifier's comparator is trained on the other authors' photos, so that it knows those of the pools
as little as it will know a new photo.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.exclude import ExcludeSettings, Exclusion, rules
from geotoken_jax.gallery.table import Table
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

if TYPE_CHECKING:
    from geotoken_jax.align.heads import AlignModel
    from geotoken_jax.model.geotoken import GeoTokenModel
    from geotoken_jax.predict.pool import Pool
    from geotoken_jax.predict.verify import Looks

#: Trains a task on two readers, of training and validation, as the section of that name says, in a folder; the
#: library's one loop is of the rank of this module, so that only who is above both can bring them together.
Train = Callable[[Any, list[Any], str, epath.Path], None]
#: Folder that this stage makes -> the selectors that it holds; predict/verify.py says what the verifier's are.
LEARNED = {
    "reward": ("reward",),
    "verifier": ("verifier", "comparator", "likeness", "point_comparator", "point_likeness"),
}
#: Share of the pools that training is validated on: the last ones, of authors of their own.
_VALIDATION = 0.1
#: Looks encoded, and views copied, at once.
_BLOCK = 4096
#: Photos around each, itself among them, of which one within reach is its pair.
_OTHERS = 32


@dataclasses.dataclass(frozen=True)
class PoolsSettings:
    """photos: that have pools made of them, of authors drawn at random. seed: of that draw."""

    photos: int
    seed: int

    def __post_init__(self):
        if self.photos < 20:
            raise ValueError(f"config.pools.photos is {self.photos}: make it at least 20")


def run(config: Any, path: epath.PathLike, variant: str, train: Train) -> list[Manifest]:
    """Makes pools/VARIANT, reward/VARIANT and verifier/VARIANT, as far as the variant's selectors need them; each goes
    on where it was interrupted."""
    path, config = epath.Path(path), settings.variant(config, variant)
    wanted = needed(config)
    makers = {"reward": reward, "verifier": verifier}
    made = [pools(config, path, variant)] if wanted else []
    return made + [makers[name](config, path, variant, train) for name in wanted]


def needed(config: Any) -> list[str]:
    """Returns those of LEARNED that a variant's selectors, whose changes config has, are in."""
    return [name for name, selectors in LEARNED.items() if set(selectors) & set(config.predict.selectors)]


def pools(config: Any, path: epath.Path, variant: str) -> Manifest:
    """Makes pools/VARIANT: rows of the gallery [n], candidates of each, and the decoder's last output for these."""
    made_with = {"pools": config.pools, "predict": _sampled(config)}
    stage = workdir.begin(path, f"pools/{variant}", made_with, ["tokens", f"geotoken/{variant}", "neighbors"])
    if stage.manifest:
        return stage.manifest
    from geotoken_jax.data.join import context, neighbors
    from geotoken_jax.predict.decode import Decoder, PredictSettings
    from geotoken_jax.predict.reward import States

    options = settings.read(PoolsSettings, config.pools, "pools")
    model = read_model(config, path, variant)
    gallery = Table(path / "gallery")
    asked = settings.read(PredictSettings, config.predict, "predict")
    unsearched = dataclasses.replace(asked.search, expansions=0)
    decoder = Decoder(
        model, dataclasses.replace(asked, search=unsearched, selectors=("greedy",), choice="greedy"), gallery
    )
    rows = of_authors(gallery.authors(), options.photos, options.seed)
    near, scores = _neighbors(path, decoder.neighbors)
    states, size, found = States(model), asked.batch_size, []
    with Progress(f"pools {variant}", len(rows), "photos") as progress:
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = {"query": gallery.embeddings(part), **neighbors(gallery, near[part], decoder.cells)}
            batch["context"] = context(gallery.captured(part), decoder.times)
            pool = decoder(batch, near[part], scores[part], part)
            found.append((*pool.candidates, states(pool)))
            progress.add(len(part))
    for name, values in zip(_COLUMNS, zip(*found, strict=True), strict=True):
        records.save_array(stage.path / f"{name}.npy", np.concatenate(values))
    records.save_array(stage.path / "rows.npy", rows)
    return stage.finish({"photos": len(rows)})


_COLUMNS = ("tokens", "log_probability", "tempered_log_probability", "states")


def reward(config: Any, path: epath.Path, variant: str, train: Train) -> Manifest:
    """Makes reward/VARIANT: the reward head's parameters."""
    stage = workdir.begin(path, f"reward/{variant}", {"reward": _outcome(config.reward)}, [f"pools/{variant}"])
    if stage.manifest:
        return stage.manifest
    from geotoken_jax.model.reward import RewardSettings, RewardTask

    options = settings.read(RewardSettings, config.reward.model, "reward.model")
    states = records.open_array(path / "pools" / variant / "states.npy")
    _, pool = read_pools(config, path, variant)
    km = _km(pool, Table(path / "gallery").coordinates(_rows(path, variant)))
    train(RewardTask(options, states.shape[-1]), _splits(states=states, km=km), "reward.train", stage.path)
    return stage.finish({"photos": len(km)})


def verifier(config: Any, path: epath.Path, variant: str, train: Train) -> Manifest:
    """Makes verifier/VARIANT: comparator/ and judge/, trained one after the other, views.npy and owner.npy (see
    `_save_views`), and keys.npy, the comparator's vectors of all gallery photos and views."""
    inputs = [f"pools/{variant}", "align", "gallery", "queries", "neighbors"]
    stage = workdir.begin(path, f"verifier/{variant}", {"verifier": _outcome(config.verifier)}, inputs)
    if stage.manifest:
        return stage.manifest
    from geotoken_jax import checkpoint
    from geotoken_jax.model.verifier import ComparatorTask, JudgeTask
    from geotoken_jax.predict import places, verify

    options = settings.read(verify.VerifierSettings, config.verifier.model, "verifier.model")
    gallery = Table(path / "gallery")
    if not (stage.path / "views.npy").exists():
        _save_views(stage.path, path, gallery)
    looks = verify.open_looks(stage.path, gallery)
    rows = _rows(path, variant)
    task = ComparatorTask(options.comparator, _mean(looks))
    known = np.isin(np.arange(len(gallery)), rows)
    km = options.comparator.same_within_km
    pairs = [_Pairs(looks, gallery, some, km, config.pools.seed) for some in (np.flatnonzero(~known), np.sort(rows))]
    train(task, pairs, "verifier.train_comparator", stage.path / "comparator")
    comparator = checkpoint.read_module(stage.path / "comparator" / "parameters.safetensors", task.init)
    file = stage.path / "keys.npy"
    if not file.exists():
        parts = (np.arange(first, min(first + _BLOCK, len(looks))) for first in range(0, len(looks), _BLOCK))
        blocks = (verify.encode(comparator, looks.images(part)) for part in parts)
        places.save(file, blocks, len(looks), options.comparator.width)
    file = stage.path / "features.npy"
    _, pool = read_pools(config, path, variant)
    if not file.exists():
        evidence = verify.Evidence(
            options.near, comparator, places.open(stage.path / "keys.npy"), looks, gallery, read_aligned(config, path)
        )
        found = evidence(pool._replace(exclude=_rules(path, gallery, rows)))
        moments = np.stack([found.mean((0, 1)), found.std((0, 1))])
        records.save_array(stage.path / "moments.npy", moments)
        records.save_array(file, found)
    task = JudgeTask(options.judge, np.load(stage.path / "moments.npy"))
    splits = _splits(features=records.open_array(file), km=_km(pool, gallery.coordinates(rows)))
    train(task, splits, "verifier.train_judge", stage.path / "judge")
    return stage.finish({"photos": len(rows), "looks": len(looks)})


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

    def __init__(self, looks: "Looks", gallery: Table, rows: np.ndarray, km: float, seed: int):
        """rows: of the gallery photos that are compared, with each other. km: those no farther apart are of a place."""
        from geotoken_jax.geo.distance import to_unit_vectors
        from geotoken_jax.predict.verify import Around

        self._looks, self._rows, self._km, self._seed = looks, rows, km, seed
        self._coordinates = gallery.coordinates(rows)
        self._points = np.asarray(to_unit_vectors(*self._coordinates.T), np.float32)
        self._around = Around(self._coordinates)

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


def read_model(config: Any, path: epath.Path, variant: str) -> "GeoTokenModel":
    """Returns the trained decoder of a variant, whose changes config has."""
    from geotoken_jax import checkpoint
    from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings

    options = settings.read(ModelSettings, config.model, "model")
    file = path / "geotoken" / variant / "parameters.safetensors"
    return checkpoint.read_module(file, lambda rngs: GeoTokenModel(options, rngs))


def read_aligned(config: Any, path: epath.Path) -> "AlignModel":
    """Returns the trained alignment model."""
    from geotoken_jax import checkpoint
    from geotoken_jax.align.heads import AlignSettings
    from geotoken_jax.align.task import AlignTask

    task = AlignTask(settings.read(AlignSettings, config.align.model, "align.model"), Table(path / "gallery").width)
    return checkpoint.read_module(path / "align" / "parameters.safetensors", task.init)


def _save_views(folder: epath.Path, path: epath.Path, gallery: Table) -> None:
    """Writes views.npy [W, C], image embeddings of all views of gallery photos, and owner.npy, the rows of these."""
    from geotoken_jax.predict import places

    owner, blocks = np.zeros(0, np.int64), iter(())
    if views.SPLIT in workdir.read_manifest(path, "queries").counts:
        table, ids = Table(path / "queries" / views.SPLIT), gallery.ids()
        order = np.argsort(ids)
        owner = order[np.minimum(np.searchsorted(ids, table.ids(), sorter=order), len(ids) - 1)]
        kept = np.flatnonzero(ids[owner] == table.ids())  # a photo may have been left out of the gallery
        owner = owner[kept]
        parts = (kept[first : first + _BLOCK] for first in range(0, len(kept), _BLOCK))
        blocks = (table.embeddings(part)[:, 0] for part in parts)
    records.save_array(folder / "owner.npy", owner)
    places.save(folder / "views.npy", blocks, len(owner), gallery.width)


def read_pools(config: Any, path: epath.Path, variant: str) -> tuple[np.ndarray, "Pool"]:
    """Returns the states and the pools in pools/VARIANT, these without the embeddings of neighbors."""
    from geotoken_jax.model.geotoken import ModelSettings
    from geotoken_jax.predict.pool import Pool
    from geotoken_jax.predict.sample import Candidates

    tokens, log_p, tempered, states = (records.open_array(path / "pools" / variant / f"{c}.npy") for c in _COLUMNS)
    options = settings.read(ModelSettings, config.model, "model")
    gallery, rows = Table(path / "gallery"), _rows(path, variant)
    near, scores = (part[rows] for part in _neighbors(path, options.neighbors))
    pool = Pool(
        Candidates(tokens, log_p, tempered),  # pyright: ignore[reportArgumentType]
        np.stack(options.cells.decode(tokens), -1),
        gallery.embeddings(rows),
        np.zeros((len(rows), options.neighbors, 0, gallery.width), np.float32),
        gallery.coordinates(np.maximum(near, 0)),
        scores,
        (near >= 0).sum(1),
        None,
    )
    return states, pool


def _neighbors(path: epath.Path, m: int) -> list[np.ndarray]:
    """Returns rows and scores [N, m] of every gallery photo's neighbors."""
    return [records.open_array(path / "neighbors" / f"{views.OF}.{name}.npy")[:, :m] for name in ("rows", "scores")]


def _rules(path: epath.Path, gallery: Table, rows: np.ndarray) -> list[Any]:
    """Returns which gallery photos those of the pools may not see: those that may not be their neighbors either."""
    return excluded(path, gallery, gallery, "exclude")(rows)


def excluded(path: epath.Path, own: Table, gallery: Table, key: str) -> Callable[[np.ndarray], list[Exclusion]]:
    """Returns rows of a table -> the rules on gallery photos by which their neighbors were found.

    key: of the settings of neighbors/: "exclude" for photos that are trained on, "exclude_in_evaluation" for others.
    """
    section = workdir.read_manifest(path, "neighbors").settings["index"]["neighbors"][key]
    exclude = settings.read(ExcludeSettings, section, f"index.neighbors.{key}")
    of_gallery = {name: getattr(gallery, name)() for name in ("ids", "authors", "coordinates")}
    return lambda rows: rules(exclude, own, rows, of_gallery, lambda some: gallery.embeddings(some)[:, 0])


def _rows(path: epath.Path, variant: str) -> np.ndarray:
    return records.open_array(path / "pools" / variant / "rows.npy")


def _km(pool: "Pool", truth: np.ndarray) -> np.ndarray:
    from geotoken_jax.geo.distance import great_circle_km

    return np.asarray(great_circle_km(*np.moveaxis(pool.coordinates, -1, 0), *truth.T[..., None]), np.float32)


def _mean(looks: "Looks") -> np.ndarray:
    return looks.images(np.unique(np.linspace(0, len(looks.of) - 1, 20_000).astype(int))).mean(0)


def _sampled(config: Any) -> dict[str, Any]:
    """Returns what of config.predict decides the candidates, and not which of them is taken."""
    return {key: config.predict[key] for key in ("samples", "temperature", "top_p", "beam", "seed")}


def _outcome(section: Any) -> dict[str, Any]:
    """Returns a section without what says how training runs, as `settings.outcome` does of each of its parts."""
    return {name: settings.outcome(part) for name, part in section.items()}
