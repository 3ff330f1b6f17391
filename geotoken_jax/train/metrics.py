"""Writer of metrics: JSON lines, TensorBoard events and, if configured, Weights & Biases."""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from geotoken_jax.settings import SettingsError

#: TensorBoard's event messages. The type is Any because the module generates its classes on import, which type checkers
#: cannot see.
_MESSAGES: Any = event_pb2


class Writer:
    """Writes metrics to `metrics.jsonl` and TensorBoard's event files in one folder, and to Weights & Biases if used.

    step: step from which training starts or continues. Lines of later steps are removed from `metrics.jsonl` first;
    an interrupted run wrote them after its last checkpoint. wandb: project of Weights & Biases; if empty, nothing is
    written there. name: name of the run there. shown: False if another process writes, so that this one does nothing.
    """

    def __init__(self, folder: epath.PathLike, step: int, wandb: str = "", name: str = "", shown: bool = True):
        self._shown = shown
        if not shown:
            return
        folder = epath.Path(folder)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= step]
        self._path.write_text("".join(kept))
        # Not SummaryWriter: its thread ends at the first error, such as a full disk, and the next write hangs.
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
            "set the key to ''"
        ) from None
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=name, id=identity, resume="allow", dir=str(folder))


def _whole_lines(path: epath.Path) -> list[str]:
    """Returns the lines of the file, without a last line that was only partly written; none if there is no file."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
