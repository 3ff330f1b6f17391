"""Computes scores of predictions and their 95 % intervals, by a bootstrap over authors.

Photos of one author are not independent, so authors are resampled, not photos.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from geotoken_jax.geo import distance


def outcomes(km: Float[np.ndarray, "n"], strict: bool) -> Float[np.ndarray, "n 7"]:
    """Returns seven scores per photo: hit (1) or miss (0) at each of five thresholds, GeoScore and distance in km.

    km: distance between predicted and true coordinates per photo. strict: whether a hit must be below the threshold
    (<) instead of at most the threshold (<=).
    """
    hits = distance.within(km[:, None], strict)
    return np.concatenate([hits, distance.geoscore(km)[:, None], km[:, None]], axis=1, dtype=np.float64)


def clusters(authors: Sequence[str], ids: Sequence[str]) -> Int[np.ndarray, "n"]:
    """Returns an index per photo, the same for photos by the same author.

    A photo without an author (an empty text) has an index of its own.
    """
    names = [author or f"\0{name}" for author, name in zip(authors, ids, strict=True)]
    return np.unique(names, return_inverse=True)[1]


def resample(
    outcomes: Float[np.ndarray, "n methods x"], clusters: Int[np.ndarray, "n"], resamples: int, seed: int
) -> Float[np.ndarray, "R methods x"]:
    """Returns the mean outcomes of R resamples. A resample draws authors with replacement, each with all of its photos.

    outcomes: x scores per photo and method. clusters: index of each photo's author, from `clusters`. resamples: R.
    """
    n, *shape = outcomes.shape
    count = clusters.max() + 1
    sums = np.zeros((count, math.prod(shape) + 1))
    np.add.at(sums, clusters, np.concatenate([outcomes.reshape(n, -1), np.ones((n, 1))], axis=1))
    rng = np.random.default_rng(seed)
    totals = np.empty((resamples, sums.shape[1]))
    for start in range(0, resamples, 100):  # 100 resamples of 26,000 authors need 21 MB; all 2,000 would need 420 MB
        stop = min(start + 100, resamples)
        drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(start, stop)]
        totals[start:stop] = np.stack(drawn).astype(np.float64) @ sums
    return (totals[:, :-1] / totals[:, -1:]).reshape(resamples, *shape)


def estimates(value: Float[np.ndarray, "7"], samples: Float[np.ndarray, "R 7"], p: bool = False) -> dict[str, Any]:
    """Returns each of the seven scores of `outcomes` with its 95 % interval.

    value: the scores, averaged over photos, or differences of such averages between two methods. samples: the same per
    resample (see `resample`). p: whether to add two-sided p-values for the hypothesis that a score is 0.
    """
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    tail = 1 + np.minimum((samples <= 0).sum(axis=0), (samples >= 0).sum(axis=0))
    p_value = np.minimum(1.0, 2 * tail / (len(samples) + 1))
    each = [
        {"value": rounded(value[i]), "low": rounded(low[i]), "high": rounded(high[i])}
        | ({"p": rounded(p_value[i])} if p else {})
        for i in range(len(value))
    ]
    accuracy = [{"km": km, **each[i]} for i, km in enumerate(distance.THRESHOLDS_KM)]
    return {"accuracy": accuracy, "geoscore": each[-2], "mean_km": each[-1]}


def rounded(value: Any) -> float:
    """Returns a number rounded to 6 decimals. Further decimals depend on the order in which sums are computed, so that
    files with equal results would differ."""
    return round(float(value), 6)
