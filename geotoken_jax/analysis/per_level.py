"""Numbers that `geotoken audit levels` reports: the S2 level at which answers leave the right cell, errors and causes.

Each token is evaluated twice: given the true tokens before it (teacher-forced), and in greedy decoding, given the
decoder's own tokens. Both are the same up to the first wrong token of the greedy answer. After that token, the greedy
answer is in a wrong cell at every level.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax import bootstrap
from geotoken_jax.analysis import formats
from geotoken_jax.analysis.reliability import calibration_error
from geotoken_jax.configuration import EvaluateSettings
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import Scheme

if TYPE_CHECKING:
    from geotoken_jax.model.geotoken import GeoTokenModel

#: Number of bins of a calibration curve. Bins have equally many photos, because at fine levels nearly all confidences
#: are below 0.2.
BINS = 10
#: The bottleneck is the level that loses most. If fewer than this share of the bootstrap resamples have the same
#: bottleneck, the sentence on it mentions this uncertainty.
_SURE = 0.95
#: Causes of lost GeoScore: key of an estimate in the figures -> label. A label describes the photo's neighbors at the
#: level at which the answer first leaves the right cell.
CAUSES = {
    "lost_not_held": "no neighbor in the right cell",
    "lost_outvoted": "more neighbors in the chosen cell",
    "lost_not_outvoted": "as many or more neighbors in the right cell",
}


@dataclasses.dataclass(frozen=True)
class DecoderOutputs:
    """Decoder outputs for the n photos of a split, at each of their T tokens.

    The loss, the entropy, the confidence and the guess are teacher-forced: the tokens before are the true ones.

    Attributes:
        cells: scheme of the tokens.
        tokens: true tokens.
        loss: cross-entropy of the true token, in nats.
        entropy: entropy of the token's distribution, in nats.
        confidence: probability of the guess.
        guess: most probable token.
        greedy: tokens of greedy decoding, in which the tokens before are the decoder's own.
        near: tokens of the M neighbors, -1 for a missing neighbor.
        coordinates: true coordinates in degrees.
        clusters: index of each photo's author, for the bootstrap.
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
        """Whether the true token is the most probable token, teacher-forced."""
        return self.guess == self.tokens

    @property
    def right(self) -> Bool[np.ndarray, "n T"]:
        """Whether the greedy answer is still in the right cell after each token."""
        return np.cumprod(self.greedy == self.tokens, axis=1).astype(bool)

    @property
    def right_before(self) -> Bool[np.ndarray, "n T"]:
        """Whether the greedy answer was in the right cell before each token."""
        return np.concatenate([np.ones((len(self.tokens), 1), bool), self.right[:, :-1]], axis=1)

    def km(self, earth: str) -> Float[np.ndarray, "n"]:
        """Returns the distance in km from the truth to the greedy answer, which is the center of its last cell.

        earth: key of distance.EARTHS.
        """
        return distance.EARTHS[earth](*self.cells.decode(self.greedy), *self.coordinates.T)


def figures(name: str, variant: str, seen: Mapping[str, DecoderOutputs], scoring: EvaluateSettings) -> dict[str, Any]:
    """Returns the contents of figures.json: estimates for every split and level.

    name: label of the variant in tables. seen: decoder outputs by split.
    """
    cells = next(iter(seen.values())).cells
    return {
        "variant": variant,
        "name": name,
        "levels": [
            {"level": round(float(level), 1), "choices": choices, "cell_km": round(km, 6)}
            for level, choices, km in zip(s2_levels(cells), cells.vocab_sizes, cell_km(cells), strict=True)
        ],
        "splits": {split: split_figures(of, scoring) for split, of in seen.items()},
    }


def table(figures: Mapping[str, Any]) -> str:
    """Returns a text table of every level of each split, at most 100 columns wide, and sentences that sum it up."""
    lines = [
        f"{figures['name']}, in percent.",
        "Given the true tokens before (teacher-forced): accuracy; loss, relative to a uniform guess; error",
        "of calibration. Greedy answers: in the right cell; wrong at this level for the first time. Of the",
        "photos in `wrong`: their share of the GeoScore lost; with a neighbor in the right cell; near, at",
        "most a cell's width off; median error in km.",
    ]
    heads = ("accuracy", "loss", "error", "in cell", "wrong", "lost", "neighbor", "near", "km")
    names = ("accuracy", "of_uniform", "calibration_error", "right", "first_wrong", "lost", "held_wrong", "near")
    for split, of in figures["splits"].items():
        lines += ["", f"{split:15} " + "".join(f"{head:>9}" for head in heads)]
        for at, level in zip(of["levels"], figures["levels"], strict=True):
            cells = [f"{100 * at[name]['value']:.1f}" if at[name] else "-" for name in names]
            cells += [formats.number(at["km_quartiles"][1]) if at["photos_wrong"] else "-"]
            lines.append(f"level {level['level']:<10g}" + "".join(f"{cell:>9}" for cell in cells))
    lines += [
        "",
        "Of the photos not within a distance of the truth: the level at which most of them first left the",
    ]
    lines += ["right cell, and the percent of them that left it there"]
    lines += [f"{'':16}" + "".join(f"{limit:>10,} km" for limit in distance.THRESHOLDS_KM)]
    for split, of in figures["splits"].items():
        lines += [f"{split:15} " + "".join(_worst_level(figures, of, f"missed_{at}") for at in distance.THRESHOLDS_KM)]
    lines += ["", "In parentheses: 95 % intervals."]
    sentences = [
        f"\n{of(figures, split)}" for of in (bottleneck_sentence, cause_sentence) for split in figures["splits"]
    ]
    return "\n".join([*lines, *sentences])


def _worst_level(figures: Mapping[str, Any], of: Mapping[str, Any], key: str) -> str:
    """Returns a table cell of 13 characters: the level with the largest estimate `key`, and this estimate in percent.

    The cell is a dash if no level has this estimate. of: figures of one split.
    """
    pairs = zip(of["levels"], figures["levels"], strict=True)
    known = [(at[key]["value"], level["level"]) for at, level in pairs if at[key]]
    if not known:
        return f"{'-':>13}"
    value, level = max(known)
    return f"{level:>6g}{100 * value:>7.1f}"


def decoder_outputs(model: "GeoTokenModel", batch: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the decoder outputs of a batch of photos, by field of DecoderOutputs. batch: see data.join."""
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


def split_outputs(
    compiled: Callable, cells: Scheme, batches: Iterable[Mapping[str, Any]], table: Table
) -> DecoderOutputs:
    """Returns the decoder outputs of all photos of a split.

    compiled: `decoder_outputs` of a model, compiled, as a function of the batch alone. batches: batches of
    data.pipeline.evaluation; their `valid` marks the rows that are not padding. table: table of the split, with
    coordinates and authors.
    """
    parts = []
    for batch in batches:
        batch = dict(batch)
        valid = batch.pop("valid")
        parts.append({name: np.asarray(values)[valid] for name, values in compiled(batch).items()})
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    clusters = bootstrap.clusters(*(column.astype(str).tolist() for column in (table.authors(), table.ids())))
    return DecoderOutputs(cells, **outputs, coordinates=table.coordinates(), clusters=clusters)


def s2_levels(cells: Scheme) -> Float[np.ndarray, "T"]:
    """Returns the S2 level after each token: the level with as many cells as the tokens so far can distinguish.

    The levels of schemes other than S2 are not integers.
    """
    return np.log2(np.cumprod(cells.vocab_sizes, dtype=np.float64) / 6) / 2


def cell_km(cells: Scheme) -> Float[np.ndarray, "T"]:
    """Returns the edge in km of a square with the mean area of a cell, after each token.

    For S2, the edge is 9,220 km at level 0 and 9 m at level 20.
    """
    return math.sqrt(4 * math.pi / 6) * distance.EARTH_RADIUS_KM / 2 ** s2_levels(cells)


def _votes(near: Int[np.ndarray, "n M T"], tokens: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "n T"]:
    """Returns the number of neighbors in the cell of `tokens`, after each token."""
    return np.cumprod(near == tokens[:, None], axis=-1).sum(axis=1)


def _ratios(seen: DecoderOutputs, scoring: EvaluateSettings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns numerators and denominators, [n, T] each, of the estimates of every token.

    An estimate is the sum of its numerators over photos, divided by the sum of its denominators. In the names of the
    estimates, "held" means that a neighbor of the photo is in the right cell. `held_wrong_by_chance` counts the
    neighbors of another photo, chosen by a random permutation of the photos with scoring.seed.
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


def split_figures(seen: DecoderOutputs, scoring: EvaluateSettings) -> dict[str, Any]:
    """Returns the figures of one split: all estimates per level, and the estimates of CAUSES also over all levels.

    An estimate is None if its denominator is zero. `bottleneck` is the index of the level that loses most of the
    GeoScore.
    """
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
        error = calibration_error((b["photos"], b["confidence"], b["accuracy"]) for b in reliability)
        levels.append(
            {**estimates, "photos_wrong": len(km), "km_quartiles": quartiles,
             "calibration_error": {"value": error}, "reliability": reliability}
        )  # fmt: skip
    at = {name: i for i, name in enumerate(ratios)}
    worst = int(values[at["lost"]].argmax())
    return {
        "photos": len(seen.tokens),
        "bottleneck": worst,
        "bottleneck_in_resamples": round(float((samples[:, at["lost"]].argmax(axis=1) == worst).mean()), 6),
        "levels": levels,
        "all_levels": {name: _estimate(values[at[name]].sum(), samples[:, at[name]].sum(axis=1)) for name in CAUSES},
    }


def _estimate(value: float, samples: Float[np.ndarray, "R"]) -> dict[str, float] | None:
    if math.isnan(value):
        return None
    low, high = np.nanpercentile(samples, (2.5, 97.5))  # NaN: a resample without any photo of a rare kind
    return {name: round(float(of), 6) for name, of in (("value", value), ("low", low), ("high", high))}


def _reliability(confidence: Float[np.ndarray, "n"], hit: Bool[np.ndarray, "n"]) -> list[dict[str, Any]]:
    """Returns mean confidence and accuracy of up to BINS bins with equally many photos, least confident first."""
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(BINS, len(hit)))
    return [
        {"photos": len(b), **{name: round(float(of[b].mean()), 6) for name, of in
                              (("confidence", confidence), ("accuracy", hit))}}
        for b in bins
    ]  # fmt: skip


def bottleneck_sentence(figures: Mapping[str, Any], split: str) -> str:
    """Returns one sentence on the bottleneck of a split: the level at which answers lose most of the GeoScore."""
    of = figures["splits"][split]
    at, level = of["levels"][of["bottleneck"]], figures["levels"][of["bottleneck"]]["level"]
    if not at["photos_wrong"]:
        return f"{split}: every greedy answer is in the right cell of every level."
    sure, first = of["bottleneck_in_resamples"], formats.percent(at["first_wrong"]["value"])
    doubt = f"; in {formats.percent(1 - sure)} of resamples another level loses more" if sure < _SURE else ""
    return (
        f"{split}: level {level:g} is the bottleneck: the {first} of photos whose answer first leaves the right cell "
        f"there account for {formats.percent_interval(at['lost'])} of the GeoScore lost, and half of them are more "
        f"than {formats.km(at['km_quartiles'][1])} off{doubt}."
    )


def cause_sentence(figures: Mapping[str, Any], split: str) -> str:
    """Returns one sentence with the share of the lost GeoScore that each of CAUSES accounts for."""
    of = figures["splits"][split]
    if not of["all_levels"]["lost_outvoted"]:
        return f"{split}: no GeoScore is lost."
    none, outvoted, choosing = (formats.percent_interval(of["all_levels"][name]) for name in CAUSES)
    return (
        f"{split}: of the GeoScore lost, {none} is from photos with no neighbor in the right cell, {outvoted} from "
        f"photos with more neighbors in the chosen cell than in the right one, and {choosing} from photos with at "
        "least as many neighbors in the right cell."
    )
