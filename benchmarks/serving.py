"""Photos a second of the service, against itself with batches of one, and what it does at twice what it can.

Throughput: so many clients, each with a photo at a time, for `--seconds`. Overload: photos arrive evenly at twice that
pace for `--seconds` more, whether they are answered or not; what is accepted is to be answered soon, and the rest
refused with 503. The service is a process of its own, on the same machine as the clients, which take their share of it.
Latencies are the clients', of answered requests, in seconds. Prints one JSON object; needs the extra `serve`, and
httpx2.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import numpy as np
from PIL import Image

_PATH = "/v1/predict"
#: Percentiles that are told.
_TOLD = (50, 90, 99)


def made_up(photos: int) -> list[bytes]:
    """Returns JPEGs of a web page's size, 480 x 360 pixels, whose content is like no photo's."""
    rng, made = np.random.default_rng(0), []
    for _ in range(photos):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


@contextlib.contextmanager
def serving(options: argparse.Namespace, batch_size: int) -> Iterator[str]:
    """Starts the service in a process of its own, and yields its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serving", f"--model={options.model}", f"--serve={batch_size}"]
    process = subprocess.Popen([*command, f"--port={port}", f"--queue={options.queue}"])
    address = f"http://127.0.0.1:{port}"
    try:
        while not _ready(address):
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with {process.returncode} before it was ready")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def _ready(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/ready").status_code == 200
    except httpx2.TransportError:
        return False


class Load:
    """Requests that were sent, by how they ended."""

    def __init__(self, client: httpx2.AsyncClient):
        self._client, self._photos, self._sent = client, made_up(64), 0
        self.ended: Counter[str] = Counter()
        self.seconds: list[float] = []

    async def send(self) -> None:
        """Sends one photo and waits for what comes back."""
        photo = self._photos[self._sent % len(self._photos)]
        self._sent += 1
        start = time.perf_counter()
        try:
            answer = await self._client.post(_PATH, files={"photo": ("photo.jpg", photo, "image/jpeg")})
        except httpx2.HTTPError as error:
            self.ended[type(error).__name__] += 1
            return
        told = "" if answer.status_code != 503 or "retry-after" in answer.headers else " without Retry-After"
        self.ended[f"{answer.status_code}{told}"] += 1
        if answer.status_code == 200:
            self.seconds.append(time.perf_counter() - start)

    def figures(self, wall_s: float) -> dict[str, Any]:
        """Returns what came of all requests of so many seconds."""
        told = np.percentile(self.seconds, _TOLD).round(4).tolist() if self.seconds else [None] * len(_TOLD)
        return {
            "photos_per_second": round(len(self.seconds) / wall_s, 2),
            "seconds": {f"p{p}": value for p, value in zip(_TOLD, told, strict=True)},
            "ended": dict(self.ended),
        }


@contextlib.asynccontextmanager
async def clients(address: str, most: int) -> AsyncIterator[httpx2.AsyncClient]:
    """Yields what sends requests over at most so many connections."""
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=120, trust_env=False) as client:
        yield client


async def closed(address: str, seconds: float, parallel: int) -> dict[str, Any]:
    """Returns the figures of clients that each send a photo when they have the last one's answer."""
    async with clients(address, parallel) as client:
        load, start = Load(client), time.perf_counter()

        async def one() -> None:
            while time.perf_counter() < start + seconds:
                await load.send()

        await asyncio.gather(*(one() for _ in range(parallel)))
        return load.figures(time.perf_counter() - start)


async def open_loop(address: str, seconds: float, pace: float) -> dict[str, Any]:
    """Returns the figures of so many photos a second, and the service's memory in MB after a tenth and at the end."""
    async with clients(address, 1000) as client:
        load, start, pending, memory = Load(client), time.perf_counter(), set(), []
        for n in range(int(seconds * pace)):
            await asyncio.sleep(max(0.0, start + n / pace - time.perf_counter()))
            task = asyncio.create_task(load.send())
            pending.add(task)
            task.add_done_callback(pending.discard)
            if not memory and n >= seconds * pace / 10:
                memory.append(await _memory_mb(client))
        await asyncio.gather(*pending)
        wall_s = time.perf_counter() - start
        memory.append(await _memory_mb(client))
        return {"offered_per_second": round(pace, 2), **load.figures(wall_s), "memory_mb": memory}


async def _memory_mb(client: httpx2.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text
    found = re.search(r"^process_resident_memory_bytes (\S+)", lines, re.MULTILINE)
    return round(float(found[1]) / 1e6, 1) if found else float("nan")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the service with batches of one, and with those of --batch-size."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "batch_size": options.batch_size, "queue": options.queue}
    with serving(options, 1) as address:
        found["batches_of_one"] = asyncio.run(closed(address, options.seconds, options.clients))
    with serving(options, options.batch_size) as address:
        found["batched"] = asyncio.run(closed(address, options.seconds, options.clients))
        pace = 2 * found["batched"]["photos_per_second"]
        found["overload"] = asyncio.run(open_loop(address, options.seconds, pace))
    one, batched = (found[name]["photos_per_second"] for name in ("batches_of_one", "batched"))
    return {**found, "ratio": round(batched / one, 2)}


def serve(options: argparse.Namespace) -> int:
    """Runs the service as `geotoken serve` does; returns the exit status."""
    from geotoken_jax.serve import app, batching, limits

    settings = limits.ServeSettings(port=options.port, batch_size=options.serve, queue=options.queue, rate=0)
    return app.run(batching.ServedGeoToken(options.model), settings)


def main() -> None:
    """Prints the figures, or with --serve is the service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/export", help="folder that `geotoken export` made")
    parser.add_argument("--seconds", type=float, default=60, help="of each of three measurements")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queue", type=int, default=64, help="photos that the service takes in at once")
    parser.add_argument("--clients", type=int, default=64, help="of the throughput, up to --queue")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        sys.exit(serve(options))
    print(json.dumps(compare(options)))


if __name__ == "__main__":
    main()
