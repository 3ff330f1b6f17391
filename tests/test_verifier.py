"""The verifier: its parts one by one, then all that `learn` trains, in a small world without useful retrieval."""

import dataclasses

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
from geotoken_jax.gallery.table import Table, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.model.verifier import ComparatorSettings, ComparatorTask, choose, listwise
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.reward import Reward
from geotoken_jax.predict.sample import Candidates
from geotoken_jax.predict.verifier import CandidateFeatures, NearestPhotos, Verifier, encode, open_augmented_gallery
from geotoken_jax.stages import selectors, training
from geotoken_jax.workdir import Workdir
from tests import fixtures

#: Settings of the verifier that tests do not change.
FIXED = ("widths_km", "width_km", "point_km", "sharpness", "floor", "temperature")
C, M, N = fixtures.C, fixtures.M, 240
PLACES = np.array([[60.0, 10], [-30, 25], [35, 139], [-12, -77], [48, 2], [64, -21]])
ALIKE = np.random.default_rng(0).normal(size=(6, C))
CELLS = CellScheme(level=20, group=1)


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
    config = demo.get_config()
    config.model = ConfigDict(settings.plain(fixtures.settings("ours")))
    config.align.model.hidden = 16
    config.align.model.location.update(fourier=8, hidden=16, out=16)
    train = config.baselines.train.copy_and_resolve_references()
    train.update(batch_size=32, examples=1600, evaluate_every=50, log_every=50)
    train.optimizer.learning_rate = 0.01
    config.predict.update(samples=3, batch_size=32, selectors=("greedy", "reward", "verifier"), choice="greedy")
    config.pools = ConfigDict(dict(photos=60, seed=0))
    config.reward = ConfigDict(dict(model=dict(hidden=16, dropout=0.1), train={**train.to_dict(), "examples": 320}))
    comparator = dict(hidden=32, width=16, dropout=0.0, noise=0.2, same_within_km=20.0)
    fixed = {name: config.verifier.model[name] for name in FIXED}
    model = dict(near=8, similar=24, **fixed, comparator=comparator, scorer=dict(hidden=0, dropout=0.0))
    config.verifier = ConfigDict(dict(model=model, train_comparator=train, train_scorer=train))
    config.variants = {"geotoken": {}}
    return configuration.read(config)


@pytest.fixture(scope="module")
def path(tmp_path_factory, config):
    """A work directory up to geotoken/, with a random decoder and random retrieval."""
    path = tmp_path_factory.mktemp("world")
    write_shard(path / "gallery", 0, 1, photos(N, 0))
    write_shard(path / "queries" / "train_views", 0, 1, photos(2 * N, 1, views_of=N))
    rng = np.random.default_rng(2)
    manifests.begin(path, "gallery", {}, ()).finish({"train": N})
    manifests.begin(path, "queries", {}, ()).finish({"train_views": 2 * N})
    made_with = {"align": ["align.model"], "tokens": [], "geotoken/geotoken": ["model"]}
    for folder, keys in made_with.items():
        manifests.begin(path, folder, config.select(*keys), ()).finish({})
    task = AlignTask(config.align.model, C)
    for folder, model in {"align": task.init(nnx.Rngs(0)), "geotoken/geotoken": fixtures.model("ours")}.items():
        parameters = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
        checkpoint.write_parameters(path / folder / "parameters.safetensors", parameters)
    stage = manifests.begin(path, "neighbors", config.select("index.neighbors"), ["gallery", "queries"])
    records.save_array(stage.path / "train.rows.npy", rng.integers(0, N, (N, M)).astype(np.int32))
    records.save_array(stage.path / "train.scores.npy", -np.sort(rng.random((N, M)).astype(np.float32)))
    stage.finish({"train": N})
    return path


def trainer(monkeypatch):
    """Returns a list to which the name of each training is added."""
    calls, fit = [], training.fit

    def listed(task, config, where, splits, folder, what):
        calls.append(what)
        if what == "comparator":  # splits share no photos with pools
            assert not set(splits[0]._rows) & set(splits[1]._rows)
        return fit(task, config, where, splits, folder, what)

    monkeypatch.setattr(training, "fit", listed)
    return calls


def test_the_nearest_photos_are_those_of_brute_force():
    coordinates = np.random.default_rng(0).uniform([-90, -180], [90, 180], (50, 2))
    asked = np.array([[0.0, 179.9], [89.9, 0], [10, 10]])
    rows, km = NearestPhotos(coordinates)(asked, 7)
    every = great_circle_km(*asked.T[..., None], *coordinates.T)
    np.testing.assert_array_equal(rows, np.argsort(every, 1)[:, :7])
    np.testing.assert_allclose(km, np.sort(every, 1)[:, :7], rtol=1e-6)
    assert NearestPhotos(coordinates[:3])(asked, 7)[0].shape == (3, 3)
    assert NearestPhotos(coordinates[:1])(asked, 7)[0].shape == (3, 1)


def test_views_belong_to_the_photo_of_their_id(tmp_path):
    """The last view's photo was left out of the gallery."""
    gallery, views = photos(4, 0), photos(8, 1, views_of=4)
    views["ids"][6:] = b"p0-9"
    write_shard(tmp_path / "gallery", 0, 1, gallery)
    write_shard(tmp_path / "queries" / "train_views", 0, 1, views)
    manifests.begin(tmp_path, "queries", {}, ()).finish({"train_views": 8})
    table = Table(tmp_path / "gallery")
    selectors.save_views(tmp_path, Workdir(tmp_path))
    looks = open_augmented_gallery(tmp_path, table)
    assert looks.of.tolist() == [[0, 4, 5], [1, 6, 7], [2, 8, 9], [3, 3, 3]] and len(looks) == 10
    assert looks.owner.tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(
        looks.images(np.array([9, 1])), [views["embeddings"][5, 0], gallery["embeddings"][1, 0]]
    )
    manifests.begin(tmp_path / "none", "queries", {}, ()).finish({})
    (tmp_path / "none" / "gallery").symlink_to(tmp_path / "gallery")
    selectors.save_views(tmp_path / "none", Workdir(tmp_path / "none"))
    assert open_augmented_gallery(tmp_path / "none", table).of.tolist() == [[0], [1], [2], [3]]


def test_pools_are_of_whole_authors():
    authors = np.array([b"a", b"b", b"a", b"", b"b", b"", b"c", b"", b"", b""])
    for seed in range(20):
        rows = selectors.rows_by_author(authors, 4, seed)
        assert 4 <= len(rows) <= 5 and len(set(rows)) == len(rows)
        for author in (b"a", b"b"):
            mine = set(np.flatnonzero(authors == author))
            assert mine <= set(rows) or not mine & set(rows)
    assert any(0 < sum(authors[selectors.rows_by_author(authors, 4, s)] == b"") < 4 for s in range(20))


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


def test_learn_makes_what_chooses_and_goes_on_where_it_was(config, path, monkeypatch):
    calls = trainer(monkeypatch)
    first = selectors.run(config, Workdir(path), "geotoken")
    assert [m.folder for m in first] == ["pools/geotoken", "reward/geotoken", "verifier/geotoken"]
    assert calls == ["reward geotoken", "comparator", "scorer geotoken"]
    assert selectors.run(config, Workdir(path), "geotoken") == first and len(calls) == 3
    rows = np.load(path / "pools" / "geotoken" / "rows.npy")
    authors = Table(path / "gallery").authors()
    assert not set(authors[rows]) & set(np.delete(authors, rows))
    (path / "verifier" / "geotoken" / "manifest.json").unlink()
    manifests.begin(path, "verifier/geotoken", config.select("verifier"), list(first[2].inputs))
    keys = (path / "verifier" / "geotoken" / "keys.npy").stat().st_mtime_ns
    assert selectors.run(config, Workdir(path), "geotoken") == first
    assert (path / "verifier" / "geotoken" / "keys.npy").stat().st_mtime_ns == keys


def test_the_verifier_finds_the_place_that_retrieval_did_not(config, path, tmp_path):
    """Pools of all six places; a random choice is right once in six."""
    for folder in ("align", "gallery", "queries", "neighbors", "tokens", "geotoken"):
        (tmp_path / folder).symlink_to(path / folder)
    rng = np.random.default_rng(3)
    tokens = np.asarray(fixtures.CELLS.encode(*PLACES.T), np.int32)
    rows = selectors.rows_by_author(Table(path / "gallery").authors(), 60, 0)
    sampled = [f"predict.{key}" for key in ("samples", "temperature", "top_p", "beam", "seed")]
    inputs = ["tokens", "geotoken/geotoken", "neighbors"]
    stage = manifests.begin(tmp_path, "pools/geotoken", config.select("pools", *sampled), inputs)
    shape = (len(rows), 6)
    for name, values in {
        "rows": rows,
        "tokens": np.broadcast_to(tokens, (*shape, 4)),
        "log_probability": rng.normal(size=shape),
        "tempered_log_probability": rng.normal(size=shape),
        "states": np.zeros((*shape, 16), np.float32),
    }.items():
        records.save_array(stage.path / f"{name}.npy", np.ascontiguousarray(values))
    stage.finish({"photos": len(rows)})
    selectors.run(config, Workdir(tmp_path), "geotoken")

    columns, gallery = photos(60, 7), Table(tmp_path / "gallery")
    aligned = Workdir(tmp_path).align_model(config.align.model)
    verifier = Verifier(tmp_path / "verifier" / "geotoken", config.verifier.model, gallery, aligned)
    scores = rng.normal(size=(60, 6))
    near = rng.integers(0, N, (60, M))
    coordinates = np.broadcast_to(np.stack(fixtures.CELLS.decode(tokens), -1), (60, 6, 2))
    found = Pool(
        Candidates(np.broadcast_to(tokens, (60, 6, 4)), scores, scores), coordinates, columns["embeddings"],
        gallery.embeddings(near), gallery.coordinates(near), np.zeros((60, M)), np.full(60, M), None,
    )  # fmt: skip
    own = np.arange(60) % 6
    for name, choice in verifier.choices(found).items():
        assert (choice == own).mean() > 0.6, name
        np.testing.assert_array_equal(verifier.selector(name)(found), choice)
    for name, places in verifier.points(found).items():
        assert (great_circle_km(*places.T, *columns["coordinates"].T) < 25).mean() > 0.6, name
        assert set(map(tuple, places)) <= set(map(tuple, gallery.coordinates())), name
    elsewhere = found._replace(coordinates=np.zeros((60, 6, 2)))  # all candidates are far from the photo
    np.testing.assert_array_equal(
        verifier.selector("point_likeness")(elsewhere), verifier.points(found)["point_likeness"]
    )
    assert verifier.within(found).shape == (60, 6, 5)
    reward = Reward(
        tmp_path / "reward" / "geotoken", RewardSettings(16, 0.1), Workdir(tmp_path).decoder("geotoken", config.model)
    )
    assert reward(found).shape == (60,)


def test_the_photos_of_an_author_do_not_speak_for_him(config, path, tmp_path):
    gallery = Table(path / "gallery")
    aligned = Workdir(path).align_model(config.align.model)
    selectors.save_views(tmp_path, Workdir(path))
    looks = open_augmented_gallery(tmp_path, gallery)
    task = ComparatorTask(ComparatorSettings(8, 4, 0.0, 0.0, 5.0), np.zeros(C))
    comparator = task.init(nnx.Rngs(0))
    keys = encode(comparator, looks.images(np.arange(len(looks))))
    options = dataclasses.replace(config.verifier.model, near=6, similar=12)
    evidence = CandidateFeatures(options, comparator, keys, looks, gallery, aligned)
    rows = np.array([0, 13])
    zeros = np.zeros((2, 1))
    found = Pool(
        Candidates(np.zeros((2, 1, 4), np.int32), zeros, zeros), gallery.coordinates(rows)[:, None],
        gallery.embeddings(rows), gallery.embeddings(np.zeros((2, M), int)), np.zeros((2, M, 2)), np.zeros((2, M)),
        np.zeros(2, int), None,
    )  # fmt: skip
    seen, hidden = evidence(found), evidence(found._replace(exclude=Workdir(path).exclusions("train")(rows)))
    assert np.isfinite(seen).all() and np.isfinite(hidden).all()
    # Unless excluded, the photo itself is its nearest and most similar neighbor: a similarity of 1 by the backbone.
    best, nearest = 15, -1
    np.testing.assert_allclose(seen[:, 0, best], 1.0, atol=1e-2)
    assert (hidden[:, 0, best] < 0.99).all() and (hidden[:, 0, nearest] > seen[:, 0, nearest]).all()
    here = great_circle_km(*gallery.coordinates()[rows].T[..., None], *gallery.coordinates().T) < 1000
    for excluded, expected in ((~here, True), (here, False)):
        apart = found._replace(exclude=[lambda queries, near, excluded=excluded: excluded[queries[:, None], near]])
        for at in evidence.densest(apart):
            km = great_circle_km(*at.T, *gallery.coordinates(rows).T)
            assert ((km < 1000) == expected).all()
    nobody = found._replace(
        coordinates=np.full((2, 1, 2), 7.0), exclude=[lambda queries, near: np.ones(near.shape, bool)]
    )
    np.testing.assert_array_equal(evidence.densest(nobody), np.full((2, 2, 2), 7.0))
