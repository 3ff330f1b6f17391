"""The gallery on the host, on each device and sharded over devices: the model gets the same numbers."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from geotoken_jax import sharding
from geotoken_jax.data import join
from geotoken_jax.gallery import placement, table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.settings import SettingsError
from tests import fixtures

N, B, M = 21, 16, 3  # 21 rows on 8 devices: the last three shards are partly or fully padding
C = fixtures.C
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
EVERY_CELLS = pytest.mark.parametrize("cells", [CellScheme(20, 1), CellScheme(20, 5), CellScheme(18, 9)], ids=repr)


def make_mesh(sizes):
    return sharding.make_mesh(sharding.MeshSettings(*sizes))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Two shards on disk."""
    folder, rng = tmp_path_factory.mktemp("gallery"), np.random.default_rng(0)
    embeddings = rng.normal(size=(N, 3, C)).astype(ml_dtypes.bfloat16)
    tokens = rng.integers(0, 4, (N, 21)).astype(np.uint8)
    for shard, rows in enumerate((slice(0, 8), slice(8, N))):
        n = rows.stop - rows.start
        columns = {
            "embeddings": embeddings[rows],
            "coordinates": np.zeros((n, 2)),
            "tokens": tokens[rows],
            "ids": np.arange(n).astype("S"),
            "authors": np.full(n, b""),
        }
        table.write_shard(folder, shard, 2, columns)
    return table.Table(folder)


@pytest.fixture(scope="module")
def rows():
    """All rows of the gallery, and from 0 to 3 missing ones at the end."""
    count = M - np.arange(B) % (M + 1)
    found = np.full((B, M), -1, np.int32)
    found[np.arange(M) < count[:, None]] = np.random.default_rng(0).permutation(np.arange(count.sum()) % N)
    return found


def seen(where, gallery, cells, rows, mesh, shards=-1):
    """Returns the bits of the embeddings, the tokens, and the arrays that stay on the devices."""
    settings = placement.GallerySettings(where, shards)
    resident = placement.device_arrays(gallery, cells, settings, mesh)
    batch = join.neighbor_rows(rows) if settings.on_device else join.neighbors(gallery, rows, cells)
    find = jax.jit(placement.lookup(settings, mesh))
    embeddings, tokens = find({**jax.device_put(batch, sharding.batch_sharding(mesh)), **resident})
    assert embeddings.dtype == ml_dtypes.bfloat16 and tokens.dtype == np.int32
    if settings.on_device:
        for found in (embeddings, tokens):
            assert found.sharding.is_equivalent_to(sharding.batch_sharding(mesh), found.ndim)
    return np.asarray(embeddings).view(np.uint16), np.asarray(tokens), resident


@EVERY_CELLS
@pytest.mark.parametrize("sizes", MESHES)
def test_every_placement_gives_the_same_bits(gallery, rows, sizes, cells):
    mesh = make_mesh(sizes)
    host = seen("host", gallery, cells, rows, mesh)
    assert host[0].shape == (B, M, 3, C) and host[1].shape == (B, M, cells.length)
    for where in ("replicated", "sharded"):
        for found, expected in zip(seen(where, gallery, cells, rows, mesh)[:2], host[:2], strict=True):
            np.testing.assert_array_equal(found, expected)


def numbered(n, settings, mesh):
    """Returns a table on the devices in which row i is i."""
    cells = CellScheme(20, 5)
    arrays = placement.layout(n, 1, cells, settings, mesh)
    padded = arrays["gallery_tokens"].shape[0] * settings.shards_on(mesh) // mesh.size
    values = {name: np.resize(np.arange(padded).repeat(x.shape[1]), x.shape) for name, x in arrays.items()}
    return {name: jax.device_put(values[name].astype(x.dtype), x.sharding) for name, x in arrays.items()}


REQUESTS = {
    "one row": lambda rng, shape: np.full(shape, 37),
    "one shard": lambda rng, shape: rng.integers(0, 12, shape),
    "each photo's own": lambda rng, shape: np.arange(np.prod(shape)).reshape(shape) % 96,
    "none": lambda rng, shape: np.full(shape, -1),
    "any": lambda rng, shape: rng.integers(-1, 96, shape),
}


@pytest.mark.parametrize("photos", [8, 80], ids=["two hops", "one hop"])
@pytest.mark.parametrize("round_bytes", [1, 128 << 20], ids=["many rounds", "one round"])
def test_rows_arrive_however_they_are_spread(photos, round_bytes, monkeypatch):
    monkeypatch.setattr(placement, "ROUND_BYTES", round_bytes)
    mesh, settings, rng = make_mesh((4, 1, 2)), placement.GallerySettings("sharded", -1), np.random.default_rng(0)
    assert len(placement._hops(8, 8, 12, photos // 4 * 3, 10)) == (2 if photos == 8 else 1)
    table, find = numbered(96, settings, mesh), jax.jit(placement.lookup(settings, mesh))
    for request in REQUESTS.values():
        rows = request(rng, (photos, 3)).astype(np.int32)
        embeddings, tokens = find({**table, **jax.device_put(join.neighbor_rows(rows), sharding.batch_sharding(mesh))})
        np.testing.assert_array_equal(np.asarray(embeddings[..., 0], int), np.maximum(rows, 0)[..., None].repeat(3, -1))
        np.testing.assert_array_equal(tokens[..., 0], np.maximum(rows, 0))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_copy_on_fewer_devices_gives_the_same_bits(gallery, rows, sizes, shards):
    mesh, cells = make_mesh(sizes), CellScheme(20, 2)
    host = seen("host", gallery, cells, rows, mesh)
    *found, resident = seen("sharded", gallery, cells, rows, mesh, shards)
    for one, other in zip(found, host, strict=False):
        np.testing.assert_array_equal(one, other)
    parts = resident["gallery_embeddings"].addressable_shards
    assert {part.data.shape for part in parts} == {(-(-N // shards), 3 * C)}
    assert len({np.asarray(part.data).tobytes() for part in parts}) == shards


def test_bytes_do_not_grow_with_the_number_of_devices():
    def sent(devices, shards):
        hops = placement._hops(devices, shards, 1000, requests=120, row_bytes=4619)
        return sum(len(hop.groups[0]) * hop.capacity for hop in hops)

    assert [sent(n, 8) for n in (8, 64, 1024)] == [sent(8, 8)] * 3 and sent(8, 8) < 3 * 120
    assert sent(256, 256) < 6 * 120 and sent(1024, 1024) < 8 * 120  # 30,720 and 122,880 rows are in the global batch


def test_shards_that_do_not_divide_are_refused():
    with pytest.raises(SettingsError, match=r"config\.gallery\.shards is 3, which does not divide 8 devices"):
        placement.lookup(placement.GallerySettings("sharded", 3), make_mesh((8, 1, 1)))
    with pytest.raises(ValueError, match=r"config\.gallery\.shards is 0: set it"):
        placement.GallerySettings("sharded", 0)


@pytest.mark.parametrize("where, each", [("replicated", N), ("sharded", 3)])
def test_a_device_holds_its_part_and_tokens_of_the_smallest_type(gallery, where, each):
    mesh, settings = make_mesh((2, 2, 2)), placement.GallerySettings(where, -1)
    for cells, token in (
        (CellScheme(20, 4), np.uint8),
        (CellScheme(20, 5), np.uint16),
        (CellScheme(20, 10), np.uint32),
    ):
        found = placement.device_arrays(gallery, cells, settings, mesh)
        expected = placement.layout(N, C, cells, settings, mesh)
        assert {name: (a.shape, a.dtype, a.sharding) for name, a in found.items()} == {
            name: (a.shape, a.dtype, a.sharding) for name, a in expected.items()
        }
        assert found["gallery_tokens"].dtype == token
        for name, shape in (("gallery_embeddings", (each, 3 * C)), ("gallery_tokens", (each, cells.length))):
            assert [part.data.shape for part in found[name].addressable_shards] == [shape] * 8
    assert placement.device_arrays(gallery, cells, placement.GallerySettings("host", -1), mesh) == {}


def test_the_table_is_read_once_and_never_whole_where_it_is_sharded(gallery, monkeypatch):
    read, embeddings = [], table.Table.embeddings
    monkeypatch.setattr(table.Table, "embeddings", lambda self, rows: read.append(rows) or embeddings(self, rows))
    for where, expected in (("sharded", [(3 * i, min(3 * i + 3, N)) for i in range(8)]), ("replicated", [(0, N)])):
        read.clear()
        placement.device_arrays(gallery, CellScheme(20, 2), placement.GallerySettings(where, -1), make_mesh((2, 2, 2)))
        assert [(part.start, part.stop) for part in read] == expected


def test_only_the_sharded_gather_moves_anything_between_devices(gallery, rows):
    mesh, cells = make_mesh((2, 2, 2)), CellScheme(20, 2)
    for where, moves in (("replicated", False), ("sharded", True)):
        settings = placement.GallerySettings(where, -1)
        batch = jax.device_put(join.neighbor_rows(rows), sharding.batch_sharding(mesh))
        batch |= placement.layout(N, C, cells, settings, mesh)
        compiled = jax.jit(placement.lookup(settings, mesh)).lower(batch).compile().as_text() or ""
        assert (
            any(f"{name}(" in compiled for name in ("all-to-all", "all-gather", "all-reduce", "reduce-scatter"))
            == moves
        )


@pytest.mark.slow
def test_the_loss_is_the_same(gallery, rows):
    s = fixtures.settings("ours", decoder_layers=1)
    model, batch, mesh, found = fixtures.model("ours", decoder_layers=1), fixtures.batch(B), make_mesh((2, 2, 2)), []
    for where in placement.PLACEMENTS:
        settings = placement.GallerySettings(where, -1)
        near = join.neighbor_rows(rows) if settings.on_device else join.neighbors(gallery, rows, s.cells)
        split = {"query": batch["query"], "tokens": batch["tokens"], **near}
        inputs = jax.device_put(split, sharding.batch_sharding(mesh))
        inputs |= placement.device_arrays(gallery, s.cells, settings, mesh)
        found.append(nnx.jit(fixtures.task(s, where, mesh).loss)(model, inputs, None))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_unknown_placement_is_refused():
    with pytest.raises(
        ValueError, match=r"config\.gallery\.placement is 'disk': choose one of host, replicated, sharded"
    ):
        placement.GallerySettings("disk", -1)
