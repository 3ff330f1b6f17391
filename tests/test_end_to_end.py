"""All stages on a tiny EarthView: run, repeated, interrupted and resumed; then the export is used."""

import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from data_prep import images
from geotoken_jax import GeoToken, cli, manifests, records
from geotoken_jax.gallery.table import COLUMNS
from geotoken_jax.manifests import StageError
from geotoken_jax.serve import app, limits
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Workdir
from tests import hub, test_judge

CONFIG = str(Path(__file__).with_name("tiny.py"))
#: Files that later stages use; event files and metrics also contain times.
RESULTS = ("*/manifest.json", "*/*/manifest.json", "*/*.safetensors", "*/*/*.safetensors", "predictions/*/*.jsonl",
           "photos/*/*/*array_record*", "features/*array_record*", "tokens/*array_record*", "gallery/*.npy",
           "neighbors/*.npy", "report/metrics.json", "export/SHA256SUMS")  # fmt: skip


def geotoken(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def results(workdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for pattern in RESULTS for p in workdir.glob(pattern)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run [m] {x} é")
    assert geotoken("all", f"--config={CONFIG}", f"--workdir={path}") == 0
    return path


def test_every_folder_of_the_path_is_there(workdir: Path):
    folders = ["photos", "features", "align", "gallery", "queries", "neighbors", "tokens", "report", "export"]
    for folder in [
        *folders,
        "geotoken/geotoken",
        "geotoken/paper",
        "channels",
        "reranker/geotoken",
        "predictions/top1_neighbor",
        "predictions/geotoken",
    ]:
        assert (workdir / folder / "manifest.json").exists(), folder
    lines = [json.loads(line) for line in (workdir / "predictions/geotoken/test.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [records.Photos(workdir / "photos", "test")[i]["id"] for i in range(40)]
    assert sum(c["count"] for c in lines[0]["candidates"]) == 6  # the greedy one and 5 samples
    assert (workdir / "queries/train_views").exists()  # read by training only
    assert not list(workdir.glob("predictions/*/train*"))
    assert list(workdir.glob("gallery/authors-*")) and not list(workdir.glob("export/gallery/authors-*"))


def test_the_page_of_formats_reads_each_folder_without_this_package(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    sections = {part.split("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.S) for part in page.split("\n## ")[1:]}
    assert "geotoken_jax" not in "".join(itertools.chain(*sections.values()))
    monkeypatch.chdir(workdir)
    found = {}
    for section, blocks in sections.items():
        for block in blocks:
            exec(block, made := {})
            found[section] = {**found.get(section, {}), **made}
    assert capsys.readouterr().out.count("\n") >= sum(map(len, sections.values()))

    opened = Workdir(workdir)
    photos, features = opened.photos("train"), opened.features("train")[:]
    assert found["photos/"]["photo"]["id"].decode() == photos[0]["id"]
    np.testing.assert_array_equal(found["photos/"]["photo"]["coordinates"], photos[0]["coordinates"])
    np.testing.assert_array_equal(found["photos/"]["gray"][0], images.thumbnail(photos[0]["image"]))
    np.testing.assert_array_equal(found["features/"]["rows"]["tokens"], features["tokens"])
    np.testing.assert_array_equal(found["features/"]["image"], features["image"].astype(np.float32))
    table = found["gallery/ and queries/"]["table"]
    assert table.keys() == COLUMNS.keys() - {"sources"}  # EarthView is one source
    for name, values in table.items():
        np.testing.assert_array_equal(values, getattr(opened.gallery, name)().astype(values.dtype))
    for name, values in zip(("rows", "scores"), opened.neighbors("test"), strict=True):
        np.testing.assert_array_equal(found["neighbors/"][name], values)
    tokens = records.Records(workdir / "tokens", "train", records.token_layout(opened.neighbor_count))[:]
    np.testing.assert_array_equal(found["tokens/"]["rows"]["neighbors"], tokens["neighbors"])
    for folder in ("features", "tokens", "gallery", "queries", "neighbors"):
        assert "schema.json" in opened.manifest(folder).files


def test_a_second_run_keeps_everything(workdir: Path, capsys: pytest.CaptureFixture[str]):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert geotoken("all", f"--config={CONFIG}", f"--workdir={workdir}") == 0
    printed = capsys.readouterr().out
    assert "made" not in printed.split("Percent")[0] and printed.count("kept") >= 14
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(workdir: Path, tmp_path: Path):
    kills = 12
    command = [sys.executable, "-m", "geotoken_jax", "all", f"--config={CONFIG}", "--workdir=run"]
    rng = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0"))
    for attempt in range(40):
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as run:
            began = time.monotonic()
            limit = rng.uniform(3.0, 9.0) if attempt < kills else 300.0
            while run.poll() is None and time.monotonic() - began < limit:
                time.sleep(0.05)
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            output = run.communicate()[0].decode()
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, output
    assert run.returncode == 0
    unbroken, broken = results(workdir), results(tmp_path / "run")
    assert unbroken.keys() == broken.keys()
    assert [name for name in unbroken if unbroken[name] != broken[name]] == []
    assert list(tmp_path.rglob("*.partial")) == []


PREPARED = ("photos", "features", "gallery", "queries", "neighbors", "tokens")


def flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(file: Path, other: Path) -> None:
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second), other.write_bytes(first)


#: Kind of damage -> function of a file and of another file of its folder.
DAMAGES = {
    "truncated": lambda file, other: os.truncate(file, file.stat().st_size // 2),
    "flipped": flip,
    "removed": lambda file, other: file.unlink(),
    "swapped": swap,
}


def largest(workdir: Path, folder: str, within: str = "") -> list[Path]:
    """Returns the two largest files of a folder whose names begin with `within`."""
    files = json.loads((workdir / folder / "manifest.json").read_text())["files"]
    names = [name for name in files if name.startswith(within) and (within or not name.startswith("index/"))]
    return [workdir / folder / name for name in sorted(names, key=lambda name: (files[name][0], name))[-2:]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_found_and_made_again_to_the_same_bytes(workdir, tmp_path, capsys, damage):
    for folder in (*PREPARED, "align"):
        shutil.copytree(workdir / folder, tmp_path / folder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert geotoken("verify", str(tmp_path)) == 0
    capsys.readouterr()
    for other, file in [*(largest(tmp_path, folder) for folder in PREPARED), largest(tmp_path, "gallery", "index/")]:
        DAMAGES[damage](file, other)
    bad = {p for p in before if not p.exists() or p.read_bytes() != before[p]}
    assert len(bad) >= 7
    assert geotoken("verify", str(tmp_path)) == cli.REFUSED
    printed = capsys.readouterr()
    assert {line.split()[0] for line in printed.out.splitlines() if line.startswith("  ")} == {
        str(p.relative_to(tmp_path)) for p in bad
    }
    assert f"{len(bad)} files of {tmp_path} are bad, as listed" in printed.err and "--mend" in printed.err
    if damage != "flipped":
        folders = [folder for folder in PREPARED if any(p.is_relative_to(tmp_path / folder) for p in bad)]
        for folder in folders:
            changed = [p for p in bad if not p.exists() or p.stat().st_size != len(before[p])]
            if any(p.is_relative_to(tmp_path / folder) for p in changed):
                with pytest.raises(StageError, match=rf"{folder}/.* bytes were written: restore it"):
                    manifests.begin(tmp_path, "audit/any", {}, [folder])
    assert geotoken("verify", str(tmp_path), "--mend", f"--config={CONFIG}") == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "audit", ignore_errors=True)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after.keys() == before.keys() and [p for p in before if after[p] != before[p]] == []


def test_other_stages_are_named_and_a_configuration_is_asked_for(workdir, tmp_path, capsys):
    for folder in ("photos", "align"):
        shutil.copytree(workdir / folder, tmp_path / folder)
    flip(tmp_path / "align" / "parameters.safetensors", tmp_path)
    assert geotoken("verify", str(tmp_path)) == cli.REFUSED
    printed = capsys.readouterr()
    assert "  align/parameters.safetensors has other contents than were written" in printed.out
    assert "or make all of it again with `geotoken all --remake=align`" in printed.err
    assert geotoken("verify", str(tmp_path), "--mend") == cli.REFUSED
    assert "--config=FILE is missing: --mend needs" in capsys.readouterr().err
    assert geotoken("verify", str(tmp_path / "none")) == cli.REFUSED
    assert "there is no work directory" in capsys.readouterr().err


def test_a_language_model_may_choose_too(workdir: Path, tmp_path: Path):
    """A judge that chooses the second candidate in its list."""
    shutil.copytree(workdir / "predictions", tmp_path / "predictions")
    for folder in ("photos", "queries", "gallery", "neighbors", "tokens", "align", "geotoken", "channels", "reranker"):
        (tmp_path / folder).symlink_to(workdir / folder)
    made = []
    server = test_judge.Server(lambda body, n: test_judge.says('{"number": 2}'))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    judge = [f"--config.judge.base_url={server.url}", "--config.judge.model=any", "--variant=geotoken"]
    try:
        for photos in (3, 0):
            more = f"--config.judge.photos={photos}"
            assert geotoken("predict", f"--config={CONFIG}", f"--workdir={tmp_path}", *judge, more) == 0
            made.append(
                json.loads((tmp_path / "predictions/geotoken_judge/manifest.json").read_text())["counts"]["test"]
            )
    finally:
        server.shutdown()
        server.server_close()
    judged = tmp_path / "predictions/geotoken_judge"
    lines = [json.loads(line) for line in (judged / "test.jsonl").read_text().splitlines()]
    answered = (workdir / "predictions/geotoken/test.jsonl").read_text().splitlines()
    for line, unasked in zip(lines, map(json.loads, answered), strict=True):
        order = np.argsort([-c["log_probability"] for c in unasked["candidates"]], kind="stable")
        second = unasked["candidates"][order[min(1, len(order) - 1)]]
        assert (line["id"], line["latitude"], line["longitude"], line["choice"]) == (
            unasked["id"], second["latitude"], second["longitude"], "judge",
        )  # fmt: skip
    report = json.loads((judged / "judge/test.json").read_text())
    assert report["photos"] == len(lines) and len(server.bodies) == report["requests"] == len(lines)
    assert made == [3, 40] and not (judged / "validation.jsonl").exists()


def test_changed_settings_are_refused_by_name(workdir: Path, capsys: pytest.CaptureFixture[str]):
    changed = ["--config.model.width=32"]
    assert geotoken("train", f"--config={CONFIG}", f"--workdir={workdir}", *changed) == cli.REFUSED
    error = capsys.readouterr().err
    assert "config.model.width is 32, but " in error and "was made with 16: use another --workdir" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", [["predict"], ["learn"], ["export"], ["audit", "levels"]])
@pytest.mark.parametrize(
    ("key", "made_with", "asked"),
    [
        ("model.heads", 2, 4),
        ("model.activation", "gelu", "relu"),
        ("model.memory", "compact", "full"),
        ("model.scheme", "s2", "latlon"),
        ("align.model.location.projection", "mercator", "equal_earth"),
    ],
)
def test_other_settings_than_a_trained_parts_own_are_refused(workdir, capsys, verb, key, made_with, asked):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    change = [f"--config.{key}={asked}"]
    if key == "model.scheme":  # exact search does not support these cells, and its error would come first
        change += ["--config.predict.search.expansions=0", "--config.predict.selectors=('greedy','reward')",
                   "--config.predict.choice=greedy"]  # fmt: skip
    assert geotoken(*verb, f"--config={CONFIG}", f"--workdir={workdir}", *change) == cli.REFUSED
    error = capsys.readouterr().err
    assert f"config.{key} is {asked!r}, but " in error and f"was made with {made_with!r}: set config.{key} to" in error
    assert error.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


@pytest.mark.parametrize(
    ("verb", "change"),
    [
        ("index", "index.search.threads=7"),
        ("align", "align.loss.chunk=64"),
        ("train", "train.accumulate=2"),
        ("train", "model.remat=dots"),
        ("learn", "channels.train.log_every=9"),
        ("predict", "predict.batch_size=7"),
        ("predict", "judge.timeout_s=7.0"),
        ("export", "embed.threads=3"),
    ],
)
def test_what_cannot_change_a_result_keeps_it(workdir, capsys, verb, change):
    assert geotoken(verb, f"--config={CONFIG}", f"--workdir={workdir}", f"--config.{change}") == 0
    printed = capsys.readouterr().out
    assert "kept " in printed and "made " not in printed


@pytest.fixture(scope="module")
def photo(workdir: Path) -> bytes:
    return records.Photos(workdir / "photos", "test")[0]["image"]


def test_the_exported_model_answers_as_the_work_directory_did(workdir: Path):
    model = GeoToken.load(workdir / "export")
    photos = records.Photos(workdir / "photos", "test")
    lines = [json.loads(line) for line in (workdir / "predictions/geotoken/test.jsonl").read_text().splitlines()]
    answers = model.predict([photos[i]["image"] for i in range(5)])
    _, scores = Workdir(workdir).neighbors("test")
    for answer, line, near in zip(answers, lines, scores, strict=False):
        # Of candidates some meters apart, whose values are equal, either may be the answer.
        place = pytest.approx((line["latitude"], line["longitude"]), abs=1e-4)
        assert (answer.latitude, answer.longitude) == place
        np.testing.assert_allclose([n.score for n in answer.neighbors], near[:4], atol=1e-5)
        # Neighbors with equal scores, such as two photos of one author, can be in any order.
        assert sorted(n.id for n in answer.neighbors) == sorted(n["id"] for n in line["neighbors"])


@pytest.mark.slow
def test_an_int8_export_goes_to_the_hub_and_answers_from_there(workdir: Path, photo: bytes, tmp_path: Path):
    for folder in workdir.iterdir():
        if folder.name != "export":
            (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "a.jpg").write_bytes(photo)
    command = [sys.executable, "-m", "geotoken_jax"]
    made_with = [f"--config={CONFIG}", "--config.export.gallery=int8"]
    with hub.serving() as server:
        environment = server.environment(tmp_path / "home", hub.TOKEN)

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr
            assert hub.TOKEN not in done.stdout + done.stderr
            return done.stdout

        printed = run("export", *made_with, f"--workdir={tmp_path}", "--push=someone/geotoken")
        assert printed.splitlines()[-1] == f"open {server.url}/someone/geotoken"
        answer = json.loads(run("predict", "--model=someone/geotoken", "--json", str(tmp_path / "a.jpg")))
    exported = GeoToken.from_pretrained(tmp_path / "export", verify=True)
    expected = dataclasses.asdict(exported.predict(photo))
    assert answer == {"id": str(tmp_path / "a.jpg"), **json.loads(json.dumps(expected))}
    with pytest.raises(SettingsError, match="'someone' is not a name on the hub"):
        exported.push_to_hub("someone")
    figures = json.loads((tmp_path / "export/manifest.json").read_text())["facts"]["int8"]
    assert figures["photos"] == 30 and figures["bytes"][1] < 0.6 * figures["bytes"][0]
    card = huggingface_hub.ModelCard((tmp_path / "export/README.md").read_text()).data
    assert card.license == "cc-by-4.0" and card.library_name == "geotoken-jax"
    reported = json.loads((workdir / "report/metrics.json").read_text())["splits"]["test"]["methods"]
    own = next(m for m in reported if m["variant"] == "geotoken" and m["main"])
    results = [r.metric_value for r in card.eval_results or [] if r.dataset_split == "test"]
    assert results == [a["value"] for a in own["accuracy"]]
    text = "".join((tmp_path / "export" / name).read_text() for name in ("README.md", "config.json", "provenance.json"))
    assert "| int8 minus bfloat16 |" in text and "Places and their names are from GeoNames" in text
    assert str(workdir) not in text and str(tmp_path) not in text


def test_one_photo_in_any_form_gives_one_answer(workdir: Path, photo: bytes, tmp_path: Path):
    model = GeoToken.load(workdir / "export")
    image = Image.open(io.BytesIO(photo))
    (tmp_path / "a.jpg").write_bytes(photo)
    forms = [str(tmp_path / "a.jpg"), tmp_path / "a.jpg", photo, image, np.asarray(image.convert("RGB"))]
    answers = [model.predict(form) for form in forms]
    assert answers[0] == answers[1] == answers[2]
    assert answers[3] == answers[4]  # decoded by the caller at full size; a file is decoded at thumbnail size
    for answer in model.predict([forms[0], forms[1]]):
        assert (answer.latitude, answer.longitude) == (answers[0].latitude, answers[0].longitude)
        assert [n.id for n in answer.neighbors] == [n.id for n in answers[0].neighbors]
    first = answers[0]
    probabilities = [c.probability for c in first.candidates]
    assert probabilities[1:] == sorted(probabilities[1:], reverse=True)  # the greedy candidate is before them
    assert 0 < sum(probabilities) <= 1.0001
    assert first.radius_km >= 0 and abs(first.latitude) <= 90


def test_the_exported_model_is_served_as_it_answers(workdir: Path, photo: bytes):
    photos = [photo] * 2
    model = app.make(GeoToken(workdir / "export"), limits.ServeSettings(batch_size=2))
    with TestClient(model) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)
        found = client.post("/v1/predict-many", files=[("photos", photo) for photo in photos]).json()["answers"]
    expected = GeoToken.load(workdir / "export").predict(photos)
    assert found == [json.loads(json.dumps(answer.plain())) for answer in expected]


def test_a_bad_photo_costs_one_line_and_the_others_are_answered(
    workdir: Path, photo: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "folder"
    folder.mkdir()
    image = Image.open(io.BytesIO(photo))
    for ending in ("jpg", "png", "webp"):
        image.save(folder / f"good.{ending}")
    (tmp_path / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    (tmp_path / "text.jpg").write_text("this is not a photo")
    Image.new("1", (40_000, 8_000)).save(tmp_path / "bomb.png")
    bad = [tmp_path / name for name in ("cut.jpg", "text.jpg", "bomb.png", "missing.jpg")]
    status = geotoken("predict", f"--model={workdir / 'export'}", *map(str, bad), str(folder))
    out, err = capsys.readouterr()
    assert status == cli.REFUSED
    assert sorted(line.split("  ")[0] for line in out.splitlines()) == sorted(p.name for p in folder.iterdir())
    errors = [line for line in err.splitlines() if line.startswith("geotoken predict:")]
    assert len(errors) == len(bad) and all(str(p) in line for p, line in zip(bad, errors, strict=True))


def test_json_lines_of_photos(workdir: Path, photo: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jpg").write_bytes(photo)
    assert geotoken("predict", f"--model={workdir / 'export'}", "--json", str(tmp_path / "a.jpg")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (
        answer["id"] == str(tmp_path / "a.jpg")
        and {"latitude", "longitude", "place", "radius_km", "candidates"} <= answer.keys()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--workdir=x"], "--config=FILE"),
        (["train", f"--config={CONFIG}"], "--workdir=DIR"),
        (["train", "--config=nowhere.py", "--workdir=x"], "nowhere.py does not exist: run the command in a clone"),
        (["embed", f"--config={CONFIG}", "--workdir={empty}"], "run `geotoken prepare`"),
        (["train", f"--config={CONFIG}", "--workdir=x", "--config.model.widht=3"], "config.model.widht"),
        (["train", f"--config={CONFIG}", "--workdir=x", "--variant=other"], "choose one of geotoken"),
        (["train", f"--config={CONFIG}", "--workdir={made}", "--config.model.backbone_width=9"], "set it to 48"),
        (["train", f"--config={CONFIG}", "--workdir={made}", "--config.model.context=time"], "has a capture time"),
        (["predict", "photo.jpg"], "--model=DIR"),
        (["predict", "--model={empty}", "photo.jpg"], "config.json"),
        (["evaluate", "--predictions=a.csv"], "--truth=FILE"),
        (["evaluate", "--predictions=a.csv", "--truth=b.csv"], "b.csv"),
        (["train", "--oops"], "--oops"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], said: str, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    filled = [a.format(empty=tmp_path, made=workdir) for a in arguments]
    assert geotoken(*filled) == cli.REFUSED
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1, error


def test_anybodys_csv_is_scored(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "truth.csv").write_text("id,latitude,longitude\na,0,0\nb,10,10\n")
    (tmp_path / "mine.csv").write_text("IMG_ID,LAT,LON\na,0,0.001\nb,10,20\n")
    assert geotoken("evaluate", f"--predictions={tmp_path / 'mine.csv'}", f"--truth={tmp_path / 'truth.csv'}") == 0
    assert "50.0" in capsys.readouterr().out
