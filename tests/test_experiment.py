"""Experiments: which stages a run makes or reuses, and the table that compares runs."""

import json

import ml_dtypes
import numpy as np
import pytest

from configs import demo
from geotoken_jax import configuration, manifests, records, settings
from geotoken_jax.analysis import evaluate
from geotoken_jax.gallery import table
from geotoken_jax.stages import experiments, sweep
from geotoken_jax.workdir import Workdir

PLACES = np.array([(10.0, 10.0), (20.0, 20.0), (30.0, 30.0)])


class Photos:
    """Three photos by three authors, in place of records.Photos, which would read files."""

    def __init__(self, folder, split):
        del folder, split

    def __len__(self):
        return len(PLACES)

    def __getitem__(self, row):
        names = dict.fromkeys(records.PLACE_FIELDS, "")
        return {"id": str(row), "author": str(row), "coordinates": tuple(PLACES[row]), **names}


def write_table(folder, places):
    """Writes a table of photos at the given places."""
    n = len(places)
    columns = {
        "embeddings": np.zeros((n, 3, 4), ml_dtypes.bfloat16),
        "coordinates": places,
        "tokens": np.zeros((n, 21), np.uint8),
        "ids": np.array([f"{i}".encode() for i in range(n)]),
        "authors": np.array([b"someone"] * n),
    }
    table.write_shard(folder, 0, 1, columns)


def config(**experiments):
    """The demo's configuration. Of it the stages below read config.data.seed (of tokens/), train.seed (of the decoder)
    and predict.seed (tenths of a degree that answers are off)."""
    found = demo.get_config()
    found.name = "made_up"
    found.predict.seed = 10
    found.variants = dict(geotoken=dict())
    found.evaluate.update(resamples=50, reference="geotoken", compare=())
    found.evaluate.labels = dict(geotoken="Ours")
    found.experiments = {
        name: {"question": "What?", "note": "", "choices": ("",), "splits": ("test",), "curve": False, **what}
        for name, what in experiments.items()
    }
    return configuration.read(found)


@pytest.fixture
def stages(monkeypatch):
    """Stages that write small files. `made` lists the folders that they made."""
    monkeypatch.setattr(records, "Photos", Photos)
    made = []

    def stage(folder, key, inputs, lines=None):
        def make(config, path, variant):
            where = folder.format(variant)
            begun = path.begin(config, where, [key], [name.format(variant) for name in inputs])
            if begun.manifest is None:
                made.append(f"{begun.path.relative_to(root)}")
                if lines:
                    (begun.path / "test.jsonl").write_text(lines(config))
                begun.finish({"examples": 5}, parameters=7, best_loss=(config.train.seed + 1) / 2)
            return []

        return make

    def predicted(config):
        return "".join(
            json.dumps({"id": str(i), "latitude": at[0] + config.predict.seed / 10, "longitude": at[1]}) + "\n"
            for i, at in enumerate(PLACES)
        )

    root = None

    def within(path):
        nonlocal root
        root = path
        found = {
            "index": stage("tokens", "data.seed", []),
            "train": stage("geotoken/{}", "train", ["tokens"]),
            "learn": lambda *_: [],
            "predict": stage("predictions/{}", "predict", ["tokens", "geotoken/{}"], predicted),
        }
        monkeypatch.setattr(sweep, "STAGES", found)
        return found, made

    return within


def test_only_what_differs_is_made_again(tmp_path, stages):
    found, made = stages(tmp_path)
    given = config(
        one=dict(
            runs=(
                ("as it is", {}),
                ("nearer", dict(predict=dict(seed=1))),
                ("faster", dict(train=dict(seed=1), predict=dict(seed=2))),
                ("masked, faster", dict(data=dict(seed=25), predict=dict(seed=10)), "faster"),
            )
        )
    )
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    made.clear()
    results = experiments.run(given, Workdir(tmp_path), "one")
    under = "experiments/one"
    assert made == [
        f"{under}/nearer/predictions/geotoken",
        f"{under}/faster/geotoken/geotoken",
        f"{under}/faster/predictions/geotoken",
        f"{under}/masked_faster/tokens",
        f"{under}/masked_faster/predictions/geotoken",
    ]
    assert (tmp_path / under / "as_it_is" / "predictions" / "geotoken").is_symlink()
    assert [run["validation_loss"] for run in results["runs"]] == [0.5, 0.5, 1.0, 1.0]
    within_25 = [row["accuracy"][1]["value"] for row in results["splits"]["test"]["methods"]]
    assert within_25 == [0.0, 1.0, 1.0, 0.0]  # 0.1 and 0.2 degrees are 11 and 22 km
    assert "within a distance on the sphere" in (shown := evaluate.table(results)) and "masked, faster" in shown
    made.clear()
    assert experiments.run(given, Workdir(tmp_path), "one") == results and made == []
    # The stage that the run started from is unchanged.
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text())["settings"] == {"data": {"seed": 0}}


def test_what_another_experiment_made_is_not_made_again(tmp_path, stages):
    found, made = stages(tmp_path)
    faster = ("faster", dict(train=dict(seed=1)))
    given = config(
        one=dict(runs=(("base", {}), faster)), two=dict(runs=(("fastest", dict(train=dict(seed=2))), faster))
    )
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    experiments.run(given, Workdir(tmp_path), "one")
    made.clear()
    experiments.run(given, Workdir(tmp_path), "two")
    assert made == [f"experiments/two/fastest/{name}/geotoken" for name in ("geotoken", "predictions")]
    link = tmp_path / "experiments" / "two" / "faster" / "geotoken" / "geotoken"
    assert link.resolve() == tmp_path / "experiments" / "one" / "faster" / "geotoken" / "geotoken"


def test_one_that_was_interrupted_goes_on(tmp_path, stages, monkeypatch):
    found, made = stages(tmp_path)
    given = config(one=dict(runs=(("base", {}), ("other", dict(train=dict(seed=2))))))
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    predict, calls = found["predict"], []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments)

    monkeypatch.setitem(found, "predict", broken)
    with pytest.raises(KeyboardInterrupt):
        experiments.run(given, Workdir(tmp_path), "one")
    made.clear()
    found["predict"] = predict
    experiments.run(given, Workdir(tmp_path), "one")
    assert made == ["experiments/one/other/predictions/geotoken"]


def test_times_that_no_photo_has_are_missed_before_anything_is_made(tmp_path, stages):
    found, made = stages(tmp_path)
    given = config(one=dict(runs=(("base", {}), ("timed", dict(model=dict(context="season"), train=dict(seed=1))))))
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    manifests.begin(tmp_path, "photos", {}, []).finish({"train": 3}, captured=0)
    made.clear()
    with pytest.raises(
        settings.SettingsError, match=r"context is 'season', but no photo in \S*/photos has a capture time"
    ):
        experiments.run(given, Workdir(tmp_path), "one")
    assert not made and not (tmp_path / "experiments").exists()
    (tmp_path / "photos" / "manifest.json").unlink()
    manifests.begin(tmp_path, "photos", {}, []).finish({"train": 3}, captured=1)
    experiments.run(given, Workdir(tmp_path), "one")
    assert made == [f"experiments/one/timed/{folder}/geotoken" for folder in ("geotoken", "predictions")]


def test_the_page_has_what_is_there(tmp_path, stages):
    found, _ = stages(tmp_path)
    given = config(
        one=dict(runs=(("base", {}), ("near", dict(predict=dict(seed=1)))), note="Nearer is better."),
        two=dict(runs=(("base", {}),)),
    )
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    experiments.run(given, Workdir(tmp_path), "one")
    html = (tmp_path / "experiments/one/index.html").read_text()
    assert "<h1>One</h1>" in html and "What?" in html and "Nearer is better." in html
    assert 'aria-label="Percent of the photos of test within each distance' in html and "&quot;" not in html
    assert '<span class="up">+100.0</span>' in html and '"seed": 1' in html
    page = experiments.document(given, Workdir(tmp_path))
    assert "## One\n\nWhat?\n\nNearer is better.\n" in page and "## Two" not in page
    base, near = (line for line in page.splitlines() if line.startswith(("| base", "| near")))
    assert base == "| base | 0.0 | 0.0 | 100.0 | 100.0 | 100.0 | 4,641 |  |  | 0.500 |"
    assert (
        near
        == "| near | 0.0 | 100.0 | 100.0 | 100.0 | 100.0 | 4,963 | +100.0 (100.0..100.0) | +0.0 (0.0..0.0) | 0.500 |"
    )


def test_a_curve_has_each_validation_beside_the_first_neighbor(tmp_path, stages, monkeypatch):
    found, _ = stages(tmp_path)
    train = found["train"]
    given = config(one=dict(runs=(("base", {}), ("other", dict(train=dict(seed=1)))), curve=True))
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    for folder, places in (("gallery", PLACES[1:]), ("queries/validation", PLACES)):
        write_table(tmp_path / folder, places)
    manifests.begin(tmp_path, "gallery", {}, []).finish({})
    manifests.begin(tmp_path, "queries", {}, []).finish({"validation": 3})
    manifests.begin(tmp_path, "neighbors", {}, []).finish({"validation": 3})
    # The first neighbor of the first photo is 1,500 km from it. The first neighbor of the second photo is at its place.
    for field, values in (("rows", [[0, 1], [0, 1], [-1, -1]]), ("scores", np.zeros((3, 2)))):
        records.save_array(tmp_path / "neighbors" / f"validation.{field}.npy", np.array(values))

    def logged(config, path, variant):
        made = train(config, path, variant)
        shares = {f"validation/within_{km}_km": 0.25 for km in (1, 25, 200, 750, 2500)}
        lines = (
            {"step": 1, "examples": 64, "processor_s": 30.0},
            {"step": 1, "validation/loss": 2.0 + config.train.seed, **shares},
        )
        path.training_log(variant).write_text("\n".join(map(json.dumps, lines)))
        return made

    monkeypatch.setitem(found, "train", logged)
    results = experiments.run(given, Workdir(tmp_path), "one")
    assert results["curve"]["first_neighbor"] == [1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3]
    assert results["curve"]["runs"]["other"] == [
        {"examples": 64, "processor_s": 30.0, "loss": 3.0, "within": [0.25] * 5}
    ]
    (tmp_path / "experiments/one/results.json").unlink()  # as before the last run is complete
    page = experiments.document(given, Workdir(tmp_path))
    assert "\n| 64 | 0.5 | 2.000 | 25.0 | 25.0 | 25.0 | 0.5 | 3.000 | 25.0 | 25.0 | 25.0 |\n" in page
    assert "The first neighbor has 33.3 within 1 km, 33.3 within 25 km and 33.3 within 200 km." in page
    assert "figures/one_light.webp" in page
    html = (tmp_path / "experiments/one/index.html").read_text()
    assert (
        'aria-label="Percent of the validation photos within 25 km against train examples, one curve per run"' in html
    )


@pytest.mark.parametrize(
    ("name", "runs", "message"),
    [
        ("three", (("base", {}),), "there is no experiment 'three': choose one of one"),
        ("one", (("base", {}), ("b", dict(index=dict(kilometers=1)))), "kilometers"),
    ],
)
def test_what_there_is_not_is_named(tmp_path, stages, name, runs, message):
    found, _ = stages(tmp_path)
    given = config(one=dict(runs=runs))
    for stage in found.values():
        stage(given, Workdir(tmp_path), "geotoken")
    with pytest.raises(settings.SettingsError, match=message):
        experiments.run(given, Workdir(tmp_path), name)
