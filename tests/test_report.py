import base64
import html.parser
import io
import json
import math
import os
import re

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from configs import common
from data_prep import images, photos
from data_prep.sources import UNKNOWN, Photo
from geotoken_jax import configuration, manifests, settings
from geotoken_jax.analysis import training
from geotoken_jax.analysis.evaluate import table
from geotoken_jax.gallery.table import write_shard
from geotoken_jax.geo import distance
from geotoken_jax.pages import chart, worldmap
from geotoken_jax.pages import table as tables
from geotoken_jax.pages.photos import candidate_table, data_uri, thumbnail
from geotoken_jax.preparation import DuplicateSettings
from geotoken_jax.stages import evaluate
from geotoken_jax.stages import evaluate as report_stage
from geotoken_jax.workdir import Workdir

NASTY = '<b>"Ōsaka" & co</b></script>'
VARIANTS = {"top1_neighbor": "Top-1 neighbor", "geotoken": "GeoToken", "without_neighbor_tokens": "Without <neighbors>"}


def jpeg(color, side=32):
    file = io.BytesIO()
    Image.new("RGB", (side, side), tuple(int(c) for c in color)).save(file, "JPEG")
    return file.getvalue()


class Source:
    """Solid colors near 40 places. One id and one city must be escaped, and one photo cannot be read."""

    name = "sample"
    provenance = UNKNOWN
    splits = {"train": 1, "validation": 1, "test": 1}  # noqa: RUF012

    def read(self, split, shard):
        places = np.random.default_rng(0).uniform((-60, -180), (70, 180), (40, 2))
        rng = np.random.default_rng(len(split))
        for n in range(40):
            latitude, longitude = np.clip(places[n] + rng.normal(0, 0.05, 2), (-90, -180), (90, 180))
            image = b"broken" if n == 3 else jpeg(rng.integers(0, 256, 3), side=400 if n == 4 else 32)
            name = f"{split}-{n}{NASTY if n == 5 else ''}"
            author = f"{'train' if (split, n // 4) == ('test', 1) else split} author {n // 4}"
            yield Photo(name, author, image, latitude, longitude, NASTY, country="Japan")


def _cell(level, at, probability):
    return {"level": level, "latitude": at[0], "longitude": at[1], "probability": probability}


def candidates(rng, places, n, **more):
    rows = [n, *rng.integers(0, 40, 2)]
    return [
        {"latitude": places[row, 0], "longitude": places[row, 1], "probability": math.exp(-1.0 - k), **more}
        for k, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def config():
    section = {"resamples": 100, "seed": 0, "reference": "geotoken", "labels": VARIANTS, "earth": "sphere"}
    section |= {"strict": False, "compare": (("top1_neighbor", "without_neighbor_tokens"),)}
    audit = {"leakage": {"cosine_above": 0.9}}
    config = common.get_config()
    config.update({"name": "sample", "evaluate": section, "audit": audit})
    config.evaluate.labels = VARIANTS
    config.photos.source = "sample"
    return configuration.read(config)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A work directory with photos, a gallery that lacks the broken photo, and predictions of three variants.

    Photo 0 of test has the embedding of a gallery photo, photos 4 to 7 an author of the gallery.
    """
    monkeypatch.setattr(images, "drop_reason", lambda image: "")  # the report must also work with unchecked images
    kept = photos.Options(duplicates=DuplicateSettings(0.0, keep=True))
    photos.make(
        manifests.begin(tmp_path, "photos", {"photos": {"source": "sample"}}, ()), Source(), 1, 0.0, options=kept
    )
    whole = {split: [p for p in Source().read(split, 0) if p.image != b"broken"] for split in Source.splits}
    train = whole["train"]
    places = np.array([(photo.latitude, photo.longitude) for photo in Source().read("train", 0)])
    vectors = np.random.default_rng(1).normal(size=(3, 39, 3, 64))
    for n, (split, listed) in enumerate(whole.items()):
        folder = "gallery" if split == "train" else f"queries/{split}"
        columns = {
            "embeddings": vectors[n].astype(ml_dtypes.bfloat16),
            "coordinates": np.array([(photo.latitude, photo.longitude) for photo in listed]),
            "tokens": np.zeros((39, 21), np.uint8),
            "ids": np.array([photo.id.encode() for photo in listed]),
            "authors": np.array([photo.author.encode() for photo in listed]),
        }
        if split == "test":
            columns["embeddings"][0] = vectors[0, 20]
        stage = manifests.begin(tmp_path, folder, {}, ["photos"])
        write_shard(stage.path, 0, 1, columns)
        stage.finish({"rows": 39})
    manifests.begin(tmp_path, "queries", {}, ["photos"]).finish({split: 39 for split in ("validation", "test")})
    for variant in VARIANTS:
        stage = manifests.begin(tmp_path, f"predictions/{variant}", {}, ["gallery"])
        for split in ("validation", "test"):
            rng = np.random.default_rng(len(variant))
            lines = []
            for n, photo in enumerate(Source().read(split, 0)):
                found = candidates(rng, places, n, tokens=[1]) if variant != "top1_neighbor" else []
                at = places[n if rng.random() < 0.5 else rng.integers(0, 40)]
                near = [{"id": train[i].id, "latitude": 0.0, "longitude": 1.0, "score": 0.5} for i in (0, 5, 38)]
                row = {"id": photo.id, "latitude": at[0], "longitude": at[1], "candidates": found, "neighbors": near}
                if found:
                    row |= {"choice": "greedy", "choices": {"greedy": 0, "point": [10.0, 20.0 + n]}}
                if variant == "geotoken":
                    row |= {"within": {"25": 0.3, "750": 0.5 + n / 100}, "radius_km": 100.0 + n}
                    row |= {"radius_90_km": 9000, "cells": [_cell(10, at, 0.6), _cell(-1, (0, 0), 0.4)]}
                lines.append(json.dumps(row))
            (stage.path / f"{split}.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # the last photo has no prediction
        stage.finish({"test": 39})
    metrics = tmp_path / "geotoken" / "geotoken" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    steps = [{"step": s, "train/loss": 9 / s, "train/loss_level_0": 1 / s, "train/rate": 5e6} for s in range(1, 30)]
    steps += [{"step": s, "validation/loss": 10 / s} for s in (10, 20)]
    metrics.write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 31, "trai')
    return tmp_path


class Checked(html.parser.HTMLParser):
    """Reads a page as a browser does: elements must nest, and nothing may be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources, self.identifiers = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        assert tag != "img" or attributes["alt"]
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(folder):
    page = (folder / "report" / "index.html").read_text()
    checked = Checked()
    checked.feed(page)
    checked.close()
    assert not checked.open
    return page, checked


def test_the_page_is_whole_and_needs_nothing_else(made, config):
    [manifest] = report_stage.run(config, Workdir(made))
    assert manifest.counts == {"variants": 3, "test": 40, "validation": 40}
    page, checked = read(made)
    assert all(source.startswith(("data:image/jpeg;base64,", "data:,", "#")) for source in checked.sources)
    assert {source[1:] for source in checked.sources if source.startswith("#")} <= set(checked.identifiers)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert str(made) not in page
    assert "{{" not in page
    text = " ".join(checked.text)
    assert "Without <neighbors>" in text  # escaped, so that it is shown as text
    assert NASTY in text and NASTY not in page
    assert page.count("</script>") == 2
    assert "no prediction for 1 photos" in text
    assert page.count('class="card"') == 30
    # For both splits: accuracy, reliability at two thresholds, abstention, area; and the loss of one model.
    assert page.count('class="chart"') == 2 * (1 + 2 + 2 + 1) + 1
    assert page.count("<details open>") == 4  # accuracy, differences, uncertainty, continents: each its first split
    assert text.count("calibration, and accuracy of the most certain photos") == 2
    assert (
        "38 of 40 photos left" not in text and "35 of 40 photos left; left out: near-duplicate 1, same author 4" in text
    )
    assert "Top-1 neighbor, against Without <neighbors>: greedy" in text
    assert text.count("Asia") == 2 * 3  # a row per variant and split


def page_data(checked):
    return next(i for i, text in enumerate(checked.text) if text.startswith('{"thresholds"'))


def test_the_map_has_every_method_and_the_true_error(made, config):
    report_stage.run(config, Workdir(made))
    _, checked = read(made)
    data = json.loads(checked.text[page_data(checked)])
    assert data["methods"] == ["Top-1 neighbor", "GeoToken: greedy", "Without <neighbors>: greedy"]
    assert data["reference"] == 1
    assert list(data["splits"]) == ["test", "validation"]
    truth = {photo.id: photo for photo in Source().read("test", 0)}
    lines = (made / "predictions" / "geotoken" / "test.jsonl").read_text().splitlines()
    guesses = {row["id"]: row for row in map(json.loads, lines)}
    shown = data["splits"]["test"]["photos"]
    assert len(shown) == 40
    for photo in shown:
        guess = photo["guesses"][1]
        if photo["id"] not in guesses:
            assert guess is None
            continue
        assert guess[0] == pytest.approx(guesses[photo["id"]]["latitude"], abs=1e-4)
        assert photo["truth"][1] == pytest.approx(truth[photo["id"]].longitude, abs=1e-4)
        off = distance.great_circle_km(*photo["truth"], *guess[:2])
        assert guess[2] == pytest.approx(off, abs=0.05)


@pytest.mark.slow
def test_two_runs_make_the_same_bytes_and_a_complete_report_is_kept(made, config):
    first = report_stage.run(config, Workdir(made))
    files = {path.name: path.read_bytes() for path in (made / "report").iterdir()}
    os.utime(made / "report" / "index.html", (0, 0))
    assert report_stage.run(config, Workdir(made)) == first
    assert (made / "report" / "index.html").stat().st_mtime == 0  # not written again
    (made / "report" / "index.html").write_text("edited")
    with pytest.raises(manifests.StageError, match=r"has 6 bytes, .* make it again with `geotoken all --remake=eval"):
        report_stage.run(config, Workdir(made))
    (made / "report" / "manifest.json").unlink()
    report_stage.run(config, Workdir(made))
    assert {path.name: path.read_bytes() for path in (made / "report").iterdir()} == files


def test_the_metrics_say_how_much_worse_the_ablation_is_on_every_split(made, config):
    report_stage.run(config, Workdir(made))
    splits = json.loads((made / "report" / "metrics.json").read_text())["splits"]
    for scores in splits.values():
        accuracy = {m["variant"]: [a["value"] for a in m["accuracy"]] for m in scores["methods"] if m["main"]}
        (row,) = [
            d for d in scores["differences"] if (d["variant"], d["choice"]) == ("without_neighbor_tokens", "greedy")
        ]
        gaps = np.subtract(accuracy["without_neighbor_tokens"], accuracy["geotoken"])
        np.testing.assert_allclose([a["value"] for a in row["accuracy"]], gaps, atol=1e-6)


def test_a_reference_that_was_not_predicted_is_named(made, config):
    other = config.changed(dict(evaluate=dict(reference="paper")), "")
    with pytest.raises(
        manifests.StageError, match=r"reference is 'paper', but .* has geotoken, top1_neighbor, without"
    ):
        report_stage.run(other, Workdir(made))


def test_a_pair_of_which_one_was_not_predicted_is_named(made, config):
    other = config.changed(dict(evaluate=dict(compare=(("geotoken:point", "knn"),))), "")
    with pytest.raises(settings.SettingsError, match=r"no method 'knn' to compare: use one of .*geotoken:point"):
        report_stage.run(other, Workdir(made))


def test_neighbors_are_found_although_the_gallery_lacks_a_photo(made):
    gallery = evaluate.gallery(Workdir(made), ["train-38", "train-0"])
    train = list(Source().read("train", 0))
    assert thumbnail(gallery, "train-38") != thumbnail(gallery, "train-0")
    assert "<img" not in thumbnail(gallery, "train-3")
    assert data_uri(train[38].image, 72) in thumbnail(gallery, "train-38")
    assert gallery.place_near(np.array([train[20].latitude, train[20].longitude])) == f"{NASTY}, Japan"
    assert gallery.place_near(np.array([-85.0, 0.0])) == ""


def test_a_place_that_was_sampled_twice_is_listed_once(made):
    def candidate(latitude, log_probability):
        return {"latitude": latitude, "longitude": 0.0, "probability": math.exp(log_probability)}

    row = {"candidates": [candidate(1, -2.0), candidate(5, -1.0), candidate(1, -2.0)]}
    row["choices"] = {"greedy": 2, "point": [5.5, 0.0]}  # the point is not one of the candidates
    drawn = candidate_table(row, np.zeros(2), evaluate.gallery(Workdir(made), []))
    assert re.findall(r"([\d.]+) %|<b>(\w+)", drawn) == [("36.8", ""), ("", "greedy"), ("13.5", "")]


def test_photos_are_embedded_small():
    uri = data_uri(jpeg((1, 2, 3), side=400), 64)
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    assert data_uri(b"broken", 64) == "data:,"


def test_curves_keep_the_last_of_a_repeated_step_and_forgive_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 3}\n{"step": 2, "train/loss": 9}\n{"step": 2, "train/loss": 2}\n{"st')
    (curve,) = training.curves(path.read_text()).values()
    np.testing.assert_array_equal(curve, [[1, 2], [3, 2]])


def test_validations_have_the_examples_and_processor_time_until_then():
    rows = (
        {"step": 2, "examples": 8, "processor_s": 1.0, "train/loss": 9},
        {"step": 2, "validation/loss": 4, "validation/within_1_km": 0.0},
        {"step": 4, "examples": 16, "processor_s": 3.0},
        {"step": 5, "validation/loss": 3, "validation/within_1_km": 0.5},
        {"step": 4, "examples": 16, "processor_s": 2.0},
    )
    assert training.validations("\n".join(map(json.dumps, rows)) + '\n{"st') == [
        {"examples": 8, "processor_s": 1.0, "loss": 4, "within_1_km": 0.0},
        {"examples": 16, "processor_s": 2.0, "loss": 3, "within_1_km": 0.5},
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 100), (1.61, 3.9), (-0.3, 0.2), (0, 0), (12, 150_000)])
def test_ticks_are_few_round_and_enclose_the_range(low, high):
    ticks = chart._ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1] + 1e-9
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])


def test_an_axis_of_zeros_ends_at_one():
    assert chart._ticks(0.0, 0.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize("guess", [(10.0, 20.0), (10.001, 20.001), (-89.0, 179.0), (80.0, -179.9)])
def test_a_small_map_shows_truth_and_prediction(guess):
    points = {"truth": np.array([(10.0, 20.0)]), "guess": np.array([guess])}
    drawn = worldmap.small_map(points, "map", ("truth", "guess"))
    left, top, width, height = map(float, re.search(r'viewBox="([^"]*)"', drawn)[1].split())
    assert width == pytest.approx(2 * height, abs=0.02)
    assert 0 <= left <= left + width <= 360 and 0 <= top <= top + height <= 180
    for latitude, longitude in [(10.0, 20.0), guess]:
        assert left <= longitude + 180 <= left + width
        assert top <= 90 - latitude <= top + height


def test_the_world_is_drawn_without_the_relief_too(monkeypatch):
    monkeypatch.setattr(worldmap.importlib.util, "find_spec", lambda name: None)
    assert "<image" not in worldmap.background()
    assert "graticule" in worldmap.background()


def test_a_reference_that_does_not_say_how_sure_it_is_gets_no_charts(made, config):
    other = config.changed(dict(evaluate=dict(reference="top1_neighbor")), "")
    report_stage.run(other, Workdir(made))
    page, checked = read(made)
    assert "state no uncertainty" in " ".join(checked.text)
    assert "accuracy of the most certain photos" not in page
    metrics = json.loads((made / "report" / "metrics.json").read_text())
    assert metrics["splits"]["test"]["uncertainty"] is None
    assert "stated uncertainty of Top-1" not in table(metrics) and "stated uncertainty of GeoToken" in table(metrics)


def test_the_metrics_have_what_is_left_without_the_photos_that_the_gallery_knows(made, config):
    report_stage.run(config, Workdir(made))
    metrics = json.loads((made / "report" / "metrics.json").read_text())
    clean = metrics["splits"]["test"]["clean"]
    assert (clean["photos"], clean["left_out"]) == (35, {"same id": 0, "near-duplicate": 1, "same author": 4})
    assert [m["variant"] for m in clean["methods"]] == ["top1_neighbor", "geotoken", "without_neighbor_tokens"]
    assert metrics["splits"]["validation"]["clean"]["photos"] == 40
    assert "test: stated uncertainty of GeoToken: greedy" in table(metrics)


def test_a_chart_has_intervals_and_no_number_outside_of_it():
    x = np.array([5.0, 50.0, 95.0])
    series = [chart.Series("s", 0, x, x, x - 1, x + 1, notes=["<a>", "b", "c"])]
    drawn = chart.Chart("c", "t", "x", "y", series).svg()
    assert drawn.count('class="whisker"') == drawn.count(' at" d=') == 3
    assert "&lt;a&gt;" in drawn and "<a>" not in drawn
    across = [float(at) for at in re.findall(r'<text x="([\d.]+)" y="291', drawn)]
    assert len(across) == 4 and min(across) >= 62 and max(across) <= 458  # labels 20, 40, 60, 80
    labels = ["0.5", "25", "1,000", "150k", "100M", "3e11"]
    assert [chart.label(value) for value in (0.5, 25, 1000, 150_000, 1e8, 3e11)] == labels


def test_a_table_escapes_what_comes_from_data_and_shows_intervals_alike():
    estimate = {"value": 0.5, "low": 0.25, "high": 0.751}
    cells = ["<a>", tables.interval(estimate), tables.interval(None), tables.points(estimate)]
    made = tables.Table(["n<m", "b", "c", "d", "e"], [tables.Group([tables.Row("<b>", cells, "bound")], "g&h", "n")])
    drawn = made.html()
    read = Checked()
    read.feed(drawn)
    assert read.open == [] and "<b>" not in drawn and "<a>" not in drawn
    assert "<td>50.0<small>25.0\N{EN DASH}75.1</small></td><td>\N{EN DASH}</td>" in drawn
    assert '<span class="up">+50.0</span><small>+25.0 to +75.1</small>' in drawn and '<tr class="bound">' in drawn
    lines = tables.plain(["run", "loss"], [["a", "1.5"], ["b", "2"]]).markdown().splitlines()
    assert lines == ["| run | loss |", "|---|---:|", "| a | 1.5 |", "| b | 2 |"]
