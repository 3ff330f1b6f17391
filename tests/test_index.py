"""Search: exact against numpy, ScaNN against exact, shards against the whole gallery, and an index below its recall."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from geotoken_jax.gallery import device_search, index
from geotoken_jax.shards import DamagedError

SETTINGS = index.IndexSettings(
    "scann",
    shard_rows=5000,
    components=16,
    leaves_searched=2,
    reorder=100,
    reorder_dtype="bfloat16",
    threads=2,
    min_recall=0.99,
    sample=200,
)


def vectors(n, width=24, clusters=40):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(clusters, width))
    x = centers[rng.integers(clusters, size=n)] + 0.4 * rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_exact_equals_numpy_across_blocks(monkeypatch):
    monkeypatch.setattr(index, "_QUERIES", 7)
    monkeypatch.setattr(index, "_ROWS", 13)
    x = vectors(50)
    rows, scores = index.exact(x, x[:20], 15)
    products = x[:20] @ x.T
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1, kind="stable")[:, :15])
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, 1), atol=1e-6)
    assert rows.dtype == np.int32 and scores.dtype == np.float32


def test_exact_breaks_ties_by_row_and_fills_up(monkeypatch):
    monkeypatch.setattr(index, "_ROWS", 4)
    rows, scores = index.exact(np.ones((10, 3), np.float32), np.ones((2, 3), np.float32), 12)
    assert rows.tolist() == [[*range(10), -1, -1]] * 2
    assert (scores[:, :10] == 3).all() and np.isneginf(scores[:, 10:]).all()


@pytest.fixture(scope="module", params=[5000, 700], ids=["whole", "sharded"])
def searched(request, tmp_path_factory):
    pytest.importorskip("scann")
    x, folder = vectors(2000), tmp_path_factory.mktemp("index")
    return x, index.build(x, dataclasses.replace(SETTINGS, shard_rows=request.param), folder), folder


def test_scann_reaches_the_recall_by_searching_more_leaves(searched):
    x, built, _ = searched
    assert built.facts["recall"] >= 0.99
    assert built.facts["leaves"] == {1: 44, 3: 26}[built.facts["shards"]]
    assert 2 < built.facts["leaves_searched"] <= built.facts["leaves"]
    found, scores = built.search(x[::10], 15)
    wanted, exactly = index.exact(x, x[::10], 15)
    assert index.recall(found, wanted) > 0.98
    np.testing.assert_allclose(scores[:, 0], exactly[:, 0], atol=2e-3)  # they are computed again in bfloat16


def test_results_are_in_order_of_score_then_row(searched):
    x, built, _ = searched
    rows, scores = built.search(x[:300], 15)
    for row, score in zip(rows, scores, strict=True):
        assert row.tolist() == row[np.lexsort((row, -score))].tolist() and len(set(row)) == 15


def test_opening_an_index_says_nothing(searched, capfd):
    index.load(searched[2], threads=1)
    assert capfd.readouterr().err == ""


def test_scann_built_again_in_another_process_finds_the_same(tmp_path, monkeypatch):
    pytest.importorskip("scann")
    # The training samples are the same too, of 700, 700 and 600 rows.
    code = """if True:
        import sys
        from geotoken_jax.gallery import device_search, index
        from tests import test_index
        index._TRAINING_ROWS, index._CODE_ROWS = 500, 300
        settings = test_index.dataclasses.replace(test_index.SETTINGS, shard_rows=700, threads=1)
        index.build(test_index.vectors(2000), settings, sys.argv[1])
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    monkeypatch.setattr(index, "_TRAINING_ROWS", 500)
    monkeypatch.setattr(index, "_CODE_ROWS", 300)
    x = vectors(2000)
    own = index.build(x, dataclasses.replace(SETTINGS, shard_rows=700), tmp_path / "own")
    other = index.load(tmp_path / "other", threads=2)
    assert own.facts == other.facts
    for one, two in zip(own.search(x, 15), other.search(x, 15), strict=True):
        np.testing.assert_array_equal(one, two)


def test_shards_searched_exactly_are_the_whole(tmp_path):
    x = vectors(500)
    x[400:] = x[:100]  # equal scores across shards
    settings = dataclasses.replace(SETTINGS, kind="exact", shard_rows=70)
    built = index.build(x, settings, tmp_path)
    assert built.facts["shards"] == 8 and len(built) == 500
    for k in (15, 90, 600):
        for one, other in zip(built.search(x[:50], k), index.exact(x, x[:50], k), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 500])
@pytest.mark.parametrize("shard_rows", [70, 5000])
def test_search_on_devices_is_exact(rows, shard_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(device_search, "_QUERIES", 16)
    monkeypatch.setattr(device_search, "_ROWS", 20)
    x = vectors(rows)
    x[rows // 2 :] = x[: rows - rows // 2]  # equal scores across shards, devices and blocks
    built = index.build(
        x, dataclasses.replace(SETTINGS, kind="device", reorder_dtype="float32", shard_rows=shard_rows), tmp_path
    )
    assert built.facts["kind"] == "device" and built.facts["recall"] == 1.0 and len(built) == rows
    for k, queries in ((15, x[:50]), (rows + 3, x[:1]), (5, x[:0])):
        for searched in (built, index.load(tmp_path, threads=1)):
            for one, other in zip(searched.search(queries, k), index.exact(x, queries, k), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_search_on_devices_with_rounded_vectors_scores_the_stored_ones(dtype, tmp_path):
    x = vectors(1000)
    built = index.build(x, dataclasses.replace(SETTINGS, kind="device", reorder_dtype=dtype, min_recall=0.9), tmp_path)
    stored = index.build(x, dataclasses.replace(SETTINGS, kind="exact", reorder_dtype=dtype), tmp_path / "exact")
    assert built.facts["recall"] == 1.0 or (dtype == "int8" and built.facts["recall"] > 0.9)
    for one, other in zip(built.search(x[:99], 15), stored.search(x[:99], 15), strict=True):
        np.testing.assert_array_equal(one, other)


def test_search_on_devices_below_the_recall_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_SPARE_BFLOAT16", 0)
    flat = 1 + vectors(1000) / 1000  # bfloat16 cannot tell these apart
    with pytest.raises(
        index.IndexQualityError, match=r"recall .* is 0\.\d+ with .*bfloat16.*set reorder_dtype to float32"
    ):
        index.build(flat, dataclasses.replace(SETTINGS, kind="device"), tmp_path)
    assert not (tmp_path / "index.json").exists()


class Recorded:
    """Vectors that record which slices are read, and fail at one of them."""

    def __init__(self, values, last=None):
        self.values, self.last, self.asked = values, last, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        if isinstance(rows, slice) and rows.start == self.last:
            raise KeyboardInterrupt
        self.asked.append((rows.start, rows.stop) if isinstance(rows, slice) else "sample")
        return self.values[rows]


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_interrupted_build_goes_on_at_the_missing_shard(kind, tmp_path):
    if kind == "scann":
        pytest.importorskip("scann")
    x = vectors(2000)
    settings = dataclasses.replace(SETTINGS, kind=kind, shard_rows=700)
    with pytest.raises(KeyboardInterrupt):
        index.build(Recorded(x, last=1400), settings, tmp_path / "broken")
    with pytest.raises(FileNotFoundError):
        index.load(tmp_path / "broken", threads=1)
    half = tmp_path / "broken" / "00001-of-00003" / "index.json"
    half.unlink()  # as after an interruption while this shard was written
    resumed = Recorded(x)
    built = index.build(resumed, settings, tmp_path / "broken")
    assert resumed.asked[:2] == [(700, 1400), (1400, 2000)]
    unbroken = index.build(x, settings, tmp_path / "unbroken")
    assert built.facts == unbroken.facts
    for one, other in zip(built.search(x, 15), unbroken.search(x, 15), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [1401, 1403, 1420])
def test_a_last_shard_of_few_rows_is_found(rows, tmp_path):
    pytest.importorskip("scann")
    x = vectors(rows)
    built = index.build(x, dataclasses.replace(SETTINGS, shard_rows=700), tmp_path)
    assert index.shard_rows(tmp_path) == [range(700), range(700, 1400), range(1400, rows)]
    assert built.search(x[1400:], 5)[0][:, 0].tolist() == list(range(1400, rows))


def test_candidates_are_divided_over_shards_until_recall_is_too_low(tmp_path, monkeypatch):
    pytest.importorskip("scann")
    x = vectors(2000)
    settings = dataclasses.replace(SETTINGS, shard_rows=500, leaves_searched=22, reorder=60)
    built = index.build(x, settings, tmp_path / "enough")
    assert built.facts["shards"] == 4 and built.facts["reorder"] == 30 and built.facts["recall"] >= 0.99
    measured = iter([0.5, 1.0])
    monkeypatch.setattr(index, "recall", lambda *args: next(measured))
    assert index.build(x, settings, tmp_path / "more").facts["reorder"] == 60


def test_one_shard_is_opened_as_an_index_of_its_own(searched):
    x, _, folder = searched
    for number, rows in enumerate(index.shard_rows(folder)):
        part = index.load(folder, 1, [number])
        assert len(part) == len(rows)
        assert (part.search(x[rows.start : rows.stop], 1)[0][:, 0] == np.arange(len(rows))).mean() > 0.98


def test_an_index_of_an_earlier_version_is_searched_with_all_its_candidates(searched, tmp_path):
    x, built, folder = searched
    shutil.copytree(folder, tmp_path / "earlier")
    facts = json.loads((folder / "index.json").read_text())
    del facts["reorder"]
    (tmp_path / "earlier" / "index.json").write_text(json.dumps(facts))
    opened = index.load(tmp_path / "earlier", 1)
    assert index.recall(opened.search(x[:50], 15)[0], built.search(x[:50], 15)[0]) > 0.98


def test_a_saved_index_can_be_moved(searched, tmp_path):
    x, built, folder = searched
    shutil.copytree(folder, tmp_path / "moved")
    opened = index.load(tmp_path / "moved", threads=1)
    assert opened.facts == built.facts
    for one, other in zip(opened.search(x[:50], 15), built.search(x[:50], 15), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pickle_in_the_folder_is_refused(searched, tmp_path):
    shutil.copytree(searched[2], tmp_path / "moved")
    last = sorted((tmp_path / "moved").glob("*-of-*"))[-1]
    (last / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="do not trust"):
        index.load(tmp_path / "moved", threads=1)


def test_missing_results_are_marked(searched):
    x, built, _ = searched
    rows, scores = built.search(x[:3], 2500)
    assert (rows[:, 2000:] == -1).all() and np.isneginf(scores[rows == -1]).all()
    assert all(sorted(row[row >= 0]) == list(range(2000)) for row in rows)  # all rows, from however many leaves


def test_a_bad_index_is_an_error(tmp_path):
    pytest.importorskip("scann")
    noise = np.random.default_rng(0).normal(size=(1500, 64)).astype(np.float32)
    with pytest.raises(
        index.IndexQualityError, match=r"recall of the 15 nearest neighbors is 0\.\d+ with all 38 leaves"
    ):
        index.build(noise, dataclasses.replace(SETTINGS, reorder=16, min_recall=1.0), tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_without_scann_search_is_exact_and_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    built = index.build(vectors(100), SETTINGS, tmp_path)
    assert built.facts["kind"] == "exact" and built.facts["recall"] == 1.0
    assert "ScaNN is not available" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="faiss"), r"search.kind is 'faiss'.*'scann', 'exact' or 'device'"),
        (dict(sample=0), r"search.sample is 0: it must be 1 or more"),
        (dict(min_recall=95.0), r"search.min_recall is 95.0: choose a share from 0 to 1"),
        (dict(shard_rows=0), r"search.shard_rows is 0: it must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "gone": lambda file: file.unlink(),
    "other": lambda file: file.write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_of_scann_is_named(damage, tmp_path):
    pytest.importorskip("scann")
    index.build(vectors(700), dataclasses.replace(SETTINGS, kind="scann"), tmp_path / "whole")
    for name in ("scann_assets.pbtxt", "scann_config.pb", "hashed_dataset.npy", "serialized_partitioner.pb"):
        broken = tmp_path / f"{damage} {name}"
        shutil.copytree(tmp_path / "whole", broken)
        DAMAGE[damage](broken / "00000-of-00001" / name)
        with pytest.raises(DamagedError, match=r"00000-of-00001 is damaged \(.+\): restore the file"):
            index.load(broken, threads=1)
