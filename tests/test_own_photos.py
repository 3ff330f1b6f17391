"""configs/own_photos.py on folders of few photos, with a tiny CLIP checkpoint of random parameters."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geotoken_jax import GeoToken
from tests import checkpoints
from tests.test_clip import GOLDEN
from tests.test_end_to_end import geotoken
from tests.test_sources import exif

#: The configuration with tiny models, for the features of the tiny checkpoint.
CONFIG = """
from configs import own_photos
from tests import tiny

def get_config():
    config = own_photos.get_config()
    tiny.shrink(config, width=12)
    return config
"""

pytestmark = pytest.mark.slow


def write_photos(folder: Path, count: int) -> None:
    """Writes photos with GPS from a few towns, and two without it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(count + 2):
        image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        town = rng.integers(0, 5)
        where = exif(10 + 8 * town + rng.normal(0, 0.1), 20 + 5 * town) if n < count else None
        image.save(folder / f"IMG_{n:04}.jpg", **({"exif": where} if where else {}))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("own")
    write_photos(folder / "photos", 60)
    clip = checkpoints.write(folder / "clip", "clip", json.loads(str(GOLDEN["clip/shapes"])))
    config = folder / "own.py"
    config.write_text(CONFIG)
    return [
        *(f"--config={config}", f"--workdir={folder / 'run'}", f"--config.photos.folder.path={folder / 'photos'}"),
        f"--config.embed.huggingface.path={clip}",
    ]


@pytest.fixture(scope="module")
def workdir(arguments: list[str]) -> Path:
    assert geotoken("all", *arguments) == 0
    return Path(arguments[1].partition("=")[2])


def test_sixty_photos_are_enough(workdir: Path):
    made = json.loads((workdir / "photos" / "manifest.json").read_text())
    assert sum(made["counts"].values()) == 60 and made["dropped"] == {"no GPS": 2}
    trained = json.loads((workdir / "geotoken" / "geotoken" / "manifest.json").read_text())["counts"]
    assert trained["examples"] <= 15 * made["counts"]["train"]


def test_the_export_contains_no_picture(workdir: Path):
    files = {file.relative_to(workdir / "export").as_posix() for file in (workdir / "export").rglob("*")}
    assert not [name for name in files if name.startswith(("thumbnails", "examples")) or name.endswith(".jpg")]
    assert -90 <= GeoToken.load(workdir / "export").predict(Image.new("RGB", (20, 20))).latitude <= 90


def test_baselines_that_are_added_later_keep_the_export(workdir: Path, arguments: list[str], capsys):
    assert geotoken("evaluate", *arguments, "--method=knn") == 0
    assert geotoken("all", *arguments) == 0
    assert "kept export/" in capsys.readouterr().out


def test_a_stage_is_made_again_with_all_that_was_made_from_it(workdir: Path, arguments: list[str], capsys):
    assert geotoken("all", *arguments, "--config.evaluate.seed=1") == 2
    assert "make it again with `geotoken all --remake=evaluate`" in capsys.readouterr().err
    assert geotoken("all", *arguments, "--config.evaluate.seed=1", "--remake=evaluate") == 0
    out = capsys.readouterr().out
    assert "removing report/" in out and "made report/" in out and "kept predictions/geotoken/" in out
    assert "removing features/" not in out


def test_settings_are_checked_before_anything_long_starts(arguments: list[str], tmp_path: Path, capsys):
    elsewhere = [argument for argument in arguments if not argument.startswith("--workdir")] + [f"--workdir={tmp_path}"]
    for change, message in (
        ("--config.model.backbone_width=768", "config.model.backbone_width is 768, but .* set it to 12"),
        ("--config.model.neighbors=21", "config.model.neighbors is 21, but config.index.neighbors.count is 6"),
        ("--config.data.photos=4000", "config.data.photos is 4,000, but there are .* training photos"),
        ("--config.train.accumulate=500", "config.train.batch_size needs at least 4000 photos, one for each device"),
    ):
        assert geotoken("all", *elsewhere, *change.split()) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not (tmp_path / "features").exists()


def test_a_folder_without_training_photos_is_refused_with_advice_that_works(arguments: list[str], tmp_path, capsys):
    elsewhere = [argument for argument in arguments if not argument.startswith("--workdir")] + [f"--workdir={tmp_path}"]
    shares = [f"--config.photos.folder.{name}={share}" for name, share in (("train", 0.0), ("validation", 0.0))]
    assert geotoken("all", *elsewhere, *shares, "--config.photos.folder.test=1.0") == 2
    error = capsys.readouterr().err
    assert "has no train photos (test 60)" in error and "--remake=prepare" in error
    assert geotoken("all", *elsewhere, "--remake=prepare", "--config.train.accumulate=500") == 2  # now another message
    assert "config.train.batch_size needs at least 4000" in capsys.readouterr().err
