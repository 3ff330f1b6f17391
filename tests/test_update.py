"""Photos added to the source of a finished work directory: taken in at their own cost, interrupted or not."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import mp16
from data_prep import embed, gallery, index, neighbors, photos, sharded, tokens
from data_prep.sources.benchmarks import Benchmark, WithBenchmarks
from geotoken_jax import configuration, disk, manifests, preparation
from geotoken_jax.manifests import StageError
from geotoken_jax.workdir import Workdir
from tests import sample, test_mp16_pro, tiny
from tests.test_sources import exif, jpeg, write_csv, write_files

DATA = ("photos", "features", "queries", "gallery", "neighbors", "tokens")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, rows in ((embed, 6), (gallery, 8), (neighbors, 5), (tokens, 12)):
        monkeypatch.setattr(module, "_SHARD", rows)
    monkeypatch.setattr(sharded, "_START_S", 0)


def made_of(numbers) -> dict[str, bytes]:
    colors = {n: (37 * n % 256, 91 * n % 256, 151 * n % 256) for n in numbers}
    return {f"{n:03d}.jpg": jpeg(colors[n], exif=exif(n % 60, n % 90)) for n in numbers}


def rows(numbers) -> list[list[Any]]:
    return [[f"{n:03d}.jpg", n % 60, n % 90, f"author {n // 2}"] for n in numbers]


def config(path: Path, csv: Path | None = None) -> configuration.Config:
    made: Any = tiny.get_config()
    made.photos.update(source="folder", workers=1, max_dropped=0.5)
    made.photos.duplicates.keep = True
    made.photos.folder.update(
        path=str(path), csv=str(csv or ""), train=0.7, validation=0.3, test=0.0, photos_per_shard=7
    )
    made.embed.views.count = 0
    made.index.search.shard_rows = 10
    made.index.neighbors.exclude.author = bool(csv)
    return configuration.read(made)


def run(config: configuration.Config, path: Path, update: bool = False) -> list[str]:
    """Runs prepare, embed and index, and returns the folders that they made."""
    folders = []
    for stage in (photos, embed, index):
        folder = Workdir(path, update)
        if stage is index and not (path / "align").exists():
            sample.aligned(path, config)
        stage.run(config, folder)
        folders += sorted(folder.made)
    return folders


def contents(path: Path) -> dict[str, bytes]:
    files = [file for name in DATA for file in (path / name).rglob("*") if file.is_file()]
    skipped = ("source.json", "files.json")
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.name not in skipped}


def add(source: Path, csv: Path | None, first: int, end: int) -> None:
    write_files(source, {name: data for name, data in made_of(range(first, end)).items() if name != "150.jpg"})
    if csv:
        with csv.open("a") as file:
            file.writelines(",".join(map(str, row)) + "\n" for row in rows(range(first, end)))


@pytest.fixture(params=[False, True], ids=["exif", "csv"])
def grown(request, tmp_path: Path):
    """A finished work directory of 40 photos, to whose source 15 were added: source, CSV and work directory."""
    source, csv = tmp_path / "source", tmp_path / "table.csv" if request.param else None
    write_files(source, made_of([*range(100, 140)]) | {"150.jpg": made_of([150])["150.jpg"]})
    if csv:
        write_csv(csv, ["id", "latitude", "longitude", "author"], rows(range(100, 141)))  # 140.jpg is missing
    run(config(source, csv), tmp_path / "run")
    add(source, None, 140, 141)
    add(source, csv, 90, 100)
    add(source, csv, 150, 155)
    return source, csv, tmp_path / "run"


def ids(path: Path, split: str) -> list[str]:
    return Workdir(path).table(split).ids().astype(str).tolist()


@pytest.mark.slow
def test_added_photos_are_taken_in_and_shards_before_them_are_kept(grown, tmp_path, capsys):
    source, csv, path = grown
    made_with = config(source, csv)
    with pytest.raises(StageError, match=r"added, such as '090.jpg'.*add the new photos with --update"):
        run(made_with, path)
    before, order = contents(path), {split: ids(path, split) for split in ("train", "validation")}
    assert run(made_with, path, update=True) == ["photos", "features", *sorted(DATA[2:])]
    folder = Workdir(path)
    assert sum(folder.manifest("photos").counts.values()) == 56
    assert sum(folder.manifest("photos").dropped.values()) == 0
    for split, names in order.items():
        assert ids(path, split)[: len(names)] == names and len(ids(path, split)) > len(names)
        assert folder.manifest("features").facts["earlier"][0]["counts"][split] == len(names)
    for file in ("folder-train.array_record-00000", "features/train.array_record-00000", "gallery/index/00000-of-"):
        first = {data for name, data in before.items() if file in name and not name.endswith(".json")}
        assert first & set(contents(path).values()), file
    assert not list(path.rglob("earlier"))
    # The same photos, indexed at once.
    for name in ("photos", "features", "align"):
        shutil.copytree(path / name, tmp_path / "once" / name)
    index.run(made_with, Workdir(tmp_path / "once"))
    for split in order:
        found, wanted = (Workdir(at).neighbors(split) for at in (path, tmp_path / "once"))
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
    assert run(made_with, path, update=True) == run(made_with, path) == []


@pytest.mark.slow
def test_an_update_interrupted_at_any_file_ends_the_same(grown, tmp_path, monkeypatch):
    source, csv, path = grown
    made_with = config(source, csv)
    other = shutil.copytree(path, tmp_path / "other")
    run(made_with, other, update=True)
    interrupt_after = sample.interruptible(monkeypatch)
    rng, breaks = np.random.default_rng(0), 0
    for _ in range(500):
        interrupt_after(int(rng.integers(1, 25)))
        try:
            run(made_with, path, update=True)
            break
        except KeyboardInterrupt:
            disk._unlock_all()  # as the system does at the end of a process
            breaks += 1
    assert breaks > 5 and contents(path) == contents(other)


@pytest.mark.slow
def test_photos_can_be_added_again_and_before_the_update_has_ended(grown):
    source, csv, path = grown
    made_with = config(source, csv)
    photos.run(made_with, Workdir(path, True))
    add(source, csv, 200, 203)
    run(made_with, path, update=True)
    add(source, csv, 210, 213)
    photos.run(made_with, Workdir(path, True))
    embed.run(made_with, Workdir(path, True))
    add(source, csv, 220, 223)
    run(made_with, path, update=True)
    found = Workdir(path)
    assert sum(found.manifest("photos").counts.values()) == 65
    vectors = np.asarray(gallery.IndexVectors(found.gallery)[:], float)
    queries = np.asarray(gallery.IndexVectors(found.table("validation"))[:], float)
    wanted = np.sort(queries @ vectors.T, axis=1)[:, :-7:-1]
    np.testing.assert_allclose(found.neighbors("validation")[1], wanted, atol=1e-5)


@pytest.mark.slow
def test_what_is_not_only_added_is_refused(grown):
    source, csv, path = grown
    made_with = config(source, csv)
    (source / "101.jpg").unlink()
    with pytest.raises(StageError, match=r"only adds new photos, but the source .* has 1 removed.*101.jpg"):
        run(made_with, path, update=True)
    write_files(source, made_of([101]))
    if csv:
        text = csv.read_text()
        csv.write_text(text.replace("102.jpg,42", "102.jpg,43"))
        with pytest.raises(StageError, match=r"has .*changed, such as"):
            run(made_with, path, update=True)


def test_a_source_that_cannot_grow_is_refused(tmp_path):
    class Changing(sample.Sample):
        def fingerprint(self):
            return {"file": str(len(list(tmp_path.iterdir())))}

    photos.make(manifests.begin(tmp_path, "photos", {}, ()), Changing(), 1, 1.0)
    (tmp_path / "new").touch()
    with pytest.raises(StageError, match="--update cannot add new photos of sample"):
        photos.make(manifests.begin(tmp_path, "photos", {}, ()), Changing(), 1, 1.0, update=True)


@pytest.mark.slow
def test_what_was_trained_before_is_kept_and_the_rest_is_outdated(grown, capsys):
    source, csv, path = grown
    made_with = config(source, csv)
    for folder, inputs in (("geotoken/a", ["tokens", "gallery"]), ("predictions/a", ["geotoken/a", "neighbors"])):
        manifests.begin(path, folder, {}, inputs).finish({})
    trained = (path / "geotoken" / "a" / "manifest.json").read_bytes()
    run(made_with, path, update=True)
    folder = Workdir(path)
    assert folder.begin(made_with, "geotoken/a", (), ["tokens", "gallery"]).manifest
    assert "geotoken/a is kept: it was trained before photos were added; to train with them" in capsys.readouterr().err
    assert (path / "geotoken" / "a" / "manifest.json").read_bytes() == trained
    with pytest.raises(StageError, match="was made from other files in neighbors/ than"):
        folder.begin(made_with, "predictions/a", (), ["geotoken/a", "neighbors"])
    assert list(folder.remove_outdated("predict")) == ["predictions/a"]
    assert not list(folder.remove_outdated("train"))


def test_parts_of_mp16_pro_that_come_later_are_taken_in(tmp_path):
    whole = tmp_path / "whole"
    mp16.generate(whole, 240, 300_000, trapped=False)
    parts = sorted(whole.glob("mp-16-images*"))
    assert len(parts) >= 3
    shutil.copytree(whole, tmp_path / "data", ignore=lambda folder, names: {path.name for path in parts[1:]})
    made_with: Any = test_mp16_pro.config(tmp_path / "data", photos_per_shard=20)
    made_with.photos.max_dropped = 1.0
    read = configuration.read(made_with)
    first = photos.run(read, Workdir(tmp_path / "run"))[0]
    assert 0 < sum(first.counts.values()) < 200
    for part in parts[1:]:
        shutil.copy(part, tmp_path / "data")
    second = photos.run(read, Workdir(tmp_path / "run", True))[0]
    at_once = photos.run(read, Workdir(tmp_path / "once"))[0]
    assert second.counts == at_once.counts
    for split in second.counts:
        found, wanted = (Workdir(tmp_path / at).photos(split) for at in ("run", "once"))
        names = [found[n]["id"] for n in range(len(found))]
        assert sorted(names) == sorted(wanted[n]["id"] for n in range(len(wanted)))
    dropped = [json.loads(line) for line in (tmp_path / "run/photos/dropped.jsonl").read_text().splitlines()]
    assert "no image" not in {drop["reason"] for drop in dropped}


@pytest.mark.slow
def test_a_benchmark_can_be_added_to_a_finished_work_directory(grown, tmp_path):
    source, csv, path = grown
    made_with = config(source, csv)
    run(made_with, path, update=True)
    before, order = contents(path), {split: ids(path, split) for split in ("train", "validation")}
    folder = write_files(
        tmp_path / "bench", {f"{n}.jpg": jpeg((n, n, 250), exif=exif(n % 60, n % 90)) for n in range(100, 109)}
    )
    labeled = dataclasses.replace(made_with.benchmarks.photos["labeled"], path=folder)
    section = dataclasses.replace(made_with.benchmarks, photos={"labeled": labeled})
    with_benchmark = dataclasses.replace(made_with, benchmarks=section)
    with pytest.raises(StageError, match=r"added, such as 'benchmark labeled: .*add the new photos with --update"):
        run(with_benchmark, path)
    assert run(with_benchmark, path, update=True) == ["photos", "features", *sorted(DATA[2:])]
    found = Workdir(path)
    assert found.benchmarks == ["labeled"] and found.query_counts["labeled"] == 9
    assert ids(path, "labeled") == sorted(f"{n}.jpg" for n in range(100, 109))  # ids of training photos, too
    assert {split: ids(path, split) for split in order} == order
    assert {data for name, data in before.items() if "index/" in name and name.endswith(".npy")} <= set(
        contents(path).values()
    )
    assert (found.neighbors("labeled")[0] >= 0).all()
    # Photos of the source can be added later, although a benchmark has their ids.
    add(source, csv, 230, 233)
    run(with_benchmark, path, update=True)
    assert sum(Workdir(path).manifest("photos").counts.values()) == 56 + 9 + 3
    (tmp_path / "bench" / "100.jpg").unlink()
    with pytest.raises(StageError, match=r"has 1 removed, such as 'benchmark labeled: 100\.jpg'"):
        run(with_benchmark, path, update=True)


def test_a_benchmark_can_be_added_to_a_source_that_cannot_grow(tmp_path):
    class Fixed(sample.Sample):
        pass

    photos.make(manifests.begin(tmp_path, "photos", {}, ()), Fixed(), 1, 1.0)
    folder = write_files(tmp_path / "bench", {"7.jpg": jpeg(exif=exif(1, 2))})
    benchmark = Benchmark("labeled", preparation.BenchmarkSettings(folder, "", "", "", "", 10))
    source = WithBenchmarks(Fixed(), (benchmark,))
    with pytest.raises(StageError, match="add the new photos with --update"):
        photos.make(manifests.begin(tmp_path, "photos", {}, ()), source, 1, 1.0)
    manifest = photos.make(manifests.begin(tmp_path, "photos", {}, ()), source, 1, 1.0, update=True)
    assert manifest.counts == {"train": 39, "validation": 5, "labeled": 1}
