"""Functions shared by all stages that train: they open the folder, run the training loop and write the manifest."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from geotoken_jax import processes
from geotoken_jax.configuration import Config
from geotoken_jax.data import pipeline
from geotoken_jax.manifests import Manifest, Stage
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import batch_shards, local_rows, make_mesh
from geotoken_jax.train import loop
from geotoken_jax.train.loop import TrainSettings
from geotoken_jax.workdir import Workdir


def begin(
    workdir: Workdir, config: Config, folder: str, keys: Iterable[str], inputs: Iterable[str], **further: Any
) -> Stage:
    """Opens a stage's folder in a job of one or more processes and returns the stage.

    Process 0 writes begun.json; the other processes wait for it. config, folder, keys, inputs: see Workdir.begin.
    further: additional sections of settings that the folder depends on.
    """
    if processes.index():
        processes.wait(f"{folder} has begun")
    stage = workdir.begin(config, folder, list(keys), inputs, further)
    if not processes.index():
        processes.wait(f"{folder} has begun")
    return stage


def fit(
    task: Any,
    config: Config,
    section: str,
    splits: list,
    folder: epath.PathLike,
    label: str,
    mesh: Mesh | None = None,
    resident: Mapping[str, Any] | None = None,
) -> loop.Result:
    """Trains a task, writes checkpoints and logs to a folder, and returns the result.

    section: dotted key of the TrainSettings in config. splits: readers of the training photos, of the validation photos
    and, optionally, of further validation photos that do not choose the best step (see loop.Data.scored). label: name
    shown with the progress. mesh: devices to train on; the mesh of config.mesh if None. resident: arrays that stay on
    the mesh. Raises SettingsError or loop.Diverged. A message that begins with the name of a setting has the setting's
    full key instead, e.g. `config.align.train.steps`.
    """
    options: TrainSettings = config.at(section)
    mesh = mesh or make_mesh(config.mesh)
    train, *validations = splits
    try:
        options = options.for_photos(len(train), batch_shards(mesh) * options.accumulate)
        local = local_rows(mesh, options.batch_size)
        damaged = options.max_damaged

        def passes(reader: Any) -> Callable[[], Iterable[loop.Batch]]:
            return lambda: pipeline.evaluation(len(reader), reader, options.batch_size, local, damaged)

        batches = pipeline.training(len(train), train, options.batch_size, options.seed, local, damaged)
        validation, *scored = map(passes, validations)
        data = loop.Data(batches, validation, len(train), dict(resident or {}), *scored)
        return loop.run(task, options, mesh, folder, data, label)
    except (SettingsError, loop.Diverged) as error:
        # The messages of these errors begin with the name of a setting. The section's key is put in front of the name.
        setting = str(error).split()[0] in {field.name for field in dataclasses.fields(options)}
        raise (type(error)(f"config.{section}.{error}") if setting else error) from None


def finish(
    workdir: Workdir,
    stage: Stage,
    result: loop.Result,
    label: str,
    after: Callable[[epath.Path], None] | None = None,
) -> Manifest:
    """Writes the manifest of a trained folder in process 0, while the other processes wait, and returns it.

    label: name of the training. after: function of the folder, called before the manifest is written.
    """
    if not processes.index():
        if after:
            after(stage.path)
        stage.finish(
            {"steps": result.steps, "examples": result.examples},
            best_step=result.best_step,
            best_loss=result.best_loss,
            parameters=result.parameters,
        )
    processes.wait(f"{label} has ended")
    return workdir.manifest(stage.folder)
