"""Batches of each network: the loss takes the batch that its specification describes, and readers yield it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import batch
from geotoken_jax.align.heads import AlignSettings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.align.loss import LossSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.model import batch as decoder
from geotoken_jax.model.comparator import ComparatorSettings, ComparatorTask
from geotoken_jax.model.reward import RewardSettings, RewardTask
from geotoken_jax.predict.classifier import ClassifierSettings, ClassifierTask
from tests import fixtures

N, K, C = 4, 3, 6
ALIGN = AlignSettings(8, 0.0, 0.0, LocationSettings("mercator", (1.0,), 4, 4, 4))
TIMED = fixtures.settings("ours", context="season")


COMPARATOR = ComparatorSettings(8, 4, 0.0, 0.0, 1.0)
TASKS = {
    "decoder": lambda: (fixtures.task(TIMED), decoder.spec(TIMED, N)),
    "align": lambda: ((task := AlignTask(ALIGN, C, LossSettings("info_nce", 8, 0, 0.0))), task.batch(N)),
    "reward": lambda: ((task := RewardTask(RewardSettings(8, 0.0), C)), task.batch(N, K)),
    "comparator": lambda: (
        (task := ComparatorTask(COMPARATOR, np.zeros(C, np.float32))),
        task.batch(N),
    ),
    "classifier": lambda: ((task := ClassifierTask(ClassifierSettings(9, 1, 8, 0.0, 2), C, 5)), task.batch(N)),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_loss_takes_the_batch_that_is_specified(name: str, evaluation: bool):
    task, spec = TASKS[name]()
    read = set()

    class DecoderOutputs(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    if evaluation:
        spec = {**spec, "valid": jax.ShapeDtypeStruct((N,), bool)}

    def loss(values: dict, key: jax.Array | None) -> jax.Array:
        return task.loss(task.init(nnx.Rngs(0)), DecoderOutputs(values), key)[0]

    key = None if evaluation else jax.random.key(0)
    found = jax.eval_shape(lambda values: loss(values, key), spec)
    assert found.shape == () and found.dtype == jnp.float32
    assert read & set(spec) == set(spec) and read - set(spec) <= {"context", "valid"}


def test_fakes_follow_the_specification():
    found = decoder.random_batch(TIMED, N, seed=1)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in decoder.spec(TIMED, N).items()
    }
    sizes = np.array(TIMED.cells.vocab_sizes)
    assert (found["tokens"] < sizes).all() and (found["neighbor_tokens"] < sizes).all()
    assert (found["neighbor_count"] == TIMED.neighbors).all()
    np.testing.assert_array_equal(found["query"], decoder.random_batch(TIMED, N, seed=1)["query"])
    assert (batch.random_batch(batch.spec(50, cell=((), jnp.int32)), below={"cell": 3})["cell"] < 3).all()


def test_neighbors_on_the_devices_are_rows():
    host, device = decoder.spec(TIMED, N), decoder.spec(TIMED, N, on_device=True)
    assert set(host) - set(device) == {"neighbors", "neighbor_tokens"} and set(device) - set(host) == {"neighbor_rows"}
