"""The stage `learn`: trains the selectors, which choose among a photo's candidates.

pools/VARIANT contains the decoder's candidates for all training photos of some authors. reward/VARIANT is trained on
these pools. channels/ contains the comparator and the indexes of the channels, which search the gallery for further
candidates, and reranker/VARIANT the reranker, which ranks all candidates.
"""

import dataclasses

import numpy as np

from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import context, neighbors
from geotoken_jax.gallery.draws import rows_by_author
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.manifests import Manifest
from geotoken_jax.model.reranker import names as feature_names
from geotoken_jax.model.reranker import scales
from geotoken_jax.model.reranker_fit import fit
from geotoken_jax.model.reward import RewardTask
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.rerank import featurize, folds, gather, write
from geotoken_jax.predict.reward import States
from geotoken_jax.progress import Progress, track
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import channels, training
from geotoken_jax.stages.predict import decoded
from geotoken_jax.workdir import VALIDATION, Workdir, trained_selectors

#: Share of the photos used for validation. Of the pools it is taken from the end. Pools are grouped by author, so at
#: most one author has photos in both training and validation.
_VALIDATION = 0.1
#: Images per block when encoding the augmented gallery or copying views.
_BLOCK = 4096
#: Nearest photos, the photo itself included, from which a comparator's positive pair is drawn.
_PAIR_NEIGHBORS = 32
#: Keys of config.predict that determine the candidates. The other keys determine the choice among them.
_CANDIDATE_KEYS = [f"predict.{key}" for key in ("samples", "temperature", "top_p", "beam", "seed")]


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Writes pools/VARIANT and reward/VARIANT, channels/ and reranker/VARIANT, as far as the variant's selectors need
    them. An interrupted folder is completed."""
    made, wanted = [], trained_selectors(config.variant(variant).predict)
    if "reward" in wanted:
        made += [pools(config, workdir, variant), reward(config, workdir, variant)]
    if "reranker" in wanted:
        made += [channels.run(config, workdir), reranker(config, workdir, variant)]
    return made


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


def reranker(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Fits the reranker to the validation photos and writes reranker/VARIANT.

    Validation photos are new to the decoder and to the comparator, so their candidates are like those of a user's
    photo. Each fold of authors gets a reranker of its own, fitted to the other folds, with which the stage `predict`
    ranks its photos; the radii are then calibrated on answers for photos that the reranker has not seen.
    """
    inputs = ["tokens", f"geotoken/{variant}", "neighbors", "channels"]
    stage = workdir.begin(config, f"reranker/{variant}", ["reranker", *_CANDIDATE_KEYS, "predict.search"], inputs)
    if stage.manifest:
        return stage.manifest
    config = config.variant(variant)
    if not workdir.query_counts.get(VALIDATION):
        raise SettingsError(
            "the selector `reranker` is fitted to photos of the split validation, but the data has none: remove "
            "'reranker' from config.predict.selectors, or prepare photos with a larger share of validation"
        )
    settings, options, queries = config.reranker.model, config.reranker.fit, workdir.table(VALIDATION)
    rows = np.unique(np.linspace(0, len(queries) - 1, min(options.photos, len(queries))).astype(int))
    truth = queries.coordinates(rows)
    predict = dataclasses.replace(config.predict, selectors=("greedy",), choice="greedy")
    decoder = Decoder(workdir.decoder(variant, config.model), predict, workdir.gallery)
    searched, found = workdir.channels(config), []
    with Progress(f"candidates {variant}", len(rows), "photos") as progress:
        for pool, *_ in decoded(workdir, decoder, VALIDATION, rows):
            found.append(gather(settings, searched, workdir.gallery, pool))
            progress.add(len(pool.coordinates))
    scale = scales(np.concatenate([one.evidence.scores for one in found]))
    features = np.concatenate([np.asarray(featurize(settings, scale, one.evidence)) for one in found])
    present, coordinates = (np.concatenate([getattr(c, name) for c in found]) for name in ("present", "coordinates"))
    km = great_circle_km(*np.moveaxis(coordinates, -1, 0), *truth.T[..., None])
    km = np.where(present, np.asarray(km), np.inf).astype(np.float32)
    fold = folds(queries.authors(rows), queries.ids(rows), options.folds)
    rerankers = []
    for left_out in track((-1, *range(options.folds)), "reranker", options.folds + 1, "fits"):
        kept = fold != left_out
        kept = kept if kept.any() else np.ones(len(kept), bool)
        rerankers.append(fit(settings, options, scale, features[kept], present[kept], km[kept]))
    write(stage.path, rerankers)
    weights = np.asarray(rerankers[0].linear.kernel[...])[:, 0].tolist()
    names = [" ".join(one) for one in feature_names(settings)]
    return stage.finish({"photos": len(rows)}, scale=scale.tolist(), weights=dict(zip(names, weights, strict=True)))


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


def _km(pool: Pool, truth: np.ndarray) -> np.ndarray:
    return np.asarray(great_circle_km(*np.moveaxis(pool.coordinates, -1, 0), *truth.T[..., None]), np.float32)
