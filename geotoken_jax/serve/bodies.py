"""Reads photos from request bodies.

Bodies over the size limit are refused before they fill the memory. No body is written to disk.
"""

import asyncio
import base64
import contextlib
import io
import json
import math
import re
from typing import Any

import numpy as np
from fastapi import Request
from jaxtyping import UInt8
from PIL import Image
from python_multipart.multipart import FormParser, parse_options_header
from starlette.requests import ClientDisconnect

from geotoken_jax.backbone.preprocess import ImageError, open_header
from geotoken_jax.serve.limits import Refused

#: Accepted content types.
MULTIPART, JSON = "multipart/form-data", "application/json"
#: First bytes of a gzip file.
_GZIP = b"\x1f\x8b"
_COMPRESSED = "the body is compressed: send it without Content-Encoding, and not as gzip"


class Drain:
    """ASGI middleware that reads and discards the rest of a request body that the application did not read.

    Most clients send all of a body before they read the response. If the connection were closed earlier, they would see
    a reset connection instead of the refusal.
    """

    def __init__(self, app: Any, max_bytes: int, seconds: float):
        """max_bytes: largest number of bytes to discard. seconds: longest time to read them."""
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request to the application, and delays the end of the response until the body has been read."""
        headers = {name for name, _ in scope.get("headers", ())}
        # A client that sent "Expect: 100-continue" sends no body until the application calls `receive`.
        unread = bool(headers & {b"content-length", b"transfer-encoding"}) and b"expect" not in headers

        async def received() -> Any:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def discarded() -> None:
            left = self._max_bytes
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    while unread and left > 0:
                        left -= len((await received()).get("body", b""))

        async def sent(message: Any) -> None:
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif unread and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await discarded()
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, received, sent)


async def read(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Returns a request's body.

    max_bytes: largest body; reading stops at the first piece beyond it. seconds: time limit. Raises Refused if the body
    is larger, compressed, too slow or incomplete.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, _COMPRESSED)
    large = Refused(413, f"the request has more than {max_bytes:,} bytes: send fewer or smaller photos")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > max_bytes:
                    raise large
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {seconds:g} seconds: send it again") from None
    except ClientDisconnect:
        raise Refused(400, "the connection closed before the whole body arrived: send the request again") from None
    return bytes(body)


def photos(content_type: str, body: bytes, name: str, max_photos: int | None) -> list[bytes] | list[str]:
    """Returns the photos in a body: encoded image files from a form, or base64 strings from JSON.

    content_type: the header Content-Type. name: name of the form's parts, or key of the JSON object. max_photos:
    largest number of photos. If None, the body has one photo, and JSON has a string instead of a list. Raises Refused
    if the body has no photo, too many photos or contents other than photos, or if the content type is not supported.
    """
    if body.startswith(_GZIP):
        raise Refused(415, _COMPRESSED)
    mime, options = parse_options_header(content_type)
    if mime == MULTIPART.encode():
        items = _from_form(body, options.get(b"boundary", b""), name, max_photos or 1)
    elif mime == JSON.encode():
        items = _from_json(body, name, max_photos)
    else:
        raise Refused(415, f"the Content-Type is not supported: send {MULTIPART} or {JSON}")
    if not items:
        raise Refused(422, f"there is no photo: send at least one as {name!r}")
    return items


def _from_form(body: bytes, boundary: bytes, name: str, max_photos: int) -> list[bytes]:
    items: list[bytes] = []
    ended: list[bool] = []

    def add(part: Any, data: bytes | None) -> None:
        if part.field_name != name.encode():
            raise Refused(422, f"the form has a part with another name: name all parts {name!r}")
        if len(items) == max_photos:
            raise Refused(422, f"there are more photos than {max_photos}: send the others in another request")
        items.append(data or b"")

    parser = {
        "on_field": lambda part: add(part, part.value),
        "on_file": lambda part: add(part, part.file_object.getvalue()),
        "on_end": lambda: ended.append(True),
        "config": {
            "MAX_MEMORY_FILE_SIZE": math.inf
        },  # the body is in memory already; by default files over 1 MB go to disk
    }
    try:
        FormParser(MULTIPART, boundary=boundary, **parser).write(body)
    except Refused:
        raise
    except Exception:  # the parser also raises AssertionError
        ended.clear()
    if not ended:
        raise Refused(
            422, "the form is damaged or cut short: send it again with the boundary of its Content-Type header"
        )
    return items


def _from_json(body: bytes, name: str, max_photos: int | None) -> list[str]:
    expected = f'{{"{name}": {"BASE64" if max_photos is None else "[BASE64, ...]"}}}'
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, f"the body is not JSON: send {expected}") from None
    items: Any = value.get(name) if isinstance(value, dict) and len(value) == 1 else None
    if max_photos is None:
        items = [items]
    if not isinstance(items, list) or not all(isinstance(photo, str) for photo in items):
        raise Refused(422, f"the body has other keys or values: send {expected}")
    if len(items) > (max_photos or 1):
        raise Refused(422, f"there are more photos than {max_photos}: send the others in another request")
    return items


def decoded(photo: bytes | str | UInt8[np.ndarray, "h w 3"], max_pixels: int) -> bytes | UInt8[np.ndarray, "h w 3"]:
    """Returns a photo as the bytes of its image file. Pixels are returned unchanged.

    photo: bytes of an image file, a string with these bytes in base64, or pixels. max_pixels: largest number of pixels.
    The size is read from the file's header, before any pixel is decoded. Raises ImageError if the base64 is invalid or
    the photo is too large. Other faults of the file raise ImageError later, in `Model.prepare`.
    """
    if isinstance(photo, np.ndarray):
        if photo.size // 3 > max_pixels:
            raise _large(max_pixels)
        return photo
    if not isinstance(photo, bytes):
        if photo[:5].lower() == "data:":
            raise ImageError("the photo is a data: URL: send only the base64 after its comma")
        try:
            photo = base64.b64decode(photo, validate=True)
        except ValueError:
            raise ImageError(
                "the photo is not base64: send the file's contents as base64 without line breaks; URLs are not fetched"
            ) from None
    try:
        image = open_header(io.BytesIO(photo))
        pixels = math.prod(image.size) if image else 0
    except Image.DecompressionBombError:
        pixels = math.inf
    except Exception:  # `Model.prepare` reports a damaged file; Pillow can raise almost any exception
        pixels = 0
    if pixels > max_pixels:
        raise _large(max_pixels)
    return photo


def _large(max_pixels: int) -> ImageError:
    return ImageError(f"the photo has more than {max_pixels:,} pixels: make it smaller")


def sentence(error: ImageError) -> str:
    """Returns the message of an error, without the text in parentheses, as a sentence for the client.

    The text in parentheses is Pillow's own message, which may name objects of this process.
    """
    return re.sub(r" \(.*\)", "", str(error), flags=re.DOTALL).replace("the image given as bytes", "the photo")
