"""The published weights in our model: logits of the golden file, and an exact export in each file format."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx

from geotoken_jax import checkpoint
from geotoken_jax.interop import official
from geotoken_jax.model.geotoken import GeoTokenModel
from tests import fixtures

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


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["official", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        official.main()
    return end.value.code


@pytest.mark.slow
def test_our_model_has_the_published_ones_numbers():
    found = official.check(str(GOLDEN))
    agreement = {name: value for name, value in found.items() if name.endswith("tokens")}
    assert agreement == {"greedy tokens": 1.0, "beam tokens": 1.0}
    errors = {name: value for name, value in found.items() if name not in agreement}
    assert errors.keys() == {"memory", "logits", "loss", "log-probability", "beam log-probability"}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize(("found", "status"), [({"logits": 9e-5, "beam tokens": 1.0}, 0), ({"logits": 2e-4}, 1),
                                               ({"logits": np.nan}, 1), ({"beam tokens": 0.99}, 1)])  # fmt: skip
def test_a_check_past_the_tolerance_exits_with_1(monkeypatch, found, status):
    monkeypatch.setattr(official, "check", lambda file: found)
    assert run(monkeypatch, "check", GOLDEN) == status


def test_what_a_file_to_check_lacks_is_named(monkeypatch, capsys, tmp_path):
    with np.load(GOLDEN, allow_pickle=False) as file:
        np.savez(tmp_path / "less.npz", **{name: file[name] for name in file.files if name != "query_image"})
    assert run(monkeypatch, "check", tmp_path / "less.npz") == 2
    assert "lacks query_image" in capsys.readouterr().err


def test_weights_go_in_and_out_bit_for_bit(settings, weights):
    found = official.to_state_dict(official.from_state_dict(settings, weights))
    assert_same(found, {name: value for name, value in weights.items() if not name.startswith(official.UNUSED)})


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 4, 5])
def test_our_weights_go_out_and_in_bit_for_bit(group):
    s = official.settings(
        width=15, layers=2, heads=3, feed_forward=7, group=group, level=20, neighbors=2, backbone_width=5
    )
    model = GeoTokenModel(s, nnx.Rngs(group))
    weights = official.to_state_dict(model)
    assert official.settings_of(weights, heads=3, neighbors=2) == s
    back = official.from_state_dict(s, weights)

    def used(model):  # our face head is as wide as the other heads; published files lack the extra rows
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        real = np.arange(max(s.cells.vocab_sizes)) < np.array(s.cells.vocab_sizes)[:, None]
        return {**params, "head": params["head"] * real[:, None], "head_bias": params["head_bias"] * real}

    jax.tree.map(np.testing.assert_array_equal, used(back), used(model))


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_weights_pass_through_files_and_our_own_bit_for_bit(monkeypatch, capsys, tmp_path, settings, weights, form):
    theirs, ours, back = (tmp_path / name for name in (f"w.{form}", "parameters.safetensors", f"back.{form}"))
    official.write_weights(theirs, weights)
    assert_same(official.read_weights(theirs), weights)
    assert run(monkeypatch, "import", theirs, ours, "--heads=4") == 0
    assert "--config.model.feed_forward=64 " in capsys.readouterr().out
    assert run(monkeypatch, "export", ours, back) == 0
    read = {name: value for name, value in weights.items() if not name.startswith(official.UNUSED)}
    assert_same(official.read_weights(back), read)
    # The stages read the same model that the state dict describes.
    model = checkpoint.read_module(ours, lambda rngs: GeoTokenModel(settings, rngs))
    assert_same(official.to_state_dict(model), read)


def test_what_torch_adds_to_names_is_taken_away_and_16_bits_are_widened(tmp_path, weights):
    for dtype, name in ((ml_dtypes.bfloat16, "BF16"), (np.float16, "F16")):
        small = {f"module._orig_mod.{key}": value.astype(dtype) for key, value in weights.items()}
        path = tmp_path / f"{name}.safetensors"
        safetensors.flax.save_file({key: jnp.asarray(value) for key, value in small.items()}, path)
        assert_same(official.read_weights(path), {n: v.astype(dtype).astype(np.float32) for n, v in weights.items()})


@pytest.mark.parametrize(
    "name", ["cls_token", "decoder.layers.1.multihead_attn.in_proj_weight", "output_layers.0.bias"]
)
def test_a_missing_or_misshapen_tensor_is_named(settings, weights, name):
    fewer = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(ValueError, match=re.escape(f"lacks {name} (1 missing, 0 extra)")):
        official.from_state_dict(settings, fewer)
    for wrong in (np.concatenate([weights[name]] * 3, -1), weights[name][1:], weights[name][None]):
        with pytest.raises(ValueError, match=re.escape(f"{name} has the shape")):
            official.from_state_dict(settings, {**weights, name: wrong})


def test_a_narrower_tensor_is_refused_too(settings, weights):
    for name in ("linear1", "norm1"):
        name = f"encoder.layers.0.{name}.weight"
        with pytest.raises(ValueError, match=re.escape(f"{name} has the shape")):
            official.from_state_dict(settings, {**weights, name: weights[name][..., :8]})
    name = "output_layers.3.bias"  # heads of level 3 have 16 tokens; only the face head has 6
    with pytest.raises(ValueError, match=re.escape(f"{name} has the shape")):
        official.from_state_dict(settings, {**weights, name: weights[name][:6]})


def test_an_unknown_tensor_is_named_and_an_unread_one_is_not(settings, weights):
    with pytest.raises(ValueError, match=re.escape("has an unknown tensor head.weight (0 missing, 1 extra)")):
        official.from_state_dict(settings, {**weights, "head.weight": np.zeros(3)})
    official.from_state_dict(settings, {**weights, "coord_head.0.weight": np.zeros(3)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("encoder.layers.1.norm2.bias"), "lacks encoder.layers.1.norm2.bias"),
        (lambda w: w.pop("embedding.weight"), "embedding.weight is missing"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "unknown tensor extra"),
        (lambda w: w.update({"embedding.weight": w["embedding.weight"][:-1]}), "165 rows"),
        (lambda w: w.update({"cls_token": w["cls_token"][:, :-1]}), "cls_token has the shape"),
    ],
)
def test_a_file_that_is_not_the_published_model_is_refused_in_one_line(
    monkeypatch, capsys, tmp_path, weights, change, said
):
    changed = dict(weights)
    change(changed)
    official.write_weights(tmp_path / "w.npz", changed)
    assert run(monkeypatch, "import", tmp_path / "w.npz", tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_files_that_hold_no_weights_are_refused_in_one_line(monkeypatch, capsys, tmp_path, weights):
    (tmp_path / "torn.safetensors").write_bytes(safetensors.numpy.save(weights)[:5000])
    (tmp_path / "torn.npz").write_bytes(GOLDEN.read_bytes()[:5000])
    np.savez(tmp_path / "pickled.npz", embedding=np.array([{}], dtype=object))
    for file, said in (
        ("torn.safetensors", "no state dict"),
        ("torn.npz", "no state dict"),
        ("pickled.npz", "allow_pickle=False"),
        ("weights.bin", ".pth, .safetensors, .npz"),
        ("absent.npz", "absent.npz"),
    ):
        assert run(monkeypatch, "import", tmp_path / file, tmp_path / "out.safetensors") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_another_form_is_not_exported(monkeypatch, capsys, tmp_path):
    params = nnx.to_pure_dict(nnx.state(fixtures.model("ours"), nnx.Param))
    checkpoint.write_parameters(tmp_path / "ours.safetensors", params)
    assert run(monkeypatch, "export", tmp_path / "ours.safetensors", tmp_path / "out.npz") == 2
    assert "is missing, extra or of another shape" in capsys.readouterr().err


def test_without_torch_a_pth_file_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"")
    assert run(monkeypatch, "import", tmp_path / "w.pth", tmp_path / "out.safetensors") == 2
    assert "pip install 'geotoken-jax[interop]'" in capsys.readouterr().err


def test_a_group_that_no_memory_holds_is_refused():
    with pytest.raises(ValueError, match=re.escape("group 20 has 4^20 = 1,099,511,627,776 tokens per position")):
        official.settings(width=32, layers=1, heads=1, feed_forward=8, group=20, level=20, neighbors=1)
