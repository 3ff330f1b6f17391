"""Scaling studies: laws and their intervals, runs and their data, the forecast before the last run, and the page."""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import ladder
from configs import scaling as study
from geotoken_jax import cli, configuration, manifests, processes, settings
from geotoken_jax.analysis import isoflop, scaling, scaling_law, trend
from geotoken_jax.data import join
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages import scaling as scaling_page
from geotoken_jax.plan import study as study_cost
from geotoken_jax.plan import topology
from geotoken_jax.stages import scaling as study_stage
from geotoken_jax.stages import sweep
from geotoken_jax.train.loop import Diverged
from geotoken_jax.workdir import Workdir

CONFIGS = Path(study.__file__).parent
#: Coefficients of the law that all synthetic studies follow.
TRUE = {"E": 11.0, "A": 60.0, "alpha": 0.4, "B": 300.0, "beta": 0.5, "repeats": 10.0}


def loss_of(parameters, examples, unique, A=TRUE["A"]):
    """The formulas of the docstring of scaling_law.py, written down a second time."""
    unique = np.minimum(unique, examples)
    repeats = examples / unique - 1
    effective = unique + unique * TRUE["repeats"] * (1 - np.exp(-repeats / TRUE["repeats"]))
    return TRUE["E"] + A / parameters ** TRUE["alpha"] + TRUE["B"] / effective ** TRUE["beta"]


def synthetic(noise=0.0, seed=0, **changes):
    """Returns the points and the losses of a study: three slices of six sizes, and runs on fewer photos."""
    sizes = np.array([5e3, 2e4, 5e4, 8e4, 4e5, 7e5])
    rows = [(n, c / (100 * n + 3e6), 96_000, c) for c in (4e11, 1.2e12, 3.6e12) for n in sizes]
    rows += [(5e4, c / 8e6, u, c) for c in (4e11, 1.2e12, 3.6e12) for u in (12_000, 36_000)]
    points = scaling_law.Points(*np.array(rows).T)
    loss = loss_of(points.parameters, points.examples, points.unique, **changes)
    return points, loss + np.random.default_rng(seed).normal(0, noise, len(loss))


def fitted(points, loss, resamples=40, model=scaling_law.LAW):
    return scaling_law.fit(model, points, loss, scaling_law.resampled(len(loss), resamples, 0, len(model.names)))


HELD_OUT = scaling_law.Points(*np.array([[1.5e6, 9e4, 96_000, 1.44e13]]).T)


def config(**changes):
    found: Any = study.get_config()
    found.scaling.update({"resamples": 20, "neighbors": (0,), "transfer": (), **changes})
    return configuration.read(found)


def test_a_law_is_found_again_and_forecasts_a_size_that_it_did_not_see():
    law = fitted(*synthetic())
    for name, estimate in law.estimates().items():
        assert estimate["value"] == pytest.approx(TRUE[name], rel=1e-3)
    assert law.losses(HELD_OUT)[0, 0] == pytest.approx(loss_of(1.5e6, 9e4, 96_000), rel=1e-5)


def test_intervals_contain_the_truth_and_one_wrong_run_does_not_move_the_law():
    for name, part in fitted(*synthetic(0.02, 1)).estimates().items():
        assert part["low"] < TRUE[name] < part["high"] and part.get("determined", True)
    points, loss = synthetic()
    loss[7] += 2.0
    wrong = fitted(points, loss).losses(HELD_OUT)[0, 0]
    assert wrong == pytest.approx(loss_of(1.5e6, 9e4, 96_000), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_an_exponent_without_effect_is_not_determined_and_no_budget_would_do(noise, monkeypatch):
    monkeypatch.setattr(scaling_law, "_MULTIPLES", (4,))
    monkeypatch.setattr(scaling_law, "_RESAMPLES", 10)
    points, loss = synthetic(noise, A=0.0)
    law = fitted(points, loss)
    estimates = law.estimates()
    assert [estimates[name]["determined"] for name in ("alpha", "beta", "repeats")] == [False, True, True]
    assert scaling_law.sufficient_budgets(law, points, 0.03, ["alpha"], 0) == {"alpha": None}


def test_a_budget_that_would_determine_an_exponent_is_named():
    """With this noise, the law's exponent of size is not determined, and more compute shows the size term."""
    points, loss = synthetic(0.05, 3, A=20.0)
    law = fitted(points, loss)
    assert not law.estimates()["alpha"]["determined"]
    exact = dataclasses.replace(law, parameters=fitted(*synthetic(A=20.0), resamples=1).parameters)
    budget = scaling_law.sufficient_budgets(exact, points, 0.01, ["alpha"], 0)["alpha"]
    assert budget in (4 * 3.6e12, 16 * 3.6e12)


def test_a_bootstrap_refits_from_every_start_in_seconds():
    points, loss = synthetic(0.03)
    began = time.process_time()
    law = fitted(points, loss, resamples=200)
    assert time.process_time() - began < 120 and law.parameters.shape == (201, 6)
    # Each resample's fit is at least as good as the fit that begins at the solution for all runs.
    weights = scaling_law.resampled(len(loss), 200, 0, 6)
    errors = np.abs(np.log(law.losses(points)) - np.log(loss))
    same = np.abs(np.log(law.losses(points)[:1]) - np.log(loss))
    assert ((weights * errors).sum(1) < (weights * same).sum(1) + 0.02).all()
    assert len(np.unique(law.parameters[:, 2].round(6))) > 150


def test_a_prediction_interval_contains_the_noise_of_a_run():
    points, loss = synthetic(0.03)
    law = fitted(points, loss)
    narrow, wide = (scaling_law.predicted(law, HELD_OUT, noise, 0)[0] for noise in (0.0, 0.03))
    assert narrow["loss"] == wide["loss"] and wide["80"][1] - wide["80"][0] > 2 * 1.28 * 0.03
    assert narrow["80"][1] - narrow["80"][0] < wide["80"][1] - wide["80"][0]
    assert wide["95"][0] < wide["80"][0] < loss_of(1.5e6, 9e4, 96_000) < wide["80"][1]
    inside = 0
    for seed in range(12):
        points, loss = synthetic(0.03, 10 + seed)
        law = fitted(points, loss, resamples=15)
        noise = scaling_law.noise(law, points, loss)["used"]
        truth = loss_of(1.5e6, 9e4, 96_000) + np.random.default_rng(seed).normal(0, 0.03)
        low, high = scaling_law.predicted(law, HELD_OUT, noise, seed)[0]["80"]
        inside += low < truth < high
    assert 8 <= inside


def test_the_law_beats_the_models_with_fewer_coefficients_where_it_holds():
    points, loss = synthetic(0.02)
    errors = [np.sqrt(np.mean(scaling_law.leave_one_out(model, points, loss) ** 2)) for model in scaling_law.MODELS]
    assert errors[0] < 0.04 < errors[1] < errors[2]
    # Runs that differ only in the seed are left out together, and their spread is the noise of the seeds.
    twice = points.joined(points.where([0, 0]))
    losses = np.append(loss, loss[0] + np.array([0.5, 0.5]))
    assert scaling_law.noise(fitted(twice, losses), twice, losses)["seeds"] == pytest.approx(np.sqrt(0.5 / 6), rel=0.3)
    assert np.abs(scaling_law.leave_one_out(scaling_law.LAW, twice, losses)[[0, -1]]).max() > 0.3


def test_an_optimum_is_the_minimum_of_a_parabola_inside_the_measured_range():
    x = np.geomspace(1e-3, 3e-2, 6)
    loss = 12 + 0.05 * np.log(x / 6e-3) ** 2
    best, simulated = isoflop.optimum(x, loss, 0.005, 0)
    assert best["at"] == pytest.approx(6e-3) and best["loss"] == pytest.approx(12) and best["determined"]
    assert best["low"] < 6e-3 < best["high"] and len(simulated) == 400
    assert np.polyval(best["coefficients"], np.log(x)) == pytest.approx(loss)
    for wrong in (12 + 0.05 * np.log(x / 3e-4) ** 2, 12 - loss):
        found = isoflop.optimum(x, wrong, 0.0, 0)[0]
        assert found["at"] is None and not found["determined"]
    assert not isoflop.optimum(x, loss, 1.0, 0)[0]["determined"]
    diverged = isoflop.optimum(x, np.where(x > 2e-2, np.inf, loss), 0.0, 0)[0]
    assert diverged["at"] == pytest.approx(6e-3)


def test_optima_of_slices_follow_a_power_law():
    n = np.geomspace(1e4, 1e6, 6)
    rows = [
        {"budget": c, "parameters": size, "examples": c / size, "loss": 12 + 0.1 * np.log(size / c**0.4 / 0.3) ** 2}
        for c in (1e13, 1e14, 1e15)
        for size in n
    ]  # fmt: skip
    found = isoflop.slices(rows, 0.001, 0)
    assert found["power"]["value"] == pytest.approx(0.4, abs=0.01) and found["power"]["determined"]
    assert found["power"]["low"] < 0.4 < found["power"]["high"]
    assert found["slices"][0]["examples"] == pytest.approx(1e13 / found["slices"][0]["at"], rel=1e-6)


def test_a_learning_rate_that_transfers_has_a_ratio_near_1():
    rates = np.geomspace(5e-4, 2e-2, 6)
    rows = [
        {
            "parametrization": name,
            "width": w,
            "rate": r,
            "loss": 12 + 0.05 * np.log(r / (4e-3 * (64 / w) ** power)) ** 2,
        }
        for name, power in (("standard", 0.4), ("mup", 0.0))
        for w in (16, 64, 256)
        for r in rates
    ]
    standard, mup = isoflop.learning_rates(rows, 0.002, 0)
    assert standard["ratio"] == pytest.approx(16**0.4, rel=0.01) and mup["ratio"] == pytest.approx(1, abs=0.01)
    assert standard["low"] < 16**0.4 < standard["high"] and mup["determined"]


def trend_of(x, y, forms, seed):
    found = trend.fit(x, y, forms, seed)
    assert found
    return found


def test_a_trend_has_the_form_that_forecasts_best():
    x = np.geomspace(500, 32_000, 5)
    assert trend_of(x, 0.05 * np.log(x) - 0.2, ("logarithmic", "power"), 0)["form"] == "logarithmic"
    power = trend_of(x, 0.05 * x**0.2, ("logarithmic", "power"), 0)
    assert power["form"] == "power" and power["b"]["value"] == pytest.approx(0.2)
    loss = np.linspace(11, 13, 12)
    share = 1 / (1 + np.exp(loss - 12)) + np.random.default_rng(0).normal(0, 0.005, 12)
    logistic = trend_of(loss, share, ("linear", "logistic"), 0)
    assert logistic["form"] == "logistic" and logistic["b"]["low"] < -1 < logistic["b"]["high"]
    assert trend_of(x, np.array([0.5, 0.4, 0.6, 0.4, 0.5]), ("logarithmic", "power"), 0)["form"] == "constant"
    assert trend.fit(x[:3], x[:3], ("power",), 0) is None


def test_fewer_photos_are_among_more_and_come_with_their_views():
    photos = np.array([f"p{i}".encode() for i in range(50)])
    views = np.repeat(photos, 2)
    few, more = (
        join.choose_rows([photos, views], join.DataSettings(photos=n, seed=3, split_validation=False)) for n in (5, 20)
    )
    assert set(few) < set(more) and len(few) == 15 and len(more) == 60
    rows = few[:5]
    assert set(few[5:]) == {50 + 2 * row + v for row in rows for v in (0, 1)}
    assert set(few) != set(
        join.choose_rows([photos, views], join.DataSettings(photos=5, seed=4, split_validation=False))
    )
    part = join.Subset(lambda rows: {"row": rows * 10}, few)
    assert len(part) == 15 and part(np.array([2, 0]))["row"].tolist() == [10 * few[2], 10 * few[0]]
    with pytest.raises(settings.SettingsError, match=r"config.data.photos is 51: set it to 1 ... 50"):
        join.choose_rows([photos, views], join.DataSettings(photos=51, seed=0, split_validation=False))


def test_every_size_of_the_ladder_is_named_by_its_weights():
    units = {"K": 1e3, "M": 1e6}
    for name in ladder.SIZE:
        found: Any = ladder.get_config(name)
        model = configuration.read(found).model
        assert scaling.layer_parameters(model) == pytest.approx(int(name[:-1]) * units[name[-1]], rel=0.07)
    widths, rates, batches = zip(
        *(
            (s["model"]["width"], s["train"]["optimizer"]["learning_rate"], s["train"]["batch_size"])
            for s in ladder.SIZE.values()
        ),
        strict=True,
    )
    assert list(widths) == sorted(widths) and list(rates) == sorted(rates, reverse=True)
    assert list(batches) == sorted(batches)


def test_runs_have_their_axes_and_the_held_out_size_comes_last():
    transfer = (("narrow", dict(model=dict(width=16))), ("wide", dict(model=dict(width=64))))
    plan = scaling.runs(config(transfer=transfer, rates=(1e-3, 3e-3)))
    axes = ["grid"] * 15 + ["photos"] * 3 + ["seed"] * 4 + ["neighbors"] + ["learning rate"] * 4 + ["held out"]
    assert [run.axis for run in plan] == axes
    assert len({run.label for run in plan}) == len(plan) and plan[-1].label == "1536K_1.44e13"
    for run in (*plan[:22], plan[-1]):
        assert run.compute == pytest.approx(run.budget, rel=0.02) and run.config.train.examples == run.examples
        assert run.config.data.split_validation
    assert plan[0].unique == 3 * plan[0].photos == 96_000  # photos and two views of each
    fewer = plan[15]
    assert (fewer.photos, fewer.unique, fewer.config.data.photos, fewer.size) == (4_000, 12_000, 4_000, "46K")
    corners = [(run.size, run.budget, run.config.train.seed) for run in plan[18:22]]
    assert corners == [(size, budget, 1) for size in ("12K", "655K") for budget in (4e11, 3.6e12)]
    assert plan[22].config.model.neighbors == 0 and not plan[22].config.model.copy_head
    assert plan[22].examples == plan[6].examples
    rates = [(run.config.model.width, run.config.train.optimizer.learning_rate) for run in plan[23:27]]
    assert rates == [(16, 1e-3), (16, 3e-3), (64, 1e-3), (64, 3e-3)]
    for key, value in (("held_out", "2M"), ("reference", "1536K")):
        with pytest.raises(settings.SettingsError, match=rf"config.scaling.{key} is .*: choose"):
            config(**{key: value})
    with pytest.raises(settings.SettingsError, match=r"config.scaling.budgets is \(2.0, 1.0\): use one or more"):
        config(budgets=(2.0, 1.0))
    with pytest.raises(settings.SettingsError, match=r"config.scaling.budgets has 1e\+06, less than one batch of 64"):
        scaling.runs(config(budgets=(1e6,)))


def test_with_fixed_epochs_the_examples_grow_with_the_photos():
    plan = [run for run in scaling.runs(config(epochs=2)) if run.axis == "photos"]
    assert [run.photos for run in plan] == [4_000, 32_000] and {run.size for run in plan} == {"46K"}
    for run in plan:
        assert run.examples == pytest.approx(2 * run.unique, abs=64)


@pytest.fixture
def stages(monkeypatch):
    """Stages that train nothing: the loss is the law's, spread over two levels, best at the first of two validations.
    `made` lists what they made, and `stop` is asked before each training."""
    made, sizes = [], []
    stop = []

    def train(config, path, label):
        stage = path.begin(config, f"geotoken/{label}", ["train", "data"], [])
        if stage.manifest:
            return []
        if stop and random.random() < stop[0]:
            raise KeyboardInterrupt
        model, rate = config.model, config.train.optimizer.learning_rate
        if rate > 0.1:
            raise Diverged("the loss is not finite")
        made.append(label)
        unique = config.data.photos * 3
        loss = loss_of(scaling.layer_parameters(model), config.train.examples, unique) + 0.001 * config.train.seed
        if "rate" in label:
            loss = 12 + 0.05 * np.log(rate / 4e-3) ** 2
        lines = []
        for step, worse in ((3, 0.0), (6, 0.5)):
            # The photos that choose the step have another loss than the photos that are scored.
            values = {"validation/loss": worse, "scored/loss": loss / 2, "scored/loss_level_0": loss - 2 + worse}
            values |= {f"scored/within_{km}_km": (14 - loss) / 10 for km in THRESHOLDS_KM}
            lines += [{"step": step, "train/loss": 9.0}, {"step": step, "scored/loss_level_1": 2.0, **values}]
        (stage.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [stage.finish({"examples": config.train.examples}, best_step=3)]

    def predict(config, path, label):
        made.append(f"predictions/{label}")
        file = path.predictions_file(label, "test")
        file.parent.mkdir(parents=True, exist_ok=True)
        # The greedy candidate is right but was never sampled. The other one, sampled five times, is more probable.
        places = [(20.0, 20.0, -2.0, 1), (0.0, 0.0, -1.0, 5)]
        names = ("latitude", "longitude", "log_probability", "count")
        line = json.dumps({"candidates": [dict(zip(names, place, strict=True)) for place in places]})
        file.write_text(f"{line}\n" * 40)
        return []

    class Table:
        def __len__(self):
            return 32_000

        def coordinates(self):
            return np.array([(20.0, 20.0)] * 40)

    class MaskedGallery:
        def __init__(self, *arguments):
            del arguments

        def __call__(self, rows, kept, most=None):
            sizes.append((kept, most))
            near = np.array([(20.0, 20.0)] * 40)
            return np.stack([np.full((40, 2), np.nan), near + (len(kept) < 8_000 or (most or 10) < 3)])

    monkeypatch.setattr(Workdir, "gallery", Table())
    monkeypatch.setattr(Workdir, "table", lambda *_: Table())
    monkeypatch.setattr(study_stage, "MaskedGallery", MaskedGallery)
    monkeypatch.setattr(scaling_law, "_MULTIPLES", (4,))
    do = {"train": train, "predict": predict}
    monkeypatch.setattr(sweep, "STAGES", do)
    return do, made, sizes, stop


SMALL: Any = dict(budgets=(4e11, 3.6e12), photos=(12_000, 32_000))


def test_a_study_is_resumed_run_by_run_and_the_forecast_comes_before_the_held_out_run(tmp_path, stages):
    do, made, sizes, _ = stages
    given, path = config(**SMALL), Workdir(tmp_path)
    last = len(scaling.runs(given)) - 1
    study_stage.run(given, path, 0)
    assert made == ["12K_4e11"]
    with pytest.raises(
        manifests.StageError, match=r"1536K_1.44e13 needs all runs that the law is fitted to, .* the runs .*46K_4e11, "
    ):
        study_stage.run(given, path, last)
    with pytest.raises(
        settings.SettingsError, match=f"--index is {last + 1}: choose a run of config.scaling, 0 to {last}"
    ):
        study_stage.run(given, path, last + 1)
    with pytest.raises(
        manifests.StageError, match="has 1 complete runs to fit six coefficients to: complete at least 8"
    ):
        study_stage.fit(given, path)
    study_stage.run(given, path, None)
    assert len(made) == last + 1 and made[-1] == "1536K_1.44e13" and not sizes  # each run once
    forecast = json.loads((tmp_path / "scaling" / "forecast.json").read_text())
    run = scaling.runs(given)[-1]
    law = forecast["models"]["law of size and data"]
    assert law["loss"] == pytest.approx(loss_of(run.parameters, run.examples, run.unique), abs=0.01)
    assert len(forecast["runs"]) == 10 + 2 + 4 and set(forecast["models"]) == {m.name for m in scaling_law.MODELS}
    study_stage.fit(given, path)
    assert made[-1] == "predictions/46K_3.6e12"
    # A smaller gallery is a subset of a larger one. The last five use the whole gallery and fewer neighbors.
    assert [len(kept) for kept, _ in sizes] == [500, 2_000, 8_000] + [32_000] * 6 and set(sizes[0][0]) < set(
        sizes[1][0]
    )
    assert [most for _, most in sizes] == [None] * 4 + [1, 2, 3, 5, 10]
    made.clear()
    do["predict"] = lambda *_: []
    study_stage.run(given, path, None)
    study_stage.fit(given, path)
    assert made == [] and len(sizes) == 9
    assert json.loads((tmp_path / "scaling" / "forecast.json").read_text()) == forecast
    (tmp_path / "scaling" / "forecast.json").unlink()
    with pytest.raises(manifests.StageError, match="a forecast must precede its measurement"):
        study_stage.run(given, path, last)


def test_a_study_that_is_killed_at_random_has_the_same_table_and_forecast(tmp_path, stages):
    _, _, _, stop = stages
    given = config(**SMALL)

    def result(folder):
        rows = [
            {k: v for k, v in row.items() if k not in ("wall", "cpu")} for row in scaling.table(given, Workdir(folder))
        ]
        return rows, json.loads((folder / "scaling" / "forecast.json").read_text())["models"]

    study_stage.run(given, Workdir(tmp_path / "whole"), None)
    random.seed(1)
    stop.append(0.2)
    kills = 0
    while True:
        try:
            study_stage.run(given, Workdir(tmp_path / "killed"), None)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2 and result(tmp_path / "killed") == result(tmp_path / "whole")


def test_a_learning_rate_that_diverges_is_recorded_and_no_optimum(tmp_path, stages):
    _, made, _, _ = stages
    transfer = (("narrow", dict(model=dict(width=16))), ("wide", dict(model=dict(width=64))))
    given = config(**SMALL, transfer=transfer, rates=(1e-3, 3e-3, 9e-3, 0.2))
    path = Workdir(tmp_path)
    study_stage.run(given, path, None)
    assert "narrow_rate_0.009" in made and "narrow_rate_0.2" not in made
    row = next(row for row in scaling.table(given, path) if row["label"] == "narrow_rate_0.2")
    assert row["loss"] is None and row["width"] == 16 and row["rate"] == 0.2
    made.clear()
    study_stage.run(given, path, None)
    assert made == []
    [entry] = study_stage.fit(given, path)["transfer"]
    assert entry["ratio"] == pytest.approx(1, abs=1e-3) and entry["widths"][0]["at"] == pytest.approx(4e-3, rel=0.02)
    assert "diverged" in scaling_page.document(given, path)


def as_process(index, patch):
    for name, value in (("COORDINATOR_ADDRESS", "nobody:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", str(index))):
        patch.setenv(f"JAX_{name}", value)


def test_processes_train_the_same_runs_and_the_first_writes(tmp_path, stages, monkeypatch):
    """Trains as process 1, then as process 0, in folders of their own."""
    _, made, _, _ = stages
    written = []
    for index in (1, 0):
        as_process(index, monkeypatch)
        study_stage.run(config(**SMALL), Workdir(tmp_path / str(index)), None)
        written.append(len(list((tmp_path / str(index) / "scaling").rglob("*.json"))))
    runs = len(made) // 2
    assert made[:runs] == made[runs:] and written == [0, runs + 1]  # seconds of each run, and the forecast


def test_a_study_is_trained_in_connected_processes_and_fitted_in_one(tmp_path, monkeypatch, capsys):
    as_process(0, monkeypatch)
    calls = []
    monkeypatch.setattr(processes, "watched", lambda _: contextlib.nullcontext(calls.append("watched")))
    monkeypatch.setattr(processes, "start", lambda: calls.append("start"))
    monkeypatch.setattr(study_stage, "run", lambda *_: calls.append("run"))
    monkeypatch.setattr(processes, "leave", sys.exit)

    def ended(*command, name="scaling"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, f"--config={CONFIGS}/{name}.py", f"--workdir={tmp_path}"])
        return stopped.value.code, capsys.readouterr().err

    assert ended("scaling", "run") == (0, "") and calls == ["watched", "start", "run"]
    for message, (status, error) in {
        "`geotoken scaling fit` runs in one process only": ended("scaling", "fit"),
        "`geotoken scaling plot` runs in one process only": ended("scaling", "plot"),
        "`geotoken experiment` runs in one process only": ended("experiment", "beam", name="experiments"),
    }.items():
        assert status == cli.REFUSED and message in error


@pytest.mark.usefixtures("stages")
def test_results_are_in_the_document_and_on_the_page(tmp_path):
    given, path = config(**SMALL, neighbors=(0, 1, 3)), Workdir(tmp_path)
    with pytest.raises(manifests.StageError, match=r"fit.json is missing: run `geotoken scaling fit`"):
        scaling_page.document(given, path)
    study_stage.run(given, path, None)
    found = study_stage.fit(given, path)
    rows = scaling.table(given, path)
    row = next(row for row in rows if row["label"] == "46K_4e11")
    assert row["loss"] == pytest.approx(loss_of(46_080, row["examples"], 96_000)) and row["seen"] == 3 * 64
    for name in ("alpha", "beta"):
        assert found["law"][name]["value"] == pytest.approx(TRUE[name], abs=0.05) and found["law"][name]["determined"]
    forecast = found["forecast"]["models"]
    errors = [abs(forecast[model.name]["loss"] - found["forecast"]["measured"]) for model in scaling_law.MODELS]
    assert errors[0] < 0.01 < errors[1]
    low, high = forecast["law of size and data"]["80"]
    assert low < found["forecast"]["measured"] < high
    assert found["models"][0]["left_out"] < 0.01 < found["models"][1]["left_out"] < found["models"][2]["left_out"]
    assert all(line["form"] == "linear" and line["b"]["value"] == pytest.approx(-0.1) for line in found["accuracy"])
    losses = [point["loss"] for point in found["frontier"]]
    assert losses == sorted(losses, reverse=True) and found["frontier"][-1]["compute"] == pytest.approx(1.44e13)
    tested = found["tested"]
    assert [row["decoder"][1] for row in tested["gallery"]] == [0.0, 0.0, 1.0, 1.0]
    assert [row["decoder"][1] for row in tested["neighbors"]] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert [row["first_neighbor"][4] for row in tested["gallery"]] == [0.0] * 4
    assert all(row["nearest"] == [1.0] * 5 and row["chosen"] == [0.0] * 5 for row in tested["candidates"])
    assert tested["trends"]["candidates"]["nearest"][0]["form"] == "constant"
    page = scaling_page.document(given, path)
    assert "| 46K_4e11 | grid | 46,080 | 32,000 | 10 |" in page and "## What does not transfer" in page
    assert f"Measured: {found['forecast']['measured']:.3f}, inside the interval." in page
    assert str(tmp_path) not in page and "nan" not in page
    slopes = {name: {"head": {"rms": 0.5, "change": 0.25}} for name in ("standard", "mup")}
    checked = [
        {"parametrization": name, "width": width, "seed": 0, "step": 2, "activation": "head", "rms": 1.0, "change": 0.5}
        for name in slopes
        for width in (16, 32)
    ]
    check = {"widths": [16, 32], "steps": 2, "seeds": 1, "rows": checked, "slopes": slopes}
    (tmp_path / "scaling" / "check.json").write_text(json.dumps(check))
    assert "Coordinate check" not in page and "| head | +0.50 | +0.25 |" in scaling_page.document(given, path)
    html = scaling_page.plot(given, path).read_text()
    assert html.count('<svg class="chart"') >= 10 and str(tmp_path) not in html and "nan," not in html


@pytest.mark.slow
def test_the_cost_of_a_study_is_operations_over_the_rate_of_the_chips(capsys):
    sizes = tuple((name, ladder.SIZE[name]) for name in ("46K", "1536K"))
    transfer = (("wide", dict(model=dict(width=64))),)
    given = config(**SMALL, sizes=sizes, transfer=transfer, rates=(1e-3, 3e-3))
    plan = study_cost.costs(given, topology.read("h100:8"), mfu=0.25)
    runs = scaling.runs(given)
    assert [row["label"] for row in plan] == [run.label for run in runs] and all(row["fits"] for row in plan)
    for row, run in zip(plan, runs, strict=True):
        assert row["chip_hours"] == pytest.approx(run.compute / (0.25 * 989e12) / 3600) == 8 * row["hours"]
    assert plan[-1]["bytes"] > plan[0]["bytes"] > 0
    printed = study_cost.table(plan, topology.read("h100:8"))
    assert "| 7 to 8 | wide_rate_0.001 ... 0.003 | learning rate |" in printed and "Every run fits" in printed
    assert "GB per chip" not in study_cost.table(study_cost.costs(given), None)
    with pytest.raises(SystemExit):
        cli.main(["scaling", "plan", f"--config={CONFIGS}/scaling.py", "--mfu=1.5"])
    assert "--mfu is 1.5: use a share of the peak rate above 0, up to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ladder_for_a_pod_fits_v5e_256_and_8_h100():
    """A new process, because JAX has as many CPU devices as the pod has chips. Sizes between these need less memory."""
    code = """
from configs import scaling_pod
from geotoken_jax import configuration
from geotoken_jax.analysis import scaling
from geotoken_jax.plan import study, topology
found = scaling_pod.get_config()
assert all(run.config.train.batch_size % 256 == 0 for run in scaling.runs(configuration.read(found)))
sizes = dict(found.scaling.sizes)
few = tuple((name, sizes[name]) for name in ("52M", "939M"))
found.scaling.update(sizes=few, budgets=(1e17,), seeds=(), photos=(4_000_000,), neighbors=(), transfer=())
for name in ("v5e:16x16", "h100:8"):
    pod = topology.read(name)
    plan = study.costs(configuration.read(found), pod)
    assert len(plan) == 2 and all(row["fits"] for row in plan), plan
    # The 16 bytes of each parameter are split over all chips.
    assert plan[-1]["bytes"] < 2 * 16 * plan[-1]["parameters"] / pod.size, plan
"""
    subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=True)


def test_the_array_job_has_a_task_per_run_except_the_held_out_one():
    last = len(scaling.runs(configuration.read(study.get_config()))) - 1
    script = (CONFIGS.parent / "launch" / "scaling.sbatch").read_text()
    assert f"#SBATCH --array=0-{last - 1}\n" in script and f"sbatch --array={last} --dependency" in script


def test_the_command_names_what_it_lacks(tmp_path, capsys):
    for options, message in (
        ([f"--config={CONFIGS}/demo.py", f"--workdir={tmp_path}"], "--config=FILE with a section `scaling`"),
        (
            [f"--config={CONFIGS}/scaling.py", f"--workdir={tmp_path}", "--index=999"],
            "choose a run of config.scaling, 0 to",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["scaling", "run", *options])
        assert stopped.value.code == cli.REFUSED and message in capsys.readouterr().err
