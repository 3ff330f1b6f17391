import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import common
from data_prep import duplicates, photos
from data_prep.beam import BeamSettings
from data_prep.sources import UNKNOWN, Drop, Photo
from geotoken_jax import configuration, manifests, records
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.preparation import DatasetSettings, DuplicateSettings
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Workdir

REPOSITORY = Path(__file__).parent.parent


def _jpeg(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "JPEG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Sample:
    """A source of solid colors at random coordinates. extra: additional photos of the first test shard."""

    per_shard: int = 10
    extra: tuple = ()
    pause: float = 0.0
    name = "sample"
    provenance = UNKNOWN
    splits = types.MappingProxyType({"train": 3, "test": 2})

    def read(self, split, shard):
        rng = np.random.default_rng([len(split), shard])
        for n in range(self.per_shard):
            time.sleep(self.pause)
            latitude, longitude = rng.uniform(-90, 90), rng.uniform(-180, 180)
            color = tuple(rng.integers(0, 256, 3).tolist())
            captured = 1e9 + n + 1 / 3 if n % 2 else float("nan")
            text = dict(city="Ōsaka", captured=captured)
            yield Photo(f"{split}-{shard}-{n}", f"author {n}", _jpeg(color), latitude, longitude, **text)
        if (split, shard) == ("test", 0):
            yield from self.extra


def _make(path, source=None, workers=1, max_dropped=0.0, options=None):
    stage = manifests.begin(path, "photos", {"photos": {"source": "sample"}}, inputs=())
    return photos.make(stage, source or Sample(), workers, max_dropped, options=options or photos.Options())


def _files(path):
    folder = Path(path) / "photos"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, _make(path)


def test_photos_come_back_exactly(whole):
    path, manifest = whole
    assert manifest.counts == {"train": 30, "test": 20}
    assert manifest.dropped == {}
    for split, shards in Sample.splits.items():
        found = records.Photos(path / "photos", split)
        truth = [photo for shard in range(shards) for photo in Sample().read(split, shard)]
        assert len(found) == len(truth)
        for n, photo in enumerate(truth):
            row = found[n]
            assert (row["id"], row["author"], row["image"]) == (photo.id, photo.author, photo.image)
            assert (row["city"], row["state"]) == ("Ōsaka", "")
            assert tuple(row["coordinates"]) == (photo.latitude, photo.longitude)  # to the last bit
            np.testing.assert_array_equal(row["captured"], photo.captured, strict=False)
            tokens = CellScheme(20, 1).encode(np.array([photo.latitude]), np.array([photo.longitude]))[0]
            np.testing.assert_array_equal(row["tokens"], tokens)


def test_photos_are_a_tfds_data_set_without_tensorflow(whole):
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "train, test = builder.as_data_source('train'), builder.as_data_source('test[:50%]')\n"
        "print(len(train), train[0]['image'].shape, train[0]['coordinates'].dtype, len(test))\n"
        "print(builder.info.splits['test'].num_examples, 'tensorflow' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(whole[0] / "photos" / "sample" / "1.0.0")]
    assert subprocess.check_output(command, text=True).split("\n")[:2] == ["30 (8, 8, 3) float64 10", "20 False"]


def test_tfds_finds_the_data_set_by_its_name_with_its_terms(tmp_path):
    terms = DatasetSettings("mine", "2.0.1", "cc-by-4.0", "Say my name.", "Me 2026.", "https://example.org")
    manifest = _make(tmp_path, options=photos.Options(dataset=terms))
    script = (
        "import json, sys, tensorflow_datasets as tfds\n"
        "source = tfds.data_source('mine', data_dir=sys.argv[1])\n"
        "info = tfds.builder('mine', data_dir=sys.argv[1]).info\n"
        "license = info.redistribution_info.license\n"
        "print(json.dumps([len(source['train']), str(info.version), license, info.citation, info.homepage]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "photos")]
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[0])
    assert found == [30, "2.0.1", "cc-by-4.0. Say my name.", "Me 2026.", "https://example.org"]
    assert (
        manifest.facts["provenance"] | {"license": "cc-by-4.0", "terms": "Say my name."}
        == (manifest.facts["provenance"])
    )
    croissant = json.loads((tmp_path / "photos" / "mine" / "2.0.1" / "croissant.json").read_text())
    assert (croissant["name"], croissant["license"], croissant["citeAs"]) == ("mine", "cc-by-4.0", "Me 2026.")
    fields = {field["name"] for field in croissant["recordSet"][0]["field"]}
    assert fields == set(records.photo_features())


def test_photos_of_earlier_versions_without_a_folder_of_their_name_are_read(whole, tmp_path):
    shutil.copytree(whole[0] / "photos" / "sample" / "1.0.0", tmp_path / "photos")
    for split in ("train", "test"):
        found, wanted = (records.Photos(path / "photos", split) for path in (tmp_path, whole[0]))
        assert [found[n]["image"] for n in range(20)] == [wanted[n]["image"] for n in range(20)]


def _noise(seed, side=80, quality=90, size=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4), np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    picture.resize((size or side,) * 2, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Copies:
    """A source with copies: in train and test, train and validation, twice in train, and in two test splits."""

    name = "copies"
    provenance = UNKNOWN
    splits = types.MappingProxyType({"train": 3, "validation": 1, "test": 1, "test_far": 1})

    def read(self, split, shard):
        red = _jpeg("red")
        pictures = {
            ("train", 0): {"a": _noise(0, quality=50), "b": _noise(1), "c": _noise(2)},
            ("train", 1): {"d": _noise(2, size=200), "e": _noise(3), "f": red, "g": _jpeg("blue")},
            ("train", 2): {"h": _noise(6)},
            ("validation", 0): {"i": _noise(1, size=60), "j": _noise(4)},
            ("test", 0): {"k": _noise(0), "l": red, "m": _noise(5)},
            ("test_far", 0): {"n": _noise(5, quality=70), "o": _jpeg("#0000f8")},
        }
        for name, image in pictures[split, shard].items():
            yield Photo(name, name, image, 1.0, 2.0)


def _ids(path, split):
    found = records.Photos(path / "photos", split)
    return "".join(found[n]["id"] for n in range(len(found)))


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_picture_of_an_evaluation_is_left_out_of_training(tmp_path, workers):
    manifest = _make(tmp_path, Copies(), workers)
    assert manifest.counts == {"train": 5, "validation": 2, "test": 3, "test_far": 2}
    assert manifest.dropped == {"duplicate in another split": 3}  # which is no fault
    assert manifest.facts["duplicates"] == {"groups": 5, "photos": 10, "equal_bytes": 2, "left_out": 3}
    assert [_ids(tmp_path, split) for split in Copies.splits] == ["cdegh", "ij", "klm", "no"]
    lines = [json.loads(line) for line in (tmp_path / "photos" / "duplicates.jsonl").read_text().splitlines()]
    groups = [[photo["id"] for photo in line] for line in lines]
    assert groups == [["a", "k"], ["b", "i"], ["c", "d"], ["f", "l"], ["m", "n"]]
    if workers == 3:
        _make(tmp_path / "alone", Copies())
        assert _files(tmp_path) == _files(tmp_path / "alone")


def test_an_interruption_while_duplicates_are_removed_ends_in_the_same_bytes(tmp_path, monkeypatch):
    _make(tmp_path / "whole", Copies())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        remove = photos._remove_left_out
        patch.setattr(photos, "_remove_left_out", lambda task: remove(task) if task.shard == 0 else _interrupt())
        _make(tmp_path / "again", Copies())
    _make(tmp_path / "again", Copies())
    assert _files(tmp_path / "again") == _files(tmp_path / "whole")


def _interrupt():
    raise KeyboardInterrupt


def test_duplicates_may_stay_and_be_of_equal_bytes_only(tmp_path):
    kept = _make(tmp_path / "kept", Copies(), options=photos.Options(duplicates=DuplicateSettings(3.0, True)))
    assert kept.dropped == {} and kept.facts["duplicates"]["groups"] == 5
    equal = _make(tmp_path / "equal", Copies(), options=photos.Options(duplicates=DuplicateSettings(0.0, False)))
    assert equal.facts["duplicates"] == {"groups": 1, "photos": 2, "equal_bytes": 2, "left_out": 1}


def test_similar_pictures_are_found_among_many():
    rng = np.random.default_rng(0)
    fingerprints = np.zeros(20_000, duplicates.FINGERPRINT)
    fingerprints["digest"] = rng.integers(0, 256, (20_000, 16))
    fingerprints["gray"] = rng.integers(10, 246, (20_000, 8, 9))
    fingerprints["gray"][:500] = rng.integers(99, 104, (500, 8, 9))  # without contrast
    copies = rng.permutation(np.arange(500, 20_000))[:800].reshape(2, 400)
    noise = np.clip(np.round(rng.normal(0, 1.5, (400, 8, 9))), -4, 4).astype(int)
    fingerprints["gray"][copies[1]] = fingerprints["gray"][copies[0]] + noise
    found, equal = duplicates.groups(fingerprints, 2.0)
    wanted = {tuple(sorted(pair)) for pair in copies.T.tolist()}
    assert {tuple(group.tolist()) for group in found} <= wanted
    assert len(found) >= 392 and equal == 0


def test_many_copies_are_one_group(monkeypatch):
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", 100)
    fingerprints = np.zeros(3_000, duplicates.FINGERPRINT)
    fingerprints["digest"][:, :2] = np.arange(3_000).astype(">u2").view(np.uint8).reshape(-1, 2)
    fingerprints["gray"] = np.random.default_rng(0).integers(0, 256, (3, 8, 9))[np.arange(3_000) % 3]
    found, equal = duplicates.groups(fingerprints, 2.0)
    assert [group.tolist() for group in found] == [list(range(n, 3_000, 3)) for n in range(3)] and equal == 0
    assert duplicates.groups(fingerprints[:0], 2.0) == ([], 0)


@pytest.mark.slow
def test_a_complete_folder_is_left_alone_and_two_processes_make_the_same_bytes(whole, tmp_path):
    assert _make(tmp_path, workers=2) == whole[1]
    assert _files(tmp_path) == _files(whole[0])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "photos").rglob("*")}
    assert _make(tmp_path) == whole[1]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "photos").rglob("*")} == before


def test_only_missing_shards_are_made_again(whole, tmp_path):
    _make(tmp_path)
    folder = tmp_path / "photos"
    (folder / "manifest.json").rename(folder / "begun.json")
    shards = sorted(folder.glob("sample/1.0.0/*.array_record-*"))
    shards[0].unlink()
    (folder / "ledgers" / f"{shards[3].name}.json").unlink()
    (shards[0].parent / f".{shards[0].name}.0.1.partial").write_bytes(b"half a shard")
    before = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    _make(tmp_path)
    assert [shard for shard, time in before.items() if shard.stat().st_mtime_ns != time] == [shards[3]]
    assert _files(tmp_path) == _files(whole[0])


def _run_script(path):
    return (
        "from tests import test_photos\n"
        "if __name__ == '__main__':\n"
        f"    test_photos._make({str(path)!r}, test_photos.Sample(pause=0.02), workers=2)\n"
    )


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes_and_leaves_no_process(whole, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_run_script(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL) as process:
        folder = tmp_path / "photos"
        while not list(folder.glob("ledgers/*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGKILL)
    assert not (folder / "manifest.json").exists()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/stat").exists() and not _is_dead(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived the run that started it"
        time.sleep(0.01)
    _make(tmp_path)
    assert _files(tmp_path) == _files(whole[0])


def _is_dead(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_faulty_photos_are_dropped_by_a_named_reason(tmp_path):
    good = Photo("../../x", "ok", _jpeg("red"), 90.0, -180.0)
    faulty = {
        "empty id": dataclasses.replace(good, id=""),
        "unprintable id": dataclasses.replace(good, id="a\udcff"),
        "long id": dataclasses.replace(good, id="é" * 600),
        "long author": dataclasses.replace(good, id="1", author="a" * 1025),
        "coordinates not finite": dataclasses.replace(good, id="2", latitude=float("nan")),
        "coordinates out of range": dataclasses.replace(good, id="3", longitude=180.001),
        "empty image": dataclasses.replace(good, id="4", image=b""),
        "repeated id": dataclasses.replace(good),
        "in a language of its own": Drop("5", "in a language of its own"),
    }
    manifest = _make(tmp_path, Sample(extra=(good, *faulty.values())), max_dropped=0.5)
    assert manifest.dropped == dict.fromkeys(faulty, 1)
    assert manifest.counts == {"train": 30, "test": 21}
    lines = [json.loads(line) for line in (tmp_path / "photos" / "dropped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == list(faulty)
    assert [line["id"] for line in lines[:2]] == ["", "a\\udcff"]
    assert records.Photos(tmp_path / "photos", "test")[10]["id"] == "../../x"


def test_what_cannot_be_a_time_is_counted_and_unknown(tmp_path):
    nonsense = [0.0, -1.0, 2024.0, 20240702.0, 2.0**31 - 1, 1.7e12, float("inf")]
    good = Photo("good", "ok", _jpeg("red"), 0.0, 1.0, captured=2.0**31 - 2)
    extra = (good, *(dataclasses.replace(good, id=str(n), captured=t) for n, t in enumerate(nonsense)))
    manifest = _make(tmp_path, Sample(extra=extra))
    assert manifest.facts | {"captured": 25 + 1, "nonsense_times": len(nonsense)} == manifest.facts
    assert manifest.dropped == {}
    found = [records.Photos(tmp_path / "photos", "test")[10 + n]["captured"] for n in range(len(extra))]
    assert found[0] == good.captured and np.isnan(found[1:]).all()


def test_too_many_drops_are_an_error_until_the_limit_is_raised(tmp_path):
    source = Sample(extra=(Drop("1", "truncated"),))
    with pytest.raises(manifests.StageError, match=r"2\.0% .*1 truncated.*max_dropped = 0\.01"):
        _make(tmp_path, source, max_dropped=0.01)
    assert not (tmp_path / "photos" / "manifest.json").exists()
    assert _make(tmp_path, source, max_dropped=0.02).dropped == {"truncated": 1}


def test_one_id_in_two_splits_is_an_error(tmp_path):
    with pytest.raises(manifests.StageError, match="'train-1-3'"):
        _make(tmp_path, Sample(extra=(Photo("train-1-3", "", _jpeg("red"), 0.0, 1.0),)))


def test_a_runner_without_beam_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    beam = {"runner": "FlinkRunner", "options": ("--flink_master=localhost:8081",)}
    with pytest.raises(SettingsError, match=r"beam\.runner is 'FlinkRunner', which needs Apache Beam: install"):
        prepare(_config(beam=beam), tmp_path)


def test_shards_that_other_machines_wrote_elsewhere_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "run_tasks", lambda *_: None)
    stage = manifests.begin(tmp_path, "photos", {"photos": {"source": "sample"}}, inputs=())
    with pytest.raises(manifests.StageError, match=r"not all are in .*photos: mount this folder, and the folder"):
        photos.make(stage, Sample(), 1, 0.0, BeamSettings("FlinkRunner", ()))


def test_a_shard_whose_photos_are_all_dropped_is_empty_and_readable(tmp_path):
    manifest = _make(tmp_path, Sample(per_shard=0, extra=(Photo("a", "", _jpeg("red"), 0.0, 1.0),)))
    assert manifest.counts == {"train": 0, "test": 1}
    assert records.Photos(tmp_path / "photos", "test")[0]["id"] == "a"


def prepare(config, path):
    """Makes photos/ from config.photos in a work directory and returns its manifest."""
    return photos.run(configuration.read(config), Workdir(path))[0]


def _config(seed=0, **changes):
    counts = {"places": 2, "train": 8, "validation": 0, "test": 2, "test_unseen": 0, "test_shift": 0}
    earthview = {"seed": seed, **counts, "photos_per_shard": 8}
    section = {"source": "earthview", "workers": 1, "max_dropped": 0.0, "earthview": earthview, **changes}
    config = common.get_config()
    config.photos.update(section)
    return config


@pytest.mark.slow
def test_run_makes_earthview_and_knows_what_it_was_made_with(tmp_path):
    manifest = prepare(_config(), tmp_path)
    assert manifest.counts == {"train": 8, "test": 2}
    assert records.Photos(tmp_path / "photos", "train")[0]["id"] == "ev-train-000000"
    assert prepare(_config(workers=7, max_dropped=0.5), tmp_path) == manifest
    with pytest.raises(manifests.StageError, match=r"config\.photos\.earthview\.seed is 1, but .* was made with 0"):
        prepare(_config(seed=1), tmp_path)


def test_an_unknown_source_is_an_error_that_names_the_known():
    with pytest.raises(SettingsError, match="'flickr': use one of earthview"):
        prepare(_config(source="flickr"), "unused")
