"""The training loop of every task: restore, step, log, validate, save."""

import contextlib
import dataclasses
import errno
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from geotoken_jax import checkpoint, chips, jax_modes, processes, randomness, sharding
from geotoken_jax.checkpoint import Checkpoints
from geotoken_jax.errors import UserError
from geotoken_jax.manifests import StageError
from geotoken_jax.progress import Progress
from geotoken_jax.settings import Runtime, SettingsError
from geotoken_jax.train import metrics
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer, make_schedule
from geotoken_jax.train.step import Metrics, Resident, State, Task, Trainer

#: Named arrays: the rows of a batch that this process reads (see sharding.local_rows).
Batch = Mapping[str, np.ndarray]


class Preempted(RuntimeError):
    """Training was interrupted by SIGTERM and has saved a checkpoint. The same command continues from it."""


class Diverged(UserError, RuntimeError):
    """More than TrainSettings.max_skipped steps in a row had a loss or gradient that was not finite."""


class TrainingInput(Protocol):
    """An endless iterator over batches. Its position can be saved and restored."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a training.

    batch_size: photos per step, over all devices; fewer if there are fewer training photos.
    accumulate: number of parts of a batch processed one after another, for batches that do not fit into memory.
    gradient_dtype: type in which gradients are summed over devices and over the parts of a batch: "float32", or
    "bfloat16", which halves the bytes that devices send.
    examples: number of photos to train on. A photo counts each time it is read.
    epochs: largest number of times that each photo is read. It ends a training on few photos before `examples`. If 0,
    there is no limit.
    evaluate_every: steps between two validations. A checkpoint is saved with each. The last step has both too.
    save_every_s: seconds of training after which a checkpoint is saved without a validation. If 0, none is. With
    several processes the clock of the first one counts.
    keep: number of newest checkpoints to keep in addition to the best one.
    log_every: steps between two lines of metrics.
    seed: seed of the initial parameters, the order of photos and dropout.
    ema: decay of the moving average of the parameters, which validation and export use. If 0, there is no average, and
    they use the newest parameters.
    max_skipped: largest number of steps in a row with a loss or gradient that is not finite. After more, training ends
    with Diverged.
    max_damaged: largest share of the training photos, and of the validation photos, with a damaged record. Training
    reads the next photo in place of a damaged one, and validation leaves it out.
    profile: first and last step of a trace for TensorBoard. If (0, 0), there is no trace.
    profiler_port: port of the first process for TensorBoard's profiler. The second process has the next port, and so
    on. If 0, there is no port.
    wandb: project of Weights & Biases to write to. If empty, nothing is written there.
    optimizer: see OptimizerSettings.
    """

    batch_size: int
    accumulate: Runtime[int]
    gradient_dtype: str
    examples: int
    epochs: int
    evaluate_every: int
    save_every_s: Runtime[float]
    keep: Runtime[int]
    log_every: Runtime[int]
    seed: int
    ema: float
    max_skipped: int
    max_damaged: Runtime[float]
    profile: Runtime[tuple[int, int]]
    profiler_port: Runtime[int]
    wandb: Runtime[str]
    optimizer: OptimizerSettings

    def __post_init__(self):
        if self.save_every_s < 0:
            raise ValueError(f"save_every_s is {self.save_every_s}: use a number of seconds, or 0 for none")
        if not 0 <= self.max_damaged <= 1:
            raise ValueError(f"max_damaged is {self.max_damaged}: use a share of the photos, 0 to 1")
        if self.keep < 1:
            raise ValueError(
                f"keep is {self.keep}: use 1 or more, because training continues from the newest checkpoint"
            )
        if not 0 <= self.profiler_port < 65_536:
            raise ValueError(f"profiler_port is {self.profiler_port}: use a port below 65,536, or 0 for none")
        if self.gradient_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"gradient_dtype is {self.gradient_dtype!r}: choose float32 or bfloat16")

    @property
    def steps(self) -> int:
        return self.examples // self.batch_size

    def for_photos(self, photos: int, unit: int) -> "TrainSettings":
        """Returns the settings of a training on this number of photos.

        If batch_size is larger than `photos`, it becomes the largest multiple of `unit` up to `photos`. If `epochs` is
        not 0, `examples` becomes at most epochs x photos. It is at least one batch. Raises SettingsError if there are
        fewer photos than `unit`. unit: smallest possible batch size, one photo per device and part of a batch.
        """
        size, examples = self.batch_size, self.examples
        if photos < size:
            size = photos // unit * unit
            if not size:
                raise SettingsError(
                    f"batch_size needs at least {unit} photos, one for each device and each part of accumulate, but "
                    f"there are {photos} to train on: use more photos or fewer devices"
                )
        if self.epochs:
            examples = min(examples, self.epochs * photos)
        return dataclasses.replace(self, batch_size=size, examples=max(examples, size))


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a training.

    best_step: step with the smallest validation loss. best_loss: the smallest validation loss. parameters: number of
    parameters. steps: number of steps. examples: number of photos read in these steps.
    """

    best_step: int
    best_loss: float
    parameters: int
    steps: int
    examples: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and validation data.

    batches: training input, at its start. If training resumes, `run` sets its position. validation: function that
    returns the batches of one pass over the validation split. Each has `valid` [b], False for padding. photos: number
    of training photos, which is the length of an epoch in the learning-rate schedule. resident: arrays that stay on the
    devices over all steps; may be empty. scored: function that returns the batches of further validation photos, whose
    metrics are written but do not choose the best step; None if there are none.
    """

    batches: TrainingInput
    validation: Callable[[], Iterable[Batch]]
    photos: int
    resident: Resident = dataclasses.field(default_factory=dict)
    scored: Callable[[], Iterable[Batch]] | None = None


def make_trainer(task: Task, settings: TrainSettings, mesh: Mesh) -> Trainer:
    """Returns the trainer of a task."""
    optimizer = make_optimizer(settings.optimizer)
    return Trainer(task, optimizer, mesh, settings.accumulate, settings.ema, settings.gradient_dtype)


def learning_rates(settings: TrainSettings, photos: int) -> np.ndarray:
    """Returns the learning rate of each step. photos: number of training photos per epoch."""
    schedule = make_schedule(settings.optimizer, settings.steps, max(1, photos // settings.batch_size))
    return np.asarray(jax.jit(schedule)(np.arange(settings.steps)), np.float32)


@jax_modes.standard()
def run(task: Task, settings: TrainSettings, mesh: Mesh, folder: epath.PathLike, data: Data, name: str) -> Result:
    """Trains the task on `settings.examples` photos, continuing from the newest checkpoint in `folder` if there is one.

    Writes to `folder`: checkpoints, metrics, parameters.txt with the names and shapes of the parameters, and at the end
    parameters.safetensors with the parameters of the best step. name: name shown in progress, messages and Weights &
    Biases.

    Raises Preempted after SIGTERM, Diverged if too many steps in a row are not finite, StageError if the disk is full.
    """
    started, total = processes.take_start(), settings.steps * settings.batch_size
    trainer, rates = make_trainer(task, settings, mesh), learning_rates(settings, data.photos)
    folder = epath.Path(folder)
    first = jax.process_index() == 0
    key = randomness.key(settings.seed)
    with (
        _full_disk_as_stage_error(folder),
        _profiler(settings.profiler_port),
        Checkpoints(folder / "checkpoints", settings.keep) as checkpoints,
        _Preemption() as preemption,
    ):
        if first:
            (folder / "parameters.txt").write_text(trainer.describe())
        step, state, position = _restore(checkpoints, trainer, key, data.batches)
        with (
            metrics.Writer(folder, step, settings.wandb, name, shown=first) as writer,
            Progress(name, total, "photos", step * settings.batch_size, first) as progress,
            _Profile(settings.profile, folder / "profile") as profile,
            _Log(writer, settings, task.flops, mesh, started, position) as log,
        ):
            saved = step
            while step < settings.steps:
                profile.before(step + 1)
                batch = _next_batch(step + 1, data, settings.batch_size, trainer, log)
                processes.report_progress(f"in step {step + 1}", log.begun)
                state, values = trainer.step(state, batch, key, rates[step], data.resident)
                step += 1
                log.add(values, state)
                profile.after(step, state)
                last = step == settings.steps
                if step % settings.log_every == 0 or last:
                    line = log.end_window(step, rates[step - 1])
                    progress.add(0, note=f"loss {line['train/loss']:.3f}" if line else "")
                progress.add(settings.batch_size)
                preempted = preemption.requested(step) and not last
                validated = step % settings.evaluate_every == 0 or last
                if validated or preempted or log.is_save_due(step - saved):
                    log.pause(step)
                    loss = _validate(trainer, step, state, data, writer, settings.batch_size) if validated else None
                    saved = _save(checkpoints, step, state, data, log, loss)
                if preempted:
                    raise Preempted(f"{name} was interrupted, and is saved at step {step}: run the same command again")
        data.batches.close()
        processes.report_progress("writing the last checkpoint")
    with _full_disk_as_stage_error(folder):
        result = _finish(folder, trainer, settings)
    log.print_goodput(name)
    return result


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
) -> tuple[int, State, dict[str, Any]]:
    """Returns the step to continue from, its state, and the positions of input and log that were saved with it.

    Also sets the position of `batches`. Without a checkpoint, returns step 0, the initial state and no positions.
    """
    processes.report_progress("restoring a checkpoint")
    restored = checkpoints.restore_last(trainer.abstract)
    if restored is None:
        return 0, trainer.init(key), {}
    batches.set_state(restored[2]["input"])
    return restored


def _next_batch(step: int, data: Data, batch_size: int, trainer: Trainer, log: "_Log") -> dict[str, jax.Array]:
    """Returns the batch of a step on the mesh, and logs how long reading took."""
    processes.report_progress(f"reading the photos of step {step}", log.begun)
    waiting = time.monotonic()
    batch = sharding.global_batch(next(data.batches), trainer.mesh, batch_size)
    log.waited(time.monotonic() - waiting)
    return batch


def _save(checkpoints: Checkpoints, step: int, state: State, data: Data, log: "_Log", loss: float | None) -> int:
    """Starts to save a checkpoint, and returns its step. loss: validation loss; None if there was no validation."""
    processes.report_progress(f"saving step {step}")
    checkpoints.save(step, state, {"input": data.batches.get_state(), **log.position()}, loss)
    return step


def _validate(trainer: Trainer, step: int, state: State, data: Data, writer: metrics.Writer, batch_size: int) -> float:
    """Returns the validation loss, and writes all validation metrics. The loss is without `data.scored`."""
    means = evaluate(trainer, state, data.validation(), data.resident, batch_size)
    values = {f"validation/{name}": value for name, value in means.items()}
    if data.scored:
        scored = evaluate(trainer, state, data.scored(), data.resident, batch_size)
        values |= {f"scored/{name}": value for name, value in scored.items()}
    writer.write(step, values)
    return means["loss"]


def _finish(folder: epath.Path, trainer: Trainer, settings: TrainSettings) -> Result:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        processes.report_progress("restoring the best checkpoint")
        best, state, _ = checkpoints.restore_best(trainer.abstract)
        processes.report_progress(f"writing the parameters of step {best}")
        checkpoint.write_parameters(folder / "parameters.safetensors", *trainer.exported(state))
        parameters = sum(p.size for p in jax.tree.leaves(state["params"]))
        examples = settings.steps * settings.batch_size
        return Result(best, checkpoints.loss(best), parameters, settings.steps, examples)


def evaluate(
    trainer: Trainer, state: State, batches: Iterable[Batch], resident: Resident, batch_size: int
) -> dict[str, float]:
    """Returns the means of the task's loss and metrics over all valid photos of the batches.

    batch_size: rows per batch, over all processes.
    """
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        processes.report_progress("validating", repeated=bool(sums))
        batch_sums, n = trainer.evaluate(state, sharding.global_batch(batch, trainer.mesh, batch_size), resident)
        sums = {name: sums.get(name, 0) + value for name, value in batch_sums.items()}
        count += n
    return {name: float(value) / float(count) for name, value in sums.items()}


class _Preemption:
    """Reports whether SIGTERM has asked this process to stop. With several processes, all stop after the same step."""

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


@contextlib.contextmanager
def _profiler(port: int) -> Iterator[None]:
    """Serves TensorBoard's profiler inside the context. port: TrainSettings.profiler_port; if 0, nothing is served."""
    if not port:
        yield
        return
    jax.profiler.start_server(port + jax.process_index())
    try:
        yield
    finally:
        jax.profiler.stop_server()


class _Profile:
    """Writes a profiler trace of training steps to `folder`. steps: first and last step of the trace."""

    def __init__(self, steps: tuple[int, int], folder: epath.Path):
        self._first, self._last = steps
        self._folder, self._running = folder, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: State) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


@dataclasses.dataclass
class _Stopwatch:
    """Adds up the seconds between starts and stops. clock: function that returns the time in seconds. total: seconds
    until the last stop. since: time of the last start; None if the stopwatch is stopped."""

    clock: Callable[[], float]
    total: float = 0.0
    since: float | None = None

    def start(self, ago: float = 0.0) -> None:
        """Starts the stopwatch as of `ago` seconds ago."""
        self.since = self.clock() - ago

    def stop(self) -> None:
        self.total, self.since = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (self.clock() - self.since if self.since is not None else 0.0)


@dataclasses.dataclass
class _Window:
    """The steps that one line of metrics covers.

    vectors: metrics of each step in this run. waited: seconds that this process has waited for input. restored: metrics
    of the window's steps before the checkpoint from which training has continued. The other fields are set when the
    window ends. step: last step. seconds: duration. learning_rate: learning rate of the last step. waits: share of the
    time spent waiting for input, and seconds per step, gathered from all processes.
    """

    vectors: list[jax.Array] = dataclasses.field(default_factory=list)
    waited: float = 0.0
    restored: list[dict[str, float]] = dataclasses.field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    learning_rate: Any = None
    waits: Any = None


class _Log:
    """Collects the metrics of each step, and writes lines with their means and the training speed.

    A line covers a window, the steps since the last line. It is written when the next window ends, so that devices do
    not wait for the host. Before a pause and at the end, all lines are written.

    started: time (time.monotonic) at which this run of the training began. position: result of the method `position`
    when the checkpoint was saved; empty in a new training.
    """

    def __init__(
        self,
        writer: metrics.Writer,
        settings: TrainSettings,
        flops: float,
        mesh: Mesh,
        started: float,
        position: Mapping[str, Any],
    ):
        self._writer, self._settings, self._flops, self._devices = writer, settings, flops, mesh.size
        chip = chips.find(mesh.devices.flat[0].device_kind)
        self._peak = chip.flops if chip else None
        self._copies = metrics.Copies(mesh)
        self._window = _Window(restored=position.get("window", []))
        self._ended: _Window | None = None
        self._seconds_per_step = 0.0
        self._since = time.monotonic()
        self._paused_at: float | None = None
        # Time in which new steps were trained, and the processor time of this process in it.
        self._trained = _Stopwatch(time.monotonic, position.get("trained_s", 0.0))
        self._processor = _Stopwatch(time.process_time, position.get("processor_s", 0.0))
        self._started = started - writer.elapsed_s

    def __enter__(self):
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error and not processes.is_process_loss(error):
            with contextlib.suppress(Exception):  # the first error counts
                self._write_ended()

    @property
    def begun(self) -> bool:
        """Whether a step has ended in this process, so that the programs are compiled."""
        return self._trained.since is not None or self._paused_at is not None

    def waited(self, seconds: float) -> None:
        """Adds the seconds that this process has waited for a batch. A pause counts as ended before the waiting."""
        if self._paused_at is not None:
            self._trained.start(seconds)
            self._processor.start()
            self._since += time.monotonic() - seconds - self._paused_at
            self._paused_at = None
        self._window.waited += seconds

    def add(self, values: Metrics, state: State) -> None:
        """Adds the metrics of a step. state: state after the step."""
        counts = {name: state[name] for name in ("skipped", "skipped_in_a_row")}
        self._window.vectors.append(self._copies.begin({**values, **counts}))
        if not self.begun:
            jax.block_until_ready(self._window.vectors)
            self._trained.start()
            self._processor.start()

    def pause(self, step: int) -> None:
        """Writes all lines and begins a pause, which lasts until the next batch is requested.

        The pause does not count as training time.
        """
        processes.report_progress(f"finishing step {step}")
        self._write_ended()
        jax.block_until_ready(self._window.vectors)
        self._paused_at = time.monotonic()
        self._trained.stop()
        self._processor.stop()

    def position(self) -> dict[str, Any]:
        """Returns the state of the log, as JSON values. Call it in a pause."""
        seconds = {"trained_s": self._trained.total, "processor_s": self._processor.total}
        return {"window": self._metrics(self._window), **seconds}

    def elapsed_s(self) -> float:
        """Returns the seconds of all runs of the training until now, without the time between runs."""
        return time.monotonic() - self._started

    def goodput(self) -> float:
        """Returns the share of `elapsed_s` that was spent on new steps."""
        return self._trained.seconds() / self.elapsed_s()

    def print_goodput(self, name: str) -> None:
        """Prints the goodput in process 0, unless no step was trained. name: name of the training."""
        if self.begun and jax.process_index() == 0:
            print(f"{name}: {self.goodput():.0%} of {self.elapsed_s():,.0f} s were spent on new steps", file=sys.stderr)

    def is_save_due(self, steps: int) -> bool:
        """Returns whether to save a checkpoint. steps: number of steps since the last checkpoint.

        All processes return the same, because they estimate the time since the last checkpoint from the same number:
        the seconds per step that they have gathered from the first process.
        """
        return 0 < self._settings.save_every_s <= steps * self._seconds_per_step

    def end_window(self, step: int, learning_rate: Any) -> dict[str, float] | None:
        """Ends the window at a step. Writes the line of the window before, unless it is written already.

        Returns the line that it has written, or None.
        """
        window = self._window
        window.step, window.learning_rate = step, learning_rate
        window.seconds = time.monotonic() - self._since
        window.waits = self._copies.begin_gather([window.waited / window.seconds, window.seconds / len(window.vectors)])
        line = self._write_ended()
        self._ended, self._window, self._since = window, _Window(), time.monotonic()
        return line

    def _metrics(self, window: _Window) -> list[dict[str, float]]:
        return window.restored + self._copies.end(window.vectors)

    def _write_ended(self) -> dict[str, float] | None:
        window, self._ended = self._ended, None
        if window is None:
            return None
        gathered = self._metrics(window)
        rate = len(window.vectors) * self._settings.batch_size / window.seconds
        counts = {name: int(gathered[-1][name]) for name in ("skipped", "skipped_in_a_row")}
        names = [name for name in gathered[0] if name not in counts]
        line = {f"train/{name}": float(np.mean([g[name] for g in gathered])) for name in names}
        line |= {
            "examples": window.step * self._settings.batch_size,
            "learning_rate": float(np.asarray(window.learning_rate)),
            "skipped": counts["skipped"],
            "examples_per_second": rate,
            "input_wait": window.waited / window.seconds,
            "seconds_left": (self._settings.steps - window.step) * self._settings.batch_size / rate,
            "elapsed_s": self.elapsed_s(),
            "goodput": self.goodput(),
            "processor_s": self._processor.seconds(),
        }
        waits = self._copies.end_gather(window.waits)
        self._seconds_per_step = waits[0][1]
        if len(waits) > 1:
            line["slowest_process"] = slowest = max(waits, key=lambda process: waits[process][0])
            line["slowest_input_wait"] = waits[slowest][0]
        if self._flops:
            line["tflops_per_second"] = rate * self._flops / 1e12
            if self._peak:
                line["flops_utilization"] = rate * self._flops / self._devices / self._peak
        self._writer.write(window.step, line)
        self._stop_if_diverged(window.step, counts["skipped_in_a_row"])
        return line

    def _stop_if_diverged(self, step: int, in_a_row: int) -> None:
        if in_a_row > self._settings.max_skipped:
            raise Diverged(
                f"max_skipped is {self._settings.max_skipped}, and the last {in_a_row} steps until {step} had a loss "
                "or a gradient that was not finite: lower optimizer.learning_rate, or set optimizer.clip to 1.0 if it "
                "is 0"
            )
