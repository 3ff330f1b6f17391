"""The stage `index`: gallery, neighbors and token records, one after the other."""

from data_prep import gallery, neighbors, tokens
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.workdir import Manifest


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes queries/, gallery/, neighbors/ and tokens/ from features/ and align/."""
    return [made for stage in (gallery, neighbors, tokens) for made in stage.run(config, workdir)]
