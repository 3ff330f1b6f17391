"""The reranker and the channels: their parts one by one, then all that `learn` makes, in a small world."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import demo
from geotoken_jax import checkpoint, configuration, manifests, records, settings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.gallery import index
from geotoken_jax.gallery.augmented import AugmentedGallery, NearestPhotos
from geotoken_jax.gallery.draws import rows_by_author
from geotoken_jax.gallery.table import IndexVectors, Table, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import chord_km, great_circle_km, to_unit_vectors
from geotoken_jax.model import reranker as model
from geotoken_jax.model.comparator import ComparatorSettings, ComparatorTask
from geotoken_jax.model.reranker import Reranker, RerankerInputs, RerankerSettings
from geotoken_jax.model.reranker_fit import FitSettings, fit
from geotoken_jax.model.reward import choose, listwise
from geotoken_jax.predict import channels, rerank
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import channels as made_channels
from geotoken_jax.stages import selectors
from geotoken_jax.workdir import Workdir
from tests import fixtures

C, M, N = fixtures.C, fixtures.M, 240
VALIDATION = 60
PLACES = np.array([[60.0, 10], [-30, 25], [35, 139], [-12, -77], [48, 2], [64, -21]])
ALIKE = np.random.default_rng(0).normal(size=(6, C))
CELLS = CellScheme(level=20, group=1)
SMALL = RerankerSettings(
    channels=("index", "comparator"), depth=33, candidates=4, cells=2, widths_km=(5.0, 100.0), sharpness=(2.0,),
    hidden=0, objective="accuracy", sources=False,
)  # fmt: skip


def photos(n, seed, views_of=None):
    """Columns of a table. Of the three vectors, only a few dimensions of the image depend on the place, weakly."""
    rng = np.random.default_rng(seed)
    place = np.arange(n) % 6 if views_of is None else np.repeat(np.arange(views_of) % 6, n // views_of)
    vectors = rng.normal(size=(n, 3, C))
    vectors[:, 0, :6] += 2 * ALIKE[place, :6]
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    coordinates = PLACES[place] + rng.normal(0, 0.01, (n, 2))
    number = np.arange(n) if views_of is None else np.repeat(np.arange(views_of), n // views_of)
    return {
        "embeddings": vectors.astype(ml_dtypes.bfloat16),
        "coordinates": coordinates,
        "tokens": CELLS.encode(*coordinates.T).astype(np.uint8),
        "ids": np.array([f"p{seed if views_of is None else 0}-{i}".encode() for i in number]),
        "authors": np.array([f"a{seed}-{i // 12}".encode() for i in number]),
    }


@pytest.fixture(scope="module")
def config():
    config: Any = demo.get_config()
    config.model = ConfigDict(settings.plain(fixtures.settings("ours")))
    config.align.model.hidden = 16
    config.align.model.location.update(fourier=8, hidden=16, out=16)
    train = config.baselines.train.copy_and_resolve_references()
    train.update(batch_size=32, examples=1600, evaluate_every=50, log_every=50)
    train.optimizer.learning_rate = 0.01
    config.predict.update(samples=3, batch_size=32, selectors=("greedy", "reward", "reranker"), choice="reranker")
    config.predict.search.update(expansions=16, leaves=4, width=4, level=20)
    config.index.search.update(kind="exact", reorder_dtype="float32", sample=50)
    config.pools = ConfigDict(dict(photos=60, seed=0))
    config.reward = ConfigDict(dict(model=dict(hidden=16, dropout=0.1), train={**train.to_dict(), "examples": 320}))
    config.channels.update(kind="exact", dtype="float32", train=train)
    config.channels.views.count = 0
    config.channels.comparator.update(hidden=32, width=16, dropout=0.0, noise=0.2)
    config.reranker.model.update(depth=40, candidates=6, cells=2)
    config.reranker.fit.update(folds=2, epochs=10, batch_size=16)
    config.variants = {"geotoken": {}}
    return configuration.read(config)


@pytest.fixture(scope="module")
def path(tmp_path_factory, config):
    """A work directory up to geotoken/, with a random decoder and random retrieval by the gallery's index."""
    path = tmp_path_factory.mktemp("world")
    write_shard(path / "gallery", 0, 1, photos(N, 0))
    write_shard(path / "queries" / "train_views", 0, 1, photos(2 * N, 1, views_of=N))
    write_shard(path / "queries" / "validation", 0, 1, photos(VALIDATION, 7))
    rng = np.random.default_rng(2)
    index.build(IndexVectors(Table(path / "gallery")), config.index.search, path / "gallery" / "index")
    manifests.begin(path, "gallery", config.select("index.search"), ()).finish({"train": N})
    for folder in ("photos", "features"):
        manifests.begin(path, folder, {}, ()).finish({}, width=C)
    counts = {"train_views": 2 * N, "validation": VALIDATION}
    manifests.begin(path, "queries", {}, ()).finish(counts)
    made_with = {"align": ["align.model"], "geotoken/geotoken": ["model"]}
    for folder, keys in made_with.items():
        manifests.begin(path, folder, config.select(*keys), ()).finish({})
    manifests.begin(path, "tokens", {}, ()).finish({}, neighbors=M)
    task = AlignTask(config.align.model, C)
    for folder, made in {"align": task.init(nnx.Rngs(0)), "geotoken/geotoken": fixtures.model("ours")}.items():
        parameters = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(made)))
        checkpoint.write_parameters(path / folder / "parameters.safetensors", parameters)
    stage = manifests.begin(path, "neighbors", config.select("index.neighbors"), ["gallery", "queries"])
    for split, n in {"train": N, "validation": VALIDATION}.items():
        records.save_array(stage.path / f"{split}.rows.npy", rng.integers(0, N, (n, M)).astype(np.int32))
        records.save_array(stage.path / f"{split}.scores.npy", -np.sort(rng.random((n, M)).astype(np.float32)))
    stage.finish({"train": N, "validation": VALIDATION})
    return path


def test_the_nearest_photos_are_those_of_brute_force():
    coordinates = np.random.default_rng(0).uniform([-90, -180], [90, 180], (50, 2))
    asked = np.array([[0.0, 179.9], [89.9, 0], [10, 10]])
    rows, km = NearestPhotos(coordinates)(asked, 7)
    every = great_circle_km(*asked.T[..., None], *coordinates.T)
    np.testing.assert_array_equal(rows, np.argsort(every, 1)[:, :7])
    np.testing.assert_allclose(km, np.sort(every, 1)[:, :7], rtol=1e-6)
    assert NearestPhotos(coordinates[:3])(asked, 7)[0].shape == (3, 3)
    assert NearestPhotos(coordinates[:1])(asked, 7)[0].shape == (3, 1)


def test_pools_are_of_whole_authors():
    authors = np.array([b"a", b"b", b"a", b"", b"b", b"", b"c", b"", b"", b""])
    for seed in range(20):
        rows = rows_by_author(authors, 4, seed)
        assert 4 <= len(rows) <= 5 and len(set(rows)) == len(rows)
        for author in (b"a", b"b"):
            mine = set(np.flatnonzero(authors == author))
            assert mine <= set(rows) or not mine & set(rows)
    assert any(0 < sum(authors[rows_by_author(authors, 4, s)] == b"") < 4 for s in range(20))


@pytest.mark.slow
def test_photos_of_one_place_are_no_negatives_of_each_other():
    options = ComparatorSettings(hidden=8, width=4, dropout=0.0, noise=0.2, same_within_km=5.0)
    task = ComparatorTask(options, np.zeros(C))
    model = task.init(nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, C)), jnp.float32)
    apart, here = jnp.eye(3)[jnp.array([0, 1, 2, 0])], jnp.ones((4, 1)) * jnp.eye(3)[0]
    batch = {"image": x[0], "other": x[1]}
    assert float(task.loss(model, {**batch, "place": here}, None)[0]) == 0.0
    both = task.loss(model, {**batch, "place": apart}, None)[0]
    # The last photo shows the first photo's place. If it is not valid, it must not change the loss of the others.
    valid = jnp.array([True, True, True, False])
    assert 0 < task.loss(model, {**batch, "place": apart, "valid": valid}, None)[0] != both
    moved = task.loss(
        model, {"image": x[0].at[3].add(9), "other": x[1].at[3].add(9), "place": apart, "valid": valid}, None
    )[0]
    assert moved == task.loss(model, {**batch, "place": apart, "valid": valid}, None)[0]


def test_the_loss_of_a_pool_is_least_where_all_weight_is_within():
    km = jnp.array([[0.5, 3000.0, 100.0], [9000.0, 9000.0, 9000.0]])
    good = jnp.zeros((2, 3, 5)).at[0, 0].set(20.0).at[0, 2, 2:].set(20.0).at[1].set(-20.0).at[0, 1].set(-20.0)
    good = good.at[0, 2, :2].set(-20.0)
    run = jax.jit(lambda logits: listwise(logits, km, None))
    loss, found = run(good)
    assert loss < 1e-6 < run(-good)[0]
    assert choose(good)[0] == 0 and [float(v) for v in found.values()] == [0.5] * 5


def test_views_belong_to_the_photo_of_their_id(tmp_path):
    gallery, views = photos(4, 0), photos(8, 1, views_of=4)
    write_shard(tmp_path / "gallery", 0, 1, gallery)
    table = Table(tmp_path / "gallery")
    of = np.array([0, 0, 1, 1, 2, 2])
    looks = AugmentedGallery(table, [(lambda rows: views["embeddings"][rows, 0], of)])
    assert looks.images_of.tolist() == [[0, 4, 5], [1, 6, 7], [2, 8, 9], [3, 3, 3]] and len(looks) == 10
    assert looks.owner.tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(
        looks.images(np.array([9, 1])), [views["embeddings"][5, 0], gallery["embeddings"][1, 0]]
    )
    assert AugmentedGallery(table, []).images_of.tolist() == [[0], [1], [2], [3]]
    further = (lambda rows: views["embeddings"][rows, 1], np.array([3, 0]))
    looks = AugmentedGallery(table, [(lambda rows: views["embeddings"][rows, 0], of), further])
    assert looks.images_of.tolist() == [[0, 4, 5, 11], [1, 6, 7, 1], [2, 8, 9, 2], [3, 10, 3, 3]]
    np.testing.assert_array_equal(
        looks.images(np.array([10, 4])), [views["embeddings"][0, 1], views["embeddings"][0, 0]]
    )


@pytest.fixture(scope="module")
def made(config, path):
    """The work directory with channels/."""
    manifest = made_channels.run(config, Workdir(path))
    assert made_channels.run(config, Workdir(path)) == manifest
    assert manifest.counts == {"photos": N, "images": 3 * N} and set(manifest.facts["recall"]) == {
        "backbone", "comparator", "location",
    }  # fmt: skip
    assert not (path / "channels" / "comparator" / "vectors.npy").exists()
    return path


def pool_of(columns, n, exclude=()):
    """A pool of n photos of a table's columns, with two candidates in the first two places, and a distribution."""
    at = np.broadcast_to(PLACES[:2], (n, 2, 2))
    distribution = PlaceDistribution(np.broadcast_to(PLACES[None, :3], (n, 3, 2)), np.full((n, 3), 12), np.tile([0.5, 0.2, 0.0], (n, 1)))  # fmt: skip # noqa: E501
    zeros = np.zeros((n, 2))
    drawn = Candidates(np.zeros((n, 2, 4), np.int32), zeros, zeros)
    rest = np.zeros((n, M, 3, C)), np.zeros((n, M, 2)), np.zeros((n, M)), np.zeros(n, int)
    return Pool(drawn, at, columns["embeddings"][:n], *rest, distribution, exclude)


@pytest.mark.slow
def test_channels_find_the_place_and_obey_the_rules(config, made):
    """A random photo of the gallery is of the right place once in six."""
    workdir, columns = Workdir(made), photos(VALIDATION, 7)
    gallery = workdir.gallery
    searched = workdir.channels(config)
    rows, scores = searched.search(pool_of(columns, VALIDATION), 40)
    assert rows.shape == (VALIDATION, 4, 40) and (np.diff(scores, axis=2) <= 1e-6).all()
    for listed in rows.reshape(-1, 40):
        assert len(set(listed)) == 40
    place, own = np.arange(N) % 6, np.arange(VALIDATION) % 6
    found = dict(zip(model.CHANNELS, (place[rows[:, :, 0]] == own[:, None]).mean(0), strict=True))
    assert found["backbone"] > 0.5 and found["comparator"] > 0.7, found
    hidden = np.arange(N) % 2 == 0
    rows, _ = searched.search(pool_of(columns, 9, [lambda queries, some: hidden[some]]), 40)
    assert (rows >= 0).all() and not hidden[rows].any()
    rows, scores = searched.search(pool_of(columns, 9, [lambda queries, some: np.ones(some.shape, bool)]), 40)
    assert (rows == -1).all() and np.isneginf(scores).all()
    ranking = ranker(config, searched, gallery)(pool_of(columns, 9, [lambda queries, some: np.ones(some.shape, bool)]))
    assert np.isfinite(ranking.probability).all() and (ranking.chosen < 4).all()


def ranker(config, searched, gallery, count=1):
    settings = config.reranker.model
    moments = np.ones((2, len(model.names(settings))), np.float32)
    return rerank.Ranker(
        [Reranker(settings, moments, np.ones(4, np.float32), rngs=nnx.Rngs(0)) for _ in range(count)], searched, gallery
    )


@pytest.mark.slow
def test_channels_of_another_gallery_are_refused(config, made, tmp_path):
    write_shard(tmp_path / "gallery", 0, 1, photos(12, 0))
    with pytest.raises(SettingsError, match="made for 240 gallery photos, but the gallery has 12"):
        channels.Channels(
            ("index",), made / "channels", config.channels.comparator, Table(tmp_path / "gallery"), None, 1
        )


def test_a_place_is_one_candidate_with_its_rank_in_every_source(config, made):
    workdir = Workdir(made)
    searched = workdir.channels(config)
    pool = pool_of(photos(VALIDATION, 7), 5)
    found = rerank.gather(config.reranker.model, searched, workdir.gallery, pool)
    rows, scores = searched.search(pool, 40)
    assert found.coordinates.shape == (5, 2 + 2 + 4 * 6, 2)
    for i in range(5):
        listed = list(dict.fromkeys(rows[i, :, :6].ravel().tolist()))
        assert found.present[i].sum() == 2 + 2 + len(listed)
        for j, row in zip(np.flatnonzero(found.present[i])[4:], listed, strict=True):
            np.testing.assert_array_equal(found.coordinates[i, j], workdir.gallery.coordinates(row))
            for c in range(4):
                at = list(rows[i, c, :6]).index(row) if row in rows[i, c, :6] else -1
                assert found.ranks[i, j, c] == at + 1
                assert found.scores[i, j, c] == (scores[i, c, at] if at >= 0 else 0)
    np.testing.assert_array_equal(found.ranks[:, :2, 4], [[1, 2]] * 5)
    np.testing.assert_allclose(found.scores[:, 2:4, 5], [[0.5, 0.2]] * 5)
    np.testing.assert_array_equal(found.evidence.channels, found.ranks > 0)


def random_evidence(seed=0, b=2, k=5):
    rng = np.random.default_rng(seed)
    at = lambda *shape: np.stack([rng.uniform(-0.5, 0.5, shape) + 45, rng.uniform(-0.5, 0.5, shape)], -1)  # noqa: E731
    scores = -np.sort(-rng.random((b, 2, 34)).astype(np.float32))
    scores[0, 1, 30:] = scores[1, 1] = -np.inf
    degrees = at(b, k), at(b, 2, 34), at(b, 3), at(b, 4)
    candidates, neighbors, samples, cells = (np.asarray(to_unit_vectors(*np.moveaxis(x, -1, 0)), np.float32) for x in degrees)  # fmt: skip # noqa: E501
    evidence = RerankerInputs(
        candidates, np.ones((b, k), bool), rng.random((b, k, 4)) < 0.5, neighbors, scores, samples, cells,
        np.full((b, 4), 10, np.float32), np.full((b, 4), 0.25, np.float32),
    )  # fmt: skip
    return evidence, degrees


def test_features_are_those_of_plain_loops():
    evidence, (candidates, neighbors, samples, cells) = random_evidence()
    scale = np.array([0.5, 2.0], np.float32)
    found = dict(zip(model.names(SMALL), np.moveaxis(np.asarray(model.features(SMALL, scale, evidence)), -1, 0), strict=True))  # fmt: skip # noqa: E501
    for b in range(2):
        for k in range(5):
            for c, channel in enumerate(SMALL.channels):
                s = evidence.scores[b, c]
                km = np.array([great_circle_km(*candidates[b, k], *n) for n in neighbors[b, c]], np.float64)
                z = [(x - s[0]) / scale[c] if np.isfinite(x) else -np.inf for x in s]
                weights = np.exp(2 * np.array(z)) if np.isfinite(s[0]) else np.zeros(34)
                for width in SMALL.widths_km:
                    share = (weights * np.exp(-0.5 * (km / width) ** 2)).sum() / max(weights.sum(), 1e-30)
                    np.testing.assert_allclose(found[channel, f"density 2 {width:g} km"][b, k], np.log(share + 1e-6), atol=2e-3)  # fmt: skip # noqa: E501
                near = [i for i in range(34) if km[i] <= 25 and np.isfinite(s[i])]
                best, rank = (max(z[near[0]], -4), 1 / (1 + near[0])) if near else (-4, 0)
                np.testing.assert_allclose(found[channel, "best score within 25 km"][b, k], best, atol=1e-5)
                np.testing.assert_allclose(found[channel, "rank within 25 km"][b, k], rank, atol=1e-6)
            km = np.array([great_circle_km(*candidates[b, k], *x) for x in cells[b]], np.float64)
            mass = 0.25 * np.clip((25 - abs(km - 10)) / (2 * np.minimum(km, 10)), 0, 1).sum()
            np.testing.assert_allclose(
                found["decoder", "probability within 25 km"][b, k], np.log(mass + 1e-7), atol=1e-3
            )
            km = np.array([great_circle_km(*candidates[b, k], *x) for x in samples[b]])
            assert found["decoder", "samples within 25 km"][b, k] == pytest.approx((km <= 25).mean())
    np.testing.assert_array_equal(np.stack([found["source", n] for n in ("index", "comparator", "samples", "cells")], -1), evidence.channels)  # fmt: skip # noqa: E501


def test_neighbors_of_other_sources_have_features_of_their_own():
    evidence, (candidates, neighbors, *_) = random_evidence()
    rng, scale = np.random.default_rng(1), np.array([0.5, 2.0], np.float32)
    other = rng.random((2, 5, 2, 34)) < 0.3
    other[0, 0] = False  # all neighbors are of the candidate's source
    several = dataclasses.replace(SMALL, sources=True)
    features = np.asarray(model.features(several, scale, evidence._replace(other=other)))
    found = dict(zip(model.names(several), np.moveaxis(features, -1, 0), strict=True))
    for b, k, c in np.ndindex(2, 5, 2):
        s = evidence.scores[b, c]
        km = np.array([great_circle_km(*candidates[b, k], *n) for n in neighbors[b, c]], np.float64)
        near = [i for i in range(34) if km[i] <= 25 and np.isfinite(s[i]) and other[b, k, c, i]]
        best, rank = (max((s[near[0]] - s[0]) / scale[c], -4), 1 / (1 + near[0])) if near else (-4, 0)
        channel = SMALL.channels[c]
        np.testing.assert_allclose(found[channel, "best score of another source within 25 km"][b, k], best, atol=1e-5)
        np.testing.assert_allclose(found[channel, "rank of another source within 25 km"][b, k], rank, atol=1e-6)
    of_one = np.asarray(model.features(SMALL, scale, evidence))
    np.testing.assert_array_equal(np.stack([found[name] for name in model.names(SMALL)], -1), of_one)


def test_a_gallery_photo_is_supported_by_the_photos_of_other_sources():
    settings = dataclasses.replace(SMALL, candidates=2)
    pool = pool_of(photos(VALIDATION, 7), 1)
    rows = np.array([[[3, 1, 2], [1, 0, -1]]])
    sources = np.array([0, 0, 1, 1])[np.maximum(rows, 0)]
    places = np.zeros((*rows.shape, 2))
    found = rerank.assemble(settings, pool, rows, -np.sort(np.abs(rows.astype(float))), places, sources)
    assert rerank.assemble(settings, pool, rows, places[..., 0], places).evidence.other is None
    other = found.evidence.other[0]
    assert other[:4].all()  # the decoder's candidates have no source
    of_candidates = [1, 0, 0, 0]  # rows 3 and 1 of the first channel, 1 and 0 of the second
    np.testing.assert_array_equal(other[4:], [sources[0] != source for source in of_candidates])


def test_near_places_have_exact_distances():
    a = np.array([[[50.0, 7.0]]])
    b = a + np.array([[[0.001, 0.0], [0.0, 0.01], [0.0, 180.0]]])
    unit = [np.asarray(to_unit_vectors(*np.moveaxis(x, -1, 0)), np.float32) for x in (a, b)]
    expected = np.asarray(great_circle_km(*a[0, 0], *b[0].T))
    np.testing.assert_allclose(chord_km(*map(jnp.asarray, unit))[0, 0], expected, rtol=1e-3, atol=1e-3)


def test_a_scale_is_the_fall_to_the_32nd_score():
    scores = np.full((3, 3, 40), -np.inf, np.float32)
    scores[:, 0] = 1 - 0.01 * np.arange(40)
    scores[:2, 1, :3] = [5, 4, 2]  # fewer than 32 neighbors: the fall to the last
    np.testing.assert_allclose(model.scales(scores), [0.31, 3.0, 1.0], atol=1e-6)


OPTIONS = FitSettings(100, 2, 40, 16, 0.05, 0.0, 0.0, 0)


@pytest.mark.slow
def test_the_fit_finds_the_feature_that_tells_the_place():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(320, 8, len(model.names(SMALL)))).astype(np.float32)
    told = model.names(SMALL).index(("comparator", "rank within 25 km"))
    km = np.where(np.arange(8) == features[..., told].argmax(1)[:, None], 0.5, 9000).astype(np.float32)
    present = np.ones((320, 8), bool)
    for hidden in (0, 8):
        settings = dataclasses.replace(SMALL, hidden=hidden)
        fitted = fit(settings, OPTIONS, np.ones(2), features[:288], present[:288], km[:288])
        p = np.exp(np.asarray(fitted(features[288:], present[288:])))
        assert (p.argmax(1) == km[288:].argmin(1)).mean() > 0.8
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    # One photo is enough to run, and moves the weights little in few steps.
    few = dataclasses.replace(OPTIONS, epochs=1, learning_rate=1e-4)
    first = Reranker(SMALL, np.stack([features[0].mean(0), features[0].std(0)]), np.ones(2), rngs=nnx.Rngs(0))
    fitted = fit(SMALL, few, np.ones(2), features[:1], present[:1], km[:1])
    np.testing.assert_allclose(fitted.linear.kernel[...], first.linear.kernel[...], atol=2e-4)


def test_the_answer_is_the_candidate_of_the_highest_expected_value():
    """Two near candidates with 0.3 each beat a lone one with 0.4, except within 1 km."""
    degrees = np.array([[[10.0, 10.0], [50.0, 50.0], [50.1, 50.0]]])
    evidence = RerankerInputs(
        np.asarray(to_unit_vectors(*np.moveaxis(degrees, -1, 0)), np.float32), np.ones((1, 3), bool), *[np.zeros(0)] * 7
    )  # fmt: skip
    log_p = jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    chosen = {name: int(model.choose(name, log_p, evidence)[0]) for name in model.OBJECTIVES}
    assert chosen["1_km"] == 0 and chosen["25_km"] in (1, 2) and chosen["geoscore"] in (1, 2)
    assert chosen["accuracy"] in (1, 2)
    alone = evidence._replace(present=np.array([[False, True, False]]))
    assert int(model.choose("1_km", log_p, alone)[0]) == 1


@pytest.mark.slow
def test_a_photo_is_ranked_without_its_own_fold(config, made, tmp_path):
    workdir = Workdir(made)
    searched = workdir.channels(config)
    settings, gallery = config.reranker.model, workdir.gallery
    rng, count = np.random.default_rng(0), len(model.names(config.reranker.model))
    moments = np.stack([np.zeros(count), np.ones(count)]).astype(np.float32)
    three = []
    for _ in range(3):
        one = Reranker(settings, moments, np.ones(4, np.float32), rngs=nnx.Rngs(0))
        one.linear.kernel[...] = jnp.asarray(rng.normal(size=(count, 1)), jnp.float32)
        three.append(one)
    rerank.write(tmp_path, three)
    read = rerank.read(tmp_path, settings)
    pool = pool_of(photos(VALIDATION, 7), 8)
    fold = np.array([0, 1] * 4)
    found = rerank.Ranker(read, searched, gallery)(pool._replace(fold=fold))
    alone = [rerank.Ranker([one], searched, gallery)(pool).probability for one in three]
    np.testing.assert_allclose(found.probability[0::2], alone[1][0::2], rtol=1e-5)
    np.testing.assert_allclose(found.probability[1::2], alone[2][1::2], rtol=1e-5)
    np.testing.assert_allclose(rerank.Ranker(read, searched, gallery)(pool).probability, alone[0], rtol=1e-5)
    authors, ids = np.array([b"a", b"b", b"a", b"", b""]), np.array([b"1", b"2", b"3", b"4", b"5"])
    folds = rerank.folds(authors, ids, 5)
    assert folds[0] == folds[2] and ((folds >= 0) & (folds < 5)).all()


def test_recall_counts_each_source_by_hand():
    places = np.array([[[0.0, 0.0], [0.0, 0.1], [40.0, 0.0]], [[0.0, 0.0], [0.0, 0.1], [40.0, 0.0]]])
    ranks = np.array([[[1, 0], [0, 1], [0, 2]], [[1, 0], [0, 1], [0, 2]]])
    candidates = rerank.Candidates(
        places, np.array([[1, 1, 1], [1, 0, 1]], bool), ranks, ranks * 1.0, random_evidence()[0]
    )
    recall = rerank.Recall()
    recall.add(None, np.zeros((0, 2)))
    recall.add(rerank.Ranking(candidates, np.ones((2, 3)) / 3, np.zeros(2, int), ("a", "b")), np.array([[0.0, 0.1], [40.0, 0.001]]))  # fmt: skip # noqa: E501
    # Photo 1 is at the second candidate, 11 km from the first. Photo 2 is at the third, 4,400 km from the others.
    assert recall.photos == 2
    assert recall.shares() == {"a": [0, 0.5, 0.5, 0.5, 0.5], "b": [1, 1, 1, 1, 1], "all": [1, 1, 1, 1, 1]}


def test_a_ranking_is_a_distribution_over_places():
    places = np.array([[[0.0, 0.0], [1.0, 1.0]]])
    candidates = rerank.Candidates(
        places, np.ones((1, 2), bool), np.ones((1, 2, 1), int), np.ones((1, 2, 1)), random_evidence()[0]
    )
    found = rerank.places(rerank.Ranking(candidates, np.array([[0.2, 0.8]]), np.array([1]), ("a",)))
    np.testing.assert_allclose(found.probability, [[0.8, 0.2]])
    np.testing.assert_array_equal(found.coordinates, places[:, ::-1])


def test_without_validation_photos_there_is_one_sentence(config, made, tmp_path):
    for folder in ("align", "gallery", "neighbors", "tokens", "geotoken", "channels"):
        (tmp_path / folder).symlink_to(made / folder)
    manifests.begin(tmp_path, "queries", {}, ()).finish({})
    with pytest.raises(SettingsError, match="fitted to photos of the split validation, but the data has none"):
        selectors.reranker(config, Workdir(tmp_path), "geotoken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(channels=("index", "smell")), "config.reranker.model.channels has 'smell': choose among index, backbone"),
        (dict(objective="luck"), "config.reranker.model.objective is 'luck': choose one of accuracy, 1_km"),
        (dict(depth=20), "config.reranker.model.depth is 20 with 4 candidates: set depth above 32"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings.read(RerankerSettings, {**dataclasses.asdict(SMALL), **change}, "reranker.model")
