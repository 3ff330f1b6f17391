"""Exports, checkpoints and GeoCLIP by their names on the hub, with the real client and a stand-in for the hub."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from geotoken_jax.interop import geoclip
from geotoken_jax.predict import bundle
from tests import checkpoints, hub, test_geoclip

GOLDEN = np.load(Path(__file__).parent / "golden" / "backbones.npz")
NAME = "someone/geotoken"
FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: cc-by-4.0\n---\n# A model\n",
    "align.safetensors": bytes(range(256)),
    "gallery/embeddings-00000-of-00001.npy": b"numbers" * 100,
}
RUN = """
import importlib, json, sys
for function, *arguments in json.loads(sys.argv[1]):
    module, name = function.rsplit(".", 1)
    try:
        print(getattr(importlib.import_module(f"geotoken_jax.{module}"), name)(*arguments))
    except ValueError as error:
        print("refused:", error)
"""
RESOLVE, PUSH = "predict.hub.resolve", "predict.hub.push"
FOLDER, IDENTITY = "backbone.checkpoint.folder", "backbone.checkpoint.identity"
CLIP = "someone/tiny-clip"


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
    """Returns the results or messages of functions of geotoken_jax, called in another process."""
    environment = server.environment(home, token) | more
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert hub.TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_pushed_export_comes_back_by_its_name(server: hub.Hub, folder: Path, tmp_path: Path):
    push = [PUSH, str(folder), NAME]
    [refused] = run(server, tmp_path / "writer", push)
    assert refused.startswith("refused: the hub refuses someone/geotoken (401): log in with")
    # A second push uploads no file again.
    assert run(server, tmp_path / "writer", push, push, token=hub.TOKEN) == [f"{server.url}/{NAME}"] * 2
    assert len(server.puts) == len(set(server.puts)) == 3
    assert set(server.commits[NAME][-1][1]) == {*FILES, "SHA256SUMS"}  # the manifest is not uploaded
    first = server.commits[NAME][1][0]
    server.commit(NAME, {"of others.bin": b"x" * 500})
    found, at_first = run(server, tmp_path / "reader", [RESOLVE, NAME], [RESOLVE, NAME, first])
    assert {str(p.relative_to(found)): p.read_bytes() for p in Path(found).rglob("*") if p.is_file()} == {
        **FILES, "SHA256SUMS": (folder / "SHA256SUMS").read_bytes(),
    }  # fmt: skip
    assert "of others.bin" not in server.fetched and Path(at_first).name == first != Path(found).name
    # Loads from the cache without a network.
    assert run(server, tmp_path / "reader", [RESOLVE, NAME], HF_ENDPOINT="http://127.0.0.1:9") == [found]


@pytest.mark.slow
def test_a_file_that_was_cut_short_is_noticed_and_fetched_again(server: hub.Hub, folder: Path, tmp_path: Path):
    files, large = {name: (folder / name).read_bytes() for name in (*FILES, "SHA256SUMS")}, list(FILES)[-1]
    server.commit(NAME, files)
    server.objects[server.commits[NAME][-1][1][large]] = files[large][:-1]
    [refused] = run(server, tmp_path, [RESOLVE, NAME])
    assert refused.startswith(f"refused: {NAME}: {large} does not match its sum in SHA256SUMS")
    server.commit(NAME, files)  # pushed again
    [found] = run(server, tmp_path, [RESOLVE, NAME])
    assert (Path(found) / large).read_bytes() == files[large]
    (Path(found) / large).resolve().write_bytes(b"numbers" * 99)  # damages the file in the local cache
    refused, again = run(server, tmp_path, [RESOLVE, NAME], [RESOLVE, NAME])
    assert refused.startswith(f"refused: {NAME}: {large} does not match") and again == found
    assert (Path(found) / large).read_bytes() == files[large]


def test_sums_that_name_files_outside_are_refused(server: hub.Hub, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for n, name in enumerate(("../../../../../../outside", str(outside))):
        server.commit(f"{NAME}{n}", {"SHA256SUMS": f"{'0' * 64}  {name}\n".encode()})
    for said in run(server, tmp_path / "home", [RESOLVE, f"{NAME}0"], [RESOLVE, f"{NAME}1"]):
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
        (RESOLVE, "runs/demo"): "runs/demo is neither a folder here nor a model on the hub that you may read",
        (RESOLVE, "someone/other"): "someone/other has no SHA256SUMS: it is not an export",
        (RESOLVE, "someone/other", "v9"): f"{server.url}/someone/other has no revision 'v9'",
        (RESOLVE, "someone/other@v8"): f"{server.url}/someone/other has no revision 'v8'",
        (RESOLVE, "someone/gated"): "someone/gated is gated: accept its terms at",
        (PUSH, str(folder), "no name"): "'no name' is not a name on the hub of the form ORG/NAME",
        (RESOLVE, "no/such/folder"): "there is no file or folder no/such/folder: correct the path, or name a model",
        (PUSH, str(damaged), NAME): f"{damaged}/config.json does not match its sum in SHA256SUMS",
    }
    said = run(server, tmp_path, *map(list, expected), token=hub.TOKEN)
    for line, sentence in zip(said, expected.values(), strict=True):
        assert line.startswith(f"refused: {sentence}")
    assert NAME not in server.commits
    typo = [RESOLVE, "run/export"]
    [nowhere] = run(server, tmp_path, typo, HF_ENDPOINT="http://127.0.0.1:9")
    no_folder = "refused: there is no folder run/export here, "
    assert nowhere.startswith(
        f"{no_folder}http://127.0.0.1:9 cannot be reached, and no model run/export is complete in"
    )
    [offline] = run(server, tmp_path, typo, HF_HUB_OFFLINE="1")
    assert offline.startswith(f"{no_folder}HF_HUB_OFFLINE is set, and no model run/export is complete in the cache")


def test_a_folder_that_is_there_wins(tmp_path: Path):
    from geotoken_jax.predict.hub import resolve

    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert resolve("runs/demo").resolve() == tmp_path / "runs" / "demo"


def commit_checkpoint(server: hub.Hub, name: str, kind: str, folder: Path, more: dict[str, bytes] | None = None) -> str:
    """Commits a tiny checkpoint and returns the commit's name. more: further files."""
    shapes = json.loads(str(GOLDEN[f"{kind}/shapes"]))
    files = {path.name: path.read_bytes() for path in checkpoints.write(folder, kind, shapes).iterdir()}
    server.commit(name, {**files, **(more or {})})
    return server.commits[name][-1][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_checkpoint_is_downloaded_once_with_the_files_that_are_read(server: hub.Hub, tmp_path: Path, kind: str):
    others = {"pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"x" * 500, "README.md": b"# A model\n"}
    first = commit_checkpoint(server, CLIP, kind, tmp_path / kind, others)
    server.cut.add("model.safetensors")  # the first answer ends in the middle, and the client asks again
    environment = server.environment(tmp_path / "home")
    command = [sys.executable, "-c", RUN, json.dumps([[IDENTITY, CLIP], [FOLDER, CLIP]])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    identity, found = done.stdout.splitlines()
    assert identity == f"{CLIP}@{first}" and Path(found).name == first
    wanted = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    assert {p.name: p.read_bytes() for p in Path(found).rglob("*") if p.is_file()} == wanted
    assert set(server.fetched) == set(wanted) and not server.cut
    begun, ended = (line for line in done.stderr.splitlines() if line.startswith("download "))
    size = sum(map(len, wanted.values())) - len(wanted["config.json"])
    assert begun == f"download {CLIP} from {server.url}: {len(wanted) - 1} files, {size / 1e6:.1f} MB"
    assert ended.startswith(f"download {CLIP}: complete in ")


@pytest.mark.slow
def test_a_checkpoint_in_the_cache_needs_no_network_and_keeps_its_identity(server: hub.Hub, tmp_path: Path):
    first = commit_checkpoint(server, CLIP, "clip", tmp_path / "clip")
    calls = [IDENTITY, CLIP], [FOLDER, f"{CLIP}@{first}"]
    identity, found = run(server, tmp_path / "home", *calls)
    server.fetched.clear()
    for more in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        assert run(server, tmp_path / "home", *calls, **more) == [identity, found]
    server.commit(CLIP, {"config.json": (tmp_path / "clip" / "config.json").read_bytes() + b" "})
    (tmp_path / "home").rename(tmp_path / "moved")
    again, pinned, _ = run(server, tmp_path / "moved", [IDENTITY, CLIP], [IDENTITY, f"{CLIP}@{first}"], calls[1])
    assert again == f"{CLIP}@{server.commits[CLIP][-1][0]}" != pinned == identity
    assert server.fetched == ["config.json"]  # the one of the new commit


@pytest.mark.slow
def test_why_a_checkpoint_cannot_be_had_is_said_in_one_sentence(server: hub.Hub, tmp_path: Path):
    commit_checkpoint(server, CLIP, "clip", tmp_path / "clip")
    files = {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()}
    weights = files.pop("model.safetensors")
    server.commit("someone/pickle", {**files, "pytorch_model.bin": b"a pickle"})
    server.commit("someone/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights})
    server.commit("someone/else", {"README.md": b""})
    server.commit("someone/json", {"config.json": b"<html>", "model.safetensors": weights})
    server.commit("someone/short", {**files, "model.safetensors": weights + b"of this one"})
    server.objects[server.commits["someone/short"][-1][1]["model.safetensors"]] = weights
    expected = {
        "someone/none": "someone/none is neither a folder here nor a model on the hub that you may read",
        f"{CLIP}@v9": f"{server.url}/{CLIP} has no revision 'v9': name a branch, a tag or a commit of it",
        "someone/bert": "someone/bert has a checkpoint of model_type 'bert': choose a checkpoint of model_type clip or",
        "someone/else": "someone/else has no config.json: it is not a checkpoint of CLIP or SigLIP 2",
        "someone/json": f"{tmp_path}/hub/models--someone--json/snapshots/{'1'.zfill(40)}/config.json is damaged",
        "someone/short": "someone/short: model.safetensors does not match its hash on the hub: it was damaged in",
        "someone/pickle": f"someone/pickle@{'1'.zfill(40)} has no model.safetensors on the hub",
        "clip-vit-large-patch14": "there is no file or folder clip-vit-large-patch14: correct the path, or name",
        str(tmp_path / "none"): f"there is no file or folder {tmp_path}/none: correct the path, or name a model",
    }
    calls = [[FOLDER, name] for name in expected]
    for line, sentence in zip(run(server, tmp_path, *calls), expected.values(), strict=True):
        assert line.startswith(f"refused: {sentence}")
    assert "pytorch_model.bin" not in server.fetched and server.fetched.count("model.safetensors") == 1
    # The damaged file was removed from the cache: the next download is complete.
    server.objects[server.commits["someone/short"][-1][1]["model.safetensors"]] = weights + b"of this one"
    [found] = run(server, tmp_path, [FOLDER, "someone/short"])
    assert (Path(found) / "model.safetensors").read_bytes() == weights + b"of this one"
    # Damaged on the disk.
    (Path(found) / "vocab.json").resolve().write_bytes(b"{}")
    [damaged] = run(server, tmp_path, [FOLDER, "someone/short"])
    assert damaged.startswith("refused: someone/short: vocab.json does not match its hash on the hub")
    (tmp_path / "file").touch()
    [stored] = run(server, tmp_path / "file", [FOLDER, CLIP])
    assert stored.startswith(
        f"refused: {CLIP} cannot be stored in the cache {tmp_path}/file/hub (Not a directory): make"
    )
    # The rest of it cannot be downloaded offline.
    [offline] = run(server, tmp_path, [FOLDER, "someone/short"], HF_HUB_OFFLINE="1")
    assert offline.startswith("refused: there is no folder someone/short here, HF_HUB_OFFLINE is set, and no model")


@pytest.mark.slow
def test_geoclip_needs_nothing_but_photos(server: hub.Hub, tmp_path: Path):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in test_geoclip.SHAPES.items()}
    clip = test_geoclip.clip_of(tmp_path / "clip", test_geoclip.WIDTH)
    backbone = "openai/clip-vit-large-patch14"
    server.commit(backbone, {path.name: path.read_bytes() for path in clip.iterdir()})
    commit = server.commits[backbone][-1][0]
    server.commit(backbone, {"config.json": b"of another version"})  # the release names the commit before
    release = test_geoclip.release(weights, rng.uniform((-80, -180), (80, 180), (40, 2)), f"{backbone}@{commit}")
    server.commit(geoclip.HUB, {**release, "README.md": b"# GeoCLIP", "model.bin": b"a pickle"})
    photo = tmp_path / "a.png"
    checkpoints.images()[0].save(photo)
    command = [sys.executable, "-m", "geotoken_jax", "predict", "--method=geoclip", "--json", str(photo)]
    environment = server.environment(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert set(server.fetched) == {*release, *(path.name for path in clip.iterdir())}  # no README.md, no pickle
    assert f"download {geoclip.HUB} from {server.url}: 2 files" in done.stderr
    folder = tmp_path / "release"
    folder.mkdir()
    for name, data in release.items():
        (folder / name).write_bytes(data)
    answer = geoclip.GeoCLIPPredictor(clip, folder).predict(str(photo))
    assert json.loads(done.stdout) == {"id": str(photo), **json.loads(json.dumps(answer.plain()))}
    # GeoCLIP's other repositories and other models are refused before their weights are downloaded.
    server.commit("someone/other", {"config.json": b'{"model_type": "geoclip-location-encoder", "format_version": 1}'})
    [refused] = run(server, tmp_path / "home", ["interop.geoclip.read_gallery", "someone/other"])
    assert refused.startswith("refused: someone/other has a model of model_type 'geoclip-location-encoder', format 1")
