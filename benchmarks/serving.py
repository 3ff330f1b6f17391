"""Photos a second of the service, against itself with batches of one, and what it does at twice what it can.

Throughput: so many clients, each with a photo at a time, for `--seconds`. Overload: photos arrive evenly at twice that
pace for `--overload` seconds more, whether they are answered or not; what is accepted is to be answered soon, and the
rest refused with 503. With `--kill` the service is then killed (SIGKILL) under half of what it can do, and started
again at once. The service is a process of its own, on the same machine as the clients, which take their share of it.

Latencies are the clients', of answered requests, in seconds. Prints one JSON object. Needs the extra `serve`, and
locust, which sends the photos (benchmarks/clients.py): on the PATH, or named by `--locust`, for it has no place in the
locked environment.
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
#: Percentiles that are told.
_TOLD = (50, 90, 99)
#: Seconds in which all that is accepted is answered: a client of an even pace has its turn no sooner.
_TURN_S = 10
_KIND = {"Content-Type": "multipart/form-data; boundary=photo"}


def bodies(photos: int) -> list[bytes]:
    """Returns forms with a JPEG of a web page's size, 480 x 360 pixels, whose content is like no photo's."""
    rng, made = np.random.default_rng(0), []
    for _ in range(photos):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        head = b'--photo\r\nContent-Disposition: form-data; name="photo"; filename="x.jpg"\r\n\r\n'
        made.append(head + file.getvalue() + b"\r\n--photo--\r\n")
    return made


class Service:
    """`geotoken serve` in a process of its own."""

    def __init__(self, options: argparse.Namespace, batch_size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        flags = [f"--port={port}", f"--batch-size={batch_size}", f"--queue={options.queue}", "--rate=0"]
        self._command = [sys.executable, "-m", "geotoken_jax.cli", "serve", options.model, *flags]
        self._process = subprocess.Popen(self._command)

    def wait(self) -> float:
        """Returns after how many seconds the service was ready."""
        start = time.perf_counter()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/ready"):
                return time.perf_counter() - start
            if self._process.poll() is not None:
                raise RuntimeError(f"the service ended with {self._process.returncode} before it was ready")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills the service as nothing can prevent, and starts it again."""
        self._process.kill()
        self._process.wait()
        self._process = subprocess.Popen(self._command)

    def metric(self, name: str) -> float:
        """Returns a value of /metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            found = re.search(rf"^{name} (\S+)", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else float("nan")

    def memory_mb(self) -> float:
        """Returns what the process holds itself: pages of the gallery, which is mapped, come as photos ask for them."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        return round(int(found[1]) / 1e3, 1) if found else float("nan")

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
    """Sends photos meanwhile, and for so many seconds; yields what is filled with the figures at the end.

    seconds: 0 for as long as the block takes. pace: of photos a second; 0 for clients that wait for their answers.
    """
    found: dict[str, Any] = {}
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
            yield found
            if not seconds:
                process.terminate()
            out = process.communicate()[0]
        finally:
            process.kill()
    ended = {entry["name"]: entry for entry in json.loads(out)}
    found["ended"] = {name: entry["num_requests"] for name, entry in ended.items()}
    if "200" in ended:
        entry = ended["200"]
        wall_s = entry["last_request_timestamp"] - entry["start_time"]
        told = np.repeat(*np.array([(float(ms), n) for ms, n in entry["response_times"].items()]).T.astype(int))
        found["photos_per_second"] = round(entry["num_requests"] / wall_s, 2)
        found["seconds"] = {f"p{p}": float(np.percentile(told, p)) / 1000 for p in _TOLD}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the service with batches of one, and with those of --batch-size."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "batch_size": options.batch_size, "queue": options.queue}
    for name, size in (("batches_of_one", 1), ("batched", options.batch_size)):
        print(f"measuring {name}", file=sys.stderr)
        with serving(options, size) as service:
            before = service.metric("process_cpu_seconds_total")
            with load(options.locust, service.address, options.seconds, options.clients) as found[name]:
                pass
            cpu_s = service.metric("process_cpu_seconds_total") - before
            found[name]["cpu_ms_per_photo"] = round(1000 * cpu_s / found[name]["ended"]["200"], 1)
            if size > 1:
                found["overload"] = overload(options, service, 2 * found[name]["photos_per_second"])
                if options.kill:
                    found["kill"] = killed(options, service, found[name]["photos_per_second"] / 2)
    one, batched = (found[name]["photos_per_second"] for name in ("batches_of_one", "batched"))
    return {**found, "ratio": round(batched / one, 2)}


def overload(options: argparse.Namespace, service: Service, pace: float) -> dict[str, Any]:
    """Returns the figures at a pace, and the service's memory in MB after a tenth and at the end."""
    told = {"offered_per_second": round(pace, 2)}
    with load(options.locust, service.address, options.overload, round(pace * _TURN_S), pace) as found:
        time.sleep(options.overload / 10)
        memory = [service.memory_mb()]
    memory.append(service.memory_mb())
    told["bound_seconds"] = round((options.queue + options.batch_size) / found["photos_per_second"], 2)
    return {**told, **found, "memory_mb": memory}


def killed(options: argparse.Namespace, service: Service, pace: float) -> dict[str, Any]:
    """Returns the figures of a service that is killed under load and started again, and how long that took."""
    with load(options.locust, service.address, 0, round(pace * _TURN_S), pace) as found:
        time.sleep(20)
        start = time.perf_counter()
        service.kill()
        service.wait()
        ready_s = time.perf_counter() - start
        answer_s = _first_answer(service.address) - start
        time.sleep(10)
    return {**found, "ready_after_seconds": round(ready_s, 1), "answered_after_seconds": round(answer_s, 1)}


def _first_answer(address: str) -> float:
    asked = urllib.request.Request(f"{address}/v1/predict", bodies(1)[0], _KIND)
    while True:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked, timeout=60):
            return time.perf_counter()
        time.sleep(0.1)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/export", help="folder that `geotoken export` made")
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement but the overload")
    parser.add_argument("--overload", type=float, default=60, help="seconds of twice what the service can do")
    parser.add_argument("--kill", action="store_true", help="kill the service under load, too")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queue", type=int, default=64, help="photos that the service takes in at once")
    parser.add_argument("--clients", type=int, default=64, help="of the throughput, up to --queue")
    parser.add_argument(
        "--locust", default="locust", help="the program: pip install locust, in an environment of its own"
    )
    options = parser.parse_args()
    if not shutil.which(options.locust):
        sys.exit(f"there is no {options.locust}: pip install locust, anywhere, and name it by --locust")
    print(json.dumps(compare(options)))


if __name__ == "__main__":
    main()
