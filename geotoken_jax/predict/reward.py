"""The selector `reward`: a trained head scores candidates by the decoder output that predicts their last token.

Source: section 3.5 of the paper.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float32, Int

from geotoken_jax import checkpoint, sharding
from geotoken_jax.batch import blocks
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.model.reward import RewardSettings, RewardTask, choose
from geotoken_jax.predict.pool import Pool

#: Photos per call, rounded up to a multiple of the number of devices. Smaller batches are padded to this number, so
#: only one shape is compiled.
_BATCH = 64


class States:
    """A function that returns, for every candidate of a pool, the decoder output that predicts its last token.

    Every local device computes a share of the photos.
    """

    def __init__(self, model: GeoTokenModel):
        self._cells = model.settings.cells
        graph, state = nnx.split(model)

        def run(state: nnx.State, query: jax.Array, neighbors: tuple, tokens: jax.Array, context: Any) -> jax.Array:
            model = nnx.merge(graph, state)
            return model.states(model.encode(query, Neighbors(*neighbors), context=context), tokens)

        self._run, devices = sharding.over_local_devices(run, state)
        self._block = -(-_BATCH // devices) * devices

    def __call__(self, pool: Pool) -> Float32[np.ndarray, "b K D"]:
        """Returns the decoder output that predicts the last token, for each of K candidates per photo."""
        outputs = []
        for rows, n in blocks(np.arange(len(pool.query)), self._block):
            latitude, longitude = np.moveaxis(pool.neighbor_coordinates[rows], -1, 0)
            tokens = np.asarray(self._cells.encode(latitude, longitude), np.int32)
            neighbors = pool.neighbors[rows], tokens, pool.neighbor_count[rows]
            context = None if pool.context is None else pool.context[rows]
            states = self._run(pool.query[rows], neighbors, pool.candidates.tokens[rows], context)
            outputs.append(np.asarray(states, np.float32)[:n])
        return np.concatenate(outputs)


class Reward:
    """A trained reward head as a selector."""

    def __init__(self, folder: epath.PathLike, options: RewardSettings, model: GeoTokenModel):
        """folder: reward/VARIANT of a work directory, or reward/ of an export. model: decoder whose outputs the head
        scores."""
        task = RewardTask(options, model.settings.width)
        head = checkpoint.read_module(epath.Path(folder) / "parameters.safetensors", task.init)
        self._states = States(model)
        graph, self._state = nnx.split(head)
        self._run = jax.jit(lambda state, states: choose(nnx.merge(graph, state)(states)))

    def __call__(self, pool: Pool) -> Int[np.ndarray, " b"]:
        """Returns the index of the candidate with the highest expected accuracy, averaged over THRESHOLDS_KM."""
        return np.asarray(self._run(self._state, self._states(pool)))
