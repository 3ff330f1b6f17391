"""Checks that photos can be decoded, makes thumbnails of them, and reads their capture times from EXIF."""

import functools
import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from data_prep.csv_rows import seconds
from geotoken_jax.backbone import exif, preprocess

#: Size in bytes of the largest file that is read: 300 MB, the size of an uncompressed image of MAX_PIXELS pixels.
MAX_BYTES = 3 * preprocess.MAX_PIXELS
#: Words in the message of an ImageError -> reason for the drop.
_REASONS = {
    "is damaged": "damaged image",
    "is empty": "empty image",
    "is not a": "not an image",
    "is too large": "too large",
    "more than": "too large",
}
#: Height and width of a thumbnail, in pixels.
THUMBNAIL = (8, 9)
#: Smallest shorter side of a decoded photo, in pixels: six times the height of a thumbnail. A JPEG whose shorter side
#: has 384 pixels or more can then be decoded at 1/8 of its size, which is as fast as a check without a thumbnail.
_MIN_SIDE = 48
_ORIGINAL, _OFFSET = ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal


def drop_reason(image: bytes) -> str:
    """Returns the reason to drop an encoded image. The reason is empty if the image can be decoded."""
    return _decoded(image)[0]


def thumbnail(image: bytes) -> UInt8[np.ndarray, "8 9"] | None:
    """Returns a gray, upright thumbnail of an encoded image, or None if the image cannot be decoded."""
    return _decoded(image)[1]


@functools.lru_cache(maxsize=1)  # the search for placeholders, and then `prepare`, decode the same photo
def _decoded(image: bytes) -> tuple[str, np.ndarray | None]:
    """Returns the results of `drop_reason` and `thumbnail`, from one decoding of the image."""
    try:
        picture = preprocess.open_image(image, min_side=_MIN_SIDE, whole=True)
    except preprocess.ImageError as error:
        return next(reason for words, reason in _REASONS.items() if words in str(error)), None
    return "", np.asarray(picture.convert("L").resize((THUMBNAIL[1], THUMBNAIL[0]), Image.Resampling.BOX))


def captured(image: bytes) -> float:
    """Returns the capture time in an image's EXIF, in seconds since 1970. NaN if there is none, infinity if invalid.

    Most cameras write local time without an offset from UTC. Such a time is read as UTC. Correcting it by the time zone
    of the photo's place would reveal the place to a model.
    """
    try:
        tags = exif.tags(io.BytesIO(image), ExifTags.IFD.Exif)
        text, offset = (exif.text(tags.get(tag, "")) for tag in (_ORIGINAL, _OFFSET))
    except Exception:  # Pillow raises many types of errors for damaged EXIF
        return math.nan
    if not text.strip(": "):  # a camera whose clock is not set writes only spaces and colons
        return math.nan
    return seconds(text[:10].replace(":", "-") + text[10:19] + offset)
