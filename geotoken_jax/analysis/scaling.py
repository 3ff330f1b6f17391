"""A scaling study: runs that differ in size, data, neighbors and compute, a law fitted to them, and a forecast kept.

Each run is a variant of the work directory, so that `train` makes, resumes and keeps it as any other. One number stands
for one run, as SLURM_ARRAY_TASK_ID does; the last trains the held-out size, whose loss is forecast first and written
down. The loss of a run is the cross-entropy of all of a photo's tokens, summed, in nats: not weighted by level, so that
it is minus the log-likelihood of a place and runs compare whatever their weights.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import settings, workdir
from geotoken_jax.analysis import scaling_law
from geotoken_jax.analysis.experiment import Stage
from geotoken_jax.analysis.masking import Masked
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model import flops
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.layers import GATED

#: The folder of what is made of the runs, and its files.
FOLDER, FORECAST, TESTED, RUNS, FIT = "scaling", "forecast.json", "tested.json", "runs.json", "fit.json"


@dataclasses.dataclass(frozen=True)
class ScalingSettings:
    """sizes: name, and the sections and keys that make it, smallest first. held_out: the one that is not fitted, and
    held_out_photos: of `photos`, which it is trained on. photos: so many are trained on, fewest first, and so many
    examples of them are seen, until the loss falls no longer. validations: of a run, of which the best counts.
    reference: the size at which all that follows is varied. neighbors: beside the configuration's. seeds: beside the
    configuration's, at the fewest photos. budgets: floating-point operations of training, each spent on every size but
    the held-out one. gallery: photos in it at test time, a smaller one in each larger. candidates: of a photo at test
    time, up to config.predict.samples. split: that is tested. resamples, seed: of the bootstrap over runs, and of the
    choice among gallery and candidates. note, limits: what the document says of the study and, line by line, of what
    does not transfer from it, by who has read it."""

    sizes: tuple[tuple[str, Any], ...]
    held_out: str
    held_out_photos: int
    photos: tuple[tuple[int, int], ...]
    validations: int
    reference: str
    neighbors: tuple[int, ...]
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    gallery: tuple[int, ...]
    candidates: tuple[int, ...]
    split: str
    resamples: int
    seed: int
    note: str
    limits: tuple[str, ...]

    def __post_init__(self):
        for key in ("held_out", "reference"):
            if getattr(self, key) not in dict(self.sizes):
                raise ValueError(
                    f"config.scaling.{key} is {getattr(self, key)!r}: choose one of config.scaling.sizes, which are "
                    f"{', '.join(dict(self.sizes))}"
                )
        if self.held_out_photos not in dict(self.photos):
            raise ValueError(
                f"config.scaling.held_out_photos is {self.held_out_photos}: choose one of config.scaling.photos, which "
                f"are {', '.join(map(str, dict(self.photos)))}"
            )
        if self.reference == self.held_out:
            raise ValueError(f"config.scaling.reference is the held-out size, {self.held_out}: choose another")

    @property
    def fitted(self) -> list[str]:
        return [name for name, _ in self.sizes if name != self.held_out]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training. label: its variant's name. axis: what it is there for: `grid`, `compute`, `neighbors`, `seed` or
    `held out`. config: its whole configuration. parameters, flops: see `layer_parameters` and `flops.per_example`."""

    label: str
    axis: str
    size: str
    photos: int
    config: Any
    parameters: int
    flops: float


def layer_parameters(s: ModelSettings) -> int:
    """Returns N of the law: the weights of encoder and decoder layers, without tables, projections and biases."""
    feed_forward = (3 if s.activation in GATED else 2) * s.width * s.feed_forward
    encoder, decoder = 4 * s.width**2 + feed_forward, 8 * s.width**2 + feed_forward
    return s.encoder_layers * encoder + s.decoder_layers * decoder


def runs(config: Any) -> list[Run]:
    """Returns every run of config.scaling in the order of their numbers; the held-out size comes last."""
    s = read(config)
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


def read(config: Any) -> ScalingSettings:
    """Returns config.scaling. Raises SettingsError."""
    return settings.read(ScalingSettings, config.scaling, "scaling")


def _run(
    config: Any, s: ScalingSettings, label: str, axis: str, size: str, photos: int, examples: int, changes: Any = None
) -> Run:
    found = settings.changed(config, dict(s.sizes)[size], f"scaling.sizes.{size}")
    found = settings.changed(found, changes or {}, "scaling")
    steps = examples // found.train.batch_size
    every = max(1, -(-steps // s.validations))
    found.train.update(examples=examples, evaluate_every=every, log_every=every)
    found.data.photos = photos
    found.variants = {label: {}}
    model = settings.read(ModelSettings, found.model, "model")
    return Run(label, axis, size, photos, found, layer_parameters(model), flops.per_example(model))


def run(config: Any, path: str, stages: Mapping[str, Stage], index: int | None) -> None:
    """Makes the run of that number, or all of them; what is complete is kept. stages: `train` and `predict`.

    Raises SettingsError if there is no such run, StageError where the held-out size is asked for before the grid.
    """
    plan, s = runs(config), read(config)
    if index is not None and not 0 <= index < len(plan):
        raise settings.SettingsError(f"--index={index}: config.scaling has the runs 0 to {len(plan) - 1}")
    for one in plan if index is None else [plan[index]]:
        with _timed(epath.Path(path) / FOLDER / "seconds" / f"{one.label}.json"):
            if one.axis == "held out":
                _forecast(config, path, one)
            stages["train"](one.config, path, [one.label])
            if one.axis == "grid" and one.size == s.reference and one.photos == s.photos[-1][0]:
                stages["predict"](one.config, path, [one.label])
                _test(one, path, s)


@contextlib.contextmanager
def _timed(file: epath.Path) -> Iterator[None]:
    """Adds wall and processor seconds to a file; a run that was interrupted has had several parts."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        before = json.loads(file.read_text()) if file.exists() else {"wall": 0.0, "cpu": 0.0}
        took = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        file.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(file, {name: round(before[name] + took[name], 1) for name in took})


def table(config: Any, path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns one row a complete run, in the order of their numbers, with everything that is fitted or shown.

    loss: nats a photo, on validation, where it was lowest. examples, compute: in all, and operations of training on
    them. seen: examples until the loss was lowest. accuracy: of greedy answers at each of THRESHOLDS_KM, on the same
    photos. wall, cpu: seconds, with what else the run made.
    """
    path, found = epath.Path(path), []
    for number, one in enumerate(runs(config)):
        folder = path / "geotoken" / one.label
        if not (folder / "manifest.json").exists():
            continue
        made = workdir.read_manifest(path, f"geotoken/{one.label}")
        best = _validated(folder, made.facts["best_step"])
        seen = made.facts["best_step"] * one.config.train.batch_size
        row: dict[str, Any] = {"number": number, "label": one.label, "axis": one.axis, "size": one.size}
        row |= {"parameters": one.parameters, "photos": one.photos, "neighbors": one.config.model.neighbors}
        row |= {"examples": made.counts["examples"], "seen": seen, "compute": made.counts["examples"] * one.flops}
        row["loss"] = sum(value for name, value in best.items() if name.startswith("validation/loss_level_"))
        row["accuracy"] = [best[f"validation/within_{km}_km"] for km in THRESHOLDS_KM]
        seconds = path / FOLDER / "seconds" / f"{one.label}.json"
        found.append(row | (json.loads(seconds.read_text()) if seconds.exists() else {}))
    return found


def _validated(folder: epath.Path, step: int) -> dict[str, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["step"] == step and "validation/loss" in line)


def _forecast(config: Any, path: str, one: Run) -> None:
    """Writes down the loss of the held-out run, from the grid alone. Raises StageError if it is too early or late."""
    file = epath.Path(path) / FOLDER / FORECAST
    if file.exists():
        return
    if (epath.Path(path) / "geotoken" / one.label / "manifest.json").exists():
        raise workdir.StageError(
            f"{file} is missing and geotoken/{one.label} is complete: a loss is forecast before it is measured, so "
            "remove that folder and run it again"
        )
    rows, s = [row for row in table(config, path) if row["axis"] == "grid"], read(config)
    missing = {run.label for run in runs(config) if run.axis == "grid"} - {row["label"] for row in rows}
    if missing:
        raise workdir.StageError(
            f"the held-out run {one.label} waits for the grid: run `geotoken scaling run` for "
            f"{', '.join(sorted(missing))} first"
        )
    law, resampled = scaling_law.fit(*_columns(rows), s.resamples, s.seed)
    loss = float(law(one.parameters, one.photos))
    low, high = np.percentile([other(one.parameters, one.photos) for other in resampled], (2.5, 97.5)).tolist()
    grid = {row["label"]: workdir.digest(path, f"geotoken/{row['label']}") for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_json(file, {"label": one.label, "loss": loss, "low": low, "high": high, "grid": grid})


def _columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parameters, photos, loss = np.array([(row["parameters"], row["photos"], row["loss"]) for row in rows]).T
    return parameters, photos, loss


def fit(config: Any, path: str) -> dict[str, Any]:
    """Writes scaling/runs.json, the table of runs, and scaling/fit.json, which is returned: the law with its intervals,
    the forecast with its miss, the frontier, how accuracy goes with loss, and what was tested.

    Raises StageError if the grid has too few runs to fit five numbers.
    """
    rows, s, folder = table(config, path), read(config), epath.Path(path) / FOLDER
    grid = [row for row in rows if row["axis"] == "grid"]
    if len(grid) < 6:
        raise workdir.StageError(
            f"{folder} has {len(grid)} runs of the grid, and the law has five numbers: run at least 6 of them first"
        )
    law, resampled = scaling_law.fit(*_columns(grid), s.resamples, s.seed)
    parameters, photos, losses = _columns(grid)
    found: dict[str, Any] = {
        "law": scaling_law.intervals(law, resampled),
        "error": float(np.sqrt(np.mean((law(parameters, photos) - losses) ** 2))),
        "noise": _noise(rows, s),
        "frontier": _frontier(config, s, law),
        "accuracy": _accuracy_against_loss(grid),
        "forecast": _miss(rows, folder, s),
        "tested": json.loads((folder / TESTED).read_text()) if (folder / TESTED).exists() else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write_json(folder / RUNS, rows)  # pyright: ignore[reportArgumentType]
    workdir.write_json(folder / FIT, found)
    return found


def _noise(rows: list[dict[str, Any]], s: ScalingSettings) -> float | None:
    """Returns the standard deviation of the loss over seeds, in nats; None where there is one alone."""
    alike = [row["loss"] for row in rows if row["axis"] == "seed"]
    alike += [row["loss"] for row in rows if row["label"] == f"{s.reference}_{s.photos[0][0]}"]
    return float(np.std(alike, ddof=1)) if len(alike) > 1 else None


def _miss(rows: list[dict[str, Any]], folder: epath.Path, s: ScalingSettings) -> dict[str, Any] | None:
    """Returns the forecast beside what was measured, beside what one would say who only saw the largest of the grid,
    and beside how far the grid's losses lie apart; None before the held-out run is complete."""
    held_out = next((row for row in rows if row["axis"] == "held out"), None)
    if held_out is None or not (folder / FORECAST).exists():
        return None
    forecast = json.loads((folder / FORECAST).read_text())
    naive = next(row["loss"] for row in rows if row["label"] == f"{s.fitted[-1]}_{held_out['photos']}")
    fitted = [row["loss"] for row in rows if row["axis"] == "grid"]
    return {**forecast, "measured": held_out["loss"], "as_the_largest": naive, "spread": max(fitted) - min(fitted)}


def _frontier(config: Any, s: ScalingSettings, law: scaling_law.Law) -> list[dict[str, Any]]:
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


def _accuracy_against_loss(grid: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns at each threshold the line through the grid's runs: points of accuracy for a nat less, and the share of
    the variance that it explains."""
    loss, lines = np.array([row["loss"] for row in grid]), []
    for i, km in enumerate(THRESHOLDS_KM):
        accuracy = np.array([row["accuracy"][i] for row in grid])
        slope, _ = np.polyfit(loss, accuracy, 1)
        explained = np.corrcoef(loss, accuracy)[0, 1] ** 2 if np.ptp(accuracy) else 0.0
        lines.append({"km": km, "a_nat_less": float(-slope), "explained": float(explained)})
    return lines


def _test(one: Run, path: str, s: ScalingSettings) -> None:
    """Writes scaling/tested.json: how accuracy grows with the gallery and with the candidates of a photo."""
    file = epath.Path(path) / FOLDER / TESTED
    if file.exists():
        return
    truth = Table(epath.Path(path) / "queries" / s.split).coordinates()
    order = np.random.default_rng(s.seed).permutation(len(Table(epath.Path(path) / "gallery")))
    masked, every = Masked(one.config, epath.Path(path), one.label, s.split), np.arange(len(truth))
    galleries = []
    for n in s.gallery:
        first, decoder = masked(every, np.sort(order[:n]))
        galleries.append({"photos": n, "first_neighbor": _within(first, truth), "decoder": _within(decoder, truth)})
    lines = (epath.Path(path) / "predictions" / one.label / f"{s.split}.jsonl").read_text().splitlines()
    candidates = _by_candidates([json.loads(line)["candidates"] for line in lines], truth, s)
    workdir.write_json(
        file,
        {"label": one.label, "split": s.split, "photos": len(truth), "gallery": galleries, "candidates": candidates},
    )


def _within(coordinates: Float[np.ndarray, "n 2"], truth: Float[np.ndarray, "n 2"]) -> list[float]:
    """Returns the share of photos within each of THRESHOLDS_KM; NaN is within none."""
    km = great_circle_km(*coordinates.T, *truth.T)
    return [float(np.mean(km <= limit)) for limit in THRESHOLDS_KM]


def _by_candidates(
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
        row = {"candidates": k, "chosen": _within(np.array(chosen), truth)}
        found.append({**row, "nearest": _within(np.array(nearest), truth)})
    return found
