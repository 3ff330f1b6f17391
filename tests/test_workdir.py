"""Stages: which folders are reused, resumed or refused, and that no file is ever half written."""

import dataclasses
import hashlib
import json
import os
import pathlib

import pytest
from etils import epath
from ml_collections import ConfigDict

import geotoken_jax
from geotoken_jax import checkpoint, cli, manifests, verification
from geotoken_jax.workdir import Workdir


def made(path, folder="photos", rate=1.0, inputs=()):
    """Makes a folder complete."""
    stage = manifests.begin(path, folder, {"embed": ConfigDict({"rate": rate, "sizes": (1, 2)})}, inputs)
    return stage.finish({"train": 3}, {"too small": 2}, width=8)


def test_a_complete_stage_is_kept(tmp_path):
    manifest = made(tmp_path)
    before = (tmp_path / "photos" / "manifest.json").read_bytes()
    stage = manifests.begin(tmp_path, "photos", {"embed": {"rate": 1.0, "sizes": [1, 2]}}, [])
    assert stage.manifest == manifest == manifests.read_manifest(tmp_path, "photos")
    assert manifest == manifests.Manifest(
        "photos", {"embed": {"rate": 1.0, "sizes": [1, 2]}}, {}, {"train": 3}, {"too small": 2}, {"width": 8}, {},
        manifests.FORMAT, geotoken_jax.__version__,
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["manifest.json"]
    assert (tmp_path / "photos" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused_with_key_and_values(tmp_path, complete):
    stage = manifests.begin(tmp_path, "features", {"embed": {"rate": 1.0, "inner": {"size": 16}}}, [])
    if complete:
        stage.finish({})
    with pytest.raises(
        manifests.StageError, match=r"embed\.inner\.size is 32, but .* was made with 16: use another --"
    ):
        manifests.begin(tmp_path, "features", {"embed": {"rate": 1.0, "inner": {"size": 32}}}, [])
    with pytest.raises(manifests.StageError, match=r"config\.embed\.more is 1, but .* was made with None"):
        manifests.begin(tmp_path, "features", {"embed": {"rate": 1.0, "inner": {"size": 16}, "more": 1}}, [])


@pytest.mark.parametrize("complete", [True, False])
def test_another_input_is_refused(tmp_path, complete):
    made(tmp_path)
    stage = manifests.begin(tmp_path, "features", {}, ["photos"])
    if complete:
        stage.finish({})
    (tmp_path / "photos" / "manifest.json").unlink()
    made(tmp_path, rate=2.0)
    with pytest.raises(manifests.StageError, match=r"features was made from other files in photos/ .*: use another"):
        manifests.begin(tmp_path, "features", {}, ["photos"])


@pytest.mark.parametrize("folder, verb", [("photos", "prepare"), ("queries", "index"), ("geotoken/paper", "train")])
def test_a_missing_input_names_its_verb(tmp_path, folder, verb):
    manifests.begin(tmp_path, folder, {}, [])  # begun but not complete
    with pytest.raises(manifests.StageError, match=rf"{folder} is not complete: run `geotoken {verb}`"):
        manifests.begin(tmp_path, "export", {}, [folder])
    assert not (tmp_path / "export").exists()


def test_features_that_are_missing_are_asked_of_the_gallery_which_names_its_verb(tmp_path):
    with pytest.raises(manifests.StageError, match=r"gallery is not complete: run `geotoken index`"):
        Workdir(tmp_path).width  # noqa: B018


def test_an_interrupted_stage_continues_to_the_same_manifest(tmp_path):
    made(tmp_path / "a")
    manifests.begin(tmp_path / "b", "photos", {"embed": {"rate": 1.0, "sizes": [1, 2]}}, [])
    (tmp_path / "b" / "photos" / "half").write_text("kept")
    stage = manifests.begin(tmp_path / "b", "photos", {"embed": {"rate": 1.0, "sizes": [1, 2]}}, [])
    assert stage.manifest is None and (stage.path / "half").read_text() == "kept"
    (stage.path / "half").unlink()
    made(tmp_path / "b")
    first, second = ((tmp_path / side / "photos" / "manifest.json").read_bytes() for side in "ab")
    assert first == second
    assert manifests.digest(tmp_path / "a", "photos") == manifests.digest(tmp_path / "b", "photos")


def test_a_manifest_has_no_time_in_it(tmp_path, monkeypatch):
    made(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 0.0)
    made(tmp_path / "b")
    files = [tmp_path / side / "photos" / "manifest.json" for side in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(json.loads(files[0].read_text())) == {field.name for field in dataclasses.fields(manifests.Manifest)}


def sharded(path, code=geotoken_jax.__version__):
    """Makes a folder of two shards and a file without a ledger; returns its files except for JSON, and its manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "__version__", code)
        stage = manifests.begin(path, "photos", {}, ())
        for n in "ab":
            ledger = stage.path / "ledgers" / f"{n}.json"
            if not manifests.read_ledger(ledger):
                (stage.path / n).write_text(f"shard {n}")
                manifests.write_ledger(ledger, [stage.path / n], rows=7)
        (stage.path / "list").write_text("a b")
        return stage.finish({"train": 14})


def test_a_manifest_records_size_and_sum_of_every_file(tmp_path):
    manifest = sharded(tmp_path)
    assert manifest.files.keys() == {"a", "b", "ledgers/a.json", "ledgers/b.json", "list"}
    for name, (size, digest) in manifest.files.items():
        data = (tmp_path / "photos" / name).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_version_of_the_code_makes_no_folder_another_and_a_later_format_is_refused(tmp_path):
    sharded(tmp_path / "a", "0.1"), sharded(tmp_path / "b", "0.2")
    assert manifests.read_manifest(tmp_path / "b", "photos").code == "0.2"
    assert manifests.digest(tmp_path / "a", "photos") == manifests.digest(tmp_path / "b", "photos")
    file = tmp_path / "b" / "photos" / "manifest.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "format": 99}))
    with pytest.raises(manifests.StageError, match=r"has format 99, written by version 0.2, and this release .* reads"):
        manifests.begin(tmp_path / "b", "features", {}, ["photos"])


def test_folders_of_format_1_are_read_and_begun_ones_are_not_continued(tmp_path):
    made(tmp_path)
    file = tmp_path / "photos" / "manifest.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in manifests._DEFAULTS}
    manifests.write_json(file, old)
    assert manifests.read_manifest(tmp_path, "photos").format == 1
    assert manifests.digest(tmp_path, "photos") == hashlib.sha256(file.read_bytes()).hexdigest()  # as format 1 had it
    file.rename(file.parent / "begun.json")
    with pytest.raises(manifests.StageError, match=r"photos was begun in format 1, which this release cannot continue"):
        made(tmp_path)


def test_a_stage_that_begins_names_a_file_of_another_size(tmp_path):
    sharded(tmp_path)
    (tmp_path / "photos" / "b").write_text("shard")
    for folder, inputs in (("features", ["photos"]), ("photos", ())):
        with pytest.raises(
            manifests.StageError, match=r"photos/b has 5 bytes, but 7 bytes were written: restore it, or"
        ):
            manifests.begin(tmp_path, folder, {}, inputs)
    (tmp_path / "photos" / "b").unlink()
    with pytest.raises(manifests.StageError, match=r"photos/b is missing, but 7 bytes were written"):
        manifests.begin(tmp_path, "features", {}, ["photos"])


def test_a_stage_that_continues_makes_a_shard_of_another_size_again(tmp_path):
    whole = sharded(tmp_path / "whole")
    stage = manifests.begin(tmp_path, "photos", {}, ())
    ledger = stage.path / "ledgers" / "a.json"
    (stage.path / "a").write_text("shard a")
    manifests.write_ledger(ledger, [stage.path / "a"], rows=7)
    read = manifests.read_ledger(ledger)
    assert read and read["rows"] == 7
    for damaged in (stage.path / "a", ledger):
        before = damaged.read_bytes()
        damaged.write_bytes(before[:-2])
        assert manifests.read_ledger(ledger) is None
        damaged.write_bytes(before)
    (stage.path / "a").write_text("half")
    assert sharded(tmp_path) == whole


@pytest.mark.parametrize("bad", [["a"], ["ledgers/b.json"], ["list", "b"], ["manifest.json"]])
def test_a_folder_is_mended_to_the_same_bytes(tmp_path, bad):
    sharded(tmp_path, "0.1")
    folder = tmp_path / "photos"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in bad:
        (folder / name).write_text("x" * (folder / name).stat().st_size)
    report = verification.check_folder(Workdir(tmp_path), "photos")
    assert report.bad.keys() == set(bad)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "a", folder / "b") if path.name not in bad}
    manifests.reopen(epath.Path(tmp_path), "photos", report.bad)
    sharded(tmp_path, "0.1" if bad == ["manifest.json"] else "0.2")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if bad != ["ledgers/b.json"]:
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not verification.check_folder(Workdir(tmp_path), "photos").bad


@pytest.mark.parametrize("name, contents", [("a", "another"), ("list", "b a")])
def test_a_mended_folder_with_other_contents_is_refused(tmp_path, name, contents):
    sharded(tmp_path)
    (tmp_path / "photos" / name).write_text("x" * len(contents))
    manifests.reopen(epath.Path(tmp_path), "photos", [name])
    stage = manifests.begin(tmp_path, "photos", {}, ())
    (stage.path / name).write_text(contents)
    if name == "a":
        manifests.write_ledger(stage.path / "ledgers" / "a.json", [stage.path / "a"], rows=7)
    with pytest.raises(manifests.StageError, match=rf"photos/{name} was made again, but .* differ .* --remake=prepare"):
        stage.finish({"train": 14})


@pytest.mark.parametrize("crash_in", ["write_bytes", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, crash_in):
    path = epath.Path(tmp_path / "state.json")
    manifests.write_json(path, {"n": 1})
    kind, write = type(path), type(path).write_bytes

    def crash(self, data=None):
        if crash_in == "write_bytes":
            write(self, data[: len(data) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(kind if crash_in == "write_bytes" else os, crash_in, crash)
    with pytest.raises(OSError, match=r"full"):
        manifests.write_json(path, {"n": 2, "names": ["é"] * 100})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"n": 1}
    manifests.write_json(path, {"n": 3})
    assert json.loads(path.read_text()) == {"n": 3} and [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("scheme", ["s3:", "s3:/", "gs:/", "memory:/"])
def test_a_url_is_refused_before_a_folder_of_its_name_is_made(tmp_path, monkeypatch, capfd, scheme):
    monkeypatch.chdir(tmp_path)
    secret = "sEcReT+123"
    url = f"{scheme}/user:{secret}@bucket/run"
    said = rf"^--workdir is a URL \({scheme.rstrip('/')}//...\), .* mount the bucket"
    for begin in (
        lambda: manifests.begin(url, "photos", {}, ()),
        lambda: checkpoint.Checkpoints(f"{url}/checkpoints"),
    ):
        with pytest.raises(manifests.StageError, match=said):
            begin()
    config = pathlib.Path(__file__).parent / "tiny.py"
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", f"--config={config}", f"--workdir={url}"])
    printed = capfd.readouterr().err
    assert ended.value.code == cli.REFUSED and printed.startswith("geotoken train: --workdir is a URL")
    assert secret not in printed and list(tmp_path.iterdir()) == []
