"""Training and prediction in host programs that have changed JAX's global modes."""

import contextlib

import jax
import numpy as np
import pytest

from geotoken_jax import jax_modes
from tests import exports, test_train

MODES = {
    "x64": ("jax_enable_x64", True),
    "strict": ("jax_numpy_dtype_promotion", "strict"),
    "rank": ("jax_numpy_rank_promotion", "raise"),
    "guard": ("jax_transfer_guard", "disallow"),
}

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def mode(name: str):
    """Sets a mode for all threads, as its environment variable does."""
    key, value = MODES[name]
    before = getattr(jax.config, key)
    jax.config.update(key, value)
    try:
        yield
    finally:
        jax.config.update(key, before)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Losses and candidates without a mode."""
    folder = tmp_path_factory.mktemp("usual")
    test_train.train(folder / "train", 4)
    exports.write(folder / "export", exports.of_samples)
    photos = exports.photos(5)
    return folder, photos, exports.candidates(folder / "export", photos)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_of_the_host_program_changes_no_result(tmp_path, usual, name):
    folder, photos, expected = usual
    with mode(name):
        test_train.train(tmp_path, 4)
        with jax_modes.standard():  # as in GeoToken
            found = exports.candidates(folder / "export", photos)
    assert test_train.lines(tmp_path) == test_train.lines(folder / "train")
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
