"""Reads coordinates and other tags from the EXIF data of image files."""

import math
from typing import IO, Any

from PIL import ExifTags

from geotoken_jax.backbone import preprocess

_SIGNS = {"N": 1, "E": 1, "S": -1, "W": -1}


def tags(file: IO[bytes], part: ExifTags.IFD) -> dict[int, Any]:
    """Returns the tags in one part of an image file's EXIF data, or no tags if the file is not an image.

    If the file's header is damaged, Pillow can raise almost any exception.
    """
    opened = preprocess.open_header(file)
    if opened is None:
        return {}
    with opened:
        return opened.getexif().get_ifd(part)


def text(value: Any) -> str:
    """Returns the value of a tag as text."""
    return (value.decode() if isinstance(value, bytes) else str(value)).strip(" \0")


def gps(file: IO[bytes]) -> tuple[float, float] | None:
    """Returns latitude and longitude in degrees from an image file's EXIF data, or None if it has no valid position."""
    try:
        found = tags(file, ExifTags.IFD.GPSInfo)
        return (
            _degrees(found[ExifTags.GPS.GPSLatitude], found[ExifTags.GPS.GPSLatitudeRef], "NS"),
            _degrees(found[ExifTags.GPS.GPSLongitude], found[ExifTags.GPS.GPSLongitudeRef], "EW"),
        )
    except Exception:  # `tags` can raise almost any exception
        return None


def _degrees(values: Any, reference: Any, allowed: str) -> float:
    """Returns a coordinate in degrees. Raises an error if it is invalid, e.g. 0/0 from a camera without a GPS fix.

    values: degrees, minutes and seconds; minutes and seconds may be missing. reference: letter of the direction, e.g.
    "N". allowed: valid letters.
    """
    sign = text(reference).upper()
    parts = [float(value) for value in values]
    if sign not in allowed or not 1 <= len(parts) <= 3 or not all(0 <= part < math.inf for part in parts):
        raise ValueError("no position")
    if any(part > 60 for part in parts[1:]):
        raise ValueError("minutes or seconds above 60")
    return _SIGNS[sign] * sum(part / 60**n for n, part in enumerate(parts))
