"""From a request's body to its photos: what is too much is refused before it is held, and nothing touches a disk."""

import asyncio
import base64
import io
import json
import math
import re
from typing import Any

from fastapi import Request
from PIL import Image
from python_multipart.multipart import FormParser, parse_options_header
from starlette.requests import ClientDisconnect

from geotoken_jax.backbone.preprocess import FORMATS, ImageError
from geotoken_jax.serve.limits import Refused

#: Kinds of body that are taken.
MULTIPART, JSON = "multipart/form-data", "application/json"
#: After a refusal whose body was left unread.
_CLOSE = {"Connection": "close"}


async def read(request: Request, most: int, seconds: float) -> bytes:
    """Returns a request's body. Raises Refused if it has more than `most` bytes, before more than those are held, or
    is not here in time."""
    large = Refused(413, f"the request has more than {most:,} bytes: send fewer or smaller photos", _CLOSE)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise large
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {seconds:g} seconds: send it again", _CLOSE) from None
    except ClientDisconnect:
        raise Refused(400, "the request ended before its body did") from None
    return bytes(body)


def photos(kind: str, body: bytes, name: str, most: int | None) -> list[bytes] | list[str]:
    """Returns the photos of a body, as `decoded` takes them.

    kind: the header Content-Type. name: of the form's parts, or of the JSON object's key, that photos are under.
    most: of them; None for one that is not in a list. Raises Refused if there is none, or the body is of another form.
    """
    mime, options = parse_options_header(kind)
    if mime == MULTIPART.encode():
        found = _of_form(body, options.get(b"boundary", b""), name, most or 1)
    elif mime == JSON.encode():
        found = _of_json(body, name, most)
    else:
        raise Refused(415, f"photos come as {MULTIPART} or {JSON}: set Content-Type to the one that it is")
    if not found:
        raise Refused(422, f"there is no photo: name at least one {name}")
    return found


def _of_form(body: bytes, boundary: bytes, name: str, most: int) -> list[bytes]:
    found: list[bytes] = []
    ended: list[bool] = []

    def add(part: Any, data: bytes | None) -> None:
        if part.field_name != name.encode():
            raise Refused(422, f"a part of the form has another name: name each {name}")
        if len(found) == most:
            raise Refused(422, f"there are more photos than {most}: send the others in another request")
        found.append(data or b"")

    parser = {
        "on_field": lambda part: add(part, part.value),
        "on_file": lambda part: add(part, part.file_object.getvalue()),
        "on_end": lambda: ended.append(True),
        "config": {"MAX_MEMORY_FILE_SIZE": math.inf},  # the body is in memory already; else a file of 1 MB is on disk
    }
    try:
        FormParser(MULTIPART, boundary=boundary, **parser).write(body)
    except Refused:
        raise
    except Exception:  # also what the parser asserts
        ended.clear()
    if not ended:
        raise Refused(422, "the form is damaged or cut short: send it again, with the boundary that its header names")
    return found


def _of_json(body: bytes, name: str, most: int | None) -> list[str]:
    form = f'{{"{name}": {"BASE64" if most is None else "[BASE64, ...]"}}}'
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, f"the body is not JSON: send {form}") from None
    found: Any = value.get(name) if isinstance(value, dict) and len(value) == 1 else None
    if most is None:
        found = [found]
    if not isinstance(found, list) or not all(isinstance(photo, str) for photo in found):
        raise Refused(422, f"the body has another form: send {form}")
    if len(found) > (most or 1):
        raise Refused(422, f"there are more photos than {most}: send the others in another request")
    return found


def decoded(photo: bytes | str, max_pixels: int) -> bytes:
    """Returns the encoded file of a photo: itself, if bytes, else of base64.

    Raises ImageError if it is not base64, or has more pixels by its header, before any of them is decoded. Whatever
    else may be wrong with the file is found by who decodes it.
    """
    if not isinstance(photo, bytes):
        try:
            photo = base64.b64decode(photo, validate=True)
        except ValueError:
            raise ImageError(
                "the photo is not base64: send the file itself, encoded without line breaks; no address is fetched"
            ) from None
    try:
        with Image.open(io.BytesIO(photo), formats=FORMATS) as image:
            pixels = math.prod(image.size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = math.inf
    except Exception:  # not an image, or a damaged header, of which Pillow may say nearly anything
        pixels = 0
    if pixels > max_pixels:
        raise ImageError(f"the photo has more than {max_pixels:,} pixels: make it smaller")
    return photo


def sentence(error: ImageError) -> str:
    """Returns what is wrong with a photo, without what Pillow says, which may name objects of this process."""
    return re.sub(r" \(.*\)", "", str(error), flags=re.DOTALL).replace("the image given as bytes", "the photo")
