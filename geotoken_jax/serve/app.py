"""The service: what is asked for at which path, and how it starts and ends."""

import asyncio
import contextlib
import hmac
import http
import logging
import signal
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve import bodies, site
from geotoken_jax.serve.answers import GEOJSON, GEOJSON_SCHEMA, Answers, Failure, geojson
from geotoken_jax.serve.batching import Batcher, Model
from geotoken_jax.serve.levels import LeveledPrediction, with_levels
from geotoken_jax.serve.limits import Capacity, Rate, Refused, ServeSettings, retry_after
from geotoken_jax.serve.metrics import Counted, Metrics

Format = Literal["json", "geojson", "levels"]

_ONE, _MANY = "/v1/predict", "/v1/predict-many"
#: What an answer may be read by: nothing between here and who asked keeps it.
_HEADERS = {"Cache-Control": "no-store"}
#: A PNG of one gray pixel.
_EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
_REFUSALS = {
    400: "the request ended before its body did",
    401: "the bearer token, where the service asks for one, is missing or wrong",
    408: "the request took too long to arrive",
    413: "the request is too large",
    415: "photos come in another form",
    422: "the request, or its only photo, cannot be read",
    429: "too many photos a minute; Retry-After says when to come again",
    500: "the service failed",
    503: "the service is full, or not ready; Retry-After says when to come again",
}


class Service:
    """A model with its batches, its limits and its metrics."""

    def __init__(self, model: Model, settings: ServeSettings):
        self.settings = settings
        self.metrics = Metrics(lambda: self.room.taken, lambda: self.batcher.ready)
        self.batcher = Batcher(model, settings.batch_size, settings.wait_ms / 1000, self.metrics.batch)
        self.room = Capacity(settings.queue, self.batcher.wait_s)
        self._rate, self._prepare = Rate(settings.rate), model.prepare
        self._threads = ThreadPoolExecutor(settings.threads, "decode")

    @contextlib.asynccontextmanager
    async def running(self, broken: Callable[[], None]) -> AsyncIterator[None]:
        """Runs the model meanwhile; `broken` is called if that fails, which is then logged."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                logging.getLogger(__name__).critical("the model cannot be run", exc_info=task.exception())
                broken()

        task = asyncio.create_task(self.batcher.run())
        task.add_done_callback(ended)
        try:
            yield
        finally:
            task.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def answers(
        self, request: Request, name: str, most: int | None, format: Format
    ) -> list[Prediction | Failure]:
        """Returns the answers for a request's photos, in order; name, most: see `bodies.photos`. Raises Refused."""
        settings, address = self.settings, request.client.host if request.client else ""
        if not self.batcher.ready:
            raise Refused(503, "the model is being compiled: try again later", retry_after(5))
        with contextlib.ExitStack() as held:
            held.enter_context(self.room.take(1))
            self._rate.take(address, 1)
            body = await bodies.read(request, settings.max_bytes, settings.read_s)
            kind = request.headers.get("content-type", "")
            photos = await self._in_thread(bodies.photos, kind, body, name, most)
            del body
            held.enter_context(self.room.take(len(photos) - 1))
            self._rate.take(address, len(photos) - 1)
            return await asyncio.gather(*(self._answer(photo, format) for photo in photos))

    async def _answer(self, photo: Any, format: Format) -> Prediction | Failure:
        try:
            prepared = await self._in_thread(self._prepared, photo)
        except ImageError as error:
            self.metrics.photos.labels("unreadable").inc()
            return Failure(bodies.sentence(error))
        found = await self.batcher(prepared)
        self.metrics.photos.labels("answered").inc()
        return await self._in_thread(with_levels, found) if format == "levels" else found

    def _prepared(self, photo: Any) -> Any:
        return self._prepare(bodies.decoded(photo, self.settings.max_pixels))

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def make(
    model: Model, settings: ServeSettings, broken: Callable[[], None] = lambda: None, export: Any = None
) -> FastAPI:
    """Returns the application. broken: is called if the model cannot be run. export: folder with pictures for the page,
    if there is one."""
    # What these have to say is of a sender's making: Pillow's notes at DEBUG are the whole EXIF.
    for library in ("PIL", "python_multipart"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="PIL")
    service = Service(model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with service.running(broken):
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
    site.add(app, export, guard)
    paths = {path for route in app.routes if isinstance(path := getattr(route, "path", None), str)}
    app.add_middleware(Counted, metrics=service.metrics, paths=paths)
    return app


_DESCRIPTION = """Where was this photo taken? Coordinates with an honest uncertainty.

Nothing of a photo is kept, nothing of it is logged, and the position in its EXIF is not read. No address is fetched."""


def _add_photos(app: FastAPI, service: Service, guard: list[Any]) -> None:
    """Adds what photos are sent to."""
    most = service.settings.max_photos
    photo = {"type": "string", "contentEncoding": "base64", "description": "an encoded file: JPEG, PNG, WebP, ..."}
    file = {"type": "string", "format": "binary"}
    photos, files = ({"type": "array", "minItems": 1, "maxItems": most, "items": items} for items in (photo, file))

    @app.post(_ONE, dependencies=guard, **_described(Prediction | LeveledPrediction, "photo", photo, file, _EXAMPLE))
    async def predict(request: Request, format: Format = "json") -> Response:
        """Tells where one photo was taken."""
        found = await service.answers(request, "photo", None, format)
        if isinstance(found[0], Failure):
            raise Refused(422, found[0].error)
        return _written(found, format, None)

    @app.post(_MANY, dependencies=guard, **_described(Answers, "photos", photos, files, [_EXAMPLE, _EXAMPLE]))
    async def predict_many(request: Request, format: Format = "json") -> Response:
        """Tells where each of several photos was taken; one that cannot be read has an error in its place."""
        found = await service.answers(request, "photos", most, format)
        return _written(found, format, Answers)


def _add_state(app: FastAPI, service: Service, guard: list[Any]) -> None:
    """Adds what says how the service is."""

    @app.get("/health", response_model=dict[str, str])
    async def health() -> Response:
        """Says that the process is alive."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", response_model=dict[str, str], responses=_refusals(503))
    async def ready() -> Response:
        """Says whether photos are answered: the model is compiled for every size of a batch."""
        if not service.batcher.ready:
            raise Refused(503, "the model is being compiled: try again later", retry_after(5))
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", dependencies=guard, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and durations, in the form of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_refusals(app: FastAPI) -> None:
    """Makes every error one sentence of JSON."""

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
        return _refusal(500, "the service failed: try again, and tell who runs it")


def _refusal(status: int, sentence: str, headers: Any = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _bearer(token: str) -> Callable[..., Any]:
    """Returns a dependency that refuses who does not send the token."""
    scheme = HTTPBearer(auto_error=False)

    async def authorized(sent: HTTPAuthorizationCredentials | None = Depends(scheme)) -> None:  # noqa: B008
        if not sent or not hmac.compare_digest(sent.credentials.encode(), token.encode()):
            sentence = "the bearer token is missing or wrong: send it as Authorization: Bearer TOKEN"
            raise Refused(401, sentence, {"WWW-Authenticate": "Bearer"})

    return authorized


_TYPES = {kind: pydantic.TypeAdapter(kind) for kind in (Prediction, LeveledPrediction, Answers)}


def _written(found: Sequence[Prediction | Failure], format: Format, form: type[Answers] | None) -> Response:
    """Returns answers as they are asked for. form: what a list of them is in; None for the only one."""
    if format == "geojson":
        return JSONResponse(geojson(found), headers=_HEADERS, media_type=GEOJSON)
    value: Any = form(list(found)) if form else found[0]
    return Response(_TYPES[type(value)].dump_json(value, exclude_none=True), headers=_HEADERS, media_type=bodies.JSON)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure, "description": _REFUSALS[status]} for status in statuses}


def _described(kind: Any, name: str, encoded: Any, file: Any, example: Any) -> dict[str, Any]:
    """Returns what the OpenAPI document says of a path that takes photos."""

    def content(schema: Any, **more: Any) -> dict[str, Any]:
        properties = {name: schema}
        form = {"type": "object", "required": [name], "properties": properties, "additionalProperties": False}
        return {"schema": form, **more}

    forms = {bodies.MULTIPART: content(file), bodies.JSON: content(encoded, example={name: example})}
    answered = {"description": "where it was taken", "content": {GEOJSON: {"schema": GEOJSON_SCHEMA}}}
    return {
        "response_model": kind,
        "responses": {200: answered, **_refusals(*_REFUSALS)},
        "openapi_extra": {"requestBody": {"required": True, "content": forms}},
    }


def run(model: Model, settings: ServeSettings, export: Any = None) -> int:
    """Serves until SIGTERM or SIGINT, and then until all that was accepted is answered; returns the exit status.

    export: see make."""
    failed = []

    def broken() -> None:
        failed.append(True)
        server.should_exit = True

    server = uvicorn.Server(
        uvicorn.Config(
            make(model, settings, broken, export),
            settings.host,
            settings.port,
            access_log=False,  # who asked when is nobody's business
            server_header=False,
            timeout_graceful_shutdown=settings.drain_s,
            # Longer than proxies keep idle connections, 60 s as a rule: of two ends that close one, a request is lost.
            timeout_keep_alive=75,
        )
    )
    # uvicorn drains, and then sends itself the signal again.
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda *_: None)
    server.run()
    return int(bool(failed))
