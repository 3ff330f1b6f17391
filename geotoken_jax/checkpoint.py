"""Checkpoints: one step is parameters, optimizer, input position and validation loss, saved and restored as one.

Orbax's v1 interface stands behind this module alone. A save is asynchronous and appears in one step when it is whole;
a checkpoint can be restored on any mesh and any number of processes.
"""

import contextlib
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from geotoken_jax import processes, workdir

#: What Orbax raises of files that are torn.
_UNREADABLE = (OSError, ValueError, KeyError)
M = TypeVar("M", bound=nnx.Module)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written."""


class Checkpoints:
    """The checkpoints of one folder: the last `keep` and the best by validation loss stay."""

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._keep = keep
        absolute = workdir.local(folder).resolve()  # Orbax takes no other
        self._orbax = ocp.training.Checkpointer(absolute, preservation_policy=self)
        # Not Orbax's metrics: it reads them all to begin with, and a torn file there would bar every other checkpoint.
        self._losses: dict[int, float | None] = {}
        for step in self.steps:
            try:
                self._losses[step] = self._orbax.load_checkpointables(step, {"progress": None})["progress"]["loss"]
            except _UNREADABLE as error:
                self._pass_over(step, error)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if processes.is_loss(error):
            return  # a save that is under way would wait for the process that is gone
        with self._saving():
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """All whole checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best(self) -> int:
        """The step with the smallest validation loss. Raises FileNotFoundError if there is none."""
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
        """What Orbax asks of its preservation policy after each save; checkpoints: the one just saved comes last."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]

    def loss(self, step: int) -> float:
        """The validation loss saved with a step. Raises KeyError if there was none."""
        loss = self._losses[step]
        if loss is None:
            raise KeyError(step)
        return loss

    def save(self, step: int, state: Any, position: dict[str, Any], loss: float | None) -> None:
        """Begins to save; returns when `state` may be changed. A checkpoint of that step that is there is replaced.

        state: pytree of dicts and arrays. position: of the input, JSON. loss: on validation, smaller is better; None
        for a step that was not validated. Raises CheckpointError if this save, or the one before, cannot be written.
        """
        self._losses[step] = loss
        checkpointables = {"state": state, "progress": {"position": position, "loss": loss}}
        with self._saving():
            # force: Orbax leaves out a step while it is saving another, and one before a torn step still there.
            self._orbax.save_checkpointables_async(step, checkpointables, overwrite=True, force=True)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            if isinstance(error, jax.errors.JaxRuntimeError) or processes.is_loss(error):
                raise  # of a step, or of a process that is gone: not of the disk
            cause = str(error.__cause__ or error).split(": ")[-1]  # before it stands where, file by file
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._orbax.directory} ({cause}): those before it are whole; "
                "make room there, and the same command goes on from the last of them"
            ) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Returns state and input position of one step. abstract: ShapeDtypeStructs, sharded as the result is to be."""
        found = self._orbax.load_checkpointables(step, {"state": abstract, "progress": None})
        return found["state"], found["progress"]["position"]

    def restore_last(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns step, state and input position of the newest checkpoint that can be read, or None if there is none.

        One that cannot be read is passed over for the one before it, which is said in the log. Raises the newest one's
        error where none can be read: then it is not the files but `abstract` that is likely to be wrong.
        """
        errors = []
        for step in reversed(self.steps):
            try:
                return step, *self.restore(step, abstract)
            except _UNREADABLE as error:
                self._pass_over(step, error)
                errors.append(error)
        if errors:
            raise errors[0]
        return None

    def _pass_over(self, step: int, error: Exception) -> None:
        # Orbax wraps whatever happens, an interrupt too, in its own KeyError.
        cause = error.__cause__ or error
        if not isinstance(cause, Exception):
            raise error
        what = f"checkpoint {step} in {self._orbax.directory} cannot be read"
        logging.warning("%s (%s): it is passed over", what, textwrap.shorten(str(cause), 200))


def write_parameters(path: epath.PathLike, *states: Any) -> None:
    """Writes pure dicts of arrays as one safetensors file, names joined by "/", whole or not at all.

    The arrays may lie over several processes: then all of them call this, and the first one writes.
    """
    flat = {"/".join(map(str, key)): _whole(value) for state in states for key, value in _flatten(state)}
    if jax.process_index() == 0:
        workdir.write_bytes(epath.Path(path), safetensors.numpy.save(flat))


def _whole(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def read_module(path: epath.PathLike, make: Callable[[nnx.Rngs], M]) -> M:
    """Returns the module that `make` describes with the parameters of a file that `write_parameters` wrote.

    Raises ValueError naming a missing, extra or misshapen parameter.
    """
    stored = safetensors.numpy.load(epath.Path(path).read_bytes())
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    flat = {"/".join(map(str, key)): variable for key, variable in nnx.to_flat_state(state)}
    odd = sorted(flat.keys() ^ stored.keys())
    odd += [name for name in flat.keys() & stored.keys() if flat[name].shape != stored[name].shape]
    if odd:
        raise ValueError(f"{path} does not fit this configuration: {odd[0]} is missing, extra or of another shape")
    filled = [
        (key, variable.replace(jnp.asarray(stored["/".join(map(str, key))])))
        for key, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _flatten(tree: Any, prefix: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, (*prefix, key))
    else:
        yield prefix, tree
