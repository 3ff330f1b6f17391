"""Measures the service's throughput, with and without batching, and its behavior under overload. Prints JSON.

There are three measurements:
- Throughput: `--clients` clients each send one photo after another, for `--seconds`.
- Overload: for `--overload` seconds, photos arrive evenly at twice the throughput, whether earlier photos are answered
  or not. The service should answer accepted photos in bounded time, and refuse the others with 503.
- Kill (`--kill`): photos arrive at half the throughput. The service is killed (SIGKILL) and started again at once.

Service and clients run on the same machine and share its cores. Latencies are in seconds, measured by the clients for
answered requests.

This needs the extra `serve`, and locust, which runs benchmarks/clients.py. locust is not part of the locked
environment: install it elsewhere, and put it on the PATH or set `--locust` to its path.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

_CLIENTS = pathlib.Path(__file__).with_name("clients.py")
#: Percentiles of the latency in the figures.
_PERCENTILES = (50, 90, 99)
#: Seconds between two requests of one client if photos arrive evenly. A request must be answered before the next one.
_TURN_S = 10
_KIND = {"Content-Type": "multipart/form-data; boundary=photo"}


def bodies(photos: int) -> list[bytes]:
    """Returns forms, each with a random JPEG of 480 x 360 pixels, a usual size on web pages."""
    rng, forms = np.random.default_rng(0), []
    for _ in range(photos):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        head = b'--photo\r\nContent-Disposition: form-data; name="photo"; filename="x.jpg"\r\n\r\n'
        forms.append(head + file.getvalue() + b"\r\n--photo--\r\n")
    return forms


class Service:
    """`geotoken serve` in a process of its own."""

    def __init__(self, options: argparse.Namespace, batch_size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        flags = [f"--port={port}", f"--batch-size={batch_size}", f"--queue={options.queue}", "--rate=0"]
        self._command = [sys.executable, "-m", "geotoken_jax", "serve", options.model, *flags]
        self._process = subprocess.Popen(self._command)

    def wait(self) -> float:
        """Returns the seconds until the service is ready. Raises RuntimeError if the service ends before."""
        start = time.perf_counter()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/ready"):
                return time.perf_counter() - start
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the service ended with status {self._process.returncode} before it was ready: read its output"
                )
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills the service with SIGKILL, and starts it again."""
        self._process.kill()
        self._process.wait()
        self._process = subprocess.Popen(self._command)

    def metric(self, name: str) -> float:
        """Returns a value of /metrics; NaN if it is missing."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            match = re.search(rf"^{name} (\S+)", answer.read().decode(), re.MULTILINE)
        return float(match[1]) if match else float("nan")

    def memory_mb(self) -> float:
        """Returns the anonymous memory of the process in MB, without pages of the memory-mapped gallery."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        return round(int(match[1]) / 1e3, 1) if match else float("nan")

    def end(self) -> None:
        """Ends the service."""
        self._process.terminate()
        self._process.wait()


@contextlib.contextmanager
def serving(options: argparse.Namespace, batch_size: int) -> Iterator[Service]:
    """Yields a service that is ready."""
    service = Service(options, batch_size)
    try:
        service.wait()
        yield service
    finally:
        service.end()


@contextlib.contextmanager
def load(locust: str, address: str, seconds: float, clients: int, pace: float = 0.0) -> Iterator[dict[str, Any]]:
    """Sends photos while the `with` block runs. Yields a dict, into which the figures are written after the block.

    seconds: duration of the load; if 0, the load ends with the block. pace: photos per second; if 0, every client sends
    a photo as soon as its previous one is answered.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, body in enumerate(bodies(64)):
            (pathlib.Path(folder) / f"{number:02d}").write_bytes(body)
        flags = ["--headless", "--json", "--skip-log", "--host", address, "-u", str(clients), "-r", str(clients)]
        flags += ["-t", f"{seconds:g}s"] if seconds else []
        process = subprocess.Popen(
            [locust, "-f", str(_CLIENTS), *flags, "-s", "60"],
            env={**os.environ, "BODIES": folder, "CLIENTS": str(clients), "PACE": str(pace)},
            stdout=subprocess.PIPE,
        )
        try:
            yield figures
            if not seconds:
                process.terminate()
            out = process.communicate()[0]
        finally:
            process.kill()
    ended = {entry["name"]: entry for entry in json.loads(out)}
    figures["ended"] = {name: entry["num_requests"] for name, entry in ended.items()}
    if "200" in ended:
        entry = ended["200"]
        wall_s = entry["last_request_timestamp"] - entry["start_time"]
        latencies_ms = np.repeat(*np.array([(float(ms), n) for ms, n in entry["response_times"].items()]).T.astype(int))
        figures["photos_per_second"] = round(entry["num_requests"] / wall_s, 2)
        figures["seconds"] = {f"p{p}": float(np.percentile(latencies_ms, p)) / 1000 for p in _PERCENTILES}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the service with batches of one photo, and with batches of --batch-size photos."""
    figures: dict[str, Any] = {"cores": os.cpu_count(), "batch_size": options.batch_size, "queue": options.queue}
    for name, size in (("batches_of_one", 1), ("batched", options.batch_size)):
        print(f"measuring {name}", file=sys.stderr)
        with serving(options, size) as service:
            before = service.metric("process_cpu_seconds_total")
            with load(options.locust, service.address, options.seconds, options.clients) as figures[name]:
                pass
            cpu_s = service.metric("process_cpu_seconds_total") - before
            figures[name]["cpu_ms_per_photo"] = round(1000 * cpu_s / figures[name]["ended"]["200"], 1)
            if size > 1:
                figures["overload"] = overload(options, service, 2 * figures[name]["photos_per_second"])
                if options.kill:
                    figures["kill"] = killed(options, service, figures[name]["photos_per_second"] / 2)
    single, batched = (figures[name]["photos_per_second"] for name in ("batches_of_one", "batched"))
    return {**figures, "ratio": round(batched / single, 2)}


def overload(options: argparse.Namespace, service: Service, pace: float) -> dict[str, Any]:
    """Returns the figures under load, and the service's memory in MB after a tenth of the time and at the end."""
    offered = {"offered_per_second": round(pace, 2)}
    with load(options.locust, service.address, options.overload, round(pace * _TURN_S), pace) as figures:
        time.sleep(options.overload / 10)
        memory = [service.memory_mb()]
    memory.append(service.memory_mb())
    offered["bound_seconds"] = round((options.queue + options.batch_size) / figures["photos_per_second"], 2)
    return {**offered, **figures, "memory_mb": memory}


def killed(options: argparse.Namespace, service: Service, pace: float) -> dict[str, Any]:
    """Returns the figures of a service that is killed under load, and the seconds until it is back."""
    with load(options.locust, service.address, 0, round(pace * _TURN_S), pace) as figures:
        time.sleep(20)
        start = time.perf_counter()
        service.kill()
        service.wait()
        ready_s = time.perf_counter() - start
        answer_s = _first_answer(service.address) - start
        time.sleep(10)
    return {**figures, "ready_after_seconds": round(ready_s, 1), "answered_after_seconds": round(answer_s, 1)}


def _first_answer(address: str) -> float:
    request = urllib.request.Request(f"{address}/v1/predict", bodies(1)[0], _KIND)
    while True:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60):
            return time.perf_counter()
        time.sleep(0.1)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/export", help="folder that `geotoken export` made")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of the throughput measurement")
    parser.add_argument("--overload", type=float, default=60, help="seconds of the overload measurement")
    parser.add_argument("--kill", action="store_true", help="also kill the service under load")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queue", type=int, default=64, help="photos that the service accepts at once")
    parser.add_argument(
        "--clients", type=int, default=64, help="clients of the throughput measurement, at most --queue"
    )
    parser.add_argument(
        "--locust", default="locust", help="locust program; pip install locust in a separate environment"
    )
    options = parser.parse_args()
    if not shutil.which(options.locust):
        sys.exit(
            f"--locust is {options.locust}, which is not found: pip install locust, and name the program with --locust"
        )
    print(json.dumps(compare(options)))


if __name__ == "__main__":
    main()
