import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import s2sphere

from geotoken_jax.geo.cells import CellScheme, corners
from geotoken_jax.geo.distance import great_circle_km

SCHEMES = [CellScheme(1, 1), CellScheme(7, 7), CellScheme(12, 3), CellScheme(20, 1), CellScheme(20, 2)]
SCHEMES += [CellScheme(20, 10), CellScheme(25, 5), CellScheme(26, 13), CellScheme(28, 4), CellScheme(29, 1)]
SCHEMES += [CellScheme(30, 1), CellScheme(30, 2), CellScheme(30, 6), CellScheme(30, 15)]


def named(scheme):
    return f"{scheme.level}-{scheme.group}"


@functools.cache
def coordinates():
    """20,000 points uniform on the sphere, then points at poles, date line, equator, and faces' edges and corners."""
    rng = np.random.default_rng(0)
    latitude, longitude = np.degrees(np.arcsin(rng.uniform(-1, 1, 20_000))), rng.uniform(-180, 180, 20_000)
    edges = list(itertools.product((-90, -45, -0.0, 0, 45, 90), np.arange(-180, 181, 15)))
    edges += itertools.product(np.arange(-90, 91, 7.5), (-180, -135, -90, -45, -0.0, 0, 45, 90, 135, 180))
    corner = np.degrees(np.arctan(np.sqrt(0.5)))
    edges += itertools.product((-corner, corner), (-135, -45, 45, 135))
    along = np.linspace(-180, 180, 241)
    polar = np.degrees(np.arctan(np.cos(np.radians((along + 45) % 90 - 45))))  # where |z| is the larger of |x|, |y|
    edges += [*zip(polar, along, strict=True), *zip(-polar, along, strict=True)]
    edges = np.array(edges, np.float64)
    steps = [edges]  # and the next numbers on both sides
    for axis, to in itertools.product((0, 1), (-np.inf, np.inf)):
        beside = edges.copy()
        beside[:, axis] = np.nextafter(beside[:, axis], to)
        steps.append(beside)
    edges = np.clip(np.concatenate(steps), (-90, -180), (90, 180))
    return np.concatenate([latitude, edges[:, 0]]), np.concatenate([longitude, edges[:, 1]])


@functools.cache
def leaves():
    points = zip(*(values.tolist() for values in coordinates()), strict=True)
    return [s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(*point)) for point in points]


def s2_ids(level):
    """The cells of `coordinates()` by s2sphere's leaves: the parent clears the bits below it and sets its own."""
    lowest = np.uint64(1 << 2 * (30 - level))
    return np.array([leaf.id() for leaf in leaves()], np.uint64) & ~(lowest - np.uint64(1)) & ~lowest | lowest


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
def test_equals_s2sphere(scheme):
    tokens = scheme.encode(*coordinates())
    assert tokens.dtype == np.int32 and tokens.shape == (len(leaves()), scheme.length)
    ids = s2_ids(scheme.level)
    assert ids[7] == leaves()[7].parent(scheme.level).id()
    np.testing.assert_array_equal(scheme.cell_ids(tokens), ids)
    np.testing.assert_array_equal(scheme.from_cell_ids(ids), tokens)


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
def test_decodes_to_the_center_and_back(scheme):
    tokens = scheme.encode(*coordinates())
    np.testing.assert_array_equal(scheme.encode(*scheme.decode(tokens)), tokens)
    some = slice(19_500, 20_500)
    centers = [s2sphere.CellId(int(cell)).to_lat_lng() for cell in s2_ids(scheme.level)[some]]
    wanted = [[center.lat().degrees for center in centers], [center.lng().degrees for center in centers]]
    np.testing.assert_allclose(scheme.decode(tokens[some]), wanted, rtol=0, atol=1e-13)


def test_a_level_20_cell_is_under_ten_meters():
    latitude, longitude = coordinates()
    center = CellScheme(20, 2).decode(CellScheme(20, 2).encode(latitude, longitude))
    assert great_circle_km(latitude, longitude, *center).max() < 0.0075


def test_first_quad_is_most_significant():
    quads = CellScheme(20, 1).encode(48.8584, 2.2945)
    pairs = CellScheme(20, 2).encode(48.8584, 2.2945)
    assert quads.shape == (21,) and pairs.shape == (11,)
    assert pairs[0] == quads[0] and (pairs[1:] == 4 * quads[1::2] + quads[2::2]).all()
    assert CellScheme(20, 2).vocab_sizes == (6, *[16] * 10)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_shapes(shape):
    scheme, rng = CellScheme(20, 4), np.random.default_rng(1)
    latitude, longitude = rng.uniform(-90, 90, shape), rng.uniform(-180, 180, shape)
    tokens = scheme.encode(latitude, longitude)
    assert tokens.shape == (*shape, 6)
    assert [values.shape for values in scheme.decode(tokens)] == [shape, shape]
    assert scheme.from_cell_ids(scheme.cell_ids(tokens)).shape == tokens.shape
    assert scheme.encode(jnp.asarray(latitude), jnp.asarray(longitude)).shape == tokens.shape
    assert scheme.quads(tokens).shape == (*shape, 21)


def test_broadcasts():
    scheme = CellScheme(20, 2)
    tokens = scheme.encode(np.array([[10.0], [20.0]]), np.array([1.0, 2.0, 3.0]))
    assert tokens.shape == (2, 3, 11) and (tokens[1, 2] == scheme.encode(20, 3)).all()


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([0, 90.5, -91], [0, 0, 0], r"latitude has 2 of 3 values outside \[-90, 90\] degrees, the first 90.5"),
        ([0, 0], [np.nan, 0], r"longitude has 1 of 2 values outside \[-180, 180\] degrees, the first nan"),
        ([0, 0], [0, np.inf], r"longitude has 1 of 2 .* inf"),
        ([-np.inf], [0], r"latitude has 1 of 1 .* -inf"),
        (0, 180.5, r"longitude has 1 of 1 .* 180.5"),
    ],
)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_refuses_what_is_no_coordinate(array, latitude, longitude, message):
    with pytest.raises(ValueError, match=message):
        CellScheme(20, 2).encode(array(latitude), array(longitude))


def test_marks_what_is_no_coordinate_or_cell_under_jit():
    scheme = CellScheme(20, 2)
    tokens = jax.jit(scheme.encode)(jnp.array([0, 91, jnp.nan, 0]), jnp.array([0, 0, 0, -jnp.inf]))
    np.testing.assert_array_equal(tokens[0], scheme.encode(0, 0))
    assert (tokens[1:] == -1).all()
    latitude, longitude = jax.jit(scheme.decode)(tokens.at[3].set(16))
    assert np.isfinite(latitude[0]) and jnp.isnan(latitude[1:]).all() and jnp.isnan(longitude[1:]).all()


def test_refuses_what_is_no_cell():
    scheme = CellScheme(20, 2)
    tokens = scheme.encode(1, 2)
    for wrong, message in ((tokens[:-1], "11 in the last"), (tokens - 7, r"at position 0, which takes 0\.\.5")):
        with pytest.raises(ValueError, match=message):
            scheme.decode(wrong)
    with pytest.raises(ValueError, match=r"first is 16 at position 10, which takes 0\.\.15"):
        scheme.cell_ids(np.array([[0] * 11, [0] * 10 + [16]]))
    with pytest.raises(ValueError, match="1 cell_ids are coarser than level 20"):
        scheme.from_cell_ids([s2sphere.CellId.from_lat_lng(s2sphere.LatLng.from_degrees(1, 2)).parent(19).id()])
    for number in (0, 2, 7 << 61 | 1):
        with pytest.raises(ValueError, match="no S2 cell id"):
            scheme.from_cell_ids(np.array([number], np.uint64))


@pytest.mark.parametrize(
    ("level", "group", "message"),
    [(0, 1, "level is 0"), (31, 1, "level is 31"), (20, 3, "group is 3.*level 20.*10"), (20, 0, "group is 0")],
)
def test_refuses_other_schemes(level, group, message):
    with pytest.raises(ValueError, match=message):
        CellScheme(level, group)


def test_refuses_a_group_whose_tokens_are_no_int32():
    with pytest.raises(ValueError, match="group is 30"):
        CellScheme(30, 30)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("scheme", [CellScheme(20, 2), CellScheme(12, 3), CellScheme(20, 20 // 2)], ids=named)
def test_regroups_stored_tokens(scheme, array):
    latitude, longitude = (values[:50].reshape(5, 10) for values in coordinates())
    stored = array(CellScheme(20, 1).encode(latitude, longitude).astype(np.uint8))
    tokens = scheme.regroup(stored)
    assert isinstance(tokens, type(stored)) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, scheme.encode(latitude, longitude))
    quads = scheme.quads(tokens)
    assert isinstance(quads, type(stored)) and quads.dtype == np.uint8
    np.testing.assert_array_equal(quads, stored[..., : 1 + scheme.level])


def test_refuses_to_regroup_past_the_stored_level():
    with pytest.raises(ValueError, match=r"level is 24, but stored tokens end at level 20: use 1\.\.20"):
        CellScheme(24, 2).regroup(np.zeros((3, 21), np.uint8))


@pytest.mark.parametrize("level", [20, 30])
def test_jax_float64_equals_numpy(level):
    scheme = CellScheme(level, 2)
    latitude, longitude = (values[:20_000] for values in coordinates())
    with jax.enable_x64(True):
        tokens = jax.jit(scheme.encode)(jnp.asarray(latitude), jnp.asarray(longitude))
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, scheme.encode(latitude, longitude))
        centers = jax.jit(scheme.decode)(tokens)
        assert centers[0].dtype == np.float64
    np.testing.assert_allclose(centers, scheme.decode(np.asarray(tokens)), rtol=0, atol=1e-12)


def test_jax_float32_costs_its_own_rounding_and_no_more():
    scheme = CellScheme(20, 2)
    rounded = [values[:20_000].astype(np.float32) for values in coordinates()]
    tokens = jax.jit(scheme.encode)(*map(jnp.asarray, rounded))
    np.testing.assert_array_equal(tokens, scheme.encode(*rounded))
    exact = scheme.decode(np.asarray(tokens))
    centers = jax.jit(scheme.decode)(tokens)
    assert centers[0].dtype == np.float32
    np.testing.assert_array_equal(centers, np.float32(exact))
    assert great_circle_km(*exact, *(np.float64(center) for center in centers)).max() < 0.00095


def test_jax_inside_other_transformations():
    scheme = CellScheme(20, 2)
    latitude, longitude = (jnp.asarray(values[:8], jnp.float32) for values in coordinates())
    tokens = scheme.encode(latitude, longitude)
    np.testing.assert_array_equal(jax.jit(jax.vmap(scheme.encode))(latitude, longitude), tokens)
    np.testing.assert_array_equal(jax.lax.map(scheme.decode, tokens), scheme.decode(tokens))


@pytest.mark.parametrize("level", [0, 1, 2, 7, 20, 30])
def test_corners_are_those_of_s2sphere(level):
    rng = np.random.default_rng(0)
    tokens = CellScheme(30, 1).encode(np.degrees(np.arcsin(rng.uniform(-1, 1, 60))), rng.uniform(-180, 180, 60))
    ids = CellScheme(30, 1).cell_ids(tokens)
    cells = [s2sphere.Cell(s2sphere.CellId(int(number)).parent(level)) for number in ids]
    points = [[s2sphere.LatLng.from_point(cell.get_vertex(k)) for k in range(4)] for cell in cells]
    expected = [[(point.lat().degrees, point.lng().degrees) for point in cell] for cell in points]
    np.testing.assert_allclose(corners(tokens[:, : level + 1]), expected, atol=1e-9)
