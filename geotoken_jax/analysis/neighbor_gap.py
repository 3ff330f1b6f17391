"""Numbers that `geotoken audit neighbors` reports: neighbors of train photos compared with neighbors of new photos.

If train photos have better neighbors, the decoder learns to trust neighbors more than is right for new photos.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.coordinates import FARTHEST_KM, CoordinateTable, Method
from geotoken_jax.backbone import views
from geotoken_jax.configuration import EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance

#: Largest number of photos per split; of larger splits, a random sample is used. A bootstrap over 100,000 photos takes
#: seconds, a bootstrap over 4 million photos takes hours.
_PHOTOS = 100_000
#: Index of 25 km in THRESHOLDS_KM: the page and the printed verdicts compare the accuracy within it.
AT = distance.THRESHOLDS_KM.index(25)
#: Number of bins of the histograms of scores.
_SCORE_BINS = 30


@dataclasses.dataclass(frozen=True)
class NeighborSample:
    """Neighbors of n photos of a split, K per photo, most similar first.

    photos: number of photos of the whole split. km: distance of each neighbor from the photo, NaN for a missing
    neighbor. scores: inner products of index vectors, -inf for a missing neighbor. truth: coordinates and authors of
    the n photos. sources: sources of each photo and of its first neighbor, empty for a benchmark and for a missing
    neighbor; None if there is one source.
    """

    split: str
    photos: int
    km: Float[np.ndarray, "n K"]
    scores: Float[np.ndarray, "n K"]
    truth: CoordinateTable
    sources: Shaped[np.ndarray, "n 2"] | None = None

    @property
    def trained_on(self) -> bool:
        """Whether the decoder trains on this split."""
        return self.split in (views.SOURCE_SPLIT, views.VIEWS_SPLIT)


def figures(
    samples: Sequence[NeighborSample], neighbors: Mapping[str, Any], scoring: EvaluateSettings
) -> dict[str, Any]:
    """Returns the contents of figures.json.

    It has the accuracy of the neighbors of each split, and how much more accurate the first neighbors of train photos
    are than the first neighbors of each split that is not trained on (see `gaps`). neighbors: settings
    config.index.neighbors with which the neighbors were searched.
    """
    splits = {near.split: split_figures(near, scoring) for near in samples}
    return {
        "excluded": {name: neighbors[name] for name in ("exclude", "exclude_in_evaluation")},
        "neighbors": neighbors["count"],
        "splits": splits,
        "gaps": gaps(splits),
    }


def histograms(
    samples: Sequence[NeighborSample], rank: int
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "splits bins"]]:
    """Returns histograms of the scores of neighbors with one rank, e.g. of the first neighbors.

    The first array has the centers of the bins, the second array the share of photos per split and bin. Only photos
    with a neighbor of this rank are counted. Both arrays are empty if there is no such photo. rank: rank of the
    neighbors, from 0.
    """
    known = [near.scores[np.isfinite(near.scores[:, rank]), rank] for near in samples]
    scores = np.concatenate(known)
    if not len(scores):
        return np.empty(0), np.empty((len(samples), 0))
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1e-6, _SCORE_BINS + 1)
    shares = [np.histogram(of, edges)[0] / max(len(of), 1) for of in known]
    return (edges[1:] + edges[:-1]) / 2, np.stack(shares)


def table(figures: Mapping[str, Any]) -> str:
    """Returns a text table of the neighbors' accuracy, and a verdict per split that is not trained on.

    The table has the percentages of photos whose first neighbor, and of photos whose nearest neighbor, is within each
    of THRESHOLDS_KM.
    """
    columns = [f"{km:,} km" for km in distance.THRESHOLDS_KM]
    width = 1 + max(map(len, figures["splits"]), default=0)
    lines = [f"{'':{width + 24}}{'photos':>8}" + "".join(f"{column:>10}" for column in columns)]
    for split, of in figures["splits"].items():
        for method in of["methods"]:
            within = "".join(f"{100 * a['value']:10.1f}" for a in method["accuracy"])
            lines.append(f"{split:{width}}{method['name']:24}{of['photos']:8,}{within}")
    for split, of in figures["splits"].items():
        for pair in of.get("by_source", ()):
            names = f"{pair['photo'] or 'benchmark'}, neighbor {pair['neighbor'] or 'missing'}"
            within = "".join(f"{100 * pair['within'][str(km)]:10.1f}" for km in distance.THRESHOLDS_KM)
            lines.append(f"{split:{width}}{names:24}{pair['photos']:8,}{within}")
    return "\n".join([*lines, "", *(verdict(gap) for gap in figures["gaps"])])


def sample(
    split: str, table: Table, gallery: Table, rows_and_scores: tuple[np.ndarray, np.ndarray], seed: int
) -> NeighborSample:
    """Returns the neighbors of all photos of a split, or of 100,000 random photos if the split has more.

    table: table of the split. rows_and_scores: gallery rows and scores of the neighbors of all photos, from neighbors/.
    seed: seed of the random choice.
    """
    n, rows = len(table), np.arange(len(table))
    if n > _PHOTOS:
        rows = np.sort(np.random.default_rng(seed).choice(n, _PHOTOS, replace=False))
    neighbors, scores = (values[rows] for values in rows_and_scores)
    coordinates = table.coordinates(rows)
    theirs = gallery.coordinates(np.maximum(neighbors, 0))
    km = np.asarray(distance.great_circle_km(*np.moveaxis(coordinates, -1, 0)[..., None], *np.moveaxis(theirs, -1, 0)))
    ids, authors = ([name.decode() for name in column(rows).tolist()] for column in (table.ids, table.authors))
    extra: list[dict[str, Any]] = [{"author": author} for author in authors]
    truth = CoordinateTable(split, ids, coordinates, np.zeros((len(rows), 0, 2)), False, extra)
    sources = None
    if "sources" in gallery.stored:
        first = neighbors[:, 0]
        of_first = np.where(first < 0, b"", gallery.sources(np.maximum(first, 0)))
        sources = np.stack([table.sources(rows), of_first], 1)
    return NeighborSample(split, n, np.where(neighbors < 0, np.nan, km), scores, truth, sources)


def split_figures(near: NeighborSample, scoring: EvaluateSettings) -> dict[str, Any]:
    """Returns the entry of one split in figures.json.

    The entry has the accuracy of the most similar neighbor (Top-1) and of the neighbor closest to the true place (Best
    of K), how many neighbors are missing, quantiles of the best scores, and per rank the share of photos whose neighbor
    of this rank is within each of THRESHOLDS_KM. If there are several sources, `by_source` has the share of photos
    whose first neighbor is within each threshold, per source of the photo and source of this neighbor.
    """
    count = near.km.shape[1]
    off = np.nan_to_num(near.km, nan=FARTHEST_KM)
    kinds = {"Top-1": (off[:, 0], False), f"Best of {count}": (off.min(axis=1), True)}
    methods = [
        Method(name, "", name, not bound, True, bound, near.truth.coordinates, km)
        for name, (km, bound) in kinds.items()
    ]
    scored = evaluate.score(methods, near.truth, "", scoring.resamples, scoring.seed)
    missing = np.isnan(near.km)
    by_rank = [[_share(off[:, rank] <= km) for km in distance.THRESHOLDS_KM] for rank in range(count)]
    quantiles = np.quantile(near.scores[~missing[:, 0], 0], (0.05, 0.25, 0.5, 0.75, 0.95)) if not missing.all() else []
    return {
        "trained_on": near.trained_on,
        "photos": len(off),
        "of": near.photos,
        "authors": scored["authors"],
        "methods": scored["methods"],
        "missing": {"neighbors": _share(missing), "photos_with_fewer": int(missing.any(axis=1).sum()),
                    "photos_with_none": int(missing.all(axis=1).sum())},
        "by_rank": [dict(zip(map(str, distance.THRESHOLDS_KM), shares, strict=True)) for shares in by_rank],
        "top1_score_quantiles": [round(float(q), 6) for q in quantiles],
        **({} if near.sources is None else {"by_source": _by_source(near.sources, off[:, 0])}),
    }  # fmt: skip


def _by_source(sources: Shaped[np.ndarray, "n 2"], km: Float[np.ndarray, "n"]) -> list[dict[str, Any]]:
    """Returns one entry per pair of sources. sources: see NeighborSample. km: distance of each first neighbor."""
    entries = []
    for photo, neighbor in np.unique(sources, axis=0).tolist():
        of_pair = km[(sources == [photo, neighbor]).all(1)]
        within = {str(limit): _share(of_pair <= limit) for limit in distance.THRESHOLDS_KM}
        names = {"photo": photo.decode(), "neighbor": neighbor.decode()}
        entries.append({**names, "photos": len(of_pair), "within": within})
    return entries


def _share(hits: np.ndarray) -> float:
    return round(float(hits.mean()), 6)


def gaps(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one gap per split that is not trained on. The result is empty if there is no train split.

    A gap is the accuracy of the first neighbor on train photos, minus the accuracy of the first neighbor on the split.
    The interval of the gap is computed from the intervals of the two terms, as if they were independent (Zou and Donner
    2008). They are if the split shares no author with the train photos. Only a benchmark can share authors with them.

    splits: results of `split_figures`, by split.
    """
    if views.SOURCE_SPLIT not in splits:
        return []
    train = splits[views.SOURCE_SPLIT]["methods"][0]["accuracy"]
    differences = []
    for split, of in splits.items():
        if of["trained_on"]:
            continue
        accuracy = []
        for a, b in zip(train, of["methods"][0]["accuracy"], strict=True):
            value = a["value"] - b["value"]
            low = value - math.hypot(a["value"] - a["low"], b["high"] - b["value"])
            high = value + math.hypot(a["high"] - a["value"], b["value"] - b["low"])
            accuracy.append(
                {"km": a["km"], **{k: round(v, 6) for k, v in (("value", value), ("low", low), ("high", high))}}
            )
        differences.append({"split": split, "accuracy": accuracy})
    return differences


def verdict(gap: Mapping[str, Any]) -> str:
    """Returns one sentence that compares the neighbors of train photos with the neighbors of one split."""
    at = gap["accuracy"][AT]
    value, low, high = (100 * at[name] for name in ("value", "low", "high"))
    interval = f"{value:+.1f} points within {at['km']} km, 95 % interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        return (
            f"{gap['split']}: the first neighbors of train photos are BETTER ({interval}), so the decoder learns to "
            "trust neighbors more than is right for these photos."
        )
    if high < 0:
        return f"{gap['split']}: the first neighbors of train photos are worse ({interval})."
    return f"{gap['split']}: the first neighbors of train photos are as good ({interval})."
