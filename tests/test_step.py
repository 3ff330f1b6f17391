"""The train step: the same training on any mesh, with optimizer state that is split over all data-parallel devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import sharding, stack
from geotoken_jax.checkpoint import Checkpoints
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer
from geotoken_jax.train.step import Trainer

OPTIMIZER = OptimizerSettings(
    learning_rate=0.01, schedule="cosine", decay=0.9, warmup=0.0, weight_decay=0.01, b2=0.999, clip=0.0
)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]


class Block(nnx.Module):
    """A residual layer with a norm."""

    def __init__(self, dtype, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.up = sharding.linear(64, 128, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down = sharding.linear(128, 64, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x):
        return x + self.down(jax.nn.relu(self.up(self.norm(x).astype(x.dtype))))


class Model(nnx.Module):
    """Three stacked layers, a table of vectors, a head whose width divides over no mesh, and a scalar."""

    def __init__(self, dtype, rngs):
        self.table = sharding.parameter(rngs.params(), nnx.initializers.normal(1.0), (256, 64), ("vocab", None))
        self.layers = stack.make(lambda r: Block(dtype, r), 3, rngs)
        self.head = sharding.parameter(rngs.params(), nnx.initializers.normal(0.1), (64, 5), ("embed", None), dtype)
        self.scale = nnx.Param(jnp.ones(()))


class Rows:
    """Maps a number in 0-255 to a vector of 5 numbers."""

    flops = 0.0

    def __init__(self, dtype="float32", remat="none"):
        self.dtype, self.remat = jnp.dtype(dtype), remat

    def init(self, rngs):
        return Model(self.dtype, rngs)

    def loss(self, model, batch, key):
        x = sharding.constrain(model.table[...][batch["row"]].astype(self.dtype), "batch")

        def body(layer, x, _):
            return sharding.constrain(layer(x), "batch"), None

        x, _ = stack.scan(model.layers, body, x, None, self.remat)
        y: Any = sharding.einsum("bd,dv->bv", x, model.head[...])
        y = y.astype(jnp.float32) * model.scale[...]
        return jnp.mean((y - batch["y"]) ** 2), {"largest": jnp.abs(y).max()}


def batch(step):
    rng = np.random.default_rng(step)
    rows = rng.integers(0, 256, 32)
    return {"row": rows, "y": np.sin(rows[:, None] * np.arange(1, 6)).astype(np.float32)}


def trainer(mesh, task=None, **changes):
    devices = jax.devices()[: int(np.prod(mesh))]
    split = sharding.make_mesh(sharding.MeshSettings(*mesh), devices)
    return Trainer(task or Rows(), make_optimizer(OPTIMIZER), split, **changes)


def run(made, steps=4, state=None):
    """Returns the losses of some steps, and the state after them."""
    state = made.init(jax.random.key(0)) if state is None else state
    losses = []
    for _ in range(steps):
        step = int(state["step"])
        photos = jax.device_put(batch(step), made.batch_sharding)
        state, metrics = made.step(state, photos, jax.random.key(1), 0.01, {})
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return losses, state


@pytest.fixture(scope="module")
def alone():
    """Four steps on one device."""
    return run(trainer((1, 1, 1), ema=0.9))


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_device_does(mesh, alone):
    losses, state = run(trainer(mesh, ema=0.9))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
    close(state, alone[1])


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_stores_and_updates_its_share(mesh):
    made = trainer(mesh, ema=0.9)
    state = made.init(jax.random.key(0))
    for tree in (state["params"], state["ema"], state["optimizer"][0].mu, state["optimizer"][0].nu):
        for array in (tree["layers"]["up"]["kernel"], tree["layers"]["down"]["kernel"], tree["table"]):
            split = 8 if array.ndim == 3 else mesh[0] * mesh[1]  # the table is not split over `tensor`
            assert array.addressable_shards[0].data.size == array.size // split
            assert array.sharding.spec[0] is None or array.ndim == 2  # a layer is on all devices
        assert tree["layers"]["norm"]["scale"].sharding.is_fully_replicated
        assert tree["scale"].sharding.is_fully_replicated


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_on_another(tmp_path, alone):
    first, second = trainer((2, 2, 2), ema=0.9), trainer((8, 1, 1), ema=0.9)
    _, state = run(first, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {}, None)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(2, second.abstract)
    assert restored["params"]["table"].addressable_shards[0].data.size == 256 * 64 // 8
    losses, state = run(second, 2, restored)
    np.testing.assert_allclose(losses, alone[0][2:], rtol=1e-4)
    close(state, alone[1])


def program(made):
    example = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype, sharding=made.batch_sharding)
        for name, x in batch(0).items()
    }
    return made.step.lower(made.abstract, example, jax.random.key(0), 0.01, {})


@pytest.mark.slow
def test_sums_are_in_the_type_of_the_setting():
    """The products that compute gradients have the type of the sums over devices."""
    for dtype, other in (("float32", "bf16"), ("bfloat16", "f32")):
        text = program(trainer((8, 1, 1), Rows("bfloat16"), gradient_dtype=dtype)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line and "-> tensor<64x128x" in line]
        assert products and not any(f"-> tensor<64x128x{other}>" in line for line in products)
    losses = [
        run(trainer((8, 1, 1), Rows("bfloat16"), accumulate=2, gradient_dtype=dtype))[0]
        for dtype in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_loss(remat, alone):
    losses, _ = run(trainer((4, 1, 2), Rows(remat=remat), ema=0.9))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
