"""The page of `geotoken audit neighbors`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats, neighbor_gap
from geotoken_jax.analysis.neighbor_gap import AT, Near
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Group, Row, Table, interval, points


def page(figures: Mapping[str, Any], found: Sequence[Near], source: frame.Source) -> str:
    """Returns the page. found: the neighbors whose scores are drawn, in the order of the figures."""
    tiles = []
    for split, of in figures["splits"].items():
        at = of["methods"][0]["accuracy"][AT]
        trained = "trained on" if of["trained_on"] else "not trained on"
        note = f"{100 * at['low']:.1f} to {100 * at['high']:.1f}; {trained}"
        tiles.append((f"{split}: top-1 within {at['km']} km", formats.percent(at["value"]), note))
    verdicts = (frame.verdict(neighbor_gap.verdict(gap), gap["accuracy"][AT]["low"] > 0) for gap in figures["gaps"])
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
        f"better than a new photo's, it learns to trust them too much.</p>{''.join(verdicts)}{cure}{frame.tiles(tiles)}"
    )
    sections = [
        Section("quality", "Quality", "How good the neighbors are", _quality(figures)),
        Section("ranks", "Ranks", "By rank", _ranks(figures)),
        Section("scores", "Scores", "How alike they are", _scores(figures, found)),
    ]
    return frame.audit_page("Neighbors of train photos and of new ones", headline, sections, source)


def _quality(figures: Mapping[str, Any]) -> list[Piece | str]:
    groups = []
    for split, of in figures["splits"].items():
        rows = [Row(m["name"], [*map(interval, m["accuracy"]), f"{m['median_km']:,.1f}"]) for m in of["methods"]]
        note = f"{of['photos']:,} photos" + (f" of {of['of']:,}" if of["photos"] < of["of"] else "")
        missing = of["missing"]
        note += f", {missing['photos_with_fewer']:,} with fewer than {figures['neighbors']} neighbors"
        groups.append(Group(rows, split, f"{note}, {missing['photos_with_none']:,} with none"))
    gaps = [Row(f"train against {gap['split']}", [*map(points, gap["accuracy"])]) for gap in figures["gaps"]]
    rules = {name: _rules(of) for name, of in figures["excluded"].items()}
    return [
        "<p>Percent of photos whose first neighbor, or whose best of all, is within a distance. Left out of them were, "
        f"for photos that are trained on, {rules['exclude']}; for the others, {rules['exclude_in_evaluation']}.</p>",
        Table(["Neighbor", *THRESHOLDS, "median km"], groups),
        "<h3>The gap</h3><p>Points by which the first neighbors of train photos are better (+) or worse (&minus;). "
        "Color marks those whose 95 % interval excludes zero.</p>",
        Table(["First neighbor", *THRESHOLDS], [Group(gaps)]),
    ]


def _rules(exclude: Mapping[str, Any]) -> str:
    rules = ["the photo itself"]
    rules += ["all photos of its author"] if exclude["author"] else []
    rules += [f"photos with a cosine above {exclude['cosine_above']:g}"] if exclude["cosine_above"] < 1 else []
    rules += [f"photos within {exclude['within_km']:g} km"] if exclude["within_km"] > 0 else []
    return " and ".join(rules)


def _ranks(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = []
    for km in distance.THRESHOLDS_KM[1:]:
        curves = [np.array([100 * shares[str(km)] for shares in of["by_rank"]]) for of in figures["splits"].values()]
        title = f"Percent of neighbors within {km:,} km, by rank, one curve a split"
        series = _series(figures, curves, np.arange(1, len(curves[0]) + 1))
        charts.append(Chart(f"within {km:,} km", title, "rank of the neighbor", "percent of photos", series))
    return [
        "<p>Percent of photos whose neighbor of each rank is within a distance; a missing neighbor is not. Solid: "
        "trained on.</p>",
        Panels(charts),
    ]


def _scores(figures: Mapping[str, Any], found: Sequence[Near]) -> list[Piece | str]:
    charts = []
    for name, rank in (("First neighbor", 0), ("Last neighbor", figures["neighbors"] - 1)):
        scores, shares = neighbor_gap.histograms(found, rank)
        if len(scores):
            title = f"Percent of the photos of each split by the score of their {name.lower()}"
            charts.append(Chart(name, title, "score", "percent of photos", _series(figures, 100 * shares, scores)))
    return [
        "<p>Scores are inner products of index vectors, 3 at most. Where train photos score higher than new ones, "
        "the index knows them.</p>",
        Panels(charts),
    ]


def _series(figures: Mapping[str, Any], curves: Any, x: np.ndarray) -> list[Series]:
    """Returns a curve per split; solid if it is trained on."""
    return [
        Series(split, i, y, x, style="solid" if of["trained_on"] else "dashed")
        for i, ((split, of), y) in enumerate(zip(figures["splits"].items(), curves, strict=True))
    ]
