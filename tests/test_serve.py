"""The service, with a test model that returns half of a photo's gray value as latitude."""

import asyncio
import base64
import contextlib
import gc
import gzip
import io
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geotoken_jax import cli
from geotoken_jax.backbone.preprocess import ImageError, open_image
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.predict.prediction import Candidate, Cell, Neighbor, Prediction
from geotoken_jax.settings import SettingsError

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
jsonschema = pytest.importorskip("jsonschema")

from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from geotoken_jax.serve import app, batching, bodies, limits  # noqa: E402

ONE, MANY = "/v1/predict", "/v1/predict-many"
SECRET = "SECRET-PLACE"


class Shade:
    """A model that predicts a photo's gray value as latitude, after it is released."""

    batch_size = 8

    def __init__(self):
        self.batches: list[int] = []
        self.free, self.fails = threading.Event(), False
        self.free.set()

    def prepare(self, photo: Any) -> np.ndarray:
        return np.asarray(open_image(photo).resize((4, 4)))

    def predict_prepared(self, photos: list[np.ndarray]) -> list[Prediction]:
        self.free.wait(20)
        self.batches.append(len(photos))
        if self.fails:
            raise RuntimeError(f"{SECRET} in /some/path")
        within = dict.fromkeys(THRESHOLDS_KM, 0.5)
        place = (float(round(photos[0].mean() / 2)), 20.0, 0.25)
        return [
            Prediction(
                *(float(round(photo.mean() / 2)), 20.0, 10.0, 90.0, within),
                candidates=(Candidate(*place),),
                cells=(Cell(6, *place), Cell(2, *place)),
                neighbors=(Neighbor("a", 1.0, 2.0, 2.5, 7),),
            )
            for photo in photos
        ]


@contextlib.contextmanager
def serving(ready: bool = True, **changes: Any) -> Iterator[tuple[TestClient, Shade]]:
    """Serves a Shade."""
    model = Shade()
    settings = limits.ServeSettings(**{"rate": 0, **changes})
    with TestClient(app.make(model, settings), raise_server_exceptions=False) as client:
        if ready:
            wait(lambda: client.get("/ready").status_code == 200)
            model.batches.clear()
        yield client, model
        model.free.set()


def wait(until: Any) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.01)


def photo(shade: int = 100, side: int = 32, **options: Any) -> bytes:
    """A gray JPEG. Its prediction has half its gray value as latitude."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade,) * 3).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def noise(side: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def many(*photos: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("photos", ("x.jpg", data)) for data in photos]


def says(response: Any, status: int) -> str:
    """Returns the message of a refusal, and asserts that it contains nothing about this machine."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    sentence = response.json()["error"]
    assert 10 < len(sentence) < 250 and "\n" not in sentence
    assert not re.search(r"0x|<|Traceback|Error|\.py|/home|/work|/tmp|/usr", sentence), sentence
    return sentence


def test_one_photo_as_a_form_and_as_base64():
    with serving() as (client, _):
        formed = client.post(ONE, files={"photo": ("x.jpg", photo())})
        assert formed.status_code == 200 and formed.headers["cache-control"] == "no-store"
        found = formed.json()
        assert (found["latitude"], found["radius_km"], found["radius_90_km"]) == (50, 10, 90)
        assert found["within"] == {str(km): 0.5 for km in THRESHOLDS_KM}
        assert found["candidates"][0] == {"latitude": 50, "longitude": 20, "probability": 0.25}
        assert [cell["level"] for cell in found["cells"]] == [6, 2]
        assert found["neighbors"] == [{"id": "a", "latitude": 1, "longitude": 2, "score": 2.5, "row": 7}]
        assert client.post(ONE, json={"photo": text(photo())}).json() == found


def test_many_photos_keep_their_order_and_a_bad_one_is_its_own_error():
    with serving() as (client, _):
        shades = [20, 200, 60, 120, 90]
        sent = [photo(shade) for shade in shades]
        sent[2] = sent[2][: len(sent[2]) // 2]
        for found in (client.post(MANY, files=many(*sent)), client.post(MANY, json={"photos": list(map(text, sent))})):
            assert found.status_code == 200
            answers = found.json()["answers"]
            assert [answer.get("latitude") for answer in answers] == [10, 100, None, 60, 45]
            assert set(answers[2]) == {"error"} and "damaged" in answers[2]["error"]
        found = client.post(MANY, json={"photos": [text(sent[0]), "http://a.b/c.jpg", text(b"")]})
        answers = found.json()["answers"]
        assert "latitude" in answers[0] and "base64" in answers[1]["error"] and "empty" in answers[2]["error"]


def test_geojson_has_everything_as_points():
    with serving() as (client, _):
        found = client.post(f"{MANY}?format=geojson", files=many(photo(60), b"no photo", photo(80)))
        assert found.headers["content-type"] == "application/geo+json"
        whole = found.json()
        assert whole["type"] == "FeatureCollection" and [error["photo"] for error in whole["errors"]] == [1]
        kinds = [(f["properties"]["photo"], f["properties"]["kind"]) for f in whole["features"]]
        assert kinds == [(n, kind) for n in (0, 2) for kind in ("answer", "candidate", "cell", "cell", "neighbor")]
        for feature in whole["features"]:
            assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Point"
            longitude, latitude = feature["geometry"]["coordinates"]
            assert -180 <= longitude <= 180 and -90 <= latitude <= 90
        answer = whole["features"][0]
        assert answer["geometry"]["coordinates"] == [20, 30] and answer["properties"]["radius_90_km"] == 90
        assert set(answer["properties"]["within"]) == {str(km) for km in THRESHOLDS_KM}
        assert client.post(f"{ONE}?format=geojson", files={"photo": photo()}).json()["errors"] == []
        assert "format" in says(client.post(f"{ONE}?format=kml", files={"photo": photo()}), 422)


def header(width: int, height: int) -> bytes:
    """A PNG whose header has this size."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"\x00\x00\x00\x0d"
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        + b"\x00\x00\x00\x04IDATabcd"
    )


BAD = {
    "empty": b"",
    "text": b"no photo at all",
    "page": b"<!doctype html><html></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "noise": random.Random(0).randbytes(5000),
    "cut JPEG": photo()[:200],
    "no scan": photo()[:4],
    "cut PNG": noise(64)[:3000],
    "PNG of nothing": header(10, 10),
    "zero wide": header(0, 10),
    "GIF": b"GIF89a\x01\x00",
    "TIFF": b"II*\x00\xff\xff\xff\xff",
    "WebP": b"RIFF\x10\x00\x00\x00WEBPVP8 \x04\x00\x00\x00abcd",
    "BMP": b"BM" + b"\xff" * 60,
    "huge": header(60_000, 60_000),
    "huge and broken": header(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("more", [dict(), dict(max_pixels=1_000)])
def test_what_is_no_photo_is_told_in_one_sentence(more):
    with serving(max_photos=len(BAD), **more) as (client, model):
        for data in BAD.values():
            assert "photo" in says(client.post(ONE, files={"photo": ("../../etc/passwd", data)}), 422)
        answers = client.post(MANY, files=many(*BAD.values())).json()["answers"]
        assert all(set(answer) == {"error"} for answer in answers) and not model.batches
    said = ImageError("the image given as bytes is damaged (no <_io.BytesIO object at 0x7f> (/tmp/x)): copy it again")
    assert bodies.sentence(said) == "the photo is damaged: copy it again"


def test_pixels_are_counted_before_they_are_decoded():
    with serving(max_pixels=32 * 32) as (client, _):
        assert client.post(ONE, files={"photo": photo()}).status_code == 200
        assert "more than 1,024 pixels" in says(client.post(ONE, files={"photo": photo(side=33)}), 422)
    with serving() as (client, _):
        sent = dict(files={"photo": header(20_000, 20_000)})
        tracemalloc.start()
        assert "50,000,000 pixels" in says(client.post(ONE, **sent), 422)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    "sent, status, word",
    [
        (dict(), 415, "Content-Type"),
        (dict(content=photo(), headers={"content-type": "image/jpeg"}), 415, "multipart"),
        (dict(content=b"x", headers={"content-type": b"\xff;;="}), 415, "Content-Type"),
        (dict(content=b"photo=x", headers={"content-type": "application/x-www-form-urlencoded"}), 415, "multipart"),
        (dict(content=b"x", headers={"content-type": "multipart/form-data"}), 422, "boundary"),
        (dict(content=b"", headers={"content-type": "multipart/form-data; boundary=x"}), 422, "cut short"),
        (dict(content=b"--x--\r\n", headers={"content-type": "multipart/form-data; boundary=x"}), 422, ""),
        (
            dict(
                content=b'--x\r\nContent-Disposition: form-data; name="photo"\r\n\r\nabc',
                headers={"content-type": "multipart/form-data; boundary=x"},
            ),
            422,
            "cut short",
        ),
        (dict(content=b"x", headers={"content-type": "multipart/form-data; boundary=" + "x" * 500}), 422, "boundary"),
        (dict(files={"picture": photo()}), 422, "another name"),
        (dict(files=[("photo", photo()), ("photo", photo())]), 422, "more photos than 1"),
        (dict(content=b"{", headers={"content-type": "application/json"}), 422, "not JSON"),
        (dict(content=b"[" * 100_000, headers={"content-type": "application/json"}), 422, "not JSON"),
        (dict(content=b"\xff\xfe\xff", headers={"content-type": "application/json; charset=x"}), 422, "not JSON"),
        (dict(json={}), 422, "other keys or values"),
        (dict(json=[1]), 422, "other keys or values"),
        (dict(json={"photo": text(photo()), "url": "http://localhost/"}), 422, "other keys or values"),
        (dict(json={"photo": text(photo())[:-3]}), 422, "base64"),
        (dict(json={"photo": "§§§§"}), 422, "base64"),
        (dict(content=b'{"photo": "\\ud800"}', headers={"content-type": "application/json"}), 422, "base64"),
        (dict(json={"photo": "http://localhost/x.jpg"}), 422, "URLs are not fetched"),
        (dict(json={"photo": f"data:image/jpeg;base64,{text(photo())}"}), 422, "a data: URL: send only the base64"),
        (dict(content=gzip.compress(b"{}"), headers={"content-type": "application/json"}), 415, "compressed"),
        (dict(json={"photo": text(photo())}, headers={"content-encoding": "br"}), 415, "without Content-Encoding"),
    ],
)
def test_a_body_of_another_form_is_told_what_to_send(sent, status, word):
    with serving() as (client, model):
        assert word in says(client.post(ONE, **sent), status)
        assert not model.batches


def test_a_list_has_at_least_one_photo_and_not_too_many():
    with serving(max_photos=2) as (client, _):
        assert "no photo" in says(client.post(MANY, json={"photos": []}), 422)
        for other in ("abc", {"0": "abc"}, [text(photo()), 7], [None], [{}], [[text(photo())]]):
            assert "other keys or values" in says(client.post(MANY, json={"photos": other}), 422)
        assert "more photos than 2" in says(client.post(MANY, json={"photos": ["x"] * 3}), 422)
        assert "more photos than 2" in says(client.post(MANY, files=many(*[photo()] * 3)), 422)
        assert client.post(MANY, files=many(photo(), photo())).status_code == 200


def test_head_answers_as_get_does():
    with serving() as (client, _):
        for path in ("/", "/health", "/ready"):
            assert client.head(path).status_code == client.get(path).status_code == 200


def test_a_port_that_cannot_be_used_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path, capsys):
    with pytest.raises(SettingsError, match=r"--port is 99999: set it to a number from 1 to 65535, or to 0"):
        limits.ServeSettings(port=99_999)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", str(tmp_path / "no export"), f"--port={port}"])
        assert ended.value.code == 2
        assert (
            f"--port={port} cannot be listened on (Address already in use): choose another" in capsys.readouterr().err
        )
    with pytest.raises(SettingsError, match=r"--host=203\.0\.113\.1 .*: choose another --host or --port"):
        limits.ServeSettings(host="203.0.113.1").bind()
    for one in limits.ServeSettings(host="localhost", port=port).bind():
        assert one.getsockname()[1] == port
        one.close()


def test_unknown_paths_and_methods_are_refused_alike():
    with serving() as (client, _):
        assert "/docs" in says(client.get("/../../etc/passwd"), 404)
        assert "/docs" in says(client.get(ONE), 405)


def test_a_large_body_is_refused_by_its_length_and_as_it_comes():
    with serving(max_bytes=5_000) as (client, _):
        large = client.post(ONE, content=b"x" * 5_001, headers={"content-type": "application/json"})
        assert "5,000 bytes" in says(large, 413) and large.headers["connection"] == "close"
    pulled = []

    async def endless() -> dict[str, Any]:
        pulled.append(1000)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    for headers, held in (([], 6_000), ([(b"content-length", b"5001")], 0)):
        pulled.clear()
        request = Request({"type": "http", "method": "POST", "headers": headers}, endless)
        with pytest.raises(limits.Refused) as refused:
            asyncio.run(bodies.read(request, 5_000, 10))
        assert refused.value.status == 413 and sum(pulled) == held


def test_a_refused_body_is_discarded_within_limits():
    async def refused(headers: list[Any], pieces: int, piece: bytes = b"x" * 100) -> tuple[int, list[Any]]:
        """Returns the number of pieces that a refusal takes from a body, and the messages of its response."""
        taken, sent = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal taken
            if taken == pieces:
                await asyncio.sleep(60)
            taken += 1
            return {"type": "http.request", "body": piece, "more_body": taken < 50}

        async def send(message: dict[str, Any]) -> None:
            sent.append((message, taken))

        drain = bodies.Drain(Response(b"no", 413), max_bytes=8_000, seconds=0.05)
        await drain({"type": "http", "method": "POST", "headers": headers}, receive, send)
        return taken, sent

    long = [(b"content-length", b"1")]
    taken, sent = asyncio.run(refused(long, 1000))
    assert taken == 50 and (b"connection", b"close") in sent[0][0]["headers"]
    assert [(message.get("body"), at) for message, at in sent[1:]] == [(b"no", 0), (None, 50)]
    assert asyncio.run(refused(long, 1000, b"x" * 4_000))[0] == 2  # too large
    assert asyncio.run(refused(long, 7))[0] == 7  # too slow
    assert asyncio.run(refused([*long, (b"expect", b"100-continue")], 1000))[0] == 0  # not sent yet
    assert asyncio.run(refused([], 1000))[0] == 0


def test_a_slow_body_is_given_up_and_one_that_ends_early_too():
    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    for receive, status in ((never, 408), (gone, 400)):
        with pytest.raises(limits.Refused) as refused:
            asyncio.run(bodies.read(Request({"type": "http", "method": "POST", "headers": []}, receive), 10, 0.05))
        assert refused.value.status == status


def test_what_waits_when_the_model_is_free_is_one_batch():
    async def answered() -> tuple[list[int], list[float]]:
        model = Shade()
        batcher = batching.Batcher(model, 8, 0.0, lambda photos, seconds: None)
        task = asyncio.create_task(batcher.run())
        while not batcher.ready:
            await asyncio.sleep(0.01)
        assert model.batches == [1, 2, 4, 8, 8]
        model.batches.clear()
        model.free.clear()
        shades = [np.full((4, 4, 3), 2 * n, np.uint8) for n in range(1, 12)]
        first = asyncio.create_task(batcher(shades[0]))
        await asyncio.sleep(0.2)  # this batch is in the model, which waits
        rest = [asyncio.create_task(batcher(shade)) for shade in shades[1:]]
        gone = asyncio.create_task(batcher(shades[0]))
        await asyncio.sleep(0)
        gone.cancel()
        model.free.set()
        found = await asyncio.gather(first, *rest)
        task.cancel()
        return model.batches, [prediction.latitude for prediction in found]

    batches, latitudes = asyncio.run(answered())
    assert batches == [1, 8, 2]  # sizes that are compiled; the canceled request is not in a batch
    assert latitudes == list(range(1, 12))


def test_several_requests_share_batches_and_each_has_its_own_answer():
    with serving(threads=4) as (client, model), ThreadPoolExecutor(12) as pool:
        model.free.clear()
        found = pool.map(lambda n: client.post(ONE, files={"photo": photo(20 * n)}).json()["latitude"], range(1, 13))
        wait(lambda: "geotoken_photos_waiting 12.0" in client.get("/metrics").text)
        time.sleep(0.3)
        model.free.set()
        assert list(found) == [10 * n for n in range(1, 13)]
        assert len(model.batches) < 12
        lines = client.get("/metrics").text
        assert 'geotoken_photos_total{outcome="answered"} 12.0' in lines
        assert f"geotoken_batch_photos_count {len(model.batches)}.0" in lines and "_batch_photos_sum 12.0" in lines
        assert "geotoken_photos_waiting 0.0" in lines


def test_a_full_queue_refuses_until_there_is_room():
    with serving(queue=4, max_photos=4) as (client, model), ThreadPoolExecutor(4) as pool:
        model.free.clear()
        held = [pool.submit(client.post, ONE, files={"photo": photo()}) for _ in range(3)]
        wait(lambda: "geotoken_photos_waiting 3.0" in client.get("/metrics").text)
        full = client.post(MANY, files=many(photo(), photo()))
        assert "full" in says(full, 503) and int(full.headers["retry-after"]) >= 1
        held.append(pool.submit(client.post, ONE, files={"photo": photo()}))
        wait(lambda: "geotoken_photos_waiting 4.0" in client.get("/metrics").text)
        assert "full" in says(client.post(ONE, files={"photo": photo()}), 503)
        model.free.set()
        assert [request.result().status_code for request in held] == [200] * 4
        assert client.post(MANY, files=many(*[photo()] * 4)).status_code == 200


def test_photos_a_minute_are_counted_by_address():
    now = [0.0]
    rate = limits.Rate(60, lambda: now[0])
    rate.take("1.2.3.4", 60)
    with pytest.raises(limits.Refused) as refused:
        rate.take("1.2.3.4", 5)
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "5"}
    rate.take("1.2.3.5", 60)
    rate.take("2001:db8::1", 60)
    with pytest.raises(limits.Refused):
        rate.take("2001:db8::ffff:2", 1)  # an address of the same network
    now[0] = 5.0
    rate.take("1.2.3.4", 5)
    clients = [f"10.0.{n // 256}.{n % 256}" for n in range(20_000)]
    for client in clients:
        rate.take(client, 60)
    with pytest.raises(limits.Refused):
        rate.take(clients[10_000], 1)  # only the last 10,000 clients are remembered
    rate.take(clients[9_999], 60)


def test_more_photos_than_the_rate_get_429():
    with serving(rate=5, max_photos=4) as (client, _):
        assert client.post(MANY, files=many(*[photo()] * 4)).status_code == 200
        fast = client.post(MANY, files=many(*[photo()] * 3))
        assert "photos per minute" in says(fast, 429) and int(fast.headers["retry-after"]) >= 1
        assert {client.get("/ready").status_code for _ in range(20)} == {200}


def test_a_token_is_asked_for_where_one_is_set(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "right")
    with serving(token_variable="SOME_TOKEN") as (client, model):
        for sent in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic right"},
            {"Authorization": b"Bearer \xe9"},
        ):
            refused = client.post(ONE, files={"photo": photo()}, headers=sent)
            assert "token" in says(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
        assert not model.batches
        own = {"Authorization": "Bearer right"}
        assert client.post(ONE, files={"photo": photo()}, headers=own).status_code == 200
        assert client.get("/metrics").status_code == 401 and client.get("/metrics", headers=own).status_code == 200
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert "HTTPBearer" in client.get("/openapi.json").json()["components"]["securitySchemes"]
    monkeypatch.delenv("SOME_TOKEN")
    with pytest.raises(SettingsError, match="--token-variable is SOME_TOKEN"):
        limits.ServeSettings(token_variable="SOME_TOKEN")


@pytest.mark.parametrize("wrong", ["batch_size", "queue", "max_bytes", "max_pixels", "threads", "read_s"])
def test_a_setting_that_allows_nothing_is_refused(wrong):
    with pytest.raises(SettingsError, match=f"--{wrong.replace('_', '-')} is 0"):
        limits.ServeSettings(**{wrong: 0})
    with pytest.raises(SettingsError, match=r"--max-photos is 100, more than --queue \(64\)"):
        limits.ServeSettings(max_photos=100)


def test_ready_only_once_every_size_is_compiled(caplog):
    caplog.set_level(logging.INFO, "uvicorn.error")
    with serving(ready=False) as (client, model):
        model.free.clear()
        wait(lambda: client.get("/health").status_code == 200)
        if (state := client.get("/ready")).status_code != 200:
            assert (
                state.status_code == 503 and state.json() == {"status": "compiling"} and "retry-after" in state.headers
            )
            assert "compiled" in says(client.post(ONE, files={"photo": photo()}), 503)
            assert "geotoken is ready" not in caplog.text
        model.free.set()
        wait(lambda: client.get("/ready").status_code == 200)
        assert model.batches == [1, 2, 4, 8, 8]
        assert "geotoken_ready 1.0" in client.get("/metrics").text
        assert "geotoken is ready" in caplog.text


def test_a_model_that_cannot_be_compiled_ends_the_service(caplog):
    model, broken = Shade(), threading.Event()
    model.fails = True
    with TestClient(app.make(model, limits.ServeSettings(), broken.set)) as client:
        assert broken.wait(30)
        assert client.get("/ready").status_code == 503
    assert "cannot be run" in caplog.text


def test_a_model_that_fails_says_so_and_goes_on():
    with serving() as (client, model):
        model.fails = True
        assert "model failed" in says(client.post(ONE, files={"photo": photo()}), 500)
        model.fails = False
        assert client.post(ONE, files={"photo": photo()}).status_code == 200


def test_metrics_count_requests_by_path_and_status():
    with serving() as (client, _):
        client.post(ONE, files={"photo": photo()})
        client.post(ONE, files={"photo": b"x"})
        client.get(f"/{SECRET}")
        lines = client.get("/metrics").text
        assert f'geotoken_requests_total{{path="{ONE}",status="200"}} 1.0' in lines
        assert f'geotoken_requests_total{{path="{ONE}",status="422"}} 1.0' in lines
        assert 'geotoken_requests_total{path="other",status="404"} 1.0' in lines
        assert 'geotoken_photos_total{outcome="unreadable"} 1.0' in lines and SECRET not in lines


def test_the_position_in_a_photo_is_neither_used_nor_logged(caplog):
    exif = Image.Exif()
    exif[0x010E] = SECRET
    exif.get_ifd(0x8825).update({1: "N", 2: (77.0, 7.0, 7.0), 3: "E", 4: (66.0, 6.0, 6.0)})
    with caplog.at_level(logging.DEBUG), serving() as (client, _):
        placed = client.post(ONE, files={"photo": (f"{SECRET}.jpg", photo(exif=exif, comment=SECRET.encode()))})
        assert placed.status_code == 200
        assert placed.json() == client.post(ONE, files={"photo": photo()}).json()
        client.post(ONE, files={"photo": (f"{SECRET}.jpg", photo(exif=exif)[:300])})
        client.post(ONE, files={SECRET: photo(exif=exif)})
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if SECRET in line or ("77" in line and "66" in line)]


@pytest.mark.slow
def test_nothing_of_a_photo_is_kept(monkeypatch):
    def disk(*args: Any, **options: Any) -> None:
        raise AssertionError("a photo was written to disk")

    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, disk)
    data = noise(1000)
    assert len(data) > 2_500_000
    with serving() as (client, model):
        send = [lambda: client.post(ONE, files={"photo": data}), lambda: client.post(ONE, json={"photo": text(data)})]
        for post in send:
            assert post().status_code == 200
        tracemalloc.start()
        for post in send * 3:
            assert post().status_code == 200
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < len(data)
        tracemalloc.stop()
        assert len(model.batches) == 8


def test_the_openapi_document_is_true():
    validator = pytest.importorskip("openapi_spec_validator")
    with serving() as (client, _):
        document = client.get("/openapi.json").json()
        validator.validate(document)
        known = {"components": document["components"]}
        for path in (ONE, MANY):
            operation = document["paths"][path]["post"]
            form = operation["requestBody"]["content"]["application/json"]
            jsonschema.validate(form["example"], form["schema"])
            for kind, media in operation["responses"]["200"]["content"].items():
                chosen = "geojson" if "geo" in kind else "json"
                found = client.post(f"{path}?format={chosen}", json=form["example"])
                assert found.status_code == 200 and found.headers["content-type"] == kind
                jsonschema.Draft202012Validator(media["schema"] | known).validate(found.json())
            refused = client.post(path, content=b"x")
            media = operation["responses"][str(refused.status_code)]["content"]["application/json"]
            jsonschema.Draft202012Validator(media["schema"] | known).validate(refused.json())
            assert {"200", "401", "408", "413", "415", "422", "429", "503"} <= set(operation["responses"])


def test_mangled_requests_never_fail_the_service():
    rng = random.Random(0)
    form = b'--b\r\nContent-Disposition: form-data; name="photo"; filename="x"\r\nContent-Transfer-Encoding: base64\r\n'
    form += b"Content-Type: image/jpeg\r\n\r\n" + text(photo()).encode() + b"\r\n--b--\r\n"
    bodies = [form, form.replace(b"base64", b"quoted-printable"), json.dumps({"photo": text(photo())}).encode()]
    kinds = [
        b"multipart/form-data; boundary=b",
        b"application/json",
        b"multipart/form-data; boundary=\xff",
        b"",
        b"a; b",
    ]
    with serving() as (client, _):
        seen = set()
        for _ in range(300):
            body = bytearray(rng.choice(bodies))
            for _ in range(rng.choice([0, 1, 3, 30])):
                place = rng.randrange(len(body))
                body[place : place + rng.choice([0, 1, 9])] = rng.randbytes(rng.choice([0, 1, 9]))
            kind = kinds[rng.choice([0, 0, 0, 1, 1, 2, 3, 4])]
            found = client.post(ONE, content=bytes(body), headers={"content-type": kind})
            seen.add(found.status_code)
            if found.status_code != 200:
                says(found, found.status_code)
        assert seen == {200, 415, 422}


DRAINED = """
import sys
from geotoken_jax.serve import app, limits
from tests.test_serve import Shade

class Slow(Shade):
    warm = 0
    def predict_prepared(self, photos):
        self.warm += 1
        if self.warm > 5:
            print("begun", flush=True)
            sys.stdin.readline()
        return super().predict_prepared(photos)

settings = limits.ServeSettings(port=0, rate=0)
sys.exit(app.run(Slow(), settings, settings.bind()))
"""


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_takes_nothing_new(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", DRAINED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True,
        )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        wait(lambda: "running on" in log.read_text() or process.poll() is not None)
        address = re.search(r"http://[\d.:]+", log.read_text())
        assert address, log.read_text()

        def ask(path: str, body: bytes | None = None) -> int:
            request = urllib.request.Request(address[0] + path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code
            except (urllib.error.URLError, ConnectionError):
                return 0

        wait(lambda: ask("/ready") == 200)
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(ask, ONE, json.dumps({"photo": text(photo())}).encode())
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGTERM)
            wait(lambda: ask("/ready") == 503)
            assert ask("/health") == ask("/v2/health/live") == 200 and ask("/v2/health/ready") == 503
            assert ask(ONE, json.dumps({"photo": text(photo())}).encode()) == 503
            assert not accepted.done()
            process.stdin.write("\n")
            process.stdin.flush()
            assert accepted.result(120) == 200
        wait(lambda: ask("/health") == 0)
        assert process.wait(60) == 0, log.read_text()
        assert SECRET not in log.read_text() and "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.communicate()
