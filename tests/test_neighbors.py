"""Neighbors: a photo is never its own neighbor at any rank, and rules exclude exactly the photos that they describe."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from data_prep import neighbors as stage_neighbors
from geotoken_jax import configuration, manifests
from geotoken_jax.gallery import exclude, index, neighbors, table
from geotoken_jax.gallery.exclude import ExcludeSettings
from geotoken_jax.settings import SettingsError, read
from geotoken_jax.workdir import Workdir
from tests import tiny


@pytest.fixture
def gallery():
    x = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[100:150] = x[0]  # fifty duplicates of one photo
    x[150:160] = 1.01 * x[1]  # duplicates of photo 1 that outrank it
    return x


IDS = np.array([f"photo-{i}".encode() for i in range(200)], "S64")


def test_without_exclusion_neighbors_are_the_index(gallery):
    for found, wanted in zip(
        neighbors.search_neighbors(index.Exact(gallery), gallery, 5), index.exact(gallery, gallery, 5), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_a_photo_is_never_its_own_neighbor(gallery):
    for k in (1, 15, 60):
        rows, scores = neighbors.search_neighbors(index.Exact(gallery), gallery, k, [exclude.SameId(IDS, IDS)])
        assert rows.shape == scores.shape == (200, k)
        assert not (rows == np.arange(200)[:, None]).any()
        assert (rows >= 0).all() and (np.diff(scores, axis=1) <= 0).all()
    # Photo 1 is not at rank 0, so only an exclusion by id removes it and keeps its duplicates.
    rows, _ = neighbors.search_neighbors(index.Exact(gallery), gallery[1:2], 15, [exclude.SameId(IDS[1:2], IDS)])
    assert rows[0, :10].tolist() == list(range(150, 160))


def test_queries_are_numbered_apart_from_the_gallery(gallery):
    order = np.random.default_rng(1).permutation(200)
    rows, _ = neighbors.search_neighbors(index.Exact(gallery), gallery[order], 5, [exclude.SameId(IDS[order], IDS)])
    assert not (rows == order[:, None]).any()


def test_an_author_is_excluded_past_the_first_margin(gallery):
    authors = np.array([b"album"] * 1 + [b""] * 99 + [b"album"] * 50 + [b"other"] * 50, "S64")
    rules = [exclude.SameId(IDS, IDS), exclude.SameAuthor(authors, authors)]
    rows, _ = neighbors.search_neighbors(index.Exact(gallery), gallery, 15, rules)
    assert (rows >= 0).all()
    same = authors[rows] == authors[:, None]
    assert not same[authors != b""].any()
    assert same[authors == b""].any()  # photos without an author do not count as one author


def test_fewer_than_k_left_are_marked(gallery):
    authors = np.array([b"one"] * 197 + [b"two"] * 3)
    rows, scores = neighbors.search_neighbors(index.Exact(gallery), gallery, 5, [exclude.SameAuthor(authors, authors)])
    assert ((rows[:197] >= 0).sum(1) == 3).all() and (rows[:197, 3:] == -1).all()
    assert np.isneginf(scores[:197, 3:]).all() and np.isfinite(scores[:197, :3]).all()
    assert (np.sort(rows[:197, :3]) == [197, 198, 199]).all()


def test_a_near_duplicate_is_excluded_and_others_stay(gallery, monkeypatch):
    monkeypatch.setattr(exclude, "_PAIRS", 33)
    images = gallery * np.linspace(1, 2, 200, dtype=np.float32)[:, None]  # lengths of vectors do not matter
    rule = exclude.NearDuplicate(images, lambda rows: images[rows], 0.6)
    rows, _ = neighbors.search_neighbors(index.Exact(gallery), gallery, 15, [exclude.SameId(IDS, IDS), rule])
    cosines = np.einsum("nd,nkd->nk", images, images[rows])
    cosines /= np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(images[rows], axis=2)
    assert (rows >= 0).all() and (cosines <= 0.6).all() and (cosines > 0.4).any()
    assert not np.isin(rows[0], range(100, 150)).any()
    wanted, _ = neighbors.search_neighbors(index.Exact(gallery), gallery, 199, [exclude.SameId(IDS, IDS)])
    kept = [r for r in wanted[7] if r >= 0 and gallery[7] @ gallery[r] / np.linalg.norm(gallery[r]) <= 0.6]
    assert rows[7].tolist() == kept[:15]


def test_photos_within_a_distance_are_excluded_past_the_date_line(gallery):
    coordinates = np.stack([np.zeros(200), (np.linspace(170, 190, 200) + 180) % 360 - 180], axis=1)
    rule = exclude.Within(coordinates, coordinates, 500.0)
    rows, _ = neighbors.search_neighbors(index.Exact(gallery), gallery, 15, [rule])
    apart = 20 / 199 * np.abs(rows - np.arange(200)[:, None]) * 111.19
    assert (rows >= 0).all() and (apart >= 500).all() and (apart < 520).any()


def test_rules_add_up_and_whoever_is_left_with_few_gets_a_mask(gallery):
    authors = np.array([b"one"] * 100 + [b"two"] * 100)
    coordinates = np.stack([np.zeros(200), np.arange(200) % 2 * 90.0], axis=1)
    rules = [
        exclude.SameId(IDS, IDS),
        exclude.SameAuthor(authors, authors),
        exclude.Within(coordinates, coordinates, 1000.0),
    ]
    rows, scores = neighbors.search_neighbors(index.Exact(gallery), gallery, 60, rules)
    assert ((rows >= 0).sum(1) == 50).all() and (rows[:, 50:] == -1).all() and np.isneginf(scores[:, 50:]).all()
    own = np.arange(200)[:, None]
    assert ((rows[:, :50] < 100) != (own < 100)).all() and (rows[:, :50] % 2 != own % 2).all()


@pytest.mark.parametrize(
    ("changes", "message"), [(dict(cosine_above=1.5), "cosine_above is 1.5"), (dict(within_km=-1.0), "within_km is -1")]
)
def test_exclusions_that_cannot_be_are_refused(changes, message):
    section = dict(author=False, cosine_above=1.0, within_km=0.0) | changes
    with pytest.raises(SettingsError, match=message):
        read(ExcludeSettings, section, "index.neighbors.exclude")


def test_a_split_is_excluded_from_as_it_is_used(tmp_path):
    """Excludes other photos of an author for train photos, and photos nearby for evaluation, each by its setting."""
    rng = np.random.default_rng(0)
    config: Any = tiny.get_config()
    config.index.neighbors.count = 35
    config.index.neighbors.exclude_in_evaluation.within_km = 100.0
    counts = {"train": 60, "test": 20}
    for folder in ("features", "queries", "gallery"):
        stage = manifests.begin(tmp_path, folder, {}, [])
        for split, n in counts.items():
            if (split == "train") == (folder == "gallery") and folder != "features":
                columns = {
                    "embeddings": rng.normal(size=(n, 3, 8)).astype(ml_dtypes.bfloat16),
                    "coordinates": np.stack([np.zeros(n), np.arange(n) % 2 * 90.0], axis=1),
                    "tokens": np.zeros((n, 21), np.uint8),
                    "ids": np.char.add(split.encode(), np.arange(n).astype("S")),
                    "authors": np.array([b"a", b"b", b"c"])[np.arange(n) % 3],
                }
                table.write_shard(stage.path if split == "train" else stage.path / split, 0, 1, columns)
        if folder == "gallery":
            vectors = table.index_vectors(table.Table(stage.path).embeddings())
            search = read(index.IndexSettings, config.index.search, "index.search")
            index.build(vectors, search, stage.path / "index")
        stage.finish(counts, index={"kind": "exact"})
    manifest = stage_neighbors.run(configuration.read(config), Workdir(tmp_path))[0]
    gallery = table.Table(tmp_path / "gallery")
    train, test = (Workdir(tmp_path).neighbors(split)[0] for split in counts)
    assert (train >= 0).all() and not (train == np.arange(60)[:, None]).any()
    assert not (gallery.authors(train) == gallery.authors()[:, None]).any()
    assert ((test >= 0).sum(1) == 30).all() and (test[:, :30] % 2 != np.arange(20)[:, None] % 2).all()
    assert manifest.facts == {"fewer": {"train": 0, "test": 20}}
