"""Answers of a decoder and its selectors: what every selector chose, with calibrated radii."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.data import join
from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index
from geotoken_jax.gallery.neighbors import find
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.prediction import Candidate, Cell, Prediction, coordinates, neighbors, rounded
from geotoken_jax.predict.select import SELECTORS, Choice, Selector, SelectorInputs
from geotoken_jax.predict.uncertainty import Calibration, fit

#: Cells of a photo that an answer has, 5 KB of JSON.
_CELLS = 64


class Answerer:
    """Answers for batches of photos, with a decoder and the selectors that its settings name."""

    def __init__(self, decoder: Decoder, parts: SelectorInputs):
        self.decoder = decoder
        self._selectors = {name: SELECTORS[name](parts) for name in decoder.settings.selectors}

    def __call__(
        self,
        batch: Mapping[str, np.ndarray],
        rows: Int[np.ndarray, "b M"],
        scores: Float[np.ndarray, "b M"],
        numbers: Int[np.ndarray, " b"],
        others: Mapping[str, Selector] = MappingProxyType({}),
        exclude: Sequence[Exclusion] = (),
    ) -> tuple[list[Prediction], PlaceDistribution | None]:
        """Returns the answers of b photos, without radii, and the model's distribution over places; see Decoder.

        others: selectors of this batch alone, by name. exclude: see Pool.
        """
        pool = self.decoder(batch, rows, scores, numbers)._replace(exclude=exclude)
        chosen = {name: select(pool) for name, select in {**self._selectors, **others}.items()}
        found = answers(pool, chosen, self.decoder.settings.choice)
        near = neighbors(self.decoder.gallery, rows, scores)
        return [dataclasses.replace(a, neighbors=n) for a, n in zip(found, near, strict=True)], pool.distribution

    def of_vectors(
        self, index: Index, vectors: Float[np.ndarray, "b 3 C"], captured: Float[np.ndarray, " b"]
    ) -> tuple[list[Prediction], PlaceDistribution | None]:
        """Returns what a call does, for photos of which only the three vectors are known and when they were taken (see
        data.join.context). An index of the gallery finds their neighbors."""
        rows, scores = find(index, index_vectors(vectors), self.decoder.neighbors)
        batch = {"query": vectors, **join.neighbors(self.decoder.gallery, rows, self.decoder.cells)}
        batch["context"] = join.context(captured, self.decoder.times)
        # The samples of a photo are the same whichever others come with it.
        return self(batch, rows, scores, np.zeros(len(rows), np.int64))


def answers(pool: Pool, chosen: Mapping[str, Choice], choice: str) -> list[Prediction]:
    """Returns each photo's answer, without radii and neighbors.

    chosen: name of a selector -> its choices. choice: the selector whose choice is the answer. Equal candidates are
    one, with their count.
    """
    found = []
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
        place = np.argsort(order)[inverse.reshape(-1)]  # index in the pool -> index in the list
        choices = {
            name: int(place[index[i]]) if index.ndim == 1 else rounded(index[i]) for name, index in chosen.items()
        }
        best = choices[choice]
        at = (listed[best].latitude, listed[best].longitude) if isinstance(best, int) else best
        cells = _cells(pool.distribution, i) if pool.distribution else ()
        found.append(Prediction(*at, math.nan, math.nan, {}, tuple(listed), cells, (), choice, choices))
    return found


def with_radii(
    answers: list[Prediction], places: PlaceDistribution | None, calibration: Calibration
) -> list[Prediction]:
    """Returns answers with their radii and `within`; unchanged if the model was not searched."""
    if places is None:
        return answers
    at, found = coordinates(answers), []
    for answer, radii, shares in zip(
        answers, calibration.radius_km(places, at), calibration.within(places, at), strict=True
    ):
        half, most = (round(float(km), 3) for km in radii)
        within = {km: round(float(p), 5) for km, p in zip(THRESHOLDS_KM, shares, strict=True)}
        found.append(dataclasses.replace(answer, radius_km=half, radius_90_km=most, within=within))
    return found


def calibrate(
    answered: Sequence[tuple[list[Prediction], PlaceDistribution | None]], truth: Float[np.ndarray, "n 2"]
) -> Calibration:
    """Returns what makes the radii of answers hold what they say. answered: of a whole split, in the truth's order."""
    places = jax.tree.map(lambda *parts: np.concatenate(parts), *(places for _, places in answered))
    return fit(places, np.concatenate([coordinates(answers) for answers, _ in answered]), truth)


def _cells(places: PlaceDistribution, i: int) -> tuple[Cell, ...]:
    """Returns the cells of a photo that have a probability."""
    there = np.flatnonzero(places.probability[i] > 0)[:_CELLS]
    columns = (places.level[i][there].tolist(), *places.coordinates[i][there].T.round(5).tolist())
    return tuple(map(Cell, *columns, places.probability[i][there].round(6).tolist()))
