"""Record formats: numbers are read back exactly, and damaged, missing or wrongly shaped data are errors."""

import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from geotoken_jax import records, shards

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


def test_more_shards_than_may_be_open_are_read(folder, monkeypatch):
    monkeypatch.setattr(shards, "_most_open", lambda: 2)
    found = records.Records(folder, "train", LAYOUTS["tokens"])
    rows = [14, 0, 7, 3, 5, 9]
    for _ in range(2):
        assert found[rows]["row"].tolist() == rows
        assert len(shards._open_readers) == 2
    del found
    assert not shards._open_readers


def test_the_limit_on_open_files_is_raised_and_kept_to(tmp_path):
    """70 shards under a limit of 64 files, of which 32 may be open shards, then with the limit raised to 128."""
    resource = pytest.importorskip("resource")
    layout = LAYOUTS["tokens"]
    for shard in range(70):
        path = records.shard_path(epath.Path(tmp_path), "train", shard, 70)
        records.write_shard(path, layout.encode({**columns(layout, 1), "row": np.array([shard])}))
    code = (
        "import sys; from geotoken_jax import disk, records, shards; import numpy as np\n"
        "found = records.Records(sys.argv[1], 'train', records.token_layout(4))\n"
        "assert found[range(70)]['row'].tolist() == list(range(70)) and len(shards._open_readers) == 32\n"
        "disk.raise_open_files_limit(); assert disk.open_files_limit() == 128\n"
        "found[range(70)]; assert len(shards._open_readers) == 64"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))

    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """Returns the file with one bit of the record in its middle flipped."""
    at = data.index(b"\7" * 16)
    return data[:at] + b"\6" + data[at + 1 :]


@pytest.mark.parametrize("damage, place", [(cut, "train.array_record-00001-of-00003 is"), (flipped, "record 2 of /")])
def test_a_damaged_shard_and_a_damaged_record_are_named(folder, damage, place):
    layout = LAYOUTS["tokens"]
    given = {**columns(layout, 4), "row": np.arange(5, 9)}
    given["tokens"][2] = 7
    path = records.shard_path(folder, "train", 1, 3)
    records.write_shard(path, layout.encode(given))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(shards.DamagedError, match=place) as error:
        records.Records(folder, "train", layout)[range(15)]
    assert str(path) in str(error.value) and "geotoken verify" in str(error.value)


def test_a_record_of_another_length_is_named(folder):
    path = records.shard_path(folder, "train", 1, 3)
    records.write_shard(path, [bytes(44)] * 4)
    with pytest.raises(shards.DamagedError, match=rf"record 1 of {path} is damaged \(it has 44 bytes, not 45\)"):
        records.Records(folder, "train", LAYOUTS["tokens"])[[0, 6, 14]]


@pytest.mark.parametrize(
    "damage", [cut, lambda data: b"", lambda data: data[:-1], lambda data: data + b"x", bytes.lower]
)
def test_a_damaged_array_is_named(tmp_path, damage):
    path = tmp_path / "values.npy"
    records.save_array(path, np.arange(100.0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(shards.DamagedError, match=rf"{path} is damaged \(.*\): restore the file; in a work directory,"):
        records.open_array(path)


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
