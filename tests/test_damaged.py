"""Random damage to images and to exports: each is read, or refused with an error that a user can mend."""

import io
import json
import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from geotoken_jax import errors
from geotoken_jax.backbone.preprocess import ImageError, open_image
from geotoken_jax.predict.predictor import GeoToken
from tests import exports

#: Without shrinking, which takes minutes for files of an export.
random = hypothesis.settings(
    max_examples=300, deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate]
)


def images() -> list[bytes]:
    """Returns small files in the formats that are read."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    files = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO"):
        file = io.BytesIO()
        pixels.save(file, kind)
        files.append(file.getvalue())
    return files


IMAGES = images()


@strategies.composite
def damaged(draw: strategies.DrawFn, data: bytes) -> bytes:
    """Draws bytes that were cut, or in which some were replaced, inserted or removed."""
    for _ in range(draw(strategies.integers(1, 4))):
        first = draw(strategies.integers(0, len(data)))
        removed = draw(strategies.sampled_from([0, 1, 4, len(data)]))
        data = data[:first] + draw(strategies.binary(max_size=8)) + data[first + removed :]
    return data


@pytest.mark.filterwarnings("ignore")
@random
@hypothesis.given(strategies.sampled_from(IMAGES).flatmap(damaged))
def test_damaged_images_are_read_or_refused(data):
    try:
        image = open_image(data, 4)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB" and min(image.size) > 0


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "export"
    exports.write(folder)
    return folder


LEAVES = strategies.none() | strategies.booleans() | strategies.integers(-2, 2**40) | strategies.text(max_size=3)


@strategies.composite
def edited(draw: strategies.DrawFn, data: bytes) -> bytes:
    """Draws a JSON file in which a value was replaced or removed."""
    whole = json.loads(data)
    place = whole
    while True:
        key = draw(strategies.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key] and draw(strategies.booleans())):
            break
        place = place[key]
    if draw(strategies.booleans()):
        place[key] = draw(LEAVES | strategies.just([]) | strategies.just({}))
    else:
        del place[key]
    return json.dumps(whole).encode()


@pytest.mark.slow
def test_damaged_exports_are_read_or_refused(export, tmp_path):
    """Half of the exports have the sums of their damaged files, as if someone had edited them."""
    files = sorted(file for file in export.rglob("*") if file.is_file())

    @hypothesis.settings(random, max_examples=100)  # each takes half a second
    @hypothesis.given(strategies.data(), strategies.sampled_from(files), strategies.booleans())
    def check(data, file, summed):
        folder = tmp_path / "export"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(export, folder)
        target, whole = folder / file.relative_to(export), file.read_bytes()
        kinds = [damaged(whole), strategies.none(), *([edited(whole)] if file.suffix == ".json" else [])]
        new = data.draw(strategies.one_of(kinds))
        target.unlink() if new is None else target.write_bytes(new)
        if summed and file.name != "SHA256SUMS":
            exports.write_sums(folder)
        try:
            model = GeoToken(folder)
            model._index.search(np.zeros((1, 3 * 48), np.float32), 3)
            model._gallery.embeddings(slice(0, 3))
        except (errors.UserError, OSError) as error:
            assert "\n" not in errors.explain(error)

    check()
