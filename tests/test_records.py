"""Record formats: numbers are read back exactly, and damaged, missing or wrongly shaped data are errors."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from geotoken_jax import records

RNG = np.random.default_rng(0)


def columns(layout, n):
    """Random values of every field: all bit patterns of numbers, and text without zero bytes."""
    found = {}
    for field in layout.fields:
        shape = (n, *field.shape)
        if field.dtype == "bfloat16":
            found[field.name] = RNG.normal(size=shape).astype(ml_dtypes.bfloat16)
        elif field.dtype.startswith("S"):
            found[field.name] = np.array([f"photo-é-{i}".encode() for i in range(n)])
        elif np.dtype(field.dtype).kind == "f":
            found[field.name] = RNG.uniform(-180, 180, shape).astype(field.dtype)
        else:
            info = np.iinfo(field.dtype)
            found[field.name] = RNG.integers(info.min, info.max, shape, field.dtype, endpoint=True)
    return found


LAYOUTS = {"features": records.feature_layout(5), "tokens": records.token_layout(4)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_round_trips_exactly(name):
    layout = LAYOUTS[name]
    given = columns(layout, 7)
    data = layout.encode(given)
    found = layout.decode(data)
    assert len(data) == 7 and list(found) == [field.name for field in layout.fields]
    for field in layout.fields:
        np.testing.assert_array_equal(found[field.name], given[field.name], strict=not field.dtype.startswith("S"))
    assert layout.decode(data[3:4])["tokens"].tobytes() == given["tokens"][3:4].tobytes()


def test_records_have_the_size_and_bytes_that_the_layout_says():
    given = columns(LAYOUTS["features"], 1)
    (data,) = LAYOUTS["features"].encode(given)
    assert len(data) == 2 * 64 + 2 * 8 + 21 + 2 * (2 * 5) + 8
    assert data[128:144] == given["coordinates"].astype("<f8").tobytes()
    assert data[165:175] == given["image"].tobytes()


def test_float32_is_rounded_to_bfloat16():
    given = {**columns(LAYOUTS["features"], 2), "image": np.full((2, 5), 1 / 3, np.float32)}
    found = LAYOUTS["features"].decode(LAYOUTS["features"].encode(given))["image"]
    assert found.dtype == ml_dtypes.bfloat16 and (found == np.float32(1 / 3).astype(ml_dtypes.bfloat16)).all()


def test_a_wrong_shape_is_refused():
    layout = LAYOUTS["tokens"]
    for shape in ((2, 3), (1, 4)):
        with pytest.raises(ValueError, match=r"neighbors has shape .* not \(2, 4\)"):
            layout.encode({**columns(layout, 2), "neighbors": np.zeros(shape, np.int32)})


def test_a_torn_record_is_refused():
    layout = LAYOUTS["tokens"]
    data = layout.encode(columns(layout, 3))
    for torn in ([data[0][:-1], data[1]], [data[0], data[1] + b"\0"], [data[0], b""]):
        with pytest.raises(ValueError, match=r"bytes, but the layout has 45"):
            layout.decode(torn)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 5, 4 and 6 records, row = place."""
    layout, first = LAYOUTS["tokens"], 0
    for shard, n in enumerate((5, 4, 6)):
        given = {**columns(layout, n), "row": np.arange(first, first + n)}
        path = records.shard_path(epath.Path(tmp_path), "train", shard, 3)
        assert records.write_shard(path, iter(layout.encode(given))) == n
        first += n
    return epath.Path(tmp_path)


def test_rows_are_read_in_any_order(folder):
    found = records.Records(folder, "train", LAYOUTS["tokens"])
    assert len(found) == 15
    rows = [14, 0, 7, 7, 4, 5, 9]
    assert found[rows]["row"].tolist() == rows
    assert found[np.array(rows, np.int32)]["row"].tolist() == rows
    assert found[3:11:2]["row"].tolist() == [3, 5, 7, 9] and found[:]["row"].tolist() == list(range(15))


def test_readers_pickle_before_and_after_use(folder):
    found = records.Records(folder, "train", LAYOUTS["tokens"])
    fresh = pickle.dumps(found)
    assert found[[2]]["row"].tolist() == [2]
    used = pickle.dumps(found)
    assert fresh == used
    assert pickle.loads(used)[[13, 1]]["row"].tolist() == [13, 1]


def test_a_missing_shard_is_named(folder):
    records.shard_path(folder, "train", 1, 3).unlink()
    with pytest.raises(FileNotFoundError, match=r"has 2 of 3 shards of train: remove the folder and run"):
        records.Records(folder, "train", LAYOUTS["tokens"])
    with pytest.raises(FileNotFoundError, match=r"has no shards of test"):
        records.shard_paths(folder, "test")


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    def data():
        yield from [b"one", b"two"]
        raise RuntimeError("the source is broken")

    path = records.shard_path(epath.Path(tmp_path), "train", 0, 1)
    with pytest.raises(RuntimeError, match=r"broken"):
        records.write_shard(path, data())
    assert list(tmp_path.iterdir()) == []
    assert records.write_shard(path, [b"one"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["train.array_record-00000-of-00001"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64, np.int32, "S8"])
def test_flat_arrays_are_memory_mapped_and_exact(tmp_path, dtype):
    values = RNG.normal(size=(6, 3)).astype(dtype) if dtype != "S8" else np.array([b"a", b"longer"], dtype)
    records.save_array(tmp_path / "values.npy", values)
    found = records.open_array(tmp_path / "values.npy", dtype if dtype == ml_dtypes.bfloat16 else None)
    np.testing.assert_array_equal(found, values, strict=True)
    assert isinstance(found.base, np.memmap) or isinstance(found, np.memmap)
    assert [p.name for p in tmp_path.iterdir()] == ["values.npy"]
