"""The stage `index`: makes the gallery, then neighbors, then token records.

Each step divides its shards among processes, as `embed` does (data_prep/sharded.py). A step needs all shards of the
step before it.
"""

from data_prep import gallery, neighbors, tokens
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest
from geotoken_jax.workdir import Workdir

#: Steps in order, and the number of folders that each of them makes.
_STEPS = ((gallery, 2), (neighbors, 1), (tokens, 1))


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes queries/, gallery/, neighbors/ and tokens/ from features/ and align/.

    Returns the manifests of fewer folders if shards of other processes are missing.
    """
    manifests = []
    for step, folders in _STEPS:
        made = step.run(config, workdir)
        manifests += made
        if len(made) < folders:
            break
    return manifests
