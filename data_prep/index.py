"""The stage `index`: makes the gallery, then neighbors, then token records.

Processes divide the shards of each step among themselves (data_prep/sharded.py). A step starts when all shards of the
previous step are complete.
"""

from data_prep import gallery, neighbors, tokens
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest
from geotoken_jax.workdir import Workdir

#: The steps in their order: module, and number of folders that the step makes.
_STEPS = ((gallery, 2), (neighbors, 1), (tokens, 1))


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes queries/, gallery/, neighbors/ and tokens/ from features/ and align/.

    Returns the manifests of the folders that are complete. If shards of other processes are missing, these are not all.
    """
    manifests = []
    for step, folders in _STEPS:
        made = step.run(config, workdir)
        manifests += made
        if len(made) < folders:
            break
    return manifests
