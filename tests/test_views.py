"""Further views of photos: reproducible, different from the photo, and stored as a split for training only."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import embed, index
from geotoken_jax import configuration, manifests, records, settings
from geotoken_jax.backbone import views
from geotoken_jax.backbone.preprocess import open_image
from geotoken_jax.stages import train as train_stage
from geotoken_jax.workdir import Workdir
from tests import sample, tiny
from tests.sample import embedded, features, scene

STILL = views.ViewsSettings(count=1, seed=0, rotation=0.0, crop=1.0, gamma=0.0, color=0.0, flip=False)
ALL = views.ViewsSettings(count=3, seed=0, rotation=12.0, crop=0.8, gamma=0.15, color=0.1, flip=True)


def made(settings, image=None, seeds=range(20)):
    image = image or scene()
    return [np.asarray(views.view(image, np.random.default_rng(s), settings)).astype(int) for s in seeds]


def test_views_depend_on_seed_row_and_number_alone():
    def several(row, **changes):
        return [v.tobytes() for v in views.views(scene(), row, dataclasses.replace(ALL, **changes))]

    assert several(5) == several(5) and len(set(several(5))) == 3
    assert several(5, count=2) == several(5)[:2]
    assert not set(several(5)) & {*several(6), *several(5, seed=1)}


def test_without_any_change_a_view_is_the_photo():
    for image in (scene(), scene(1, 1), scene(200, 3)):
        np.testing.assert_array_equal(made(STILL, image, [0])[0], np.asarray(image))


def test_each_key_changes_the_photo():
    photo = np.asarray(scene()).astype(int)
    for change in ({"rotation": 12.0}, {"gamma": 0.15}, {"color": 0.1}):
        off = [np.abs(v - photo).mean() for v in made(dataclasses.replace(STILL, **change))]
        assert np.mean(off) > 3 and len(set(off)) > 15, change
    flipped = made(dataclasses.replace(STILL, flip=True))
    mirrored = [np.array_equal(v, photo[:, ::-1]) for v in flipped]
    assert all(m or np.array_equal(v, photo) for m, v in zip(mirrored, flipped, strict=True))
    assert {True, False} == set(mirrored)


def test_a_crop_keeps_scale_and_lies_anywhere_inside():
    """On a ramp of x and y, a pixel's color is its position."""
    x, y = np.meshgrid(np.arange(100), np.arange(80))
    ramp = Image.fromarray(np.stack([x, y, y], -1).astype(np.uint8))
    found = made(dataclasses.replace(STILL, crop=0.5), ramp, range(200))
    for v in found:
        height, width = v.shape[:2]
        assert 50 <= width <= 100 and abs(height - 0.8 * width) <= 1
        assert v[0, -1, 0] - v[0, 0, 0] == pytest.approx(width - 1, abs=2)
    centers = np.array([v.reshape(-1, 3).mean(0)[:2] / (99, 79) for v in found])
    assert (centers.min(0) < 0.35).all() and (centers.max(0) > 0.65).all()


def test_a_turned_photo_is_turned_about_its_crop_and_mirrored_at_the_borders():
    turned = dataclasses.replace(STILL, rotation=45.0)
    photo = np.asarray(scene()).astype(int)
    assert views._inside(np.arange(-3, 7), 4).tolist() == [2, 1, 0, 0, 1, 2, 3, 3, 2, 1]
    white = made(turned, Image.new("RGB", (40, 30), "white"))
    assert all((v == 255).all() for v in white)  # no pixel comes from outside the photo
    for v in made(turned):
        np.testing.assert_allclose(v[23:25, 31:33].mean((0, 1)), photo[23:25, 31:33].mean((0, 1)), atol=6)


def test_light_clips_nothing():
    gray = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(3, 0)).convert("RGB")
    for v in made(dataclasses.replace(STILL, gamma=0.3, color=0.3), gray):
        assert (np.diff(v, axis=1) >= 0).all()
        brightest = v[0, :, v[0, -1].argmax()]
        assert brightest[-1] == 255 and len(np.unique(brightest[-64:])) > 20


def test_a_photo_set_upright_stays_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    scene().save(file, "PNG", exif=exif)
    upright = open_image(file.getvalue())
    again = open_image(views.view(upright, np.random.default_rng(0), STILL))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(upright))


@pytest.mark.parametrize(("key", "value"), [("count", -1), ("crop", 0.0), ("crop", 1.5)])
def test_settings_that_cannot_be_are_refused(key, value):
    with pytest.raises(settings.SettingsError, match=rf"config.embed.views.{key} is {value}"):
        settings.read(views.ViewsSettings, {**dataclasses.asdict(ALL), key: value}, "embed.views")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.prepared(tmp_path_factory.mktemp("views"))


def test_views_are_a_split_beside_the_others(prepared: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(embed, "_BATCH", 16)
    monkeypatch.setattr(embed, "_SHARD", 24)
    without, one, two = (embedded(prepared, tmp_path / str(n), n) for n in (0, 1, 2))
    again = embedded(prepared, tmp_path / "again", 2, threads=1)
    files = [{p.name: p.read_bytes() for p in (f / "features").glob("*array_record*")} for f in (without, two, again)]
    assert files[1] == files[2]
    assert files[0].items() <= files[1].items() and len(files[1]) == len(files[0]) + 2
    manifest = manifests.read_manifest(without, "features")
    assert manifest.settings == {"embed": {"backbone": "thumbnail", "thumbnail": {"size": 4}, "views": {"count": 0}}}
    assert manifest.counts == {"train": 39, "validation": 5}
    manifest = manifests.read_manifest(two, "features")
    assert manifest.counts == {"train": 39, "validation": 5, "train_views": 78}
    assert manifest.dropped == {"unreadable image": 1}  # counted once, not per view
    train, some, more = features(two, "train")[:], features(one, "train_views")[:], features(two, "train_views")[:]
    for name in ("id", "author", "coordinates", "tokens", "text"):
        np.testing.assert_array_equal(more[name], np.repeat(train[name], 2, axis=0))
    np.testing.assert_array_equal(more["image"][::2], some["image"])
    photo, first, second = (x.astype(np.float32) for x in (train["image"], more["image"][::2], more["image"][1::2]))
    for a, b in ((photo, first), (photo, second), (first, second)):
        assert 0.3 < (a * b).sum(1).mean() < 0.99


def indexed(prepared: Path, to: Path, exclude_author: bool) -> Path:
    path = embedded(prepared, to, 2)
    config = tiny.get_config()
    config.index.neighbors.exclude.author, config.embed.views.count = exclude_author, 2
    config = sample.aligned(path, configuration.read(config))
    index.run(config, Workdir(path))
    return path


@pytest.mark.parametrize("exclude_author", [True, False])
def test_a_view_has_neither_its_photo_nor_its_author_as_a_neighbor(prepared: Path, tmp_path: Path, exclude_author):
    path = indexed(prepared, tmp_path, exclude_author)
    gallery, own = (Workdir(path).table(split) for split in ("train", "train_views"))
    rows, _ = Workdir(path).neighbors("train_views")
    assert len(gallery) == 39 and rows.shape == (78, 6) and (rows >= 0).all()
    assert not (gallery.ids(rows) == own.ids()[:, None]).any()
    assert (gallery.authors(rows) == own.authors()[:, None]).any() != exclude_author
    tokens = records.Records(path / "tokens", "train_views", records.token_layout(6))[:]
    np.testing.assert_array_equal(tokens["neighbors"], rows)
    np.testing.assert_array_equal(tokens["tokens"], gallery.tokens(np.arange(78) // 2))


def test_the_decoder_trains_on_photos_and_views(prepared: Path, tmp_path: Path):
    path = indexed(prepared, tmp_path, True)
    config = configuration.read(tiny.get_config())
    _, (train, validation), _ = train_stage.decoder(config, Workdir(path), None)
    assert len(train) == 39 + 78 and len(validation) == 5
    gallery, own = (Workdir(path).table(split) for split in ("train", "train_views"))
    batch = train(np.array([116, 38, 39]))
    for row, wanted in enumerate((own.embeddings(77), gallery.embeddings(38), own.embeddings(0))):
        np.testing.assert_array_equal(batch["query"][row], wanted)
    near = Workdir(path).neighbors("train_views", 4)[0][77]
    np.testing.assert_array_equal(batch["neighbors"][0], gallery.embeddings(near))
