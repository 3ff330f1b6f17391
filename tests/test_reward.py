"""The reward head: its states against the decoder's, its training, and its choice from a pool."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from geotoken_jax import checkpoint
from geotoken_jax.model.reward import RewardSettings, RewardTask
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.reward import Reward, States
from geotoken_jax.predict.sample import Candidates
from tests import fixtures

OPTIONS = RewardSettings(hidden=16, dropout=0.1)


def pool(n=3, k=2):
    """Pools whose candidates are the photo's tokens and tokens of other photos. Neighbors have matching coordinates."""
    batch = fixtures.batch(n)
    tokens = np.stack([np.roll(batch["tokens"], i, 0) for i in range(k)], 1)
    near = np.stack(fixtures.CELLS.decode(batch["neighbor_tokens"]), -1)
    zeros = np.zeros((n, k), np.float32)
    return batch, Pool(
        Candidates(tokens, zeros, zeros),
        np.stack(fixtures.CELLS.decode(tokens), -1),
        batch["query"], batch["neighbors"], near, np.zeros(near.shape[:2]), batch["neighbor_count"], None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["paper", "gated"])
def test_states_are_those_that_the_last_token_is_read_off(form):
    model = fixtures.model(form, copy_head=False)
    batch, found = pool()
    states = States(model)(found)
    assert states.shape == (3, 2, 16)
    logits = states @ np.asarray(model.head[...][-1]) + np.asarray(model.head_bias[...][-1])
    for k in range(2):
        expected = fixtures.forward(model, {**batch, "tokens": found.candidates.tokens[:, k]})[:, -1]
        np.testing.assert_allclose(jax.nn.log_softmax(logits[:, k]), expected, atol=1e-4)


def test_each_candidate_sees_the_neighbors_of_its_own_photo_and_no_others():
    states = States(fixtures.model("ours"))
    _, found = pool()
    before = states(found)
    changed = found._replace(neighbors=np.concatenate([found.neighbors[:1] + 1, found.neighbors[1:]]))
    after = states(changed)
    np.testing.assert_array_equal(before[1:], after[1:])
    assert (np.abs(before[0] - after[0]).max(-1) > 1e-4).all()


@pytest.mark.slow
def test_states_know_the_time_that_the_candidates_were_drawn_with():
    model = fixtures.model("ours", context="season", copy_head=False)
    batch, found = pool()
    batch["context"] = np.array([[1, 0.6, 0.8], [0, 0, 0], [1, -1, 0]], np.float32)
    states = States(model)(found._replace(context=batch["context"]))
    logits = states[:, 0] @ np.asarray(model.head[...][-1]) + np.asarray(model.head_bias[...][-1])
    expected = fixtures.forward(model, {**batch, "tokens": found.candidates.tokens[:, 0]})[:, -1]
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-4)
    changed = np.abs(states - States(model)(found)).max((1, 2))
    assert (changed[[0, 2]] > 1e-4).all() and changed[1] == 0


@pytest.mark.slow
def test_it_learns_to_choose_what_is_near(tmp_path):
    model = fixtures.model("ours")
    _, found = pool(4, 4)
    states = States(model)(found)
    km = np.full((4, 4), 5000.0, np.float32)
    km[np.arange(4), [3, 2, 0, 1]] = [0.5, 20, 150, 700]
    task = RewardTask(OPTIONS, 16)
    head = task.init(nnx.Rngs(0))
    optimizer = nnx.Optimizer(head, optax.adam(0.01), wrt=nnx.Param)
    batch = {"states": jnp.asarray(states), "km": jnp.asarray(km)}

    @nnx.jit
    def step(head, optimizer, key):
        (loss, found), grads = nnx.value_and_grad(lambda h: task.loss(h, batch, key), has_aux=True)(head)
        optimizer.update(head, grads)
        return loss, found

    first, _ = step(head, optimizer, jax.random.key(0))
    for i in range(150):
        step(head, optimizer, jax.random.key(i))
    last, metrics = task.loss(head, batch, None)
    assert last < 0.5 * first
    assert [float(metrics[f"within_{t}_km"]) for t in (1, 25, 200, 750, 2500)] == [0.25, 0.5, 0.75, 1, 1]
    checkpoint.write_parameters(
        tmp_path / "parameters.safetensors", jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(head, nnx.Param)))
    )
    assert Reward(tmp_path, OPTIONS, model)(found).tolist() == [3, 2, 0, 1]
