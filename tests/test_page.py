"""The page of the service: widening of predictions by level, thumbnails of an export, and access."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from geotoken_jax import records
from geotoken_jax.export import pictures
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.geo.distance import from_unit_vectors, to_unit_vectors
from geotoken_jax.predict.prediction import Cell, Prediction
from geotoken_jax.workdir import Workdir

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
jsonschema = pytest.importorskip("jsonschema")

from starlette.testclient import TestClient  # noqa: E402

from geotoken_jax.serve import app, levels, limits  # noqa: E402
from tests.test_serve import MANY, ONE, Shade, many, photo, says, wait  # noqa: E402

PAGE = Path(app.__file__).with_name("page")


def prediction(at=(48.8501, 2.3499), within=(0.1, 0.4, 0.6, 0.7, 0.8), radii=(80.0, 6000.0), level=12) -> Prediction:
    shares = dict(zip((1, 25, 200, 750, 2500), within, strict=True))
    return Prediction(*at, *radii, shares, (), (Cell(level, *at, 0.01),), ())


def test_a_level_is_as_probable_as_the_distances_around_the_answer_say():
    # At the center of a cell, where the cell and a circle of equal area have nearly equal probability.
    at = tuple(float(x) for x in CellScheme(12, 1).decode(CellScheme(12, 1).encode(48.85, 2.35)))
    found = levels.with_levels(prediction(at)).levels
    round_km = found[12].edge_km / np.pi**0.5
    assert found[12].probability == pytest.approx(0.1 + 0.3 * np.log(round_km) / np.log(25), abs=0.015)
    assert found[12].edge_km == pytest.approx(2, rel=0.1)
    assert [level.level for level in found] == list(range(13))
    assert sum(cell.probability for cell in found[0].cells) == pytest.approx(1)
    for before, level in itertools.pairwise(found):
        assert sum(cell.probability for cell in level.cells) == pytest.approx(before.probability)
        assert before.edge_km / level.edge_km == pytest.approx(2, rel=0.4)
    sure = levels.with_levels(prediction(at, within=(1, 1, 1, 1, 1), radii=(0.0, 0.0)))
    assert all(level.probability == pytest.approx(1) for level in sure.levels[:10])
    lost = levels.with_levels(prediction(at, within=(0, 0, 0, 0.1, 0.3), radii=(9000.0, 15000.0))).levels
    assert len(lost) < 12 and lost[-2].probability >= 1e-4 > lost[-1].probability


@pytest.mark.parametrize("at", [(48.85, 2.35), (-89.9, 12.0), (0.0, 180.0), (35.3, -45.0), (90.0, 0.0)])
def test_the_chosen_cell_of_a_level_is_the_one_around_the_answer(at):
    for level in levels.with_levels(prediction(at)).levels:
        assert len(level.cells) == (4 if level.level else 6)
        assert [c.probability for c in level.cells] == sorted([c.probability for c in level.cells], reverse=True)
        cell = level.cells[level.chosen]
        assert cell.probability == level.probability
        middle = from_unit_vectors(to_unit_vectors(*np.array(cell.corners).T).sum(0))
        if level.level:
            scheme = CellScheme(level.level, 1)
            np.testing.assert_array_equal(scheme.encode(*middle), scheme.encode(*at))


def taken(n: int, image: bytes | None = None, **more: Any) -> dict[str, Any]:
    place = dict.fromkeys(("city", "state", "country", "continent"), "")
    return {
        **place,
        "author": f"author {n}",
        "coordinates": np.zeros(2),
        "id": f"photo/{n}",
        "image": image or photo(10 * n, 80),
        **more,
    }


def test_thumbnails_are_those_of_the_gallerys_photos_and_go_on_where_they_stopped(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pictures, "_SHARD_PHOTOS", 4)
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (77.0, 7.0, 7.0)})
    photos = [taken(n) for n in range(12)]
    photos[3]["image"], photos[5]["image"] = photo(30, 80, exif=exif), b"broken"
    ids = np.array([f"photo/{n}".encode() for n in range(12) if n not in (0, 7)])  # photos that `embed` dropped
    folder = epath.Path(tmp_path)

    save = records.save_array

    def broken(path: Any, values: np.ndarray) -> None:
        if "00002" in str(path):
            raise KeyboardInterrupt
        save(path, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "save_array", broken)
        pictures.write_thumbnails(photos, ids, 16, folder)
    first = sorted(tmp_path.rglob("*-00001-of-00003.npy"))
    before = {path: path.stat().st_mtime_ns for path in first}
    assert len(before) == 2
    assert pictures.write_thumbnails(photos, ids, 16, folder) == 9
    assert {path: path.stat().st_mtime_ns for path in first} == before
    found = pictures.Pictures(tmp_path)
    assert found.about.thumbnails
    for row, name in enumerate(ids):
        n, data = int(name.split(b"/")[1]), found.thumbnail(row)
        if n == 5:
            assert data is None
            continue
        assert data and b"Exif" not in data
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and image.size == (16, 16)
        assert abs(np.asarray(image).mean() - 10 * n) < 3
    assert [found.thumbnail(row) for row in (-1, 10, 12, 2**70)] == [None] * 4


def test_examples_come_from_all_continents_and_are_right_as_often_as_the_test_split(tmp_path: Path, monkeypatch):
    continents = ["Africa", "Asia", "Asia", "Asia", "Europe", "Europe"]
    photos = [
        taken(
            n, photo(n, 200), continent=continents[n % 6], city=f"C{n}", country="X", coordinates=np.array([n, n]) / 1.0
        )
        for n in range(60)
    ]
    photos[6]["author"] = photos[0]["author"]
    lines = [
        {"id": p["id"], "latitude": float(n), "longitude": n + (20.0 if n % 4 == 0 else 0.1)}
        for n, p in enumerate(photos)
    ]
    (tmp_path / "predictions/geotoken").mkdir(parents=True)
    (tmp_path / "predictions/geotoken/test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(records, "Photos", lambda folder, split: photos)
    found = pictures.write_examples(Workdir(tmp_path), "geotoken", 12, epath.Path(tmp_path))
    numbers = [int(example.latitude) for example in found]
    assert len(set(numbers)) == 12 and not {0, 6} <= set(numbers)
    assert sum(n % 4 == 0 for n in numbers) == 3
    counts = [sum(continents[n % 6] == name for n in numbers) for name in ("Africa", "Asia", "Europe")]
    assert min(counts) >= 3
    assert found[0].place == f"C{numbers[0]}, X" and len(list(tmp_path.glob("examples/*.jpg"))) == 12
    assert pictures.write_examples(Workdir(tmp_path), "geotoken", 12, epath.Path(tmp_path)) == found


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the parts that the page shows."""
    folder = tmp_path_factory.mktemp("export")
    photos = [taken(n) for n in range(6)]
    pictures.write_thumbnails(photos, np.array([p["id"].encode() for p in photos]), 32, epath.Path(folder))
    (folder / "examples").mkdir()
    (folder / "examples/00.jpg").write_bytes(photo(50))
    example = {"latitude": 1.0, "longitude": 2.0, "place": "Here"}
    words = {"name": "A model", "data": "x", "photos": 6, "knows": "little", "credit": "me", "examples": [example]}
    (folder / "page.json").write_text(json.dumps(words))
    (folder / "SHA256SUMS").write_text("")
    return folder


@contextlib.contextmanager
def serving(export: Path | None, **changes: Any) -> Iterator[TestClient]:
    settings = limits.ServeSettings(**{"rate": 0, **changes})
    with TestClient(app.make(Shade(), settings, export=export), raise_server_exceptions=False) as client:
        wait(lambda: client.get("/ready").status_code == 200)
        yield client


def test_pictures_are_served_by_number_and_by_nothing_else(export: Path):
    with serving(export) as client:
        about = client.get("/v1/about").json()
        assert about["name"] == "A model" and about["thumbnails"] and about["examples"][0]["place"] == "Here"
        assert re.fullmatch("[0-9a-f]{12}", about["version"])
        for path in ("/v1/neighbors/5/thumbnail", "/v1/examples/0"):
            found = client.get(path)
            assert found.status_code == 200 and found.headers["content-type"] == "image/jpeg"
            assert (
                "immutable" in found.headers["cache-control"] and found.headers["x-content-type-options"] == "nosniff"
            )
            assert Image.open(io.BytesIO(found.content)).format == "JPEG"
        wrong = ["6", "-1", "99999999999999999999999", "x", "0.5", "..%2f..%2fpage.json", "%2e%2e", "0%00"]
        for path in [f"/v1/neighbors/{w}/thumbnail" for w in wrong] + [f"/v1/examples/{w}" for w in ["1", *wrong]]:
            assert "see /docs" in says(client.get(path), 404)
    with serving(None) as client:
        about = client.get("/v1/about").json()
        assert about["name"] == "GeoToken" and not about["thumbnails"] and about["examples"] == []
        assert client.get("/v1/neighbors/0/thumbnail").status_code == client.get("/v1/examples/0").status_code == 404


def test_the_page_comes_whole_from_here_under_a_strict_policy(export: Path):
    with serving(export) as client:
        page = client.get("/")
        own = [f"/{path}" for path in re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)]
        own += [f"/page/{name}" for name in ("globe.js", "world.json")]
        assert page.headers["content-type"].startswith("text/html") and len(own) >= 5
        assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|style=", page.text)
        for path in ["/", *own]:
            found = client.get(path)
            assert found.status_code == 200, path
            policy = found.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            assert found.headers["referrer-policy"] == "no-referrer"
            again = client.get(path, headers={"If-None-Match": found.headers["etag"]})
            assert again.status_code == 304 or path == "/"
        for path in (
            "/page/../app.py",
            "/page/%2e%2e/app.py",
            "/page/..%2fapp.py",
            "/page//etc/passwd",
            "/page/",
            "/page/x",
        ):
            assert "see /docs" in says(client.get(path), 404)


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 250_000
    assert (PAGE / "world.json").stat().st_size < 150_000


def test_with_a_token_the_page_is_open_and_the_pictures_are_not(export: Path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "right")
    with serving(export, token_variable="SOME_TOKEN") as client:
        assert client.get("/").status_code == client.get("/page/page.js").status_code == 200
        for path in ("/v1/about", "/v1/neighbors/0/thumbnail", "/v1/examples/0", "/v1/examples/7"):
            assert "token" in says(client.get(path), 401)
            assert client.get(path, headers={"Authorization": "Bearer right"}).status_code == (
                404 if "7" in path else 200
            )


def test_levels_are_served_as_the_document_says(export: Path):
    with serving(export) as client:
        document = client.get("/openapi.json").json()
        known = {"components": document["components"]}
        for path, sent in ((ONE, {"photo": photo()}), (MANY, many(photo(), b"none"))):
            found = client.post(f"{path}?format=levels", files=sent).json()
            media = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
            jsonschema.Draft202012Validator(media["schema"] | known).validate(found)
            answer = found["answers"][0] if path == MANY else found
            assert [level["level"] for level in answer["levels"]] == list(range(7))
            plain = client.post(path, files=sent).json()
            assert (plain["answers"][0] if path == MANY else plain) == {
                k: v for k, v in answer.items() if k != "levels"
            }
            if path == MANY:
                assert set(found["answers"][1]) == {"error"}
        level = known["components"]["schemas"]["Level"]["properties"]
        assert set(level) == {field.name for field in dataclasses.fields(levels.Level)}
        about = document["paths"]["/v1/about"]["get"]["responses"]["200"]["content"]["application/json"]
        jsonschema.Draft202012Validator(about["schema"] | known).validate(client.get("/v1/about").json())


def test_pictures_are_counted_by_their_path(export: Path):
    with serving(export) as client:
        client.get("/v1/neighbors/0/thumbnail")
        client.get("/v1/neighbors/1/thumbnail")
        line = 'geotoken_requests_total{path="/v1/neighbors/{row:int}/thumbnail",status="200"} 2.0'
        assert line in client.get("/metrics").text
