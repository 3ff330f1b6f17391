"""A work directory in a bucket: equal to its copy, wherever that is, and whatever was interrupted."""

import argparse
import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from ml_collections import ConfigDict

from geotoken_jax import buckets, checkpoint, cli, workdir
from geotoken_jax.settings import SettingsError
from geotoken_jax.train import loop
from geotoken_jax.workdir import StageError
from tests import test_train

SECRET = "sEcReT/vAlUe+123"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs")
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a bucket that is empty, of fsspec's server in memory and of one that speaks S3."""
    monkeypatch.setenv("GEOTOKEN_BUCKETS", str(tmp_path / "here"))
    monkeypatch.setattr(buckets, "EVERY", 0.05)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    for name, value in {
        "AWS_ENDPOINT_URL": request.getfixturevalue("server"),
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/run"


def there(url: str) -> dict[str, bytes]:
    """Returns name -> content of everything in the bucket's folder."""
    bucket, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(f"{root}/"): bucket.cat_file(name) for name in bucket.find(root)}


def write(folder: str | None, **files: str) -> None:
    for name, text in files.items():
        path = Path(str(folder), *name.split("__")).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def until(condition: Callable[[], bool]) -> None:
    began, met = time.monotonic(), False
    while not met:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):  # of a file that is just being written again
            met = condition()


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Goes on as another machine, whose copies are in another folder."""
    monkeypatch.setenv("GEOTOKEN_BUCKETS", str(tmp_path / name))


def test_what_a_stage_writes_another_machine_reads(url, tmp_path, monkeypatch):
    with buckets.mirrored(url, "prepare") as folder:
        write(folder, photos__a="1", photos__b="2")
        stage = workdir.begin(str(folder), "photos", {}, ())
        stage.finish({"train": 2})
    assert sorted(there(url)) == ["photos/a.txt", "photos/b.txt", "photos/manifest.json"]
    elsewhere(monkeypatch, tmp_path, "there")
    with buckets.mirrored(f"{url}/", "embed") as other:
        assert other != folder and Path(str(other), "photos", "b.txt").read_text() == "2"
        assert workdir.read_manifest(str(other), "photos").counts == {"train": 2}


def test_the_bucket_follows_while_a_stage_works(url):
    with buckets.mirrored(url, "train") as folder:
        for text in ("1", "22"):
            write(folder, geotoken__metrics=text)
            until(lambda text=text: there(url).get("geotoken/metrics.txt") == text.encode())
        write(folder, **{"geotoken__1": "old", "geotoken__2.orbax-checkpoint-tmp-7__x": "torn"})
        Path(str(folder), "geotoken", ".x.partial").write_text("torn")
    assert sorted(there(url)) == ["geotoken/1.txt", "geotoken/metrics.txt"]
    with buckets.mirrored(url, "train") as folder:
        Path(str(folder), "geotoken", "1.txt").unlink()  # as Orbax does when a newer one is whole
        write(folder, geotoken__2="new")
    assert sorted(there(url)) == ["geotoken/2.txt", "geotoken/metrics.txt"]


def test_what_was_not_pushed_stays_unless_another_machine_went_on(url, tmp_path, monkeypatch):
    with buckets.mirrored(url, "train") as folder:
        write(folder, geotoken__1="a", align__1="a")
    write(folder, geotoken__2="lost", align__2="kept")  # as by a machine whose power went
    elsewhere(monkeypatch, tmp_path, "there")
    with buckets.mirrored(url, "train") as other:
        write(other, geotoken__1="newer", geotoken__3="b")
    elsewhere(monkeypatch, tmp_path, "here")
    with buckets.mirrored(url, "train"):
        pass
    wanted = {"align/1.txt": b"a", "align/2.txt": b"kept", "geotoken/1.txt": b"newer", "geotoken/3.txt": b"b"}
    assert there(url) == wanted
    assert Path(str(folder), "geotoken", "1.txt").read_text() == "newer"


def test_a_copy_that_lacks_files_gets_them_again_and_what_a_verb_does_not_read_stays_there(url):
    with buckets.mirrored(url, "embed") as folder:
        write(folder, photos__a="1", tokens__a="1")
        workdir.begin(str(folder), "photos", {}, ()).finish({"train": 1})
    shutil.rmtree(Path(str(folder)) / "tokens")
    shutil.rmtree(Path(str(folder)) / "photos")
    with buckets.mirrored(url, "train"):
        found = sorted(path.relative_to(str(folder)).as_posix() for path in Path(str(folder)).rglob("*.*"))
    assert found == [".bucket.json", "photos/manifest.json", "tokens/a.txt"]
    with buckets.mirrored(url, "export"):
        assert not Path(str(folder), "photos", "a.txt").exists()
    with buckets.mirrored(url, "export", ["photos"]):  # an export with pictures
        assert Path(str(folder), "photos", "a.txt").exists()
    assert sorted(there(url)) == ["photos/a.txt", "photos/manifest.json", "tokens/a.txt"]


@pytest.mark.parametrize(("verb", "side", "read"), [("export", 64, ("photos",)), ("export", 0, ()), ("train", 64, ())])
def test_only_an_export_with_pictures_asks_for_photos(verb, side, read):
    config = ConfigDict({"export": {"thumbnails": side, "examples": 0}})
    assert cli._shown(argparse.Namespace(verb=verb), config) == read


def test_training_goes_on_on_another_machine_as_if_it_had_not_been_ended(url, tmp_path, monkeypatch):
    options = dict(examples=8 * 8, log_every=4, evaluate_every=8)
    test_train.train(tmp_path / "whole", 8, **options)
    with pytest.raises(loop.Preempted), buckets.mirrored(url, "train") as folder:
        test_train.train(Path(str(folder), "geotoken"), 3, make_input=test_train.Terminated, **options)
    elsewhere(monkeypatch, tmp_path, "there")
    with buckets.mirrored(url, "train") as folder:
        test_train.train(Path(str(folder), "geotoken"), 5, **options)  # not one batch is read again
    found = Path(str(folder), "geotoken")
    assert test_train.lines(found) == test_train.lines(tmp_path / "whole")
    for name, value in test_train.parameters(tmp_path / "whole").items():
        np.testing.assert_array_equal(test_train.parameters(found)[name], value)
    assert {"geotoken/metrics.jsonl", "geotoken/parameters.safetensors"} < there(url).keys()
    assert (
        not any("/checkpoints/3/" in name for name in there(url)) or len(list((found / "checkpoints").iterdir())) == 2
    )


def unavailable(*_: object, **__: object) -> None:
    raise OSError("503")


def test_a_failure_while_pushing_is_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GEOTOKEN_BUCKETS", str(tmp_path))
    monkeypatch.setattr(buckets, "EVERY", 0.02)
    memory, url = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}/run"
    with buckets.mirrored(url, "train") as folder, monkeypatch.context() as broken:
        broken.setattr(type(memory), "put_file", unavailable)
        write(folder, geotoken__1="a")
        until(lambda: "503" in caplog.text)
        assert there(url) == {}
    assert there(url) == {"geotoken/1.txt": b"a"}
    said = r"run cannot be written \(OSError: 503\): .* what is not there yet is in /"
    with pytest.raises(StageError, match=said), buckets.mirrored(url, "train") as folder:
        monkeypatch.setattr(type(memory), "put_file", unavailable)
        write(folder, geotoken__1="ab")


def test_errors_speak_of_the_bucket(url):
    with pytest.raises(StageError) as error, buckets.mirrored(url, "train") as folder:
        workdir.read_manifest(str(folder), "tokens")
    assert str(error.value).startswith(f"{url}/tokens is not complete: run `geotoken index`")


@pytest.mark.parametrize(
    "given, said",
    [
        ("s3:/bucket/run", "--workdir=s3:/bucket/run is not the URL of a folder in a bucket: write it as in s3://"),
        ("s3://bucket/../x", "is not the URL of a folder"),
        ("s3://", "is not the URL of a folder"),
        (f"s3://AKIAEXAMPLE:{SECRET}@bucket/run", "has a user, a key or a question mark in its URL"),
        (f"s3://bucket/run?secret={SECRET}", "has a user, a key or a question mark in its URL"),
        ("nosuch://bucket/run", "cannot be reached .*: use s3:// or gs://"),
    ],
)
def test_a_url_that_is_none_is_refused(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=said) as error, buckets.mirrored(given, "train"):
        pass
    assert SECRET not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(monkeypatch):
    for name, value in {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "4", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    said = r"serves one process, .* and there are 4: mount the bucket"
    with pytest.raises(SettingsError, match=said), buckets.mirrored("s3://bucket/run", "train"):
        pass


def test_no_folder_is_ever_called_s3(tmp_path, monkeypatch):
    """Where the library is given a URL, past the command."""
    monkeypatch.chdir(tmp_path)
    for begin in (
        lambda: workdir.begin("s3://bucket/run", "photos", {}, ()),
        lambda: checkpoint.Checkpoints("s3://bucket/run/checkpoints"),
        lambda: checkpoint.Checkpoints("gs:/bucket/run/checkpoints"),
    ):
        with pytest.raises(StageError, match=r"^(s3|gs):/.* is not a folder that can be worked in: give it to"):
            begin()
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_a_url(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parent / "tiny.py"
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", f"--config={config}", "--workdir=memory://empty/run"])
    assert ended.value.code == cli.REFUSED
    assert "geotoken train: memory://empty/run/tokens is not complete" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_credentials_are_not_logged(tmp_path, monkeypatch, server, caplog, capfd):
    """Of a bucket that is there and one that is not, with every logger as talkative as it can be."""
    monkeypatch.setenv("GEOTOKEN_BUCKETS", str(tmp_path))
    for name, value in {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "AKIAEXAMPLE", "SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    with caplog.at_level(logging.INFO):
        with buckets.mirrored(f"s3://{bucket}/run", "train") as folder:
            write(folder, geotoken__1="a")
        with pytest.raises(StageError) as error, buckets.mirrored(f"s3://{bucket}-not/run", "train"):
            pass
    shown = caplog.text + str(error.value) + "".join(capfd.readouterr())
    shown += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "does not exist" in shown and SECRET not in shown
