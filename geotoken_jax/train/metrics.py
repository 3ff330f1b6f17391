"""Copies metrics from the devices to the host, and writes them to JSON lines, TensorBoard and Weights & Biases."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from geotoken_jax.settings import SettingsError

#: TensorBoard's event messages. The type is Any because the module generates its classes on import, which type checkers
#: cannot see.
_MESSAGES: Any = event_pb2


class Copies:
    """Copies numbers from the devices of a mesh to the host while the devices compute later steps."""

    def __init__(self, mesh: Mesh):
        self._names: list[str] = []
        self._devices = list(mesh.devices.flat)
        self._per_device = NamedSharding(Mesh(mesh.devices.reshape(-1), "device"), PartitionSpec("device"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._stack = jax.jit(
            lambda values: jnp.stack([jnp.asarray(values[name], jnp.float32) for name in sorted(values)]),
            out_shardings=everywhere,
        )
        self._gather = jax.jit(lambda x: x, out_shardings=everywhere)

    def begin(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Starts to copy the metrics of one step, and returns them as a vector for `end`.

        One copy of a vector takes as long as the copy of one of its numbers.
        """
        self._names = sorted(values)
        vector = self._stack(dict(values))
        vector.copy_to_host_async()
        return vector

    def end(self, vectors: Sequence[jax.Array]) -> list[dict[str, float]]:
        """Returns the metrics of each step, after waiting for their copies."""
        return [dict(zip(self._names, np.asarray(vector).tolist(), strict=True)) for vector in vectors]

    def begin_gather(self, numbers: Sequence[float]) -> Any:
        """Starts to gather the numbers of all processes, and returns a handle for `end_gather`.

        All processes must call this method.
        """
        row = np.asarray([numbers], np.float32)
        if jax.process_count() == 1:
            return row
        shape = len(self._devices), len(numbers)
        gathered = self._gather(jax.make_array_from_callback(shape, self._per_device, lambda _: row))
        gathered.copy_to_host_async()
        return gathered

    def end_gather(self, gathered: Any) -> dict[int, list[float]]:
        """Returns process index -> its numbers."""
        return {d.process_index: row for d, row in zip(self._devices, np.asarray(gathered).tolist(), strict=False)}


class Writer:
    """Writes metrics to `metrics.jsonl` and TensorBoard's event files in one folder, and to Weights & Biases if used.

    step: step from which training starts or continues. Lines of later steps are removed from `metrics.jsonl` first. (An
    interrupted run wrote them after its last checkpoint.) wandb: project of Weights & Biases; if empty, nothing is
    written there. name: name of the run there. shown: whether this process writes; if False, the methods do nothing.
    elapsed_s: largest value of the metric elapsed_s in the lines of earlier runs; 0 if there are none.
    """

    def __init__(self, folder: epath.PathLike, step: int, wandb: str = "", name: str = "", shown: bool = True):
        self._shown, self.elapsed_s = shown, 0.0
        if not shown:
            return
        folder = epath.Path(folder)
        self._path = folder / "metrics.jsonl"
        lines = [(json.loads(line), line) for line in _whole_lines(self._path)]
        self.elapsed_s = max((values.get("elapsed_s", 0.0) for values, _ in lines), default=0.0)
        kept = [line for values, line in lines if values["step"] <= step]
        self._path.write_text("".join(kept))
        # EventsWriter has no thread. The thread of SummaryWriter ends at the first error, such as a full disk, and the
        # next write hangs.
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._events = event_file_writer.EventsWriter(str(folder / "tensorboard" / "events"))
        start = _MESSAGES.SessionLog(status=_MESSAGES.SessionLog.START)
        self._event(step + 1, session_log=start)
        self._wandb = _wandb_run(wandb, name, folder) if wandb else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._shown:
            self._events.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(any(error)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step. values: name of a metric, such as train/loss -> value."""
        if not self._shown:
            return
        with self._path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))
        self._events.flush()
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(_MESSAGES.Event(step=step, wall_time=time.time(), **content))


def _wandb_run(project: str, name: str, folder: epath.Path) -> Any:
    """Returns the folder's run in Weights & Biases: a new one, or the same again if training is resumed."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise SettingsError(
            f"wandb is {project!r}, but the package wandb is not installed: run pip install 'geotoken-jax[wandb]', or "
            "set wandb to ''"
        ) from None
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=name, id=identity, resume="allow", dir=str(folder))


def _whole_lines(path: epath.Path) -> list[str]:
    """Returns the lines of the file, without a last line that was only partly written; none if there is no file."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
