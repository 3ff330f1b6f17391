"""The web page at `/`, and the endpoints for its texts and pictures."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from geotoken_jax.export.pictures import About, Pictures
from geotoken_jax.geo import places
from geotoken_jax.serve.answers import Failure

_FOLDER = Path(__file__).with_name("page")
#: The page may request URLs of this service only and run its own scripts only. No page may show it in a frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate by ETag, so a new version of the package shows at once
}
#: Browsers may cache pictures for a year, because their URLs contain the version of the export. Shared caches may not
#: store them, because pictures may require a token.
_CACHED = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
_JPEG: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        401: {"model": Failure, "description": "the service requires a bearer token, and it is missing or wrong"},
        404: {"model": Failure, "description": "the picture does not exist"},
    },
}


def add(app: FastAPI, export: Any, guard: list[Any]) -> About:
    """Adds the page and its endpoints to an application, and returns the page's information about the model.

    export: folder of the exported model; if None, the page has no pictures. guard: dependencies of the endpoints that
    require the token.
    """
    pictures = Pictures(export)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_FOLDER / "index.html", headers=_HEADERS)

    app.mount("/page", _Files(directory=_FOLDER))

    @app.get("/v1/about", dependencies=guard, response_model=About, responses={401: _JPEG["responses"][401]})
    async def about() -> Response:
        """Returns information about the model and its example photos."""
        return JSONResponse(dataclasses.asdict(pictures.about), headers={"Cache-Control": "no-store"})

    @app.get("/v1/neighbors/{row:int}/thumbnail", dependencies=guard, **_JPEG)
    async def thumbnail(row: int) -> Response:
        """Returns the JPEG thumbnail of a gallery photo. row: the `row` of a neighbor."""
        return _jpeg(pictures.thumbnail(row))

    @app.get("/v1/examples/{number:int}", dependencies=guard, **_JPEG)
    async def example(number: int) -> Response:
        """Returns an example photo. number: index in the `examples` of /v1/about, from 0."""
        return _jpeg(pictures.example(number))

    return pictures.about


class _Files(StaticFiles):
    """Serves the files of the page. The file of cities is in another folder, because predictions use it too."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        return (str(places.FILE), places.FILE.stat()) if path == places.FILE.name else super().lookup_path(path)

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_HEADERS)
        return response


def _jpeg(data: bytes | None) -> Response:
    if data is None:
        raise HTTPException(404)
    return Response(data, headers=_CACHED, media_type="image/jpeg")
