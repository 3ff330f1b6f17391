"""The page of `geotoken audit levels`."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.analysis import formats, per_level
from geotoken_jax.analysis.per_level import BINS, CAUSES
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame
from geotoken_jax.pages.chart import Chart, Panels, Series
from geotoken_jax.pages.frame import Piece, Section
from geotoken_jax.pages.table import THRESHOLDS, Cell, Group, Row, Table, interval, points

#: Confidence of the most confident bin, over the uniform's, from which a level's curves are more than a knot.
_SPREAD = 2


def page(figures: Mapping[str, Any], source: frame.Source) -> str:
    """Returns the page."""
    tiles = []
    for split, of in figures["splits"].items():
        at = of["levels"][of["bottleneck"]]
        note = f"{formats.percent(at['lost']['value'])} of the GeoScore lost" if at["lost"] else "nothing is lost"
        tiles.append((f"{split}: bottleneck", f"level {figures['levels'][of['bottleneck']]['level']:g}", note))
    verdicts = "".join(frame.verdict(per_level.bottleneck_sentence(figures, split)) for split in figures["splits"])
    headline = (
        f"<p>Each token of an answer narrows the cell down. This page follows <b>{escape(figures['name'])}</b> token "
        "by token: how well it knows each level when all before is right, where greedy decoding first leaves the right "
        f"cell, and what that costs.</p>{verdicts}{frame.tiles(tiles)}"
    )
    sections = [
        Section("forced", "Each level alone", "Each level alone", _forced(figures)),
        Section("calibration", "Calibration", "Whether its confidence is right", _calibration(figures)),
        Section("free", "Free-running", "One level after another", _free(figures)),
        Section("first", "First mistake", "Where answers first leave the right cell", _first(figures)),
        Section("neighbors", "Neighbors", "For want of evidence, or of choosing", _neighbors(figures)),
    ]
    return frame.audit_page("Level by level", headline, sections, source)


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
        "<p>Teacher-forced: every token is asked for with the true ones before it. The loss is that of the true token; "
        "at 100 % of the uniform's the model knows no more than how many cells there are. The entropy is what the "
        "model expects to lose: where the loss is above it, it is too sure.</p>",
        Panels(
            [
                _curves(figures, "Accuracy", "accuracy", "percent of photos", 100),
                _curves(figures, "Loss, of the uniform's", "of_uniform", "percent", 100),
                _curves(figures, "Loss", "loss", "nats"),
                _curves(figures, "Entropy", "entropy", "nats"),
            ]
        ),
        _table(figures, ["Choices", "Accuracy", "Loss, nats", "Of the uniform's", "Entropy, nats"], cells),
    ]


def _calibration(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = []
    for t, of_level in enumerate(figures["levels"]):
        surest = max(of["levels"][t]["reliability"][-1]["confidence"] for of in figures["splits"].values())
        if surest * of_level["choices"] < _SPREAD:
            continue
        series = []
        for color, (split, of) in enumerate(figures["splits"].items()):
            x, y = ([100 * b[name] for b in of["levels"][t]["reliability"]] for name in ("confidence", "accuracy"))
            series.append(Series(split, color, np.array(y), np.array(x)))
        name = f"Level {of_level['level']:g}"
        title = f"{name}: percent right by confidence, one curve a split; dotted where they are equal"
        series.append(Series("equal", 7, np.array([0, 100]), np.array([0, 100]), style="dotted"))
        charts.append(Chart(name, title, "confidence, percent", "percent right", series))

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        error = f"{100 * at['calibration_error']['value']:.1f}"
        return [interval(at["accuracy"]), points(at["overconfidence"], colored=False), error]

    return [
        "<p>Teacher-forced: how often the most probable token is the true one, against the probability it is given, in "
        f"{BINS} bins of equally many photos a split. Over-confidence is mean confidence minus accuracy; the expected "
        "calibration error is the mean distance of bins from the dotted line, which chance alone keeps above zero. "
        f"Levels where no bin is surer than {_SPREAD} times the uniform are not drawn.</p>",
        Panels(charts),
        _table(figures, ["Accuracy", "Over-confidence, points", "Calibration error, points"], cells),
    ]


def _free(figures: Mapping[str, Any]) -> list[Piece | str]:
    kinds = {
        "accuracy_so_far": ("accuracy of those right so far", 2, "dashed"),
        "accuracy": ("teacher-forced accuracy", 0, "solid"),
        "right": ("still in the right cell", 1, "solid"),
    }

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        shares = (interval(at[key]) for key in ("accuracy", "accuracy_so_far", "right"))
        return [*shares, points(at["gap"], colored=False)]

    return [
        "<p>Greedy decoding goes on from its own tokens. Among the photos that are right so far it has read the truth, "
        "so it differs from teacher-forcing there only in which photos are left; what errors cost by adding up is the "
        "gap between teacher-forced accuracy and the share still in the right cell.</p>",
        Panels(_split_curves(figures, kinds, "percent by S2 level, teacher-forced and greedy")),
        _table(figures, ["Teacher-forced", "Of those right so far", "Still in the right cell", "Gap, points"], cells),
    ]


def _first(figures: Mapping[str, Any]) -> list[Piece | str]:
    charts = [
        _bars(figures, "Photos whose first wrong token is there", "first_wrong", "percent of photos"),
        _bars(figures, "GeoScore lost by them", "lost", "percent of all that is lost"),
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

    columns = ["First wrong", "Off by", "Points lost", "Of all lost", *(f"Missed {at}" for at in THRESHOLDS)]
    return [
        "<p>Each photo counts at the first level whose cell its greedy answer leaves: how many do, how far off they "
        "end (median and quartiles), the GeoScore they lose on average, and what part they are of all GeoScore lost "
        "and of all photos missed at each distance. The table's last column is the price of hard "
        "borders: answers in another cell that are nevertheless no farther from the truth than a cell of that level is "
        "wide.</p>",
        Panels(charts),
        _table(figures, [*columns, "Within a cell's width"], cells),
    ]


def _neighbors(figures: Mapping[str, Any]) -> list[Piece | str]:
    known = {
        "held": ("a neighbor is in the right cell", 2, "solid"),
        "accuracy_held": ("accuracy where one is", 0, "solid"),
        "accuracy_not_held": ("accuracy where none is", 1, "solid"),
    }
    lost = []
    for split, of in figures["splits"].items():
        series = [_bar_series(of, key, name, color) for color, (key, name) in enumerate(CAUSES.items())]
        title = f"{split}: percent of all GeoScore lost, by first wrong level and by where the neighbors were"
        lost.append(Chart(split, title, "S2 level", "percent of all lost", series, _names(figures)))

    def cells(t: int, at: Mapping[str, Any]) -> list[Cell | str]:
        del t
        return [interval(at[key]) for key in (*known, "held_wrong", "held_wrong_by_chance", *CAUSES)]

    columns = ["A neighbor there", "Accuracy with", "Accuracy without", "First wrong: one there", "by chance"]
    title = "teacher-forced accuracy by S2 level, with and without a neighbor in the right cell"
    return [
        "<p>How many of a photo's neighbors lie in the right cell as far as each level, and how many in the one that "
        "the answer takes. Where none is in the right one, the decoder had to know the place itself; where more are in "
        "the other, their number spoke against the truth; where as many or more were right, it chose badly. Six faces "
        "are few: what another photo's neighbors would hold by chance is beside it.</p>",
        *(frame.verdict(per_level.cause_sentence(figures, split)) for split in figures["splits"]),
        Panels(lost),
        "<h3>Accuracy, teacher-forced</h3>",
        Panels(_split_curves(figures, known, title)),
        _table(figures, [*columns, *(f"Lost: {name}" for name in CAUSES.values())], cells),
    ]


def _table(figures: Mapping[str, Any], columns: Sequence[str], cells: Callable[[int, Any], list[Cell | str]]) -> str:
    """Returns a row for each level of each split. cells: number of the token and its figures -> cells."""
    names = [f"{of['level']:g} ({formats.km(of['cell_km'])})" for of in figures["levels"]]
    groups = [
        Group([Row(names[t], cells(t, at)) for t, at in enumerate(of["levels"])], split, f"{of['photos']:,} photos")
        for split, of in figures["splits"].items()
    ]
    return frame.hidden("Figures of each split and level", Table(["Level (cell)", *columns], groups))


def _curves(figures: Mapping[str, Any], caption: str, key: str, y_label: str, scale: float = 1) -> Chart:
    """Returns a chart with one curve over levels per split."""
    series = [
        _series(figures, of, key, (split, color, "solid"), scale)
        for color, (split, of) in enumerate(figures["splits"].items())
    ]
    return Chart(caption, f"{caption} by S2 level, one curve a split", "S2 level", y_label, series)


def _split_curves(figures: Mapping[str, Any], kinds: Mapping[str, tuple[str, int, str]], title: str) -> list[Chart]:
    """Returns a chart per split with a curve of percent over levels per kind. kinds: key of figures -> legend."""
    return [
        Chart(
            split,
            f"{split}: {title}",
            "S2 level",
            "percent of photos",
            [_series(figures, of, key, look, 100) for key, look in kinds.items()],
        )
        for split, of in figures["splits"].items()
    ]


def _series(
    figures: Mapping[str, Any], of: Mapping[str, Any], key: str, look: tuple[str, int, str], scale: float
) -> Series:
    """Returns the curve of a split's estimate over levels, without those of nothing. look: name, color, style."""
    pairs = zip(figures["levels"], of["levels"], strict=True)
    known = [(level["level"], scale * at[key]["value"]) for level, at in pairs if at[key]]
    x, y = np.array(known).reshape(-1, 2).T
    name, color, style = look
    return Series(name, color, y, x, style=style)


def _bars(figures: Mapping[str, Any], caption: str, key: str, y_label: str) -> Chart:
    """Returns a chart with one bar for each level and split."""
    series = [_bar_series(of, key, split, i) for i, (split, of) in enumerate(figures["splits"].items())]
    return Chart(caption, f"{caption}, by S2 level", "S2 level", y_label, series, _names(figures))


def _bar_series(of: Mapping[str, Any], key: str, name: str, color: int) -> Series:
    """Returns the bars of a split's estimate at each level, in percent; NaN for the ratio of nothing."""
    y, low, high = (
        np.array([100 * at[key][part] if at[key] else np.nan for at in of["levels"]])
        for part in ("value", "low", "high")
    )
    return Series(name, color, y, low=low, high=high)


def _names(figures: Mapping[str, Any]) -> list[str]:
    return [f"{of['level']:g}" for of in figures["levels"]]
