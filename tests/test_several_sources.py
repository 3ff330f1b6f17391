"""Several sources in one gallery: two folders with the same file names, the same authors and copies of pictures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from data_prep import photos
from geotoken_jax import GeoToken, configuration, records
from geotoken_jax.analysis import overlap
from geotoken_jax.analysis.coordinates import CoordinateTable
from geotoken_jax.gallery.exclude import ExcludeSettings, check_source, without_source
from geotoken_jax.gallery.table import COLUMNS, Table, write_shard
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import audit, exclusion
from geotoken_jax.workdir import Workdir
from tests import tiny
from tests.test_end_to_end import geotoken
from tests.test_sources import write_csv, write_files

#: Photos per folder, and photos of the second folder that are copies of photos of the first one.
N, COPIES = 60, 3
#: The authors, who are in both folders.
AUTHORS = tuple(f"author{n}" for n in range(20))


def picture(seed: int, quality: int = 90, side: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    image.resize((side, side), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


def place(n: int) -> tuple[float, float]:
    return -50 + 1.5 * (n % N), 10 * (n % 7)


def write_folder(path: Path, first: int, count: int = N) -> None:
    """Writes the photos `0.jpg`, `1.jpg`, ... and their table. Photo n has the picture and the place first + n."""
    write_files(path, {f"{n}.jpg": picture(first + n) for n in range(count)})
    rows = [[f"{n}.jpg", AUTHORS[n % len(AUTHORS)], *place(first + n)] for n in range(count)]
    write_csv(path / "photos.csv", ["id", "author", "latitude", "longitude"], rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders a and b. The last photos of b are smaller copies of the first photos of a."""
    path = tmp_path_factory.mktemp("folders")
    write_folder(path / "a", 0)
    write_folder(path / "b", 100)
    for n in range(COPIES):
        (path / "b" / f"{N - 1 - n}.jpg").write_bytes(picture(n, quality=60, side=40))
    write_folder(path / "bench", 300, 10)
    return path


def mix(config: Any, folders: Path, **changes: dict[str, Any]) -> Any:
    """Changes a configuration: its photos are those of the folders a and b. changes: further keys of a source."""
    config.photos.update(workers=1, max_dropped=0.0)
    config.photos.folder.update(train=1.0, validation=0.0, test=0.0, photos_per_shard=17)
    config.photos.sources = {
        name: {
            "kind": "folder",
            "path": str(folders / name),
            "csv": str(folders / name / "photos.csv"),
            **changes.get(name, {}),
        }
        for name in ("a", "b")
    }
    return config


def prepare(workdir: Path, folders: Path, workers: int = 1, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Makes photos/ and returns the photos of `train`."""
    config = mix(common.get_config(), folders, **changes)
    config.photos.workers = workers
    photos.run(configuration.read(config), Workdir(workdir))
    found = records.Photos(workdir / "photos", "train")
    return [found[n] for n in range(len(found))]


def manifest(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "photos" / "manifest.json").read_text())


def test_ids_and_authors_of_two_folders_stay_apart(folders, tmp_path):
    found = prepare(tmp_path, folders)
    assert len({photo["id"] for photo in found}) == len(found) == 2 * N
    assert {photo["id"] for photo in found} == {f"{name}/{n}.jpg" for name in "ab" for n in range(N)}
    assert {photo["author"] for photo in found} == {f"{name}/{author}" for name in "ab" for author in AUTHORS}
    assert all(photo["id"].startswith(f"{photo['source']}/") for photo in found)
    assert manifest(tmp_path)["facts"]["sources"] == {"a": {"train": N}, "b": {"train": N}}
    duplicates = (tmp_path / "photos" / "duplicates.jsonl").read_text().splitlines()
    assert [[photo["id"] for photo in json.loads(line)] for line in duplicates] == [
        [f"a/{n}.jpg", f"b/{N - 1 - n}.jpg"] for n in range(COPIES)
    ]


def test_sources_of_one_origin_have_common_authors(folders, tmp_path):
    found = prepare(tmp_path, folders, a={"origin": "club"}, b={"origin": "club"})
    assert {photo["author"] for photo in found} == {f"club/{author}" for author in AUTHORS}
    assert len({photo["id"] for photo in found}) == 2 * N


def test_an_unknown_author_stays_unknown(folders, tmp_path):
    rows = [[f"{n}.jpg", *place(n)] for n in range(N)]
    table = write_csv(tmp_path / "photos.csv", ["id", "latitude", "longitude"], rows)
    found = prepare(tmp_path / "run", folders, a={"csv": table})
    assert all(photo["author"] == photo["id"] for photo in found if photo["source"] == "a")


@pytest.mark.slow
def test_a_cap_draws_the_same_photos_for_any_shards_and_workers(folders, tmp_path):
    drawn = {}
    for name, cap, workers, per_shard in (
        ("one", 20, 1, 17),
        ("two", 20, 2, 17),
        ("shards", 20, 1, 9),
        ("few", 8, 1, 17),
    ):
        changes = {"cap": cap, "photos_per_shard": per_shard}
        found = prepare(tmp_path / name, folders, workers, b=changes)
        assert sum(photo["source"] == "a" for photo in found) == N
        drawn[name] = {photo["id"] for photo in found if photo["source"] == "b"}
    assert drawn["one"] == drawn["two"] == drawn["shards"] and drawn["few"] < drawn["one"]
    assert [len(drawn[name]) for name in ("one", "few")] == [20, 8]
    numbers = sorted(int(name[2:-4]) for name in drawn["one"])
    assert numbers != list(range(20)) and numbers != list(range(N - 20, N))
    made = manifest(tmp_path / "one")
    assert made["counts"] == {"train": N + 20} and made["dropped"] == {"over the cap of its source": N - 20}
    assert made["facts"]["sources"]["b"] == {"train": 20}
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "photos").rglob("*") if file.is_file()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_a_small_cap_does_not_raise_the_share_of_dropped_photos(folders, tmp_path):
    rows = [[f"{n}.jpg", *place(n)] for n in range(N)] + [["missing.jpg", 0, 10]]
    table = write_csv(tmp_path / "photos.csv", ["id", "latitude", "longitude"], rows)
    config = mix(common.get_config(), folders, a={"cap": 2, "csv": table}, b={"cap": 2})
    config.photos.max_dropped = 0.05  # one of 121 photos is dropped, and 4 are kept
    (made,) = photos.run(configuration.read(config), Workdir(tmp_path / "run"))
    assert made.counts == {"train": 4} and made.dropped["no image"] == 1


def test_an_interruption_while_photos_over_the_cap_are_removed_ends_in_the_same_bytes(folders, tmp_path, monkeypatch):
    def stop(task):
        if task.shard > 5:
            raise KeyboardInterrupt
        return remove(task)

    whole, remove = tmp_path / "whole", photos._remove_left_out
    prepare(whole, folders, b={"cap": 20})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(photos, "_remove_left_out", stop)
        prepare(tmp_path / "again", folders, b={"cap": 20})
    prepare(tmp_path / "again", folders, b={"cap": 20})
    paths = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert all((tmp_path / "again" / path).read_bytes() == (whole / path).read_bytes() for path in paths)


def test_a_picture_in_the_test_split_of_one_source_is_left_out_of_the_training_of_another(folders, tmp_path):
    shares = {"train": 0.0, "test": 1.0}
    found = prepare(tmp_path, folders, a=shares)
    assert {photo["id"] for photo in found} == {f"b/{n}.jpg" for n in range(N - COPIES)}
    assert manifest(tmp_path)["dropped"] == {"duplicate in another split": COPIES}


def test_other_kinds_of_sources_can_be_mixed(folders, tmp_path):
    config = common.get_config()
    config.photos.update(workers=1)
    config.photos.earthview.update(places=40, train=20, validation=4, test=4, test_unseen=4, test_shift=0)
    config.photos.sources = {
        "maps": {"kind": "earthview", "cap": 5},
        "trips": {"kind": "folder", "path": str(folders / "a"), "csv": str(folders / "a" / "photos.csv")},
    }
    photos.run(configuration.read(config), Workdir(tmp_path))
    made = manifest(tmp_path)
    assert made["facts"]["sources"]["maps"] == {"train": 5, "validation": 4, "test": 4, "test_unseen": 4}
    assert sum(made["facts"]["sources"]["trips"].values()) == N
    assert made["facts"]["provenance"]["license"] == "other"
    origin = made["facts"]["provenance"]["origin"]
    assert "EarthView" in origin and "has not described" in origin


def configured(folders: Path) -> Any:
    """Returns a configuration of all stages. Photos of an evaluation have neighbors of other sources only."""
    config: Any = mix(tiny.get_config(), folders, a=dict(cap=30))
    config.photos.folder.update(train=0.6, validation=0.2, test=0.2)
    bench = folders / "bench"
    config.benchmarks.photos.labeled.update(path=str(bench), table=str(bench / "photos.csv"))
    config.benchmarks.exclude = dict(
        same_author=dict(author=True, cosine_above=1.0, within_km=0.0),
        not_a=dict(author=False, cosine_above=1.0, within_km=0.0, source="a"),
    )
    config.index.neighbors.exclude_in_evaluation.source = "own"
    config.pools.photos = 30
    config.variants = dict(geotoken=dict())
    return config


#: File for --config.
FILE = """
from pathlib import Path
from tests import test_several_sources

def get_config():
    return test_several_sources.configured(Path({folders!r}))
"""


@pytest.fixture(scope="module")
def arguments(folders, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("several")
    (path / "several.py").write_text(FILE.format(folders=str(folders)))
    return [f"--config={path / 'several.py'}", f"--workdir={path / 'run'}"]


@pytest.fixture(scope="module")
def indexed(arguments) -> Workdir:
    """A work directory with all results of the stages up to `index`."""
    for stage in ("prepare", "embed", "align", "index"):
        assert geotoken(stage, *arguments) == 0
    return Workdir(arguments[1].partition("=")[2])


@pytest.mark.slow
def test_tables_have_the_source_of_each_photo(indexed):
    gallery = indexed.gallery
    assert set(gallery.sources().tolist()) == {b"a", b"b"} and (gallery.sources() == b"a").sum() == 30
    for table in (gallery, indexed.table("test"), indexed.table("train_views")):
        assert [name.split(b"/")[0] for name in table.ids().tolist()] == table.sources().tolist()
    assert set(indexed.table("labeled").sources().tolist()) == {b""}
    for folder, column in (("features", "source"), ("gallery", "sources")):
        schema = json.loads((indexed.path / folder / "schema.json").read_text())
        assert column in {field["name"] for field in schema["fields"]}
    assert indexed.features("test")[:]["source"].tolist() == indexed.table("test").sources().tolist()


@pytest.mark.slow
def test_a_photo_has_neighbors_of_other_sources_only_if_the_rules_say_so(indexed):
    sources = indexed.gallery.sources()
    for split, own in (("train", True), ("validation", False), ("test", False)):
        rows, _ = indexed.neighbors(split)
        assert (rows >= 0).all()
        assert (sources[rows] == indexed.table(split).sources()[:, None]).any() == own
    rows, _ = indexed.neighbors("labeled")
    assert set(sources[rows].ravel().tolist()) == {b"a", b"b"}  # a benchmark has no source


def test_rules_for_benchmarks_see_through_the_names_of_sources(indexed, folders):
    config = configuration.read(configured(folders))
    exclusion.run(config, indexed)
    gallery, bench = indexed.gallery, indexed.table("labeled")
    authors, ids = without_source(gallery.authors()), without_source(gallery.ids())
    rows = {name: indexed.neighbors(f"labeled-{name}")[0] for name in config.benchmarks.exclude}
    rows[""] = indexed.neighbors("labeled")[0]
    for found in rows.values():  # the photos have names that gallery photos of both folders have too
        assert np.isin(bench.ids(), ids).any() and not (ids[found] == bench.ids()[:, None]).any()
    same_author = {name: (authors[found] == bench.authors()[:, None]).any() for name, found in rows.items()}
    assert same_author == {"": True, "same_author": False, "not_a": True}
    assert set(gallery.sources()[rows["not_a"]].ravel().tolist()) == {b"b"}
    counts = indexed.exclusion_facts()["labeled"]["rules"]
    assert counts["not_a"]["gallery"] == 30 and counts["not_a"]["photos"] == len(bench)
    assert counts["same_author"]["gallery"] == np.isin(authors, bench.authors()).sum() > 0


def test_leaks_of_a_benchmark_are_found_in_all_sources(indexed):
    bench, gallery = indexed.table("labeled"), indexed.gallery
    extra = [{"author": name.decode()} for name in bench.authors().tolist()]
    ids = [name.decode() for name in bench.ids().tolist()]
    truth = CoordinateTable("labeled", ids, bench.coordinates(), np.zeros((len(ids), 0, 2)), False, extra)
    leaks = overlap.find_leaks(indexed, {"labeled": truth}, 2.0)["labeled"]
    assert (leaks.leaked("same id") == np.isin(bench.ids(), without_source(gallery.ids()))).all()
    assert leaks.leaked("same author").any() and leaks.leaked("same id").any()
    assert not np.isin(bench.authors(), gallery.authors()).any()


def test_an_unknown_source_of_a_rule_is_refused(indexed, tmp_path):
    rules = ExcludeSettings(False, 1.0, 0.0, "c")
    with pytest.raises(SettingsError, match=r"^config\.benchmarks\.exclude\.x\.source is 'c': use own, one of a, b"):
        check_source(rules, "benchmarks.exclude.x", indexed.gallery)
    columns = {name: getattr(indexed.gallery, name)() for name in COLUMNS if name != "sources"}
    write_shard(tmp_path, 0, 1, columns)
    with pytest.raises(SettingsError, match="source is 'c', but the gallery has one source: set it to ''"):
        check_source(rules, "benchmarks.exclude.x", Table(tmp_path))


def test_the_neighbors_audit_has_the_sources(indexed, folders):
    config = configuration.read(configured(folders))
    audit.run(config, indexed, "neighbors")
    figures = json.loads((indexed.path / "audit" / "neighbors" / "figures.json").read_text())
    pairs = {(of["photo"], of["neighbor"]): of for of in figures["splits"]["test"]["by_source"]}
    assert pairs.keys() == {("a", "b"), ("b", "a")}
    test = indexed.table("test")
    first = indexed.gallery.coordinates(indexed.neighbors("test")[0][:, 0])
    km = great_circle_km(*test.coordinates().T, *first.T)
    for (photo, _), of in pairs.items():
        of_source = np.asarray(km)[test.sources() == photo.encode()]
        assert of["photos"] == len(of_source)
        assert of["within"] == {
            str(limit): pytest.approx((of_source <= limit).mean(), abs=1e-6) for limit in THRESHOLDS_KM
        }
    assert "a, neighbor b" in audit.TABLES["neighbors"](figures)
    assert "a, neighbor from b" in (indexed.path / "audit" / "neighbors" / "index.html").read_text()


@pytest.mark.slow
def test_all_stages_work_with_several_sources(indexed, arguments):
    assert geotoken("all", *arguments) == 0
    made = indexed.manifest("reranker/geotoken")
    assert made.settings["reranker"]["model"]["sources"] is True
    assert any("of another source" in name and weight for name, weight in made.facts["weights"].items())
    answer = GeoToken.load(indexed.path / "export").predict(Image.new("RGB", (20, 20)))
    assert -90 <= answer.latitude <= 90
    assert not list((indexed.path / "export").glob("thumbnails*"))  # photos of people, unlike those of EarthView
    assert geotoken("audit", "coverage", *arguments) == 0
    figures = json.loads((indexed.path / "audit" / "coverage" / "figures.json").read_text())
    counted = {of["name"]: (of["photos"], of["test"], of["labeled"]) for of in figures["density"]["sources"]}
    sources = indexed.table("test").sources()
    assert counted == {
        name: ((indexed.gallery.sources() == name.encode()).sum(), (sources == name.encode()).sum(), 0) for name in "ab"
    }
    regions = {of["name"]: of["gallery"] for of in figures["masked"]["regions"] if of["kind"] == "source"}
    assert regions == {name: of[0] for name, of in counted.items()}
    assert geotoken("verify", arguments[1].partition("=")[2]) == 0
    assert geotoken("all", *arguments) == 0


REFUSED = {
    "sources.b.kind is 'fodler': use one of earthview, mp16_pro, folder": {"b": {"kind": "fodler"}},
    "sources.b.cap is -1: use the largest number of train photos, or 0 for all": {"b": {"cap": -1}},
    "sources.b.cap is True": {"b": {"cap": True}},
    "sources.b.pth is not a known key: use one of path, csv": {"b": {"pth": "x"}},
    "sources.b.origin is 'The Club'": {"b": {"origin": "The Club"}},
    "sources.b has the shares .*: set train, validation and test to 0 or more": {"b": {"train": 3.0}},
    "sources.b.photos_per_shard is 0: use 1 or more": {"b": {"photos_per_shard": 0}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_settings_are_refused_by_their_full_key(folders, message):
    with pytest.raises(SettingsError, match=f"^config.photos.{message}"):
        configuration.read(mix(common.get_config(), folders, **REFUSED[message]))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {"kind": "folder"}}, "config.photos.sources has only 'a': name two sources or more, or use source"),
        (
            {"own": {"kind": "folder"}, "b": {"kind": "folder"}},
            "config.photos.sources has the name 'own': use up to 32",
        ),
        (
            {"A b": {"kind": "folder"}, "b": {"kind": "folder"}},
            "config.photos.sources has the name 'A b': use up to 32",
        ),
        ({"a": "folder", "b": "folder"}, "config.photos.sources.a is 'folder': use a section, as in dict"),
    ],
)
def test_wrong_names_are_refused(sources, message):
    config: Any = common.get_config()
    config.photos.sources = ConfigDict(sources)
    with pytest.raises(SettingsError, match=message):
        configuration.read(config)


def test_a_missing_folder_is_named_by_the_key_of_its_source(folders, tmp_path):
    with pytest.raises(SettingsError, match=r"config\.photos\.sources\.b\.path is '/none', which is not a folder"):
        prepare(tmp_path, folders, b={"path": "/none"})


def test_a_change_of_one_folder_is_found(folders, tmp_path):
    write_folder(tmp_path / "a", 500, 20)
    write_folder(tmp_path / "b", 600, 20)
    prepare(tmp_path / "run", tmp_path)
    (tmp_path / "b" / "3.jpg").write_bytes(picture(7))
    with pytest.raises(Exception, match=r"1 changed, such as 'b: 3.jpg'"):
        prepare(tmp_path / "run", tmp_path)


def test_one_source_has_no_trace_of_several(folders, tmp_path):
    config = common.get_config()
    config.photos.update(source="folder", workers=1)
    config.photos.folder.update(path=str(folders / "a"), csv=str(folders / "a" / "photos.csv"))
    (made,) = photos.run(configuration.read(config), Workdir(tmp_path))
    assert made.settings["photos"].keys() == {"source", "folder"}
    assert made.facts.keys() == {"provenance", "duplicates", "captured", "nonsense_times"}
    assert "source" not in records.Photos(tmp_path / "photos", "train")[0]
    assert records.Photos(tmp_path / "photos", "train")[0]["id"] in {f"{n}.jpg" for n in range(N)}
    selected = configuration.read(config).select("index.neighbors", "benchmarks.exclude", "reranker")
    assert selected["index"]["neighbors"]["exclude"] == {"author": False, "cosine_above": 1.0, "within_km": 0.0}
    assert all(
        rules.keys() == {"author", "cosine_above", "within_km"} for rules in selected["benchmarks"]["exclude"].values()
    )
    assert "sources" not in selected["reranker"]["model"]


def test_names_lose_the_source_before_them():
    names = np.array([b"a/x.jpg", b"street/y/z.jpg", b"b/"])
    assert without_source(names).tolist() == [b"x.jpg", b"y/z.jpg", b""]
