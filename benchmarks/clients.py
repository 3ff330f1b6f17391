"""Clients that send photos to the service; benchmarks/serving.py runs this file with locust.

Three environment variables configure it:
BODIES: folder with bodies of requests, which are forms with the boundary `photo`.
CLIENTS: number of clients.
PACE: number of requests per second, of all clients together and evenly spaced. If it is 0, each client sends a request
as soon as the previous one is answered. Otherwise CLIENTS must be so large that a client has its answer before its next
turn.

The name of a request in locust's report is its HTTP status.
"""

import itertools
import os
import pathlib
import time

from locust import FastHttpUser, constant_pacing, task

_BODIES = itertools.cycle([file.read_bytes() for file in sorted(pathlib.Path(os.environ["BODIES"]).iterdir())])
_CLIENTS, _PACE = int(os.environ["CLIENTS"]), float(os.environ["PACE"])
_TURN_S = _CLIENTS / _PACE if _PACE else 0.0
_NUMBERS, _START = itertools.count(), time.monotonic()


class Client(FastHttpUser):
    """Sends one photo after another."""

    wait_time = constant_pacing(_TURN_S)

    def on_start(self) -> None:
        """Waits for the client's place in the first turn, so that requests are evenly spaced."""
        if _PACE:  # all clients have started after a second or two
            time.sleep(max(0.0, _START + 5 + next(_NUMBERS) / _PACE - time.monotonic()))

    @task
    def send(self) -> None:
        """Sends a photo, and names the request by its status."""
        kind = {"Content-Type": "multipart/form-data; boundary=photo"}
        with self.client.post("/v1/predict", data=next(_BODIES), headers=kind, catch_response=True) as answer:
            late = "" if answer.status_code != 503 or "retry-after" in answer.headers else " without Retry-After"
            broken = type(getattr(answer, "error", None)).__name__  # a failed connection has no status
            answer.request_meta["name"] = f"{answer.status_code}{late}" if answer.status_code else broken
            answer.success()
