"""The HTTP application: its endpoints, startup and shutdown."""

import contextlib
import hmac
import http
import logging
import signal
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import pydantic
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from geotoken_jax import __version__
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve import bodies, inference, site
from geotoken_jax.serve.answers import GEOJSON, GEOJSON_SCHEMA, Answers, Failure, geojson
from geotoken_jax.serve.batching import Model
from geotoken_jax.serve.levels import LeveledPrediction
from geotoken_jax.serve.limits import Refused, ServeSettings, retry_after
from geotoken_jax.serve.metrics import RequestMetrics
from geotoken_jax.serve.service import Service

Format = Literal["json", "geojson", "levels"]

_PREDICT, _PREDICT_MANY = "/v1/predict", "/v1/predict-many"
#: The service reads and discards the rest of a refused body, up to this multiple of --max-bytes.
_MAX_DISCARDED = 10
#: Predictions may be personal: no cache between the service and the client may store them.
_HEADERS = {"Cache-Control": "no-store"}
#: A PNG of one gray pixel.
_EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
_REFUSALS = {
    400: "the connection closed before the whole body arrived",
    401: "the service requires a bearer token, and it is missing or wrong",
    408: "the request body took too long to arrive",
    413: "the request is too large",
    415: "the content type is not supported",
    422: "the request or its only photo cannot be read",
    429: "too many photos per minute; wait the seconds in Retry-After",
    500: "the service failed",
    503: "the service is full or not ready; wait the seconds in Retry-After",
}


def make(
    model: Model, settings: ServeSettings, on_failure: Callable[[], None] = lambda: None, export: Any = None
) -> FastAPI:
    """Returns the HTTP application.

    on_failure: function called if the model cannot be run. export: folder of the exported model, with the texts and
    pictures of the web page; if None, the page has no texts about the model and no pictures.
    """
    # Silence both libraries. Their messages can contain data from the photo. At DEBUG, Pillow logs all EXIF data.
    for library in ("PIL", "python_multipart"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="PIL")
    service = Service(model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with service.running(on_failure):
            yield

    app = FastAPI(
        title="geotoken", version=__version__, description=_DESCRIPTION, lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )  # fmt: skip
    _add_refusals(app)
    token = settings.token()
    guard = [Depends(_bearer(token))] if token else []
    _add_photos(app, service, guard)
    _add_state(app, service, guard)
    about = site.add(app, export, guard)
    inference.add(app, service, about.version or "1", guard)
    app.state.service = service
    paths = {path for route in app.routes if isinstance(path := getattr(route, "path", None), str)}
    app.add_middleware(RequestMetrics, metrics=service.metrics, paths=paths)
    app.add_middleware(bodies.Drain, max_bytes=_MAX_DISCARDED * settings.max_bytes, seconds=settings.read_s)
    return app


_DESCRIPTION = """Predicts where a photo was taken, with calibrated uncertainty.

Photos are neither stored nor logged. The position in a photo's EXIF is not read. URLs are not fetched."""


def _add_photos(app: FastAPI, service: Service, guard: list[Any]) -> None:
    """Adds the endpoints that predict."""
    max_photos = service.settings.max_photos
    photo = {"type": "string", "contentEncoding": "base64", "description": "an encoded file: JPEG, PNG, WebP, ..."}
    file = {"type": "string", "format": "binary"}
    photos, files = (
        {"type": "array", "minItems": 1, "maxItems": max_photos, "items": items} for items in (photo, file)
    )

    @app.post(_PREDICT, dependencies=guard, **_endpoint(Prediction | LeveledPrediction, "photo", photo, file, _EXAMPLE))
    async def predict(request: Request, format: Format = "json") -> Response:
        """Predicts where a photo was taken."""
        answers = await service.answers(request, _reader(request, "photo", None), format == "levels")
        if isinstance(answers[0], Failure):
            raise Refused(422, answers[0].error)
        return _response(answers, format, None)

    @app.post(_PREDICT_MANY, dependencies=guard, **_endpoint(Answers, "photos", photos, files, [_EXAMPLE, _EXAMPLE]))
    async def predict_many(request: Request, format: Format = "json") -> Response:
        """Predicts where each photo was taken. Photos that cannot be read have an error instead of a prediction."""
        answers = await service.answers(request, _reader(request, "photos", max_photos), format == "levels")
        return _response(answers, format, Answers)


def _reader(request: Request, name: str, max_photos: int | None) -> Callable[[bytes], Sequence[Any]]:
    """Returns a function that reads the photos in a request's body. name, max_photos: see `bodies.photos`."""
    kind = request.headers.get("content-type", "")
    return lambda body: bodies.photos(kind, body, name, max_photos)


def _add_state(app: FastAPI, service: Service, guard: list[Any]) -> None:
    """Adds the endpoints for health, readiness and metrics."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=dict[str, str])
    async def health() -> Response:
        """Returns 200 while the process is alive."""
        return JSONResponse({"status": "alive"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=dict[str, str], responses={503: {"model": dict[str, str]}})
    async def ready() -> Response:
        """Returns 200 and "ready" once the model is compiled for all batch sizes.

        Returns 503 and "compiling" before, and 503 and "draining" after SIGTERM.
        """
        if service.state == "ready":
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": service.state}, 503, retry_after(5))

    @app.get("/metrics", dependencies=guard, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Returns counts and durations in the Prometheus format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_refusals(app: FastAPI) -> None:
    """Adds handlers that return every error as JSON with one sentence."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refusal(error.status, str(error), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = error.errors()[0]
        return _refusal(422, f"{wrong['loc'][-1]}: {wrong['msg']}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _refusal(error.status_code, f"{http.HTTPStatus(error.status_code).phrase}: see /docs", error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _refusal(500, "the service failed: try again, and report it to the operator if it fails again")


def _refusal(status: int, sentence: str, headers: Any = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _bearer(token: str) -> Callable[..., Any]:
    """Returns a FastAPI dependency that refuses requests without the bearer token."""
    scheme = HTTPBearer(auto_error=False)

    async def authorized(sent: HTTPAuthorizationCredentials | None = Depends(scheme)) -> None:  # noqa: B008
        if not sent or not hmac.compare_digest(sent.credentials.encode(), token.encode()):
            sentence = "the bearer token is missing or wrong: send it as Authorization: Bearer TOKEN"
            raise Refused(401, sentence, {"WWW-Authenticate": "Bearer"})

    return authorized


_TYPES = {kind: pydantic.TypeAdapter(kind) for kind in (Prediction, LeveledPrediction, Answers)}


def _response(answers: Sequence[Prediction | Failure], format: Format, container: type[Answers] | None) -> Response:
    """Returns the response in the requested format.

    container: class that wraps the list of answers. If None, the response is the first answer alone.
    """
    if format == "geojson":
        return JSONResponse(geojson(answers), headers=_HEADERS, media_type=GEOJSON)
    value: Any = container(list(answers)) if container else answers[0]
    return Response(_TYPES[type(value)].dump_json(value, exclude_none=True), headers=_HEADERS, media_type=bodies.JSON)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure, "description": _REFUSALS[status]} for status in statuses}


def _endpoint(kind: Any, name: str, encoded: Any, file: Any, example: Any) -> dict[str, Any]:
    """Returns the arguments that describe an endpoint for photos in the OpenAPI document.

    kind: class of the response. name: key of the photos in the request body. encoded, file: JSON schemas of the photos
    in a JSON body and in a form. example: value of `name` in an example body.
    """

    def content(schema: Any, **more: Any) -> dict[str, Any]:
        properties = {name: schema}
        form = {"type": "object", "required": [name], "properties": properties, "additionalProperties": False}
        return {"schema": form, **more}

    forms = {bodies.MULTIPART: content(file), bodies.JSON: content(encoded, example={name: example})}
    answered = {
        "description": "the prediction of where the photo was taken",
        "content": {GEOJSON: {"schema": GEOJSON_SCHEMA}},
    }
    return {
        "response_model": kind,
        "responses": {200: answered, **_refusals(*_REFUSALS)},
        "openapi_extra": {"requestBody": {"required": True, "content": forms}},
    }


class _Server(uvicorn.Server):
    """A server that ends in two steps after SIGTERM or SIGINT.

    First it refuses new photos and answers the accepted ones, for up to `drain_s` seconds. Its port stays open, so a
    load balancer that requests /ready gets 503 and sends photos to other replicas. Then the server closes its port. A
    second signal closes the port at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service, self._end = service, 0.0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begins to drain at the first signal."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._end = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Returns whether the server must close its port and end. uvicorn calls this ten times per second."""
        if self._service.draining:
            left = self._end - time.monotonic()
            if not self._service.room.taken or left <= 0:
                self.config.timeout_graceful_shutdown = max(1, int(left))
                self.should_exit = True
        return await super().on_tick(counter)


def run(model: Model, settings: ServeSettings, sockets: list[socket.socket], export: Any = None) -> int:
    """Serves until SIGTERM or SIGINT, waits up to `drain_s` seconds for accepted requests, and returns the exit status.

    The status is 1 if the model could not be run, otherwise 0. sockets: result of `ServeSettings.bind`. export: see
    `make`.
    """
    failed = []

    def on_failure() -> None:
        failed.append(True)
        server.should_exit = True

    app = make(model, settings, on_failure, export)
    config = uvicorn.Config(
        app,
        access_log=False,  # for privacy: a log would contain addresses and times
        server_header=False,
        timeout_graceful_shutdown=settings.drain_s,
        # Longer than proxies keep idle connections, usually 60 s. If the service closed a connection first, a request
        # that the proxy sends at that moment would be lost.
        timeout_keep_alive=75,
    )
    server = _Server(config, app.state.service)
    # When uvicorn has ended, it sends the signal to its own process again. These handlers ignore that second signal,
    # because it would end the process before this function returns the exit status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    for listener in sockets:
        host, port = listener.getsockname()[:2]
        # uvicorn prints this only for its own sockets.
        logging.getLogger("uvicorn.error").info(
            "geotoken running on http://%s:%d, compiling the model", f"[{host}]" if ":" in host else host, port
        )
    server.run(sockets)
    return int(bool(failed))
