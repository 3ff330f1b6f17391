"""The stage `learn`: trains the selectors `reward` and `reranker`. A selector chooses a photo's answer.

The stage writes these folders:

- pools/VARIANT: the decoder's candidates for training photos.
- reward/VARIANT: the selector `reward`, trained on pools/VARIANT.
- channels/: indexes in which the selector `reranker` searches the gallery for further candidates.
- reranker/VARIANT: the selector `reranker`, which ranks the candidates of the decoder and of the channels.
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

#: Share of pools/VARIANT, at its end, on which the selector `reward` is validated. The pools are grouped by author, so
#: at most one author has photos in both training and validation.
_VALIDATION = 0.1
#: Keys of config.predict that determine the decoder's candidates.
_CANDIDATE_KEYS = [f"predict.{key}" for key in ("samples", "temperature", "top_p", "beam", "seed")]


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Trains the selectors in config.predict.selectors that need training, and returns the manifests.

    Writes pools/VARIANT and reward/VARIANT for the selector `reward`, and channels/ and reranker/VARIANT for the
    selector `reranker`. A folder that was interrupted is completed.
    """
    made, wanted = [], trained_selectors(config.variant(variant).predict)
    if "reward" in wanted:
        made += [pools(config, workdir, variant), reward(config, workdir, variant)]
    if "reranker" in wanted:
        made += [channels.run(config, workdir), reranker(config, workdir, variant)]
    return made


def pools(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Writes pools/VARIANT: gallery rows of n training photos, and the candidates of each photo.

    A candidate is stored with the decoder output that predicts its last token (see predict.reward.States).
    """
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
    """Trains the selector `reward` and writes reward/VARIANT."""
    stage = workdir.begin(config, f"reward/{variant}", ["reward"], [f"pools/{variant}"])
    if stage.manifest:
        return stage.manifest
    variant_config = config.variant(variant)
    states, pool = workdir.pools(variant, variant_config.model)
    km = _candidate_km(pool, workdir.gallery.coordinates(workdir.pool_rows(variant)))
    task = RewardTask(variant_config.reward.model, states.shape[-1])
    training.fit(task, variant_config, "reward.train", _readers(states=states, km=km), stage.path, f"reward {variant}")
    return stage.finish({"photos": len(km)})


def reranker(config: Config, workdir: Workdir, variant: str) -> Manifest:
    """Fits the reranker to the validation photos and writes reranker/VARIANT.

    The decoder and the comparator were not trained on validation photos. The candidates of these photos are therefore
    like the candidates of a user's photo.

    The first reranker is fitted to all of these photos and ranks new photos. The photos are also divided into folds by
    author, and one more reranker per fold is fitted to all other folds. The stage `predict` uses it to rank the photos
    of the fold. The radii are calibrated on the answers of these rerankers, which have not seen the photos.
    """
    inputs = ["tokens", f"geotoken/{variant}", "neighbors", "channels"]
    if "sources" in workdir.gallery.stored:
        config = config.changed({"reranker": {"model": {"sources": True}}}, "reranker")
    stage = workdir.begin(config, f"reranker/{variant}", ["reranker", *_CANDIDATE_KEYS, "predict.search"], inputs)
    if stage.manifest:
        return stage.manifest
    config = config.variant(variant)
    if not workdir.query_counts.get(VALIDATION):
        raise SettingsError(
            "config.predict.selectors has 'reranker', which is fitted to photos of the split validation, but the data "
            "has none: remove 'reranker' from config.predict.selectors, or prepare photos with a larger share of "
            "validation"
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


class _ArrayRows:
    """Reads the rows from `first` to `last` - 1 of arrays, as float32. Row 0 of a call is the row `first`."""

    def __init__(self, first: int, last: int, arrays: dict[str, np.ndarray]):
        self._first, self._last, self._arrays = first, last, arrays

    def __len__(self) -> int:
        return self._last - self._first

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(values[self._first + rows], np.float32) for name, values in self._arrays.items()}


def _readers(**arrays: np.ndarray) -> list[_ArrayRows]:
    """Returns readers of the training photos and of the validation photos. arrays: arrays with a row per photo."""
    n = len(arrays["km"])
    cut = n - max(1, round(_VALIDATION * n))
    return [_ArrayRows(0, cut, arrays), _ArrayRows(cut, n, arrays)]


def _candidate_km(pool: Pool, truth: np.ndarray) -> np.ndarray:
    return np.asarray(great_circle_km(*np.moveaxis(pool.coordinates, -1, 0), *truth.T[..., None]), np.float32)
