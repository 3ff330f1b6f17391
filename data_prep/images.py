"""Checks that a photo's file can be decoded, and reads its time from EXIF."""

import io
import math

from PIL import ExifTags

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
_ORIGINAL, _OFFSET = ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal


def drop_reason(image: bytes) -> str:
    """Returns the reason to drop an encoded image, empty if it can be decoded. A large JPEG is decoded at 1/8 size."""
    try:
        preprocess.open_image(image, min_side=1, whole=True)
    except preprocess.ImageError as error:
        return next(reason for words, reason in _REASONS.items() if words in str(error))
    return ""


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
