"""Parts that only CLIP has: the position of a text's end, older formats of files, and tokens."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import sharding
from geotoken_jax.backbone import checkpoint
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.backbone.tokenizer import Tokenizer
from geotoken_jax.settings import SettingsError
from tests import checkpoints

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "backbones.npz")


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path, "clip", json.loads(str(GOLDEN["clip/shapes"])))


def ends_with(token, folder):
    config = checkpoints.CONFIGS["clip"]
    config = {**config, "text_config": {**config["text_config"], "eos_token_id": token}}
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    return checkpoint.read_module(folder, lambda rngs: Clip(config, jnp.dtype("float32"), rngs), mesh)


def test_what_follows_the_end_of_a_text_does_not_matter(folder):
    ids = np.array([[512, 5, 6, 513, 513, 513, 513], [512, 5, 6, 513, 0, 7, 513], [512, 5, 7, 513, 513, 513, 513]])
    found = np.asarray(ends_with(513, folder).text_features(ids))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-4


@pytest.mark.slow
def test_in_old_files_the_largest_id_ends_a_text(folder):
    ids = np.array([[512, 5, 513, 9, 9]])
    new, old, other = (np.asarray(ends_with(end, folder).text_features(ids)) for end in (513, 2, 5))
    np.testing.assert_array_equal(old, new)
    assert np.abs(other - new).max() > 1e-4


def test_what_config_leaves_out_is_as_published():
    shape = nnx.eval_shape(lambda: Clip({"model_type": "clip"}, jnp.dtype("float32"), nnx.Rngs(0)))
    parameters = sum(int(np.prod(leaf.shape)) for _, leaf in nnx.to_flat_state(nnx.state(shape)))
    assert parameters == 151_277_313  # ViT-B/32
    assert shape.text_shape.eos_token_id == 49407 and shape.width == 512


def test_an_old_second_section_is_the_one_that_is_meant():
    section = {**checkpoints.TOWER, "num_hidden_layers": 1}
    config = {**checkpoints.CONFIGS["clip"], "text_config_dict": section}
    shape = nnx.eval_shape(lambda: Clip(config, jnp.dtype("float32"), nnx.Rngs(0))).text_shape
    assert (shape.num_hidden_layers, shape.vocab_size) == (1, 49408)


def test_tokens_end_in_their_mark_and_fill_the_length(folder):
    tokens = Tokenizer(folder, 12, "clip")
    np.testing.assert_array_equal(tokens(checkpoints.TEXTS), GOLDEN["clip/ids"])
    assert tokens(["a" * 200])[0, -1] == 513  # truncated as published: the end token stays
    assert tokens([]).shape == (0, 12)
    np.testing.assert_array_equal(tokens(["e\u0301  B"]), tokens(["\u00e9 b"]))


def test_both_forms_of_its_files_give_the_same_tokens(folder):
    wanted = Tokenizer(folder, 12, "clip")(checkpoints.TEXTS)
    Tokenizer(folder, 12, "clip")._tokens.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    np.testing.assert_array_equal(Tokenizer(folder, 12, "clip")(checkpoints.TEXTS), wanted)


def test_damaged_files_are_refused(folder):
    (folder / "vocab.json").write_text(json.dumps(["a"]))
    with pytest.raises(SettingsError, match="its tokenizer cannot be read"):
        Tokenizer(folder, 12, "clip")
