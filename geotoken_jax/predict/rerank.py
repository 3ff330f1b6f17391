"""The selector `reranker`: it ranks candidates of the decoder and of all channels by a network's probability.

The network is in model/reranker.py, and the channels, which search the gallery, are in predict/channels.py.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Bool, Float, Int

from geotoken_jax import checkpoint, disk
from geotoken_jax.batch import padded, padded_size
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.geo.distance import Array, namespace
from geotoken_jax.model import reranker as model
from geotoken_jax.model.reranker import Reranker, RerankerInputs, RerankerSettings
from geotoken_jax.predict.channels import Channels
from geotoken_jax.predict.pool import PlaceDistribution, Pool, disc_km

#: Sources of candidates in addition to the channels: the decoder's token sequences, and its most probable cells.
DECODER_SOURCES = ("samples", "cells")
#: Photos per call of the network: 2.3 million distances with 143 candidates and 256 neighbors per photo.
_BATCH = 64
#: A ranking becomes a distribution over places with one disc per candidate. Each disc has the area of an S2 cell of
#: this level: at level 12, the radius is 1.3 km.
_DISC_LEVEL = 12
#: File with the network for new photos, and files with one network per fold, as a format string.
_NEW_FILE, _FOLD_FILES = "parameters.safetensors", "fold-{:03d}.safetensors"


class Candidates(NamedTuple):
    """Candidates of b photos, with their ranks and scores in each source, as numpy arrays.

    The S sources are the channels, then DECODER_SOURCES.

    coordinates: degrees. present: False for padding, and for a gallery photo that is listed before. ranks: rank of the
    candidate in each source, from 1; 0 if the source does not list it. scores: score of the candidate in each source; 0
    if the source does not list it. The score in a channel is the score of the search, the score in "samples" is the
    log-probability of the sample's cell, and the score in "cells" is the probability of the cell. evidence: input of
    model.reranker.features.
    """

    coordinates: Float[np.ndarray, "b K 2"]
    present: Bool[np.ndarray, "b K"]
    ranks: Int[np.ndarray, "b K S"]
    scores: Float[np.ndarray, "b K S"]
    evidence: RerankerInputs


class Ranking(NamedTuple):
    """The candidates of b photos with their probabilities.

    probability: probability that a candidate is the photo's place. The probabilities of a photo sum to 1. chosen: index
    of the candidate that is the photo's answer. sources: names of the S sources.
    """

    candidates: Candidates
    probability: Float[np.ndarray, "b K"]
    chosen: Int[np.ndarray, " b"]
    sources: tuple[str, ...]

    @property
    def answers(self) -> Float[np.ndarray, "b 2"]:
        """Coordinates of the answers, in degrees."""
        return self.candidates.coordinates[np.arange(len(self.chosen)), self.chosen]


def gather(settings: RerankerSettings, channels: Channels, gallery: Table, pool: Pool) -> Candidates:
    """Returns the candidates of a pool's photos: first the decoder's token sequences, then its most probable cells,
    then the first neighbors of every channel."""
    rows, scores = channels.search(pool, settings.depth)
    present = np.maximum(rows, 0)
    sources = np.unique(gallery.sources(present), return_inverse=True)[1] if settings.sources else None
    return assemble(settings, pool, rows, scores, gallery.coordinates(present), sources)


def assemble(
    settings: RerankerSettings,
    pool: Pool,
    rows: Int[Array, "b C L"],
    scores: Float[Array, "b C L"],
    places: Float[Array, "b C L 2"],
    sources: Int[Array, "b C L"] | None = None,
) -> Candidates:
    """Returns the candidates of a pool's photos, from numpy or jax arrays.

    rows, scores, places: gallery rows, scores and coordinates in degrees of each channel's neighbors, best first; a
    missing neighbor has row -1 and score -inf. sources: number of each neighbor's source, from 0; None if the features
    do not need it.
    """
    xp: Any = namespace(rows)
    b, c, _ = rows.shape
    n, m = pool.coordinates.shape[1], min(settings.candidates, rows.shape[2])
    listed = rows[:, :, :m].reshape(b, c * m)
    cells, radius, probability = _discs(pool, xp)
    f = min(settings.cells, cells.shape[1])
    coordinates = xp.concatenate([pool.coordinates, cells[:, :f], places[:, :, :m].reshape(b, c * m, 2)], 1)

    # If several channels list the same gallery photo, only the first entry is a candidate.
    same = (listed[:, :, None] == listed[:, None, :]) & (listed >= 0)[:, :, None]
    first = xp.arange(c * m) == same.argmax(2)
    brought = same.reshape(b, c * m, c, m)
    of_channels = xp.where(brought.any(3), brought.argmax(3) + 1, 0)
    best_cells = probability[:, :f] > 0
    of_decoder = (xp.broadcast_to(xp.arange(1, n + 1), (b, n)), xp.where(best_cells, xp.arange(1, f + 1), 0))
    ranks = _by_source(of_decoder, of_channels, xp)
    at = xp.maximum(of_channels - 1, 0).swapaxes(1, 2)
    channel_scores = xp.take_along_axis(scores[:, :, :m], at, 2).swapaxes(1, 2)
    values = _by_source((pool.candidates.log_probability, probability[:, :f]), channel_scores, xp)
    present = xp.concatenate([xp.ones((b, n), bool), best_cells, first & (listed >= 0)], 1)
    evidence = RerankerInputs(
        *(_unit(coordinates), present, ranks > 0, _unit(places), scores),
        *(_unit(pool.coordinates), _unit(cells), radius, probability.astype(np.float32)),
        None if sources is None else _of_other_source(sources, n + f, m, xp),
    )
    values = xp.where(ranks > 0, values, 0).astype(np.float32)
    return Candidates(coordinates, present, ranks.astype(np.int32), values, evidence)


def _of_other_source(sources: Int[Array, "b C L"], decoded: int, m: int, xp: Any) -> Bool[Array, "b K C L"]:
    """Returns whether each neighbor is of another source than each candidate.

    sources: number of each neighbor's source. decoded: number of candidates of the decoder, which have no source. m:
    number of candidates per channel.
    """
    b, c, _ = sources.shape
    none = xp.full((b, decoded), -1, sources.dtype)
    of_candidates = xp.concatenate([none, sources[:, :, :m].reshape(b, c * m)], 1)
    return of_candidates[:, :, None, None] != sources[:, None]


def _by_source(decoder: tuple[Any, Any], channels: Any, xp: Any) -> Any:
    """Returns values of all candidates per source [b, K, C + 2], 0 if the source did not bring the candidate.

    decoder: values of the samples [b, n] and of the cells [b, f]. channels: values of the neighbors [b, m, C].
    """
    samples, cells = (xp.asarray(values, np.float32)[..., None] for values in decoder)
    s = channels.shape[-1] + 2
    source = np.arange(s)
    rows = [xp.where(source == s - 2, samples, 0), xp.where(source == s - 1, cells, 0)]
    none = xp.zeros((*channels.shape[:2], 2), np.float32)
    return xp.concatenate([*rows, xp.concatenate([channels.astype(np.float32), none], 2)], 1)


def _discs(pool: Pool, xp: Any) -> tuple[Array, Array, Array]:
    """Returns the cells of the decoder's distribution as discs. A disc has the mean area of the cells of its level.

    The result has centers [b, F, 2] in degrees, radii [b, F] in km and probabilities [b, F]. F is 0 if the pool has no
    distribution.
    """
    if pool.distribution is None:
        empty = xp.zeros((pool.coordinates.shape[0], 0))
        return xp.zeros((*empty.shape, 2)), empty.astype(np.float32), empty
    radius = disc_km(pool.distribution.level)
    return pool.distribution.coordinates, radius.astype(np.float32), pool.distribution.probability


def _unit(coordinates: Float[Array, "... 2"]) -> Float[Array, "... 3"]:
    return distance.to_unit_vectors(coordinates[..., 0], coordinates[..., 1]).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def featurize(settings: RerankerSettings, scale: jax.Array, evidence: RerankerInputs) -> jax.Array:
    """Returns the features [b, K, F] of candidates; see model.reranker.features."""
    return model.features(settings, scale, evidence)


class Ranker:
    """The trained selector `reranker`, a function that maps a pool to a ranking."""

    def __init__(self, rerankers: list[Reranker], channels: Channels, gallery: Table):
        """rerankers: first the network for new photos. If there are more, the others are one network per fold, fitted
        without the photos of this fold."""
        self.settings, self._channels, self._gallery = rerankers[0].settings, channels, gallery
        self.sources = (*channels.names, *DECODER_SOURCES)
        graph, _ = nnx.split(rerankers[0])
        states = [nnx.split(one)[1] for one in rerankers]

        def run(state: nnx.State, evidence: RerankerInputs) -> tuple[jax.Array, jax.Array]:
            network, settings = nnx.merge(graph, state), self.settings
            found = model.features(settings, network.scale[...], evidence)
            log_p = network(found, evidence.present)
            return jnp.exp(log_p), model.choose(settings.objective, log_p, evidence)

        compiled = jax.jit(run)
        self._run = [functools.partial(compiled, state) for state in states]

    def __call__(self, pool: Pool) -> Ranking:
        """Returns the ranking of a pool's photos.

        If pool.fold is None, the network for new photos ranks them. Otherwise each photo is ranked by the network that
        was fitted without the photo's fold.
        """
        candidates = gather(self.settings, self._channels, self._gallery, pool)
        b, k = candidates.present.shape
        probability, chosen = np.zeros((b, k), np.float32), np.zeros(b, np.int64)
        number = np.zeros(b, np.int64) if pool.fold is None else pool.fold + 1
        for i in np.unique(number):
            mine = np.flatnonzero(number == i)
            for first in range(0, len(mine), _BATCH):
                rows = mine[first : first + _BATCH]
                size = padded_size(len(rows), _BATCH)
                part = jax.tree.map(lambda values, at=rows, n=size: padded(values[at], n), candidates.evidence)
                p, best = self._run[i](part)
                probability[rows], chosen[rows] = np.asarray(p)[: len(rows)], np.asarray(best)[: len(rows)]
        return Ranking(candidates, probability, chosen, self.sources)


class Recall:
    """Counts photos with a candidate near the truth, within each of THRESHOLDS_KM.

    The counts are per source of candidates, and for all sources combined. photos: number of photos that were added.
    """

    def __init__(self):
        self.photos = 0
        self._within: dict[str, np.ndarray] = {}

    def add(self, ranking: Ranking | None, truth: Float[np.ndarray, "b 2"]) -> None:
        """Adds the photos of a ranking to the counts. If the ranking is None, nothing is added.

        truth: true coordinates of the photos, in degrees.
        """
        if ranking is None:
            return
        candidates = ranking.candidates
        km = np.asarray(distance.great_circle_km(*np.moveaxis(candidates.coordinates, -1, 0), *truth.T[..., None]))
        brought = {name: candidates.ranks[..., i] > 0 for i, name in enumerate(ranking.sources)}
        for name, by in {**brought, "all": candidates.present}.items():
            near = (km[..., None] <= np.array(distance.THRESHOLDS_KM)) & by[..., None]
            self._within[name] = self._within.get(name, 0) + near.any(1).sum(0)
        self.photos += len(truth)

    def shares(self) -> dict[str, list[float]]:
        """Returns source -> shares of the photos, one per threshold. The key "all" has all sources combined."""
        return {name: (counts / self.photos).round(6).tolist() for name, counts in self._within.items()}


def places(ranking: Ranking) -> PlaceDistribution:
    """Returns a ranking as a distribution over places: discs around the candidates, most probable first."""
    return discs(ranking.candidates.coordinates, ranking.probability)


def discs(coordinates: Float[Array, "b K 2"], probability: Float[Array, "b K"]) -> PlaceDistribution:
    """Returns a disc around each place, most probable first; numpy or jax arrays. coordinates: degrees."""
    xp: Any = namespace(probability)
    order = xp.argsort(-probability, 1, stable=True)
    ordered: Any = xp.take_along_axis(coordinates, order[..., None], 1)
    sorted_ = xp.take_along_axis(probability, order, 1)
    sorted_ = sorted_.astype(np.float64) if xp is np else sorted_
    return PlaceDistribution(ordered, xp.full(probability.shape, _DISC_LEVEL), sorted_)


def folds(authors: np.ndarray, ids: np.ndarray, count: int) -> Int[np.ndarray, " n"]:
    """Returns the fold of each photo, from 0 to count - 1. All photos of an author are in one fold.

    authors: author of each photo as bytes. For a photo with an empty author, the id decides the fold. ids: id of each
    photo as bytes. count: number of folds.
    """
    names = np.where(authors == authors.dtype.type(), ids, authors)
    return np.array([zlib.crc32(name) % count for name in names.tolist()], np.int64).reshape(-1)


def write(folder: epath.Path, rerankers: Sequence[Reranker]) -> None:
    """Writes the parameters of the networks. rerankers: see Ranker."""
    for i, one in enumerate(rerankers):
        parameters = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(one)))
        checkpoint.write_parameters(folder / _FOLD_FILES.format(i - 1) if i else folder / _NEW_FILE, parameters)


def read(folder: epath.Path, settings: RerankerSettings) -> list[Reranker]:
    """Returns the networks that `write` stored. An export has only the network for new photos."""
    width = len(model.names(settings))
    moments, scale = np.ones((2, width), np.float32), np.ones(len(settings.channels), np.float32)
    files = [folder / _NEW_FILE, *disk.matching(folder, "fold-*.safetensors")]
    return [checkpoint.read_module(file, lambda rngs: Reranker(settings, moments, scale, rngs=rngs)) for file in files]
