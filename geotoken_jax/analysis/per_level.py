"""`geotoken audit levels`: at which S2 level the reference's answers leave the right cell, how far off, and why.

A token is looked at twice: with the true tokens before it (teacher-forced), and as greedy decoding writes it. Up to its
first wrong token a greedy answer has read the truth, so both agree there; what follows a wrong one cannot be right.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax import bootstrap
from geotoken_jax.analysis import audit, charts, frame
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.data import pipeline
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.progress import Progress

if TYPE_CHECKING:
    from geotoken_jax.model.geotoken import GeoTokenModel

#: Bins of calibration, of equally many photos each: at fine levels nearly all confidences are under 0.2.
_BINS = 10
#: Confidence of the surest bin, over the uniform's, from which a level's curves are more than a knot.
_SPREAD = 2
#: Share of resamples in which the bottleneck is to be the same level, or the page says that it may be another.
_SURE = 0.95
#: What the neighbors of photos that leave the right cell were, by the name of the GeoScore lost by such photos.
_WANT = {
    "lost_not_held": "none in the right cell",
    "lost_outvoted": "more in the chosen cell",
    "lost_not_outvoted": "as many or more in the right cell",
}
#: A table's cell of the ratio of nothing.
_NONE = "<td>&ndash;</td>"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the decoder makes of the photos of a split, at each of their T tokens.

    tokens: the true ones. loss: of the true token, and entropy, in nats, confidence: the probability of `guess`, the
    most probable token, all given the true tokens before. greedy: tokens decoded freely. near: the neighbors' tokens,
    -1 for a missing one. coordinates: the true ones, degrees. clusters: the number of each photo's author.
    """

    cells: Scheme
    tokens: Int[np.ndarray, "n T"]
    loss: Float[np.ndarray, "n T"]
    entropy: Float[np.ndarray, "n T"]
    confidence: Float[np.ndarray, "n T"]
    guess: Int[np.ndarray, "n T"]
    greedy: Int[np.ndarray, "n T"]
    near: Int[np.ndarray, "n M T"]
    coordinates: Float[np.ndarray, "n 2"]
    clusters: Int[np.ndarray, "n"]

    @property
    def hit(self) -> Bool[np.ndarray, "n T"]:
        """Says which tokens are the most probable ones, teacher-forced."""
        return self.guess == self.tokens

    @property
    def right(self) -> Bool[np.ndarray, "n T"]:
        """Says whether the greedy answer is still in the right cell after each token."""
        return np.cumprod(self.greedy == self.tokens, axis=1).astype(bool)

    @property
    def right_before(self) -> Bool[np.ndarray, "n T"]:
        """Says whether the greedy answer was in the right cell before each token."""
        return np.concatenate([np.ones((len(self.tokens), 1), bool), self.right[:, :-1]], axis=1)

    def km(self, earth: str) -> Float[np.ndarray, "n"]:
        """Returns how far the greedy answer, the center of its cell, is from the truth. earth: of distance.EARTHS."""
        return distance.EARTHS[earth](*self.cells.decode(self.greedy), *self.coordinates.T)


def make(config: Config, workdir: Workdir, folder: epath.Path) -> audit.Made:
    """Returns what audit/levels/ holds."""
    del folder
    scoring = config.evaluate
    seen = _see(config.variant(scoring.reference), workdir, scoring.reference)
    cells = next(iter(seen.values())).cells
    figures = {
        "variant": scoring.reference,
        "name": scoring.labels.get(scoring.reference, scoring.reference),
        "levels": [
            {"level": round(float(level), 1), "choices": choices, "cell_km": round(km, 6)}
            for level, choices, km in zip(s2_levels(cells), cells.vocab_sizes, cell_km(cells), strict=True)
        ],
        "splits": {split: _figures(of, scoring) for split, of in seen.items()},
    }
    counts = {split: len(of.tokens) for split, of in seen.items()}
    return audit.Made("Level by level", *_page(figures), figures, counts)


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures that matter most, as text."""
    lines = [
        f"{figures['name']}, in percent. Teacher-forced: accuracy, loss (of the uniform's), calibration error.",
        "Greedy: in the right cell; wrong for the first time, and of these: their share of the GeoScore",
        "lost, those with a neighbor in the right cell, those nearer than a cell's width, the median km.",
    ]
    heads = ("accuracy", "loss", "error", "in cell", "wrong", "lost", "neighbor", "near", "km")
    names = ("accuracy", "of_uniform", "calibration_error", "right", "first_wrong", "lost", "held_wrong", "near")
    for split, of in figures["splits"].items():
        lines += ["", f"{split[:15]:16}" + "".join(f"{head:>9}" for head in heads)]
        for at, level in zip(of["levels"], figures["levels"], strict=True):
            cells = [f"{100 * at[name]['value']:.1f}" if at[name] else "-" for name in names]
            cells += [frame.number(at["km_quartiles"][1]) if at["photos_wrong"] else "-"]
            lines.append(f"level {level['level']:<10g}" + "".join(f"{cell:>9}" for cell in cells))
    lines += ["", "Level that most photos missed at each distance first left at, and their percent of all missed"]
    lines += [f"{'':16}" + "".join(f"{limit:>10,} km" for limit in distance.THRESHOLDS_KM)]
    for split, of in figures["splits"].items():
        lines += [f"{split[:15]:16}" + "".join(_most(figures, of, f"missed_{at}") for at in distance.THRESHOLDS_KM)]
    lines += ["", "In parentheses: 95 % intervals."]
    said = [f"\n{say(figures, split)}" for say in (_bottleneck, _want) for split in figures["splits"]]
    return "\n".join([*lines, *said])


def _most(figures: Mapping[str, Any], of: Mapping[str, Any], key: str) -> str:
    """Returns the level with the largest estimate, and that."""
    pairs = zip(of["levels"], figures["levels"], strict=True)
    known = [(at[key]["value"], level["level"]) for at, level in pairs if at[key]]
    if not known:
        return f"{'-':>13}"
    value, level = max(known)
    return f"{level:>6g}{100 * value:>7.1f}"


def look(model: "GeoTokenModel", batch: Mapping[str, Any]) -> dict[str, Array]:
    """Returns what Seen holds of photos, by name. batch: see data.join."""
    from geotoken_jax.model.loss import cross_entropy
    from geotoken_jax.model.memory import Neighbors
    from geotoken_jax.predict import sample

    tokens = batch["tokens"]
    neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
    context = batch.get("context")
    log_p = model(batch["query"], neighbors, tokens, context=context)
    real = jnp.arange(neighbors.tokens.shape[1]) < neighbors.count[:, None]
    return {
        "tokens": tokens,
        "loss": cross_entropy(log_p, tokens),
        "entropy": -jnp.sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0), axis=-1),
        "confidence": jnp.exp(log_p.max(-1)),
        "guess": log_p.argmax(-1),
        "greedy": sample.greedy(model, model.encode(batch["query"], neighbors, context=context)).tokens[:, 0],
        "near": jnp.where(real[..., None], neighbors.tokens, -1),
    }


def _see(config: Config, workdir: Workdir, variant: str) -> dict[str, Seen]:
    """Looks at every photo of every evaluated split; what is called test comes first. config: the variant's."""
    model = workdir.decoder(variant, config.model)
    options, asked = model.settings, workdir.asked
    compiled = nnx.jit(look)
    seen = {}
    with Progress("audit levels", sum(asked.values()), "photos") as progress:
        for split in sorted(asked, key=lambda name: (not name.startswith("test"), name)):
            own, read = workdir.table(split), workdir.tokens(split, options, workdir.gallery)
            parts = []
            for batch in pipeline.evaluation(len(own), read, config.predict.batch_size):
                valid = batch.pop("valid")
                parts.append({name: np.asarray(of)[valid] for name, of in compiled(model, batch).items()})
                progress.add(int(valid.sum()))
            found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            clusters = bootstrap.clusters(*(column.astype(str).tolist() for column in (own.authors(), own.ids())))
            seen[split] = Seen(options.cells, **found, coordinates=own.coordinates(), clusters=clusters)
    return seen


def s2_levels(cells: Scheme) -> Float[np.ndarray, "T"]:
    """Returns the S2 level whose cells are as many as those that each token tells apart."""
    return np.log2(np.cumprod(cells.vocab_sizes, dtype=np.float64) / 6) / 2


def cell_km(cells: Scheme) -> Float[np.ndarray, "T"]:
    """Returns the edge of a square of a cell's mean area, at each token: 9,220 km of a face, 9 m at level 20."""
    return math.sqrt(4 * math.pi / 6) * distance.EARTH_RADIUS_KM / 2 ** s2_levels(cells)


def _votes(near: Int[np.ndarray, "n M T"], tokens: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "n T"]:
    """Returns how many neighbors are in a cell, as far as each of its tokens."""
    return np.cumprod(near == tokens[:, None], axis=-1).sum(axis=1)


def _ratios(seen: Seen, scoring: EvaluateSettings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns what is estimated at each token, as the sum of the first over the sum of the second: [n, T] each.

    By chance: what the neighbors of another photo, drawn with the seed, hold.
    """
    hit, right, before = seen.hit, seen.right, seen.right_before
    every, wrong = np.ones(hit.shape), before & ~right
    km = seen.km(scoring.earth)[:, None]
    missed = dict(zip(distance.THRESHOLDS_KM, ~distance.within(km, scoring.strict).T, strict=True))
    lost = np.asarray(distance.geoscore(0.0) - distance.geoscore(km)) * every
    votes, chosen = _votes(seen.near, seen.tokens), _votes(seen.near, seen.greedy)
    other = np.random.default_rng(scoring.seed).permutation(len(hit))
    by_chance = _votes(seen.near[other], seen.tokens) > 0
    held, outvoted = votes > 0, (votes > 0) & (votes < chosen)
    return {
        "accuracy": (hit, every),
        "loss": (seen.loss, every),
        "of_uniform": (seen.loss / np.log(seen.cells.vocab_sizes), every),
        "entropy": (seen.entropy, every),
        "overconfidence": (seen.confidence - hit, every),
        "right": (right, every),
        "accuracy_so_far": (right, before),
        "gap": (hit * 1.0 - right, every),
        "first_wrong": (wrong, every),
        "points_lost": (lost * wrong, wrong),
        "lost": (lost * wrong, lost),
        **{f"missed_{at}": (wrong & of[:, None], of[:, None] * every) for at, of in missed.items()},
        "near": (wrong & (km <= cell_km(seen.cells)), wrong),
        "held": (held, every),
        "accuracy_held": (hit & held, held),
        "accuracy_not_held": (hit & ~held, ~held),
        "held_wrong": (wrong & held, wrong),
        "held_wrong_by_chance": (wrong & by_chance, wrong),
        "lost_not_held": (lost * (wrong & ~held), lost),
        "lost_outvoted": (lost * (wrong & outvoted), lost),
        "lost_not_outvoted": (lost * (wrong & held & ~outvoted), lost),
    }


def _figures(seen: Seen, scoring: EvaluateSettings) -> dict[str, Any]:
    """Estimates everything of one split. None stands for the ratio of nothing."""
    ratios = _ratios(seen, scoring)
    sums = np.stack([part for pair in ratios.values() for part in pair], axis=1).astype(np.float64)
    drawn = bootstrap.resample(sums, seen.clusters, scoring.resamples, scoring.seed)
    with np.errstate(invalid="ignore"):
        values, samples = (of[..., 0::2, :] / of[..., 1::2, :] for of in (sums.mean(axis=0), drawn))
    wrong, off = seen.right_before & ~seen.right, seen.km(scoring.earth)
    levels = []
    for t in range(seen.cells.length):
        estimates = {name: _estimate(values[i, t], samples[:, i, t]) for i, name in enumerate(ratios)}
        km = off[wrong[:, t]]
        quartiles = [round(float(q), 6) for q in np.quantile(km, (0.25, 0.5, 0.75))] if len(km) else None
        reliability = _reliability(seen.confidence[:, t], seen.hit[:, t])
        error = sum(b["photos"] * abs(b["confidence"] - b["accuracy"]) for b in reliability) / len(seen.tokens)
        levels.append(
            {**estimates, "photos_wrong": len(km), "km_quartiles": quartiles,
             "calibration_error": {"value": round(error, 6)}, "reliability": reliability}
        )  # fmt: skip
    at = {name: i for i, name in enumerate(ratios)}
    worst = int(values[at["lost"]].argmax())
    return {
        "photos": len(seen.tokens),
        "bottleneck": worst,
        "bottleneck_in_resamples": round(float((samples[:, at["lost"]].argmax(axis=1) == worst).mean()), 6),
        "levels": levels,
        "all_levels": {name: _estimate(values[at[name]].sum(), samples[:, at[name]].sum(axis=1)) for name in _WANT},
    }


def _estimate(value: float, samples: Float[np.ndarray, "R"]) -> dict[str, float] | None:
    if math.isnan(value):
        return None
    low, high = np.nanpercentile(samples, (2.5, 97.5))  # a resample may hold none of a rare kind
    return {name: round(float(of), 6) for name, of in (("value", value), ("low", low), ("high", high))}


def _reliability(confidence: Float[np.ndarray, "n"], hit: Bool[np.ndarray, "n"]) -> list[dict[str, Any]]:
    """Returns mean confidence and accuracy of bins of equally many photos, least confident first."""
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(_BINS, len(hit)))
    return [
        {"photos": len(b), **{name: round(float(of[b].mean()), 6) for name, of in
                              (("confidence", confidence), ("accuracy", hit))}}
        for b in bins
    ]  # fmt: skip


def _bottleneck(figures: Mapping[str, Any], split: str) -> str:
    """Returns which level a split loses most at, in one sentence."""
    of = figures["splits"][split]
    at, level = of["levels"][of["bottleneck"]], figures["levels"][of["bottleneck"]]["level"]
    if not at["photos_wrong"]:
        return f"{split}: every greedy answer is in the right cell of every level."
    sure = of["bottleneck_in_resamples"]
    doubt = f"; in {frame.percent(1 - sure)} of resamples another level loses more" if sure < _SURE else ""
    return (
        f"{split}: level {level:g} is the bottleneck: the {_percent(at['first_wrong'])} of photos whose answer first "
        f"leaves the right cell there, half of them more than {frame.km(at['km_quartiles'][1])} off, make up "
        f"{_interval(at['lost'])} of the GeoScore lost{doubt}."
    )


def _want(figures: Mapping[str, Any], split: str) -> str:
    """Returns for want of what a split loses, in one sentence."""
    of = figures["splits"][split]
    if not of["all_levels"]["lost_outvoted"]:
        return f"{split}: no GeoScore is lost."
    none, outvoted, choosing = (_interval(of["all_levels"][name]) for name in _WANT)
    return (
        f"{split}: of the GeoScore lost, {none} is for want of evidence (no neighbor was in the right cell), "
        f"{outvoted} for want of a majority (more were in the cell chosen), {choosing} for want of choosing (as many "
        "or more were in the right one)."
    )


def _percent(estimate: Mapping[str, float]) -> str:
    return frame.percent(estimate["value"])


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{frame.percent(estimate['value'])} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def _page(figures: Mapping[str, Any]) -> tuple[str, list[frame.Section]]:
    tiles = []
    for split, of in figures["splits"].items():
        at = of["levels"][of["bottleneck"]]
        note = f"{_percent(at['lost'])} of the GeoScore lost" if at["lost"] else "nothing is lost"
        tiles.append((f"{split}: bottleneck", f"level {figures['levels'][of['bottleneck']]['level']:g}", note))
    verdicts = "".join(f'<p class="verdict">{escape(_bottleneck(figures, split))}</p>' for split in figures["splits"])
    headline = (
        f"<p>Each token of an answer narrows the cell down. This page follows <b>{escape(figures['name'])}</b> token "
        "by token: how well it knows each level when all before is right, where greedy decoding first leaves the right "
        f"cell, and what that costs.</p>{verdicts}{frame.tiles(tiles)}"
    )
    return headline, [
        frame.Section("forced", "Each level alone", "Each level alone", _forced_html(figures)),
        frame.Section("calibration", "Calibration", "Whether its confidence is right", _calibration_html(figures)),
        frame.Section("free", "Free-running", "One level after another", _free_html(figures)),
        frame.Section("first", "First mistake", "Where answers first leave the right cell", _first_html(figures)),
        frame.Section("neighbors", "Neighbors", "For want of evidence, or of choosing", _neighbors_html(figures)),
    ]


def _forced_html(figures: Mapping[str, Any]) -> str:
    panels = [
        _curves(figures, "Accuracy", "accuracy", "percent of photos", 100),
        _curves(figures, "Loss, of the uniform's", "of_uniform", "percent", 100),
        _curves(figures, "Loss", "loss", "nats"),
        _curves(figures, "Entropy", "entropy", "nats"),
    ]

    def cells(t: int, at: Mapping[str, Any]) -> list[str]:
        return [
            f"<td>{figures['levels'][t]['choices']}</td>",
            _percents(at["accuracy"]),
            _nats(at["loss"]),
            _percents(at["of_uniform"]),
            _nats(at["entropy"]),
        ]

    return (
        "<p>Teacher-forced: every token is asked for with the true ones before it. The loss is that of the true token; "
        "at 100 % of the uniform's the model knows no more than how many cells there are. The entropy is what the "
        "model expects to lose: where the loss is above it, it is too sure.</p>"
        f'{_legend(figures)}<div class="charts">{"".join(panels)}</div>'
        + _table(figures, ["Choices", "Accuracy", "Loss, nats", "Of the uniform's", "Entropy, nats"], cells)
    )


def _calibration_html(figures: Mapping[str, Any]) -> str:
    panels = []
    for t, of_level in enumerate(figures["levels"]):
        surest = max(of["levels"][t]["reliability"][-1]["confidence"] for of in figures["splits"].values())
        if surest * of_level["choices"] < _SPREAD:
            continue
        drawn = []
        for color, (split, of) in enumerate(figures["splits"].items()):
            x, y = ([100 * b[name] for b in of["levels"][t]["reliability"]] for name in ("confidence", "accuracy"))
            drawn.append(charts.Series(split, color, "solid", np.array(x), np.array(y)))
        name = f"Level {of_level['level']:g}"
        title = f"{name}: percent right by confidence, one curve a split; dotted where they are equal"
        drawn.append(charts.Series("equal", 7, "dotted", np.array([0, 100]), np.array([0, 100])))
        panel = charts.chart(drawn, title=title, x_label="confidence, percent", y_label="percent right")
        panels.append(frame.figure(name, panel))

    def cells(t: int, at: Mapping[str, Any]) -> list[str]:
        del t
        error = f"<td>{100 * at['calibration_error']['value']:.1f}</td>"
        return [_percents(at["accuracy"]), _points(at["overconfidence"]), error]

    return (
        "<p>Teacher-forced: how often the most probable token is the true one, against the probability it is given, in "
        f"{_BINS} bins of equally many photos a split. Over-confidence is mean confidence minus accuracy; the expected "
        "calibration error is the mean distance of bins from the dotted line, which chance alone keeps above zero. "
        f"Levels where no bin is surer than {_SPREAD} times the uniform are not drawn.</p>"
        f'{_legend(figures)}<div class="charts">{"".join(panels)}</div>'
        + _table(figures, ["Accuracy", "Over-confidence, points", "Calibration error, points"], cells)
    )


def _free_html(figures: Mapping[str, Any]) -> str:
    kinds = {
        "accuracy_so_far": ("accuracy of those right so far", 2, "dashed"),
        "accuracy": ("teacher-forced accuracy", 0, "solid"),
        "right": ("still in the right cell", 1, "solid"),
    }
    panels = []
    for split, of in figures["splits"].items():
        series = [_series(figures, of, key, *look) for key, look in kinds.items()]
        title = f"{split}: percent by S2 level, teacher-forced and greedy"
        drawn = charts.chart(series, title=title, x_label="S2 level", y_label="percent of photos")
        panels.append(frame.figure(split, drawn))

    def cells(t: int, at: Mapping[str, Any]) -> list[str]:
        del t
        return [*(_percents(at[key]) for key in ("accuracy", "accuracy_so_far", "right")), _points(at["gap"])]

    return (
        "<p>Greedy decoding goes on from its own tokens. Among the photos that are right so far it has read the truth, "
        "so it differs from teacher-forcing there only in which photos are left; what errors cost by adding up is the "
        "gap between teacher-forced accuracy and the share still in the right cell.</p>"
        + frame.legend(kinds.values())
        + f'<div class="charts">{"".join(panels)}</div>'
        + _table(figures, ["Teacher-forced", "Of those right so far", "Still in the right cell", "Gap, points"], cells)
    )


def _first_html(figures: Mapping[str, Any]) -> str:
    panels = [
        _bars(figures, "Photos whose first wrong token is there", "first_wrong", "percent of photos"),
        _bars(figures, "GeoScore lost by them", "lost", "percent of all that is lost"),
    ]

    def cells(t: int, at: Mapping[str, Any]) -> list[str]:
        del t
        quartiles, points = at["km_quartiles"], at["points_lost"]
        off = _NONE
        if quartiles:
            low, middle, high = map(frame.km, quartiles)
            off = f"<td>{middle}<small>{low} to {high}</small></td>"
        mean = f"<td>{points['value']:,.0f}</td>" if points else _NONE
        missed = [_percents(at[f"missed_{km}"]) for km in distance.THRESHOLDS_KM]
        return [_percents(at["first_wrong"]), off, mean, _percents(at["lost"]), *missed, _percents(at["near"])]

    columns = ["First wrong", "Off by", "Points lost", "Of all lost", *(f"Missed {at}" for at in frame.thresholds())]
    return (
        "<p>Each photo counts at the first level whose cell its greedy answer leaves: how many do, how far off they "
        "end (median and quartiles), the GeoScore they lose on average, and what part they are of all GeoScore lost "
        "and of all photos missed at each distance. The table's last column is the price of hard "
        "borders: answers in another cell that are nevertheless no farther from the truth than a cell of that level is "
        "wide.</p>"
        f'{_legend(figures, "wide")}<div class="charts">{"".join(panels)}</div>'
        + _table(figures, [*columns, "Within a cell's width"], cells)
    )


def _neighbors_html(figures: Mapping[str, Any]) -> str:
    known = {
        "held": ("a neighbor is in the right cell", 2),
        "accuracy_held": ("accuracy where one is", 0),
        "accuracy_not_held": ("accuracy where none is", 1),
    }
    lost, accuracy = [], []
    for split, of in figures["splits"].items():
        bars = [charts.Bars(name, color, *_values(of, key)) for color, (key, name) in enumerate(_WANT.items())]
        title = f"{split}: percent of all GeoScore lost, by first wrong level and by where the neighbors were"
        drawn = charts.bars(_names(figures), bars, title=title, x_label="S2 level", y_label="percent of all lost")
        lost.append(frame.figure(split, drawn))
        curves = [_series(figures, of, key, *look, "solid") for key, look in known.items()]
        title = f"{split}: teacher-forced accuracy by S2 level, with and without a neighbor in the right cell"
        drawn = charts.chart(curves, title=title, x_label="S2 level", y_label="percent of photos")
        accuracy.append(frame.figure(split, drawn))

    def cells(t: int, at: Mapping[str, Any]) -> list[str]:
        del t
        return [_percents(at[key]) for key in (*known, "held_wrong", "held_wrong_by_chance", *_WANT)]

    said = "".join(f'<p class="verdict">{escape(_want(figures, split))}</p>' for split in figures["splits"])
    columns = ["A neighbor there", "Accuracy with", "Accuracy without", "First wrong: one there", "by chance"]
    return (
        "<p>How many of a photo's neighbors lie in the right cell as far as each level, and how many in the one that "
        "the answer takes. Where none is in the right one, the decoder had to know the place itself; where more are in "
        "the other, their number spoke against the truth; where as many or more were right, it chose badly. Six faces "
        "are few: what another photo's neighbors would hold by chance is beside it.</p>"
        + said
        + frame.legend((name, color, "wide") for color, name in enumerate(_WANT.values()))
        + f'<div class="charts">{"".join(lost)}</div><h3>Accuracy, teacher-forced</h3>'
        + frame.legend((*look, "solid") for look in known.values())
        + f'<div class="charts">{"".join(accuracy)}</div>'
        + _table(figures, [*columns, *(f"Lost: {name}" for name in _WANT.values())], cells)
    )


def _table(figures: Mapping[str, Any], columns: Sequence[str], cells: Callable[[int, Any], list[str]]) -> str:
    """Returns a row for each level of each split. cells: number of the token and its figures -> whole <td>."""
    names = [f"{of['level']:g} ({frame.km(of['cell_km'])})" for of in figures["levels"]]
    bodies = [
        frame.body(
            1 + len(columns),
            [frame.row(names[t], cells(t, at)) for t, at in enumerate(of["levels"])],
            split,
            f"{of['photos']:,} photos",
        )
        for split, of in figures["splits"].items()
    ]
    listed = frame.table(["Level (cell)", *columns], bodies)
    return f"<details><summary>Figures of each split and level</summary>{listed}</details>"


def _curves(figures: Mapping[str, Any], caption: str, key: str, y_label: str, scale: float = 1) -> str:
    """Returns a panel with one curve over levels a split."""
    series = [
        _series(figures, of, key, split, color, "solid", scale)
        for color, (split, of) in enumerate(figures["splits"].items())
    ]
    title = f"{caption} by S2 level, one curve a split"
    return frame.figure(caption, charts.chart(series, title=title, x_label="S2 level", y_label=y_label))


def _series(
    figures: Mapping[str, Any], of: Mapping[str, Any], key: str, name: str, color: int, look: str, scale: float = 100
) -> charts.Series:
    """Returns the curve of a split's estimate over levels, without those of nothing."""
    pairs = zip(figures["levels"], of["levels"], strict=True)
    known = [(level["level"], scale * at[key]["value"]) for level, at in pairs if at[key]]
    x, y = np.array(known).reshape(-1, 2).T
    return charts.Series(name, color, look, x, y)


def _bars(figures: Mapping[str, Any], caption: str, key: str, y_label: str) -> str:
    """Returns a panel with one bar for each level and split."""
    series = [charts.Bars(split, i, *_values(of, key)) for i, (split, of) in enumerate(figures["splits"].items())]
    title = f"{caption}, by S2 level"
    return frame.figure(caption, charts.bars(_names(figures), series, title=title, x_label="S2 level", y_label=y_label))


def _values(of: Mapping[str, Any], key: str) -> list[Float[np.ndarray, "T"]]:
    """Returns value, low and high of a split's estimate at each level, in percent; NaN for the ratio of nothing."""
    return [
        np.array([100 * at[key][part] if at[key] else np.nan for at in of["levels"]])
        for part in ("value", "low", "high")
    ]


def _names(figures: Mapping[str, Any]) -> list[str]:
    return [f"{of['level']:g}" for of in figures["levels"]]


def _legend(figures: Mapping[str, Any], look: str = "solid") -> str:
    return frame.legend((split, color, look) for color, split in enumerate(figures["splits"]))


def _percents(estimate: Mapping[str, float] | None) -> str:
    return frame.percents(estimate) if estimate else _NONE


def _nats(estimate: Mapping[str, float]) -> str:
    return f"<td>{estimate['value']:.3f}<small>{estimate['low']:.3f}&ndash;{estimate['high']:.3f}</small></td>"


def _points(estimate: Mapping[str, float]) -> str:
    """Returns the cell of a difference in points that is neither good nor bad."""
    value, low, high = (frame.signed(100 * estimate[part]) for part in ("value", "low", "high"))
    return f"<td>{value}<small>{low} to {high}</small></td>"
