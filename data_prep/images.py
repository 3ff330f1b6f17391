"""Checks that a photo's file can be decoded, and reads its coordinates and time from EXIF."""

import io
import math
from typing import Any

from PIL import ExifTags

from data_prep.csv_rows import seconds
from geotoken_jax.backbone import preprocess

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
_SIGNS = {"N": 1, "E": 1, "S": -1, "W": -1}


def drop_reason(image: bytes) -> str:
    """Returns the reason to drop an encoded image, empty if it can be decoded. A large JPEG is decoded at 1/8 size."""
    try:
        preprocess.open_image(image, min_side=1, whole=True)
    except preprocess.ImageError as error:
        return next(reason for words, reason in _REASONS.items() if words in str(error))
    return ""


def gps(image: bytes) -> tuple[float, float] | None:
    """Returns latitude and longitude in degrees from an image's EXIF, or None if EXIF has no valid position."""
    try:
        tags = _exif(image, ExifTags.IFD.GPSInfo)
        return (
            _degrees(tags[ExifTags.GPS.GPSLatitude], tags[ExifTags.GPS.GPSLatitudeRef], "NS"),
            _degrees(tags[ExifTags.GPS.GPSLongitude], tags[ExifTags.GPS.GPSLongitudeRef], "EW"),
        )
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return None


def captured(image: bytes) -> float:
    """Returns the time in an image's EXIF, in seconds since 1970: NaN if there is none, infinity if it is invalid.

    Most cameras write local time without an offset. Such a time is read as UTC: a correction by the time zone of the
    photo's place would reveal the place to a model.
    """
    try:
        tags = _exif(image, ExifTags.IFD.Exif)
        text, offset = (_text(tags.get(tag, "")) for tag in (_ORIGINAL, _OFFSET))
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return math.nan
    if not text.strip(": "):  # from a camera whose clock is not set
        return math.nan
    return seconds(text[:10].replace(":", "-") + text[10:19] + offset)


def _exif(image: bytes, part: ExifTags.IFD) -> dict[int, Any]:
    opened = preprocess.open_header(io.BytesIO(image))
    if opened is None:
        return {}
    with opened:
        return opened.getexif().get_ifd(part)


def _text(value: Any) -> str:
    return (value.decode() if isinstance(value, bytes) else str(value)).strip(" \0")


def _degrees(values: Any, reference: Any, allowed: str) -> float:
    """Returns a coordinate in degrees. Raises an error if it is invalid, such as 0/0 from a camera without a GPS fix.

    values: degrees, minutes and seconds; minutes and seconds may be missing. reference: letter of the direction, which
    must be one of the letters in `allowed`.
    """
    sign = _text(reference).upper()
    parts = [float(value) for value in values]
    if sign not in allowed or not 1 <= len(parts) <= 3 or not all(0 <= part < math.inf for part in parts):
        raise ValueError("no position")
    if any(part > 60 for part in parts[1:]):
        raise ValueError("minutes or seconds above 60")
    return _SIGNS[sign] * sum(part / 60**n for n, part in enumerate(parts))
