"""Runs the tasks of `prepare` on several machines with Apache Beam, which the extra `beam` installs."""

from collections.abc import Callable, Sequence
from typing import Any

from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import BeamSettings
from geotoken_jax.settings import SettingsError


def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], settings: BeamSettings) -> None:
    """Calls a function once per task, on machines that the Beam runner chooses. The runner may repeat a call.

    function: function that is defined in a module which every machine can import. tasks: picklable objects; each is the
    argument of one call.

    Raises SettingsError if Apache Beam is not installed, StageError if a task or the runner fails.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError:
        raise SettingsError(
            f"config.photos.beam.runner is {settings.runner!r}, which needs Apache Beam: install the extra `beam` "
            "(`pip install -e '.[beam]'`), or set the runner to '' to use processes on this machine"
        ) from None
    options = PipelineOptions([f"--runner={settings.runner}", *settings.options])
    try:
        with beam.Pipeline(options=options) as pipeline:
            # Without Reshuffle a runner may put all tasks in one bundle and run them one after another.
            _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(function)
    except Exception as error:  # each runner raises its own types; the last line of the text is the message
        last = (str(error) or repr(error)).strip().splitlines()[-1]
        raise StageError(
            f"the Beam runner {settings.runner} did not make all shards ({last}): fix the cause and run the same "
            "command again, which makes only the missing shards"
        ) from error
