import dataclasses
import hashlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import earthview
from data_prep.sources.earthview import EarthView, EarthViewSettings
from geotoken_jax.settings import SettingsError

SETTINGS = EarthViewSettings(
    seed=0, places=40, train=150, validation=20, test=30, test_unseen=30, test_shift=20, photos_per_shard=40
)


@pytest.fixture(scope="module")
def photos():
    source = EarthView(SETTINGS)
    return {s: [p for n in range(shards) for p in source.read(s, n)] for s, shards in source.splits.items()}


def _kilometers(a, b):
    """Great-circle distances of all pairs by the haversine formula, independent of the module."""
    a, b = np.radians(a)[:, None], np.radians(b)[None]
    h = np.sin((a - b)[..., 0] / 2) ** 2 + np.cos(a[..., 0]) * np.cos(b[..., 0]) * np.sin((a - b)[..., 1] / 2) ** 2
    return 2 * 6371.0088 * np.arcsin(np.sqrt(h))


def _coordinates(photos):
    return np.array([(p.latitude, p.longitude) for p in photos])


@pytest.mark.slow
def test_splits_have_the_photos_that_the_settings_ask_for(photos):
    assert {split: len(of_split) for split, of_split in photos.items()} == {
        split: getattr(SETTINGS, split) for split in earthview.SPLITS
    }
    assert EarthView(SETTINGS).splits["train"] == 4
    assert "validation" not in EarthView(dataclasses.replace(SETTINGS, validation=0)).splits
    everything = [p for of_split in photos.values() for p in of_split]
    assert len({p.id for p in everything}) == len(everything)
    assert all(p.city and p.country and p.continent for p in everything)
    assert all(bool(p.state) == (p.country == "United States") for p in everything)
    with Image.open(io.BytesIO(everything[0].image)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_authors_stay_at_a_place_and_in_a_split(photos):
    authors = [{p.author for p in of_split} for of_split in photos.values()]
    assert sum(map(len, authors)) == len(set.union(*authors))
    for of_split in photos.values():
        taken = {}
        for p in of_split:
            taken.setdefault(p.author, []).append(p)
        assert all(len({(p.city, p.country) for p in by_author}) == 1 for by_author in taken.values())
        assert sum(2 <= len(by_author) <= 3 for by_author in taken.values()) >= len(taken) - 1
        widest = max(_kilometers(_coordinates(t), _coordinates(t)).max() for t in taken.values())
        assert 2 < widest <= 20


def test_train_and_test_authors_visit_places_alike_and_test_shift_those_of_train():
    plan = earthview._plan(dataclasses.replace(SETTINGS, places=500, train=3000, test=3000, test_unseen=0))
    assert max(len(np.unique(plan[split].place)) for split in ("train", "test")) < 500
    assert set(plan["test_shift"].place) <= set(plan["train"].place)
    train, test = (plan[split] for split in ("train", "test"))
    # Without the own author, train has other authors at a photo's place as often for a train photo as for a test photo.
    authors_at = {place: len(set(train.author[train.place == place])) for place in np.unique(train.place)}
    known_to_train = np.mean([authors_at[place] > 1 for place in train.place])
    known_to_test = np.mean([place in authors_at for place in test.place])
    assert known_to_train == pytest.approx(known_to_test, abs=0.04)


def test_unseen_photos_are_far_from_every_train_photo():
    plan = earthview._plan(dataclasses.replace(SETTINGS, places=2000, train=8000, test_unseen=600))
    train, unseen = (np.stack([plan[s].latitude, plan[s].longitude], -1) for s in ("train", "test_unseen"))
    nearest = _kilometers(unseen, train).min(axis=1)
    assert earthview.UNSEEN_KM < nearest.min() < 100


def test_only_test_shift_is_on_etopo1():
    plan = earthview._plan(SETTINGS)
    films = {split: {look.film for look in shots.looks} for split, shots in plan.items()}
    assert films.pop("test_shift") == {"etopo1"}
    assert all(of_split <= {"shadedrelief", "bmng"} for of_split in films.values())


def test_looks_are_within_their_ranges():
    looks = earthview._looks(np.random.default_rng(0), 5000, "train")
    columns = np.array([(look.zoom, look.rotation, look.quality) for look in looks])
    np.testing.assert_allclose(columns.min(0), (0.8, -15, 70), rtol=0.01)
    np.testing.assert_allclose(columns.max(0), (1.25, 15, 95), rtol=0.01)
    assert np.mean([look.film == "shadedrelief" for look in looks]) == pytest.approx(0.7, abs=0.03)


def test_shards_are_the_same_bytes_in_any_order_and_process(photos):
    def digest(of_split):
        return hashlib.sha256(b"".join(repr(p).encode() for p in of_split)).hexdigest()

    earthview._plan.cache_clear()
    source = pickle.loads(pickle.dumps(EarthView(SETTINGS)))
    assert digest(source.read("test", 0)) == digest(photos["test"])
    assert digest(source.read("train", 2)) == digest(photos["train"][80:120])


def test_another_seed_has_other_places_and_other_looks():
    one, other = (earthview._plan(dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 1))
    assert set(one["train"].place) != set(other["train"].place)
    for split in earthview.SPLITS:
        assert one[split].looks[0] != other[split].looks[0]
    assert one["train"].looks[0] != one["test"].looks[0]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("test_unseen", {"places": 60_000, "test_unseen": 10_000}),
        ("places", {"places": 500_000}),
    ],
)
def test_too_few_photos_or_places_is_an_error_that_names_the_key(key, change):
    with pytest.raises(SettingsError, match=rf"config\.photos\.earthview\.{key} (=|is) {change[key]}"):
        next(EarthView(dataclasses.replace(SETTINGS, **change)).read("test", 0))


def _globe(height):
    """A map whose color is the position on the sphere: continuous everywhere, also at the date line and the poles."""
    latitude = np.radians(90 - (np.arange(height) + 0.5) / height * 180)[:, None]
    longitude = np.radians((np.arange(2 * height) + 0.5) / height * 180 - 180)[None]
    x, y = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)
    return (127.5 + 127 * np.stack(np.broadcast_arrays(x, y, np.sin(latitude)), -1)).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        (0, 180),
        (0, -180),
        (10, 179.99),
        (-10, -179.99),
        (90, 0),
        (90, 180),
        (-90, -180),
        (89, 100),
        (-89.5, -179.9),
        (48, 2),
    ],
)
def test_every_pixel_of_a_crop_shows_its_own_coordinate(latitude, longitude):
    crop = np.asarray(earthview.render(_globe(180), latitude, longitude, 1.5, 15.0), float)
    right, down = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    turn, step = np.radians(15), 1 / 1.5  # degrees per pixel
    a = np.radians(latitude - step * (down * np.cos(turn) + right * np.sin(turn)))
    b = np.radians(longitude + step * (right * np.cos(turn) - down * np.sin(turn)))
    # Past a pole a > 90 degrees, so cos(a) < 0 and the same formula is right for longitude + 180.
    truth = 127.5 + 127 * np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], -1)
    np.testing.assert_allclose(
        crop + 0.5, truth, atol=1.6
    )  # Pillow rounds down; one step of color is 1, one pixel of the map is 2.2


def test_films_show_the_same_extent():
    """All three maps have land and sea at the same coordinates. They differ in pixels per degree and in color."""
    for latitude, longitude in [(41, 29), (38, 15), (55.7, 12.6)]:
        sea = []
        for film in earthview.FILMS:
            jpeg = earthview.Look(film, 1.0, 0.0, (1.0, 1.0, 1.0), 1.0, 95).photograph(latitude, longitude)
            red, _, blue = np.moveaxis(np.asarray(Image.open(io.BytesIO(jpeg)), float), -1, 0)
            sea.append((blue - red).ravel())
        assert np.corrcoef(sea)[0, 1:].min() > 0.6  # it is 0.3 if one map's crop is twice as wide


def test_scatter_is_kilometers_at_any_latitude():
    latitude, longitude = (
        np.repeat([0.0, 60.0, 89.99, -90.0, 10.0], 2000),
        np.repeat([0.0, 10.0, 5.0, 0.0, 180.0], 2000),
    )
    moved = np.stack(earthview._scatter(np.random.default_rng(0), latitude, longitude), -1)
    assert np.abs(moved[:, 0]).max() <= 90
    assert np.abs(moved[:, 1]).max() <= 180
    start = np.stack([latitude, longitude], -1)
    distance = np.array([_kilometers(a[None], b[None])[0, 0] for a, b in zip(start, moved, strict=True)])
    assert distance.max() <= earthview._MAX_SCATTER_KM + 1e-6
    spread = np.sqrt((distance.reshape(5, -1) ** 2).mean(1) / 2)
    np.testing.assert_allclose(spread, earthview._SCATTER_KM, rtol=0.05)


def test_films_are_the_maps_of_the_earth():
    """Known land and sea, on both sides of both zero meridians, are at the right coordinates."""
    film = earthview._film("bmng")
    assert film.shape == (2700, 5400, 3)
    for latitude, longitude, is_sea in [
        (0, -150, True),
        (0, 160, True),
        (-25, 133, False),
        (25, 10, False),
        (40, -110, False),
    ]:
        red, _, blue = np.asarray(earthview.render(film, latitude, longitude, 1.0, 0.0), float).mean((0, 1))
        assert (blue > 1.5 * red) == is_sea
