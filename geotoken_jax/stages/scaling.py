"""`geotoken scaling run` and `geotoken scaling fit`: train the runs of a scaling study, then fit the scaling law.

`run` may be one job of several processes, which train every run together, or an array job, one task per run. `fit` is
one process.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import processes
from geotoken_jax.analysis import scaling, scaling_results
from geotoken_jax.analysis.masking import MaskedGallery
from geotoken_jax.analysis.scaling import DIVERGED, FIT, FOLDER, FORECAST, RUNS, SECONDS, TESTED
from geotoken_jax.configuration import Config, ScalingSettings
from geotoken_jax.manifests import StageError, write_json
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import sweep
from geotoken_jax.train.loop import Diverged
from geotoken_jax.workdir import Workdir


def run(config: Config, workdir: Workdir, index: int | None) -> None:
    """Trains one run of the scaling study, or all runs. Complete runs are skipped.

    A run of the learning-rate axis may diverge. The message is then stored in scaling/diverged/, and the run counts as
    complete.

    index: index of the run in scaling.runs, from 0; all runs if None. Raises SettingsError if there is no such run, and
    StageError if the held-out run is due before the fitted runs are complete, or was trained without a forecast.
    """
    plan = scaling.runs(config)
    if index is not None and not 0 <= index < len(plan):
        raise SettingsError(f"--index is {index}: choose a run of config.scaling, 0 to {len(plan) - 1}")
    for one in plan if index is None else [plan[index]]:
        diverged = workdir.path / FOLDER / DIVERGED / f"{one.label}.json"
        if diverged.exists():
            continue
        with _timed(workdir.path / FOLDER / SECONDS / f"{one.label}.json"):
            if one.axis == scaling.HELD_OUT:
                _forecast(config, workdir, one)
            try:
                sweep.make(one.config, workdir, one.label, ("train",))
            except Diverged as error:
                if one.axis != scaling.RATE:
                    raise
                _write(diverged, {"label": one.label, "message": str(error)})


@contextlib.contextmanager
def _timed(file: epath.Path) -> Iterator[None]:
    """Adds the context's wall-clock and CPU seconds to those in a JSON file, which sums all attempts of a run.

    Process 0 measures the seconds and writes the file.
    """
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        before = json.loads(file.read_text()) if file.exists() else {"wall": 0.0, "cpu": 0.0}
        took = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        _write(file, {name: round(before[name] + took[name], 1) for name in took})


def _write(file: epath.Path, values: Any) -> None:
    """Writes a JSON file in process 0."""
    if not processes.index():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, values)


def _forecast(config: Config, workdir: Workdir, one: scaling.Run) -> None:
    """Writes scaling/forecast.json, unless it exists: the held-out run's loss, predicted from the fitted runs alone.

    Raises StageError if a fitted run is incomplete, or if the held-out run was trained without a forecast.
    """
    file = workdir.path / FOLDER / FORECAST
    if file.exists():
        return
    if workdir.finished(f"geotoken/{one.label}"):
        raise StageError(
            f"{file} is missing, but {workdir.path / 'geotoken' / one.label} is complete, and a forecast must precede "
            "its measurement: remove that folder and run `geotoken scaling run` again"
        )
    rows = scaling.of_axes(scaling.table(config, workdir), *scaling.FITTED)
    needed = {run.label for run in scaling.runs(config) if run.axis in scaling.FITTED}
    missing = needed - {row["label"] for row in rows}
    if missing:
        raise StageError(
            f"the forecast for the held-out run {one.label} needs all runs that the law is fitted to, but it lacks the "
            f"runs {', '.join(sorted(missing))}: run `geotoken scaling run` without --index, which makes all runs in "
            "order"
        )
    processes.report_progress(f"forecasting {one.label}")
    forecast = scaling_results.forecast(rows, one, scaling.scaling_settings(config))
    digests = {row["label"]: workdir.digest(f"geotoken/{row['label']}") for row in rows}
    _write(file, {**forecast, "runs": digests})


def fit(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Writes the table of runs, scaling/runs.json, and the fits, scaling/fit.json. Returns the fits.

    If the reference run with the largest budget is complete, predicts with it and writes scaling/tested.json first.

    For the contents of fit.json, see scaling_results.results. `forecast` is the stored forecast with the measured loss,
    and `tested` is scaling/tested.json with `trends`; each is None if it is not complete. Raises StageError if fewer
    runs are complete than the fit needs.
    """
    rows, s, folder = scaling.table(config, workdir), scaling.scaling_settings(config), workdir.path / FOLDER
    count = len(scaling.of_axes(rows, *scaling.FITTED))
    if count < scaling_results.LEAST:
        raise StageError(
            f"{folder} has {count} complete runs to fit six coefficients to: complete at least "
            f"{scaling_results.LEAST} with `geotoken scaling run` first"
        )
    _test(config, workdir, s)
    tested = json.loads((folder / TESTED).read_text()) if (folder / TESTED).exists() else None
    if tested:
        tested["trends"] = scaling_results.trends_at_test_time(tested, s.seed)
    forecast = scaling_results.measured_forecast(rows, folder)
    result = {**scaling_results.results(rows, config), "forecast": forecast, "tested": tested}
    _write(folder / RUNS, rows)
    _write(folder / FIT, result)
    return result


def _test(config: Config, workdir: Workdir, s: ScalingSettings) -> None:
    """Writes scaling/tested.json, unless it exists or the reference run with the largest budget is incomplete.

    The file has accuracy against gallery size, against the number of neighbors that the decoder reads, and against the
    number of candidates.
    """
    file, label = workdir.path / FOLDER / TESTED, scaling.run_label(s.reference, s.budgets[-1])
    one = next(run for run in scaling.runs(config) if run.label == label)
    if file.exists() or not workdir.finished(f"geotoken/{label}"):
        return
    sweep.make(one.config, workdir, label, ("predict",))
    truth, photos = workdir.table(s.split).coordinates(), len(workdir.gallery)
    order = np.random.default_rng(s.seed).permutation(photos)
    masked = MaskedGallery(one.config, workdir, label, s.split)

    def accuracy(count: int, kept: np.ndarray, most: int | None = None) -> dict[str, Any]:
        first, decoder = (scaling.within(found, truth) for found in masked(np.arange(len(truth)), kept, most))
        return {"count": count, "first_neighbor": first, "decoder": decoder}

    galleries = [accuracy(n, np.sort(order[:n])) for n in s.gallery]
    neighbors = [accuracy(n, np.arange(photos), n) for n in s.test_neighbors]
    lines = workdir.predictions_file(label, s.split).read_text().splitlines()
    candidates = scaling.by_candidates([json.loads(line)["candidates"] for line in lines], truth, s)
    tested = {"label": label, "split": s.split, "photos": len(truth), "gallery": galleries, "neighbors": neighbors}
    _write(file, {**tested, "candidates": candidates})
