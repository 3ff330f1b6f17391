"""The gallery's table: shards read as one table, and errors."""

import pickle

import ml_dtypes
import numpy as np
import pytest

from geotoken_jax.gallery import table


def columns(n, first=0):
    rng = np.random.default_rng(first)
    return {
        "embeddings": rng.normal(size=(n, 3, 8)).astype(ml_dtypes.bfloat16),
        "coordinates": rng.uniform(-80, 80, (n, 2)),
        "tokens": rng.integers(0, 4, (n, 21)).astype(np.uint8),
        "ids": np.array([f"photo-{first + i}".encode() for i in range(n)]),
        "authors": np.array([f"author-{i % 3}".encode() for i in range(n)]),
        "captured": rng.uniform(1e9, 2e9, n),
        "sources": np.array([(b"trips", b"street")[i % 2] for i in range(n)]),
    }


@pytest.fixture
def parts():
    return [columns(5), columns(3, 5), columns(4, 8)]


def test_shards_read_as_one(tmp_path, parts):
    for i, part in enumerate(parts):
        table.write_shard(tmp_path, i, 3, part)
    gallery = table.Table(tmp_path)
    assert len(gallery) == 12 and gallery.width == 8
    rows = np.array([[11, 0, 5], [4, 7, 4]])
    for name in table.COLUMNS:
        whole = np.concatenate([part[name] for part in parts])
        read = getattr(gallery, name)
        np.testing.assert_array_equal(read(rows), whole[rows])
        np.testing.assert_array_equal(read(), whole)
        np.testing.assert_array_equal(read(slice(3, 9)), whole[3:9])
        assert read(7).tobytes().rstrip(b"\0") == whole[7].tobytes().rstrip(b"\0")
    assert gallery.embeddings(rows).dtype == ml_dtypes.bfloat16
    assert gallery.coordinates([]).shape == (0, 2)


def test_a_table_of_one_source_has_no_column_of_sources(tmp_path, parts):
    del parts[0]["sources"]
    files = table.write_shard(tmp_path, 0, 1, parts[0])
    assert {path.name.partition("-")[0] for path in files} == {*table.COLUMNS} - {"sources"}
    assert "sources" not in table.Table(tmp_path).stored
    assert table.Table(tmp_path).sources().tolist() == [b""] * 5
    assert "sources" not in {field.name for field in table.layout(8).fields}


def test_one_shard_is_memory_mapped_and_pickles_small(tmp_path):
    part = columns(2000)
    table.write_shard(tmp_path, 0, 1, part)
    gallery = table.Table(tmp_path)
    assert isinstance(gallery.embeddings().base, np.memmap) or isinstance(gallery.embeddings(), np.memmap)
    sent = pickle.dumps(gallery)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).ids([3, 1]), part["ids"][[3, 1]])


def test_rows_out_of_range_are_refused(tmp_path, parts):
    table.write_shard(tmp_path, 0, 1, parts[0])
    for wrong in ([-1], [5], [0, 9]):
        with pytest.raises(IndexError, match="has 5 rows, but rows from"):
            table.Table(tmp_path).tokens(wrong)


def test_missing_shards_and_wrong_columns_are_refused(tmp_path, parts):
    with pytest.raises(FileNotFoundError, match="has no shards"):
        table.Table(tmp_path)
    table.write_shard(tmp_path, 0, 2, parts[0])
    with pytest.raises(FileNotFoundError, match="has 1 of 2 shards of captured"):
        table.Table(tmp_path)
    for name, wrong in (
        ("embeddings", np.zeros((5, 2, 8))),
        ("coordinates", np.zeros((4, 2))),
        ("tokens", np.zeros((5, 21))),
    ):
        with pytest.raises(ValueError, match=f"column {name} of the table"):
            table.write_shard(tmp_path, 1, 2, {**parts[0], name: wrong})


def test_a_table_need_not_say_when_photos_were_taken(tmp_path, parts):
    del parts[0]["captured"]
    for i, part in enumerate(parts[:2]):
        table.write_shard(tmp_path / "some", i, 2, part)
    found = table.Table(tmp_path / "some").captured()
    assert np.isnan(found[:5]).all() and found[5:].tolist() == parts[1]["captured"].tolist()
    for file in (tmp_path / "some").glob("captured-*"):
        file.unlink()
    found = table.Table(tmp_path / "some")
    assert np.isnan(found.captured([[0, 7]])).all() and found.captured().shape == (8,)


def test_a_table_torn_in_its_making_is_not_one_without_times(tmp_path, parts, monkeypatch):
    written = []

    def save(path, values):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        np.save(path, values)

    monkeypatch.setattr(table.records, "save_array", save)
    with pytest.raises(KeyboardInterrupt):
        table.write_shard(tmp_path, 0, 1, parts[0])
    assert written[0].name.startswith("captured-")
    with pytest.raises(FileNotFoundError):
        table.Table(tmp_path)


def test_index_vectors_have_three_parts_of_length_one():
    embeddings = columns(4)["embeddings"]
    vectors = table.index_vectors(embeddings)
    assert vectors.shape == (4, 24) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors.reshape(4, 3, 8), axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose((vectors * vectors).sum(1), 3, atol=1e-5)
    assert not table.index_vectors(np.zeros((1, 3, 8), np.float32)).any()
