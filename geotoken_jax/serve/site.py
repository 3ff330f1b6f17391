"""What people see at `/`: the page, and the pictures of the export that it shows."""

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from geotoken_jax.export.pictures import About, Pictures
from geotoken_jax.serve.answers import Failure

_FOLDER = Path(__file__).with_name("page")
#: The page fetches from this service alone, runs nothing but its own files, and is in no frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again by its ETag: a new version of the package is seen at once
}
#: Of pictures, whose address names the export (`?VERSION`): a year. Where a token is asked for no proxy keeps them.
_KEPT = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
_JPEG: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        401: {"model": Failure, "description": "the bearer token, where the service asks for one, is missing or wrong"},
        404: {"model": Failure, "description": "there is no such picture"},
    },
}


def add(app: FastAPI, export: Any, guard: list[Any]) -> None:
    """Adds the page to an application. export: folder of the model, or None. guard: of what is not open to everyone."""
    pictures = Pictures(export)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_FOLDER / "index.html", headers=_HEADERS)

    app.mount("/page", _Files(directory=_FOLDER))

    @app.get("/v1/about", dependencies=guard, response_model=About, responses={401: _JPEG["responses"][401]})
    async def about() -> Response:
        """Says what the model is, and which photos there are to try."""
        return JSONResponse(dataclasses.asdict(pictures.about), headers={"Cache-Control": "no-store"})

    @app.get("/v1/neighbors/{row:int}/thumbnail", dependencies=guard, **_JPEG)
    async def thumbnail(row: int) -> Response:
        """Returns a small JPEG of a gallery photo; row: as a neighbor has it."""
        return _jpeg(pictures.thumbnail(row))

    @app.get("/v1/examples/{number:int}", dependencies=guard, **_JPEG)
    async def example(number: int) -> Response:
        """Returns a photo to try; number: its place in the list of /v1/about, from 0."""
        return _jpeg(pictures.example(number))


class _Files(StaticFiles):
    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_HEADERS)
        return response


def _jpeg(data: bytes | None) -> Response:
    if data is None:
        raise HTTPException(404)
    return Response(data, headers=_KEPT, media_type="image/jpeg")
