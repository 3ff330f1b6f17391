"""The training loop of every task: restore, step, log, validate, save."""

import contextlib
import dataclasses
import errno
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from geotoken_jax import checkpoint, chips, processes, sharding
from geotoken_jax.checkpoint import Checkpoints
from geotoken_jax.manifests import StageError
from geotoken_jax.progress import Progress
from geotoken_jax.settings import Runtime
from geotoken_jax.train import metrics
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer, make_schedule
from geotoken_jax.train.step import Metrics, Resident, State, Task, Trainer

#: Named arrays: the rows of a batch that this process reads (see sharding.local_rows).
Batch = Mapping[str, np.ndarray]


class Preempted(RuntimeError):
    """Training was interrupted by SIGTERM and has saved a checkpoint. The same command continues from it."""


class Diverged(RuntimeError):
    """More than TrainSettings.max_skipped steps in a row had a loss or gradient that was not finite."""


class TrainingInput(Protocol):
    """An endless iterator over batches. Its position can be saved and restored."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """batch_size: photos per step, over all devices. accumulate: number of parts of a batch processed one after
    another, for batches that do not fit into memory. examples: number of photos to train on; a photo counts each time
    it is read. evaluate_every: steps between two validations, each with a checkpoint; the last step has both too.
    log_every: steps between two lines of metrics. seed: seed of the initial parameters, the order of photos and
    dropout. ema: decay of the moving average of the parameters, which replaces them in validation and export; no
    average if 0. max_skipped: largest number of steps in a row that may have a loss or gradient that is not finite;
    after more, training ends with Diverged. profile: first and last step of a trace for TensorBoard; no trace if
    (0, 0). wandb: project of Weights & Biases to write to; none if empty. optimizer: see OptimizerSettings."""

    batch_size: int
    accumulate: Runtime[int]
    examples: int
    evaluate_every: int
    log_every: Runtime[int]
    seed: int
    ema: float
    max_skipped: int
    profile: Runtime[tuple[int, int]]
    wandb: Runtime[str]
    optimizer: OptimizerSettings

    @property
    def steps(self) -> int:
        return self.examples // self.batch_size


@dataclasses.dataclass(frozen=True)
class Result:
    """best_step: step with the smallest validation loss. best_loss: that loss. parameters: number of parameters."""

    best_step: int
    best_loss: float
    parameters: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and validation data.

    batches: training input, at its start; `run` sets its position if training resumes. validation: function that
    returns the batches of one pass over the validation split, each with `valid` [b], False for padding. photos: number
    of training photos, which is the length of an epoch in the learning-rate schedule. resident: arrays that stay on the
    devices over all steps; may be empty.
    """

    batches: TrainingInput
    validation: Callable[[], Iterable[Batch]]
    photos: int
    resident: Resident = dataclasses.field(default_factory=dict)


def run(task: Task, settings: TrainSettings, mesh: Mesh, folder: epath.PathLike, data: Data, name: str) -> Result:
    """Trains the task on `settings.examples` photos, continuing from the newest checkpoint in `folder` if there is one.

    Writes to `folder`: checkpoints, metrics, parameters.txt with the names and shapes of the parameters, and at the end
    parameters.safetensors with the parameters of the best step. name: name shown in progress, messages and Weights &
    Biases.

    Raises Preempted after SIGTERM, Diverged if too many steps in a row are not finite, StageError if the disk is full.
    """
    schedule = make_schedule(settings.optimizer, settings.steps, max(1, data.photos // settings.batch_size))
    optimizer = make_optimizer(settings.optimizer, schedule)
    trainer = Trainer(task, optimizer, mesh, settings.accumulate, settings.ema)
    folder = epath.Path(folder)
    first = jax.process_index() == 0
    key = jax.random.key(settings.seed)
    with (
        _full_disk_as_stage_error(folder),
        Checkpoints(folder / "checkpoints") as checkpoints,
        _Preemption() as preemption,
    ):
        if first:
            (folder / "parameters.txt").write_text(trainer.describe())
        step, state, window = _restore(checkpoints, trainer, key, data.batches)
        with metrics.Writer(folder, step, settings.wandb, name, shown=first) as writer, Progress(
            name, settings.steps * settings.batch_size, "photos", done=step * settings.batch_size, shown=first
        ) as progress:  # fmt: skip
            log = _Log(writer, settings, task.flops, mesh, window)
            profile = _Profile(settings.profile, folder / "profile")
            while step < settings.steps:
                profile.before(step + 1)
                processes.report_progress(f"reading the photos of step {step + 1}")
                waiting = time.monotonic()
                batch = sharding.global_batch(next(data.batches), mesh, settings.batch_size)
                log.waited(time.monotonic() - waiting)
                processes.report_progress(f"in step {step + 1}")
                state, values = trainer.step(state, batch, key, data.resident)
                step += 1
                log.add(values)
                profile.after(step, state)
                last = step == settings.steps
                if step % settings.log_every == 0 or last:
                    line = log.write(step, state, float(np.asarray(schedule(step - 1))))
                    progress.add(0, note=f"loss {line['train/loss']:.3f}")
                progress.add(settings.batch_size)
                preempted = preemption.requested(step) and not last
                validated = step % settings.evaluate_every == 0 or last
                if validated or preempted:
                    loss = _validate(trainer, step, state, data, writer, settings.batch_size) if validated else None
                    processes.report_progress(f"saving step {step}")
                    checkpoints.save(step, state, {"input": data.batches.get_state(), "window": log.window()}, loss)
                    log.pause()
                if preempted:
                    raise Preempted(f"{name} was interrupted, and is saved at step {step}: run the same command again")
        data.batches.close()
        processes.report_progress("writing the last checkpoint")
    with _full_disk_as_stage_error(folder):
        return _finish(folder, trainer)


@contextlib.contextmanager
def _full_disk_as_stage_error(folder: epath.Path) -> Iterator[None]:
    """Raises StageError in place of an OSError that a full disk causes; other errors pass.

    After StageError the command exits with 2, and launch scripts do not restart it: the disk would still be full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StageError(
            f"{folder} cannot be written to ({error.strerror}): free some space there, and run the same command again"
        ) from error


def _restore(
    checkpoints: Checkpoints, trainer: Trainer, key: jax.Array, batches: TrainingInput
) -> tuple[int, State, list[dict[str, float]]]:
    """Returns the step to continue from, its state, and the metrics of the steps since the last line of metrics.

    Also sets the position of `batches`. Without a checkpoint, returns step 0 with the initial state.
    """
    processes.report_progress("restoring a checkpoint")
    restored = checkpoints.restore_last(trainer.abstract)
    if restored is None:
        return 0, trainer.init(key), []
    step, state, position = restored
    batches.set_state(position["input"])
    return step, state, position["window"]


def _validate(trainer: Trainer, step: int, state: State, data: Data, writer: metrics.Writer, batch_size: int) -> float:
    """Returns the validation loss, and writes all validation metrics."""
    means = evaluate(trainer, state, data.validation(), data.resident, batch_size)
    writer.write(step, {f"validation/{name}": value for name, value in means.items()})
    return means["loss"]


def _finish(folder: epath.Path, trainer: Trainer) -> Result:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        best = checkpoints.best
        processes.report_progress(f"writing the parameters of step {best}")
        state, _ = checkpoints.restore(best, trainer.abstract)
        checkpoint.write_parameters(folder / "parameters.safetensors", *trainer.exported(state))
        return Result(best, checkpoints.loss(best), sum(p.size for p in jax.tree.leaves(state["params"])))


def evaluate(
    trainer: Trainer, state: State, batches: Iterable[Batch], resident: Resident, batch_size: int
) -> dict[str, float]:
    """Returns the means of the task's loss and metrics over all valid photos of the batches.

    batch_size: rows per batch, over all processes.
    """
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        processes.report_progress("validating")
        batch_sums, n = trainer.evaluate(state, sharding.global_batch(batch, trainer.mesh, batch_size), resident)
        sums = {name: sums.get(name, 0) + value for name, value in batch_sums.items()}
        count += n
    return {name: float(value) / float(count) for name, value in sums.items()}


class _Preemption:
    """Reports SIGTERM through `requested`. With several processes, all of them stop after the same step."""

    def __init__(self):
        self._signaled = False

    def __enter__(self):
        # With several processes JAX has its own handler of SIGTERM, which a second handler would replace.
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error):
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, *_: Any) -> None:
        self._signaled = True

    def requested(self, step: int) -> bool:
        return self._signaled if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


class _Profile:
    """Writes a profiler trace of training steps to `folder`. steps: first and last step of the trace."""

    def __init__(self, steps: tuple[int, int], folder: epath.Path):
        self._first, self._last = steps
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: State) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


class _Log:
    """Collects the metrics of each step on the device, and writes lines with their means and the training speed.

    window: metrics of the steps since the last line, restored from a checkpoint; empty in a new training.
    """

    def __init__(
        self,
        writer: metrics.Writer,
        settings: TrainSettings,
        flops: float,
        mesh: Mesh,
        window: list[dict[str, float]],
    ):
        self._writer, self._settings, self._flops, self._devices = writer, settings, flops, mesh.size
        chip = chips.find(mesh.devices.flat[0].device_kind)
        self._peak = chip.flops if chip else None
        self._restored: list[dict[str, float]] = window
        self._gathered: list[Metrics] = []
        self._since, self._waited = time.monotonic(), 0.0
        self._pause_from: float | None = None

    def waited(self, seconds: float) -> None:
        if self._pause_from is not None:
            self._since += time.monotonic() - seconds - self._pause_from
            self._pause_from = None
        self._waited += seconds

    def pause(self) -> None:
        """Begins a pause, which lasts until the next batch is requested and does not count as training time."""
        self._pause_from = time.monotonic()

    def add(self, values: Metrics) -> None:
        self._gathered.append(values)

    def window(self) -> list[dict[str, float]]:
        """Returns the metrics of each step since the last written line."""
        return self._restored + jax.tree.map(float, jax.device_get(self._gathered))

    def write(self, step: int, state: State, learning_rate: float) -> dict[str, float]:
        gathered = self.window()
        seconds = time.monotonic() - self._since
        rate = len(self._gathered) * self._settings.batch_size / seconds
        line = {f"train/{name}": float(np.mean([g[name] for g in gathered])) for name in gathered[0]}
        line |= {
            "examples": step * self._settings.batch_size,
            "learning_rate": learning_rate,
            "skipped": int(state["skipped"]),
            "examples_per_second": rate,
            "input_wait": self._waited / seconds,
            "seconds_left": (self._settings.steps - step) * self._settings.batch_size / rate,
        }
        if jax.process_count() > 1:
            line |= _slowest(line["input_wait"])
        if self._flops:
            line["tflops_per_second"] = rate * self._flops / 1e12
            if self._peak:
                line["flops_utilization"] = rate * self._flops / self._devices / self._peak
        self._writer.write(step, line)
        self._stop_if_diverged(step, state)
        self._restored, self._gathered, self._since, self._waited = [], [], time.monotonic(), 0.0
        return line

    def _stop_if_diverged(self, step: int, state: State) -> None:
        in_a_row = int(state["skipped_in_a_row"])
        if in_a_row > self._settings.max_skipped:
            raise Diverged(
                f"max_skipped is {self._settings.max_skipped}, and the last {in_a_row} steps until {step} had a loss "
                "or a gradient that was not finite: lower optimizer.learning_rate, or set optimizer.clip to 1.0 if it "
                "is 0"
            )


def _slowest(input_wait: float) -> dict[str, float]:
    """Returns the process that waits longest for its batches, which delays all others, and its share of waiting.

    input_wait: share of time that the calling process waited for its batches.
    """
    waits = np.asarray(multihost_utils.process_allgather(np.float32(input_wait)))
    return {"slowest_process": int(waits.argmax()), "slowest_input_wait": float(waits.max())}
