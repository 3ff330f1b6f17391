"""Training: the same result after a restart or on other devices, and the files that it writes."""

import dataclasses
import json
import logging
import re
import signal
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec

from geotoken_jax import randomness, settings, sharding
from geotoken_jax.checkpoint import Checkpoints
from geotoken_jax.data import pipeline
from geotoken_jax.train import loop, metrics
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer, make_schedule
from geotoken_jax.train.step import Trainer
from tests import fixtures

OPTIMIZER = OptimizerSettings(
    learning_rate=0.02, schedule="cosine", decay=0.9, warmup=0.0, weight_decay=0.01, b2=0.999, clip=1.0
)


class Line(nnx.Module):
    """A linear model with a constant beside its parameters."""

    def __init__(self, rngs):
        self.linear = sharding.linear(4, 2, ("embed", None), rngs=rngs)
        self.factor = nnx.Variable(jnp.asarray(2.0))


class LineTask:
    """Fits y = x @ w, with dropout."""

    flops = 48.0

    def init(self, rngs):
        return Line(rngs)

    def loss(self, model, batch, key):
        errors = (
            model.factor[...]
            * model.linear(randomness.dropout(batch["x"], 0.2, randomness.words(key, len(batch["x"]))))
            - batch["y"]
        )
        loss = jnp.average((errors**2).sum(-1), weights=batch.get("valid"))
        return loss, {"largest": jnp.abs(errors).max()}


def read(rows):
    x = np.stack([np.sin(rows * (k + 1)) for k in range(4)], 1).astype(np.float32)
    return {"x": x, "y": x @ np.array([[1, 2], [3, -1], [0, 1], [2, 2]], np.float32)}


def train_settings(**changes):
    values = dict(
        batch_size=8, accumulate=1, examples=8 * 4, evaluate_every=2, log_every=1, seed=0, ema=0.0, max_skipped=2,
        profile=(0, 0), profiler_port=0, save_every_s=0.0, keep=2, wandb="", optimizer=OPTIMIZER,
        gradient_dtype="float32", epochs=0, max_damaged=0.0,
    )  # fmt: skip
    return loop.TrainSettings(**{**values, **changes})


def train(folder, steps, task=None, make_input=None, scored=None, **changes):
    """Runs the loop on 20 photos in batches of 8, validating every second step. scored: see loop.Data."""
    options = train_settings(**changes)
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, 1, 1))
    batches = (make_input or Stopping)(pipeline.training(20, read, 8, seed=0), steps)
    data = loop.Data(batches, lambda: pipeline.evaluation(12, read, 8), 20, {}, scored)
    return loop.run(task or LineTask(), options, mesh, folder, data, "train")


class Interrupted(Exception):
    pass


class Stopping:
    """A training input that fails after a number of batches."""

    def __init__(self, batches, n):
        self.batches, self.n = batches, n
        self.get_state, self.set_state, self.close = batches.get_state, batches.set_state, batches.close

    def __next__(self):
        if not self.n:
            raise Interrupted
        self.n -= 1
        return next(self.batches)


TIMES = (
    "examples_per_second",
    "input_wait",
    "seconds_left",
    "tflops_per_second",
    "elapsed_s",
    "goodput",
    "processor_s",
)


def lines(folder):
    """Returns the lines of metrics without their times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def parameters(folder):
    return safetensors.numpy.load((folder / "parameters.safetensors").read_bytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, whole, stop):
    folder, result = whole
    with pytest.raises(Interrupted):
        train(tmp_path, stop)
    assert not (tmp_path / "parameters.safetensors").exists()
    assert lines(tmp_path)[-1]["step"] == stop
    assert train(tmp_path, 2) == result  # two batches are enough after the checkpoint of step 2
    assert lines(tmp_path) == lines(folder)
    found, expected = parameters(tmp_path), parameters(folder)
    assert found.keys() == expected.keys() == {"linear/kernel", "linear/bias", "factor"}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_torn_newest_checkpoint_costs_its_steps_and_no_more(tmp_path, whole, caplog):
    folder, result = whole
    train(tmp_path, 4)
    next((tmp_path / "checkpoints" / "4" / "state" / "d").iterdir()).unlink()
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, 2) == result
    assert "checkpoint 4 in" in caplog.text and lines(tmp_path) == lines(folder)


def test_a_finished_run_trains_no_more(tmp_path, whole):
    _, result = whole
    assert train(tmp_path, 4) == result == train(tmp_path, 0)


def test_the_metrics_of_a_run(whole):
    found = lines(whole[0])
    assert [line["step"] for line in found] == [1, 2, 2, 3, 4, 4]
    schedule = make_schedule(OPTIMIZER, 4, 2)
    rates = [line["learning_rate"] for line in found if "learning_rate" in line]
    assert rates == [float(schedule(n)) for n in range(4)]
    assert found[3]["examples"] == 24 and found[0].keys() >= {"train/loss", "train/gradient_norm", "train/largest"}
    assert found[2].keys() == {"step", "validation/loss", "validation/largest"}


def test_trainings_of_all_lengths_and_rates_have_the_same_step():
    """So a study compiles each model once, and a longer training compiles nothing new."""
    mesh, programs = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1]), []
    for steps, optimizer in (4, OPTIMIZER), (6, dataclasses.replace(OPTIMIZER, learning_rate=0.5, warmup=0.2)):
        options = train_settings(examples=8 * steps, optimizer=optimizer)
        trainer, rates = loop.make_trainer(LineTask(), options, mesh), loop.learning_rates(options, 20)
        arguments = trainer.abstract, read(np.arange(8)), jax.random.key(0), rates[0], {}
        programs.append(trainer.step.lower(*arguments).as_text())
    assert programs[0] == programs[1]


def test_validation_is_a_mean_over_valid_photos_without_dropout(whole):
    found = parameters(whole[0])
    photos = read(np.arange(12))
    errors = 2 * (photos["x"] @ found["linear/kernel"] + found["linear/bias"]) - photos["y"]
    assert whole[1].best_loss == pytest.approx((errors**2).sum(-1).mean(), rel=1e-5)
    assert whole[1].parameters == 4 * 2 + 2 and found["factor"] == 2.0


def test_photos_that_are_only_scored_do_not_choose_the_step(tmp_path, whole):
    """The scored photos are labeled with the wrong sign, so that they would choose the first step."""

    def wrong(rows):
        photos = read(rows)
        return {"x": photos["x"], "y": -photos["y"]}

    result = train(tmp_path, 4, scored=lambda: pipeline.evaluation(12, wrong, 8))
    losses = {
        name: [line[name] for line in lines(tmp_path) if name in line] for name in ("validation/loss", "scored/loss")
    }
    assert losses["scored/loss"] == sorted(losses["scored/loss"]) and result.best_step == 4
    assert losses["validation/loss"] == [
        line["validation/loss"] for line in lines(whole[0]) if "validation/loss" in line
    ]


def test_the_parameters_written_are_the_best_steps(tmp_path):
    class Worse(LineTask):
        """Its validation loss grows as training proceeds, so the first checkpoint is the best."""

        def loss(self, model, batch, key):
            loss, found = super().loss(model, batch, key)
            return (loss, found) if key is not None else (-loss, found)

    result = train(tmp_path, 6, Worse(), examples=8 * 6)
    validation = {line["step"]: line["validation/loss"] for line in lines(tmp_path) if "validation/loss" in line}
    assert result.best_step == min(validation, key=validation.get) == 2 and result.best_loss == validation[2]
    photos, found = read(np.arange(12)), parameters(tmp_path)
    errors = 2 * (photos["x"] @ found["linear/kernel"] + found["linear/bias"]) - photos["y"]
    assert -(errors**2).sum(-1).mean() == pytest.approx(validation[2], rel=1e-5)


def test_lines_past_the_restored_step_and_torn_ones_are_taken_back(tmp_path):
    with metrics.Writer(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with metrics.Writer(tmp_path, 2) as writer:
        writer.write(3, {"loss": 0.25})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_moving_average_of_the_parameters_is_validated_and_kept(tmp_path):
    train(tmp_path, 4, ema=0.5)
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, 1, 1))
    trainer, schedule = Trainer(LineTask(), make_optimizer(OPTIMIZER), mesh, ema=0.5), make_schedule(OPTIMIZER, 4, 2)
    state, batches = trainer.init(jax.random.key(0)), pipeline.training(20, read, 8, seed=0)
    average = jax.tree.map(np.asarray, state["params"])
    for step in range(4):
        state, _ = trainer.step(state, next(batches), jax.random.key(0), schedule(step), {})
        decay = min(0.5, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state["params"])
    assert not np.allclose(average["linear"]["kernel"], state["params"]["linear"]["kernel"], atol=1e-4)
    np.testing.assert_allclose(parameters(tmp_path)["linear/kernel"], average["linear"]["kernel"], rtol=1e-5)


class Spoiled(Stopping):
    """A training input whose batches are NaN from one step to another."""

    def __init__(self, batches, n, first, last):
        super().__init__(batches, n)
        self.bad, self.at = range(first, last + 1), 0

    def __next__(self):
        self.at += 1
        batch = super().__next__()
        return {**batch, "x": batch["x"] * np.nan} if self.at in self.bad else batch


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    train(tmp_path, 4, make_input=lambda batches, n: Spoiled(batches, n, 2, 3))
    found = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["skipped"] for line in found] == [0, 1, 2, 2]
    assert np.isnan(found[1]["train/loss"]) and np.isfinite(found[3]["train/loss"])
    assert all(np.isfinite(value).all() for value in parameters(tmp_path).values())


def test_training_stops_when_steps_keep_failing(tmp_path):
    with pytest.raises(loop.Diverged, match=r"max_skipped is 2, and the last 3 steps until 4 had .*: lower optimizer"):
        train(tmp_path, 6, examples=8 * 6, make_input=lambda batches, n: Spoiled(batches, n, 2, 6))


class Terminated(Stopping):
    """A training input that raises SIGTERM during its n-th batch."""

    def __next__(self):
        self.n -= 1
        if not self.n:
            signal.raise_signal(signal.SIGTERM)
        return next(self.batches)


@pytest.mark.slow
def test_a_run_asked_to_end_saves_and_goes_on_where_it_was(tmp_path):
    options = dict(examples=8 * 8, log_every=4, evaluate_every=8)
    train(tmp_path / "whole", 8, **options)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Preempted, match="saved at step 3"):
        train(tmp_path / "ended", 3, make_input=Terminated, **options)
    assert signal.getsignal(signal.SIGTERM) is before
    train(tmp_path / "ended", 5, **options)  # no batch is read twice
    assert lines(tmp_path / "ended") == lines(tmp_path / "whole")
    for name, value in parameters(tmp_path / "whole").items():
        np.testing.assert_array_equal(parameters(tmp_path / "ended")[name], value)


@pytest.mark.slow
def test_some_steps_are_traced_on_request(tmp_path):
    train(tmp_path, 4, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_trace_ends_with_the_training_or_with_its_error(tmp_path):
    train(tmp_path / "short", 4, profile=(3, 9))
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", 3, profile=(3, 9))
    train(tmp_path / "next", 4, profile=(3, 4))  # JAX has one trace at a time
    for name in ("short", "broken", "next"):
        assert list((tmp_path / name / "profile").rglob("*.xplane.pb"))


def test_the_profiler_listens_on_its_port_while_training(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    class Connecting(Stopping):
        def __next__(self):
            socket.create_connection(("127.0.0.1", port), 10).close()
            return super().__next__()

    for _ in range(2):
        train(tmp_path, 4, make_input=Connecting, profiler_port=port)


def test_checkpoints_by_time_have_no_loss_and_are_never_the_best(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, 5, examples=8 * 8, evaluate_every=8, save_every_s=1e-9, keep=3)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [3, 4, 5]  # the first line, with the time of a step, is complete at step 2
        with pytest.raises(FileNotFoundError, match="no checkpoint with a finite validation loss"):
            _ = checkpoints.best
    assert train(tmp_path, 3, examples=8 * 8, evaluate_every=8, save_every_s=1e9, keep=3).best_step == 8


@pytest.mark.slow
def test_goodput_counts_pauses_and_repeated_steps_as_lost(tmp_path):
    class Slow(Stopping):
        """Takes 0.1 s per batch."""

        def __next__(self):
            time.sleep(0.1)
            return super().__next__()

    def last():
        return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])

    with pytest.raises(Interrupted):
        train(tmp_path, 7, examples=8 * 8, evaluate_every=4, make_input=Slow)
    before = last()
    trained = before["goodput"] * before["elapsed_s"]
    assert before["step"] == 7 and 0.1 * 6 <= trained < before["elapsed_s"]
    train(tmp_path, 4, examples=8 * 8, evaluate_every=4, make_input=Slow)
    after = [
        line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "goodput" in line
    ]
    again = next(line for line in after if line["step"] == 5)
    assert again["elapsed_s"] > before["elapsed_s"]
    assert again["goodput"] * again["elapsed_s"] < trained - 0.1  # steps 5 to 7 were lost


@pytest.mark.slow
def test_processor_time_is_kept_over_a_restart_and_has_no_waiting(tmp_path):
    class Working(Stopping):
        """Computes for 0.05 s, and sleeps for 0.05 s, per batch."""

        def __next__(self):
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
            time.sleep(0.05)
            return super().__next__()

    with pytest.raises(Interrupted):
        train(tmp_path, 4, examples=8 * 8, evaluate_every=4, make_input=Working)
    train(tmp_path, 4, examples=8 * 8, evaluate_every=4, make_input=Working)
    found = [
        line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "skipped" in line
    ]
    seconds = {line["step"]: line["processor_s"] for line in found}
    assert 0.05 * 3 <= seconds[4] < seconds[8]  # the first step of a start, which compiles, does not count
    assert 0.05 * 6 <= seconds[8] and seconds[8] <= found[-1]["goodput"] * found[-1]["elapsed_s"] + 0.5


@pytest.mark.parametrize("key, value", [("save_every_s", -1.0), ("keep", 0), ("profiler_port", 70_000)])
def test_a_setting_out_of_range_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        train(tmp_path, 4, **{key: value})


def test_the_speed_of_training(tmp_path):
    train(tmp_path, 4)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["tflops_per_second"] == pytest.approx(48.0 * line["examples_per_second"] / 1e12)
    assert line["seconds_left"] == pytest.approx(8 * 3 / line["examples_per_second"])


def test_weights_and_biases_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(settings.SettingsError, match=r"wandb is 'mine', but .* pip install 'geotoken-jax\[wandb\]'"):
        train(tmp_path, 4, wandb="mine")


@pytest.mark.slow
def test_parameters_and_moments_are_created_split_over_the_mesh():
    mesh = sharding.make_mesh(sharding.MeshSettings(2, 2, 2))
    task = fixtures.task(fixtures.settings("ours", decoder_layers=1), mesh=mesh)
    trainer = Trainer(task, make_optimizer(OPTIMIZER), mesh, ema=0.9)
    state = trainer.init(jax.random.key(0))
    adam = next(part for part in jax.tree.leaves(state["optimizer"], is_leaf=_is_adam) if _is_adam(part))
    for tree in (state["params"], state["ema"], adam.mu, adam.nu):
        kernel = tree["decoder"]["feed_forward"]["up"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert kernel.addressable_shards[0].data.shape == (1, 8, 12)
    lines = trainer.describe().splitlines()
    assert lines[-1].split()[-1] == f"{sum(p.size for p in jax.tree.leaves(state['params'])):,}"
    assert any(line.split() == ["decoder/feed_forward/up/kernel", "(1,", "16,", "24)", "(None,", "'fsdp',", "'tensor')",
                                "384"] for line in lines)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ours", "paper"])
def test_each_device_works_on_its_own_photos(form):
    """If parameters are sharded, the compiler could shard activations and replicate photos on all devices instead."""
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 4, 2))
    trainer = Trainer(fixtures.task(fixtures.settings(form), mesh=mesh), make_optimizer(OPTIMIZER), mesh)
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=trainer.batch_sharding)
        for name, value in fixtures.batch(56).items()
    }
    program = trainer.step.lower(trainer.abstract, batch, jax.random.key(0), 0.1, {}).compile().as_text()
    assert re.search(r"f32\[14,\d+,\d+", program) and re.findall(r"f32\[56,\d+,16\]", program) == []


def _is_adam(part):
    return isinstance(part, optax.ScaleByAdamState)


def test_weight_decay_spares_vectors_and_clipping_bounds_the_gradient():
    options = dataclasses.replace(OPTIMIZER, weight_decay=0.5, clip=0.0)
    optimizer = make_optimizer(options)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2), "layers": {"scale": jnp.ones((3, 2))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, rate=0.1)
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.5, rtol=1e-6)
    assert not updates["vector"].any() and not updates["layers"]["scale"].any()
    # After a clipped gradient, Adam's first moment is a tenth of that gradient.
    clipped = make_optimizer(dataclasses.replace(options, clip=1.0))
    _, state = clipped.update(jax.tree.map(lambda p: 100 * p, params), clipped.init(params), params, rate=0.1)
    adam = next(part for part in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(part))
    assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("cosine", 0.0, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("cosine", 0.1, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("exponential", 0.0, {0: 1.0, 19: 1.0, 20: 0.9, 45: 0.81}),
        ("exponential", 0.1, {0: 0.0, 5: 0.5, 10: 1.0, 29: 1.0, 30: 0.9}),
    ],
)
def test_schedules(schedule, warmup, expected):
    options = dataclasses.replace(OPTIMIZER, learning_rate=3e-4, schedule=schedule, warmup=warmup)
    found = make_schedule(options, steps=100, steps_per_epoch=20)
    for step, share in expected.items():
        assert float(found(step)) == pytest.approx(3e-4 * share, abs=1e-9), step


def test_an_unknown_schedule_is_refused():
    with pytest.raises(settings.SettingsError, match=r"config\.train\.schedule is 'linear': choose cosine"):
        settings.changed(OPTIMIZER, {"schedule": "linear"}, "train")
