"""`geotoken scaling check`: the coordinate check of the decoder's two parametrizations (analysis/activations.py)."""

from typing import Any

from geotoken_jax.analysis import activations
from geotoken_jax.analysis.scaling import CHECK, FOLDER
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import write_json
from geotoken_jax.workdir import Workdir

_WIDTHS, _STEPS, _SEEDS = (32, 64, 128, 256), 4, 3


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Writes scaling/check.json, the result of activations.check for config.model and config.train, and returns it."""
    result = activations.check(config.model, config.train.optimizer, _WIDTHS, _STEPS, _SEEDS)
    folder = workdir.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CHECK, result)
    return result
