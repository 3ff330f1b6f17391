"""Stages: which folders are reused, resumed or refused, and that no file is ever half written."""

import dataclasses
import json
import pathlib

import pytest
from etils import epath
from ml_collections import ConfigDict

from geotoken_jax import checkpoint, cli, manifests
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
        "photos", {"embed": {"rate": 1.0, "sizes": [1, 2]}}, {}, {"train": 3}, {"too small": 2}, {"width": 8}
    )
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
    with pytest.raises(manifests.StageError, match=r"features was made with another photos/: use another --workdir"):
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


@pytest.mark.parametrize("crash_in", ["write_bytes", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, crash_in):
    path = epath.Path(tmp_path / "state.json")
    manifests.write_json(path, {"n": 1})
    kind, write = type(path), type(path).write_bytes

    def crash(self, data):
        if crash_in == "write_bytes":
            write(self, data[: len(data) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(kind, crash_in, crash)
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
