"""Batches: each row once per epoch, the same for any number of processes, resumable; and rows joined with tables."""

from datetime import UTC, datetime

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from geotoken_jax import records
from geotoken_jax.data import join, pipeline
from geotoken_jax.gallery import table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model import batch
from geotoken_jax.settings import SettingsError
from geotoken_jax.shards import DamagedError, damaged
from tests import fixtures


def read(rows):
    return {"row": np.asarray(rows)}


def take(iterator, n):
    return [next(iterator)["row"].tolist() for _ in range(n)]


def joined(parts):
    return [row for part in parts for row in part]


def test_every_row_comes_once_an_epoch_in_another_order():
    batches = take(pipeline.training(24, read, 6, seed=3), 8)
    epochs = [joined(batches[:4]), joined(batches[4:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert take(pipeline.training(24, read, 6, seed=3), 8) == batches
    assert take(pipeline.training(24, read, 6, seed=4), 8) != batches


def test_rows_that_do_not_fill_a_batch_wait_for_the_next_epoch():
    rows = joined(take(pipeline.training(10, read, 4, seed=0), 5))
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


#: Positions in a batch of 6 that a process may read.
LOCALS = [np.arange(6), np.arange(3, 6), np.array([0, 1, 4, 5])]


@pytest.mark.parametrize("local", LOCALS, ids=str)
def test_a_process_reads_its_positions_of_the_same_batches(local):
    whole = np.array(take(pipeline.training(100, read, 6, seed=1), 50))
    assert take(pipeline.training(100, read, 6, 1, local), 50) == whole[:, local].tolist()
    assert [sorted(whole.ravel()[first : first + 100]) for first in (0, 100, 200)] == [list(range(100))] * 3


@pytest.mark.parametrize("local", LOCALS, ids=str)
def test_a_varied_example_has_its_position_in_the_order_of_training(local):
    class Vary:
        def __call__(self, rows):
            raise AssertionError

        def vary(self, rows, examples):
            return {"row": np.stack([rows, examples], 1)}

    whole = np.array(take(pipeline.training(20, Vary(), 6, seed=1), 10))
    assert whole[..., 1].ravel().tolist() == list(range(60))
    assert take(pipeline.training(20, Vary(), 6, 1, local), 10) == whole[:, local].tolist()


def test_a_position_is_gone_back_to_exactly_on_any_number_of_processes():
    whole = pipeline.training(20, read, 6, seed=1)
    take(whole, 5)
    state = whole.get_state()
    rest = take(whole, 5)
    whole.set_state(state)
    assert take(whole, 5) == rest
    parts = [pipeline.training(20, read, 6, 1, np.arange(first, first + 3)) for first in (0, 3)]
    for part in parts:
        part.set_state(state)
    assert [joined(step) for step in zip(*(take(part, 5) for part in parts), strict=True)] == rest


@pytest.mark.parametrize("n", [1, 6, 12, 15])
@pytest.mark.parametrize("local", LOCALS, ids=str)
def test_evaluation_covers_every_row_once(n, local):
    whole = list(pipeline.evaluation(n, read, 6))
    assert all(len(batch["row"]) == 6 for batch in whole)
    assert np.concatenate([batch["row"][batch["valid"]] for batch in whole]).tolist() == list(range(n))
    for found, expected in zip(pipeline.evaluation(n, read, 6, local), whole, strict=True):
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.tolist() == expected[name][local].tolist()


class Damaged:
    """A reader of rows of which some are damaged. asked: rows of each call."""

    def __init__(self, *rows):
        self.rows, self.asked = rows, []

    def __call__(self, rows):
        self.asked.append(rows.tolist())
        for row in rows:
            if row in self.rows:
                raise damaged(f"record {row} of x", "its sum is wrong")
        return read(rows)


def test_a_damaged_row_is_named_once_and_the_next_whole_row_is_read_instead(capsys):
    whole, damaged = take(pipeline.training(24, read, 6, seed=3), 8), Damaged(3, 4, 23)
    batches = pipeline.training(24, damaged, 6, seed=3, max_damaged=0.2)
    expected = [[{3: 5, 4: 5, 23: 0}.get(row, row) for row in batch] for batch in whole]
    assert take(batches, 3) == expected[:3]
    state = batches.get_state()
    assert take(batches, 5) == expected[3:]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(",")[0] for line in lines) == [f"skipped record {n} of x" for n in (23, 3, 4)]
    assert lines[-1].endswith("which is damaged; 3 of 24 records are damaged so far")
    resumed = pipeline.training(24, Damaged(3, 4, 23), 6, seed=3, max_damaged=0.2)
    resumed.set_state(state)
    assert take(resumed, 5) == expected[3:]


def test_a_damaged_row_is_replaced_in_varied_examples_too():
    class Vary(Damaged):
        def vary(self, rows, examples):
            return {"row": np.stack([self(rows)["row"], examples], 1)}

    found = np.array(take(pipeline.training(8, Vary(2), 4, seed=1, max_damaged=0.2), 4))
    whole = np.array(take(pipeline.training(8, read, 4, seed=1), 4))
    assert found[..., 0].tolist() == np.where(whole == 2, 3, whole).tolist()
    assert found[..., 1].ravel().tolist() == list(range(16))


def test_too_many_damaged_rows_end_training_and_none_are_allowed_by_default():
    with pytest.raises(SettingsError, match=r"^max_damaged is 0.1, but 3 of 24 records are damaged, the last one rec"):
        take(pipeline.training(24, Damaged(3, 4, 23), 6, seed=3, max_damaged=0.1), 8)
    with pytest.raises(DamagedError, match="record 3 of x is damaged"):
        take(pipeline.training(24, Damaged(3), 6, seed=3), 4)


def test_a_damaged_row_counts_in_no_validation():
    batches = list(pipeline.evaluation(9, Damaged(4), 6, max_damaged=0.2))
    assert [row for batch in batches for row in batch["row"][batch["valid"]]] == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.fixture
def gallery(tmp_path):
    """Nine rows. A row's embeddings are its number, and its tokens are the base-4 digits of its number."""
    tokens = np.zeros((9, 21), np.uint8)
    tokens[:, 0], tokens[:, 19], tokens[:, 20] = np.arange(9) % 6, np.arange(9) // 4, np.arange(9) % 4
    columns = {
        "embeddings": np.broadcast_to(np.arange(9)[:, None, None], (9, 3, 4)).astype(ml_dtypes.bfloat16),
        "coordinates": np.zeros((9, 2)),
        "tokens": tokens,
        "ids": np.array([f"{i}".encode() for i in range(9)]),
        "authors": np.full(9, b""),
        "captured": np.where(np.arange(9) < 6, datetime(2023, 7, 2, 18, tzinfo=UTC).timestamp(), np.nan),
    }
    table.write_shard(tmp_path / "gallery", 0, 1, columns)
    return table.Table(tmp_path / "gallery")


def test_missing_neighbors_are_counted_out(gallery):
    rows = np.array([[4, 8, 1], [7, -1, -1], [-1, -1, -1]])
    found = join.neighbors(gallery, rows, CellScheme(20, 2))
    assert found["neighbor_count"].tolist() == [3, 1, 0] and found["neighbor_count"].dtype == np.int32
    assert found["neighbors"].shape == (3, 3, 3, 4) and found["neighbors"].dtype == ml_dtypes.bfloat16
    assert found["neighbor_tokens"].shape == (3, 3, 11)
    present = rows >= 0
    assert found["neighbors"][..., 0, 0][present].tolist() == [4, 8, 1, 7]
    assert found["neighbor_tokens"][..., 10][present].tolist() == [4, 8, 1, 7]
    assert np.isfinite(found["neighbors"].astype(np.float32)).all()


def test_token_records_are_joined_by_row(tmp_path, gallery):
    layout = records.token_layout(5)
    columns = {
        "row": np.array([6, 2, 5]),
        "tokens": gallery.tokens([6, 2, 5]),
        "neighbors": np.array([[1, 2, 3, 4, 5], [8, 0, -1, -1, -1], [-1] * 5], np.int32),
    }
    records.write_shard(records.shard_path(epath.Path(tmp_path), "train", 0, 1), layout.encode(columns))
    found = join.Tokens(records.Records(tmp_path, "train", layout), gallery, gallery, CellScheme(20, 2), 3)([2, 0, 1])
    assert found["query"][:, 0, 0].tolist() == [5, 6, 2]
    assert found["tokens"].shape == (3, 11) and found["tokens"].dtype == np.int32
    assert found["tokens"][:, [0, 10]].tolist() == [[5, 5], [0, 6], [2, 2]]
    assert found["neighbor_count"].tolist() == [0, 3, 2]
    assert found["neighbors"][1, :, 0, 0].tolist() == [1, 2, 3] and found["neighbors"][2, :2, 0, 0].tolist() == [8, 0]
    light = join.Tokens(records.Records(tmp_path, "train", layout), gallery, None, CellScheme(20, 2), 3)([2, 0, 1])
    assert light["neighbor_rows"].tolist() == [[-1, -1, -1], [1, 2, 3], [8, 0, -1]]
    timed = join.Tokens(records.Records(tmp_path, "train", layout), gallery, None, CellScheme(20, 2), 3, 5)([2, 0, 1])
    model = fixtures.settings("ours", level=20, backbone_width=gallery.width, context="time")
    for read, on_device in ((timed, True), ({**found, "context": timed["context"]}, False)):
        spec = batch.spec(model, 3, on_device)
        assert {name: (x.shape, x.dtype) for name, x in read.items()} == {
            n: (x.shape, x.dtype) for n, x in spec.items()
        }
    assert set(timed) == {*light, "context"} and timed["context"].dtype == np.float32
    # The middle of the year at three quarters of the day; the second photo has no time.
    expected = [[1, 0, -1, -1, 0], [0, 0, 0, 0, 0], [1, 0, -1, -1, 0]]
    np.testing.assert_allclose(timed["context"], expected, atol=0.03)
    assert light["neighbor_rows"].dtype == np.int32 and set(light) == set(found) - {"neighbors", "neighbor_tokens"} | {
        "neighbor_rows"
    }
    for name in set(light) & set(found):
        np.testing.assert_array_equal(light[name], found[name])


def test_features_come_as_float32(tmp_path):
    layout = records.feature_layout(4)
    columns = {
        "id": np.array([b"a", b"b"]), "author": np.array([b"", b"x"]), "tokens": np.zeros((2, 21), np.uint8),
        "coordinates": np.array([[1.5, -2.25], [80.0, 170.0]]), "image": np.full((2, 4), 0.5), "text": np.zeros((2, 4)),
        "captured": np.zeros(2),
    }  # fmt: skip
    records.write_shard(records.shard_path(epath.Path(tmp_path), "train", 0, 1), layout.encode(columns))
    found = join.Features(records.Records(tmp_path, "train", layout))([1, 0])
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        "image": (np.float32, (2, 4)), "text": (np.float32, (2, 4)), "coordinates": (np.float32, (2, 2))
    }  # fmt: skip
    assert found["coordinates"].tolist() == [[80.0, 170.0], [1.5, -2.25]] and (found["image"] == 0.5).all()


def test_a_time_is_the_same_every_year_and_half_a_year_away_the_other_season():
    days = [datetime(year, month, 5, 6, tzinfo=UTC) for year in (1999, 2024) for month in (1, 7)]
    found = join.context(np.array([day.timestamp() for day in days] + [np.nan]), 3)
    np.testing.assert_allclose(found[:2], found[2:4], atol=0.03)  # a leap day changes it by 0.017
    np.testing.assert_allclose(found[0, 1:], -found[1, 1:], atol=0.03)
    assert found[:, 0].tolist() == [1, 1, 1, 1, 0] and not found[4].any()


class Subset:
    """Some rows; the values of a row are its number times a factor."""

    def __init__(self, n, factor):
        self._n, self._factor = n, factor

    def __len__(self):
        return self._n

    def __call__(self, rows):
        assert ((rows >= 0) & (rows < self._n)).all()
        return {"row": np.float32(self._factor * np.stack([rows, rows], 1))}


def test_splits_are_read_as_one():
    together = join.Concatenation([Subset(3, 1), Subset(4, 10), Subset(2, 100)])
    assert len(together) == 9
    for rows, wanted in (([8, 0, 3, 2, 6, 0], [100, 0, 0, 2, 30, 0]), ([4, 5], [10, 20]), ([7], [0]), ([2, 1], [2, 1])):
        found = together(np.array(rows))["row"]
        assert found[:, 0].tolist() == found[:, 1].tolist() == wanted and found.dtype == np.float32
