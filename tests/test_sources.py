"""Sources read data sets in the layouts of their distributors, generated here."""

import csv
import io
import json
import math
import os
import re
import shutil
import tracemalloc
import unicodedata
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from configs import common
from data_prep import csv_rows, photos
from data_prep.sources import NOT_DOWNLOADED, Photo, folder
from geotoken_jax import cli, configuration, records
from geotoken_jax.manifests import StageError
from geotoken_jax.settings import SettingsError
from geotoken_jax.tables import TableError
from geotoken_jax.workdir import Workdir

#: Real places, on both sides of the equator, Greenwich and 90 degrees east.
PLACES = {"oslo": (59.91, 10.75), "tokyo": (35.68, 139.69), "lima": (-12.05, -77.04), "perth": (-31.95, 115.86)}


def jpeg(color: Any = "red", size=(16, 12), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG", **options)
    return file.getvalue()


def exif(latitude, longitude, references=None, seconds=None) -> Image.Exif:
    """GPS as cameras write it: degrees, minutes and seconds as rationals, the sign as a letter."""

    def rationals(value):
        minutes = abs(value) % 1 * 60
        return (IFDRational(int(abs(value)), 1), IFDRational(int(minutes), 1),
                seconds or IFDRational(round(minutes % 1 * 60 * 10_000), 10_000))  # fmt: skip

    references = references or ("S" if latitude < 0 else "N", "W" if longitude < 0 else "E")
    tags = Image.Exif()
    tags[0x8825] = {1: references[0], 2: rationals(latitude), 3: references[1], 4: rationals(longitude)}
    return tags


def write_csv(path: Path, header, rows, delimiter=",") -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([*([header] if header else []), *rows])
    return str(path)


def write_files(path: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def prepare(path: Path, source: str, max_dropped=0.0, /, **changes):
    """Runs the stage on a source. Returns its manifest, and split -> id -> photo."""
    config = common.get_config()
    config.photos.update(source=source, workers=1, max_dropped=max_dropped)
    config.photos[source].update(changes)
    [manifest] = photos.run(configuration.read(config), Workdir(path))
    found = {}
    for split, count in manifest.counts.items():
        rows = records.Photos(path / "photos", split)
        found[split] = {rows[n]["id"]: rows[n] for n in range(count)}
    return manifest, found


def dropped(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (path / "photos" / "dropped.jsonl").read_text().splitlines()]
    return {line["id"]: line["reason"] for line in lines}


def where(rows) -> dict[str, tuple[float, float]]:
    return {name: tuple(row["coordinates"]) for name, row in rows.items()}


ONE_SPLIT = dict(train=0.0, validation=0.0, test=1.0, csv="")


def test_a_folder_with_a_csv_keeps_its_columns_in_any_order_and_tells_what_is_missing(tmp_path):
    header = ["country", "longitude", "note", "id", "author", "latitude"]
    rows = [["Ōmi, „x“", lon, 'said "hi"', f"a/{name}.jpg", "me", lat] for name, (lat, lon) in PLACES.items()]
    table = write_csv(tmp_path / "t.csv", header, [*rows, ["", "1", "", "gone.jpg", "", "1"]])
    files = {f"a/{name}.jpg": jpeg(quality=30 + n) for n, name in enumerate(PLACES)}
    path = write_files(tmp_path / "in", {**files, "a/extra.JPG": jpeg(), "readme.txt": b"hello"})
    manifest, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": path, "csv": table})
    assert manifest.counts == {"test": 4} and manifest.dropped == {"no image": 1, "no metadata": 1}
    assert dropped(tmp_path / "w") == {"gone.jpg": "no image", "a/extra.JPG": "no metadata"}
    assert where(found["test"]) == {f"a/{name}.jpg": place for name, place in PLACES.items()}
    assert list(found["test"]) == list(files)  # in the order of the CSV
    row = found["test"]["a/lima.jpg"]
    assert (row["author"], row["country"], row["city"]) == ("me", "Ōmi, „x“", "")
    assert row["image"] == files["a/lima.jpg"]


def test_a_folder_without_a_csv_takes_coordinates_from_exif_in_sorted_order(tmp_path):
    files = {f"{name[0]}/{name}.jpg": jpeg(exif=exif(*place)) for name, place in PLACES.items()}
    path = write_files(tmp_path / "in", {**files, "b.jpg": jpeg(), "notes.txt": b"x"})
    manifest, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": path})
    assert manifest.dropped == {"no GPS": 1} and list(found["test"]) == sorted(files)
    for name, place in PLACES.items():
        row = found["test"][f"{name[0]}/{name}.jpg"]
        np.testing.assert_allclose(row["coordinates"], place, atol=1e-8)
        assert row["author"] == row["id"]


def taken(rows) -> dict[str, str]:
    """Returns id -> time of a photo as text, empty if it is unknown."""
    times = {name: float(row["captured"]) for name, row in rows.items()}
    return {n: "" if math.isnan(t) else datetime.fromtimestamp(t, UTC).isoformat()[:19] for n, t in times.items()}


def timed(time, offset=None) -> bytes:
    tags = exif(1, 2)
    tags[0x8769] = {0x9003: time, **({0x9011: offset} if offset else {})}
    return jpeg(exif=tags)


def test_a_folder_without_a_csv_takes_times_from_exif(tmp_path):
    files = {
        "clock": timed("2019:07:14 12:30:05"),
        "offset": timed("2019:07:14 12:30:05", "+05:30"),
        "none": jpeg(exif=exif(1, 2)),
        "blank": timed("    :  :     :  :  "),
        "zeros": timed("0000:00:00 00:00:00"),
        "reset": timed("1970:01:01 00:00:00"),
        "text": timed("last summer"),
        "far": timed("9999:12:31 23:59:59", "-14:00"),
        "month": timed("2019:13:14 12:30:05"),
    }
    path = write_files(tmp_path / "in", {f"{name}.jpg": data for name, data in files.items()})
    manifest, found = prepare(tmp_path / "w", "folder", **{**ONE_SPLIT, "path": path})
    times = {name.removesuffix(".jpg"): time for name, time in taken(found["test"]).items()}
    known = {"clock": "2019-07-14T12:30:05", "offset": "2019-07-14T07:00:05"}
    assert times == {**dict.fromkeys(files, ""), **known}
    assert manifest.facts | {"captured": 2, "nonsense_times": 5} == manifest.facts


def test_a_csv_may_say_when_photos_were_taken(tmp_path):
    texts = {
        "2019-07-14T12:30:05": "2019-07-14T12:30:05",
        "2019-07-14 12:30:05+05:30": "2019-07-14T07:00:05",
        "2019-07-14T12:30:05Z": "2019-07-14T12:30:05",
        "2019-07-14": "2019-07-14T00:00:00",
        "1563107405": "2019-07-14T12:30:05",
        "1563107405.5": "2019-07-14T12:30:05",
        **dict.fromkeys(["", "nan"], ""),  # no time; the others are nonsense
        **dict.fromkeys(["2019", "14.7.2019", "0", "1563107405000", "20190714", "0001-01-01T00:00:00+14:00"], ""),
    }
    rows = [[f"{n}.jpg", text, 1, 2] for n, text in enumerate(texts)]
    table = write_csv(tmp_path / "t.csv", ["id", "captured", "latitude", "longitude"], rows)
    path = write_files(tmp_path / "in", {f"{n}.jpg": timed("2011:01:01 00:00:00") for n in range(len(rows))})
    manifest, found = prepare(tmp_path / "w", "folder", **{**ONE_SPLIT, "path": path, "csv": table})
    assert list(taken(found["test"]).values()) == list(texts.values())  # EXIF is not read
    assert manifest.facts | {"captured": 6, "nonsense_times": 6} == manifest.facts


def test_links_out_of_the_folder_are_not_followed_and_ids_find_nothing_outside(tmp_path):
    write_files(tmp_path, {"secret/x.jpg": jpeg(exif=exif(1, 2))})
    path = Path(write_files(tmp_path / "in", {"good.jpg": jpeg(exif=exif(3, 4))}))
    (path / "link.jpg").symlink_to(tmp_path / "secret" / "x.jpg")
    (path / "around").symlink_to(tmp_path / "secret")
    (path / "loop").symlink_to(path)
    os.mkfifo(path / "pipe.jpg")
    (path / "a").mkdir()
    (path / "a" / "twin.jpg").symlink_to("../good.jpg")
    _, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": str(path)})
    assert list(found["test"]) == ["a/twin.jpg", "good.jpg"]
    assert dropped(tmp_path / "w") == {"link.jpg": "link out of the folder"}
    with pytest.raises(
        StageError, match=r"'link\.jpg' is a link to a file outside the folder, so copy the folder with"
    ):
        prepare(tmp_path / "v", "folder", 0.1, **{**ONE_SPLIT, "path": str(path)})


def test_authors_are_in_one_split_and_shares_are_met(tmp_path):
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    counts = dict.fromkeys(shares, 0)
    for n in range(20_000):
        counts[folder.split_of(f"author {n}", shares)] += 1
    for split, share in shares.items():
        assert counts[split] / 20_000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))
    names = [f"{n:02d}.jpg" for n in range(60)]
    rows = [[name, 10, 100, f"author {n // 3}"] for n, name in enumerate(names)]
    table = write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude", "author"], rows)
    path = write_files(tmp_path / "in", {name: jpeg(size=(8 + n, 8)) for n, name in enumerate(names)})
    changes = dict(path=path, csv=table, train=0.5, validation=0.25, test=0.25, photos_per_shard=7)
    _, found = prepare(tmp_path / "w", "folder", **changes)
    assert sorted(name for rows in found.values() for name in rows) == names
    authors = [{row["author"] for row in rows.values()} for rows in found.values()]
    assert len(found) == 3 and sum(map(len, authors)) == len(set().union(*authors)) == 20
    assert len(list((tmp_path / "w/photos").glob("*/*/*-train.array_record*"))) == -(-len(found["train"]) // 7) > 1


IM2GPS3K = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"


def _im2gps3k(tmp_path, header, copies=10):
    places = [(f"{n}{i}_e6_1125_7@N00.jpg", *p) for i in range(copies) for n, p in PLACES.items()]
    rows = [[name, "78841376@N00", lat, lon, 1, 2, 3, 0.1, 0.2, 0.7] for name, lat, lon in places]
    path = write_files(tmp_path / "in", {name: jpeg() for name, *_ in places})
    return dict(path=path, csv=write_csv(tmp_path / "im2gps3k_places365.csv", header.split(","), rows)), places


def test_im2gps3k_is_one_test_split(tmp_path):
    changes, places = _im2gps3k(tmp_path, IM2GPS3K)
    _, found = prepare(tmp_path / "w", "im2gps3k", **changes, photos_per_shard=15)
    assert where(found["test"]) == {name: (lat, lon) for name, lat, lon in places}
    assert {row["author"] for row in found["test"].values()} == {"78841376@N00"}


def test_im2gps3k_with_swapped_headers_is_refused_with_the_rows_that_prove_it(tmp_path):
    changes, _ = _im2gps3k(tmp_path, IM2GPS3K.replace("LAT,LON", "LON,LAT"))
    with pytest.raises(TableError, match=r"swapped: 20 of 40 rows .*\(the first: 'tokyo0\S* in line 3, LAT 139.69\)"):
        prepare(tmp_path / "w", "im2gps3k", **changes)


@pytest.mark.parametrize("form", ["yfcc4k", "yfcc26k", "info.txt"])
def test_yfcc_is_read_in_each_of_its_forms(tmp_path, form):
    places = {str(6985418911 + n): place for n, place in enumerate(PLACES.values())}
    path = write_files(tmp_path / "in", {f"{name}.jpg": jpeg() for name in places})
    if form == "info.txt":  # in this file unbalanced quotes are text
        rows = [[n, name, "", "", "", "", "", "", 'a "title', "", "", "", lon, lat, 16, "", ""]
                for n, (name, (lat, lon)) in enumerate(places.items())]  # fmt: skip
        (tmp_path / "info.txt").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
        table, authors = str(tmp_path / "info.txt"), set(places)
    elif form == "yfcc4k":
        rows = [[name, "12@N00", lat, lon, ""] for name, (lat, lon) in places.items()]
        table = write_csv(tmp_path / "yfcc4k.csv", ["IMG_ID", "OwnerNSID", "LAT", "LON", "More"], rows)
        authors = {"12@N00"}
    else:
        rows = [[name, lat, lon, 1, 2, 3] for name, (lat, lon) in places.items()]
        table = write_csv(tmp_path / "y.csv", ["IMG_ID", "LAT", "LON", "S3_Label", "S16_Label", "S365_Label"], rows)
        authors = set(places)
    name = form if form.startswith("yfcc") else "yfcc4k"
    _, found = prepare(tmp_path / "w", "yfcc", name=name, path=path, table=table)
    assert where(found["test"]) == places and {row["author"] for row in found["test"].values()} == authors
    assert list((tmp_path / "w/photos").glob(f"{name}/1.0.0/{name}-test.array_record*"))


OSV5M = (
    "id,latitude,longitude,thumb_original_url,country,sequence,captured_at,region,sub-region,city,creator_username,"
    "creator_id"
)


def write_osv5m(path: Path) -> str:
    table = []
    for n in (1, 2):
        (path / "images/train").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path / f"images/train/{n:02d}.zip", "w") as archive:
            for i, (lat, lon) in enumerate(PLACES.values()):
                archive.writestr(f"{n:02d}/{n}{i}.jpg", jpeg())
                time = 1563107405678 if i else 0
                table.append([f"{n}{i}", lat, lon, "http", "NA", "s", time, "Erongo", "", "None", "user", "42"])
    return write_csv(path / "train.csv", OSV5M.split(","), table)


def test_osv5m_reads_its_zips_in_place_and_namibia_stays_text(tmp_path):
    table = write_osv5m(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in/images/train/02.zip", "a") as archive:
        archive.writestr("02/77.jpg", jpeg())
    with Path(table).open("a") as file:
        file.write("99,1,100,,,,,,,,,\n10,1,100,,,,,,,,,\n")
    before = {p: p.read_bytes() for p in (tmp_path / "in").rglob("*") if p.is_file()}
    manifest, found = prepare(tmp_path / "w", "osv5m", 0.5, path=str(tmp_path / "in"))
    assert manifest.dropped == {NOT_DOWNLOADED: 1, "no metadata": 1, "repeated id": 1}
    assert dropped(tmp_path / "w") == {"99": NOT_DOWNLOADED, "77": "no metadata", "10": "repeated id"}
    assert where(found["train"]) == {f"{n}{i}": p for n in (1, 2) for i, p in enumerate(PLACES.values())}
    assert taken(found["train"])["13"] == "2019-07-14T12:30:05" and taken(found["train"])["10"] == ""
    assert manifest.facts | {"captured": 6, "nonsense_times": 2} == manifest.facts
    row = found["train"]["13"]
    assert (row["country"], row["city"], row["state"], row["author"]) == ("NA", "None", "Erongo", "42")
    assert {p: p.read_bytes() for p in (tmp_path / "in").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("source", [name for name in photos.SOURCES if name != "earthview"])
def test_a_source_without_its_path_names_the_key(tmp_path, source):
    with pytest.raises((SettingsError, StageError), match=rf"config\.photos\.{source}\."):
        prepare(tmp_path, source)


@pytest.mark.slow
def test_rows_stream(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("id,latitude,longitude\n" + "".join(f"{n},{n % 90},{n % 180}\n" for n in range(30_000)))
    tracemalloc.start()
    rows = csv_rows.read_rows(table, {name: name for name in ("id", "latitude", "longitude")})
    assert sum(isinstance(row, Photo) for row in rows) == 30_000
    assert tracemalloc.get_traced_memory()[1] < 200_000  # bytes; the file has 330,000, all photos take 20 MB
    tracemalloc.stop()


@pytest.mark.slow
def test_the_command_line_makes_with_two_processes_what_one_makes(tmp_path):
    path = write_files(tmp_path / "in", {f"{n:02d}.jpg": jpeg(exif=exif(n, 3 - 3 * n)) for n in range(30)})
    changes = [f"--config.photos.folder.path={path}", "--config.photos.folder.photos_per_shard=20"]
    config = f"--config={Path(__file__).parents[1] / 'configs' / 'demo.py'}"
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", config, f"--workdir={tmp_path / 'two'}", "--config.photos.source=folder", *changes])
    assert ended.value.code == 0
    manifest, found = prepare(tmp_path / "one", "folder", path=path, photos_per_shard=20)
    assert sum(map(len, found.values())) == 30
    one, two = (
        {p.relative_to(tmp_path / run): p.read_bytes() for p in (tmp_path / run).rglob("*") if p.is_file()}
        for run in ("one", "two")
    )
    assert one == two
    shutil.rmtree(path)
    assert prepare(tmp_path / "one", "folder", path=path, photos_per_shard=20)[0] == manifest  # complete: not read


def test_a_subset_of_osv5m_is_no_fault_and_unpacked_images_are_told_how_to_be_read(tmp_path):
    write_osv5m(tmp_path / "in")
    (tmp_path / "in/images/train/02.zip").unlink()
    manifest, found = prepare(tmp_path / "w", "osv5m", 0.0, path=str(tmp_path / "in"))
    assert manifest.dropped == {NOT_DOWNLOADED: len(PLACES)} and len(found["train"]) == len(PLACES)
    with zipfile.ZipFile(tmp_path / "in/images/train/01.zip") as archive:
        archive.extractall(tmp_path / "in/images/train")
    (tmp_path / "in/images/train/01.zip").unlink()
    with pytest.raises(SettingsError, match="unpacked") as error:
        prepare(tmp_path / "v", "osv5m", 0.0, path=str(tmp_path / "in"))
    path, table = re.findall(r"'(/[^']*)'", str(error.value).partition("unpacked")[2])
    table = write_csv(tmp_path / "t.csv", *_rows_of(Path(table), "1"))
    _, found = prepare(tmp_path / "u", "folder", **{**ONE_SPLIT, "path": path, "csv": table})
    assert where(found["test"]) == {f"1{i}": place for i, place in enumerate(PLACES.values())}


def _rows_of(table: Path, prefix: str) -> tuple[list[str], list[list[str]]]:
    header, *rows = csv.reader(table.open())
    return header, [row for row in rows if row[0].startswith(prefix)]


#: Id in the table -> file that it belongs to; "" if that is not certain.
FORMS = {
    "same/x.jpg": "same/x.jpg",
    unicodedata.normalize("NFC", "Café/é.jpg"): unicodedata.normalize("NFD", "Café/é.jpg"),
    "back\\slash\\b.jpg": "back/slash/b.jpg",
    "./dot.jpg": "dot.jpg",
    "no/ending": "no/ending.jpeg",
    "Upper/CASE.JPG": "upper/case.jpg",
    "base.jpg": "deep/er/base.jpg",
    "stem": "deep/stem.png",
    "twice.jpg": "",  # there are a/twice.jpg and b/twice.jpg
    "other/place.jpg": "",  # there is another/place.jpg
    "../up.jpg": "",  # there is up.jpg
}


@pytest.mark.parametrize("name", FORMS)
def test_ids_in_other_forms_find_their_file_if_that_is_certain(tmp_path, name):
    others = ["a/twice.jpg", "b/twice.jpg", "another/place.jpg", "up.jpg", "no/other.jpg"]
    files = {path: jpeg(quality=30 + n) for n, path in enumerate([*filter(None, FORMS.values()), *others])}
    path = write_files(tmp_path / "in", files)
    table = write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude"], [[name, 1, 2]])
    _, found = prepare(tmp_path / "w", "folder", 1.0, **{**ONE_SPLIT, "path": path, "csv": table})
    images = [row["image"] for row in found["test"].values()]
    assert images == ([files[FORMS[name]]] if FORMS[name] else [])


def test_all_forms_in_one_table_and_two_ids_of_one_file(tmp_path):
    path = write_files(tmp_path / "in", {path: jpeg() for path in FORMS.values() if path} | {"only.jpg": jpeg()})
    rows = [[name, 1, 2] for name in FORMS if FORMS[name]] + [["only", 1, 2], ["./only.jpg", 1, 2]]
    table = write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude"], rows)
    _, found = prepare(tmp_path / "w", "folder", 1.0, **{**ONE_SPLIT, "path": path, "csv": table})
    assert list(found["test"]) == [name for name in FORMS if FORMS[name]] + ["./only.jpg"]
    assert dropped(tmp_path / "w") == {"only": "no image"}


def test_ids_that_find_nothing_are_shown_beside_a_file(tmp_path):
    path = write_files(tmp_path / "in", {"2019/a.jpg": jpeg()})
    table = write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude"], [["2020/a.jpg", 1, 2]])
    with pytest.raises(
        StageError, match=r"the table has '2020/a\.jpg', which is no file, and the folder has '2019/a\.jpg'"
    ):
        prepare(tmp_path / "w", "folder", **{**ONE_SPLIT, "path": path, "csv": table})


def heic(**options) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    image = pillow_heif.from_pillow(Image.new("RGB", (64, 48), "green"))
    image.save(file, quality=50, **options)
    return file.getvalue()


def test_a_folder_of_a_phone_has_heic_counted_others_and_no_clutter(tmp_path, capsys):
    tags = exif(1, 2).tobytes()
    files = {
        "a.HEIC": heic(exif=tags),
        "b.heic": heic(),
        "c.jpg": jpeg(exif=exif(3, 4)),
        "d.cr2": b"raw",
        "e.mov": b"m",
    }
    clutter = {"._c.jpg": b"\0\5\x16\7", "__MACOSX/._c.jpg": b"\0\5\x16\7", ".DS_Store": b"x", "Thumbs.db": b"x"}
    path = write_files(tmp_path / "in", files | clutter)
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    manifest, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": path})
    assert list(found["test"]) == ["a.HEIC", "c.jpg"] and manifest.dropped == {"no GPS": 1}
    np.testing.assert_allclose(found["test"]["a.HEIC"]["coordinates"], (1, 2), atol=1e-8)
    assert "left out 3 files that are not photos in a known format: 1 .cr2, 1 .mov, 1 pipes," in capsys.readouterr().err
    raw = write_files(tmp_path / "raw", {"d.cr2": b"raw"})
    with pytest.raises(
        StageError, match=r"has no photos \(left out 1 files .*: 1 \.cr2\): set it to a folder with files"
    ):
        prepare(tmp_path / "v", "folder", **{**ONE_SPLIT, "path": raw})


def test_a_subfolder_that_cannot_be_read_is_counted_and_the_rest_goes_on(tmp_path, monkeypatch):
    path = write_files(tmp_path / "in", {"a/x.jpg": jpeg(exif=exif(1, 2)), "closed/y.jpg": jpeg(exif=exif(1, 2))})
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    _, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": path})
    assert list(found["test"]) == ["a/x.jpg"] and dropped(tmp_path / "w") == {"closed/": "unreadable folder"}


def test_null_island_is_dropped_unless_asked(tmp_path):
    path = write_files(tmp_path / "in", {"zero.jpg": jpeg(exif=exif(0, 0)), "line.jpg": jpeg(exif=exif(0, 5))})
    manifest, found = prepare(tmp_path / "w", "folder", 0.5, **{**ONE_SPLIT, "path": path})
    assert manifest.dropped == {"null island": 1} and list(found["test"]) == ["line.jpg"]
    config = common.get_config()
    config.photos.update(source="folder", workers=1, null_island=True)
    config.photos.folder.update({**ONE_SPLIT, "path": path})
    assert photos.run(configuration.read(config), Workdir(tmp_path / "v"))[0].counts == {"test": 2}


def test_a_mended_table_is_seen_after_a_refusal(tmp_path, capsys):
    path = write_files(tmp_path / "in", {f"{n}.jpg": jpeg() for n in range(4)})
    rows = [[f"q/{n}.jpg", n + 1, 100 + n] for n in range(4)]
    table = write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude"], rows)
    changes = {**ONE_SPLIT, "path": path, "csv": table}
    for _ in range(2):
        with pytest.raises(StageError, match=r"100\.0% of the photos were dropped"):
            prepare(tmp_path / "w", "folder", **changes)
    write_csv(tmp_path / "t.csv", ["id", "latitude", "longitude"], [[name[2:], *at] for name, *at in rows])
    capsys.readouterr()
    manifest, _ = prepare(tmp_path / "w", "folder", **changes)
    assert manifest.counts == {"test": 4} and not manifest.dropped
    assert re.search(r"the source has changed: 1 changed, such as '.*t\.csv'; the photos in", capsys.readouterr().err)


def test_a_source_that_has_grown_or_changed_since_is_named(tmp_path):
    path = write_files(tmp_path / "in", {f"{n}.jpg": jpeg(exif=exif(1, n)) for n in range(4)})
    changes = {**ONE_SPLIT, "path": path}
    before = prepare(tmp_path / "w", "folder", **changes)[0]
    assert prepare(tmp_path / "w", "folder", **changes)[0] == before
    write_files(tmp_path / "in", {f"new {n}.jpg": jpeg(exif=exif(1, n)) for n in range(10)} | {"notes.txt": b"x"})
    os.utime(tmp_path / "in" / "3.jpg", (1, 1))
    (tmp_path / "in" / "2.jpg").unlink()
    said = (
        r"10 added, such as 'new 0.jpg', 1 removed, such as '2.jpg', 1 changed, such as '3.jpg': use another --workdir"
    )
    with pytest.raises(StageError, match=said):
        prepare(tmp_path / "w", "folder", **changes)
    config = common.get_config()
    config.photos.update(source="folder", workers=1, keep_changed=True)
    config.photos.folder.update(changes)
    assert photos.run(configuration.read(config), Workdir(tmp_path / "w")) == [before]
    shutil.rmtree(path)
    assert prepare(tmp_path / "w", "folder", **changes)[0] == before  # moved away


@pytest.mark.parametrize("name", ["run [m] {x} *?", "~tilde", "back\\slash", os.fsdecode(b"latin-1 \xe5"), "e\u0301"])
def test_paths_are_data(tmp_path, name):
    at = tmp_path / (name if name.isprintable() else "w")
    path = write_files(tmp_path / name / "in", {"[a]*.jpg": jpeg(exif=exif(1, 2)), "å {b}.jpg": jpeg(exif=exif(1, 2))})
    manifest, found = prepare(at / "w", "folder", **{**ONE_SPLIT, "path": path})
    assert list(found["test"]) == ["[a]*.jpg", "å {b}.jpg"]
    folder = Workdir(at / "w")
    assert folder.complete_folders() == ["photos"] and folder.manifest("photos") == manifest
    assert records.shard_paths(folder.path / "photos" / "folder" / "1.0.0", "folder-test")
    if at != tmp_path / name:
        with pytest.raises(StageError, match="which is not UTF-8: rename the folder"):
            Workdir(tmp_path / name)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path / "in", {"a.jpg": jpeg(exif=exif(1, 2))})
    config = f"--config={Path(__file__).parents[1] / 'configs' / 'demo.py'}"
    changes = ["--config.photos.source=folder", "--config.photos.folder.path=~/in", "--config.photos.workers=1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", config, "--workdir=~/run", *changes])
    assert ended.value.code == 0 and (tmp_path / "run" / "photos" / "manifest.json").exists()
    assert str(Workdir("~/run").path) == str(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    ["workers=0", "workers=-1", "max_dropped=1.5", "folder.photos_per_shard=0", "im2gps3k.photos_per_shard=0",
     "yfcc.photos_per_shard=-1", "mp16_pro.photos_per_shard=0", "earthview.photos_per_shard=0", "earthview.train=-1"],
)  # fmt: skip
def test_absurd_settings_are_refused_when_they_are_read(change):
    config = common.get_config()
    key, _, value = change.partition("=")
    config.photos.update_from_flattened_dict({key: json.loads(value)})
    with pytest.raises(SettingsError, match=rf"config\.photos\.{re.escape(key)} is {re.escape(value)}: use"):
        configuration.read(config)


def with_benchmarks(path: Path, benchmarks: dict[str, dict[str, str]], **folder_settings):
    """Prepares a folder of two training photos with benchmarks beside it; like `prepare`."""
    config = common.get_config()
    source = write_files(path / "own", {f"{n}.jpg": jpeg((n, 0, 0), exif=exif(n, n)) for n in (1, 2)})
    config.photos.update(source="folder", workers=1, max_dropped=0.0)
    config.photos.folder.update(path=source, train=1.0, validation=0.0, test=0.0)
    for name, values in benchmarks.items():
        config.benchmarks.photos[name].update(values)
    [manifest] = photos.run(configuration.read(config), Workdir(path / "w"))
    found = {}
    for split, count in manifest.counts.items():
        rows = records.Photos(path / "w/photos", split)
        found[split] = {rows[n]["id"]: rows[n] for n in range(count)}
    return manifest, found


def test_benchmarks_are_further_splits_with_authors_from_their_own_columns(tmp_path):
    files = {f"{name}.jpg": jpeg((9, n, 9)) for n, name in enumerate(PLACES)}
    rows = [[f"{name}.jpg", *place] for name, place in PLACES.items()]
    folders = {name: write_files(tmp_path / name, files) for name in ("im2gps3k", "yfcc4k", "commons26")}
    folders["labeled"] = write_files(tmp_path / "labeled", {"1.jpg": jpeg((3, 3, 3), exif=exif(7, 8))})
    tables = {
        "im2gps3k": write_csv(tmp_path / "i.csv", ["IMG_ID", "LAT", "LON", "AUTHOR"], [[*r, "me"] for r in rows]),
        "yfcc4k": write_csv(tmp_path / "y.csv", ["IMG_ID", "OwnerNSID", "LAT", "LON"],
                            [[r[0], "12@N00" if n else "", *r[1:]] for n, r in enumerate(rows)]),
        "commons26": write_csv(tmp_path / "c.csv", ["IMG_ID", "LAT", "LON", "split", "group", "continent", "tier"],
                               [[*r, "test" if n else "dev", f"u{n}", "Asia", 1] for n, r in enumerate(rows)]),
    }  # fmt: skip
    benchmarks = {name: dict(path=folder, table=tables.get(name, "")) for name, folder in folders.items()}
    benchmarks["commons26"]["rows"] = "test"
    with pytest.raises(StageError, match="1 no metadata"):  # the photo of `dev`
        with_benchmarks(tmp_path, benchmarks)
    (tmp_path / "commons26" / "oslo.jpg").unlink()
    manifest, found = with_benchmarks(tmp_path, benchmarks)
    assert manifest.counts == {"train": 2, "commons26": 3, "im2gps3k": 4, "labeled": 1, "yfcc4k": 4}
    assert manifest.facts["benchmarks"] == ["commons26", "im2gps3k", "labeled", "yfcc4k"]
    assert where(found["im2gps3k"]) == {f"{name}.jpg": place for name, place in PLACES.items()}
    authors = {split: [row["author"] for row in rows.values()] for split, rows in found.items()}
    assert authors["im2gps3k"] == ["me"] * 4 and authors["yfcc4k"] == ["oslo.jpg", *["12@N00"] * 3]
    assert authors["commons26"] == ["u1", "u2", "u3"] and authors["labeled"] == ["1.jpg"]
    assert found["commons26"]["lima.jpg"]["continent"] == "Asia"
    np.testing.assert_allclose(found["labeled"]["1.jpg"]["coordinates"], (7, 8))


@pytest.mark.parametrize("form", ["csv", "txt"])
def test_authors_of_a_benchmark_come_from_a_second_table(tmp_path, form):
    path = write_files(tmp_path / "in", {f"{n}.jpg": jpeg((n, 5, 5)) for n in (7, 8, 9)})
    table = write_csv(tmp_path / "t.csv", ["IMG_ID", "LAT", "LON"], [[n, n, n] for n in (7, 8, 9)])
    if form == "csv":
        named = [["ab/cd/7.jpg", "12@N00", "x"], ["8.jpg", "", "x"], ["99.jpg", "34@N00", "x"]]
        authors = write_csv(tmp_path / "mp16.csv", ["IMG_ID", "AUTHOR", "country"], named)
    else:
        named = [[0, 7, "hash", "12@N00", *[""] * 8, 1, 1], [1, 99, "hash", "34@N00", *[""] * 8, 1, 1]]
        authors = write_csv(tmp_path / "yfcc100m.txt", (), named, "\t")
    _, found = with_benchmarks(tmp_path, {"yfcc26k": dict(path=path, table=table, authors=authors)})
    assert {name: row["author"] for name, row in found["yfcc26k"].items()} == {"7": "12@N00", "8": "8", "9": "9"}


def test_benchmarks_that_cannot_be_read_name_the_key(tmp_path):
    path = write_files(tmp_path / "in", {"7.jpg": jpeg()})
    for values, message in (
        (dict(path="nowhere"), r"config\.benchmarks\.photos\.labeled\.path is 'nowhere', which is not a folder"),
        (dict(path=path, table="none.csv"), r"config\.benchmarks\.photos\.labeled\.table is 'none.csv'"),
        (dict(path=path, rows="test"), r"config\.benchmarks\.photos\.labeled\.table is '': set it"),
    ):
        with pytest.raises((SettingsError, StageError), match=message):
            with_benchmarks(tmp_path, {"labeled": values})
    config = common.get_config()
    config.benchmarks.photos = {"train_2": config.benchmarks.photos.labeled}
    with pytest.raises(SettingsError, match=r"config\.benchmarks\.photos has the name 'train_2'"):
        configuration.read(config)


def test_a_benchmark_may_not_have_the_name_of_a_split(tmp_path):
    config = common.get_config()
    path = write_files(tmp_path / "in", {"7.jpg": jpeg(exif=exif(1, 2))})
    config.photos.update(source="folder", workers=1)
    config.photos.folder.update(path=path, train=0.0, validation=0.0, test=1.0)
    config.benchmarks.photos.labeled.path = path
    config.benchmarks.photos = {"test": config.benchmarks.photos.labeled}
    with pytest.raises(StageError, match=r"config\.benchmarks\.photos\.test has the name of a split"):
        photos.run(configuration.read(config), Workdir(tmp_path / "w"))
