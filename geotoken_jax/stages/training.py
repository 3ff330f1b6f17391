"""What the stages that train share: the mesh, one job of several processes, and the loop with its input."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from geotoken_jax import processes
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.data import pipeline
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import make_mesh
from geotoken_jax.train import loop
from geotoken_jax.train.loop import TrainSettings
from geotoken_jax.workdir import Manifest, Stage


def begin(
    workdir: Workdir, config: Config, folder: str, keys: Iterable[str], inputs: Iterable[str], **further: Any
) -> Stage:
    """Opens a folder that several processes fill as one job: the first writes that it has begun."""
    if processes.index():
        processes.wait(f"{folder} has begun")
    stage = workdir.begin(config, folder, list(keys), inputs, further)
    if not processes.index():
        processes.wait(f"{folder} has begun")
    return stage


def fit(
    task: Any,
    config: Config,
    where: str,
    splits: list,
    folder: epath.PathLike,
    what: str,
    mesh: Mesh | None = None,
    resident: Mapping[str, Any] | None = None,
) -> loop.Result:
    """Trains a task in a folder with its input and the loop.

    where: the dotted place in config of the TrainSettings. splits: readers of training and validation photos. what: the
    name shown beside the progress. mesh: None for that of config.mesh. resident: arrays that stay on the mesh.
    """
    options: TrainSettings = config.at(where)
    mesh = mesh or make_mesh(config.mesh)
    process = (processes.index(), processes.count())
    train, validation = splits
    try:
        batches = pipeline.training(len(train), train, options.batch_size, options.seed, *process)
        data = loop.Data(
            batches,
            lambda: pipeline.evaluation(len(validation), validation, options.batch_size, *process),
            len(train),
            dict(resident or {}),
        )
    except SettingsError as error:
        raise SettingsError(f"config.{where}.{error}") from None
    try:
        return loop.run(task, options, mesh, folder, data, what)
    except loop.Diverged as error:
        raise loop.Diverged(f"config.{where}.{error}") from None


def finish(
    workdir: Workdir, stage: Stage, options: TrainSettings, result: loop.Result, what: str,
    after: Callable[[epath.Path], None] | None = None,
) -> Manifest:  # fmt: skip
    """Completes a trained folder in the first process, while the others wait. after: what is left to do in it."""
    if not processes.index():
        if after:
            after(stage.path)
        stage.finish(
            {"steps": options.steps, "examples": options.steps * options.batch_size},
            best_step=result.best_step,
            best_loss=result.best_loss,
            parameters=result.parameters,
        )
    processes.wait(f"{what} has ended")
    return workdir.manifest(stage.folder)
