"""Stages of data_prep/, which only a clone of the repository has: the installed package lacks them."""

import importlib

from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, StageError
from geotoken_jax.workdir import Workdir


def run(module: str, config: Config, workdir: Workdir) -> list[Manifest]:
    """Runs the stage data_prep/MODULE.py. Raises StageError if there is no data_prep."""
    try:
        stage = importlib.import_module(f"data_prep.{module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "data_prep":
            raise StageError(
                "the installed package has no data_prep/: clone the repository and run this command there"
            ) from None
        raise
    return stage.run(config, workdir)
