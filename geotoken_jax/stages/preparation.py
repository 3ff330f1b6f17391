"""Stages of data_prep/, which only a clone of the repository has: the installed package lacks them."""

import importlib

from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, StageError
from geotoken_jax.workdir import Workdir


def run(module: str, config: Config, workdir: Workdir) -> list[Manifest]:
    """Runs the stage data_prep/MODULE.py. Raises StageError if there is no data_prep or if a package is missing."""
    try:
        stage = importlib.import_module(f"data_prep.{module}")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "data_prep":
            raise StageError(
                "the installed package has no data_prep/: clone the repository and run this command there"
            ) from None
        if package == "geotoken_jax":
            raise StageError(
                f"data_prep/ is of another version than the installed package, which has no {error.name}: run "
                "`pip install .` in the clone"
            ) from None
        raise StageError(f"data_prep/ needs {error.name}: install it with pip install 'geotoken-jax[prep]'") from None
    return stage.run(config, workdir)
