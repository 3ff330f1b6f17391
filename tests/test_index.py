"""Search: exact against numpy, ScaNN against exact, and an index that is not good enough."""

import dataclasses
import sys

import numpy as np
import pytest

from geotoken_jax.gallery import index

SETTINGS = index.IndexSettings("scann", leaves_searched=2, reorder=100, threads=2, min_recall=0.99, sample=200)


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


@pytest.fixture(scope="module")
def searched():
    pytest.importorskip("scann")
    x = vectors(2000)
    return x, index.build(x, SETTINGS)


def test_scann_reaches_the_recall_by_searching_more_leaves(searched):
    x, built = searched
    assert built.facts["recall"] >= 0.99
    assert built.facts["leaves"] == 44 and 2 < built.facts["leaves_searched"] <= 44
    found, scores = built.search(x[::10], 15)
    wanted, exactly = index.exact(x, x[::10], 15)
    assert (found == wanted).mean() > 0.97
    np.testing.assert_allclose(scores[:, 0], exactly[:, 0], atol=1e-5)


def test_scann_built_again_finds_the_same(searched):
    x, built = searched
    again = index.build(x, dataclasses.replace(SETTINGS, threads=1))
    for one, other in zip(built.search(x, 15), again.search(x, 15), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_saved_index_can_be_moved(searched, tmp_path):
    x, built = searched
    for kind in (built, index.Exact(x)):
        kind.save(tmp_path / "here")
        (tmp_path / "here").rename(tmp_path / kind.facts["kind"])
        opened = index.load(tmp_path / kind.facts["kind"], threads=1)
        assert opened.facts == kind.facts
        for one, other in zip(opened.search(x[:50], 15), kind.search(x[:50], 15), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_pickle_in_the_folder_is_refused(searched, tmp_path):
    searched[1].save(tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="do not trust"):
        index.load(tmp_path, threads=1)


def test_missing_results_are_marked(searched):
    x, built = searched
    rows, scores = built.search(x[:3], 2500)
    assert (rows[:, 2000:] == -1).all() and np.isneginf(scores[rows == -1]).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)


def test_a_bad_index_is_an_error():
    pytest.importorskip("scann")
    noise = np.random.default_rng(0).normal(size=(1500, 64)).astype(np.float32)
    with pytest.raises(index.IndexQualityError, match=r"finds 0\.\d+ of the 15 nearest with all 38 leaves"):
        index.build(noise, dataclasses.replace(SETTINGS, reorder=16, min_recall=1.0))


def test_without_scann_search_is_exact_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    built = index.build(vectors(100), SETTINGS)
    assert built.facts == {"kind": "exact", "recall": 1.0}
    assert "ScaNN is not available" in capsys.readouterr().err


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"index.kind is 'faiss'.*'scann' or 'exact'"):
        index.build(vectors(10), dataclasses.replace(SETTINGS, kind="faiss"))
