"""Decodes a photo's file once, for a check and for a thumbnail, and reads its time from EXIF."""

import functools
import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from data_prep.csv_rows import seconds
from geotoken_jax.backbone import exif, preprocess

#: Bytes of the largest file that is read: 300 MB, the size of MAX_PIXELS pixels without compression.
MAX_BYTES = 3 * preprocess.MAX_PIXELS
#: Words in the message of an ImageError -> reason under which the drop is counted.
_REASONS = {
    "is damaged": "damaged image",
    "is empty": "empty image",
    "is not a": "not an image",
    "is too large": "too large",
    "more than": "too large",
}
#: Rows and columns of a thumbnail.
THUMBNAIL = (8, 9)
#: Shorter side in pixels that is decoded at least: six pixels per row of the thumbnail. A JPEG whose shorter side is
#: 384 pixels or more is then decoded at 1/8 of its size, as fast as without a thumbnail.
_MIN_SIDE = 48
_ORIGINAL, _OFFSET = ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal


def drop_reason(image: bytes) -> str:
    """Returns the reason to drop an encoded image, empty if it can be decoded."""
    return _decoded(image)[0]


def thumbnail(image: bytes) -> UInt8[np.ndarray, "8 9"] | None:
    """Returns the upright picture of an encoded image as a gray thumbnail, or None if it cannot be decoded."""
    return _decoded(image)[1]


@functools.lru_cache(maxsize=1)  # a source that looks for placeholders and `prepare` ask for the same photo
def _decoded(image: bytes) -> tuple[str, np.ndarray | None]:
    """Returns the reason to drop an encoded image and its thumbnail."""
    try:
        picture = preprocess.open_image(image, min_side=_MIN_SIDE, whole=True)
    except preprocess.ImageError as error:
        return next(reason for words, reason in _REASONS.items() if words in str(error)), None
    return "", np.asarray(picture.convert("L").resize((THUMBNAIL[1], THUMBNAIL[0]), Image.Resampling.BOX))


def captured(image: bytes) -> float:
    """Returns the time in an image's EXIF, in seconds since 1970: NaN if there is none, infinity if it is invalid.

    Most cameras write local time without an offset. Such a time is read as UTC: a correction by the time zone of the
    photo's place would reveal the place to a model.
    """
    try:
        tags = exif.tags(io.BytesIO(image), ExifTags.IFD.Exif)
        text, offset = (exif.text(tags.get(tag, "")) for tag in (_ORIGINAL, _OFFSET))
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return math.nan
    if not text.strip(": "):  # from a camera whose clock is not set
        return math.nan
    return seconds(text[:10].replace(":", "-") + text[10:19] + offset)
