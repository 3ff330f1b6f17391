"""A folder of photos: which files are taken, what is printed or written, and what an interruption leaves."""

import csv
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from benchmarks import album
from geotoken_jax import cli, commands
from geotoken_jax.backbone.preprocess import ImageError, open_image
from geotoken_jax.folder import outputs, sidecars
from geotoken_jax.folder import photos as folder
from geotoken_jax.predict.prediction import Candidate, Prediction
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.settings import SettingsError
from tests import exports
from tests.test_sources import write_csv


class Sizes(Predictor):
    """Predicts a photo's file size as its latitude. Files that contain "bad" cannot be read."""

    batch_size = 4
    folder = "m"

    def __init__(self, stop_after: int | None = None):
        self.asked: list[str] = []
        self.stop_after = stop_after

    def prepare(self, photo: Any) -> Any:
        if isinstance(photo, str) and Path(photo).read_bytes() == b"bad":
            raise ImageError(f"{photo} is damaged: copy it again")
        return photo

    def predict_prepared(self, photos: Any, captured: Any = None) -> list[Prediction]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += photos
        sizes = [os.path.getsize(p) if isinstance(p, str) else len(p) for p in photos]
        place = "99 km from Ō & B, C"
        return [
            Prediction(float(n % 90), -170.0, 10.0, 99.0, within(n), (Candidate(1.0, -170.0),), (), (), place=place)
            for n in sizes
        ]


def within(size: int) -> dict[int, float]:
    return {1: 0.1, 25: 0.5 if size < 20 else 0.3, 200: 0.9, 750: 0.95, 2500: 1.0}


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos [1]"
    for name in ("b.jpg", "a.JPG", "sub/c.heic", "sub/d.avif", "sub/ü é.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * (10 + len(name)))
    for name in ("._a.JPG", ".DS_Store", "__MACOSX/a.jpg", "raw.cr2", "raw2.cr2", "film.mov", "note"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "bad.jpg").write_bytes(b"bad")
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    return root


def test_every_file_of_a_folder_is_taken_counted_or_clutter(photos):
    (photos / "b.jpg.xmp").write_bytes(b"a sidecar")
    found = folder.find([str(photos)])
    assert list(found.photos) == ["a.JPG", "b.jpg", "bad.jpg", "sub/c.heic", "sub/d.avif", "sub/ü é.png"]
    assert list(found.notes()) == [
        "left out 5 files that are not photos in a known format: 2 .cr2, 1 .mov, 1 without an ending, 1 pipes, "
        "sockets, broken links or linked folders"
    ]
    single = folder.find([str(photos / "b.jpg"), str(photos)])
    assert next(iter(single.photos)) == str(photos / "b.jpg") and "b.jpg" in single.photos


def test_a_folder_without_photos_says_what_it_has(tmp_path):
    (tmp_path / "x.cr2").write_bytes(b"x")
    with pytest.raises(SettingsError, match=r"has no photo \(left out 1 .*: 1 \.cr2\): name a folder with files that"):
        folder.find([str(tmp_path)])


def test_a_bad_photo_is_reported_and_the_others_are_printed(photos, capsys):
    assert folder.run(Sizes(), "m", folder.find([str(photos)]), folder.Form()) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == (
        "a.JPG  15.00000, -170.00000  99 km from Ō & B, C  50 % within 10 km, 90 % within 99 km"
    )
    assert len(printed.out.splitlines()) == 5
    assert "bad.jpg is damaged: copy it again" in printed.err and "left out 5 files" in printed.err


@pytest.mark.parametrize("ending", outputs.FORMATS)
def test_an_interrupted_file_continues_to_the_same_bytes(photos, tmp_path, ending, capsys):
    for name in ("a.JPG", "b.jpg"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photos / name, "JPEG")
    whole, broken = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    found = folder.find([str(photos)])
    folder.run(Sizes(), "m", found, folder.Form(str(whole)))
    with pytest.raises(KeyboardInterrupt):
        folder.run(Sizes(stop_after=4), "m", found, folder.Form(str(broken)))
    assert not broken.exists()
    partial = tmp_path / f"broken{ending}.partial"
    partial.write_bytes(partial.read_bytes()[:-7])  # killed within a line
    resumed = Sizes()
    folder.run(resumed, "m", found, folder.Form(str(broken)))
    assert len(resumed.asked) == 2 and not partial.exists()
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_an_interruption_at_the_end_loses_nothing(photos, tmp_path, monkeypatch, step):
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    found = folder.find([str(photos)])
    folder.run(Sizes(), "m", found, folder.Form(str(whole)))

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, step, interrupted)
        folder.run(Sizes(), "m", found, folder.Form(str(broken)))
    resumed = Sizes()
    folder.run(resumed, "m", found, folder.Form(str(broken)))
    assert resumed.asked == [] and broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["broken.csv", "whole.csv"]


KILLED = """
import sys, time
from geotoken_jax.folder import photos
from tests.test_folder import Sizes

class Slow(Sizes):
    def predict_prepared(self, photos, captured=None):
        time.sleep(0.02)
        return super().predict_prepared(photos, captured)

sys.exit(photos.run(Slow(), "m", photos.find([sys.argv[1]]), photos.Form(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".csv", *list(outputs.FORMATS)[1:]])
@pytest.mark.parametrize("kills", [1, 4])
def test_a_killed_command_continues_to_the_same_bytes(tmp_path, ending, kills):
    root, whole, broken = tmp_path / "photos", tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    root.mkdir()
    for number in range(16 * kills):
        Image.new("RGB", (8 + number, 8)).save(root / f"{number}.png")
    folder.run(Sizes(), "m", folder.find([str(root)]), folder.Form(str(whole)))
    partial, killed, rng = tmp_path / f"broken{ending}.partial", 0, random.Random(0)
    while not broken.exists() or partial.exists():
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(root), str(broken)])
        before = partial.stat().st_size if partial.exists() else 0
        while killed < kills and process.poll() is None:
            time.sleep(0.005)
            if partial.exists() and partial.stat().st_size != before:
                time.sleep(rng.uniform(0, 0.06))  # up to 3 of 4 batches per kill
                process.kill()
                killed += process.wait() == -signal.SIGKILL
        assert process.wait() in (0, -signal.SIGKILL)
    assert killed == kills and broken.read_bytes() == whole.read_bytes()


def test_files_open_in_readers_of_their_format(photos, tmp_path):
    found = folder.find([str(photos)])
    for ending in outputs.FORMATS:
        folder.run(Sizes(), "m", found, folder.Form(str(tmp_path / f"answers{ending}")))
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert [row["id"] for row in rows] == ["a.JPG", "b.jpg", "sub/c.heic", "sub/d.avif", "sub/ü é.png"]
    assert rows[0]["within_25"] == "0.5" and rows[0]["radius_90_km"] == "99.0"
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["candidates"] and [line["id"] for line in lines] == [row["id"] for row in rows]
    points = json.loads((tmp_path / "answers.geojson").read_text())["features"]
    assert points[0]["geometry"] == {"type": "Point", "coordinates": [-170.0, 15.0]}
    assert points[0]["properties"]["unknown"] is False
    kml = xml.etree.ElementTree.parse(tmp_path / "answers.kml")
    names = [e.text for e in kml.iter("{http://www.opengis.net/kml/2.2}name")]
    assert names[-1] == "sub/ü é.png"
    assert "sub/ü é.png" in (page := (tmp_path / "answers.html").read_text())
    described = next(kml.iter("{http://www.opengis.net/kml/2.2}description")).text
    assert described == "99 km from Ō & B, C; 50 % within 10 km, 90 % within 99 km"
    found_places = [rows[0]["place"], lines[0]["place"], points[0]["properties"]["place"]]
    assert found_places == ["99 km from Ō & B, C"] * 3 and "99 km from Ō &amp; B, C" in page


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", r"has no known ending: use one of \.csv, \.jsonl"),
        ("there.csv", "exists: remove it"),
        ("none/x.csv", r"cannot be written \(No such file"),
        ("other.csv", "was begun with another model: remove it"),
    ],
)
def test_outputs_that_cannot_be_are_refused(tmp_path, name, message):
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "other.csv.partial").write_text('{"model": "b"}\n')
    with pytest.raises(SettingsError, match=message):
        outputs.Output(tmp_path / name, "a")


def test_uncertain_answers_are_unknown_in_every_form(photos, tmp_path, capsys):
    (photos / "bad.jpg").unlink()
    found, rule = folder.find([str(photos)]), outputs.MinWithin.read("25:0.5")
    assert rule == outputs.MinWithin(25, 0.5)
    folder.run(Sizes(), "m", found, folder.Form(min_within=rule))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "b.jpg  15.00000, -170.00000  99 km from Ō & B, C  50 % within 10 km, 90 % within 99 km"
    assert lines[2] == "sub/c.heic  unknown  50 % within 10 km, 90 % within 99 km"
    folder.run(Sizes(), "m", found, folder.Form(json=True, min_within=rule))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ending in outputs.FORMATS:
        folder.run(Sizes(), "m", found, folder.Form(str(tmp_path / f"answers{ending}"), min_within=rule))
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert written == printed and [one.get("unknown", False) for one in written] == [False, False, True, True, True]
    assert "latitude" not in written[2] and written[2]["radius_km"] == 10 and written[2]["within"]["25"] == 0.3
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert [row["unknown"] for row in rows] == ["false", "false", "true", "true", "true"]
    assert rows[2]["latitude"] == rows[2]["longitude"] == "" and rows[2]["radius_90_km"] == "99.0"
    features = json.loads((tmp_path / "answers.geojson").read_text())["features"]
    assert [feature["geometry"] is None for feature in features] == [False, False, True, True, True]
    kml = xml.etree.ElementTree.parse(tmp_path / "answers.kml")
    assert len(list(kml.iter("{http://www.opengis.net/kml/2.2}Placemark"))) == 5
    assert len(list(kml.iter("{http://www.opengis.net/kml/2.2}Point"))) == 2
    page = (tmp_path / "answers.html").read_text()
    assert page.count("unknown<br>") == 3 and "Unknown, because too uncertain: 3 of 5." in page


def test_another_condition_applies_to_answers_from_before_an_interruption(photos, tmp_path):
    found, output = folder.find([str(photos)]), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        folder.run(Sizes(stop_after=4), "m", found, folder.Form(str(output), min_within=outputs.MinWithin(25, 0.9)))
    folder.run(Sizes(), "m", found, folder.Form(str(output)))
    assert "unknown" not in output.read_text()


@pytest.mark.parametrize("text", ["25", "26:0.5", "25:0", "25:1.5", "25:nan", "x:y", ":", "25.0:0.5"])
def test_a_condition_that_cannot_be_is_refused(text):
    with pytest.raises(SettingsError, match=r"is not KM:PROBABILITY: write one of the distances 1, 25, 200, 750, 2500"):
        outputs.MinWithin.read(text)


def picture(path: Path, **options: Any) -> None:
    Image.new("RGB", (8, 8)).save(path, **options)


def values(path: Path) -> dict[str, str]:
    """Returns the properties in a sidecar."""
    described = xml.etree.ElementTree.parse(path).find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert described is not None
    return {element.tag.rpartition("}")[2]: element.text or "" for element in described}


def test_photos_without_a_position_get_sidecars(tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    for name in ("a.jpg", "a.png", "edited.jpg", "foreign.jpg", "unreadable.jpg"):
        picture(root / name)
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "m"  # without a tag outside GPS, Pillow writes none into an AVIF
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 17.0, 40.0)})
    picture(root / "gps.jpg", exif=exif)
    picture(root / "gps.avif", exif=exif)
    picture(root / "gps in xmp.jpg", xmp=sidecars.sidecar({"latitude": 1.0, "longitude": 2.0}))
    (root / "foreign.jpg.xmp").write_text("<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk='XMP Core 4.4.0-Exiv2'/>")
    (root / "unreadable.jpg.xmp").mkdir()
    before = {path: path.read_bytes() for path in root.iterdir() if path.is_file()}

    def run(**options: Any) -> tuple[int, Any]:
        found = folder.find([str(root)])
        return folder.run(Sizes(), "m", found, folder.Form(xmp=True, **options)), capsys.readouterr()

    status, said = run(dry_run=True)
    assert {path: path.read_bytes() for path in root.iterdir() if path.is_file()} == before and status == 0
    paths = [str(root / f"{name}.xmp") for name in ("a.jpg", "a.png", "edited.jpg")]
    assert [line.split("  ")[0] for line in said.out.splitlines()] == paths
    assert "sidecars without --dry-run: 3 written, 3 not needed: the photo has a position of its own" in said.err
    assert "2 left alone, since another program wrote or changed them" in said.err
    status, said = run()
    assert status == 0 and len(said.out.splitlines()) == 8
    for path, data in before.items():
        assert path.read_bytes() == data
    assert sorted(str(path) for path in root.rglob("*.xmp") if path not in before and path.is_file()) == paths
    edited = root / "edited.jpg.xmp"
    edited.write_text(edited.read_text().replace("geotoken-jax 0", "XMP Core 6"))
    mine = edited.read_bytes()
    (root / "a.jpg.xmp").write_bytes(sidecars.sidecar({"latitude": 1.0, "longitude": 2.0}))
    assert "sidecars: 3 left alone" in run()[1].err and edited.read_bytes() == mine
    found = values(root / "a.jpg.xmp")
    size = (root / "a.jpg").stat().st_size % 90
    assert found["GPSLatitude"] == f"{size},0.0000N" and found["GPSLongitude"] == "170,0.0000W"
    assert found["GPSMapDatum"] == "WGS-84" and found["GPSHPositioningError"] == "99000/1"
    assert "geotoken-jax" in found["GPSProcessingMethod"]
    said = run(min_within=outputs.MinWithin(25, 0.9))[1]
    assert "2 removed, since their photos have no answer now" in said.err
    assert [path.name for path in root.glob("*.xmp") if path.is_file()] in (
        ["edited.jpg.xmp", "foreign.jpg.xmp"], ["foreign.jpg.xmp", "edited.jpg.xmp"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("degrees", "letters", "text"),
    [
        (48.8583333, "NS", "48,51.5000N"),
        (-0.5, "NS", "0,30.0000S"),
        (89.99999999, "NS", "90,0.0000N"),
        (-180.0, "EW", "180,0.0000W"),
        (0.0, "EW", "0,0.0000E"),
    ],
)
def test_angles_of_sidecars_have_the_form_of_xmp(degrees, letters, text):
    assert sidecars._angle(degrees, letters) == text


def test_sidecars_of_answers_from_before_an_interruption_are_written_too(photos, tmp_path):
    found, output = folder.find([str(photos)]), str(tmp_path / "answers.csv")
    with pytest.raises(KeyboardInterrupt):
        folder.run(Sizes(stop_after=4), "m", found, folder.Form(output))
    folder.run(Sizes(), "m", found, folder.Form(output, xmp=True))
    assert len(list(photos.rglob("*.xmp"))) == 5


def test_a_sidecar_that_cannot_be_written_is_reported(photos, capsys, monkeypatch):
    (photos / "bad.jpg").unlink()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert folder.run(Sizes(), "m", folder.find([str(photos)]), folder.Form(xmp=True)) == 2
    said = capsys.readouterr()
    assert (
        len(said.out.splitlines()) == 5 and "a.JPG.xmp cannot be written (No space left on device): check" in said.err
    )


def test_forms_that_do_not_fit_together_are_refused():
    with pytest.raises(SettingsError, match="--dry-run prints the sidecars that --xmp would write: add --xmp"):
        folder.Form(dry_run=True)
    with pytest.raises(SettingsError, match="leave out --output"):
        folder.Form("a.csv", xmp=True, dry_run=True)


class Decoding(Sizes):
    """Decodes photos as a real model does, and answers the same for all."""

    def prepare(self, photo: Any) -> Any:
        return np.asarray(open_image(photo).resize((8, 8)))

    def predict_prepared(self, photos: Any, captured: Any = None) -> list[Prediction]:
        return [Prediction(1.0, 2.0, 3.0, 4.0, within(1), (), (), ()) for _ in photos]


def test_every_file_of_an_album_in_all_formats_is_accounted_for(tmp_path, capsys):
    root, output = tmp_path / "album", tmp_path / "answers.csv"
    ledger = album.make(root, photos=30, others=66, size=(64, 48))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(root / "socket.jpg"))
    ledger.left_out["pipes, sockets, broken links or linked folders"] += 1
    found = folder.find([str(root)])
    assert found.photos.keys() == ledger.answered | ledger.refused and found.folders[0].skipped == ledger.left_out
    files = sum(len(names) for _, _, names in os.walk(root))
    assert files == len(found.photos) + sum(ledger.left_out.values()) + ledger.clutter
    assert folder.run(Decoding(), "m", found, folder.Form(str(output))) == 2
    assert {row["id"] for row in csv.DictReader(output.open(encoding="utf-8"))} == ledger.answered
    said = capsys.readouterr().err
    assert all(str(root / name) in said for name in ledger.refused)
    assert f"{output}: {len(ledger.answered)} answers" in said


def test_standard_input_is_a_photo(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 33)))
    assert folder.run(Sizes(), "m", folder.find(["-"]), folder.Form(xmp=True)) == 0
    assert capsys.readouterr().out.startswith("-  33.00000, ")


PRINTED = """
import sys
from geotoken_jax import cli, commands
from geotoken_jax.folder import photos
from tests.test_folder import Sizes
commands.run = lambda options, config: photos.run(Sizes(), "m", photos.find(options.photos), photos.Form())
cli.main(["predict", "--model=x", sys.argv[1]])
"""


@pytest.mark.slow
def test_names_in_any_bytes_are_printed_and_a_reader_may_leave_early(tmp_path):
    for number in range(1500):  # more lines than a pipe buffers
        (tmp_path / f"{number:040}.jpg").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/!\xff.jpg")).write_bytes(b"x")
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert process.stdout and process.stderr
    assert process.stdout.readline().startswith(b"!\\xff.jpg  1.0")
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait(60) == 1


def test_the_command_line_passes_its_options_on(photos, monkeypatch, capsys):
    monkeypatch.setattr(commands, "_predictor", lambda options: Sizes())
    for options, status, words in (
        (["--min-within=25:0.6"], 0, "unknown  50 % within 10 km"),
        (["--xmp", "--dry-run"], 0, "b.jpg.xmp  15.00000, -170.00000  99 km from Ō & B, C  50 % within 10 km"),
        (["--min-within=26:0.6"], 2, "--min-within=26:0.6 is not KM:PROBABILITY"),
        (["--dry-run"], 2, "add --xmp"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["predict", "--model=x", str(photos / "b.jpg"), *options])
        said = capsys.readouterr()
        assert ended.value.code == status and words in said.out + said.err
    assert not list(photos.glob("*.xmp"))


def test_a_warning_about_a_photo_is_printed_once_as_a_sentence(tmp_path, monkeypatch, capsys):
    class Opens(Sizes):
        def prepare(self, photo: Any) -> Any:
            open_image(photo)
            return photo

    Image.effect_noise((64, 200), 90).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-9])
    monkeypatch.setattr(commands, "_predictor", lambda options: Opens())
    with pytest.raises(SystemExit):
        cli.main(["predict", "--model=x", str(tmp_path / "a.jpg"), f"--output={tmp_path / 'page.html'}"])
    said = [line for line in capsys.readouterr().err.splitlines() if "last bytes" in line]
    assert said == [f"geotoken predict: {tmp_path / 'a.jpg'} lacks its last bytes; the rest is used: copy it again"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An export of 64 gallery photos, each by an author with its id, and a folder of three photos."""
    path = tmp_path_factory.mktemp("exported")
    exports.write(path / "export")
    (path / "photos" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(path / "photos" / name)
    return path


def predicted(path: Path, *options: str) -> dict[str, list[str]]:
    """Returns photo -> ids of its neighbors, as the command line answers with the export."""
    output = path / f"{len(list(path.iterdir()))}.jsonl"
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", f"--model={path / 'export'}", str(path / "photos"), f"--output={output}", *options])
    assert not ended.value.code
    rows = map(json.loads, output.read_text().splitlines())
    return {row["id"]: [neighbor["id"] for neighbor in row["neighbors"]] for row in rows}


@pytest.mark.slow
def test_gallery_photos_are_left_out_by_author_and_by_id(exported, tmp_path, capsys):
    before = predicted(exported)
    first = {name: near[0] for name, near in before.items()}
    authors = write_csv(tmp_path / "a.csv", ["IMG_ID", "AUTHOR"],
                        [["a.jpg", first["a.jpg"]], ["c", first["sub/c.jpg"]], ["gone.jpg", "x"]])  # fmt: skip
    found = predicted(exported, f"--exclude-author={authors}")
    assert "gallery photos were excluded for 2 of 3 photos" in capsys.readouterr().err
    assert found["b.jpg"] == before["b.jpg"] and len(found["a.jpg"]) == len(before["a.jpg"])
    for name in ("a.jpg", "sub/c.jpg"):
        assert found[name][:-1] == before[name][1:]
    listed = [["b.jpg", name] for name in [*before["b.jpg"][:2], "of no photo"]]
    ids = write_csv(tmp_path / "i.csv", ["id", "excluded_id"], listed)
    found = predicted(exported, f"--exclude-author={authors}", f"--exclude-ids={ids}")
    assert "1 of 3 ids in" in (said := capsys.readouterr().err) and "not in the gallery, such as 'of no photo'" in said
    assert found["b.jpg"][:-2] == before["b.jpg"][2:] and found["a.jpg"][:-1] == before["a.jpg"][1:]
    assert predicted(exported, f"--exclude-ids={ids}")["a.jpg"] == before["a.jpg"]


def test_tables_of_excluded_photos_that_do_not_fit_are_refused(exported, tmp_path, capsys):
    without = shutil.copytree(exported / "export", tmp_path / "export")
    for file in (without / "gallery").glob("authors-*.npy"):
        file.unlink()
    exports.write_sums(without)
    table = write_csv(tmp_path / "a.csv", ["id", "author"], [["a.jpg", "x"]])
    twice = write_csv(tmp_path / "t.csv", ["id", "author"], [["a.jpg", "x"], ["a.jpg", "y"]])
    other = write_csv(tmp_path / "o.csv", ["id", "author"], [["z.jpg", "x"]])
    for model, option, message in (
        (f"--model={without}", f"--exclude-author={table}", "make the export with --config.export.authors=True"),
        (f"--model={without}", f"--exclude-author={other}", "names none of the 3 photos, such as 'a.jpg'"),
        (f"--model={without}", f"--exclude-author={twice}", "several authors of 'a.jpg', such as 'x' and 'y'"),
        ("--method=geoclip", f"--exclude-ids={table}", "need --model=DIR"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["predict", model, str(exported / "photos"), option])
        assert ended.value.code == 2 and message in capsys.readouterr().err
