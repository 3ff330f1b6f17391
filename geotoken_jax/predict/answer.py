"""A photo's answer as what is written down: what every selector chose, with the radius that it is good for."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.data.join import context, neighbors
from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index
from geotoken_jax.gallery.neighbors import find
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import Places, Pool
from geotoken_jax.predict.select import SELECTORS, Choice, Parts, Selector
from geotoken_jax.predict.uncertainty import Calibration, fit

#: Cells of a photo that are written down, 2 KB of text.
_WRITTEN = 64


class Answerer:
    """Answers for batches of photos, with a decoder and the selectors that its settings name."""

    def __init__(self, decoder: Decoder, parts: Parts):
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
    ) -> tuple[list[dict[str, Any]], Places | None]:
        """Returns the answers of b photos as `answers` does, and where the model thinks they are; see Decoder.

        others: selectors of this batch alone, by name. exclude: see Pool.
        """
        pool = self.decoder(batch, rows, scores, numbers)._replace(exclude=exclude)
        chosen = {name: select(pool) for name, select in {**self._selectors, **others}.items()}
        return answers(pool, chosen, self.decoder.settings.choice), pool.places

    def of_vectors(
        self, index: Index, vectors: Float[np.ndarray, "b 3 C"], captured: Float[np.ndarray, " b"]
    ) -> tuple[list[dict[str, Any]], Places | None, Int[np.ndarray, "b M"], Float[np.ndarray, "b M"]]:
        """Returns what a call does, for photos of which only the three vectors are known and when they were taken (see
        data.join.context), and the rows and scores of their neighbors, which an index of the gallery finds."""
        rows, scores = find(index, index_vectors(vectors), self.decoder.neighbors)
        batch = {"query": vectors, **neighbors(self.decoder.gallery, rows, self.decoder.cells)}
        batch["context"] = context(captured, self.decoder.times)
        # The samples of a photo are the same whichever others come with it.
        return (*self(batch, rows, scores, np.zeros(len(rows), np.int64)), rows, scores)


def answers(pool: Pool, chosen: Mapping[str, Choice], choice: str) -> list[dict[str, Any]]:
    """Returns each photo's answer as JSON has it: latitude, longitude, choice, choices, candidates, cells.

    chosen: name of a selector -> its choices. Equal candidates are one, with their count; the greedy one comes first,
    the others by falling log-probability.
    """
    found = []
    for i, tokens in enumerate(pool.candidates.tokens):
        unique, first, inverse, counts = np.unique(
            tokens, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        log_p = pool.candidates.log_probability[i][first]
        order = np.lexsort((-log_p, first != 0))
        listed = [
            {
                **_place(pool.coordinates[i, first[j]]),
                "log_probability": round(float(log_p[j]), 5),
                "tempered_log_probability": round(float(pool.candidates.tempered_log_probability[i][first[j]]), 5),
                "count": int(counts[j]),
                "tokens": unique[j].tolist(),
            }
            for j in order
        ]
        place = np.argsort(order)[inverse.reshape(-1)]  # index in the pool -> index in the list
        choices = {
            name: int(place[index[i]]) if index.ndim == 1 else list(_place(index[i]).values())
            for name, index in chosen.items()
        }
        best = choices[choice]
        at = listed[best] if isinstance(best, int) else _place(chosen[choice][i])
        answer = {name: at[name] for name in ("latitude", "longitude")}
        answer |= {"choice": choice, "choices": choices, "candidates": listed}
        found.append(answer | ({"cells": _cells(pool.places, i)} if pool.places else {}))
    return found


def with_radii(answers: list[dict[str, Any]], places: Places | None, calibration: Calibration) -> list[dict[str, Any]]:
    """Returns answers with radius_km and within, where the model was searched."""
    if places is None:
        return answers
    sure = calibration.described(places, coordinates(answers))
    return [{**answer, **how_sure} for answer, how_sure in zip(answers, sure, strict=True)]


def calibrate(
    answered: Sequence[tuple[list[dict[str, Any]], Places | None]], truth: Float[np.ndarray, "n 2"]
) -> Calibration:
    """Returns what makes the radii of answers hold what they say. answered: of a whole split, in the truth's order."""
    places = jax.tree.map(lambda *parts: np.concatenate(parts), *(places for _, places in answered))
    return fit(places, np.concatenate([coordinates(answers) for answers, _ in answered]), truth)


def coordinates(answers: list[dict[str, Any]]) -> Float[np.ndarray, "b 2"]:
    """Returns where answers are, in degrees."""
    return np.array([(answer["latitude"], answer["longitude"]) for answer in answers]).reshape(-1, 2)


def _place(coordinates: np.ndarray) -> dict[str, float]:
    return {"latitude": round(float(coordinates[0]), 7), "longitude": round(float(coordinates[1]), 7)}


def _cells(places: Places, i: int) -> list[list[float]]:
    """Returns level, latitude, longitude and probability of each cell of a photo."""
    there = np.flatnonzero(places.probability[i] > 0)[:_WRITTEN]
    columns = (places.level[i][there].tolist(), *places.coordinates[i][there].T.round(5).tolist())
    return [list(row) for row in zip(*columns, places.probability[i][there].round(6).tolist(), strict=True)]
