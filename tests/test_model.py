"""The decoder in all its architectures: which inputs each output depends on, and equal results of all computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from geotoken_jax import attention
from geotoken_jax.data import join
from geotoken_jax.model import loss
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors, drop, sinusoidal
from geotoken_jax.predict.sample import greedy
from tests import fixtures

EVERY_FORM = pytest.mark.parametrize("form", fixtures.FORMS)
COPYING = pytest.mark.parametrize("form", ["ours", "compact"])


def close(a, b, atol=1e-5):
    """Compares log-probabilities, -inf with -inf."""
    np.testing.assert_allclose(np.exp(a), np.exp(b), atol=atol)
    np.testing.assert_allclose(a, b, atol=10 * atol)


@pytest.mark.slow
@EVERY_FORM
def test_probabilities_are_over_each_positions_own_vocabulary(form):
    found = np.asarray(fixtures.forward(fixtures.model(form), fixtures.batch()))
    assert found.shape == (4, 4, 16) and found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
    real = np.arange(16) < np.array([6, 16, 16, 16])[:, None]
    assert (np.isfinite(found) == real).all()
    assert (found[:, ~real] == -np.inf).all()


@pytest.mark.slow
@EVERY_FORM
def test_cached_decoding_equals_the_teacher_forced_forward(form):
    model, batch = fixtures.model(form), fixtures.batch()
    found = fixtures.stepwise(model, batch)
    close(found[:, 0], fixtures.forward(model, batch))
    others = {**batch, "tokens": np.roll(batch["tokens"], -1, 0)}
    close(found[:, 1], fixtures.forward(model, others))


@EVERY_FORM
def test_a_token_never_changes_what_came_before_it(form):
    model, batch = fixtures.model(form), fixtures.batch()
    before = fixtures.forward(model, batch)
    for t in range(4):
        tokens = batch["tokens"].copy()
        tokens[:, t] = (tokens[:, t] + 1) % 6
        after = fixtures.forward(model, {**batch, "tokens": tokens})
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        if t < 3:
            assert np.abs(np.exp(after[:, t + 1 :]) - np.exp(before[:, t + 1 :])).max(-1).min() > 1e-4


@pytest.mark.slow
@EVERY_FORM
def test_no_gradient_flows_from_the_future(form):
    model, batch = fixtures.model(form), fixtures.batch()
    # No neighbor contains the photo's tokens, so with a tied table only the photo itself uses their rows.
    sizes = np.array(model.settings.cells.vocab_sizes)
    batch["neighbor_tokens"] = ((batch["tokens"] + 5) % sizes)[:, None].repeat(fixtures.M, 1)
    one = {name: value[:1] for name, value in batch.items()}

    graph, state = nnx.split(model)

    @jax.jit
    @jax.jacobian
    def gradients(table):
        model = nnx.merge(graph, state)
        model.token_table = nnx.Param(table)
        found = model(one["query"], fixtures.neighbors(one), one["tokens"])
        return jnp.take_along_axis(found, one["tokens"][..., None], -1)[0, :, 0]

    rows = np.array(model.offsets) + one["tokens"][0]
    reached = np.abs(gradients(model.token_table[...]))[:, rows].max(-1) > 0  # [position, embedding of token]
    np.testing.assert_array_equal(reached, np.tri(4, 4, -1, dtype=bool))


@EVERY_FORM
def test_padding_neighbors_have_no_influence(form):
    model, batch = fixtures.model(form), fixtures.batch()
    padding = np.arange(fixtures.M) >= batch["neighbor_count"][:, None]
    other = {name: value.copy() for name, value in batch.items()}
    other["neighbors"][padding] = 1e4 * np.random.default_rng(1).normal(size=(padding.sum(), 3, fixtures.C))
    other["neighbor_tokens"][padding] = np.broadcast_to(batch["tokens"][:, None], (*padding.shape, 4))[padding]
    np.testing.assert_array_equal(fixtures.forward(model, other), fixtures.forward(model, batch))
    np.testing.assert_array_equal(fixtures.stepwise(model, other), fixtures.stepwise(model, batch))
    real = {**batch, "neighbors": np.where(padding[..., None, None], batch["neighbors"], other["neighbors"][::-1])}
    assert np.abs(fixtures.forward(model, real)[:3, 0, :6] - fixtures.forward(model, batch)[:3, 0, :6]).max() > 1e-3


@EVERY_FORM
def test_photos_and_candidates_do_not_see_each_other(form):
    model, batch = fixtures.model(form), fixtures.batch()
    order = np.array([2, 0, 3, 1])
    moved = {name: value[order] for name, value in batch.items()}
    close(fixtures.forward(model, moved), fixtures.forward(model, batch)[order])
    # Another second candidate does not change the first one's logits.
    others = {**batch, "tokens": batch["tokens"][[0, 2, 2, 3]]}
    close(fixtures.stepwise(model, others)[0, 0], fixtures.stepwise(model, batch)[0, 0])


def test_without_neighbor_embeddings_they_are_ignored():
    batch = fixtures.batch()
    other = {**batch, "neighbors": batch["neighbors"][:, ::-1] * 2}
    for kept in (True, False):
        model = fixtures.model("ours", neighbor_embeddings=kept)
        same = np.array_equal(fixtures.forward(model, batch), fixtures.forward(model, other))
        assert same == (not kept)


def test_a_model_needs_no_neighbors():
    model = fixtures.model("ours", neighbors=0, copy_head=False)
    batch = fixtures.batch()
    for name in ("neighbors", "neighbor_tokens"):
        batch[name] = batch[name][:, :0]
    batch["neighbor_count"] = np.zeros_like(batch["neighbor_count"])
    np.testing.assert_allclose(np.exp(fixtures.forward(model, batch)).sum(-1), 1, rtol=1e-5)


def test_hidden_neighbors_are_as_if_they_had_not_been_found():
    b, m = 400, 6
    tokens = jnp.broadcast_to(jnp.arange(m)[:, None], (b, m, 2))
    embeddings = jnp.broadcast_to(jnp.arange(m)[:, None, None], (b, m, 3, 1)) * 10.0
    count = jnp.full(b, 4).at[0].set(0)
    given = Neighbors(embeddings, tokens, count)
    assert drop(given, 0.5, None) is given and drop(given, 0.0, jax.random.key(0)) is given
    left = drop(given, 0.25, jax.random.key(0))
    assert left.count[0] == 0 and 2.8 < left.count[1:].mean() < 3.2
    for row, n in enumerate(left.count[:50]):
        order = np.asarray(left.tokens[row, :n, 0])
        assert (np.diff(order) > 0).all() and (order < 4).all()  # in the original order, without padding
        np.testing.assert_array_equal(left.embeddings[row, :n, 0, 0], 10.0 * order)


def test_without_neighbor_tokens_they_are_ignored():
    batch = fixtures.batch()
    other = {**batch, "neighbor_tokens": (batch["neighbor_tokens"] + 1) % 6}
    hidden, shown = fixtures.model("without_neighbor_tokens"), fixtures.model("ours")
    np.testing.assert_array_equal(fixtures.forward(hidden, other), fixtures.forward(hidden, batch))
    assert np.abs(fixtures.forward(shown, other)[0, 0, :6] - fixtures.forward(shown, batch)[0, 0, :6]).max() > 1e-3


def gate(form, bias):
    """Returns a model whose copy head's gate is constant, open or closed by the bias."""
    model = fixtures.model(form)
    model.copy.gate.kernel[...] = jnp.zeros_like(model.copy.gate.kernel[...])
    model.copy.gate.bias[...] = jnp.full_like(model.copy.gate.bias[...], bias)
    return model


@COPYING
def test_with_an_open_gate_the_next_tokens_of_agreeing_neighbors_come_out(form):
    batch = fixtures.batch()
    found = np.exp(fixtures.forward(gate(form, 40.0), batch))
    # Photo 0 has three neighbors. At position t, neighbors from t - 1 on agree with its first t tokens.
    for t in range(4):
        agreeing = batch["neighbor_tokens"][0, max(t - 1, 0) :, t]
        assert set(np.flatnonzero(found[0, t] > 1e-9)) == set(agreeing)
        if len(set(agreeing)) == 1:
            assert found[0, t, agreeing[0]] == pytest.approx(1, abs=1e-6)
    # At position 1, neighbor 0 has another token than the others; the weights are the copy head's attention.
    assert 0 < found[0, 1, batch["neighbor_tokens"][0, 0, 1]] < 1


@COPYING
def test_where_no_neighbor_agrees_it_is_the_plain_softmax(form):
    batch = fixtures.batch()
    wide, shut = fixtures.forward(gate(form, 40.0), batch), fixtures.forward(gate(form, -1e4), batch)
    assert batch["neighbor_count"][3] == 0
    np.testing.assert_array_equal(wide[3], shut[3])  # the photo has no neighbors
    np.testing.assert_array_equal(wide[2, 2:], shut[2, 2:])  # its one neighbor agrees only with the first token
    assert np.abs(np.exp(wide[2, :2]) - np.exp(shut[2, :2])).max(-1).min() > 1e-2


@pytest.mark.slow
def test_dropout_is_by_key():
    batch = fixtures.batch()
    model = fixtures.model("ours", dropout=0.3)
    without = fixtures.forward(model, batch)
    np.testing.assert_array_equal(without, fixtures.forward(fixtures.model("ours"), batch))
    one, again, two = (fixtures.forward(model, batch, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    for a, b in ((one, without), (one, two)):
        assert np.abs(np.exp(a) - np.exp(b)).max() > 1e-2


@pytest.mark.slow
def test_gradients_are_finite_and_the_same_whatever_is_kept():
    batch, found = fixtures.batch(), []
    assert 0 in batch["neighbor_count"]  # a photo without an agreeing neighbor
    for remat in ("none", "dots", "full"):
        model = fixtures.model("ours", decoder_layers=1, remat=remat)
        task = fixtures.task(model.settings)
        graph, state = nnx.split(model)

        def mean_loss(state, graph=graph, task=task):
            return task.loss(nnx.merge(graph, state), batch, None)[0]

        found.append([np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(mean_loss))(state))])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in found[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ours", "paper", "compact"])
def test_further_padding_for_a_device_changes_nothing(monkeypatch, form):
    model = fixtures.model(form, dropout=0.5)
    task, batch = fixtures.task(model.settings), fixtures.batch()
    graph, state = nnx.split(model)

    def results():
        def mean_loss(state):
            return task.loss(nnx.merge(graph, state), batch, jax.random.key(0))[0]

        loss, gradient = jax.value_and_grad(mean_loss)(state)
        sequence, lengths = model.sequence(batch["query"], fixtures.neighbors(batch))
        real = jnp.arange(model.settings.memory_form.length) < lengths[:, None]
        return jax.tree.leaves((loss, gradient, jnp.where(real[..., None], sequence, 0.0)))

    expected = results()
    monkeypatch.setattr(attention, "positions", lambda length: length + 5)
    for a, b in zip(results(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_is_what_is_computed_by_hand():
    np.testing.assert_allclose(loss.level_weights(5, 2.0, 1.0), [2.0, 1.75, 1.5, 1.25, 1.0])
    log_p = np.log(np.array([[[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], [[0.1, 0.1, 0.8], [0.6, 0.2, 0.2]]], np.float32))
    losses = loss.cross_entropy(jnp.asarray(log_p), jnp.array([[1, 2], [2, 0]]))
    np.testing.assert_allclose(losses, -np.log([[0.25, 0.5], [0.8, 0.6]]), rtol=1e-6)
    found = loss.weighted(losses, loss.level_weights(2, 2.0, 1.0))
    np.testing.assert_allclose(found, [(2 * 1.3862944 + 0.6931472) / 3, (2 * 0.2231436 + 0.5108256) / 3], rtol=1e-6)


@pytest.mark.slow
def test_the_task_averages_over_valid_photos():
    model, batch = fixtures.model("ours"), fixtures.batch()
    task = fixtures.task(model.settings)
    batch["tokens"][1] = nnx.jit(lambda m, b: greedy(m, m.encode(b["query"], fixtures.neighbors(b))))(
        model, batch
    ).tokens[1, 0]
    log_p = np.asarray(fixtures.forward(model, batch))
    losses = -np.take_along_axis(log_p, batch["tokens"][..., None], -1)[..., 0]
    for valid in (np.array([True, True, True, False]), np.array([False, True, False, False])):
        found, metrics = nnx.jit(task.loss)(model, {**batch, "valid": valid}, None)
        assert float(found) == pytest.approx((losses @ np.linspace(2, 1, 4) / 6)[valid].mean(), rel=1e-5)
        assert float(metrics["loss_level_2"]) == pytest.approx(losses[valid, 2].mean(), rel=1e-5)
        assert float(metrics["exact"]) == pytest.approx(1 / valid.sum())


def test_the_memory_has_the_length_that_the_paper_says():
    batch = fixtures.batch()
    for form, per_neighbor in (("paper", 3 + 4), ("compact", 1), ("without_neighbor_tokens", 3)):
        build = fixtures.model(form).memory_builder
        x, lengths = build(batch["query"], fixtures.neighbors(batch), jnp.zeros((4, fixtures.M, 4, 16)))
        assert x.shape == (4, 4 + fixtures.M * per_neighbor, 16) and x.shape[1] == build.form.length
        np.testing.assert_array_equal(lengths, 4 + batch["neighbor_count"] * per_neighbor)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["paper", "compact"])
def test_a_time_is_one_more_position_and_nothing_where_it_is_unknown(form):
    batch, timed = fixtures.batch(), fixtures.model(form, context="time")
    batch["context"] = join.context(np.array([0.0, 1e7, 1e7 + 4e4, np.nan]), 5)
    given = batch["query"], fixtures.neighbors(batch), jnp.zeros((4, fixtures.M, 4, 16))
    without, lengths = fixtures.model(form).memory_builder(*given)
    x, longer = timed.memory_builder(*given, batch["context"])
    assert x.shape == (4, without.shape[1] + 1, 16)
    np.testing.assert_array_equal(longer, lengths + 1)
    close(fixtures.stepwise(timed, batch)[:, 0], found := fixtures.forward(timed, batch))
    unknown = fixtures.forward(timed, {name: values for name, values in batch.items() if name != "context"})
    np.testing.assert_array_equal(found[3], unknown[3])
    assert (np.abs(np.exp(found) - np.exp(unknown)).max((1, 2))[:3] > 1e-3).all()


def test_a_model_without_times_is_the_one_that_it_was():
    s = fixtures.settings("compact")
    without, timed = (
        {path for path, _ in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda s=s: GeoTokenModel(s, nnx.Rngs(0)))))}
        for s in (s, dataclasses.replace(s, context="time"))
    )
    assert {path[:2] for path in timed - without} == {("memory_builder", "context")} and without < timed


@pytest.mark.slow
@pytest.mark.parametrize(("context", "least", "most"), [("none", 0.0, 0.7), ("season", 0.95, 1.0)])
def test_where_the_place_depends_on_the_season_it_is_learned_from_the_season_alone(context, least, most):
    rng, n = np.random.default_rng(0), 256
    times = rng.uniform(1e9, 1.7e9, n)
    north = join.context(times, 3)[:, 2] < 0  # the hemisphere that has summer
    tokens = np.where(north[:, None], [2, 3, 1, 0], [5, 0, 2, 3])
    s = fixtures.settings("compact", decoder_layers=1, context=context)
    batch = {**fixtures.batch(n), "tokens": tokens.astype(np.int32), "neighbor_count": np.zeros(n, np.int32)}
    if s.times:
        batch["context"] = join.context(times, s.times)
    task = fixtures.task(s)
    model = nnx.jit(lambda: task.init(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch, key):
        grads = nnx.grad(lambda m: task.loss(m, batch, key)[0])(model)
        optimizer.update(model, grads)

    for i in range(60):
        rows = rng.integers(0, n // 2, 64)
        step(model, optimizer, {name: values[rows] for name, values in batch.items()}, jax.random.key(i))
    unseen = {name: values[n // 2 :] for name, values in batch.items()}
    right = np.asarray(fixtures.forward(model, unseen)).argmax(-1) == unseen["tokens"]
    assert least <= right.all(-1).mean() <= most
    # A tenth of the training photos had no time, so without a time the model predicts with low confidence.
    unknown = fixtures.forward(model, {name: values for name, values in unseen.items() if name != "context"})
    assert 0.3 < float(np.exp(np.asarray(unknown))[:, 0].max(-1).mean()) < 0.8


def test_sinusoidal_positions():
    found = sinusoidal(50, 6)
    rates = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(found[7, 0::2], np.sin(7 * rates), atol=1e-5)
    np.testing.assert_allclose(found[7, 1::2], np.cos(7 * rates), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "config.model.width is 16: make it a multiple of config.model.heads = 3"),
        ({"norm": "both"}, "config.model.norm is 'both': choose one of pre, post"),
        ({"remat": "some"}, "config.model.remat is 'some'"),
        ({"activation": "swish"}, "config.model.activation is 'swish': choose one of relu, gelu, swiglu, geglu"),
        ({"attention": "flash"}, "config.model.attention is 'flash': choose one of auto, xla, cudnn"),
        (
            {"attention": "cudnn"},
            "config.model.attention is 'cudnn', which needs .* dtype is float32 and width / heads is 8",
        ),
        (
            {"attention": "cudnn", "dtype": "bfloat16", "heads": 4},
            "dtype is bfloat16 and width / heads is 4: change dtype or heads, or set attention to 'auto'",
        ),
        ({"attention_dropout": 1.0}, "config.model.attention_dropout is 1.0: choose a rate of at least 0 and below 1"),
        (
            {"attention": "cudnn", "dtype": "bfloat16", "attention_dropout": 0.1},
            "config.model.attention is 'cudnn', which cannot drop .*attention_dropout is 0.1: set attention to 'auto'",
        ),
        ({"memory": "half"}, "config.model.memory is 'half'"),
        ({"context": "weather"}, "config.model.context is 'weather': choose one of none, season, time"),
        ({"neighbor_tokens": False}, "config.model.copy_head is True, but"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fixtures.settings("ours", **changes)
