"""What a photo's file says of itself: whether it can be decoded, and where and when it was taken."""

import io
import math
from typing import Any

from PIL import ExifTags, Image

from data_prep.csv_rows import seconds
from geotoken_jax.backbone import preprocess

#: Largest file that is read: no photo of MAX_PIXELS needs more than its pixels do (300 MB).
MAX_BYTES = 3 * preprocess.MAX_PIXELS
#: What ImageError says -> the reason that is counted.
_REASONS = {
    "is damaged": "damaged image",
    "is empty": "empty image",
    "is not a": "not an image",
    "is too large": "too large",
    "more than": "too large",
}
_ORIGINAL, _OFFSET = ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal
_SIGNS = {"N": 1, "E": 1, "S": -1, "W": -1}


def fault(image: bytes) -> str:
    """Returns why an encoded image cannot be taken in, or an empty string. It is decoded, a large JPEG at an eighth."""
    try:
        preprocess.open_image(image, min_side=1)
    except preprocess.ImageError as error:
        return next(reason for said, reason in _REASONS.items() if said in str(error))
    return ""


def gps(image: bytes) -> tuple[float, float] | None:
    """Returns latitude and longitude in degrees from an image's EXIF, or None where it has none that can be read."""
    try:
        tags = _exif(image, ExifTags.IFD.GPSInfo)
        return (
            _degrees(tags[ExifTags.GPS.GPSLatitude], tags[ExifTags.GPS.GPSLatitudeRef], "NS"),
            _degrees(tags[ExifTags.GPS.GPSLongitude], tags[ExifTags.GPS.GPSLongitudeRef], "EW"),
        )
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return None


def captured(image: bytes) -> float:
    """Returns when a photo was taken by its EXIF, as Photo.captured; NaN where it does not say, infinity for nonsense.

    A camera's clock without an offset, as most write it, is taken to be UTC: to make it UTC by the photo's place would
    tell a model the place.
    """
    try:
        tags = _exif(image, ExifTags.IFD.Exif)
        text, offset = (_text(tags.get(tag, "")) for tag in (_ORIGINAL, _OFFSET))
    except Exception:  # see gps
        return math.nan
    if not text.strip(": "):  # how a camera without a clock writes it
        return math.nan
    return seconds(text[:10].replace(":", "-") + text[10:19] + offset)


def _exif(image: bytes, part: ExifTags.IFD) -> dict[int, Any]:
    with Image.open(io.BytesIO(image), formats=preprocess.FORMATS) as opened:
        return opened.getexif().get_ifd(part)


def _text(value: Any) -> str:
    return (value.decode() if isinstance(value, bytes) else str(value)).strip(" \0")


def _degrees(values: Any, reference: Any, allowed: str) -> float:
    """values: degrees, minutes and seconds, the last may be missing; 0/0 is how a camera without a fix writes them."""
    sign = _text(reference).upper()
    parts = [float(value) for value in values]
    if sign not in allowed or not 1 <= len(parts) <= 3 or not all(0 <= part < math.inf for part in parts):
        raise ValueError("no position")
    if any(part > 60 for part in parts[1:]):
        raise ValueError("no sexagesimal number")
    return _SIGNS[sign] * sum(part / 60**n for n, part in enumerate(parts))
