"""The only training loop, for every task: restore, step, log, validate, save."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from geotoken_jax.checkpoint import Checkpoints, abstract, write_parameters
from geotoken_jax.progress import Progress
from geotoken_jax.train import metrics
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer, make_schedule
from geotoken_jax.train.step import State, Task, Trainer

#: Batches of named arrays: this process's part.
Batch = Mapping[str, np.ndarray]


class TrainingInput(Protocol):
    """An endless iterator over batches whose position can be kept and gone back to."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """batch_size: photos a step, over all devices. examples: photos seen in all. evaluate_every: steps between two
    validations, each with a checkpoint. log_every: steps between two lines of metrics. seed: of parameters, order and
    dropout."""

    batch_size: int
    examples: int
    evaluate_every: int
    log_every: int
    seed: int
    optimizer: OptimizerSettings

    @property
    def steps(self) -> int:
        return self.examples // self.batch_size


@dataclasses.dataclass(frozen=True)
class Result:
    """Where training ended: the step with the smallest validation loss, that loss, and the model's size."""

    best_step: int
    best_loss: float
    parameters: int


def run(
    task: Task,
    settings: TrainSettings,
    mesh: Mesh,
    folder: epath.PathLike,
    batches: TrainingInput,
    validation: Callable[[], Iterable[Batch]],
    photos: int,
    what: str,
) -> Result:
    """Trains until `settings.examples` photos have been seen, going on from the newest checkpoint in `folder`, and
    writes the parameters of the best step to `folder`/parameters.safetensors.

    batches: the training input, at its beginning. validation: makes one pass over the validation split, whose batches
    have `valid` [b]. photos: size of the training split, for the schedule. what: the name shown beside the progress.
    """
    schedule = make_schedule(settings.optimizer, settings.steps, max(1, photos // settings.batch_size))
    trainer = Trainer(task, make_optimizer(settings.optimizer, schedule), mesh)
    folder = epath.Path(folder)
    key = jax.random.key(settings.seed)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = trainer.init(key)
        step, state = _resume(checkpoints, state, batches)
        with metrics.Writer(folder, step) as writer, Progress(
            what, settings.steps * settings.batch_size, "photos", done=step * settings.batch_size
        ) as progress:  # fmt: skip
            log = _Log(writer, settings, step)
            while step < settings.steps:
                waiting = time.monotonic()
                batch = _on_mesh(next(batches), trainer)
                log.waited(time.monotonic() - waiting)
                state, values = trainer.step(state, batch, key)
                step += 1
                log.add(values)
                if step % settings.log_every == 0 or step == settings.steps:
                    line = log.write(step, float(np.asarray(schedule(step - 1))))
                    progress.add(0, note=f"loss {line['train/loss']:.3f}")
                progress.add(settings.batch_size)
                if step % settings.evaluate_every == 0 or step == settings.steps:
                    found = evaluate(trainer, state, validation())
                    writer.write(step, {f"validation/{name}": value for name, value in found.items()})
                    checkpoints.save(step, state, {"input": batches.get_state()}, found["loss"])
                    log.pause()
        batches.close()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        best = checkpoints.best
        state, _ = checkpoints.restore(best, abstract(state))
        write_parameters(folder / "parameters.safetensors", state["constants"], state["params"])
        return Result(best, checkpoints.loss(best), sum(p.size for p in jax.tree.leaves(state["params"])))


def evaluate(trainer: Trainer, state: State, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns the means of the task's loss and metrics over all valid photos."""
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        found, n = trainer.evaluate(state, _on_mesh(batch, trainer))
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        count += n
    return {name: float(value) / float(count) for name, value in sums.items()}


def _resume(checkpoints: Checkpoints, state: State, batches: TrainingInput) -> tuple[int, State]:
    found = checkpoints.restore_last(abstract(state))
    if found is None:
        return 0, state
    step, state, position = found
    batches.set_state(position["input"])
    return step, state


def _on_mesh(batch: Batch, trainer: Trainer) -> dict[str, jax.Array]:
    return {
        name: jax.make_array_from_process_local_data(trainer.batch_sharding, value) for name, value in batch.items()
    }


class _Log:
    """Gathers what the steps report, on the device, and writes means with the speed now and then."""

    def __init__(self, writer: metrics.Writer, settings: TrainSettings, step: int):
        self._writer, self._settings = writer, settings
        self._gathered: list[dict[str, jax.Array]] = []
        self._since, self._waited, self._paused = time.monotonic(), 0.0, 0.0
        self._pause_from: float | None = None

    def waited(self, seconds: float) -> None:
        if self._pause_from is not None:
            self._since += time.monotonic() - seconds - self._pause_from
            self._pause_from = None
        self._waited += seconds

    def pause(self) -> None:
        """What passes until the next batch is asked for is not training time."""
        self._pause_from = time.monotonic()

    def add(self, values: dict[str, jax.Array]) -> None:
        self._gathered.append(values)

    def write(self, step: int, learning_rate: float) -> dict[str, float]:
        gathered = jax.device_get(self._gathered)
        seconds = time.monotonic() - self._since
        line = {f"train/{name}": float(np.mean([g[name] for g in gathered])) for name in gathered[0]}
        line |= {
            "examples": step * self._settings.batch_size,
            "learning_rate": learning_rate,
            "examples_per_second": len(gathered) * self._settings.batch_size / seconds,
            "input_wait": self._waited / seconds,
        }
        self._writer.write(step, line)
        self._gathered, self._since, self._waited = [], time.monotonic(), 0.0
        return line
