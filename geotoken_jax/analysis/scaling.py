"""A scaling study: runs that differ in size, data, neighbors and compute, a law fitted to them, and a forecast kept.

Each run is a variant of the work directory, so that `train` makes, resumes and keeps it as any other. One number stands
for one run, as SLURM_ARRAY_TASK_ID does; the last trains the held-out size, whose loss is forecast first and written
down. The loss of a run is the cross-entropy of all of a photo's tokens, summed, in nats: not weighted by level, so that
it is minus the log-likelihood of a place and runs compare whatever their weights.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax.analysis import scaling_law
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model import flops
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.layers import GATED
from geotoken_jax.settings import SettingsError

#: The folder of what is made of the runs, and its files.
FOLDER, FORECAST, TESTED, RUNS, FIT = "scaling", "forecast.json", "tested.json", "runs.json", "fit.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training. label: its variant's name. axis: what it is there for: `grid`, `compute`, `neighbors`, `seed` or
    `held out`. config: its whole configuration. parameters, flops: see `layer_parameters` and `flops.per_example`."""

    label: str
    axis: str
    size: str
    photos: int
    config: Config
    parameters: int
    flops: float


def layer_parameters(s: ModelSettings) -> int:
    """Returns N of the law: the weights of encoder and decoder layers, without tables, projections and biases."""
    feed_forward = (3 if s.activation in GATED else 2) * s.width * s.feed_forward
    encoder, decoder = 4 * s.width**2 + feed_forward, 8 * s.width**2 + feed_forward
    return s.encoder_layers * encoder + s.decoder_layers * decoder


def runs(config: Config) -> list[Run]:
    """Returns every run of config.scaling in the order of their numbers; the held-out size comes last."""
    s = study(config)
    (fewest, few_examples), (most, examples) = s.photos[0], s.photos[-1]
    plan = [
        _run(config, s, f"{size}_{photos}", "grid", size, photos, seen)
        for size in s.fitted
        for photos, seen in s.photos
    ]
    for budget in s.budgets:
        for size in s.fitted:
            label = spent_on(size, budget)
            each = _run(config, s, label, "compute", size, most, examples).flops
            plan.append(_run(config, s, label, "compute", size, most, int(budget / each)))
    for n in s.neighbors:
        changes = dict(model=dict(neighbors=n, copy_head=config.model.copy_head and n > 0))
        label = f"{s.reference}_{n}_neighbors"
        plan.append(_run(config, s, label, "neighbors", s.reference, most, examples, changes))
    for seed in s.seeds:
        label, changes = f"{s.reference}_{fewest}_seed_{seed}", dict(train=dict(seed=seed))
        plan.append(_run(config, s, label, "seed", s.reference, fewest, few_examples, changes))
    photos, examples = s.held_out_photos, dict(s.photos)[s.held_out_photos]
    plan.append(_run(config, s, f"{s.held_out}_{photos}", "held out", s.held_out, photos, examples))
    return plan


def spent_on(size: str, budget: float) -> str:
    """Returns the label of the run that spends a budget on a size."""
    return f"{size}_{budget:g}".replace("+", "")


def study(config: Config) -> ScalingSettings:
    """Returns config.scaling. Raises SettingsError if the configuration has none."""
    if config.scaling is None:
        raise SettingsError(f"configs/{config.name}.py has no section `scaling`: use one that has, configs/scaling.py")
    return config.scaling


def _run(
    config: Config, s: ScalingSettings, label: str, axis: str, size: str, photos: int, examples: int,
    changes: Any = None,
) -> Run:  # fmt: skip
    found = config.changed(dict(s.sizes)[size], f"scaling.sizes.{size}").changed(changes or {}, "scaling")
    steps = examples // found.train.batch_size
    every = max(1, -(-steps // s.validations))
    train = dict(examples=examples, evaluate_every=every, log_every=every)
    found = found.changed(dict(train=train, data=dict(photos=photos), variants={label: {}}), "scaling")
    return Run(label, axis, size, photos, found, layer_parameters(found.model), flops.per_example(found.model))


def table(config: Config, workdir: Workdir) -> list[dict[str, Any]]:
    """Returns one row a complete run, in the order of their numbers, with everything that is fitted or shown.

    loss: nats a photo, on validation, where it was lowest. examples, compute: in all, and operations of training on
    them. seen: examples until the loss was lowest. accuracy: of greedy answers at each of THRESHOLDS_KM, on the same
    photos. wall, cpu: seconds, with what else the run made.
    """
    found = []
    for number, one in enumerate(runs(config)):
        made = workdir.finished(f"geotoken/{one.label}")
        if made is None:
            continue
        best = _validated(workdir.path / made.folder, made.facts["best_step"])
        seen = made.facts["best_step"] * one.config.train.batch_size
        row: dict[str, Any] = {"number": number, "label": one.label, "axis": one.axis, "size": one.size}
        row |= {"parameters": one.parameters, "photos": one.photos, "neighbors": one.config.model.neighbors}
        row |= {"examples": made.counts["examples"], "seen": seen, "compute": made.counts["examples"] * one.flops}
        row["loss"] = sum(value for name, value in best.items() if name.startswith("validation/loss_level_"))
        row["accuracy"] = [best[f"validation/within_{km}_km"] for km in THRESHOLDS_KM]
        seconds = workdir.path / FOLDER / "seconds" / f"{one.label}.json"
        found.append(row | (json.loads(seconds.read_text()) if seconds.exists() else {}))
    return found


def _validated(folder: epath.Path, step: int) -> dict[str, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["step"] == step and "validation/loss" in line)


def columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns parameters, photos and loss of each run."""
    parameters, photos, loss = np.array([(row["parameters"], row["photos"], row["loss"]) for row in rows]).T
    return parameters, photos, loss


def noise(rows: list[dict[str, Any]], s: ScalingSettings) -> float | None:
    """Returns the standard deviation of the loss over seeds, in nats; None where there is one alone."""
    alike = [row["loss"] for row in rows if row["axis"] == "seed"]
    alike += [row["loss"] for row in rows if row["label"] == f"{s.reference}_{s.photos[0][0]}"]
    return float(np.std(alike, ddof=1)) if len(alike) > 1 else None


def miss(rows: list[dict[str, Any]], folder: epath.Path, s: ScalingSettings) -> dict[str, Any] | None:
    """Returns the forecast beside what was measured, beside what one would say who only saw the largest of the grid,
    and beside how far the grid's losses lie apart; None before the held-out run is complete."""
    held_out = next((row for row in rows if row["axis"] == "held out"), None)
    if held_out is None or not (folder / FORECAST).exists():
        return None
    forecast = json.loads((folder / FORECAST).read_text())
    naive = next(row["loss"] for row in rows if row["label"] == f"{s.fitted[-1]}_{held_out['photos']}")
    fitted = [row["loss"] for row in rows if row["axis"] == "grid"]
    return {**forecast, "measured": held_out["loss"], "as_the_largest": naive, "spread": max(fitted) - min(fitted)}


def frontier(config: Config, s: ScalingSettings, law: scaling_law.Law) -> list[dict[str, Any]]:
    """Returns the size and the photos of the smallest loss at each compute, by the law, among the sizes of the study
    and as many photos as it has; each as many times as the study sees them."""
    seen = np.log(np.array(s.photos, float))
    photos = np.geomspace(s.photos[0][0], s.photos[-1][0], 200)
    examples = np.exp(np.interp(np.log(photos), *seen.T))
    one_each = {run.size: run for run in runs(config) if run.axis in ("grid", "held out")}
    points = [
        {"compute": float(run.flops * n), "size": name, "photos": float(d), "loss": float(law(run.parameters, d))}
        for name, run in one_each.items()
        for d, n in zip(photos, examples, strict=True)
    ]
    computes = [point["compute"] for point in points]
    found = []
    for most in np.geomspace(min(computes), max(computes), 9)[1:]:
        found.append(min((p for p in points if p["compute"] <= most * 1.0001), key=lambda p: p["loss"]))
    return [point for i, point in enumerate(found) if point not in found[:i]]


def accuracy_against_loss(grid: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns at each threshold the line through the grid's runs: points of accuracy for a nat less, and the share of
    the variance that it explains."""
    loss, lines = np.array([row["loss"] for row in grid]), []
    for i, km in enumerate(THRESHOLDS_KM):
        accuracy = np.array([row["accuracy"][i] for row in grid])
        slope, _ = np.polyfit(loss, accuracy, 1)
        explained = np.corrcoef(loss, accuracy)[0, 1] ** 2 if np.ptp(accuracy) else 0.0
        lines.append({"km": km, "a_nat_less": float(-slope), "explained": float(explained)})
    return lines


def within(coordinates: Float[np.ndarray, "n 2"], truth: Float[np.ndarray, "n 2"]) -> list[float]:
    """Returns the share of photos within each of THRESHOLDS_KM; NaN is within none."""
    km = great_circle_km(*coordinates.T, *truth.T)
    return [float(np.mean(km <= limit)) for limit in THRESHOLDS_KM]


def by_candidates(
    listed: list[list[dict[str, Any]]], truth: Float[np.ndarray, "n 2"], s: ScalingSettings
) -> list[dict[str, Any]]:
    """Returns accuracies of the most probable and of the nearest among the greedy candidate and K samples.

    A file tells equal samples as one with their count, so the first K are drawn from it, without putting back.
    """
    rng, drawn = np.random.default_rng(s.seed), []
    for candidates in listed:
        counts = np.array([candidate["count"] for candidate in candidates])
        counts[0] -= 1  # the greedy one is no sample
        drawn.append(np.concatenate([[0], rng.permutation(np.repeat(np.arange(len(counts)), counts))]))
    found = []
    for k in s.candidates:
        chosen, nearest = [], []
        for candidates, order, at in zip(listed, drawn, truth, strict=True):
            some = [candidates[i] for i in order[: k + 1]]
            places = np.array([(c["latitude"], c["longitude"]) for c in some])
            chosen.append(places[np.argmax([c["log_probability"] for c in some])])
            nearest.append(places[np.argmin(great_circle_km(*places.T, *at))])
        row = {"candidates": k, "chosen": within(np.array(chosen), truth)}
        found.append({**row, "nearest": within(np.array(nearest), truth)})
    return found
