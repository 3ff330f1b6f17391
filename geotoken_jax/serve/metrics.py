"""Prometheus metrics: counts and durations of requests, photos and batches. No metric contains data of a photo."""

import time
from collections.abc import Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one service."""

    def __init__(self, photos: Callable[[], int], ready: Callable[[], bool]):
        """photos: function that returns the number of photos in the service. ready: function that returns whether the
        model is compiled.
        """
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**options)
        self.requests = Counter("geotoken_requests", "Requests answered", ("path", "status"), **options)
        self.seconds = Histogram(
            "geotoken_request_seconds",
            "Seconds from a request's arrival to its response",
            ("path",),
            buckets=_SECONDS,
            **options,
        )
        self.photos = Counter("geotoken_photos", "Photos answered", ("outcome",), **options)
        self.batch_photos = Histogram(
            "geotoken_batch_photos", "Photos per batch", buckets=[2.0**n for n in range(10)], **options
        )
        self.batch_seconds = Histogram(
            "geotoken_batch_seconds", "Seconds of the model per batch", buckets=_SECONDS, **options
        )
        Gauge("geotoken_photos_waiting", "Photos received and not answered yet", **options).set_function(photos)
        Gauge("geotoken_ready", "1 once the model is compiled", **options).set_function(ready)

    def batch(self, photos: int, seconds: float) -> None:
        """Records the size and duration of a batch."""
        self.batch_photos.observe(photos)
        self.batch_seconds.observe(seconds)


class RequestMetrics:
    """ASGI middleware that counts and times requests by path.

    All unknown paths have the label `other`. Otherwise clients could add labels without limit.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request to the application and records its status and duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), [500]

        async def record_status(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            path = path if path in self._paths else "other"
            self._metrics.requests.labels(path, status[0]).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)
