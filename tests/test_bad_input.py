"""Bad input: each kind ends as a drop with its reason or as one clear error, and changes nothing else."""

import dataclasses
import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from data_prep import images, photos
from data_prep.sources import Source
from data_prep.sources.folder import Folder, FolderSettings
from data_prep.sources.osv5m import Osv5m, Osv5mSettings
from data_prep.sources.yfcc import Yfcc, YfccSettings
from geotoken_jax import manifests, records
from geotoken_jax.errors import UserError
from geotoken_jax.tables import TableError
from tests.test_sources import exif, jpeg, write_files

KEPT = "kept"
#: The header of every CSV here, and a row whose longitude is beyond 90, so columns do not count as swapped.
HEADER, GOOD = b"id,latitude,longitude,author\n", b"good.jpg,35.7,139.7,me\n"


def make(path: Path, source: Source) -> manifests.Manifest:
    """Runs the stage, and asserts that it changes no other file, whether it succeeds or not."""
    before = everything_but_work(path)
    stage = manifests.begin(path / "work", "photos", {"photos": {}}, inputs=())
    try:
        return photos.make(stage, source, workers=1, max_dropped=1.0)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        raise
    finally:
        assert everything_but_work(path) == before


def everything_but_work(path: Path) -> dict[Path, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and path / "work" not in file.parents]
    return {file: file.read_bytes() for file in files}


def a_folder(path: Path, files: dict[str, bytes], table: bytes | None) -> Folder:
    """A folder with files beside it that the stage must not read or change."""
    write_files(path, {"x.jpg": jpeg("blue"), "data/x.jpg": jpeg("blue")})
    write_files(path / "data" / "in", {"good.jpg": jpeg(exif=exif(1, 2)), **files})
    if table is not None:
        (path / "t.csv").write_bytes(table)
    csv = "" if table is None else str(path / "t.csv")
    return Folder(FolderSettings(str(path / "data" / "in"), csv, 0.0, 0.0, 1.0, 100))


def check(path: Path, source: Source, expected: str, good: int = 1, dropped: int = 1) -> None:
    """Asserts that the good photos are accepted, and that the others are KEPT, or dropped for the expected reason."""
    manifest = make(path, source)
    assert manifest.dropped == ({} if expected == KEPT else {expected: dropped})
    assert sum(manifest.counts.values()) == good + (expected == KEPT)
    for split, count in manifest.counts.items():
        rows = records.Photos(path / "work" / "photos", split)
        assert all(images.drop_reason(rows[n]["image"]) == "" for n in range(count))


def encode(mode: str, form: str, size=(8, 8), **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


NOISE = io.BytesIO()
Image.effect_noise((64, 64), 100).save(NOISE, "JPEG")
PHOTO = NOISE.getvalue()
FRAMES = [Image.new("P", (8, 8), n) for n in range(3)]

IMAGES: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty image"),
    "text named .jpg": (b"This photo is no longer available.", "not an image"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "PostScript, which Pillow would hand to another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    "PDF": (b"%PDF-1.7\n", "not an image"),
    "zeros": (bytes(5000), "not an image"),
    "JPEG cut in its header": (PHOTO[:100], "damaged image"),
    "JPEG cut in its pixels": (PHOTO[: len(PHOTO) // 2], "damaged image"),
    "JPEG of its first 3 bytes": (PHOTO[:3], "damaged image"),
    "JPEG with a flipped frame header": (flipped(PHOTO, PHOTO.index(b"\xff\xc0") + 9), "damaged image"),
    "JPEG with flipped pixels, which decode all the same": (flipped(PHOTO, len(PHOTO) - 300), KEPT),
    "JPEG with bytes after its end": (PHOTO + b"\xff\x00tail" * 100, KEPT),
    "CMYK": (encode("CMYK", "JPEG"), KEPT),
    "gray JPEG": (encode("L", "JPEG"), KEPT),
    "16-bit gray": (encode("I;16", "PNG"), KEPT),
    "alpha": (encode("RGBA", "PNG"), KEPT),
    "GIF": (encode("P", "GIF"), KEPT),
    "animated GIF": (encode("P", "GIF", save_all=True, append_images=FRAMES), KEPT),
    "animated WebP": (encode("RGB", "WEBP", save_all=True, append_images=[f.convert("RGB") for f in FRAMES]), KEPT),
    "GIF cut short": (encode("P", "GIF", (64, 64))[:40], "damaged image"),
    "PNG cut short": (encode("RGB", "PNG", (64, 64))[:60], "damaged image"),
    "PNG with a wrong checksum": (flipped(encode("RGB", "PNG"), 30), "damaged image"),
    "a bomb of 3.6 billion pixels": (png_header(60_000, 60_000), "too large"),
    "a bomb of one row": (png_header(30_001, 1), "too large"),
    "no pixels": (png_header(0, 0), "damaged image"),
    "TIFF of a header alone": (b"II*\0\xff\xff\xff\xff", "damaged image"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(tmp_path, kind):
    data, expected = IMAGES[kind]
    check(tmp_path, a_folder(tmp_path, {"bad.jpg": data}, HEADER + GOOD + b"bad.jpg,1,2,me\n"), expected)


def test_a_file_larger_than_any_photo_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 50_000)
    check(tmp_path, a_folder(tmp_path, {"bad.jpg": jpeg() + bytes(50_000)}, None), "too large")


NUMBERS = {
    "latitude 91": ("91,2", "coordinates out of range"),
    "latitude under -90": ("-90.0001,2", "coordinates out of range"),
    "longitude 181": ("1,181", "coordinates out of range"),
    "NaN": ("NaN,2", "coordinates not finite"),
    "infinite": ("1,-inf", "coordinates not finite"),
    "too large for a float": ("1e999,2", "coordinates not finite"),
    "empty": (",2", "no coordinates"),
    "blank": ("1,  ", "no coordinates"),
    "decimal comma": ('"12,5",2', "coordinates not a number"),
    "decimal comma without quotes": ("12,5,2", "malformed row"),
    "degrees and minutes": ("12°30',2", "coordinates not a number"),
    "hexadecimal": ("0x10,2", "coordinates not a number"),
    "underscore": ("1_0,2", "coordinates not a number"),
    "digits of another script": ("٣,2", "coordinates not a number"),
    "a word": ("null,2", "coordinates not a number"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_coordinates(tmp_path, kind):
    text, expected = NUMBERS[kind]
    table = HEADER + GOOD + f"bad.jpg,{text},me\n".encode()
    source = a_folder(tmp_path, {"bad.jpg": jpeg()}, table)
    if expected != "malformed row":  # such a row has no id, so its image also counts as one without metadata
        return check(tmp_path, source, expected)
    assert make(tmp_path, source).dropped == {expected: 1, "no metadata": 1}


LONG, TOO_LONG = ("/".join(["d" * 20] * n) + "/x.jpg" for n in (4, 60))
IDS = {
    "empty id": (b"", "empty id"),
    "not there": (b"gone.jpg", "no image"),
    "twice": (b"good.jpg", "repeated id"),
    "up and out": (b"../../x.jpg", "outside the folder"),
    "out by a detour": (b"a/../../x.jpg", "outside the folder"),
    "out the Windows way": (rb"..\..\x.jpg", "outside the folder"),
    "absolute": (b"/etc/passwd", "outside the folder"),
    "a folder": (b"a", "no image"),
    "a web address": (b"https://example.org/x.jpg", "no image"),
    "very long": (b"x" * 5000 + b".jpg", "no image"),
    "longer than usual": (LONG.encode(), KEPT),
    "longer than records hold": (TOO_LONG.encode(), "long id"),
    "control character": (b"a\x07.jpg", "control characters"),
    "escape sequence": (b"\x1b[31ma.jpg", "control characters"),
    "NUL byte": (b"good.jpg\0.png", "control characters"),
    "line break": (b'"a\nb.jpg"', "control characters"),
    "latin-1": ("å.jpg".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids(tmp_path, kind):
    name, expected = IDS[kind]
    files = {name.decode(): jpeg()} if "longer" in kind else {}
    check(tmp_path, a_folder(tmp_path, files, HEADER + GOOD + name + b",1,2,me\n"), expected)


def test_an_id_in_two_shards_is_dropped_once(tmp_path):
    source = a_folder(tmp_path, {}, HEADER + GOOD * 2)
    check(tmp_path, Folder(dataclasses.replace(source.settings, photos_per_shard=1)), "repeated id")


def test_an_author_longer_than_records_hold(tmp_path):
    table = HEADER + GOOD + b"bad.jpg,1,2," + b"a" * 1025 + b"\n"
    check(tmp_path, a_folder(tmp_path, {"bad.jpg": jpeg()}, table), "long author")


BAD = b"bad.jpg,1,2,me\n"
TABLES: dict[str, tuple[bytes, str]] = {
    "BOM": (b"\xef\xbb\xbf" + HEADER + GOOD + BAD, KEPT),
    "Windows line ends": ((HEADER + GOOD + BAD).replace(b"\n", b"\r\n"), KEPT),
    "empty lines": ((HEADER + GOOD + BAD).replace(b"\n", b"\n\n"), KEPT),
    "quotes everywhere": (b'"' + (HEADER + GOOD + BAD).replace(b",", b'","').replace(b"\n", b'"\n"')[:-1], KEPT),
    "no line end at the end": ((HEADER + GOOD + BAD)[:-1], KEPT),
    "empty": (b"", "has no column id"),
    "semicolons": ((HEADER + GOOD + BAD).replace(b",", b";"), KEPT),
    "tabs": ((HEADER + GOOD + BAD).replace(b",", b"\t"), KEPT),
    "bars": ((HEADER + GOOD + BAD).replace(b",", b"|"), KEPT),
    "column names in capitals": (HEADER.upper() + GOOD + BAD, KEPT),
    "two delimiters that fit": (
        b"id,latitude,longitude,x;id;latitude;longitude\n",
        "separated by ',' or by ';': use only one of these delimiters",
    ),
    "gzip": (gzip.compress(HEADER + GOOD + BAD), KEPT),
    "gzip cut short": (gzip.compress(HEADER + GOOD + BAD)[:-12], "is damaged or cut short"),
    "JSON lines": (
        b'{"id": "good.jpg", "latitude": 35.7, "longitude": 139.7}\n{"id":"bad.jpg","latitude":1,"longitude":2}',
        KEPT,
    ),
    "a JSON array": (
        b'[{"id": "good.jpg", "latitude": 35.7, "longitude": 139.7},{"id":"bad.jpg","latitude":1,"longitude":2}]',
        KEPT,
    ),
    "a workbook": (b"PK\x03\x04" + bytes(100), "is a zip archive or an Excel workbook: save the table as a CSV"),
    "a missing column": (
        b"id,latitude,lon\n" + GOOD,
        "has no column longitude among 'id, latitude, lon': add it, or rename one to longitude",
    ),
    "no header": (GOOD + BAD, "has no column id"),
    "a column twice": (b"id,latitude,longitude,latitude\n" + GOOD, "more than one column latitude"),
    "a quote left open": (HEADER + b'"' + GOOD + BAD + GOOD, "a quote in line 2 that does not close there"),
    "a quote that the next row closes": (HEADER + GOOD + b'"' + BAD + b'"' + GOOD, "a quote in line 3"),
    "a quote open in the header": (b'"' + HEADER + GOOD, "fix line 1"),
    "UTF-16": ((HEADER + GOOD + BAD).decode().encode("utf-16"), KEPT),
    "UTF-16 without a mark": ((HEADER + GOOD + BAD).decode().encode("utf-16-be"), KEPT),
    "UTF-16 cut short": ((HEADER + GOOD + BAD).decode().encode("utf-16")[:-1], "is not whole UTF-16 text"),
    "UTF-32": ((HEADER + GOOD).decode().encode("utf-32"), "is UTF-32 text: save it in UTF-8"),
    "a quote that a later row closes, in the last column": (
        HEADER + GOOD + b'bad.jpg,1,2,"me\nx,3,4,you\ny,3,4,her"\n',
        "a quote in line 3 that does not close there",
    ),
    "a quote that the next row closes, in the last column": (
        HEADER + GOOD + b'bad.jpg,1,2,"me\nx,3,4,you"\n',
        "a quote in line 3 that does not close there",
    ),
    "a JPEG": (PHOTO, "is not UTF-8 text"),
    "a line without an end": (HEADER + b"x" * (2 << 20), "line 2 of .* has 1,048,576 characters or more"),
    "swapped columns": (
        HEADER + b"good.jpg,139.7,35.7,me\n" + BAD,
        r"swapped: 1 of 2 rows .* \(the first: 'good.jpg' in line 2, latitude 139.7\)",
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tmp_path, kind):
    table, expected = TABLES[kind]
    source = a_folder(tmp_path, {"bad.jpg": jpeg()}, table)
    if expected == KEPT:
        return check(tmp_path, source, KEPT)
    with pytest.raises(TableError, match=expected):
        make(tmp_path, source)


def test_a_table_without_rows(tmp_path):
    manifest = make(tmp_path, a_folder(tmp_path, {}, HEADER))
    assert manifest.counts == {"test": 0} and manifest.dropped == {"no metadata": 1}


ROWS = {
    "too few cells": (b"x,1\n", "malformed row"),
    "too many cells": (b"x,1,2,me,more\n", "malformed row"),
    "text after a closing quote": (b'"x"y,1,2,me\n', "malformed row"),
    "a quote open in the last line": (b'x,1,2,"me\n', "malformed row"),
    "a cell of 200,000 characters": (b"x,1,2," + b"m" * 200_000 + b"\n", "malformed row"),
    "latin-1 in a name": (b"x,1,2,\xe5\n", "not UTF-8"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows(tmp_path, kind):
    row, expected = ROWS[kind]
    check(tmp_path, a_folder(tmp_path, {}, HEADER + GOOD + row), expected)


def test_a_row_of_info_txt_that_is_too_short(tmp_path):
    (tmp_path / "info.txt").write_text("\t".join(["0", "1", *"abcdefghij", "10", "20"]) + "\n0\t2\t\n")
    path = write_files(tmp_path / "in", {"1.jpg": jpeg()})
    check(tmp_path, Yfcc(YfccSettings("yfcc4k", path, str(tmp_path / "info.txt"), 10)), "malformed row")


ZERO = IFDRational(0, 0)
EXIF: dict[str, tuple[bytes, str]] = {
    "none": (jpeg(), "no GPS"),
    "a camera without a fix: 0/0": (jpeg(exif=exif(1, 2, seconds=ZERO)), "no GPS"),
    "no hemisphere": (jpeg(exif=exif(1, 2, references=("", "E"))), "no GPS"),
    "hemispheres exchanged": (jpeg(exif=exif(1, 2, references=("E", "N"))), "no GPS"),
    "100 seconds": (jpeg(exif=exif(1, 2, seconds=IFDRational(100, 1))), "no GPS"),
    "latitude 95": (jpeg(exif=exif(95, 2)), "coordinates out of range"),
    "garbage": (jpeg(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "no GPS"),
    "cut short": (jpeg(exif=exif(1, 2).tobytes()[:70]), "no GPS"),
    "in an image that is cut short": (jpeg(exif=exif(1, 2))[:-30], "damaged image"),
    "text": (b"text", "not an image"),
    "lower-case hemispheres": (jpeg(exif=exif(1, 2, references=("s", "w"))), KEPT),
}


@pytest.mark.parametrize("kind", EXIF)
def test_exif(tmp_path, kind):
    data, expected = EXIF[kind]
    check(tmp_path, a_folder(tmp_path, {"bad.jpg": data}, None), expected)


#: Number of members that zipfile refuses if two overlap. Later versions of Python refuse both.
_OVERLAPPING = 2 if hasattr(zipfile.ZipInfo(), "_end_offset") else 1


@dataclasses.dataclass(frozen=True)
class Zip:
    """A zip member beside a good one, the damage done to the bytes of the zip, and the number of members it costs."""

    expected: str
    member: str = "00/2.jpg"
    data: bytes = dataclasses.field(default_factory=jpeg)
    compression: int = zipfile.ZIP_STORED
    harm: Callable[[bytes], bytes] = bytes
    dropped: int = 1


def directory(at: int, value: bytes) -> Callable[[bytes], bytes]:
    """Returns a function that overwrites bytes of the last entry in a zip's directory."""

    def harm(data: bytes) -> bytes:
        start = data.rindex(b"PK\x01\x02") + at
        return data[:start] + value + data[start + len(value) :]

    return harm


ZIPS = {
    "zero-byte member": Zip("empty image", data=b""),
    "text named .jpg": Zip("not an image", data=b"text"),
    "encrypted member": Zip("encrypted zip member", harm=directory(8, b"\x01\x00")),
    "member that would unpack to 4 GB": Zip("too large", harm=directory(24, b"\xf0\xff\xff\xff")),
    "member packed otherwise": Zip("damaged zip member", compression=zipfile.ZIP_LZMA),
    "unknown packing": Zip("damaged zip member", harm=directory(10, b"\x63\x00")),
    "flipped member": Zip("damaged zip member", harm=lambda data: flipped(data, data.rindex(b"\xff\xd9"))),
    "flipped packed member": Zip(
        "damaged zip member",
        compression=zipfile.ZIP_DEFLATED,
        harm=lambda data: flipped(data, data.rindex(b"2.jpg", 0, data.index(b"PK\x01\x02")) + 5),
    ),
    "member whose place is in another one": Zip(
        "damaged zip member", harm=directory(42, b"\x05\x00\x00\x00"), dropped=_OVERLAPPING
    ),
    "member whose place is beyond the end": Zip("damaged zip member", harm=directory(42, b"\xff\xff\xff\x00")),
    "name that leads out": Zip(KEPT, member="../../2.jpg"),
    "absolute name": Zip(KEPT, member="/2.jpg"),
    "a name twice": Zip("repeated image", member="01/1.jpg"),
    "cut short": Zip("is damaged or cut short .*: download it again", harm=lambda data: data[:-40]),
    "not a zip": Zip("is damaged or cut short .*: download it again", harm=lambda data: b"<html>404</html>"),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_zips(tmp_path, kind):
    case = ZIPS[kind]
    path = tmp_path / "in" / "images" / "train"
    path.mkdir(parents=True)
    (tmp_path / "2.jpg").write_bytes(jpeg("blue"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", case.compression) as archive:
        archive.writestr("00/1.jpg", jpeg(), zipfile.ZIP_STORED)
        archive.writestr(case.member, case.data)
    (path / "00.zip").write_bytes(case.harm(packed.getvalue()))
    more = "" if "1.jpg" in case.member else "2,3,4,NA,7\n"
    (tmp_path / "in/train.csv").write_text("id,latitude,longitude,country,creator_id\n1,1,100,NA,7\n" + more)
    source = Osv5m(Osv5mSettings(str(tmp_path / "in")))
    if "cut short" in case.expected:
        with pytest.raises(manifests.StageError, match=case.expected):
            make(tmp_path, source)
    else:
        check(tmp_path, source, case.expected, good=2 - case.dropped, dropped=case.dropped)
