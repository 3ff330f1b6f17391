"""Page of `geotoken audit levels`: accuracy, calibration and errors of the decoder at every S2 level."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats, per_level
from geotoken_jax.analysis.per_level import BINS, CAUSES
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Key, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval, points

#: A level has a calibration chart if the confidence of its most confident bin is at least this multiple of the uniform
#: probability. At other levels, the points are too close together for a curve.
_SPREAD = 2


def page(figures: Mapping[str, Any], source: frame.Source) -> str:
    """Returns the page as HTML. figures: result of `per_level.figures`."""
    tiles = []
    for split, of in figures["splits"].items():
        at = of["levels"][of["bottleneck"]]
        note = f"{formats.percent(at['lost']['value'])} of the GeoScore lost" if at["lost"] else "no GeoScore is lost"
        tiles.append((f"{split}: bottleneck", f"level {figures['levels'][of['bottleneck']]['level']:g}", note))
    verdicts = "".join(frame.verdict(per_level.bottleneck_sentence(figures, split)) for split in figures["splits"])
    headline = (
        f"<p>Each token of an answer selects a smaller cell. This page shows for every token of "
        f"<b>{escape(figures['name'])}</b> how accurate it is if all tokens before it are right, how often greedy "
        "decoding first leaves the right cell there, and how much GeoScore is lost: 5,000 points per photo minus the "
        f"score of its answer.</p>{verdicts}{frame.tiles(tiles)}"
    )
    sections = [
        Section("forced", "Each level alone", "Accuracy of each level alone", _forced(figures)),
        Section("calibration", "Calibration", "Calibration of the token probabilities", _calibration(figures)),
        Section("free", "Greedy decoding", "Accuracy of greedy decoding", _free(figures)),
        Section("first", "First mistake", "Level at which answers first leave the right cell", _first(figures)),
        Section("neighbors", "Neighbors", "Neighbors of photos that leave the right cell", _neighbors(figures)),
    ]
    return frame.audit_page("Accuracy by S2 level", headline, sections, source)


def _forced(figures: Mapping[str, Any]) -> list[Piece | str]:
    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        loss, entropy = (interval(at[name], ".3f", 1) for name in ("loss", "entropy"))
        return [
            f"{figures['levels'][t]['choices']}",
            interval(at["accuracy"]),
            loss,
            interval(at["of_uniform"]),
            entropy,
        ]

    return [
        "<p>Teacher-forced: every token is predicted from the true tokens before it. The loss is minus the logarithm "
        "of the probability of the true token. A loss of 100 % of a uniform guess means that the model has learned no "
        "more than the number of cells. The entropy is the loss that the model itself expects. If the loss is larger, "
        "the model is overconfident.</p>",
        Panels(
            [
                _curves(figures, "Accuracy", "accuracy", "percent of photos", 100),
                _curves(figures, "Loss, relative to a uniform guess", "of_uniform", "percent", 100),
                _curves(figures, "Loss", "loss", "nats"),
                _curves(figures, "Entropy", "entropy", "nats"),
            ]
        ),
        _table(figures, ["Values", "Accuracy", "Loss, nats", "Loss, percent of uniform", "Entropy, nats"], cells),
    ]


def _calibration(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = []
    for t, of_level in enumerate(figures["levels"]):
        largest = max(of["levels"][t]["reliability"][-1]["confidence"] for of in figures["splits"].values())
        if largest * of_level["choices"] < _SPREAD:
            continue
        series = []
        for color, (split, of) in enumerate(figures["splits"].items()):
            x, y = ([100 * b[name] for b in of["levels"][t]["reliability"]] for name in ("confidence", "accuracy"))
            series.append(Series(split, color, np.array(y), np.array(x)))
        name = f"Level {of_level['level']:g}"
        title = f"{name}: percent right by confidence, one curve per split; dotted line: both are equal"
        series.append(Series("confidence equals accuracy", 7, np.array([0, 100]), np.array([0, 100]), style="dotted"))
        charts.append(Chart(name, title, "confidence, percent", "percent right", series))

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        error = f"{100 * at['calibration_error']['value']:.1f}"
        return [interval(at["accuracy"]), points(at["overconfidence"], colored=False), error]

    return [
        "<p>Teacher-forced: percent of photos whose most probable token is right, by the probability of that token "
        f"(its confidence), in {BINS} bins per split with equally many photos. Overconfidence is mean confidence minus "
        "accuracy. The calibration error is the mean distance of the bins from the dotted line; random variation alone "
        f"keeps it above zero. Levels without a bin of at least {_SPREAD} times the uniform probability have no "
        "chart.</p>",
        Panels(charts),
        _table(figures, ["Accuracy", "Overconfidence, points", "Calibration error, points"], cells),
    ]


def _free(figures: Mapping[str, Any]) -> list[Piece | str]:
    kinds = {
        "accuracy_so_far": ("accuracy of greedy answers that are right so far", 2, "dashed"),
        "accuracy": ("teacher-forced accuracy", 0, "solid"),
        "right": ("greedy answers still in the right cell", 1, "solid"),
    }

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        shares = (interval(at[key]) for key in ("accuracy", "accuracy_so_far", "right"))
        return [*shares, points(at["gap"], colored=False)]

    return [
        "<p>Greedy decoding predicts every token from its own tokens before it. As long as an answer is right, these "
        "are the true tokens, so the accuracy of answers that are right so far is teacher-forced accuracy on fewer "
        "photos. The gap between teacher-forced accuracy and the share of answers still in the right cell is the cost "
        "of accumulated errors.</p>",
        Panels(_split_curves(figures, kinds, "percent by S2 level, teacher-forced and greedy")),
        _table(figures, ["Teacher-forced", "Right so far", "Still in the right cell", "Gap, points"], cells),
    ]


def _first(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = [
        _bars(figures, "Photos whose first wrong token is at the level", "first_wrong", "percent of photos"),
        _bars(figures, "GeoScore that these photos lose", "lost", "percent of the GeoScore lost"),
    ]

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        off = interval(None)
        if at["km_quartiles"]:
            low, middle, high = map(formats.km, at["km_quartiles"])
            off = Cell(middle, [f"{low} to {high}"])
        mean = f"{at['points_lost']['value']:,.0f}" if at["points_lost"] else interval(None)
        missed = [interval(at[f"missed_{km}"]) for km in distance.THRESHOLDS_KM]
        return [interval(at["first_wrong"]), off, mean, interval(at["lost"]), *missed, interval(at["near"])]

    columns = ["First wrong", "Error", "GeoScore lost", "Of all lost", *(f"Missed {at}" for at in THRESHOLDS)]
    return [
        "<p>Each photo counts at the first level at which its greedy answer is in another cell than the truth. The "
        "table has the share of such photos, their error (median and quartiles), the GeoScore they lose on average, "
        "their share of all GeoScore lost, and their share of all photos that are not within each distance. The last "
        "column shows the effect of cell borders: the share of these photos whose answer is in another cell, but no "
        "farther from the truth than the width of a cell.</p>",
        Panels(charts),
        _table(figures, [*columns, "Within a cell's width"], cells),
    ]


def _neighbors(figures: Mapping[str, Any]) -> list[Piece | str]:
    known = {
        "held": ("a neighbor is in the right cell", 2, "solid"),
        "accuracy_held": ("accuracy with such a neighbor", 0, "solid"),
        "accuracy_not_held": ("accuracy without such a neighbor", 1, "solid"),
    }
    lost = []
    for split, of in figures["splits"].items():
        series = [_bar_series(of, key, name, color) for color, (key, name) in enumerate(CAUSES.items())]
        title = f"{split}: percent of all GeoScore lost, by first wrong level and cells of the neighbors"
        lost.append(Chart(split, title, "S2 level", "percent of the GeoScore lost", series, _names(figures)))

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        return [interval(at[key]) for key in (*known, "held_wrong", "held_wrong_by_chance", *CAUSES)]

    columns = [
        "Neighbor in right cell",
        "Accuracy with it",
        "Accuracy without it",
        "First wrong: neighbor in right cell",
        "the same by chance",
    ]
    title = "teacher-forced accuracy by S2 level, with and without a neighbor in the right cell"
    return [
        "<p>The GeoScore lost at each level, by the number of neighbors in the right cell of that level and in the "
        "cell that the answer chose. If no neighbor is in the right cell, the decoder has no evidence of the place. If "
        "more neighbors are in the chosen cell, most of the evidence is against the truth. If as many or more are in "
        "the right cell, the decoder had the evidence and chose wrong. There are only six cells of level 0, so the "
        "table also has the share of wrong answers that have a neighbor in the right cell if neighbors are taken from "
        "another, random photo.</p>",
        *(frame.verdict(per_level.cause_sentence(figures, split)) for split in figures["splits"]),
        Panels(lost),
        "<h3>Accuracy, teacher-forced</h3>",
        Panels(_split_curves(figures, known, title)),
        _table(figures, [*columns, *(f"Lost: {name}" for name in CAUSES.values())], cells),
    ]


def _table(figures: Mapping[str, Any], columns: Sequence[str], cells: Callable[[int, Any], list[Cell | str]]) -> str:
    """Returns a table with a row per level of each split. The table is hidden until the user clicks on its name.

    columns: heads of the columns after the level. cells: function that returns the cells of a row. Its arguments are
    the index of the level, and the level's estimates in the split.
    """
    names = [f"{of['level']:g} ({formats.km(of['cell_km'])})" for of in figures["levels"]]
    groups = [
        Group([Row(names[t], cells(t, at)) for t, at in enumerate(of["levels"])], split, f"{of['photos']:,} photos")
        for split, of in figures["splits"].items()
    ]
    return frame.hidden("Figures of each split and level", Table(["Level (cell)", *columns], groups))


def _curves(figures: Mapping[str, Any], caption: str, key: str, y_label: str, scale: float = 1) -> Chart:
    """Returns a chart of the estimate `key` over levels, one curve per split."""
    series = [
        _series(figures, of, key, (split, color, "solid"), scale)
        for color, (split, of) in enumerate(figures["splits"].items())
    ]
    return Chart(caption, f"{caption} by S2 level, one curve per split", "S2 level", y_label, series)


def _split_curves(figures: Mapping[str, Any], kinds: Mapping[str, Key], title: str) -> list[Chart]:
    """Returns a chart per split, with one curve over levels per estimate, in percent.

    kinds: legend entry of each curve, by key of its estimate.
    """
    return [
        Chart(
            split,
            f"{split}: {title}",
            "S2 level",
            "percent of photos",
            [_series(figures, of, key, entry, 100) for key, entry in kinds.items()],
        )
        for split, of in figures["splits"].items()
    ]


def _series(figures: Mapping[str, Any], of: Mapping[str, Any], key: str, entry: Key, scale: float) -> Series:
    """Returns the curve of one split: the estimate `key` at each S2 level, multiplied by `scale`.

    A level without the estimate has no point. of: the split's entry in `figures`. entry: name, color and style.
    """
    pairs = zip(figures["levels"], of["levels"], strict=True)
    known = [(level["level"], scale * at[key]["value"]) for level, at in pairs if at[key]]
    x, y = np.array(known).reshape(-1, 2).T
    name, color, style = entry
    return Series(name, color, y, x, style=style)


def _bars(figures: Mapping[str, Any], caption: str, key: str, y_label: str) -> Chart:
    """Returns a chart of the estimate `key` in percent, one bar for each level and split."""
    series = [_bar_series(of, key, split, i) for i, (split, of) in enumerate(figures["splits"].items())]
    return Chart(caption, f"{caption}, by S2 level", "S2 level", y_label, series, _names(figures))


def _bar_series(of: Mapping[str, Any], key: str, name: str, color: int) -> Series:
    """Returns bars of an estimate of a split at each level, in percent. A level without the estimate has no bar.

    of: the split's entry in `figures`. key: key of the estimate. name: name in the legend. color: color number.
    """
    y, low, high = (
        np.array([100 * at[key][part] if at[key] else np.nan for at in of["levels"]])
        for part in ("value", "low", "high")
    )
    return Series(name, color, y, low=low, high=high)


def _names(figures: Mapping[str, Any]) -> list[str]:
    return [f"{of['level']:g}" for of in figures["levels"]]
