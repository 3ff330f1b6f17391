"""Scaling studies: the fitted law, the runs and their data, the forecast before the last run, and the document."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import ladder
from configs import scaling as study
from geotoken_jax import cli, configuration, manifests, processes, settings
from geotoken_jax.analysis import scaling, scaling_law
from geotoken_jax.data import join
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.pages import scaling as scaling_page
from geotoken_jax.stages import scaling as study_stage
from geotoken_jax.stages import sweep
from geotoken_jax.workdir import Workdir

CONFIGS = Path(study.__file__).parent
LAW = scaling_law.Law(E=11.2, A=120.0, alpha=0.45, B=30.0, beta=0.4)


def grid():
    n, d = np.meshgrid([20_480, 46_080, 81_920, 368_640, 655_360], [2_000, 5_000, 12_800, 32_000])
    return n.ravel().astype(float), d.ravel().astype(float)


def config(**changes):
    found: Any = study.get_config()
    found.scaling.update(resamples=5, seeds=(1,), neighbors=(0,), budgets=(3e11,), **changes)
    return configuration.read(found)


def test_a_law_is_found_again_and_forecasts_a_size_that_it_did_not_see():
    n, d = grid()
    law, _ = scaling_law.fit(n, d, LAW(n, d), resamples=0, seed=0)
    for name, value in dataclasses.asdict(LAW).items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-3)
    assert law(1.5e6, 1e5) == pytest.approx(LAW(1.5e6, 1e5), rel=1e-5)


def test_intervals_hold_the_truth_and_one_wrong_run_does_not_move_the_law():
    n, d = grid()
    noisy = LAW(n, d) + np.random.default_rng(1).normal(0, 0.01, len(n))
    law, others = scaling_law.fit(n, d, noisy, resamples=20, seed=0)
    for name, part in scaling_law.intervals(law, others).items():
        assert part["low"] < getattr(LAW, name) < part["high"]
    wrong = LAW(n, d)
    wrong[7] += 2.0
    assert scaling_law.fit(n, d, wrong, resamples=0, seed=0)[0](1.5e6, 32_000) == pytest.approx(
        LAW(1.5e6, 32_000), abs=0.02
    )


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
    plan = scaling.runs(config())
    assert [run.axis for run in plan] == ["grid"] * 24 + ["compute"] * 6 + ["neighbors", "seed", "held out"]
    assert len({run.label for run in plan}) == len(plan) and plan[-1].label == "1536K_12800"
    first = plan[0].config
    assert (first.data.photos, first.train.examples, first.model.width) == (2_000, 12_000, 16)
    for run in plan[24:30]:
        assert run.config.train.examples * run.flops == pytest.approx(3e11, rel=1e-3)
    assert plan[30].config.model.neighbors == 0 and not plan[30].config.model.copy_head
    assert plan[31].config.train.seed == 1 and plan[31].photos == 2_000
    for key, value in (("held_out", "2M"), ("held_out_photos", 7), ("reference", "1536K")):
        with pytest.raises(settings.SettingsError, match=rf"config.scaling.{key} is .*: choose"):
            scaling.runs(config(**{key: value}))


@pytest.fixture
def stages(monkeypatch):
    """Stages that train nothing: the loss is the law's, spread over two levels, best at the first of two validations.
    `made` lists what they made."""
    made = []

    def train(config, path, label):
        stage = path.begin(config, f"geotoken/{label}", ["train", "data"], [])
        if stage.manifest:
            return []
        made.append(label)
        loss = LAW(scaling.layer_parameters(config.model), config.data.photos)
        lines = []
        for step, worse in ((3, 0.0), (6, 0.5)):
            values = {"validation/loss": loss / 2 + worse, "validation/loss_level_0": loss - 2 + worse}
            values |= {f"validation/within_{km}_km": (14 - loss) / 10 for km in THRESHOLDS_KM}
            lines += [{"step": step, "train/loss": 9.0}, {"step": step, "validation/loss_level_1": 2.0, **values}]
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

        def __call__(self, rows, kept):
            sizes.append(kept)
            near = np.array([(20.0, 20.0)] * 40)
            return np.stack([np.full((40, 2), np.nan), near + (len(kept) < 8_000)])

    sizes = []
    monkeypatch.setattr(Workdir, "gallery", Table())
    monkeypatch.setattr(Workdir, "table", lambda *_: Table())
    monkeypatch.setattr(study_stage, "MaskedGallery", MaskedGallery)
    do = {"train": train, "predict": predict}
    monkeypatch.setattr(sweep, "STAGES", do)
    return do, made, sizes


def test_a_study_is_resumed_run_by_run_and_the_forecast_comes_before_the_held_out_run(tmp_path, stages):
    do, made, sizes = stages
    given, path = config(), Workdir(tmp_path)
    last = len(scaling.runs(given)) - 1
    study_stage.run(given, path, 0)
    assert made == ["5K_2000"]
    with pytest.raises(
        manifests.StageError, match=r"1536K_12800 needs the whole grid, but it lacks the runs .*20K_12800, "
    ):
        study_stage.run(given, path, last)
    with pytest.raises(
        settings.SettingsError, match=f"--index is {last + 1}: choose a run of config.scaling, 0 to {last}"
    ):
        study_stage.run(given, path, last + 1)
    with pytest.raises(manifests.StageError, match="has 1 complete grid runs"):
        study_stage.fit(given, path)
    study_stage.run(given, path, None)
    assert len(made) == last + 1 and made[-1] == "1536K_12800" and not sizes  # each run once
    forecast = json.loads((tmp_path / "scaling" / "forecast.json").read_text())
    assert forecast["loss"] == pytest.approx(LAW(1_536_000, 12_800), rel=1e-4) and len(forecast["grid"]) == 24
    study_stage.fit(given, path)
    assert made[-1] == "predictions/82K_32000"
    # A smaller gallery is a subset of a larger one.
    assert [len(kept) for kept in sizes] == [500, 2_000, 8_000, 32_000] and set(sizes[0]) < set(sizes[1])
    made.clear()
    do["predict"] = lambda *_: []
    study_stage.run(given, path, None)
    study_stage.fit(given, path)
    assert made == [] and len(sizes) == 4
    assert json.loads((tmp_path / "scaling" / "forecast.json").read_text()) == forecast
    (tmp_path / "scaling" / "forecast.json").unlink()
    with pytest.raises(manifests.StageError, match="a forecast must precede its measurement"):
        study_stage.run(given, path, last)


def as_process(index, patch):
    for name, value in (("COORDINATOR_ADDRESS", "nobody:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", str(index))):
        patch.setenv(f"JAX_{name}", value)


def test_processes_train_the_same_runs_and_the_first_writes(tmp_path, stages, monkeypatch):
    """Trains as process 1, then as process 0, in folders of their own."""
    _, made, _ = stages
    monkeypatch.setattr(scaling_law, "fit", lambda *_: (LAW, [LAW]))
    written = []
    for index in (1, 0):
        as_process(index, monkeypatch)
        study_stage.run(config(), Workdir(tmp_path / str(index)), None)
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
def test_what_was_found_is_told(tmp_path):
    given, path = config(), Workdir(tmp_path)
    with pytest.raises(manifests.StageError, match=r"fit.json is missing: run `geotoken scaling fit`"):
        scaling_page.document(given, path)
    study_stage.run(given, path, None)
    found = study_stage.fit(given, path)
    row = next(row for row in scaling.table(given, path) if row["label"] == "20K_2000")
    assert row["loss"] == pytest.approx(LAW(20_480, 2_000)) and row["seen"] == 3 * 64 and row["examples"] == 12_000
    assert found["forecast"]["measured"] == pytest.approx(found["forecast"]["loss"], rel=1e-4)
    assert found["forecast"]["as_the_largest"] == pytest.approx(LAW(655_360, 12_800))
    assert all(line["a_nat_less"] == pytest.approx(0.1) for line in found["accuracy"])
    losses = [point["loss"] for point in found["frontier"]]
    assert losses == sorted(losses, reverse=True) and found["frontier"][-1]["size"] == "1536K"
    tested = found["tested"]
    assert [row["decoder"][1] for row in tested["gallery"]] == [0.0, 0.0, 1.0, 1.0]
    assert [row["first_neighbor"][4] for row in tested["gallery"]] == [0.0] * 4
    assert len(tested["candidates"]) == 4
    assert all(row["nearest"] == [1.0] * 5 and row["chosen"] == [0.0] * 5 for row in tested["candidates"])
    page = scaling_page.document(given, path)
    assert "| 20K_2000 | grid | 20,480 | 2,000 | 10 | 12,000 | 192 |" in page
    assert f"Measured: {LAW(1_536_000, 12_800):.3f}." in page and "## What does not transfer" in page
    assert str(tmp_path) not in page
    html = scaling_page.plot(given, path).read_text()
    assert html.count('<svg class="chart"') == 6 and "1536K, held out" in html and str(tmp_path) not in html


def test_the_command_names_what_it_lacks(tmp_path, capsys):
    for options, message in (
        ([f"--config={CONFIGS}/demo.py", f"--workdir={tmp_path}"], "--config=FILE with a section `scaling`"),
        ([f"--config={CONFIGS}/scaling.py", f"--workdir={tmp_path}", "--index=99"], "0 to 35"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["scaling", "run", *options])
        assert stopped.value.code == cli.REFUSED and message in capsys.readouterr().err
