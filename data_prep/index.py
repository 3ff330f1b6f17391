"""The stage `index`: makes the gallery, then neighbors, then token records."""

from data_prep import gallery, neighbors, tokens
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest
from geotoken_jax.workdir import Workdir


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes queries/, gallery/, neighbors/ and tokens/ from features/ and align/."""
    return [manifest for step in (gallery, neighbors, tokens) for manifest in step.run(config, workdir)]
