"""GeoCLIP's trained encoders from its wheel, which `make test-interop` fetches; without it these are skipped."""

import io
import pathlib
import zipfile

import numpy as np
import pytest

from geotoken_jax.interop import geoclip, official
from tests import checkpoints
from tests.test_geoclip import clip_of

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "geoclip_encoders.npz"
WHEEL = next(ROOT.glob(".torch/geoclip-*.whl"), None)
pytestmark = pytest.mark.skipif(WHEEL is None, reason="no wheel of GeoCLIP in .torch")


@pytest.fixture(scope="module")
def weights():
    assert WHEEL
    return geoclip.read_weights(WHEEL)


def test_the_trained_encoders_have_the_published_numbers(weights):
    found = geoclip.check(weights, GOLDEN)
    assert found.keys() == {"location", "location, Mercator", "image", "logit scale"}
    assert max(found.values()) < 1e-4, found


def test_the_trained_weights_go_out_bit_for_bit(weights):
    back = geoclip.to_state_dict(geoclip.from_state_dict(weights))
    assert back.keys() == weights.keys() and len(weights) == 3 * 9 + 4 + 1
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, strict=True, err_msg=name)


def test_the_gallery_is_100_000_coordinates():
    assert WHEEL
    gallery = geoclip.read_gallery(WHEEL)
    assert gallery.shape == (100_000, 2)
    assert (abs(gallery) <= [90, 180]).all() and abs(gallery[:, 1]).max() > 90


def test_torch_reads_the_same(weights, tmp_path):
    torch = pytest.importorskip("torch")
    assert WHEEL
    with zipfile.ZipFile(WHEEL) as wheel:
        for prefix, file in geoclip._FILES.items():
            found = torch.load(io.BytesIO(wheel.read(f"geoclip/model/weights/{file}")), weights_only=True)
            for name, value in (found if isinstance(found, dict) else {"": found}).items():
                np.testing.assert_array_equal(weights[prefix + name], value.numpy(), strict=True)
    official.write_weights(tmp_path / "out.pth", weights)
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(np.array_equal(found[name].numpy(), value) for name, value in weights.items())
    assert geoclip.read_weights(tmp_path / "out.pth").keys() == weights.keys()


def test_the_published_model_answers_without_training(weights, tmp_path):
    """Beside the formula in float64, on the trained encoders and 3,000 of the places; CLIP's parameters are random."""
    assert WHEEL
    with zipfile.ZipFile(WHEEL) as wheel:
        for file in geoclip._FILES.values():
            (tmp_path / file).write_bytes(wheel.read(f"geoclip/model/weights/{file}"))
        lines = wheel.read("geoclip/model/gps_gallery/coordinates_100K.csv").splitlines(keepends=True)
    (tmp_path / "coordinates_100K.csv").write_bytes(b"".join(lines[:3001]))
    locator = geoclip.GeoCLIPPredictor(clip_of(tmp_path / "clip", 768), tmp_path)
    photo = checkpoints.images()[0]
    answer = locator.predict(photo)
    features = locator._clip.images(locator._clip.prepare(photo)[None]).astype(float)
    w = {name.removeprefix("image_encoder.mlp."): value.astype(float) for name, value in weights.items()}
    image = np.maximum(features @ w["0.weight"].T + w["0.bias"], 0) @ w["2.weight"].T + w["2.bias"]
    at = geoclip.read_gallery(WHEEL)[:3000]
    places = np.asarray(geoclip.from_state_dict(weights).location.features(at.astype(np.float32)), float)
    cosines = (places / np.linalg.norm(places, axis=1)[:, None]) @ (image / np.linalg.norm(image))[0]
    wanted = np.exp(np.exp(w["logit_scale"]) * cosines)
    wanted /= wanted.sum()
    best = np.argsort(-wanted)[:20]
    np.testing.assert_allclose([c.probability for c in answer.candidates], wanted[best], rtol=1e-3)
    assert (answer.latitude, answer.longitude) == tuple(at[best[0]])
