"""The audit of levels: cases computed by hand, the model's own logits, and a small work directory."""

import dataclasses
import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from configs import demo
from geotoken_jax import checkpoint, configuration, manifests, records, settings
from geotoken_jax.analysis import per_level
from geotoken_jax.data.join import Tokens
from geotoken_jax.gallery.table import Table, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.stages import audit
from geotoken_jax.workdir import Workdir
from tests import fixtures

look = nnx.jit(per_level.decoder_outputs)
#: Kilometers per degree of latitude.
DEGREE = math.pi * 6371 / 180
#: Levels 0, 2, 4 and 6, with cells 9,220, 2,305, 576 and 144 km wide.
CELLS = fixtures.CELLS
#: First wrong token of four photos' greedy candidates: level 2 for two photos, level 6 for the third.
LEAVE = (1, 1, 3, None)
#: Degrees between greedy candidates and the truth.
OFF = (10, 30, 1, 0)


@pytest.fixture(scope="module")
def config():
    config = demo.get_config()
    config.model.update(settings.plain(fixtures.settings("compact")))
    config.variants = {"geotoken": {}}
    config.predict.batch_size = 4
    config.evaluate.resamples = 50
    return configuration.read(config)


def seen():
    """After the first wrong token, tokens equal the true ones again; these must not count as right."""
    greedy = np.array([[0, 1, 2, 3], [1, 5, 6, 7], [2, 8, 9, 10], [3, 11, 12, 13]])
    tokens = greedy.copy()
    for photo, t in enumerate(LEAVE):
        if t is not None:
            tokens[photo, t] += 1
    latitude, longitude = CELLS.decode(greedy)
    towards = np.where(latitude > 0, -1, 1)
    nobody = np.full(4, -1)
    near = [
        [greedy[0], nobody, nobody],  # a neighbor at the prediction, and none at the truth
        [greedy[1], greedy[1], tokens[1]],
        [tokens[2], greedy[2], nobody],
        [nobody, nobody, nobody],
    ]
    confidence = np.tile(np.array([[0.9], [0.8], [0.3], [0.2]]), 4)
    return per_level.DecoderOutputs(
        CELLS, tokens, np.full((4, 4), math.log(4)), np.ones((4, 4)), confidence, tokens * [1, 1, 1, -1], greedy,
        np.array(near), np.stack([latitude + towards * OFF, longitude], -1), np.arange(4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def figures(config):
    return per_level.split_figures(seen(), config.evaluate)


def values(figures, name):
    return [at[name] and at[name]["value"] for at in figures["levels"]]


def test_a_photo_counts_at_the_first_level_that_it_leaves(figures):
    assert values(figures, "first_wrong") == [0, 0.5, 0, 0.25]
    assert values(figures, "right") == [1, 0.5, 0.5, 0.25]
    assert values(figures, "accuracy_so_far") == [1, 0.5, 1, 0.5]
    assert values(figures, "gap") == [0, 0.5, 0.5, -0.25]  # teacher-forced tokens are right at all levels but the last


def test_distances_are_those_of_the_photos_that_left_there(figures):
    quartiles = [at["km_quartiles"] for at in figures["levels"]]
    assert quartiles[0] is None and quartiles[2] is None
    np.testing.assert_allclose(quartiles[1], [15 * DEGREE, 20 * DEGREE, 25 * DEGREE], rtol=1e-6)
    np.testing.assert_allclose(quartiles[3], [DEGREE] * 3, rtol=1e-6)
    # 10 degrees are less than a cell of level 2, and 30 are more; 1 degree is less than a cell of level 6.
    assert values(figures, "near") == [None, 0.5, None, 1]
    assert values(figures, "missed_750") == [0, 1, 0, 0]
    assert values(figures, "missed_25") == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=1e-6)


def test_distances_are_taken_as_the_report_takes_them(config):
    scoring = config.evaluate
    ellipsoid = per_level.split_figures(seen(), dataclasses.replace(scoring, earth="ellipsoid"))["levels"][3]
    assert 1e-4 < abs(ellipsoid["km_quartiles"][1] / DEGREE - 1) < 0.006


def test_what_is_lost_is_shared_among_levels_and_causes(figures):
    lost = np.array([5000 * (1 - math.exp(-degrees * DEGREE / 1492.7)) for degrees in OFF])
    share = lost / lost.sum()
    np.testing.assert_allclose(values(figures, "lost"), [0, share[0] + share[1], 0, share[2]], atol=1e-6)
    assert values(figures, "points_lost")[1] == pytest.approx(lost[:2].mean(), abs=1e-4)
    assert figures["bottleneck"] == 1
    for name, photo in (("lost_not_held", 0), ("lost_outvoted", 1), ("lost_not_outvoted", 2)):
        assert figures["all_levels"][name]["value"] == pytest.approx(share[photo], abs=1e-6)
    assert values(figures, "held_wrong") == [None, 0.5, None, 1]
    assert values(figures, "held") == [0.75, 0.5, 0.5, 0.5]
    assert values(figures, "accuracy_not_held") == [1, 1, 1, 0]


def test_the_page_says_which_level_it_is_in_one_sentence(figures):
    levels = [{"level": level} for level in (0, 2, 4, 6)]
    said = per_level.bottleneck_sentence({"levels": levels, "splits": {"test": figures}}, "test")
    assert said.startswith("test: level 2 is the bottleneck: the 50.0 % of photos")
    assert "more than 2,224 km off" in said and "of resamples" in said  # four photos are too few for a result


def test_nothing_wrong_is_nothing_lost(config):
    of = seen()
    right = CELLS.decode(of.tokens)
    perfect = per_level.DecoderOutputs(**{**vars(of), "greedy": of.tokens, "coordinates": np.stack(right, -1)})
    found = {"levels": [{"level": 0}] * 4, "splits": {"test": per_level.split_figures(perfect, config.evaluate)}}
    assert "every greedy answer" in per_level.bottleneck_sentence(found, "test")
    assert "no GeoScore is lost" in per_level.cause_sentence(found, "test")


def test_calibration_is_of_bins_of_equally_many_photos(figures):
    at = figures["levels"][0]
    assert [b["confidence"] for b in at["reliability"]] == [0.2, 0.3, 0.8, 0.9]
    assert at["calibration_error"]["value"] == pytest.approx((0.8 + 0.7 + 0.2 + 0.1) / 4)
    assert at["overconfidence"]["value"] == pytest.approx(-0.45)
    assert [at["of_uniform"]["value"] for at in figures["levels"]] == pytest.approx(
        [math.log(4) / math.log(6)] + [0.5] * 3, abs=1e-6
    )
    many = per_level._reliability(np.linspace(0, 1, 25), np.arange(25) >= 5)
    assert [b["photos"] for b in many] == [3] * 5 + [2] * 5 and [b["accuracy"] for b in many[:3]] == [0, 0.333333, 1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compact", "paper"])
def test_it_sees_what_the_model_says(form):
    model, batch = fixtures.model(form), fixtures.batch()
    found = look(model, batch)
    log_p = np.asarray(fixtures.forward(model, batch), np.float64)
    each = np.indices(batch["tokens"].shape)
    np.testing.assert_allclose(found["loss"], -log_p[*each, batch["tokens"]], rtol=1e-5)
    np.testing.assert_array_equal(found["guess"], log_p.argmax(-1))
    np.testing.assert_allclose(found["confidence"], np.exp(log_p.max(-1)), rtol=1e-5)
    p = np.exp(log_p)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-4)
    # With its greedy tokens as the truth, the decoder's most probable tokens are these tokens.
    again = fixtures.forward(model, {**batch, "tokens": found["greedy"]})
    np.testing.assert_array_equal(again.argmax(-1), found["greedy"])
    missing = np.arange(fixtures.M) >= batch["neighbor_count"][:, None]
    assert (np.asarray(found["near"]) == -1).all(-1).tolist() == missing.tolist()


def test_both_ways_agree_up_to_the_first_wrong_token():
    model, batch = fixtures.model("compact"), fixtures.batch()
    # For half of the photos, the truth equals the greedy candidate in all tokens but the last.
    batch["tokens"][:2, :3] = look(model, batch)["greedy"][:2, :3]
    found = look(model, batch)
    forced, free = (np.cumprod(found[name] == batch["tokens"], 1) for name in ("guess", "greedy"))
    np.testing.assert_array_equal(forced, free)
    assert 0 < free.mean() < 1


@pytest.fixture(scope="module")
def made(tmp_path_factory, config):
    """Six photos of test and three of validation; batches are of four."""
    path, rng = tmp_path_factory.mktemp("levels"), np.random.default_rng(0)
    counts = {"test": 6, "validation": 3}
    settings_of = {"geotoken/geotoken": config.select("model")}
    names = ("gallery", "queries", "tokens", "geotoken/geotoken")
    stages = {name: manifests.begin(path, name, settings_of.get(name, {}), ()) for name in names}
    layout = records.token_layout(fixtures.M)
    for split, n in {"gallery": 5, **counts}.items():
        coordinates = rng.uniform(-60, 60, (n, 2))
        columns = {
            "embeddings": rng.normal(size=(n, 3, fixtures.C)).astype(ml_dtypes.bfloat16),
            "coordinates": coordinates,
            "tokens": CellScheme(20, 1).encode(*coordinates.T).astype(np.uint8),
            "ids": np.array([f"{split}{i}".encode() for i in range(n)], f"S{records.ID_BYTES}"),
            "authors": np.array([b"", b"a", b"a", b"", b"b", b"b"][:n], f"S{records.ID_BYTES}"),
        }
        write_shard(path / ("gallery" if split == "gallery" else f"queries/{split}"), 0, 1, columns)
        if split in counts:
            rows = np.array([[0, 1, 2], [3, 4, -1], [1, -1, -1], [2, 3, 4], [-1, -1, -1], [4, 0, 1]])[:n]
            columns = {"row": np.arange(n), "tokens": columns["tokens"], "neighbors": rows}
            records.write_shard(records.shard_path(path / "tokens", split, 0, 1), layout.encode(columns))
    state = nnx.to_pure_dict(nnx.state(fixtures.model("compact"), nnx.Param))
    file = path / "geotoken" / "geotoken" / "parameters.safetensors"
    checkpoint.write_parameters(file, jax.tree.map(np.asarray, state))
    for name, stage in stages.items():
        stage.finish(counts if name == "queries" else {}, **({"neighbors": fixtures.M} if name == "tokens" else {}))
    return path


@pytest.mark.slow
def test_every_photo_of_every_split_is_seen_once(made, config):
    found = audit.split_outputs(config, Workdir(made), "geotoken")
    assert {split: len(of.tokens) for split, of in found.items()} == {"test": 6, "validation": 3}
    test = found["test"]
    assert np.isfinite(test.loss).all() and test.clusters[1] == test.clusters[2] and len(set(test.clusters)) == 4
    np.testing.assert_array_equal(test.tokens, CELLS.encode(*test.coordinates.T))
    # The last batch is padded with the first photo: compute the fifth in another batch.
    tokens = records.Records(made / "tokens", "test", records.token_layout(fixtures.M))
    read = Tokens(tokens, Table(made / "queries" / "test"), Table(made / "gallery"), CELLS, fixtures.M)
    for name, of in look(fixtures.model("compact"), read(np.array([1, 0, 4, 2]))).items():
        np.testing.assert_allclose(getattr(test, name)[4], of[2], rtol=1e-5)
    assert (test.near[4] == -1).all()


@pytest.mark.slow
def test_the_audit_is_made_whole_and_the_same_again(made, config):
    [manifest] = audit.run(config, Workdir(made), "levels")
    assert manifest.counts == {"test": 6, "validation": 3}
    folder = made / "audit" / "levels"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    figures = json.loads(first["figures.json"])
    text = per_level.table(figures)
    assert text.count("is the bottleneck") == 2 and text.count("level 6") >= 2
    assert max(len(line) for line in text.split("\n\ntest: ")[0].splitlines()) <= 100
    page = first["index.html"].decode()
    assert "<script" not in page and "{{" not in page and "nan" not in page and "test: level" in page
    (folder / "manifest.json").unlink()
    audit.run(config, Workdir(made), "levels")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
