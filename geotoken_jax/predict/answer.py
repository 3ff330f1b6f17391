"""Turns a decoder's pools into predictions: the choice of every selector, neighbors, cells and calibrated radii."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.data import join
from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index
from geotoken_jax.gallery.neighbors import search_neighbors
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.geo.places import place_names
from geotoken_jax.predict import rerank
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.prediction import Candidate, Cell, Place, Prediction, coordinates, neighbors, rounded
from geotoken_jax.predict.rerank import Ranking
from geotoken_jax.predict.select import SELECTORS, Choice, SelectorInputs
from geotoken_jax.predict.uncertainty import Calibration, fit

#: Largest number of cells in a prediction; 64 are 5 KB of JSON.
_CELLS = 64
#: Largest number of ranked places in a prediction; 16 are 3 KB of JSON.
_PLACES = 16


class Answers(NamedTuple):
    """Answers for b photos.

    predictions: predictions without radii. distribution: distribution over places from which the radii are computed. If
    the reranker chooses the answer, it comes from the reranker. Otherwise it comes from the decoder, and is None if
    config.predict.search is off. ranking: the reranker's ranking; None if the reranker is not among the selectors.
    """

    predictions: list[Prediction]
    distribution: PlaceDistribution | None
    ranking: Ranking | None


class Answerer:
    """Predicts batches of photos with a decoder and the selectors named in the decoder's settings."""

    def __init__(self, decoder: Decoder, inputs: SelectorInputs):
        self.decoder = decoder
        self._selectors = {name: SELECTORS[name](inputs) for name in decoder.settings.selectors}

    def __call__(self, pool: Pool, rows: Int[np.ndarray, "b M"], scores: Float[np.ndarray, "b M"]) -> Answers:
        """Returns the answers for a pool of the decoder. rows, scores: see Decoder.__call__."""
        chosen = {name: select(pool) for name, select in self._selectors.items()}
        predictions = pool_predictions(pool, chosen, self.decoder.settings.choice)
        listed = neighbors(self.decoder.gallery, rows, scores)
        predictions = [dataclasses.replace(p, neighbors=n) for p, n in zip(predictions, listed, strict=True)]
        ranking = next((one for one in chosen.values() if isinstance(one, Ranking)), None)
        best = chosen[self.decoder.settings.choice]
        distribution = rerank.places(best) if isinstance(best, Ranking) else pool.distribution
        return Answers(predictions, distribution, ranking)

    def from_vectors(
        self,
        index: Index,
        vectors: Float[np.ndarray, "b 3 C"],
        captured: Float[np.ndarray, " b"],
        exclude: Sequence[Exclusion] = (),
    ) -> Answers:
        """Searches the neighbors of b photos in the gallery, and returns the answers for these photos.

        index: index of the gallery. For other arguments, see from_neighbors.
        """
        found = search_neighbors(index, index_vectors(vectors), self.decoder.neighbors, exclude)
        return self.from_neighbors(vectors, captured, *found, exclude)

    def from_neighbors(
        self,
        vectors: Float[np.ndarray, "b 3 C"],
        captured: Float[np.ndarray, " b"],
        rows: Int[np.ndarray, "b k"],
        scores: Float[np.ndarray, "b k"],
        exclude: Sequence[Exclusion] = (),
    ) -> Answers:
        """Returns the answers for b photos with known neighbors.

        vectors: image, location and text vector of each photo. captured: seconds since 1970, NaN if unknown (see
        data.join.context). rows, scores: gallery rows of the neighbors and their inner products, as search_neighbors
        returns them. exclude: rules that keep gallery photos out of the neighbors, for selectors that search too.
        """
        batch = {"query": vectors, **join.neighbors(self.decoder.gallery, rows, self.decoder.cells)}
        batch["context"] = join.context(captured, self.decoder.times)
        # Every photo has number 0, so that its samples do not depend on its position in the batch.
        pool = self.decoder(batch, rows, scores, np.zeros(len(rows), np.int64))._replace(exclude=exclude)
        return self(pool, rows, scores)


def pool_predictions(pool: Pool, chosen: Mapping[str, Choice], choice: str) -> list[Prediction]:
    """Returns the prediction for each photo of a pool, without radii and neighbors.

    Candidates with equal tokens are merged into one, and `count` is their number.

    chosen: selector name -> choices of that selector for the pool's photos. choice: name of the selector whose choice
    is the answer.
    """
    predictions = []
    points = {name: one.answers if isinstance(one, Ranking) else one for name, one in chosen.items()}
    for i, tokens in enumerate(pool.candidates.tokens):
        unique, first, inverse, counts = np.unique(
            tokens, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        log_p = pool.candidates.log_probability[i][first]
        order = np.lexsort((-log_p, first != 0))
        listed = [
            Candidate.of(
                pool.coordinates[i, first[j]],
                float(log_p[j]),
                tempered_log_probability=round(float(pool.candidates.tempered_log_probability[i][first[j]]), 5),
                count=int(counts[j]),
                tokens=tuple(unique[j].tolist()),
            )
            for j in order
        ]
        position = np.argsort(order)[inverse.reshape(-1)]  # candidate's index in the pool -> its index in `listed`
        choices = {
            name: int(position[index[i]]) if index.ndim == 1 else rounded(np.asarray(index[i]))
            for name, index in points.items()
        }
        best = choices[choice]
        at = (listed[best].latitude, listed[best].longitude) if isinstance(best, int) else best
        cells = _cells(pool.distribution, i) if pool.distribution else ()
        ranked = next((_places(one, i) for one in chosen.values() if isinstance(one, Ranking)), ())
        answer = Prediction(*at, math.nan, math.nan, {}, tuple(listed), cells, (), choice, choices, places=ranked)
        predictions.append(answer)
    return predictions


def with_radii(
    predictions: list[Prediction], distribution: PlaceDistribution | None, calibration: Calibration
) -> list[Prediction]:
    """Returns predictions with calibrated radii and `within`.

    distribution: the model's distribution over places; if None, predictions are returned unchanged.
    """
    if distribution is None:
        return predictions
    at, updated = coordinates(predictions), []
    radii, probabilities = calibration.radius_km(distribution, at), calibration.within(distribution, at)
    for prediction, km, p in zip(predictions, radii, probabilities, strict=True):
        radius, radius_90 = (round(float(value), 3) for value in km)
        within = {limit: round(float(value), 5) for limit, value in zip(THRESHOLDS_KM, p, strict=True)}
        updated.append(dataclasses.replace(prediction, radius_km=radius, radius_90_km=radius_90, within=within))
    return updated


def with_places(predictions: list[Prediction]) -> list[Prediction]:
    """Returns predictions with the name of the city nearest to the answer."""
    names = place_names(coordinates(predictions))
    return [dataclasses.replace(prediction, place=name) for prediction, name in zip(predictions, names, strict=True)]


def calibrate(answered: Sequence[Answers], truth: Float[np.ndarray, "n 2"]) -> Calibration:
    """Returns the calibration of radii, fitted to the answers and the truth of a split.

    answered: batches of answers; every batch must have a distribution. truth: true coordinates of the same photos in
    the same order, in degrees.
    """
    distribution = jax.tree.map(lambda *batches: np.concatenate(batches), *(batch.distribution for batch in answered))
    return fit(distribution, np.concatenate([coordinates(batch.predictions) for batch in answered]), truth)


def _places(ranking: Ranking, i: int) -> tuple[Place, ...]:
    """Returns the most probable places of photo i in a ranking, at most 16, all with a probability above 0."""
    probability, candidates = ranking.probability[i], ranking.candidates
    listed = []
    for j in np.argsort(-probability, kind="stable")[:_PLACES]:
        if probability[j] <= 0:
            break
        channels = {
            name: (int(rank), round(float(score), 5))
            for name, rank, score in zip(ranking.sources, candidates.ranks[i, j], candidates.scores[i, j], strict=True)
            if rank
        }
        listed.append(Place(*rounded(candidates.coordinates[i, j]), round(float(probability[j]), 6), channels))
    return tuple(listed)


def _cells(distribution: PlaceDistribution, i: int) -> tuple[Cell, ...]:
    """Returns the first cells of photo i in the distribution, at most 64, all with a probability above 0."""
    first = np.flatnonzero(distribution.probability[i] > 0)[:_CELLS]
    columns = (distribution.level[i][first].tolist(), *distribution.coordinates[i][first].T.round(5).tolist())
    return tuple(map(Cell, *columns, distribution.probability[i][first].round(6).tolist()))
