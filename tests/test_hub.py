"""An export is pushed to the hub and loaded from it, with the real client and a stand-in for the hub."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from geotoken_jax.predict import bundle
from tests import hub

NAME = "someone/geotoken"
FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: cc-by-4.0\n---\n# A model\n",
    "align.safetensors": bytes(range(256)),
    "gallery/embeddings-00000-of-00001.npy": b"numbers" * 100,
}
RUN = """
import json, sys
from geotoken_jax.predict import hub
for name, *arguments in json.loads(sys.argv[1]):
    try:
        print(getattr(hub, name)(*arguments))
    except ValueError as error:
        print("refused:", error)
"""


def sums(files: dict[str, bytes], folder: Path) -> bytes:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return "".join(f"{bundle.sha256(folder / name)}  {name}\n" for name in files).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "export"
    (path / "SHA256SUMS").write_bytes(sums(FILES, path))
    (path / "manifest.json").write_text("of this machine alone")
    return path


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serving() as found:
        yield found


def run(server: hub.Hub, home: Path, *calls: list[str], token: str | None = None, **more: str) -> list[str]:
    """Returns the results or messages of functions of geotoken_jax.predict.hub, called in another process."""
    environment = server.environment(home, token) | more
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert hub.TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_pushed_export_comes_back_by_its_name(server: hub.Hub, folder: Path, tmp_path: Path):
    push = ["push", str(folder), NAME]
    [refused] = run(server, tmp_path / "writer", push)
    assert refused.startswith("refused: the hub refuses someone/geotoken (401): log in with")
    # A second push uploads no file again.
    assert run(server, tmp_path / "writer", push, push, token=hub.TOKEN) == [f"{server.url}/{NAME}"] * 2
    assert len(server.puts) == len(set(server.puts)) == 3
    assert set(server.commits[NAME][-1][1]) == {*FILES, "SHA256SUMS"}  # the manifest is not uploaded
    first = server.commits[NAME][1][0]
    server.commit(NAME, {"of others.bin": b"x" * 500})
    found, at_first = run(server, tmp_path / "reader", ["resolve", NAME], ["resolve", NAME, first])
    assert {str(p.relative_to(found)): p.read_bytes() for p in Path(found).rglob("*") if p.is_file()} == {
        **FILES, "SHA256SUMS": (folder / "SHA256SUMS").read_bytes(),
    }  # fmt: skip
    assert "of others.bin" not in server.fetched and Path(at_first).name == first != Path(found).name
    # Loads from the cache without a network.
    assert run(server, tmp_path / "reader", ["resolve", NAME], HF_ENDPOINT="http://127.0.0.1:9") == [found]


def test_a_file_that_was_cut_short_is_noticed_and_fetched_again(server: hub.Hub, folder: Path, tmp_path: Path):
    files, large = {name: (folder / name).read_bytes() for name in (*FILES, "SHA256SUMS")}, list(FILES)[-1]
    server.commit(NAME, files)
    server.objects[server.commits[NAME][-1][1][large]] = files[large][:-1]
    [refused] = run(server, tmp_path, ["resolve", NAME])
    assert refused.startswith(f"refused: {NAME}: {large} does not match its sum in SHA256SUMS")
    server.commit(NAME, files)  # pushed again
    [found] = run(server, tmp_path, ["resolve", NAME])
    assert (Path(found) / large).read_bytes() == files[large]
    (Path(found) / large).resolve().write_bytes(b"numbers" * 99)  # damages the file in the local cache
    refused, again = run(server, tmp_path, ["resolve", NAME], ["resolve", NAME])
    assert refused.startswith(f"refused: {NAME}: {large} does not match") and again == found
    assert (Path(found) / large).read_bytes() == files[large]


def test_sums_that_name_files_outside_are_refused(server: hub.Hub, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for n, name in enumerate(("../../../../../../outside", str(outside))):
        server.commit(f"{NAME}{n}", {"SHA256SUMS": f"{'0' * 64}  {name}\n".encode()})
    for said in run(server, tmp_path / "home", ["resolve", f"{NAME}0"], ["resolve", f"{NAME}1"]):
        assert said.startswith("refused: ") and "do not use this export" in said
    assert outside.read_text() == "mine"


def test_what_the_hub_refuses_is_said_in_one_sentence(server: hub.Hub, folder: Path, tmp_path: Path):
    server.commit("someone/other", {"README.md": b"# Another model\n"})
    server.commit("someone/gated", {"SHA256SUMS": b""})
    server.gated.add("someone/gated")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "config.json").write_text("[]")
    expected = {
        ("resolve", "runs/demo"): "runs/demo is neither a folder here nor a model on the hub that you may read",
        ("resolve", "someone/other"): "someone/other has no SHA256SUMS: it is not an export",
        ("resolve", "someone/other", "v9"): f"{server.url}/someone/other has no revision 'v9'",
        ("resolve", "someone/gated"): "someone/gated is gated: accept its terms at",
        ("push", str(folder), "no name"): "--push=no name is not of the form ORG/NAME",
        ("push", str(damaged), NAME): f"{damaged}/config.json does not match its sum in SHA256SUMS",
    }
    said = run(server, tmp_path, *map(list, expected), token=hub.TOKEN)
    for line, sentence in zip(said, expected.values(), strict=True):
        assert line.startswith(f"refused: {sentence}")
    assert NAME not in server.commits
    [nowhere] = run(server, tmp_path, ["resolve", NAME], HF_ENDPOINT="http://127.0.0.1:9")
    assert nowhere.startswith("refused: http://127.0.0.1:9 cannot be reached, and someone/geotoken is not in the cache")


def test_a_folder_that_is_there_wins(tmp_path: Path):
    from geotoken_jax.predict.hub import resolve

    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert resolve("runs/demo").resolve() == tmp_path / "runs" / "demo"
    assert str(resolve("no/such/folder")) == "no/such/folder"  # not a valid name on the hub either
