import builtins
import io
import json
import pickle
import shutil
import tarfile
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath
from PIL import Image

from benchmarks import mp16
from configs import common
from data_prep import photos, placeholder, tar_parts
from data_prep.sources.mp16_pro import MP16Pro
from geotoken_jax import configuration, records, settings
from geotoken_jax.errors import UserError
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import MP16ProSettings, PlaceholderSettings
from geotoken_jax.workdir import Workdir

PART = 333_333


class Poison:
    """Writes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def prepare(config, path):
    """Makes photos/ from config.photos in a work directory and returns its manifest."""
    return photos.run(configuration.read(config), Workdir(path))[0]


def config(folder, workers=1, **changes):
    config = common.get_config()
    config.photos.update(source="mp16_pro", workers=workers, max_dropped=0.5)
    config.photos.duplicates.keep = True  # the data set has 50 different pictures
    config.photos.mp16_pro.update(folder=str(folder), metadata=mp16.CSV, validation=0.2, photos_per_shard=100)
    config.photos.mp16_pro.placeholder.update(
        hashes=(f"{placeholder.dhash(mp16.flickr()):016x}",), distance=2, identical=mp16.IDENTICAL
    )
    config.photos.mp16_pro.update(changes)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set of 1,000 photos with every kind of fault: its folder, ledger, work directory and manifest."""
    path = tmp_path_factory.mktemp("mp16")
    ledger = mp16.generate(path / "data", 1000, PART)
    (path / "data" / "metadata" / "tar_index.pkl").write_bytes(pickle.dumps(Poison(path / "poisoned")))
    return types.SimpleNamespace(
        path=path, data=path / "data", ledger=ledger, manifest=prepare(config(path / "data"), path / "work")
    )


@pytest.fixture
def small(tmp_path):
    """A data set of 60 photos without faults: its folder."""
    mp16.generate(tmp_path / "data", 60, 100_000, trapped=False)
    return tmp_path / "data"


def source(data, work, **changes):
    section = config(data, **changes).photos.mp16_pro
    return MP16Pro(settings.read(MP16ProSettings, section, "photos.mp16_pro"), str(work))


def taken(made):
    """Returns split -> photos and drops in the order in which they are read."""
    return {
        split: [item for n in range(shards) for item in made.read(split, n)] for split, shards in made.splits.items()
    }


def reasons(made):
    return [item.reason for split in taken(made).values() for item in split if hasattr(item, "reason")]


def test_counts_and_photos_are_those_of_the_ledger(whole):
    assert whole.manifest.dropped == dict(whole.ledger.dropped)
    left = dict(whole.ledger.kept)
    for split, count in whole.manifest.counts.items():
        found = records.Photos(whole.path / "work" / "photos", split)
        assert len(found) == count
        for n in range(count):
            row = found[n]
            author, latitude, longitude, city, image = left.pop(row["id"])
            assert (row["author"], row["city"], row["image"]) == (author, city, image)
            assert tuple(row["coordinates"]) == (latitude, longitude)  # to the last bit
    assert not left
    assert not (whole.path / "poisoned").exists()


def test_an_author_is_in_one_split_and_the_seed_says_in_which(whole):
    def authors(**changes):
        splits = taken(source(whole.data, whole.path / f"seed{changes.get('seed', 0)}", **changes))
        return {name: {item.author for item in items if hasattr(item, "author")} for name, items in splits.items()}

    first, other = authors(), authors(seed=1)
    assert not first["train"] & first["validation"]
    share = len(first["validation"]) / sum(map(len, first.values()))
    assert 0.1 < share < 0.3
    assert first["validation"] != other["validation"]
    assert len([author for author in first["validation"] if "/" in author]) > 5  # photos without an author


def test_shards_follow_the_tar_and_read_each_photo_once(whole, monkeypatch):
    read = []
    data = tar_parts.data
    monkeypatch.setattr(tar_parts, "data", lambda parts, info: (read.append(info.offset), data(parts, info))[1])
    made = source(whole.data, whole.path / "work" / "photos")
    assert made.splits == {"train": 8, "validation": 3}
    for split, shards in made.splits.items():
        for n in range(shards):
            list(made.read(split, n))
        assert read == sorted(set(read))
        read.clear()


def test_an_interrupted_run_does_not_scan_again_and_ends_in_the_same_bytes(whole, tmp_path, monkeypatch):
    shutil.copytree(whole.path / "work", tmp_path / "work")
    folder = tmp_path / "work" / "photos"
    (folder / "manifest.json").rename(folder / "begun.json")
    next(folder.glob("mp16_pro/1.0.0/*validation*-00001-of-*")).unlink()
    monkeypatch.setattr(tar_parts, "members", lambda *_: pytest.fail("scanned again"))
    assert prepare(config(whole.data), tmp_path / "work") == whole.manifest
    for file in (whole.path / "work").rglob("*"):
        again = tmp_path / "work" / file.relative_to(whole.path / "work")
        assert file.is_dir() or file.read_bytes() == again.read_bytes()


def test_a_run_killed_in_the_survey_makes_it_anew(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "save_array", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(config(whole.data), tmp_path)
    assert prepare(config(whole.data), tmp_path) == whole.manifest


def test_parts_of_other_sizes_than_the_survey_knows_are_refused(small, tmp_path):
    first = source(small, tmp_path / "work")
    assert len(taken(first)) == 2
    with (small / "mp-16-images02").open("ab") as file:
        file.write(b"more")
    with pytest.raises(StageError, match="mp-16-images02 has 100004 bytes, but had 100000 when"):
        _ = source(small, tmp_path / "work").splits


def test_without_traps_nothing_is_dropped_and_validation_may_be_empty(small, tmp_path):
    made = source(small, tmp_path / "work", validation=0.0)
    assert made.splits == {"train": 1}
    assert len(taken(made)["train"]) == 60 and not reasons(made)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda data: (data / "mp-16-images01").unlink(), "has mp-16-images02 but no mp-16-images01"),
        (lambda data: (data / "mp-16-images00").unlink(), "has mp-16-images01 but no mp-16-images00"),
        (lambda data: [part.unlink() for part in data.glob("mp*")], "folder is .*has no mp-16-images00: set it to"),
        (lambda data: shorten(data / "mp-16-images01", 7), "cannot be read from .*mp-16-images0[12] at byte"),
        (lambda data: shorten(data / "mp-16-images01", 7 * 512), "cannot be read from .*mp-16-images0[12] at byte"),
        (lambda data: (data / "mp-16-images01").write_bytes(bytes(100_000)), "cannot be read from .*-images01 at"),
        (lambda data: (data / "mp-16-images00").write_bytes(b"x" * 9999), "cannot be read from .*00 at byte 0"),
        (lambda data: (data / mp16.CSV).unlink(), "filtered.csv does not exist: set config.photos.mp16_pro.metadata"),
    ],
)  # fmt: skip
def test_missing_and_damaged_files_are_refused(small, tmp_path, harm, message):
    harm(small)
    with pytest.raises(UserError, match=message):
        _ = source(small, tmp_path / "work").splits


def shorten(path, n):
    path.write_bytes(path.read_bytes()[:-n])


@pytest.mark.parametrize("left", [300, 512 + 100, 512 + 5000])  # in a header, and in a member
def test_a_tar_cut_short_gives_all_photos_before_the_cut(tmp_path, left):
    data = tmp_path / "data"
    ledger = mp16.generate(data, 60, 10**9, trapped=False)
    part = data / "mp-16-images00"
    with tarfile.open(part) as tar:
        at = tar.getmembers()[43].offset
    part.write_bytes(part.read_bytes()[: at + left])
    splits = taken(source(data, tmp_path / "work"))
    items = [item for items in splits.values() for item in items]
    kept = {item.id: item.image for item in items if not hasattr(item, "reason")}
    assert kept == {name: ledger.kept[name][-1] for name in list(ledger.kept)[:43]}
    others = sorted(item.reason for item in items if hasattr(item, "reason"))
    assert others == ["no image"] * 17 if left == 300 else ["no image"] * 16 + ["truncated"]


def mend(data, change):
    path = data / mp16.CSV
    path.write_bytes(change(path.read_text()).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("AUTHOR", "OWNER"), "has no column AUTHOR"),
        (lambda text: text.replace("LON", "?").replace("LAT", "LON").replace("?", "LAT"), "LAT and LON swapped"),
        (lambda text: text.split("\n")[0], "has a header and no rows"),
        (lambda text: "", "has no column IMG_ID"),
    ],
)
def test_a_csv_that_cannot_be_trusted_is_refused(small, tmp_path, change, message):
    mend(small, change)
    with pytest.raises(UserError, match=message):
        _ = source(small, tmp_path / "work").splits


def test_a_mark_of_utf_8_is_no_part_of_the_header(small, tmp_path):
    mend(small, lambda text: "\ufeff" + text)
    assert not reasons(source(small, tmp_path / "work"))


def entry(name, data=b"", **values):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in values.items():
        setattr(info, field, value)
    return info, data


def write_set(data, entries, rows):
    (data / "metadata").mkdir(parents=True)
    with tarfile.open(data / "mp-16-images00", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    lines = [",".join(map(str, row)) for row in [("IMG_ID", "AUTHOR", "LAT", "LON", "country"), *rows]]
    (data / mp16.CSV).write_text("\n".join(lines))


def test_names_are_never_paths_and_other_kinds_of_members_are_dropped(tmp_path):
    image = mp16.padded(mp16.flickr(), 6000)
    entries = [
        entry("a", type=tarfile.DIRTYPE),
        entry("../../x.jpg", image),
        entry("/etc/a_b_c.jpg", image + b"1"),
        entry("a/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("a/hard.jpg", type=tarfile.LNKTYPE, linkname="../../x.jpg"),
        entry("a/zero.jpg"),
        entry("a/again.jpg", image + b"2"),
        entry("b/again.jpg", image + b"3"),
    ]
    rows = [(name, "", 1, 2, "France") for name in ("x.jpg", "a/b/c.jpg", "link.jpg", "hard", "zero.jpg", "again.jpg")]
    write_set(tmp_path / "data", entries, [*rows, ("short", 1), ("", "", 1, 2, "France")])
    changed = config(tmp_path / "data", validation=0.0, photos_per_shard=3, placeholder={"hashes": ()})
    changed.photos.max_dropped = 0.7
    manifest = prepare(changed, tmp_path / "work")
    assert manifest.counts == {"train": 3}
    assert manifest.dropped == {
        "not a file": 2, "small file": 1, "repeated id": 1, "malformed row": 1, "empty id": 1
    }  # fmt: skip
    found = records.Photos(tmp_path / "work" / "photos", "train")
    assert [found[n]["id"] for n in range(3)] == ["x.jpg", "a/b/c.jpg", "again.jpg"]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "work"}


def test_the_first_usable_member_of_an_id_is_kept(tmp_path):
    good = mp16.padded(mp16.flickr(), 6000)
    entries = [
        entry("1/a.jpg", good[:9]),  # too small, which the header shows
        entry("2/a.jpg", b"x" * 6000),  # not an image, which its bytes show
        entry("3/a.jpg", good + b"1"),
        entry("4/a.jpg", good + b"2"),
        entry("1/b.jpg", good + b"3"),
        entry("2/b.jpg", b"x" * 6001),
    ]
    write_set(tmp_path / "data", entries, [(name, "", 1, 2, "France") for name in ("a", "b")])
    for per_shard in (1, 6):
        changes = {"validation": 0.0, "photos_per_shard": per_shard, "placeholder": {"hashes": ()}}
        changed = config(tmp_path / "data", **changes)
        changed.photos.max_dropped = 0.7
        work = tmp_path / str(per_shard)
        assert prepare(changed, work).dropped == {"small file": 1, "not an image": 2, "repeated id": 1}
        found = records.Photos(work / "photos", "train")
        assert [found[n]["image"] for n in range(len(found))] == [good + b"1", good + b"3"]


def test_all_names_of_a_place_are_kept(small, tmp_path):
    header, *lines = (small / mp16.CSV).read_text().splitlines()
    filled = header.split(",")
    mend(small, lambda text: text.replace('"São ""Paulo"", SP",,,,', '"São ""Paulo"", SP",Kyoto,Kansai,Honshu,'))
    assert filled[6:11] == ["neighbourhood", "city", "county", "state", "region"] and len(lines) >= 60
    prepare(config(small, validation=0.0), tmp_path / "work")
    photo = records.Photos(tmp_path / "work" / "photos", "train")[0]
    names = {name: photo[name] for name in ("city", "county", "state", "region", "country", "neighbourhood")}
    assert names == {
        "city": 'São "Paulo", SP', "county": "Kyoto", "state": "Kansai", "region": "Honshu", "country": "Brazil",
        "neighbourhood": "",
    }  # fmt: skip


class Bucket(fsspec.AbstractFileSystem):
    """Objects of a bucket, stored in a folder. `requests` has the number of bytes of each request."""

    protocol = ("s3", "gcs", "gs")
    cachable = False
    root, requests = "", []

    def info(self, path, **kwargs):
        file = Path(self.root) / self._strip_protocol(path)
        if not file.exists():
            raise FileNotFoundError(path)
        return {"name": path, "size": file.stat().st_size, "type": "directory" if file.is_dir() else "file"}

    def ls(self, path, detail=True, **kwargs):
        names = [f"{path.rstrip('/')}/{file.name}" for file in (Path(self.root) / self._strip_protocol(path)).iterdir()]
        return [self.info(name) for name in names] if detail else names

    def _open(self, path, mode="rb", **kwargs):
        return Object(self, path, mode, size=self.info(path)["size"], **kwargs)


class Object(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        Bucket.requests.append(end - start)
        with (Path(Bucket.root) / self.fs._strip_protocol(self.path)).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


@pytest.fixture
def bucket(small, monkeypatch):
    """The data set without faults, in buckets."""
    for protocol in ("s3", "gcs", "gs"):
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "root", str(small.parent))
    monkeypatch.setattr(Bucket, "requests", [])
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield small
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_parts_in_a_bucket_give_the_same_photos_and_the_survey_reads_headers_only(bucket, tmp_path, scheme):
    made = source(f"{scheme}://data", tmp_path / "bucket")
    assert made.splits == {"train": 1, "validation": 1}
    parts = [file.stat().st_size for file in bucket.glob("mp-*")]
    table = (bucket / mp16.CSV).stat().st_size
    assert sum(Bucket.requests) - table < 0.5 * sum(parts)  # of photos of 6 KB, a fifth are headers
    # As texts, because the time of capture is NaN, and data classes of Python 3.13 compare it with itself as unequal.
    assert repr(taken(made)) == repr(taken(source(bucket, tmp_path / "disk")))


def test_a_bucket_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    def missing(name, **kwargs):
        raise ImportError("Install s3fs to access S3")

    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(settings.SettingsError, match=r"'s3://b/data', which needs the package s3fs: install it with"):
        _ = source("s3://b/data", tmp_path).splits


def test_headers_are_read_without_a_buffer(small, monkeypatch):
    buffers = []
    monkeypatch.setattr(builtins, "open", lambda *args, opened=open, **kw: (buffers.append(kw), opened(*args, **kw))[1])
    with tar_parts.Parts(sorted(map(epath.Path, small.glob("mp-*")))) as parts:
        assert len(list(tar_parts.members(parts))) == 60
    assert buffers == [{"buffering": 0}] * 4


def cut(tmp_path, data, size):
    paths = []
    for n, start in enumerate(range(0, len(data), size)):
        paths.append(epath.Path(tmp_path / f"{n:05d}"))
        paths[-1].write_bytes(data[start : start + size])
    return tar_parts.Parts(paths)


@pytest.mark.parametrize("size", [511, 700, 100_000])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_and_headers_may_lie_across_parts(tmp_path, size, form):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for n in range(30):
            long = "" if form == tarfile.USTAR_FORMAT else "é" * (n * 10)
            info, data = entry(f"a/{long}/{n}.jpg", rng.bytes(rng.integers(0, 2000)))
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    with cut(tmp_path, file.getvalue(), size) as parts, tarfile.open(fileobj=file) as tar:
        found = [(info.name, info.offset, info.size) for info in tar_parts.members(parts)]
        assert found == [(info.name, info.offset, info.size) for info in tar.getmembers()] and len(found) == 30
        for info in tar.getmembers():
            again = tar_parts.member(parts, info.offset)
            assert again.name == info.name
            assert tar_parts.data(parts, again) == tar.extractfile(info).read()


def header(**values):
    return entry("a", **values)[0].tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=-1024) + bytes(4096), "negative size"),  # would cause an endless loop
        (
            header(type=b"L", size=1 << 40) + bytes(4096),
            "asks for 1,099,511,627,776 bytes, more than",
        ),  # would fill memory
        (header(type=b"x", size=512) + b"99 path=b\n".ljust(512, b"\0"), "cannot be read"),
        (header() + bytes(512) + header() + bytes(1024), "no header there"),  # an end marker in the middle
        (header() + b"x" * 512, "no header there"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data, message):
    with pytest.raises(StageError, match=message):
        list(tar_parts.members(cut(tmp_path, data, 700)))


def test_the_hash_of_a_placeholder_survives_another_size_and_quality():
    gone = mp16.flickr()
    known = PlaceholderSettings((f"{placeholder.dhash(gone):016x}",), 4, 1)
    with Image.open(io.BytesIO(gone)) as image:
        file = io.BytesIO()
        image.resize((300, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=40)
    assert placeholder.is_placeholder(file.getvalue(), known)
    photo = np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG")
    assert not placeholder.is_placeholder(file.getvalue(), known)
    assert not placeholder.is_placeholder(b"no image", known)


def test_a_hash_is_one_bit_a_step_from_the_top_left():
    ramp = np.tile(np.array([9, *range(1, 9)], np.uint8) * 20, (8, 1))
    ramp[0] = ramp[0, ::-1]
    file = io.BytesIO()
    Image.fromarray(np.kron(ramp, np.ones((32, 32), np.uint8))).save(file, "PNG")
    assert f"{placeholder.dhash(file.getvalue()):016x}" == "01" + "7f" * 7


def test_only_files_of_a_common_size_are_read_to_find_identical_ones():
    files = [b"aa", b"b", b"aa", b"cc", b"aa", b"cc", b"eee"]
    read = []
    same = placeholder.repeated_files(
        np.array([len(f) for f in files]), lambda n: (read.append(n), files[n])[1], limit=2
    )
    assert same.tolist() == [True, False, True, False, True, False, False]
    assert read == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder": {"hashes": ("12",)}}, "placeholder.hashes has '12': write each hash as 16 digits"),
        ({"placeholder": {"distance": 64}}, "placeholder.distance is 64: use 0 to 63"),
        ({"placeholder": {"identical": 0}}, "placeholder.identical is 0: use 1 or more"),
        ({"validation": 1.0}, "validation is 1.0: use a share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(settings.SettingsError, match=message):
        source(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize("size", [1_777, 4_608, 17_408, 10**6])
def test_parts_read_side_by_side_give_the_members_of_the_whole(tmp_path, size):
    rng = np.random.default_rng(0)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for n in range(10):
            info, data = entry(f"in/{n}.jpg", rng.bytes(700))
            tar.addfile(info, io.BytesIO(data))
    entries = [entry("a", type=tarfile.DIRTYPE), entry("a/b", type=tarfile.DIRTYPE)]
    for n in range(12):  # headers of several blocks, and data that resemble members
        data = inner.getvalue() if n % 2 else rng.bytes(rng.integers(0, 9000))
        entries.append(entry(f"a/{'é' * 40 * n}/{n}.jpg", data))
    write_set(tmp_path / "data", entries, [("0.jpg", "", 1, 2, "France")])
    whole = tmp_path / "data" / "mp-16-images00"
    with tarfile.open(whole) as tar:
        wanted = [info.offset for info in tar.getmembers() if not info.isdir()]
    content = whole.read_bytes()
    for n, start in enumerate(range(0, len(content), size)):
        (tmp_path / "data" / f"mp-16-images{n:02d}").write_bytes(content[start : start + size])
    _ = source(tmp_path / "data", tmp_path / "work").splits
    assert np.load(tmp_path / "work" / "survey" / "member.npy").tolist() == wanted and len(wanted) == 12


def test_the_survey_says_why_and_where_in_flat_arrays(whole):
    folder = whole.path / "work" / "photos" / "survey"
    assert sum(file.stat().st_size for file in folder.glob("*.npy")) < 1100 * 20 + 6 * 128
    assert len(json.loads((folder / "files.json").read_text())) == len(list(whole.data.glob("mp-*"))) + 1
