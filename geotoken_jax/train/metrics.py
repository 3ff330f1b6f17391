"""Metrics as JSON lines and TensorBoard events."""

import json
from collections.abc import Mapping

from etils import epath
from tensorboardX import SummaryWriter


class Writer:
    """Appends to `metrics.jsonl` and to event files in one folder.

    What was written past `step` (by a run that was interrupted after its last checkpoint) is taken back first.
    """

    def __init__(self, folder: epath.PathLike, step: int):
        self._path = epath.Path(folder) / "metrics.jsonl"
        kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= step]
        self._path.write_text("".join(kept))
        self._tensorboard = SummaryWriter(str(epath.Path(folder) / "tensorboard"), purge_step=step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._tensorboard.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line; values by name, such as train/loss."""
        with self._path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)


def _whole_lines(path: epath.Path) -> list[str]:
    """Returns the file's lines but for a last one that was cut off while being written."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
