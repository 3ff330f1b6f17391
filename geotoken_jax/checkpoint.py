"""Saves and restores checkpoints: parameters, optimizer state, input position and validation loss of a step.

Only this module uses Orbax (its v1 interface). Saves are asynchronous and atomic. A checkpoint can be restored on any
mesh and any number of processes.
"""

import contextlib
import logging
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from geotoken_jax import manifests, processes
from geotoken_jax.errors import UserError

#: Errors that Orbax raises for incomplete or damaged files.
_UNREADABLE = (OSError, ValueError, KeyError)
M = TypeVar("M", bound=nnx.Module)


#: Characters that Orbax interprets as wildcards in the path of a folder.
_WILDCARDS = frozenset("*?[")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, or does not fit the training."""


class ParametersError(UserError, ValueError):
    """A file of parameters is damaged, or its parameters do not fit the model."""


class Checkpoints:
    """The checkpoints in a folder.

    Old checkpoints are removed, except the last `keep` and the one with the smallest validation loss. If there are
    several processes, all of them must call the same methods in the same order.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        from orbax.checkpoint import v1 as ocp  # here, because it takes a second, and prediction does not need it

        self._keep = keep
        absolute = manifests.local(folder).resolve()  # Orbax accepts only absolute paths
        if set(str(absolute)) & _WILDCARDS:
            self._alias = tempfile.TemporaryDirectory(prefix="geotoken-")
            absolute = _link(absolute, self._alias.name)
        self._orbax = ocp.training.Checkpointer(absolute, preservation_policy=self)
        # Losses are stored in each checkpoint, not as Orbax metrics. Orbax reads the metrics of all checkpoints when it
        # opens the folder, so one damaged file would make every checkpoint unreadable.
        losses: dict[int, float | None] = {}
        for step in self.steps if not processes.index() else []:
            try:
                losses[step] = self._load(step, {"progress": None})["progress"]["loss"]
            except _UNREADABLE as error:
                self._warn_skipped(step, error)
        _agree_on_operation_number()
        self._losses: dict[int, float | None] = dict(processes.first(list(losses.items())))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if processes.is_process_loss(error):
            return  # close() would wait for a save that the lost process cannot finish
        with self._saving():
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best(self) -> int:
        """Step with the smallest validation loss. Raises FileNotFoundError if no checkpoint has a finite loss."""
        best = self._best_of(self.steps)
        if best is None:
            raise FileNotFoundError(
                f"no checkpoint with a finite validation loss in {self._orbax.directory}: train first"
            )
        return best

    def _best_of(self, steps: Sequence[int]) -> int | None:
        validated = {step: loss for step in steps if (loss := self._losses.get(step)) is not None and np.isfinite(loss)}
        return min(validated, key=validated.__getitem__, default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether to keep it. Orbax calls this method after each save.

        checkpoints: all checkpoints; the last one was just saved.
        """
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = {*steps[-self._keep :], self._best_of(steps)}
        return [step in preserved for step in steps]

    def loss(self, step: int) -> float:
        """Returns the validation loss of a step. Raises KeyError if the step was not validated."""
        loss = self._losses[step]
        if loss is None:
            raise KeyError(step)
        return loss

    def save(self, step: int, state: Any, position: dict[str, Any], loss: float | None) -> None:
        """Starts to save a checkpoint. Returns before it is written, as soon as the caller may change `state`.

        An existing checkpoint of the same step is replaced.

        state: pytree of dicts and arrays. position: position in the training data, as JSON values. loss: validation
        loss, smaller is better; None if the step was not validated.

        Raises CheckpointError if this checkpoint or the previous one cannot be written.
        """
        self._losses[step] = loss
        checkpointables = {"state": state, "progress": {"position": position, "loss": loss}}
        with self._saving():
            # Without `force`, Orbax would not save this step if another save is in progress, or if a damaged checkpoint
            # of a later step exists.
            self._orbax.save_checkpointables_async(step, checkpointables, overwrite=True, force=True)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            if isinstance(error, jax.errors.JaxRuntimeError) or processes.is_process_loss(error):
                raise  # the train step or another process failed, not the disk
            cause = str(error.__cause__ or error).split(": ")[-1]  # without the names of files before the reason
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._orbax.directory} ({cause}): free disk space there and run "
                "the same command again; it continues from the last complete checkpoint"
            ) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the position in the training data of a step.

        abstract: pytree like the state, with a ShapeDtypeStruct in place of each array; the result has its shardings.
        """
        stored = self._load(step, {"state": abstract, "progress": None})
        return stored["state"], stored["progress"]["position"]

    def restore_last(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns step, state and data position of the newest readable checkpoint, or None if there are no checkpoints.

        A checkpoint is readable if every process can read it. Newer checkpoints are skipped, and each is reported as a
        warning in the log. If there are checkpoints but none is readable, raises CheckpointError, or the OSError of the
        newest one. In the first case it is likely that another version wrote them, and not that all are damaged.
        """
        return self._restore_any(self.steps[::-1], abstract)

    def restore_best(self, abstract: Any) -> tuple[int, Any, dict[str, Any]]:
        """Returns step, state and data position of the readable checkpoint with the smallest validation loss.

        Checkpoints with a smaller loss that are not readable are reported as warnings in the log. Raises the errors of
        `best` and `restore_last`.
        """
        steps, order = self.steps, []
        while (step := self._best_of(steps)) is not None:
            order.append(step)
            steps.remove(step)
        restored = self._restore_any(order, abstract)
        return restored or (self.best, None, {})  # without a validated checkpoint, `best` raises its error

    def _restore_any(self, steps: Sequence[int], abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns the first checkpoint that all processes can read, in the order of `steps`; None if `steps` is empty.

        All processes use the `steps` of process 0. If no checkpoint can be read, raises CheckpointError, or the OSError
        of the first one.
        """
        errors: list[Exception] = []
        for step in processes.first(steps):
            restored, error = None, None
            try:
                restored = self.restore(step, abstract)
            except _UNREADABLE as e:
                error = e
                self._warn_skipped(step, error)
            failed = [i for i, ok in enumerate(processes.gather(restored is not None)) if not ok]
            _agree_on_operation_number()
            if restored is not None and not failed:
                return step, *restored
            error = error or OSError(f"process {failed[0]} cannot read checkpoint {step} in {self._orbax.directory}")
            if restored is not None:
                logging.warning("%s: all processes skip it", error)
            errors.append(error)
        if not errors:
            return None
        if isinstance(errors[0], OSError):
            raise errors[0]
        raise CheckpointError(
            f"the checkpoints in {self._orbax.directory} do not fit this training: end it with the version of "
            "geotoken-jax that wrote them, or remove that folder to train again"
        ) from errors[0]

    def _load(self, step: int, abstract: Any) -> Any:
        """Returns the items of a checkpoint that `abstract` names.

        The process reads them alone. It would wait forever for another process that cannot read the checkpoint.
        """
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        if processes.count() > 1:
            context.multiprocessing.primary_host = processes.index()
            context.multiprocessing.active_processes = {processes.index()}
        with context:
            return ocp.load_checkpointables(self._orbax.directory / str(step), abstract)

    def _warn_skipped(self, step: int, error: Exception) -> None:
        # Orbax wraps every exception in its own KeyError, even KeyboardInterrupt.
        cause = error.__cause__ or error
        if not isinstance(cause, Exception):
            raise error
        problem = f"checkpoint {step} in {self._orbax.directory} cannot be read"
        logging.warning("%s (%s): skipping it", problem, textwrap.shorten(str(cause), 200))


def _agree_on_operation_number() -> None:
    """Gives Orbax's next operation the same number in all processes.

    In each process, Orbax numbers its operations, and an operation waits for the operation with the same number in all
    other processes. The numbers differ if some processes did not call `_load`, or failed in it. The next save would
    then wait forever.
    """
    from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

    highest = max(processes.gather(int(OperationIdGenerator.get_current_operation_id())))
    while int(OperationIdGenerator.get_current_operation_id()) < highest:
        OperationIdGenerator.next_operation_id()


def write_parameters(path: epath.PathLike, *states: Any) -> None:
    """Writes nested dicts of arrays as one safetensors file, atomically. An array's name is its keys, joined by "/".

    If arrays are sharded over several processes, all processes must call this function; process 0 writes the file.
    """
    flat = {"/".join(map(str, key)): _whole(value) for state in states for key, value in _flatten(state)}
    if jax.process_index() == 0:
        manifests.write_bytes(epath.Path(path), safetensors.numpy.save(flat))


def _whole(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def read_module(path: epath.PathLike, make: Callable[[nnx.Rngs], M]) -> M:
    """Returns a module with the parameters in a file that `write_parameters` wrote.

    make: function that builds the module from random number generators.

    Raises ParametersError if the file is damaged, or if a parameter is missing, extra or of another shape; the message
    names the first such parameter.
    """
    try:
        stored = safetensors.numpy.load(epath.Path(path).read_bytes())
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that numpy does not have
        raise ParametersError(f"{path} is damaged ({error}): restore it, or make its folder again") from None
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    flat = {"/".join(map(str, key)): variable for key, variable in nnx.to_flat_state(state)}
    wrong = sorted(flat.keys() ^ stored.keys())
    wrong += [name for name in flat.keys() & stored.keys() if flat[name].shape != stored[name].shape]
    if wrong:
        raise ParametersError(
            f"{path} does not fit this configuration: {wrong[0]} is missing, extra or of another shape; use the "
            "configuration that the model was trained with"
        )
    values = jax.device_put(stored)  # all at once: hundreds of calls would take longer than the copies
    filled = [(key, variable.replace(values["/".join(map(str, key))])) for key, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _flatten(tree: Any, prefix: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, (*prefix, key))
    else:
        yield prefix, tree


def _link(folder: epath.Path, inside: str) -> epath.Path:
    """Makes a folder and a symbolic link to it, and returns the link. inside: folder in which the link is made."""
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(inside) / "checkpoints"
    link.symlink_to(folder)
    return epath.Path(link)
