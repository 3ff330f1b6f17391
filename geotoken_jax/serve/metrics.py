"""What Prometheus reads: counts and durations, of requests, photos and batches, and nothing of any photo."""

import time
from collections.abc import Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one service."""

    def __init__(self, photos: Callable[[], int], ready: Callable[[], bool]):
        """photos: that are there now. ready: the model is compiled."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**own)
        self.requests = Counter("geotoken_requests", "Requests answered", ("path", "status"), **own)
        self.seconds = Histogram(
            "geotoken_request_seconds", "From a request's arrival to its answer", ("path",), buckets=_SECONDS, **own
        )
        self.photos = Counter("geotoken_photos", "Photos answered", ("outcome",), **own)
        self.batch_photos = Histogram(
            "geotoken_batch_photos", "Photos of a batch", buckets=[2.0**n for n in range(10)], **own
        )
        self.batch_seconds = Histogram("geotoken_batch_seconds", "Of the model for a batch", buckets=_SECONDS, **own)
        Gauge("geotoken_photos_waiting", "Photos that are there and not answered", **own).set_function(photos)
        Gauge("geotoken_ready", "1 once the model is compiled", **own).set_function(ready)

    def batch(self, photos: int, seconds: float) -> None:
        """Counts a batch."""
        self.batch_photos.observe(photos)
        self.batch_seconds.observe(seconds)


class Counted:
    """ASGI middleware that counts requests: a path that the service does not have is `other`, whatever its name."""

    def __init__(self, app: Any, metrics: Metrics, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers as the application does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), [500]

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            path = path if path in self._paths else "other"
            self._metrics.requests.labels(path, status[0]).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)
