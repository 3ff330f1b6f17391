"""Page of `geotoken audit neighbors`: neighbors of train photos compared with neighbors of new photos."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats, neighbor_gap
from geotoken_jax.analysis.neighbor_gap import AT, NeighborSample
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Group, Row, Table, interval, points


def page(figures: Mapping[str, Any], samples: Sequence[NeighborSample], source: frame.Source) -> str:
    """Returns the page as HTML.

    figures: result of `neighbor_gap.figures`. samples: photos with their neighbors from which `figures` was computed.
    """
    tiles = []
    for split, of in figures["splits"].items():
        at = of["methods"][0]["accuracy"][AT]
        trained = "trained on" if of["trained_on"] else "not trained on"
        note = f"{100 * at['low']:.1f} to {100 * at['high']:.1f}; {trained}"
        tiles.append((f"{split}: first neighbor within {at['km']} km", formats.percent(at["value"]), note))
    verdicts = (frame.verdict(neighbor_gap.verdict(gap), gap["accuracy"][AT]["low"] > 0) for gap in figures["gaps"])
    advice = (
        "<p>If train photos have better neighbors than a split of the same kind, such as validation, exclude gallery "
        "photos that a new photo would not have as neighbors, then run index and train again: other photos of the "
        "author (<code>config.index.neighbors.exclude.author = True</code>), near-duplicates "
        "(<code>config.index.neighbors.exclude.cosine_above = 0.95</code>), or photos taken nearby "
        "(<code>config.index.neighbors.exclude.within_km = 0.1</code>). Views of train photos "
        "(<code>config.embed.views.count = 2</code>) prevent the alignment from memorizing them. A gap only on a split "
        "with other places or other kinds of pictures means that this split is harder, not that training is wrong.</p>"
    )
    headline = (
        "<p>The decoder learns from the neighbors of train photos how much it can trust neighbors. If the neighbors of "
        "train photos are better than the neighbors of new photos, the decoder learns to trust neighbors too much.</p>"
        f"{''.join(verdicts)}{advice}{frame.tiles(tiles)}"
    )
    sections = [
        Section("quality", "Quality", "Distance of the neighbors from the photos", _quality(figures)),
        Section("ranks", "Ranks", "Distance by rank of the neighbor", _ranks(figures)),
        Section("scores", "Scores", "Similarity scores of the neighbors", _scores(figures, samples)),
    ]
    if any("by_source" in of for of in figures["splits"].values()):
        sections.append(Section("sources", "Sources", "First neighbors by source", _sources(figures)))
    return frame.audit_page("Neighbors of train photos and of new photos", headline, sections, source)


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
        "<p>Percent of photos whose first neighbor (Top-1), or whose nearest neighbor of all (Best), is within a "
        "distance. Gallery photos that cannot be neighbors: for photos that the decoder is trained on, "
        f"{rules['exclude']}; for the others, {rules['exclude_in_evaluation']}.</p>",
        Table(["Neighbor", *THRESHOLDS, "median km"], groups),
        "<h3>Gap between train photos and other splits</h3><p>Percentage points by which the first neighbors of train "
        "photos are better (+) or worse (&minus;). A gap whose 95 % interval excludes zero is green or red.</p>",
        Table(["First neighbor", *THRESHOLDS], [Group(gaps)]),
    ]


def _rules(exclude: Mapping[str, Any]) -> str:
    """Describes the gallery photos that cannot be neighbors. exclude: a section of config.index.neighbors."""
    rules = ["the photo itself"]
    rules += ["all photos of its author"] if exclude["author"] else []
    rules += [f"photos with a cosine above {exclude['cosine_above']:g}"] if exclude["cosine_above"] < 1 else []
    rules += [f"photos within {exclude['within_km']:g} km"] if exclude["within_km"] > 0 else []
    rules += [f"photos of the source {exclude['source']}"] if exclude.get("source") else []
    return " and ".join(rules)


def _sources(figures: Mapping[str, Any]) -> list[Piece | str]:
    groups = []
    for split, of in figures["splits"].items():
        rows = [
            Row(
                f"{pair['photo'] or 'benchmark'}, neighbor from {pair['neighbor'] or 'none: it is missing'}",
                [f"{pair['photos']:,}", *(formats.percent(pair["within"][str(km)]) for km in distance.THRESHOLDS_KM)],
            )
            for pair in of["by_source"]
        ]
        groups.append(Group(rows, split))
    return [
        "<p>Percent of photos whose first neighbor is within a distance, per source of the photo and source of its "
        "first neighbor.</p>",
        Table(["Source", "Photos", *THRESHOLDS], groups),
    ]


def _ranks(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = []
    for km in distance.THRESHOLDS_KM[1:]:
        curves = [np.array([100 * shares[str(km)] for shares in of["by_rank"]]) for of in figures["splits"].values()]
        title = f"Percent of neighbors within {km:,} km, by rank, one curve per split"
        series = _series(figures, curves, np.arange(1, len(curves[0]) + 1))
        charts.append(Chart(f"within {km:,} km", title, "rank of the neighbor", "percent of photos", series))
    return [
        "<p>Percent of photos whose neighbor of a rank is within a distance; rank 1 is the most similar neighbor. A "
        "missing neighbor counts as not within. The decoder is trained on splits with a solid curve.</p>",
        Panels(charts),
    ]


def _scores(figures: Mapping[str, Any], samples: Sequence[NeighborSample]) -> list[Piece | str]:
    charts = []
    for name, rank in (("First neighbor", 0), ("Last neighbor", figures["neighbors"] - 1)):
        scores, shares = neighbor_gap.histograms(samples, rank)
        if len(scores):
            title = f"Percent of the photos of each split by the score of their {name.lower()}"
            charts.append(Chart(name, title, "score", "percent of photos", _series(figures, 100 * shares, scores)))
    return [
        "<p>Scores are inner products of index vectors, at most 3. Higher scores of train photos than of new photos "
        "mean that the index vectors fit train photos too well.</p>",
        Panels(charts),
    ]


def _series(figures: Mapping[str, Any], curves: Any, x: np.ndarray) -> list[Series]:
    """Returns a curve per split. It is solid if the decoder is trained on the split, else dashed."""
    return [
        Series(split, i, y, x, style="solid" if of["trained_on"] else "dashed")
        for i, ((split, of), y) in enumerate(zip(figures["splits"].items(), curves, strict=True))
    ]
