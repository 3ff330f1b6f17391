"""What a photo's file says of itself: whether it can be decoded, and where it was taken."""

import io
import math
from typing import Any

from PIL import ExifTags, Image

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
        with Image.open(io.BytesIO(image), formats=preprocess.FORMATS) as opened:
            tags = opened.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        return (
            _degrees(tags[ExifTags.GPS.GPSLatitude], tags[ExifTags.GPS.GPSLatitudeRef], "NS"),
            _degrees(tags[ExifTags.GPS.GPSLongitude], tags[ExifTags.GPS.GPSLongitudeRef], "EW"),
        )
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return None


def _degrees(values: Any, reference: Any, allowed: str) -> float:
    """values: degrees, minutes and seconds, the last may be missing; 0/0 is how a camera without a fix writes them."""
    sign = reference.decode() if isinstance(reference, bytes) else reference
    sign = sign.strip(" \0").upper()
    parts = [float(value) for value in values]
    if sign not in allowed or not 1 <= len(parts) <= 3 or not all(0 <= part < math.inf for part in parts):
        raise ValueError("no position")
    if any(part > 60 for part in parts[1:]):
        raise ValueError("no sexagesimal number")
    return _SIGNS[sign] * sum(part / 60**n for n, part in enumerate(parts))
