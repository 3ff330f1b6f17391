"""`geotoken audit neighbors`: whether the neighbors that the decoder trains on are better than those of new photos."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax.analysis import audit, charts, evaluate, frame
from geotoken_jax.analysis.evaluate import Method, Points
from geotoken_jax.artifacts import Workdir
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.geo import distance

#: Photos of a split that are looked at, drawn by chance: a bootstrap of 100,000 takes seconds, one of 4 million hours.
_PHOTOS = 100_000
#: Threshold of the charts and of the verdict.
_AT = distance.THRESHOLDS_KM.index(25)
#: Bins of the chart of scores.
_SCORES = 30


@dataclasses.dataclass(frozen=True)
class Near:
    """The neighbors of some photos of a split, best first.

    km: of each from the photo, NaN where there is none. scores: -inf there. truth: the photos themselves.
    """

    split: str
    photos: int
    km: Float[np.ndarray, "n K"]
    scores: Float[np.ndarray, "n K"]
    truth: Points

    @property
    def trained_on(self) -> bool:
        """Says whether the decoder trains on this split."""
        return self.split in (views.OF, views.SPLIT)


def make(config: Config, workdir: Workdir, folder: epath.Path) -> audit.Made:
    """Returns what audit/neighbors/ holds."""
    del folder
    scoring, manifest = config.evaluate, workdir.manifest("neighbors")
    # What is trained on comes first, then what evaluation is used to show first.
    order = sorted(
        manifest.counts, key=lambda split: (split not in (views.OF, views.SPLIT), split != "validation", split)
    )
    found = [_read(workdir, split, scoring.seed) for split in order]
    splits = {near.split: _figures(near, scoring) for near in found}
    options = manifest.settings["index"]["neighbors"]
    figures = {
        "excluded": {name: options[name] for name in ("exclude", "exclude_in_evaluation")},
        "neighbors": options["count"],
        "splits": splits,
        "gaps": _gaps(splits),
    }
    html = _page(figures, found)
    counts = {near.split: len(near.km) for near in found}
    return audit.Made("Neighbors of train photos and of new ones", *html, figures, counts)


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures that matter most, as text."""
    columns = [f"{km:,} km" for km in distance.THRESHOLDS_KM]
    lines = [f"{'':40}{'photos':>8}" + "".join(f"{column:>10}" for column in columns)]
    for split, of in figures["splits"].items():
        for method in of["methods"]:
            within = "".join(f"{100 * a['value']:10.1f}" for a in method["accuracy"])
            lines.append(f"{split[:15]:16}{method['name'][:23]:24}{of['photos']:8,}{within}")
    return "\n".join([*lines, "", *(_plain(gap) for gap in figures["gaps"])])


def _read(workdir: Workdir, split: str, seed: int) -> Near:
    """Returns the neighbors of a split's photos, or of _PHOTOS of them."""
    own, gallery = workdir.table(split), workdir.gallery
    n, rows = len(own), np.arange(len(own))
    if n > _PHOTOS:
        rows = np.sort(np.random.default_rng(seed).choice(n, _PHOTOS, replace=False))
    near, scores = (values[rows] for values in workdir.neighbors(split))
    coordinates = own.coordinates(rows)
    there = gallery.coordinates(np.maximum(near, 0))
    km = np.asarray(distance.great_circle_km(*np.moveaxis(coordinates, -1, 0)[..., None], *np.moveaxis(there, -1, 0)))
    ids, authors = ([name.decode() for name in column(rows).tolist()] for column in (own.ids, own.authors))
    extra: list[dict[str, Any]] = [{"author": author} for author in authors]
    truth = Points(split, ids, coordinates, np.zeros((len(rows), 0, 2)), False, extra)
    return Near(split, n, np.where(near < 0, np.nan, km), scores, truth)


def _figures(near: Near, scoring: EvaluateSettings) -> dict[str, Any]:
    """Scores the first neighbor and the best of all, counts the missing, and follows accuracy over ranks."""
    count = near.km.shape[1]
    off = np.nan_to_num(near.km, nan=evaluate.FARTHEST_KM)
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
    }  # fmt: skip


def _share(hits: np.ndarray) -> float:
    return round(float(hits.mean()), 6)


def _gaps(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares the first neighbor of train photos with that of each split that is not trained on.

    The splits share no author, so the interval of the difference comes from those of its terms (Zou and Donner 2008).
    """
    if views.OF not in splits:
        return []
    train = splits[views.OF]["methods"][0]["accuracy"]
    gaps = []
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
        gaps.append({"split": split, "accuracy": accuracy})
    return gaps


def _plain(gap: Mapping[str, Any]) -> str:
    """Returns the verdict on one split, in one sentence."""
    at = gap["accuracy"][_AT]
    value, low, high = (100 * at[name] for name in ("value", "low", "high"))
    interval = f"{value:+.1f} points within {at['km']} km, 95 % interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        return (
            f"{gap['split']}: the first neighbors of train photos are BETTER ({interval}), so the decoder learns to "
            "trust neighbors more than it can on such photos."
        )
    if high < 0:
        return f"{gap['split']}: the first neighbors of train photos are worse ({interval})."
    return f"{gap['split']}: the first neighbors of train photos are as good ({interval})."


def _page(figures: Mapping[str, Any], found: Sequence[Near]) -> tuple[str, list[frame.Section]]:
    tiles = []
    for split, of in figures["splits"].items():
        at = of["methods"][0]["accuracy"][_AT]
        note = (
            f"{100 * at['low']:.1f} to {100 * at['high']:.1f}; {'trained on' if of['trained_on'] else 'not trained on'}"
        )
        tiles.append((f"{split}: top-1 within {at['km']} km", frame.percent(at["value"]), note))
    verdicts = "".join(
        f'<p class="verdict{" warn" if gap["accuracy"][_AT]["low"] > 0 else ""}">{escape(_plain(gap))}</p>'
        for gap in figures["gaps"]
    )
    cure = (
        "<p>Where they are better on a split that is drawn as the train photos are, such as validation, exclude what "
        "a new photo would not find, and index and train again: its author's other photos "
        "(<code>config.index.neighbors.exclude.author</code>), near-duplicates (<code>exclude.cosine_above</code>), "
        "or what was taken next to it (<code>exclude.within_km</code>); views of train photos "
        "(<code>config.embed.views.count</code>) keep the alignment from knowing them by heart. A gap on a split of "
        "other places or other pictures alone says that it is harder, not that training is wrong.</p>"
    )
    headline = (
        "<p>The decoder learns how far to trust a photo's neighbors from the neighbors of train photos. If these are "
        f"better than a new photo's, it learns to trust them too much.</p>{verdicts}{cure}{frame.tiles(tiles)}"
    )
    return headline, [
        frame.Section("quality", "Quality", "How good the neighbors are", _quality_html(figures)),
        frame.Section("ranks", "Ranks", "By rank", _ranks_html(figures)),
        frame.Section("scores", "Scores", "How alike they are", _scores_html(figures, found)),
    ]


def _quality_html(figures: Mapping[str, Any]) -> str:
    columns = ["Neighbor", *frame.thresholds(), "median km"]
    bodies = []
    for split, of in figures["splits"].items():
        rows = [
            frame.row(m["name"], [*map(frame.percents, m["accuracy"]), f"<td>{m['median_km']:,.1f}</td>"])
            for m in of["methods"]
        ]
        note = f"{of['photos']:,} photos" + (f" of {of['of']:,}" if of["photos"] < of["of"] else "")
        missing = of["missing"]
        note += f", {missing['photos_with_fewer']:,} with fewer than {figures['neighbors']} neighbors"
        note += f", {missing['photos_with_none']:,} with none"
        bodies.append(frame.body(len(columns), rows, split, note))
    gaps = [frame.row(f"train against {gap['split']}", map(frame.points, gap["accuracy"])) for gap in figures["gaps"]]
    rules = {name: _rules(of) for name, of in figures["excluded"].items()}
    return (
        "<p>Percent of photos whose first neighbor, or whose best of all, is within a distance. Left out of them were, "
        f"for photos that are trained on, {rules['exclude']}; for the others, {rules['exclude_in_evaluation']}.</p>"
        + frame.table(columns, bodies)
        + "<h3>The gap</h3><p>Points by which the first neighbors of train photos are better (+) or worse (&minus;). "
        "Color marks those whose 95 % interval excludes zero.</p>"
        + frame.table(["First neighbor", *frame.thresholds()], [frame.body(6, gaps)])
    )


def _rules(exclude: Mapping[str, Any]) -> str:
    rules = ["the photo itself"]
    rules += ["all photos of its author"] if exclude["author"] else []
    rules += [f"photos with a cosine above {exclude['cosine_above']:g}"] if exclude["cosine_above"] < 1 else []
    rules += [f"photos within {exclude['within_km']:g} km"] if exclude["within_km"] > 0 else []
    return " and ".join(rules)


def _ranks_html(figures: Mapping[str, Any]) -> str:
    names = list(figures["splits"])
    panels = []
    for km in distance.THRESHOLDS_KM[1:]:
        series = []
        for i, of in enumerate(figures["splits"].values()):
            y = np.array([100 * shares[str(km)] for shares in of["by_rank"]])
            look = "solid" if of["trained_on"] else "dashed"
            series.append(charts.Series(names[i], i, look, np.arange(1, len(y) + 1), y))
        title = f"Percent of neighbors within {km:,} km, by rank, one curve a split"
        drawn = charts.chart(series, title=title, x_label="rank of the neighbor", y_label="percent of photos")
        panels.append(frame.figure(f"within {km:,} km", drawn))
    return (
        "<p>Percent of photos whose neighbor of each rank is within a distance; a missing neighbor is not. Solid: "
        f'trained on.</p>{_legend(figures)}<div class="charts">{"".join(panels)}</div>'
    )


def _scores_html(figures: Mapping[str, Any], found: Sequence[Near]) -> str:
    panels = []
    for name, rank in (("First neighbor", 0), ("Last neighbor", figures["neighbors"] - 1)):
        known = [near.scores[np.isfinite(near.scores[:, rank]), rank] for near in found]
        everything = np.concatenate(known)
        if not len(everything):
            continue
        edges = np.linspace(*_range(everything), _SCORES + 1)
        series = [
            charts.Series(
                near.split,
                i,
                "solid" if near.trained_on else "dashed",
                (edges[1:] + edges[:-1]) / 2,
                100 * _histogram(scores, edges),
            )
            for i, (near, scores) in enumerate(zip(found, known, strict=True))
        ]
        title = f"Percent of the photos of each split by the score of their {name.lower()}"
        drawn = charts.chart(series, title=title, x_label="score", y_label="percent of photos")
        panels.append(frame.figure(name, drawn))
    return (
        "<p>Scores are inner products of index vectors, 3 at most. Where train photos score higher than new ones, "
        f'the index knows them.</p>{_legend(figures)}<div class="charts">{"".join(panels)}</div>'
    )


def _range(scores: Float[np.ndarray, "n"]) -> tuple[float, float]:
    low, high = float(scores.min()), float(scores.max())
    return low, high if high > low else low + 1e-6


def _histogram(scores: Float[np.ndarray, "n"], edges: Float[np.ndarray, "bins"]) -> Float[np.ndarray, "bins"]:
    return np.histogram(scores, edges)[0] / max(len(scores), 1)


def _legend(figures: Mapping[str, Any]) -> str:
    return frame.legend(
        (split, i, "solid" if of["trained_on"] else "dashed") for i, (split, of) in enumerate(figures["splits"].items())
    )
