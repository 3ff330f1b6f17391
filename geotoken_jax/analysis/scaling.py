"""Training runs of a scaling study, and the table of their results.

Each run is a variant of the work directory, so `train` makes and resumes it like any other variant. Runs are numbered,
so that SLURM_ARRAY_TASK_ID can select one. The last run trains the held-out size, whose loss is forecast and stored
before the training.

The loss of a run is the cross-entropy summed over all tokens of a photo, in nats. It is not weighted by level, so it is
minus the log-likelihood of the photo's cell, and runs with different level weights are comparable. One half of the
validation photos chooses the step that counts. The other half gives its loss and accuracy.

Compute is counted in full, with projections, memory and output layer: examples times `flops.per_example`. It is not
6 N D, because N counts only the layers.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax.analysis.scaling_law import Points
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model import flops
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.layers import GATED
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Workdir

#: Folder of a study in the work directory, and files in it.
FOLDER, FORECAST, TESTED, RUNS, FIT = "scaling", "forecast.json", "tested.json", "runs.json", "fit.json"
CHECK = "check.json"  # of stages/coordinate_check.py
#: Subfolders: seconds of each run, and the messages of runs that diverged.
SECONDS, DIVERGED = "seconds", "diverged"
#: Values of Run.axis. The law is fitted to the runs of the first three.
GRID, PHOTOS, SEED, NEIGHBORS, RATE, HELD_OUT = "grid", "photos", "seed", "neighbors", "learning rate", "held out"
FITTED = (GRID, PHOTOS, SEED)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    label: name of the variant. axis: setting that the run varies: `grid` (size and compute), `photos`, `seed`,
    `neighbors`, `learning rate`, or `held out` for the forecast run. size: name of the model size, or of the entry of
    config.scaling.transfer. photos: distinct photos that the run trains on. unique: these photos and their views, U of
    the law. examples: number of examples, D. config: complete configuration of the run. parameters: N of the law, see
    `layer_parameters`. flops: operations per example, see `flops.per_example`. budget: operations that the run may
    spend; 0 if its number of examples is given instead.
    """

    label: str
    axis: str
    size: str
    photos: int
    unique: int
    examples: int
    config: Config
    parameters: int
    flops: float
    budget: float

    @property
    def compute(self) -> float:
        """Operations of the whole training."""
        return self.examples * self.flops


def layer_parameters(s: ModelSettings) -> int:
    """Returns N of the law in scaling_law.py: the number of weights in encoder and decoder layers, without embedding
    tables, input and output projections, and biases."""
    feed_forward = (3 if s.activation in GATED else 2) * s.width * s.feed_forward
    encoder, decoder = 4 * s.width**2 + feed_forward, 8 * s.width**2 + feed_forward
    return s.encoder_layers * encoder + s.decoder_layers * decoder


def runs(config: Config) -> list[Run]:
    """Returns all runs of config.scaling in the order of their numbers; the held-out run is the last.

    Raises SettingsError if the configuration has no scaling study, or if a run would have less than one batch.
    """
    s = scaling_settings(config)
    corners = dict.fromkeys((s.budgets[0], s.budgets[-1]))
    plan = [_run(config, GRID, size, budget=budget) for budget in s.budgets for size in s.fitted]
    plan += _photo_runs(config, s)
    for seed in s.seeds:
        changes = dict(train=dict(seed=seed))
        plan += [
            _run(config, SEED, size, changes, f"seed_{seed}", budget=budget)
            for size in dict.fromkeys((s.fitted[0], s.fitted[-1]))
            for budget in corners
        ]
    middle = _run(config, GRID, s.reference, budget=s.budgets[len(s.budgets) // 2])
    for n in s.neighbors:
        changes = dict(model=dict(neighbors=n, copy_head=config.model.copy_head and n > 0))
        plan.append(_run(config, NEIGHBORS, s.reference, changes, f"{n}_neighbors", examples=middle.examples))
    for name, _ in s.transfer:
        for rate in s.rates:
            changes = dict(train=dict(optimizer=dict(learning_rate=rate)))
            plan.append(_run(config, RATE, name, changes, f"rate_{rate:g}", examples=s.transfer_examples))
    return [*plan, _run(config, HELD_OUT, s.held_out, budget=s.held_out_budget)]


def _photo_runs(config: Config, s: ScalingSettings) -> list[Run]:
    """Returns the runs of the axis `photos`."""
    if not s.epochs:
        return [
            _run(config, PHOTOS, s.reference, dict(data=dict(photos=n)), f"{n}_photos", budget=budget)
            for n in s.photos[:-1]
            for budget in s.budgets
        ]
    views = 1 + config.embed.views.count
    return [
        _run(
            config, PHOTOS, s.reference, dict(data=dict(photos=n)), f"{n}_photos_{s.epochs}_epochs",
            examples=s.epochs * n * views,
        )
        for n in s.photos
    ]  # fmt: skip


def run_label(size: str, budget: float, part: str = "") -> str:
    """Returns the label of the run that trains a size with a budget of operations. part: further part of the label."""
    return "_".join(filter(None, (size, f"{budget:.3g}".replace("+", "") if budget else "", part)))


def scaling_settings(config: Config) -> ScalingSettings:
    """Returns config.scaling. Raises SettingsError if the configuration has no such section."""
    if config.scaling is None:
        raise SettingsError(f"configs/{config.name}.py has no section `scaling`: use --config=configs/scaling.py")
    return config.scaling


def _run(
    config: Config,
    axis: str,
    size: str,
    changes: Mapping[str, Any] | None = None,
    part: str = "",
    examples: int = 0,
    budget: float = 0.0,
) -> Run:
    """Returns a run that reads a number of examples, or as many as its budget of operations allows.

    size: name in config.scaling.sizes, or in config.scaling.transfer if the axis is RATE. changes: further changes to
    the configuration. part: last part of the label.
    """
    s, label = scaling_settings(config), run_label(size, budget, part)
    key = "transfer" if axis == RATE else "sizes"
    sized = config.changed(dict(getattr(s, key))[size], f"scaling.{key}.{size}")
    data = dict(data=dict(photos=s.photos[-1], split_validation=True))
    changed = sized.changed(data, "scaling").changed(changes or {}, "scaling")
    per_example, batch = flops.per_example(changed.model), changed.train.batch_size
    steps = int((examples or budget / per_example) // batch)
    if not steps:
        cause = f"budgets has {budget:g}" if budget else f"transfer_examples is {examples}"
        raise SettingsError(
            f"config.scaling.{cause}, less than one batch of {batch} examples of {size}: use {batch * per_example:.2g} "
            f"operations, which are {batch} examples, or more"
        )
    interval = -(-steps // s.validations)
    train = dict(examples=steps * batch, evaluate_every=interval, log_every=interval)
    full = changed.changed(dict(train=train, variants={label: {}}), "scaling")
    photos = full.data.photos
    unique = photos * (1 + full.embed.views.count)
    parameters = layer_parameters(full.model)
    return Run(label, axis, size, photos, unique, steps * batch, full, parameters, per_example, budget)


def table(config: Config, workdir: Workdir) -> list[dict[str, Any]]:
    """Returns one row per complete run, in the order of run numbers.

    A row has the run's number, label, axis, size, budget, parameters, photos, unique, examples, neighbors, seed, width,
    parametrization and rate (the learning rate), and these fields. `loss`: loss in nats per photo, at the step that the
    other half of the validation photos chooses; None if the run diverged. `accuracy`: share of greedy answers of the
    same photos within each of THRESHOLDS_KM. `seen`: examples until this step. `compute`: floating-point operations of
    the whole training. `wall` and `cpu`: seconds of the training, in process 0; absent if they were not recorded.
    """
    rows, folder = [], workdir.path / FOLDER
    for number, one in enumerate(runs(config)):
        manifest = workdir.finished(f"geotoken/{one.label}")
        diverged = folder / DIVERGED / f"{one.label}.json"
        if manifest is None and not diverged.exists():
            continue
        row: dict[str, Any] = {"number": number}
        for name in ("label", "axis", "size", "budget", "parameters", "photos", "unique", "examples"):
            row[name] = getattr(one, name)
        model, train = one.config.model, one.config.train
        row |= {"neighbors": model.neighbors, "seed": train.seed}
        row |= {"width": model.width, "parametrization": model.parametrization}
        row |= {"rate": train.optimizer.learning_rate, "compute": one.compute}
        row |= {"loss": None, "accuracy": [0.0] * len(THRESHOLDS_KM), "seen": 0}
        if manifest:
            best = _scored(workdir.path / manifest.folder, manifest.facts["best_step"])
            row["loss"] = sum(value for name, value in best.items() if name.startswith("scored/loss_level_"))
            row["accuracy"] = [best[f"scored/within_{km}_km"] for km in THRESHOLDS_KM]
            row["seen"] = manifest.facts["best_step"] * train.batch_size
        seconds = folder / SECONDS / f"{one.label}.json"
        rows.append(row | (json.loads(seconds.read_text()) if seconds.exists() else {}))
    return rows


def _scored(folder: epath.Path, step: int) -> dict[str, float]:
    """Returns the metrics of one step of a training run on the validation photos that do not choose the step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["step"] == step and "scored/loss" in line)


def of_axes(rows: Sequence[dict[str, Any]], *axes: str) -> list[dict[str, Any]]:
    """Returns the rows of the axes."""
    return [row for row in rows if row["axis"] in axes]


def points(rows: Sequence[Mapping[str, Any]] | Sequence[Run]) -> Points:
    """Returns runs, or rows of `table`, as the points of the law."""

    def column(name: str) -> np.ndarray:
        return np.array([row[name] if isinstance(row, Mapping) else getattr(row, name) for row in rows], float)

    return Points(*(column(field.name) for field in dataclasses.fields(Points)))


def losses(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "n"]:
    """Returns the losses of rows of `table`, infinite for a run that diverged."""
    return np.array([np.inf if row["loss"] is None else row["loss"] for row in rows])


def within(coordinates: Float[np.ndarray, "n 2"], truth: Float[np.ndarray, "n 2"]) -> list[float]:
    """Returns the share of photos within each of THRESHOLDS_KM of the truth; a prediction that is NaN is a miss."""
    km = great_circle_km(*coordinates.T, *truth.T)
    return [float(np.mean(km <= limit)) for limit in THRESHOLDS_KM]


def by_candidates(
    listed: list[list[dict[str, Any]]], truth: Float[np.ndarray, "n 2"], s: ScalingSettings
) -> list[dict[str, Any]]:
    """Returns accuracy with K samples per photo, for each K of s.candidates.

    The candidates of a photo are the greedy candidate and K samples. `count`: K. `chosen`: accuracy of the most
    probable candidate. `nearest`: accuracy of the candidate nearest to the truth. listed: candidates per photo from
    predictions/, in which equal samples are one candidate with a count; K samples are therefore drawn from the counts
    without replacement, with s.seed.
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
        row = {"count": k, "chosen": within(np.array(chosen), truth)}
        results.append({**row, "nearest": within(np.array(nearest), truth)})
    return results
