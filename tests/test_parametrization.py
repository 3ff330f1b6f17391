"""muP: the base model is the standard one; factors, initial values and multipliers follow the width."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from configs import ladder
from geotoken_jax import configuration, manifests, settings, sharding
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer
from geotoken_jax.train.step import Trainer
from tests import fixtures

OPTIMIZER = OptimizerSettings(
    learning_rate=0.01, schedule="cosine", decay=0.9, warmup=0.0, weight_decay=0.1, b2=0.999, clip=0.0
)
BASE = dict(parametrization="mup", base_width=16, base_heads=2, base_layers=1)
#: A bias of the keys adds the same number to all logits of a query. Its gradient is a rounding error.
WITHOUT_GRADIENT = ("/k/bias", "copy/key/bias")
WIDE = dict(width=64, heads=2, feed_forward=96, encoder_layers=2, decoder_layers=2, **BASE)


def make_trainer(mesh=(1, 1, 1), decay=0.1, **changes):
    task = fixtures.task(fixtures.settings("compact", **changes))
    split = sharding.make_mesh(sharding.MeshSettings(*mesh), jax.devices()[: int(np.prod(mesh))])
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, weight_decay=decay))
    return Trainer(task, optimizer, split, ema=0.9)


def flat(params):
    """Returns the parameters by their paths."""
    return {"/".join(map(str, path)): np.asarray(x) for path, x in traverse_util.flatten_dict(params).items()}


@functools.cache
def trained(mesh=(1, 1, 1), decay=0.1):
    """Returns the parameters of the wide model before and after one training step."""
    trainer = make_trainer(mesh, decay, **WIDE)
    state = trainer.init(jax.random.key(0))
    before = flat(state["params"])
    batch = {name: value for name, value in fixtures.batch(8).items() if name != "valid"}
    state, _ = trainer.step(state, jax.device_put(batch, trainer.batch_sharding), jax.random.key(1), 0.01, {})
    return before, flat(state["params"])


@pytest.mark.slow
def test_at_the_base_shape_both_parametrizations_are_the_same_program():
    shape, programs = dict(encoder_layers=1, decoder_layers=1), []
    for changes in (shape, {**shape, **BASE}, {**shape, **BASE, "base_width": 8}):
        trainer = make_trainer(**changes)
        batch = {name: value for name, value in fixtures.batch(8).items() if name != "valid"}
        lowered = trainer.step.lower(trainer.abstract, batch, jax.random.key(1), 0.01, {})
        programs.append((lowered.as_text(), trainer.init.lower(jax.random.key(0)).as_text()))
    assert programs[0] == programs[1] != programs[2]


@pytest.mark.slow
def test_weights_that_read_the_width_move_less_by_its_ratio():
    before, after = trained(decay=0.0)
    moved = {name: np.abs(after[name] - before[name]).max() / 0.01 for name in before}
    moved = {name: value for name, value in moved.items() if not name.endswith(WITHOUT_GRADIENT)}
    slow = {name for name, value in moved.items() if value < 0.5}
    assert slow == {
        *(f"{layers}/feed_forward/{name}/kernel" for layers in ("encoder", "decoder") for name in ("up", "down")),
        *(
            f"{layers}/{name}/kernel"
            for layers in ("encoder/attention", "decoder/attention", "decoder/memory_attention")
            for name in ("q", "k", "v", "out")
        ),
        *(f"copy/{name}/kernel" for name in ("query", "key", "gate")),
        *(f"memory_builder/{name}" for name in ("projections/down", "similar_down/kernel")),
        "head",
    }
    for name, value in moved.items():
        # Adam's first step is the learning rate for every weight with a gradient.
        assert value == pytest.approx(0.25 if name in slow else 1.0, rel=0.02), name


@pytest.mark.slow
def test_weight_decay_does_not_depend_on_the_width():
    (before, one), (_, other) = trained(decay=0.0), trained()
    for name in ("head", "token_table", "decoder/feed_forward/up/kernel"):
        np.testing.assert_allclose(one[name] - other[name], 0.01 * 0.1 * before[name], rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_a_mesh_trains_a_mup_model_as_one_device_does():
    alone = trained()[1]
    for name, values in trained((2, 2, 1))[1].items():
        if not name.endswith(WITHOUT_GRADIENT):
            np.testing.assert_allclose(values, alone[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_initial_values_and_multipliers_follow_the_width():
    wide, standard = (
        GeoTokenModel(fixtures.settings("compact", **{**WIDE, "parametrization": name}), nnx.Rngs(0))
        for name in ("mup", "standard")
    )
    for name, ratio in (("head", 0.5), ("copy/gate/kernel", 0.5), ("copy/key/kernel", 1.0), ("token_table", 1.0)):
        one, other = (flat(nnx.to_pure_dict(nnx.state(model)))[name] for model in (wide, standard))
        np.testing.assert_allclose(one, ratio * other, rtol=1e-5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 64)), jnp.float32)
    one, other = (jax.tree.map(lambda a: a[0], nnx.state(m.decoder)) for m in (wide, standard))
    layers = [nnx.merge(nnx.graphdef(m.decoder), state) for m, state in ((wide, one), (standard, other))]
    queries = [layer.attention.queries(x) for layer in layers]
    np.testing.assert_allclose(queries[0], 0.5 * queries[1], rtol=1e-5)  # head width 32, base head width 8
    scores = [m.copy.scores(x, x) for m in (wide, standard)]
    np.testing.assert_allclose(scores[0], 0.5 * scores[1], rtol=1e-5)
    vectors = [m.memory_builder.projections(jnp.ones((1, 3, fixtures.C))) for m in (wide, standard)]
    np.testing.assert_allclose(vectors[0], 2 * vectors[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gated", "paper"])
def test_decoding_step_by_step_uses_the_same_multipliers(form):
    model, batch = fixtures.model(form, **WIDE), fixtures.batch()
    np.testing.assert_allclose(
        fixtures.stepwise(model, batch)[:, 0], fixtures.forward(model, batch), rtol=1e-4, atol=1e-4
    )
    standard = fixtures.model(form, **{**WIDE, "parametrization": "standard"})
    assert not np.allclose(fixtures.forward(standard, batch), fixtures.forward(model, batch), atol=1e-2)


def test_models_of_earlier_releases_are_standard():
    stored = settings.result(fixtures.settings("ours", base_width=512, base_heads=8, base_layers=10))
    earlier = {name: value for name, value in stored.items() if name != "parametrization" and "base" not in name}
    assert len(stored) == len(earlier) + 4
    assert settings.completed({"model": earlier, "name": "x"}) == {"model": stored, "name": "x"}
    mup = {"model": {**stored, "parametrization": "mup"}}
    assert settings.completed(mup) == mup and settings.completed({"model": {"neighbors": 3}}) == {
        "model": {"neighbors": 3}
    }


def test_a_folder_of_an_earlier_release_is_kept_as_standard(tmp_path):
    stored = settings.result(fixtures.settings("ours", base_width=512, base_heads=8, base_layers=10))
    earlier = {name: value for name, value in stored.items() if name != "parametrization" and "base" not in name}
    manifests.begin(tmp_path, "geotoken/x", {"model": earlier}, []).finish({})
    assert manifests.begin(tmp_path, "geotoken/x", {"model": stored}, []).manifest
    with pytest.raises(manifests.OtherSettingsError, match=r"parametrization is 'mup', but .* made with 'standard'"):
        manifests.begin(tmp_path, "geotoken/x", {"model": {**stored, "parametrization": "mup"}}, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parametrization": "ntk"}, "config.model.parametrization is 'ntk': choose one of standard, mup"),
        ({"base_width": 0}, "config.model.base_width is 0: use 1 or more"),
        ({"base_layers": -1}, "config.model.base_layers is -1: use 1 or more"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fixtures.settings("ours", **changes)


def test_the_ladder_has_every_size_in_both_parametrizations():
    standard, mup = (configuration.read(ladder.get_config(name)) for name in ("7M", "7M,mup"))
    assert (standard.model.parametrization, mup.model.parametrization) == ("standard", "mup")
    assert (standard.model.width, standard.model.heads, standard.model.decoder_layers) == (256, 4, 5)
    assert (mup.model.width_ratio, mup.model.head_ratio, mup.model.depth_ratio(5)) == (0.25, 0.25, 0.2)
    assert ladder.MUP_SIZE.keys() == ladder.SIZE.keys()
    assert {size["train"]["optimizer"]["learning_rate"] for size in ladder.MUP_SIZE.values()} == {ladder.MUP_RATE}
    # The rates of both are equal at the base width.
    assert ladder.SIZE["82K"]["train"]["optimizer"]["learning_rate"] == pytest.approx(ladder.MUP_RATE)
    for name in ("8M", "7M,ntk"):
        with pytest.raises(ValueError, match=f"ladder.py:{name} names an unknown size: use one of 5K, "):
            ladder.get_config(name)


def test_the_moving_average_extends_over_as_many_examples_at_all_batch_sizes():
    for size in ladder.SIZE.values():
        batch, decay = size["train"]["batch_size"], size["train"]["ema"]
        assert decay == 0 if batch >= ladder.EMA_EXAMPLES else batch / (1 - decay) == pytest.approx(3_200)
    train = configuration.read(ladder.get_config("52M")).train
    assert train.batch_size / (1 - train.ema) == pytest.approx(train.examples / 100)


def test_models_of_the_transfer_study_differ_in_width_alone():
    models = ladder.transfer()
    assert len(models) == 10 and [m["model"]["width"] for m in models.values()] == [16, 32, 64, 128, 256] * 2
    read = {}
    for name, changes in models.items():
        config: Any = ladder.get_config("5K")
        for section, values in changes.items():
            config[section].update(values)
        read[name] = configuration.read(config)
        model = read[name].model
        assert (model.heads, model.encoder_layers, model.decoder_layers) == (4, 2, 2)
        assert model.feed_forward == 2 * model.width and model.depth_ratio(2) == 1.0
        assert name == f"{model.parametrization}_{model.width}" and read[name].train.batch_size == 64
    assert read["mup_64"].model.width_ratio == read["mup_64"].model.head_ratio == 1.0
    assert read["mup_256"].model.head_ratio == 0.25
