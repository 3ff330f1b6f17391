"""Training runs of a scaling study, which differ in size, photos, neighbors, seed or compute, and their results.

Each run is a variant of the work directory, so `train` makes and resumes it like any other variant. Runs are numbered,
so that SLURM_ARRAY_TASK_ID can select one. The last run trains the held-out size, whose loss is forecast and stored
before the training. The loss of a run is the cross-entropy summed over all tokens of a photo, in nats. It is not
weighted by level, so it is minus the log-likelihood of the photo's cell, and runs with different level weights are
comparable.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax.analysis import scaling_law
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model import flops
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.layers import GATED
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Workdir

#: Folder of a study in the work directory, and files in it.
FOLDER, FORECAST, TESTED, RUNS, FIT = "scaling", "forecast.json", "tested.json", "runs.json", "fit.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    label: name of the variant. axis: setting that the run varies: `grid` (size and photos), `compute`, `neighbors`,
    `seed`, or `held out` for the forecast run. size: name of the model size. photos: distinct photos that the run
    trains on. config: complete configuration of the run. parameters: N of the law, see `layer_parameters`. flops:
    operations per example, see `flops.per_example`.
    """

    label: str
    axis: str
    size: str
    photos: int
    config: Config
    parameters: int
    flops: float


def layer_parameters(s: ModelSettings) -> int:
    """Returns N of the law in scaling_law.py: the number of weights in encoder and decoder layers, without embedding
    tables, input and output projections, and biases."""
    feed_forward = (3 if s.activation in GATED else 2) * s.width * s.feed_forward
    encoder, decoder = 4 * s.width**2 + feed_forward, 8 * s.width**2 + feed_forward
    return s.encoder_layers * encoder + s.decoder_layers * decoder


def runs(config: Config) -> list[Run]:
    """Returns all runs of config.scaling in the order of their numbers; the held-out run is the last."""
    s = scaling_settings(config)
    (fewest, few_examples), (most, examples) = s.photos[0], s.photos[-1]
    plan = [
        _run(config, s, f"{size}_{photos}", "grid", size, photos, seen)
        for size in s.fitted
        for photos, seen in s.photos
    ]
    for budget in s.budgets:
        for size in s.fitted:
            label = spent_on(size, budget)
            per_example = _run(config, s, label, "compute", size, most, examples).flops
            plan.append(_run(config, s, label, "compute", size, most, int(budget / per_example)))
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
    """Returns the label of the run that trains a size with a budget of floating-point operations."""
    return f"{size}_{budget:g}".replace("+", "")


def scaling_settings(config: Config) -> ScalingSettings:
    """Returns config.scaling. Raises SettingsError if the configuration has no such section."""
    if config.scaling is None:
        raise SettingsError(f"configs/{config.name}.py has no section `scaling`: use --config=configs/scaling.py")
    return config.scaling


def _run(
    config: Config, s: ScalingSettings, label: str, axis: str, size: str, photos: int, examples: int,
    changes: Any = None,
) -> Run:  # fmt: skip
    sized = config.changed(dict(s.sizes)[size], f"scaling.sizes.{size}").changed(changes or {}, "scaling")
    steps = examples // sized.train.batch_size
    interval = max(1, -(-steps // s.validations))
    train = dict(examples=examples, evaluate_every=interval, log_every=interval)
    full = sized.changed(dict(train=train, data=dict(photos=photos), variants={label: {}}), "scaling")
    return Run(label, axis, size, photos, full, layer_parameters(full.model), flops.per_example(full.model))


def table(config: Config, workdir: Workdir) -> list[dict[str, Any]]:
    """Returns one row per complete run, in the order of run numbers.

    A row has the run's number, label, axis, size, parameters, photos and neighbors, and these fields. `loss`:
    validation loss in nats per photo at its lowest. `accuracy`: share of greedy answers on validation within each of
    THRESHOLDS_KM, at the same step. `examples`: examples of the whole training. `seen`: examples until the lowest loss.
    `compute`: floating-point operations of the whole training. `wall` and `cpu`: seconds of the training, in process 0;
    absent if they were not recorded.
    """
    rows = []
    for number, one in enumerate(runs(config)):
        manifest = workdir.finished(f"geotoken/{one.label}")
        if manifest is None:
            continue
        best = _validated(workdir.path / manifest.folder, manifest.facts["best_step"])
        seen = manifest.facts["best_step"] * one.config.train.batch_size
        row: dict[str, Any] = {"number": number, "label": one.label, "axis": one.axis, "size": one.size}
        row |= {"parameters": one.parameters, "photos": one.photos, "neighbors": one.config.model.neighbors}
        examples = manifest.counts["examples"]
        row |= {"examples": examples, "seen": seen, "compute": examples * one.flops}
        row["loss"] = sum(value for name, value in best.items() if name.startswith("validation/loss_level_"))
        row["accuracy"] = [best[f"validation/within_{km}_km"] for km in THRESHOLDS_KM]
        seconds = workdir.path / FOLDER / "seconds" / f"{one.label}.json"
        rows.append(row | (json.loads(seconds.read_text()) if seconds.exists() else {}))
    return rows


def _validated(folder: epath.Path, step: int) -> dict[str, float]:
    """Returns the validation metrics of one step of a training run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["step"] == step and "validation/loss" in line)


def columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the parameters, photos and losses of the runs, an array each."""
    parameters, photos, loss = np.array([(row["parameters"], row["photos"], row["loss"]) for row in rows]).T
    return parameters, photos, loss


def noise(rows: list[dict[str, Any]], s: ScalingSettings) -> float | None:
    """Returns the standard deviation, in nats, of the losses of runs that differ only in the seed; None for fewer than
    two runs."""
    losses = [row["loss"] for row in rows if row["axis"] == "seed"]
    losses += [row["loss"] for row in rows if row["label"] == f"{s.reference}_{s.photos[0][0]}"]
    return float(np.std(losses, ddof=1)) if len(losses) > 1 else None


def forecast_error(rows: list[dict[str, Any]], folder: epath.Path, s: ScalingSettings) -> dict[str, Any] | None:
    """Returns the stored forecast with the measured loss and two values to compare with.

    The result is None until the held-out run is complete and the forecast is stored. `measured`: loss of the held-out
    run. `as_the_largest`: loss of the largest fitted size with the same photos, which is the naive forecast. `spread`:
    largest minus smallest loss of the grid.
    """
    held_out = next((row for row in rows if row["axis"] == "held out"), None)
    if held_out is None or not (folder / FORECAST).exists():
        return None
    forecast = json.loads((folder / FORECAST).read_text())
    naive = next(row["loss"] for row in rows if row["label"] == f"{s.fitted[-1]}_{held_out['photos']}")
    fitted = [row["loss"] for row in rows if row["axis"] == "grid"]
    return {**forecast, "measured": held_out["loss"], "as_the_largest": naive, "spread": max(fitted) - min(fitted)}


def frontier(config: Config, s: ScalingSettings, law: scaling_law.Law) -> list[dict[str, Any]]:
    """Returns the size and the number of photos with the smallest loss by the law, within eight amounts of compute.

    Sizes are the sizes of the study, photos are between its fewest and most, and the number of examples is interpolated
    between the study's values of config.scaling.photos. Equal points are returned once.
    """
    log_pairs = np.log(np.array(s.photos, float))
    photos = np.geomspace(s.photos[0][0], s.photos[-1][0], 200)
    examples = np.exp(np.interp(np.log(photos), *log_pairs.T))
    run_of_size = {run.size: run for run in runs(config) if run.axis in ("grid", "held out")}
    points = [
        {"compute": float(run.flops * n), "size": name, "photos": float(d), "loss": float(law(run.parameters, d))}
        for name, run in run_of_size.items()
        for d, n in zip(photos, examples, strict=True)
    ]
    computes = [point["compute"] for point in points]
    best = []
    for limit in np.geomspace(min(computes), max(computes), 9)[1:]:
        best.append(min((p for p in points if p["compute"] <= limit * 1.0001), key=lambda p: p["loss"]))
    return [point for i, point in enumerate(best) if point not in best[:i]]


def accuracy_against_loss(grid: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns a linear fit of accuracy against loss over the grid's runs, per threshold.

    `a_nat_less`: accuracy gained per nat of lower loss. `explained`: share of the variance that the line explains.
    """
    loss, lines = np.array([row["loss"] for row in grid]), []
    for i, km in enumerate(THRESHOLDS_KM):
        accuracy = np.array([row["accuracy"][i] for row in grid])
        slope, _ = np.polyfit(loss, accuracy, 1)
        explained = np.corrcoef(loss, accuracy)[0, 1] ** 2 if np.ptp(accuracy) else 0.0
        lines.append({"km": km, "a_nat_less": float(-slope), "explained": float(explained)})
    return lines


def within(coordinates: Float[np.ndarray, "n 2"], truth: Float[np.ndarray, "n 2"]) -> list[float]:
    """Returns the share of photos within each of THRESHOLDS_KM of the truth; a prediction that is NaN is a miss."""
    km = great_circle_km(*coordinates.T, *truth.T)
    return [float(np.mean(km <= limit)) for limit in THRESHOLDS_KM]


def by_candidates(
    listed: list[list[dict[str, Any]]], truth: Float[np.ndarray, "n 2"], s: ScalingSettings
) -> list[dict[str, Any]]:
    """Returns accuracy with K samples per photo, for each K of s.candidates.

    The candidates of a photo are the greedy candidate and K samples. `chosen`: accuracy of the most probable candidate.
    `nearest`: accuracy of the candidate nearest to the truth. listed: candidates per photo from predictions/, in which
    equal samples are one candidate with a count; K samples are therefore drawn from the counts without replacement,
    with s.seed.
    """
    rng, drawn = np.random.default_rng(s.seed), []
    for candidates in listed:
        counts = np.array([candidate["count"] for candidate in candidates])
        counts[0] -= 1  # the greedy candidate is not a sample
        drawn.append(np.concatenate([[0], rng.permutation(np.repeat(np.arange(len(counts)), counts))]))
    results = []
    for k in s.candidates:
        chosen, nearest = [], []
        for candidates, order, at in zip(listed, drawn, truth, strict=True):
            first = [candidates[i] for i in order[: k + 1]]
            places = np.array([(c["latitude"], c["longitude"]) for c in first])
            chosen.append(places[np.argmax([c["log_probability"] for c in first])])
            nearest.append(places[np.argmin(great_circle_km(*places.T, *at))])
        row = {"candidates": k, "chosen": within(np.array(chosen), truth)}
        results.append({**row, "nearest": within(np.array(nearest), truth)})
    return results
