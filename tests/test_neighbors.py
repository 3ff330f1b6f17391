"""Neighbors: a photo is never its own, whatever rank it has."""

import numpy as np
import pytest

from geotoken_jax.gallery import index, neighbors


@pytest.fixture
def gallery():
    x = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[100:150] = x[0]  # fifty duplicates of one photo
    x[150:160] = 1.01 * x[1]  # which outrank photo 1 itself
    return x


IDS = np.array([f"photo-{i}".encode() for i in range(200)], "S64")


def test_without_exclusion_neighbors_are_the_index(gallery):
    for found, wanted in zip(
        neighbors.find(index.Exact(gallery), gallery, 5), index.exact(gallery, gallery, 5), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_a_photo_is_never_its_own_neighbor(gallery):
    for k in (1, 15, 60):
        rows, scores = neighbors.find(index.Exact(gallery), gallery, k, [neighbors.SameId(IDS, IDS)])
        assert rows.shape == scores.shape == (200, k)
        assert not (rows == np.arange(200)[:, None]).any()
        assert (rows >= 0).all() and (np.diff(scores, axis=1) <= 0).all()
    # Its duplicates are: photo 1 was not at rank 0, and dropping rank 0 would have kept it.
    rows, _ = neighbors.find(index.Exact(gallery), gallery[1:2], 15, [neighbors.SameId(IDS[1:2], IDS)])
    assert rows[0, :10].tolist() == list(range(150, 160))


def test_queries_are_numbered_apart_from_the_gallery(gallery):
    order = np.random.default_rng(1).permutation(200)
    rows, _ = neighbors.find(index.Exact(gallery), gallery[order], 5, [neighbors.SameId(IDS[order], IDS)])
    assert not (rows == order[:, None]).any()


def test_an_author_is_excluded_past_the_first_margin(gallery):
    authors = np.array([b"album"] * 1 + [b""] * 99 + [b"album"] * 50 + [b"other"] * 50, "S64")
    rules = [neighbors.SameId(IDS, IDS), neighbors.SameAuthor(authors, authors)]
    rows, _ = neighbors.find(index.Exact(gallery), gallery, 15, rules)
    assert (rows >= 0).all()
    same = authors[rows] == authors[:, None]
    assert not same[authors != b""].any()
    assert same[authors == b""].any()  # nobody's name is no author


def test_fewer_than_k_left_are_marked(gallery):
    authors = np.array([b"one"] * 197 + [b"two"] * 3)
    rows, scores = neighbors.find(index.Exact(gallery), gallery, 5, [neighbors.SameAuthor(authors, authors)])
    assert ((rows[:197] >= 0).sum(1) == 3).all() and (rows[:197, 3:] == -1).all()
    assert np.isneginf(scores[:197, 3:]).all() and np.isfinite(scores[:197, :3]).all()
    assert (np.sort(rows[:197, :3]) == [197, 198, 199]).all()
