"""`geotoken scaling run` and `geotoken scaling fit`: train the runs of a scaling study, then fit the scaling law.

`run` may be one job of several processes, which train every run together. `fit` is one process.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import processes
from geotoken_jax.analysis import scaling, scaling_law
from geotoken_jax.analysis.masking import MaskedGallery
from geotoken_jax.analysis.scaling import FIT, FOLDER, FORECAST, RUNS, TESTED
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.manifests import StageError, write_json
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import sweep
from geotoken_jax.workdir import Workdir


def run(config: Config, workdir: Workdir, index: int | None) -> None:
    """Trains one run of the scaling study, or all runs. Complete runs are skipped.

    index: index of the run in scaling.runs, from 0; all runs if None. Raises SettingsError if there is no such run, and
    StageError if the held-out run is due before the grid is complete, or was trained without a forecast.
    """
    plan = scaling.runs(config)
    if index is not None and not 0 <= index < len(plan):
        raise SettingsError(f"--index is {index}: choose a run of config.scaling, 0 to {len(plan) - 1}")
    for one in plan if index is None else [plan[index]]:
        with _timed(workdir.path / FOLDER / "seconds" / f"{one.label}.json"):
            if one.axis == "held out":
                _forecast(config, workdir, one)
            sweep.make(one.config, workdir, one.label, ("train",))


@contextlib.contextmanager
def _timed(file: epath.Path) -> Iterator[None]:
    """Adds the context's wall-clock and CPU seconds to those in a JSON file, which sums all attempts of a run.

    Process 0 measures the seconds and writes the file.
    """
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        if not processes.index():
            before = json.loads(file.read_text()) if file.exists() else {"wall": 0.0, "cpu": 0.0}
            took = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {name: round(before[name] + took[name], 1) for name in took})


def _forecast(config: Config, workdir: Workdir, one: scaling.Run) -> None:
    """Writes scaling/forecast.json, unless it exists: the held-out run's loss, predicted from the grid runs alone.

    Raises StageError if a grid run is incomplete, or if the held-out run was trained without a forecast.
    """
    file = workdir.path / FOLDER / FORECAST
    if file.exists():
        return
    if workdir.finished(f"geotoken/{one.label}"):
        raise StageError(
            f"{file} is missing, but {workdir.path / 'geotoken' / one.label} is complete, and a forecast must precede "
            "its measurement: remove that folder and run `geotoken scaling run` again"
        )
    rows, s = [row for row in scaling.table(config, workdir) if row["axis"] == "grid"], scaling.scaling_settings(config)
    missing = {run.label for run in scaling.runs(config) if run.axis == "grid"} - {row["label"] for row in rows}
    if missing:
        raise StageError(
            f"the forecast for the held-out run {one.label} needs the whole grid, but it lacks the runs "
            f"{', '.join(sorted(missing))}: run `geotoken scaling run` without --index, which makes all runs in order"
        )
    processes.report_progress(f"forecasting {one.label}")
    law, resampled = scaling_law.fit(*scaling.columns(rows), s.resamples, s.seed)
    loss = float(law(one.parameters, one.photos))
    low, high = np.percentile([other(one.parameters, one.photos) for other in resampled], (2.5, 97.5)).tolist()
    grid = {row["label"]: workdir.digest(f"geotoken/{row['label']}") for row in rows}
    if processes.index():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"label": one.label, "loss": loss, "low": low, "high": high, "grid": grid})


def fit(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Writes the table of runs, scaling/runs.json, and the fit, scaling/fit.json. Returns the fit.

    If the reference run on the most photos is complete, predicts with it and writes scaling/tested.json first.

    The fit contains the law with its intervals, the forecast with its error, the compute frontier, accuracy against
    loss, and the results of scaling/tested.json. Raises StageError if the grid has fewer than 6 complete runs: the law
    has five parameters.
    """
    rows, s, folder = scaling.table(config, workdir), scaling.scaling_settings(config), workdir.path / FOLDER
    grid = [row for row in rows if row["axis"] == "grid"]
    if len(grid) < 6:
        raise StageError(
            f"{folder} has {len(grid)} complete grid runs, too few to fit five parameters: complete at least 6 "
            "with `geotoken scaling run` first"
        )
    _test(config, workdir, s)
    law, resampled = scaling_law.fit(*scaling.columns(grid), s.resamples, s.seed)
    parameters, photos, losses = scaling.columns(grid)
    result: dict[str, Any] = {
        "law": scaling_law.intervals(law, resampled),
        "error": float(np.sqrt(np.mean((law(parameters, photos) - losses) ** 2))),
        "noise": scaling.noise(rows, s),
        "frontier": scaling.frontier(config, s, law),
        "accuracy": scaling.accuracy_against_loss(grid),
        "forecast": scaling.forecast_error(rows, folder, s),
        "tested": json.loads((folder / TESTED).read_text()) if (folder / TESTED).exists() else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUNS, rows)  # pyright: ignore[reportArgumentType]
    write_json(folder / FIT, result)
    return result


def _test(config: Config, workdir: Workdir, s: ScalingSettings) -> None:
    """Writes scaling/tested.json, unless it exists or the reference run on the most photos is incomplete.

    The file has accuracy against gallery size, and against the number of candidates.
    """
    file, most = workdir.path / FOLDER / TESTED, s.photos[-1][0]
    one = next(run for run in scaling.runs(config) if (run.axis, run.size, run.photos) == ("grid", s.reference, most))
    if file.exists() or not workdir.finished(f"geotoken/{one.label}"):
        return
    sweep.make(one.config, workdir, one.label, ("predict",))
    truth = workdir.table(s.split).coordinates()
    order = np.random.default_rng(s.seed).permutation(len(workdir.gallery))
    masked, every = MaskedGallery(one.config, workdir, one.label, s.split), np.arange(len(truth))
    galleries = []
    for n in s.gallery:
        first, decoder = (scaling.within(predicted, truth) for predicted in masked(every, np.sort(order[:n])))
        galleries.append({"photos": n, "first_neighbor": first, "decoder": decoder})
    lines = workdir.predictions_file(one.label, s.split).read_text().splitlines()
    candidates = scaling.by_candidates([json.loads(line)["candidates"] for line in lines], truth, s)
    write_json(
        file,
        {"label": one.label, "split": s.split, "photos": len(truth), "gallery": galleries, "candidates": candidates},
    )
