"""Runs one training in a process, for tests that start several or kill one: python -m tests.pod JSON."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from geotoken_jax import processes, sharding
from geotoken_jax.data import join, pipeline
from geotoken_jax.gallery import placement, table
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.task import GeoTokenTask, LossSettings
from geotoken_jax.processes import RESTART
from geotoken_jax.train import loop
from geotoken_jax.train.optimizer import OptimizerSettings
from tests import fixtures, isolation

N, BATCH = 43, 8
OPTIMIZER = OptimizerSettings(
    learning_rate=0.01, schedule="exponential", decay=0.9, warmup=0.0, weight_decay=0.01, b2=0.999, clip=1.0
)


def write_gallery(folder: Path) -> table.Table:
    """Makes a gallery of N photos, a number that 8 devices do not divide."""
    rng = np.random.default_rng(0)
    columns = {
        "embeddings": rng.normal(size=(N, 3, fixtures.C)).astype(ml_dtypes.bfloat16),
        "coordinates": np.zeros((N, 2)),
        "tokens": rng.integers(0, 4, (N, 21)).astype(np.uint8),
        "ids": np.arange(N).astype("S"),
        "authors": np.full(N, b""),
    }
    table.write_shard(folder, 0, 1, columns)
    return table.Table(folder)


class Read:
    """Photos of the gallery with random neighbors, some of them missing."""

    def __init__(self, gallery: table.Table, model: ModelSettings, where: placement.GallerySettings):
        self.gallery, self.cells, self.on_device = gallery, model.cells, where.on_device
        near = np.random.default_rng(1).integers(0, N, (N, model.neighbors))
        self.near = np.where(np.arange(model.neighbors) < 1 + np.arange(N)[:, None] % model.neighbors, near, -1)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        near = self.near[rows]
        return {
            "query": self.gallery.embeddings(rows),
            "tokens": np.asarray(self.cells.regroup(self.gallery.tokens(rows))),
            **(join.neighbor_rows(near) if self.on_device else join.neighbors(self.gallery, near, self.cells)),
        }


class Marked(GeoTokenTask):
    """Logs a number that identifies a batch's photos and their order."""

    def loss(self, model, batch, key):
        loss, found = super().loss(model, batch, key)
        marks = batch["query"][:, 0, 0].astype("float32")
        return loss, {**found, "batch": (marks * np.arange(len(marks))).sum()}


def run(
    folder: Path,
    mesh: tuple[int, int, int],
    where: str,
    steps: int,
    *,
    accumulate: int = 1,
    evaluate_every: int = 5,
    order: Sequence[int] | None = None,
) -> loop.Result:
    """Trains a tiny decoder with dropout on the mesh, in `folder`.

    where: placement of the gallery. order: indices of the devices, in the order of the mesh; the first ones if None.
    """
    model = fixtures.settings("ours", decoder_layers=1, dropout=0.1)
    gallery_settings = placement.GallerySettings(where, -1)
    options = loop.TrainSettings(
        batch_size=BATCH, accumulate=accumulate, examples=BATCH * steps, evaluate_every=evaluate_every, log_every=1,
        seed=0, ema=0.0, max_skipped=0, profile=(0, 0), profiler_port=0, save_every_s=0.0, keep=2, wandb="",
        optimizer=OPTIMIZER, gradient_dtype="float32", epochs=0, max_damaged=0.0,
    )  # fmt: skip
    chosen = [jax.devices()[i] for i in order or range(int(np.prod(mesh)))]
    devices = sharding.make_mesh(sharding.MeshSettings(*mesh), chosen)
    with tempfile.TemporaryDirectory() as beside:
        gallery = write_gallery(Path(beside))
        read = Read(gallery, model, gallery_settings)
        local = sharding.local_rows(devices, BATCH)
        return loop.run(
            Marked(model, LossSettings(2.0, 1.0), placement.lookup(gallery_settings, devices)),
            options,
            devices,
            folder,
            loop.Data(
                pipeline.training(N, read, BATCH, 0, local),
                lambda: pipeline.evaluation(N, read, BATCH, local),
                N,
                placement.device_arrays(gallery, model.cells, gallery_settings, devices),
            ),
            "train",
        )


def lines(folder: Path) -> list[dict]:
    """Returns the complete lines of metrics."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        if line[-1] == "\n"
    ]


def sequence(folder: Path, *names: str) -> np.ndarray:
    """Returns values of all steps, in order: [steps, names]."""
    found = [line for line in lines(folder) if names[0] in line]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found})
    return np.array([[line[name] for name in names] for line in found])


#: Logged values by which runs are compared. `batch` identifies the photos and their order.
LOSSES = ("train/loss", "train/batch", "train/gradient_norm")


def start(processes: int, devices: int = 8, module: str = "tests.pod", **options) -> list[subprocess.Popen]:
    """Starts a run in a number of processes that share the devices. module: program that reads the options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = isolation.xla_flags(devices // processes)
    command = [sys.executable, "-m", module, json.dumps(options, default=str)]
    environment = dict(os.environ)
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        # Only the first process would find its programs. Gloo drops the others if they compile 30 s longer.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return [
        subprocess.Popen(
            command,
            env={**environment, "XLA_FLAGS": flags, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for i in range(processes)
    ]


def finish(processes: int, devices: int = 8, **options) -> None:
    """Runs to the end. If the processes wait for each other in vain, they are started again once, as launchers do."""
    outputs = []
    for _ in range(2):
        started = start(processes, devices, **options)
        outputs += [process.communicate(timeout=600)[0].decode() for process in started]
        codes = {process.returncode for process in started}
        if codes != {RESTART}:
            break
    assert codes == {0}, "\n".join(outputs)


def main() -> None:
    """Runs with the options of the command line."""
    options = json.loads(sys.argv[1])
    folder, mesh, where, steps = (options.pop(name) for name in ("folder", "mesh", "where", "steps"))
    # With four devices per process on two busy cores, one run in about 40 stops: its processes wait for each other.
    with processes.watched(processes.WatchSettings(connect_s=200, stalled_s=200, step_s=100, lost_s=100)):
        processes.start()
        run(Path(folder), tuple(mesh), where, steps, **options)


if __name__ == "__main__":
    main()
