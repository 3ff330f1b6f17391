"""Apache Beam as the engine of `prepare` where one machine is not enough; the extra `beam` brings it."""

from collections.abc import Callable, Sequence
from typing import Any

from geotoken_jax.preparation import BeamSettings
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import StageError


def run_tasks(do: Callable[[Any], Any], tasks: Sequence[Any], settings: BeamSettings) -> None:
    """Does every task, each in a process and on a machine of the runner's choice, perhaps more than once.

    do: a function of a module that every machine can import. tasks: values that can be pickled.

    Raises SettingsError without Apache Beam, StageError if a task fails or the runner does.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError:
        raise SettingsError(
            f"config.photos.beam.runner is {settings.runner!r}, which needs Apache Beam: install the extra `beam` "
            "(`pip install -e '.[beam]'`), or leave the runner empty for processes of this machine"
        ) from None
    options = PipelineOptions([f"--runner={settings.runner}", *settings.options])
    try:
        with beam.Pipeline(options=options) as pipeline:
            # Without Reshuffle a runner may take all tasks for one bundle, and do them one after the other.
            _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(do)
    except Exception as error:  # each runner has errors of its own, a worker's with its traceback in the lines before
        last = (str(error) or repr(error)).strip().splitlines()[-1]
        raise StageError(f"config.photos.beam.runner {settings.runner} did not make all shards: {last}") from error
