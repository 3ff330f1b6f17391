"""What locust does for benchmarks/serving.py: clients that send photos to the service.

From the environment: BODIES, a folder of requests' bodies, which are forms with the boundary `photo`; CLIENTS, how many
there are; PACE, requests a second of all together, evenly, or 0 for each as soon as the last one is answered. There are
so many clients to a pace that each has had its answer before its next turn. Requests are named by how they ended.
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
    """Sends a photo at a time, again and again."""

    wait_time = constant_pacing(_TURN_S)

    def on_start(self) -> None:
        """Waits for its place in the first turn."""
        if _PACE:  # all are there after a second or two
            time.sleep(max(0.0, _START + 5 + next(_NUMBERS) / _PACE - time.monotonic()))

    @task
    def send(self) -> None:
        """Sends a photo."""
        kind = {"Content-Type": "multipart/form-data; boundary=photo"}
        with self.client.post("/v1/predict", data=next(_BODIES), headers=kind, catch_response=True) as answer:
            late = "" if answer.status_code != 503 or "retry-after" in answer.headers else " without Retry-After"
            broken = type(getattr(answer, "error", None)).__name__  # of a connection, where there is no status
            answer.request_meta["name"] = f"{answer.status_code}{late}" if answer.status_code else broken
            answer.success()
