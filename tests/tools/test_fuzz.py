"""Requests that nobody would send: none may fail the service, hold it up, or make it tell of its machine.

schemathesis makes them of the OpenAPI document, for a `geotoken serve` in a process of its own with a model of random
parameters; atheris makes bodies for the way of a photo, in fuzz_bodies.py.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from geotoken_jax.serve import limits
from tests import exports

hypothesis = pytest.importorskip("hypothesis")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytest.importorskip("atheris", reason="atheris is not installed")
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance  # noqa: E402

from geotoken_jax.serve import app  # noqa: E402
from tests.test_serve import Shade  # noqa: E402
from tests.tools import fuzz_bodies  # noqa: E402

ROOT = Path(__file__).parents[2]
#: A request is answered within so many seconds, on two cores with other work.
SECONDS = 20
#: What nothing that is answered may have in it. JSON's own \\/ aside, a slash is part of few words.
TOLD = re.compile(rb"Traceback|site-packages|\.py\b|/(home|root|tmp|usr|work|var|opt)\b|0x[0-9a-f]{6}|object at")
PHOTO = next(fuzz_bodies.images())


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """Yields the address of a service in a process of its own, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "geotoken_jax", "serve", str(folder), f"--port={port}"]
    with log.open("w") as out:
        flags = ["--rate=0", "--batch-size=2"]
        process = subprocess.Popen([*command, *flags], cwd=ROOT, env=os.environ, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 150
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                break
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a service, and its log."""
    folder = tmp_path_factory.mktemp("served")
    exports.write(folder / "export")
    with serving(folder / "export", folder / "log") as address:
        yield address, folder / "log"


def cut(photo: bytes, length: int, more: bytes) -> bytes:
    return photo[:length] + more


some = hypothesis.strategies
schemathesis.openapi.format(
    "binary",
    some.builds(cut, some.sampled_from([*fuzz_bodies.images()]), some.integers(0, 2_000), some.binary(max_size=9)),
)
schema = schemathesis.openapi.from_dict(app.make(Shade(), limits.ServeSettings()).openapi())


@schema.parametrize()
@hypothesis.settings(
    max_examples=600, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
def test_requests_made_of_the_openapi_document(case, service: tuple[str, Path]):
    start = time.monotonic()
    response = case.call(base_url=service[0], timeout=SECONDS)
    assert time.monotonic() - start < SECONDS
    # No schema knows which strings are photos; and of a form every part is bytes, whatever was meant by it.
    excluded = [positive_data_acceptance]
    if case.media_type == "multipart/form-data":
        excluded.append(negative_data_rejection)
    case.validate_response(response, excluded_checks=excluded)
    assert not (found := TOLD.search(response.content + repr(dict(response.headers)).encode())), found


def test_the_service_was_asked_often_and_still_answers(service: tuple[str, Path]):
    address, log = service
    body = b"--b\r\nContent-Disposition: form-data; name=photo; filename=x\r\n\r\n" + PHOTO + b"\r\n--b--\r\n"
    asked = urllib.request.Request(f"{address}/v1/predict", body, {"Content-Type": "multipart/form-data; boundary=b"})
    with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
        assert -90 <= json.load(answer)["latitude"] <= 90
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode()
    counted = re.findall(r'^geotoken_requests_total\{path="/v1[^"]*",status="(\d+)"\} (\S+)', lines, re.MULTILINE)
    assert sum(float(number) for _, number in counted) >= 1_000, counted
    assert "500" not in dict(counted) and "geotoken_photos_waiting 0.0" in lines
    assert "Traceback" not in log.read_text()


def test_no_body_makes_the_way_of_a_photo_fail(tmp_path: Path):
    command = [sys.executable, "-m", "tests.tools.fuzz_bodies", str(tmp_path / "corpus"), "-runs=20000", "-seed=1"]
    limits = ["-max_total_time=45", "-max_len=4096", "-timeout=10", "-rss_limit_mb=1000"]
    done = subprocess.run([*command, *limits], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs and int(runs[1]) >= 1_000, done.stderr[-3000:]
