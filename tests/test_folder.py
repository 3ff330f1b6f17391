"""A folder of photos: which files are taken, what is printed or written, and what an interruption leaves."""

import csv
import json
import os
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.folder import outputs
from geotoken_jax.folder import photos as folder
from geotoken_jax.predict.prediction import Candidate, Prediction
from geotoken_jax.predict.predictor import Predictor
from geotoken_jax.settings import SettingsError


class Sizes(Predictor):
    """Predicts a photo's file size as its latitude. Files that contain "bad" cannot be read."""

    batch_size = 4

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
        within = {1: 0.1, 25: 0.5, 200: 0.9, 750: 0.95, 2500: 1.0}
        place = "99 km from Ō & B, C"
        return [
            Prediction(float(n), -170.0, 10.0, 99.0, within, (Candidate(float(n), -170.0),), (), (), place=place)
            for n in sizes
        ]


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
    found = folder.find([str(photos)])
    assert list(found.photos) == ["a.JPG", "b.jpg", "bad.jpg", "sub/c.heic", "sub/d.avif", "sub/ü é.png"]
    assert list(found.notes()) == [
        "left out 5 files that are no photos in a known format: 2 .cr2, 1 .mov, 1 without an ending, 1 pipes, sockets, "
        "broken links or linked folders"
    ]
    single = folder.find([str(photos / "b.jpg"), str(photos)])
    assert next(iter(single.photos)) == str(photos / "b.jpg") and "b.jpg" in single.photos


def test_a_folder_without_photos_says_what_it_has(tmp_path):
    (tmp_path / "x.cr2").write_bytes(b"x")
    with pytest.raises(SettingsError, match=r"has no photo \(left out 1 .*: 1 \.cr2\): name a folder with files that"):
        folder.find([str(tmp_path)])


def test_a_bad_photo_is_reported_and_the_others_are_printed(photos, capsys):
    assert folder.run(Sizes(), "m", folder.find([str(photos)]), None, False) == 2
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
    folder.run(Sizes(), "m", found, str(whole), False)
    with pytest.raises(KeyboardInterrupt):
        folder.run(Sizes(stop_after=4), "m", found, str(broken), False)
    assert not broken.exists()
    partial = tmp_path / f"broken{ending}.partial"
    partial.write_bytes(partial.read_bytes()[:-7])  # killed within a line
    resumed = Sizes()
    folder.run(resumed, "m", found, str(broken), False)
    assert len(resumed.asked) == 2 and not partial.exists()
    order = sorted if ending != ".html" else list
    assert broken.read_bytes() == whole.read_bytes() or order(broken.read_text()) == order(whole.read_text())


def test_files_open_in_readers_of_their_format(photos, tmp_path):
    found = folder.find([str(photos)])
    for ending in outputs.FORMATS:
        folder.run(Sizes(), "m", found, str(tmp_path / f"answers{ending}"), False)
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert [row["id"] for row in rows] == ["a.JPG", "b.jpg", "sub/c.heic", "sub/d.avif", "sub/ü é.png"]
    assert rows[0]["within_25"] == "0.5" and rows[0]["radius_90_km"] == "99.0"
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["candidates"] and [line["id"] for line in lines] == [row["id"] for row in rows]
    points = json.loads((tmp_path / "answers.geojson").read_text())["features"]
    assert points[0]["geometry"] == {"type": "Point", "coordinates": [-170.0, 15.0]}
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
