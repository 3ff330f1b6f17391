"""The Open Inference Protocol with its public client, tritonclient, against a server process."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.http")
from tritonclient.utils import InferenceServerException  # noqa: E402

from tests.test_serve import DRAINED, photo, wait  # noqa: E402

SHADES = list(range(0, 256, 4))


@contextlib.contextmanager
def serving(log: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yields the address and the process of a service, whose model waits for a line on stdin before each batch."""
    program = DRAINED.replace("port=0, rate=0", "port=0, rate=0, queue=80, max_photos=64")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        wait(lambda: "geotoken is ready" in log.read_text() or process.poll() is not None)
        address = re.search(r"http://([\d.:]+)", log.read_text())
        assert address, log.read_text()
        yield address[1], process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], batches: int) -> None:
    """Lets the model answer a number of batches."""
    assert process.stdin
    process.stdin.write("\n" * batches)
    process.stdin.flush()


def photos(*shades: int, binary: bool = True) -> list[triton.InferInput]:
    tensor = triton.InferInput("photo", [len(shades)], "BYTES")
    tensor.set_data_from_numpy(np.array([photo(shade) for shade in shades], object), binary_data=binary)
    return [tensor]


def pixels(array: np.ndarray, binary: bool) -> list[triton.InferInput]:
    tensor = triton.InferInput("pixels", list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return [tensor]


def test_the_client_of_triton_gets_answers_and_errors(tmp_path: Path):
    with (
        serving(tmp_path / "log") as (address, process),
        contextlib.closing(triton.InferenceServerClient(address)) as client,
    ):
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("geotoken")
        model = client.get_model_metadata("geotoken")
        assert client.get_model_metadata("geotoken", model["versions"][0]) == model
        assert client.get_server_metadata()["name"] == "geotoken"
        answer(process, 200)  # more than there are batches
        one = client.infer("geotoken", photos(100), request_id="first")
        assert one.get_response()["id"] == "first"
        assert [one.as_numpy(tensor["name"]).shape for tensor in model["outputs"]] == [(1,)] * 4 + [(1, 5)]
        assert one.as_numpy("latitude").tolist() == [50]
        many = client.infer("geotoken", photos(*SHADES))
        np.testing.assert_allclose(many.as_numpy("latitude"), np.array(SHADES) / 2, atol=0.51)
        gray = np.stack([np.full((8, 6, 3), shade, np.uint8) for shade in (20, 60)])
        for binary in (True, False):
            asked = [triton.InferRequestedOutput("latitude", binary_data=binary)]
            found = client.infer("geotoken", pixels(gray, binary), outputs=asked)
            assert found.as_numpy("latitude").tolist() == [10, 30] and found.as_numpy("within") is None
        for name, inputs, status, sentence in (
            ("geotoken", pixels(gray[0], True), "400", r"pixels has the wrong shape: send \[n, n, n, 3\]"),
            ("geotoken", pixels(gray[..., :1], False), "400", "pixels has the wrong shape"),
            ("geotoken", photos(*SHADES, 7), "400", "more photos than 64"),
            ("other", photos(100), "404", "no model of this name: ask for geotoken"),
        ):
            with pytest.raises(InferenceServerException, match=sentence) as refused:
                client.infer(name, inputs)
            assert refused.value.status() == status
        assert not client.is_model_ready("other")


def test_the_client_of_triton_sees_that_the_service_drains(tmp_path: Path):
    def ask(address: str) -> list[float]:
        with contextlib.closing(triton.InferenceServerClient(address, network_timeout=100)) as client:
            return client.infer("geotoken", photos(100)).as_numpy("latitude").tolist()

    with serving(tmp_path / "log") as (address, process), ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, address)
        assert process.stdout and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        with contextlib.closing(triton.InferenceServerClient(address)) as client:
            wait(lambda: not client.is_server_ready())
            assert client.is_server_live() and not client.is_model_ready("geotoken")
        with pytest.raises(InferenceServerException, match="the service is ending: send the request to another"):
            ask(address)
        assert not held.done()
        answer(process, 1)
        assert held.result(60) == [50]
        assert process.wait(60) == 0
