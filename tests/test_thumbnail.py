"""The backbone without weights: similar features for one place from two cameras, and for the same name."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.backbone.thumbnail import Thumbnail, ThumbnailSettings


@pytest.fixture
def backbone():
    return Thumbnail(ThumbnailSettings(16))


def embedded(backbone, photos):
    return backbone.images(np.array([backbone.prepare(photo) for photo in photos], np.uint8).reshape(-1, 16, 16, 3))


def places(n):
    """Smooth random scenes in mid-tones."""
    coarse = np.random.default_rng(0).integers(60, 160, (n, 8, 8, 3), np.uint8)
    return [Image.fromarray(scene).resize((96, 64), Image.Resampling.BICUBIC) for scene in coarse]


def test_images_are_rows_of_length_one(backbone):
    features = embedded(backbone, places(3))
    assert features.shape == (3, backbone.width) == (3, 768) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert embedded(backbone, []).shape == (0, 768)
    assert embedded(backbone, [Image.new("RGB", (20, 20), "red")]).any() == np.False_  # a uniform image: zeros, not NaN


def test_exposure_color_cast_and_jpeg_hardly_matter(backbone):
    scenes = places(20)
    jpegs = []
    for scene in scenes:
        file = io.BytesIO()
        exposed = np.asarray(scene) * 1.3 + [20, 0, -20]
        Image.fromarray(exposed.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
        jpegs.append(file.getvalue())
    alike = embedded(backbone, scenes) @ embedded(backbone, jpegs).T
    assert np.diagonal(alike).min() > 0.97
    assert (alike.argmax(1) == np.arange(20)).all()


def test_takes_the_central_square(backbone):
    scene = places(1)[0]
    square = embedded(backbone, [scene.crop((16, 0, 80, 64))])
    np.testing.assert_allclose(embedded(backbone, [scene]), square, atol=3e-3)  # the filter reads beyond the edges
    assert np.abs(embedded(backbone, [scene.crop((0, 0, 64, 64))]) - square).max() > 0.05


def test_a_bad_photo_is_refused(backbone):
    with pytest.raises(ImageError):
        backbone.prepare(b"no photo")


def test_texts_that_share_words_are_nearer(backbone):
    texts = ["taken in Lyon, France", "TAKEN IN LYON, FRANCE", "taken in Lille, France", "Kyoto"]
    features = backbone.texts([*texts, "", " ,"])
    assert features.shape == (6, 768) and features.dtype == np.float32
    cosines = features @ features.T
    assert cosines[0, 1] == pytest.approx(1, abs=1e-6)
    assert 0.9 > cosines[0, 2] > 0.4 > abs(cosines[0, 3])
    assert not features[4:].any()
    assert backbone.texts([]).shape == (0, 768)


def test_text_features_are_equal_in_another_process(backbone):
    program = (
        "from geotoken_jax.backbone.thumbnail import *;"
        "print(Thumbnail(ThumbnailSettings(4)).texts(['São Paulo']).tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Thumbnail(ThumbnailSettings(4)).texts(["São Paulo"]).tobytes().hex()
