"""The published weights in our model: the golden file's numbers, and the way back bit for bit."""

import pathlib
import re

import numpy as np
import pytest

from geotoken_jax.interop import official

GOLDEN = pathlib.Path(__file__).parent / "golden" / "official_d32_l2_g2.npz"


@pytest.fixture(scope="module")
def weights():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name[2:]: file[name] for name in file.files if name.startswith("w/")}


@pytest.fixture(scope="module")
def settings():
    with np.load(GOLDEN, allow_pickle=False) as file:
        width, layers, heads, feed_forward, group, level, neighbors = (int(value) for value in file["config"])
    return official.settings(
        width=width,
        layers=layers,
        heads=heads,
        feed_forward=feed_forward,
        group=group,
        level=level,
        neighbors=neighbors,
    )


def test_our_model_has_the_published_ones_numbers():
    found = official.check(str(GOLDEN))
    agreement = {name: value for name, value in found.items() if name.endswith("tokens")}
    assert agreement == {"greedy tokens": 1.0, "beam tokens": 1.0}
    errors = {name: value for name, value in found.items() if name not in agreement}
    assert errors.keys() == {"memory", "logits", "loss", "log-probability", "beam log-probability"}
    assert max(errors.values()) < 1e-4, errors


def test_weights_go_in_and_out_bit_for_bit(settings, weights):
    found = official.to_state_dict(official.from_state_dict(settings, weights))
    read = {name: value for name, value in weights.items() if not name.startswith(official.UNUSED)}
    assert found.keys() == read.keys()
    for name, value in read.items():
        np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


@pytest.mark.parametrize(
    "name", ["cls_token", "decoder.layers.1.multihead_attn.in_proj_weight", "output_layers.0.bias"]
)
def test_a_missing_or_misshapen_tensor_is_named(settings, weights, name):
    fewer = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(ValueError, match=re.escape(f"lacks {name} (1 missing, 0 extra)")):
        official.from_state_dict(settings, fewer)
    wrong = {**weights, name: np.concatenate([weights[name]] * 3, -1)}
    with pytest.raises(ValueError, match=re.escape(f"{name} has the wrong shape")):
        official.from_state_dict(settings, wrong)


def test_a_narrower_tensor_is_refused_too(settings, weights):
    for name in ("linear1", "norm1"):
        name = f"encoder.layers.0.{name}.weight"
        with pytest.raises(ValueError, match=re.escape(f"{name} has the wrong shape")):
            official.from_state_dict(settings, {**weights, name: weights[name][..., :8]})
    name = "output_layers.3.bias"  # level 3 has 16 tokens; only the face has 6
    with pytest.raises(ValueError, match=re.escape(f"{name} has the wrong shape")):
        official.from_state_dict(settings, {**weights, name: weights[name][:6]})


def test_an_unknown_tensor_is_named_and_an_unread_one_is_not(settings, weights):
    with pytest.raises(ValueError, match=re.escape("has an unknown tensor head.weight (0 missing, 1 extra)")):
        official.from_state_dict(settings, {**weights, "head.weight": np.zeros(3)})
    official.from_state_dict(settings, {**weights, "coord_head.0.weight": np.zeros(3)})
