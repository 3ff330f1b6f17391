"""Baselines on a small world of six places with similar photos each: predictions against the written-out formula."""

import io
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import demo
from data_prep import photos
from data_prep.sources import UNKNOWN, Photo
from geotoken_jax import checkpoint, configuration, manifests, records, settings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.gallery import encodings, index
from geotoken_jax.gallery.table import Table, index_vectors, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.predict import classifier
from geotoken_jax.preparation import DuplicateSettings
from geotoken_jax.stages import baselines, evaluate
from geotoken_jax.workdir import Workdir

C, M = 8, 5
SPLITS = {"train": 120, "validation": 12, "test": 30}
PLACES = np.array([[60.0, 10], [-30, 25], [35, 139], [-12, -77], [48, 2], [64, -21]])
CELLS = CellScheme(level=20, group=1)


def coordinates(split):
    rng = np.random.default_rng(len(split))
    return PLACES[np.arange(SPLITS[split]) % 6] + rng.normal(0, 0.02, (SPLITS[split], 2))


class Source:
    name = "sample"
    provenance = UNKNOWN
    splits = dict.fromkeys(SPLITS, 1)

    def read(self, split, shard):
        del shard
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        for n, (latitude, longitude) in enumerate(coordinates(split)):
            yield Photo(f"{split}-{n}", f"author {n}", file.getvalue(), latitude, longitude)


@pytest.fixture(scope="module")
def config():
    config = demo.get_config()
    config.align.model.hidden = 16
    config.align.model.location.update(fourier=8, hidden=16, out=16)
    config.index.neighbors.count = config.model.neighbors = config.baselines.knn.neighbors = M
    config.baselines.classifier.update(max_photos=30, min_photos=3, hidden=16, dropout=0.0, candidates=4)
    config.baselines.train.update(batch_size=24, examples=2400, evaluate_every=50, log_every=50)
    config.baselines.train.optimizer.learning_rate = 0.01
    config.evaluate.resamples = 50
    config.photos.source = "sample"
    return configuration.read(config)


@pytest.fixture(scope="module")
def path(tmp_path_factory, config):
    """A work directory up to neighbors/, with predictions of the reference variant."""
    path = tmp_path_factory.mktemp("world")
    kept = photos.Options(duplicates=DuplicateSettings(0.0, keep=True))
    photos.make(manifests.begin(path, "photos", {"photos": {"source": "sample"}}, ()), Source(), 1, 0.0, options=kept)
    rng = np.random.default_rng(0)
    looks = rng.normal(size=(6, 3, C))
    for split, n in SPLITS.items():
        vectors = looks[np.arange(n) % 6] + rng.normal(0, 0.3, (n, 3, C))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        columns = {
            "embeddings": vectors.astype(ml_dtypes.bfloat16),
            "coordinates": coordinates(split),
            "tokens": CELLS.encode(*coordinates(split).T).astype(np.uint8),
            "ids": np.array([f"{split}-{i}".encode() for i in range(n)]),
            "authors": np.array([f"author {i}".encode() for i in range(n)]),
        }
        write_shard(path / "gallery" if split == "train" else path / "queries" / split, 0, 1, columns)
    counts = {split: n for split, n in SPLITS.items() if split != "train"}
    manifests.begin(path, "align", config.select("align.model"), ()).finish({})
    for folder, holds in {"gallery": {"train": 120}, "queries": counts}.items():
        manifests.begin(path, folder, {}, ()).finish(holds)
    task = AlignTask(config.align.model, C)
    aligned = nnx.to_pure_dict(nnx.state(task.init(nnx.Rngs(0))))
    checkpoint.write_parameters(path / "align" / "parameters.safetensors", jax.tree.map(np.asarray, aligned))
    stage = manifests.begin(path, "neighbors", config.select("index.neighbors"), ["gallery", "queries"])
    vectors = index_vectors(Table(path / "gallery").embeddings())
    for split in counts:
        rows, scores = index.exact(vectors, index_vectors(Table(path / "queries" / split).embeddings()), M)
        rows[3, 2:], scores[3, 2:] = -1, -np.inf
        rows[4], scores[4] = -1, -np.inf
        records.save_array(stage.path / f"{split}.rows.npy", rows)
        records.save_array(stage.path / f"{split}.scores.npy", scores)
    stage.finish(counts)
    stage = manifests.begin(path, "predictions/geotoken", {}, ["gallery"])
    for split, n in counts.items():
        lines = [{"id": f"{split}-{i}", "latitude": 0.0, "longitude": 0.0} for i in range(n)]
        (stage.path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage.finish(counts)
    return path


def answered(config, path, name, split="test"):
    """Returns the lines of a baseline's predictions, which are made if they do not exist."""
    baselines.run(config, Workdir(path), name)
    return [json.loads(line) for line in (path / "predictions" / name / f"{split}.jsonl").read_text().splitlines()]


def off(lines):
    truth = coordinates("test")[[int(line["id"].removeprefix("test-")) for line in lines]]
    return great_circle_km(*np.array([(line["latitude"], line["longitude"]) for line in lines]).T, *truth.T)


def check(lines, k):
    """Asserts the form of predictions/: candidates are sorted best first, and the first is the prediction."""
    for line in lines:
        log_p = [c["log_probability"] for c in line["candidates"]]
        assert log_p == sorted(log_p, reverse=True) and 0 < np.exp(log_p).sum() < 1.001 and len(log_p) <= k
        assert (line["latitude"], line["longitude"]) == tuple(
            line["candidates"][0][name] for name in ("latitude", "longitude")
        )


@pytest.mark.slow
def test_the_first_neighbor_answers(config, path):
    rows = np.load(path / "neighbors" / "test.rows.npy")
    lines = answered(config, path, "top1_neighbor")
    assert [line["id"] for line in lines] == [f"test-{i}" for i in range(30) if i != 4]  # the one without a neighbor
    wanted = Table(path / "gallery").coordinates(np.delete(rows[:, 0], 4))
    np.testing.assert_array_equal([(line["latitude"], line["longitude"]) for line in lines], wanted)
    assert [len(line["candidates"]) for line in lines[:4]] == [5, 5, 5, 2]


def test_neighbors_vote(config, path):
    lines = answered(config, path, "knn")
    check(lines, M)
    assert len(lines) == 29 and (off(lines) < 25).mean() > 0.9
    np.testing.assert_allclose(sum(np.exp(c["log_probability"]) for c in lines[0]["candidates"]), 1, atol=1e-4)


@pytest.mark.slow
def test_the_galleries_coordinates_are_chosen_among_by_softmax(config, path):
    lines = answered(config, path, "geoclip")
    check(lines, 20)
    task = AlignTask(config.align.model, C)
    aligned = checkpoint.read_module(path / "align" / "parameters.safetensors", task.init)
    gallery = Table(path / "gallery").coordinates()
    encoded = np.asarray(aligned.location(gallery.astype(np.float32)), float)
    photos = Table(path / "queries" / "test").embeddings()[:, 1].astype(float)
    cosines = photos @ (encoded / np.linalg.norm(encoded, axis=1, keepdims=True)).T
    logits = float(np.exp(aligned.location_scale[...])) * cosines
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = [[c["log_probability"] for c in line["candidates"]] for line in lines]
    np.testing.assert_allclose(found, -np.sort(-wanted, 1)[:, :20], atol=0.2)  # bfloat16, times a scale of 54
    stored = encodings.open_encodings(path / "predictions" / "geoclip" / "encoded.npy").astype(float)
    logits = float(np.exp(aligned.location_scale[...])) * photos @ stored.T
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found, -np.sort(-wanted, 1)[:, :20], atol=1e-4)
    at = [(line["latitude"], line["longitude"]) for line in lines]
    np.testing.assert_allclose(at, gallery[wanted.argmax(1)], atol=1e-7)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    gallery, photos = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    wanted = encodings.rank(gallery, photos, 9)
    monkeypatch.setattr(encodings, "_LOCATIONS", 16)
    monkeypatch.setattr(encodings, "_PHOTOS", 3)
    for found, whole in zip(encodings.rank(gallery, photos, 9), wanted, strict=True):
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_cells_are_split_until_they_hold_few_enough():
    rng = np.random.default_rng(0)
    crowd = rng.normal((48, 2), 0.3, (300, 2))
    at = np.concatenate([crowd, rng.uniform((-80, -180), (80, 180), (100, 2)), np.repeat([[1.0, 1.0]], 40, 0)])
    tokens = CELLS.encode(*at.T).astype(np.uint8)
    cells = classifier.partition(tokens, max_photos=20, min_photos=4)
    cell = cells.of(tokens)
    counts = np.bincount(cell[cell >= 0], minlength=len(cells))
    same = [i for i in range(len(cells)) if len(np.unique(tokens[cell == i], axis=0)) == 1]
    assert counts.min() >= 4 and counts.max() == 40 and np.delete(counts, same).max() <= 20  # one place has 40 photos
    for i in range(len(cells)):
        inside = tokens[cell == i]
        # Cells are as coarse as possible: a cell that contains this one and its siblings has more than 20 photos.
        level = next(k for k in range(21, 0, -1) if (inside[:, :k] == inside[0, :k]).all())
        start, size = cells._starts[i], cells._stops[i] - cells._starts[i]
        depth = 20 - round(np.log(size) / np.log(4))
        assert depth <= level - 1 and start % size == 0
        assert (tokens[:, :depth] == inside[0, :depth]).all(1).sum() > 20 or depth == 0
        # No other cell has photos inside this one.
        assert (tokens[:, : depth + 1] == inside[0, : depth + 1]).all(1).sum() == counts[i]
    out = tokens[cell < 0]
    assert 0 < len(out) < 100
    np.testing.assert_array_equal(classifier.partition(tokens, 1000, 1).of(tokens) >= 0, True)


def test_cells_answer_with_the_mean_place_of_their_photos():
    at = np.array([[10.0, 179], [10, -179], [0, 0], [5, 5]])
    found = classifier.centers(at, np.array([1, 1, 0, -1]), 2)
    np.testing.assert_allclose(found, [[0, 0], [10.0015, 180]], atol=1e-3)


@pytest.mark.slow
def test_the_classifier_learns_and_is_made_once(config, path):
    lines = answered(config, path, "classifier")
    check(lines, 4)
    assert len(lines) == 30 and (off(lines) < 25).mean() > 0.9
    manifest = manifests.read_manifest(path, "predictions/classifier")
    assert manifest.facts["cells"] == 6 and manifest.dropped == {"in a cell of fewer than min_photos": 0}
    # wandb changes no result, so predictions are reused.
    changed = config.changed(dict(baselines=dict(train=dict(wandb="elsewhere"))), "")
    kept = Workdir(path)
    assert baselines.run(changed, kept, "classifier") == [manifest] and not kept.made
    changed = config.changed(dict(baselines=dict(classifier=dict(hidden=17))), "")
    with pytest.raises(manifests.StageError, match=r"baselines\.classifier\.hidden is 17, but .* was made with 16"):
        answered(changed, path, "classifier")


@pytest.mark.parametrize(("change", "said"), [
    (dict(knn=dict(neighbors=M + 1)), r"config\.baselines\.knn\.neighbors is 6, but .* has 5 per photo: set it to"),
    (dict(knn=dict(temperature=0.0)), r"config\.baselines\.knn\.temperature is 0\.0"),
    (dict(classifier=dict(min_photos=200)), r"config\.baselines\.classifier\.min_photos is 200, and no cell"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(config, path, tmp_path, change, said):
    for folder in ("gallery", "queries", "neighbors"):
        (tmp_path / folder).symlink_to(path / folder)
    with pytest.raises(settings.SettingsError, match=said):
        answered(config.changed(dict(baselines=change), ""), tmp_path, "knn" if "knn" in said else "classifier")
    with pytest.raises(settings.SettingsError, match=r"no baseline 'other': choose one of top1_neighbor, knn"):
        answered(config, tmp_path, "other")


def test_a_report_is_made_again_where_a_method_is_added(config, path, tmp_path):
    for folder in ("photos", "gallery", "queries", "neighbors"):
        (tmp_path / folder).symlink_to(path / folder)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "geotoken").symlink_to(path / "predictions" / "geotoken")
    methods = []
    for added in ((), ("knn",), ("top1_neighbor",)):
        for name in added:
            answered(config, tmp_path, name)
        made = evaluate.run(config, Workdir(tmp_path))
        assert evaluate.run(config, Workdir(tmp_path)) == made
        found = json.loads((tmp_path / "report" / "metrics.json").read_text())["splits"]["test"]["methods"]
        methods.append([m["name"] for m in found])
    assert methods[0] == ["GeoToken"]
    assert methods[1] == ["GeoToken", "kNN vote", "kNN vote: ideal of up to 5 candidates"]
    assert methods[2] == [
        "GeoToken",
        *methods[1][1:2],
        "Top-1 neighbor",
        methods[1][2],
        "Top-1 neighbor: ideal of up to 5 candidates",
    ]
    changed = config.changed(dict(evaluate=dict(resamples=51)), "")
    with pytest.raises(manifests.StageError, match=r"config\.evaluate\.resamples is 51, but .* was made with 50"):
        evaluate.run(changed, Workdir(tmp_path))
