"""Benchmarks with and without exclusion, on six gallery photos and four benchmark photos that are counted by hand."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from data_prep import neighbors, photos, tokens
from geotoken_jax import checkpoint, configuration, manifests
from geotoken_jax.analysis import evaluate as scores
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import Table, index_vectors, write_shard
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.manifests import StageError
from geotoken_jax.stages import baselines, evaluate, exclusion, predict
from geotoken_jax.workdir import TOP1, Workdir
from tests import fixtures, tiny
from tests.test_sources import jpeg, write_csv, write_files

#: Cosine of the two image vectors of a photo and its second nearest.
NEAR = 0.9


def direction(axis: int, cosine: float = 1.0, other: int = 11) -> np.ndarray:
    """Returns a unit vector with a cosine to the vector of an axis."""
    vector = np.zeros(fixtures.C)
    vector[axis], vector[other] = cosine, np.sqrt(1 - cosine**2)
    return vector


#: Gallery photo -> author, coordinates and image vector. Anna has two of them.
GALLERY = {
    "g0": ("anna", (0.0, 20.0), direction(0)),
    "g1": ("ben", (0.0, 25.0), direction(0, NEAR, 5)),
    "g2": ("anna", (0.0, 30.0), direction(1)),
    "g3": ("carl", (10.0, 30.0), direction(1, 0.8, 9)),
    "g4": ("dora", (40.0, 40.0), direction(2)),
    "g5": ("emil", (40.1, 40.0), direction(2, NEAR, 10)),
}
#: Photos of the benchmark, each at the place of the gallery photo that is nearest to its image vector. The first and
#: the third have the image vector of that photo too, and two are Anna's.
BENCHMARK = {
    "b0": ("anna", GALLERY["g0"][1], direction(0)),
    "b1": ("anna", GALLERY["g2"][1], direction(1, NEAR, 8)),
    "b2": ("", GALLERY["g4"][1], direction(2)),
    "b3": ("zoe", GALLERY["g1"][1], NEAR * GALLERY["g1"][2] + np.sqrt(1 - NEAR**2) * direction(6)),
}
#: Percent within 1, 25, 200, 750 and 2,500 km of the nearest remaining gallery photo. Without exclusion all four photos
#: are placed exactly.
#: Without Anna's photos, b0 is placed at g1, 5 degrees or 556 km away, and b1 at g3, 10 degrees or 1,112 km away.
#: Without near duplicates, b0 is placed at g1, and b2 at g5, 0.1 degrees or 11 km away.
ACCURACY = {
    "": (100, 100, 100, 100, 100),
    "same_author": (50, 50, 50, 75, 100),
    "near_duplicate": (50, 75, 75, 100, 100),
    "both": (25, 50, 50, 75, 100),
}
#: Photos that a rule affects (b0 and b1; b0 and b2; all three), and gallery photos that it excludes (g0 and g2; g0 and
#: g4; all three). The neighbors of exactly the affected photos change, and three of six gallery photos always remain.
COUNTS = {
    "same_author": dict(photos=2, gallery=2, neighbors=2, fewer=0),
    "near_duplicate": dict(photos=2, gallery=2, neighbors=2, fewer=0),
    "both": dict(photos=3, gallery=3, neighbors=3, fewer=0),
}


def settings(path: Path) -> Config:
    """Returns a configuration with a folder of gallery photos and a benchmark, both written to `path`."""
    for n, (name, of) in enumerate({"gallery": GALLERY, "bench": BENCHMARK}.items()):
        write_files(path / name, {f"{photo}.jpg": jpeg((40 * k, 90 * n, 7 * k)) for k, photo in enumerate(of)})
        rows = [[photo, author, *at] for photo, (author, at, _) in of.items()]
        header = ["id", "photographer" if name == "bench" else "author", "latitude", "longitude"]
        write_csv(path / f"{name}.csv", header, rows)
    config: Any = tiny.get_config()
    config.photos.update(source="folder", workers=1, max_dropped=0.0)
    config.photos.folder.update(
        path=str(path / "gallery"), csv=str(path / "gallery.csv"), train=1.0, validation=0.0, test=0.0
    )
    config.benchmarks.photos.labeled.update(
        path=str(path / "bench"), table=str(path / "bench.csv"), author="photographer"
    )
    config.index.neighbors.count = config.baselines.knn.neighbors = fixtures.M
    config.model.update({**vars(fixtures.settings("compact"))})
    config.variants = dict(geotoken=dict())
    config.predict.update(samples=2, batch_size=4, selectors=("greedy",), choice="greedy")
    config.predict.search.update(expansions=16, level=6, leaves=4, width=4)
    config.evaluate.update(resamples=2_000, reference=TOP1)
    return configuration.read(config)


def indexed(path: Path, config: Config) -> None:
    """Makes photos/, tables with the vectors above, and neighbors/."""
    photos.run(config, Workdir(path))
    for folder, parts in (("gallery", {"train": GALLERY}), ("queries", {"labeled": BENCHMARK})):
        stage = manifests.begin(path, folder, {}, ["photos"])
        for split, of in parts.items():
            coordinates = np.array([at for _, at, _ in of.values()])
            vectors = np.stack([vector for *_, vector in of.values()])
            columns = {
                "embeddings": np.repeat(vectors[:, None], 3, axis=1).astype(ml_dtypes.bfloat16),
                "coordinates": coordinates,
                "tokens": CellScheme(20, 1).encode(*coordinates.T).astype(np.uint8),
                "ids": np.array([name.encode() for name in of]),
                "authors": np.array([(author or name).encode() for name, (author, *_) in of.items()]),
            }
            write_shard(stage.path if folder == "gallery" else stage.path / split, 0, 1, columns)
        if folder == "gallery":
            index.build(index_vectors(Table(stage.path).embeddings()), config.index.search, stage.path / "index")
        stage.finish({split: len(of) for split, of in parts.items()}, index={"kind": "exact"})
    counts = {"train": len(GALLERY), "labeled": len(BENCHMARK)}
    manifests.begin(path, "features", {}, ["photos"]).finish(counts)
    neighbors.run(config, Workdir(path))
    tokens.run(config, Workdir(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Config]:
    """A work directory with all predictions and a report, and its configuration."""
    path = tmp_path_factory.mktemp("exclusion")
    config = settings(path)
    path = path / "run"
    indexed(path, config)
    stage = manifests.begin(path, "geotoken/geotoken", config.select("model"), ["tokens", "gallery"])
    state = nnx.to_pure_dict(nnx.state(fixtures.model("compact"), nnx.Param))
    checkpoint.write_parameters(stage.path / "parameters.safetensors", jax.tree.map(np.asarray, state))
    stage.finish({})
    folder = Workdir(path)
    exclusion.run(config, folder)
    for name in (TOP1, "knn"):
        baselines.run(config, folder, name)
        baselines.run_excluded(config, folder, name)
    predict.run(config, folder, "geotoken")
    predict.run_excluded(config, folder, "geotoken")
    evaluate.run(config, folder)
    return path, config


def percent(row) -> tuple[float, ...]:
    return tuple(round(100 * estimate["value"], 4) for estimate in row["accuracy"])


@pytest.mark.slow
def test_counts_and_accuracies_are_those_by_hand(made):
    path, _ = made
    found = Workdir(path).metrics()["splits"]["labeled"]
    assert (found["photos"], found["authors"]) == (4, 3)  # Anna, Zoe and one unknown author
    assert found["exclusion"]["unknown_authors"] == 1 and found["exclusion"]["rules"] == COUNTS
    (top1,) = (row for row in found["exclusion"]["methods"] if row["variant"] == TOP1)
    assert percent(top1) == ACCURACY[""] == percent(next(row for row in found["methods"] if row["variant"] == TOP1))
    for rules, row in top1["rules"].items():
        assert percent(row) == ACCURACY[rules]
        changes = [100 * estimate["value"] for estimate in row["change"]["accuracy"]]
        np.testing.assert_allclose(changes, np.subtract(ACCURACY[rules], ACCURACY[""]), atol=1e-3)
    # Within 1 km, Anna's two photos are wrong without her photos, and the other two authors' photos are right. Of the
    # 27 equally probable resamples of three authors, one has Anna only, and eight do not have her.
    interval = top1["rules"]["same_author"]["accuracy"][0]
    assert (interval["low"], interval["high"]) == (0.0, 1.0)
    assert {row["variant"] for row in found["exclusion"]["methods"]} == {TOP1, "knn", "geotoken"}


@pytest.mark.slow
def test_the_report_and_the_text_have_the_same_numbers(made):
    path, _ = made
    text = scores.table(Workdir(path).metrics())
    assert "authors known of 3 of 4 photos" in text
    assert re.search(r"both +3 +3 +3 +0\n", text)
    line = next(line for line in text.splitlines() if line.startswith("Top-1 neighbor: both"))
    assert line.split()[3:] == ["25.0", "50.0", "50.0", "75.0", "100.0"]
    page = (path / "report" / "index.html").read_text()
    section = page.partition('id="exclusion"')[2].partition("</section>")[0]
    assert "authors known of 3 photos" in section and "without same author" in section
    row = section.partition("without both")[2].partition("</tr>")[0]
    assert re.findall(r">(\d+\.\d)<", row) == ["25.0", "50.0", "50.0", "75.0", "100.0"]


def test_no_excluded_photo_is_a_neighbor_of_an_answer(made):
    path, _ = made
    allowed = {
        "same_author": {"b0": {"g0", "g2"}, "b1": {"g0", "g2"}},
        "near_duplicate": {"b0": {"g0"}, "b2": {"g4"}},
        "both": {"b0": {"g0", "g2"}, "b1": {"g0", "g2"}, "b2": {"g4"}},
    }
    for rules, excluded in allowed.items():
        for variant in (TOP1, "geotoken"):
            lines = (path / "excluded" / variant / f"labeled-{rules}.jsonl").read_text().splitlines()
            rows = {row["id"]: [n["id"] for n in row["neighbors"]] for row in map(json.loads, lines)}
            assert list(rows) == list(BENCHMARK)
            for name, near in rows.items():
                assert len(near) == fixtures.M and not excluded.get(name, set()) & set(near)


def test_other_rules_are_named_with_what_to_do(made):
    path, config = made
    changed = config.changed({"benchmarks": {"exclude": {"same_author": dict(author=True, cosine_above=1.0,
                                                                             within_km=5.0)}}}, "test")  # fmt: skip
    with pytest.raises(StageError, match=r"config.benchmarks.exclude.* was made with .*--remake=predict"):
        exclusion.run(changed, Workdir(path))


def test_a_work_directory_without_benchmarks_has_no_exclusion(tmp_path):
    manifests.begin(tmp_path, "photos", {}, ()).finish({"test": 1})
    assert exclusion.run(configuration.read(tiny.get_config()), Workdir(tmp_path)) == []
    assert Workdir(tmp_path).counts_under_rules == {}
