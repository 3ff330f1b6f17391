"""Parts that only SigLIP 2 has: lower-case texts padded to full length, and one embedding space for both towers."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geotoken_jax.backbone.siglip import Siglip
from geotoken_jax.backbone.tokenizer import Tokenizer
from geotoken_jax.settings import SettingsError
from tests import checkpoints

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "backbones.npz")


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path, "siglip", {"unused": [1]})


def test_tokens_are_of_lower_case_and_fill_the_length(folder):
    tokens = Tokenizer(folder, 12, "siglip")
    found = tokens(checkpoints.TEXTS)
    np.testing.assert_array_equal(found, GOLDEN["siglip/ids"])  # computed from lower-case texts
    assert (found[:, -1] == [1, 0, 1, 1]).all() and found[1].tolist() == [261, 1, *[0] * 10]


def test_padding_is_on_the_side_that_the_files_say(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    assert Tokenizer(folder, 12, "siglip")(["a"])[0].tolist() == [*[0] * 10, 261, 1]
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder, 12, "siglip")(["a"])[0].tolist() == [261, 1, *[0] * 10]


def test_the_first_versions_tokenizer_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(SettingsError, match="choose a SigLIP 2 checkpoint"):
        Tokenizer(folder, 12, "siglip")


def test_what_config_leaves_out_is_as_published():
    config = {"model_type": "siglip", "text_config": {"vocab_size": 256_000}, "vision_config": {"image_size": 256}}
    shape = nnx.eval_shape(lambda: Siglip(config, jnp.dtype("float32"), nnx.Rngs(0)))
    parameters = sum(int(np.prod(leaf.shape)) for _, leaf in nnx.to_flat_state(nnx.state(shape)))
    assert parameters == 375_234_050  # siglip2-base-patch16-256


def test_towers_without_a_common_space_are_refused():
    config = checkpoints.CONFIGS["siglip"]
    config = {**config, "text_config": {**config["text_config"], "projection_size": 8}}
    with pytest.raises(SettingsError, match="text features of width 8 and photo features of width 16"):
        Siglip(config, jnp.dtype("float32"), nnx.Rngs(0))
