"""Writes XMP sidecars: small files beside photos, from which photo programs read coordinates.

The sidecar of IMG_1.JPG is IMG_1.JPG.xmp. darktable, digiKam, Immich and PhotoPrism read files with such names.
Lightroom reads only sidecars of raw files.
"""

import collections
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from geotoken_jax import __version__
from geotoken_jax.backbone import exif, preprocess
from geotoken_jax.folder.walk import SIDECAR

_NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "exif": "http://ns.adobe.com/exif/1.0/",
}
for _prefix, _uri in _NAMESPACES.items():
    ElementTree.register_namespace(_prefix, _uri)
#: XML attribute with the name of the program that wrote a sidecar, and the name that this module writes. A program that
#: changes the sidecar replaces this name with its own.
_TOOLKIT_ATTRIBUTE, _TOOLKIT_NAME = f"{{{_NAMESPACES['x']}}}xmptk", "geotoken-jax"
#: Steps per minute of arc: minutes are written with 4 decimals. The error is at most 9 cm.
_STEPS = 10_000
_WRITTEN, _UNCHANGED, _REMOVED = "written", "as they were", "removed, since their photos have no answer now"
_UNKNOWN, _PLACED = "not needed: the answer is unknown", "not needed: the photo has a position of its own"
_FOREIGN = "left alone, since another program wrote or changed them"


class Sidecars:
    """Writes a sidecar for each photo that has an answer and has no coordinates in its file. Counts the results.

    Photos are never changed. A sidecar is replaced only if this class wrote it and no other program has changed it.
    """

    def __init__(self, dry_run: bool):
        """dry_run: if True, no file is written or removed."""
        self._dry_run = dry_run
        self._counts: collections.Counter[str] = collections.Counter()
        #: Sidecars that could not be written, as path and reason.
        self.failed: list[str] = []

    def add(self, photo: Any, answer: Mapping[str, Any]) -> str | None:
        """Writes a photo's sidecar and returns its path. Returns None if no sidecar is written.

        No sidecar is written if the answer is unknown or if the photo's file has coordinates. A sidecar that this class
        wrote before is then removed.

        photo: path of the photo, or bytes of standard input, for which no sidecar is written. answer: see
        outputs.Answer.
        """
        if isinstance(photo, bytes):
            return None
        path = Path(os.fspath(photo) + SIDECAR)
        try:
            result = self._put(path, Path(photo), answer)
        except OSError as error:
            self.failed.append(f"{path} cannot be written ({error.strerror}): check the permissions of its folder")
            return None
        self._counts[result] += 1
        return str(path) if result == _WRITTEN else None

    def _put(self, path: Path, photo: Path, answer: Mapping[str, Any]) -> str:
        there = os.path.lexists(path)
        if there and not _written_here(path):
            return _FOREIGN
        with photo.open("rb") as file:
            result = _UNKNOWN if answer.get("unknown") else _PLACED if _has_position(file) else _WRITTEN
        if result == _WRITTEN:
            data = sidecar(answer)
            if there and path.read_bytes() == data:
                return _UNCHANGED
            if not self._dry_run:
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(data)
                temporary.replace(path)
        elif there:
            if not self._dry_run:
                path.unlink()
            return _REMOVED
        return result

    def notes(self) -> Iterator[str]:
        """Yields a sentence with the number of sidecars per result, and one per sidecar that could not be written."""
        counts = ", ".join(f"{count:,} {result}" for result, count in self._counts.most_common())
        yield f"{'sidecars without --dry-run' if self._dry_run else 'sidecars'}: {counts or 'none'}"
        yield from self.failed


def sidecar(answer: Mapping[str, Any]) -> bytes:
    """Returns an answer as XMP: coordinates, and the 90 % radius as their error in meters."""
    values = {
        "GPSVersionID": "2.3.0.0",
        "GPSLatitude": _angle(answer["latitude"], "NS"),
        "GPSLongitude": _angle(answer["longitude"], "EW"),
        "GPSMapDatum": "WGS-84",
        "GPSProcessingMethod": f"estimated from the picture by {_TOOLKIT_NAME}",
    }
    if "radius_90_km" in answer:
        values["GPSHPositioningError"] = f"{max(1, round(1000 * answer['radius_90_km']))}/1"
    x, rdf, names = (f"{{{uri}}}" for uri in _NAMESPACES.values())
    root = ElementTree.Element(f"{x}xmpmeta", {_TOOLKIT_ATTRIBUTE: f"{_TOOLKIT_NAME} {__version__}"})
    described = ElementTree.SubElement(
        ElementTree.SubElement(root, f"{rdf}RDF"), f"{rdf}Description", {f"{rdf}about": ""}
    )
    for name, value in values.items():
        ElementTree.SubElement(described, names + name).text = value
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8", xml_declaration=True) + b"\n"


def _angle(degrees: float, letters: str) -> str:
    """Returns an angle in XMP's form, e.g. 48,51.5000N.

    letters: two letters, the first for positive angles and the second for negative angles.
    """
    whole, steps = divmod(round(abs(degrees) * 60 * _STEPS), 60 * _STEPS)
    return f"{whole},{steps / _STEPS:.4f}{letters[degrees < 0]}"


def _written_here(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return ElementTree.parse(path).getroot().get(_TOOLKIT_ATTRIBUTE, "").startswith(_TOOLKIT_NAME)
    except (ElementTree.ParseError, ValueError, LookupError):  # an unknown encoding raises one of the last two
        return False


def _has_position(file: IO[bytes]) -> bool:
    """Returns whether the EXIF or XMP data in an image file has coordinates."""
    if exif.gps(file) is not None:
        return True
    file.seek(0)
    try:
        image = preprocess.open_header(file)
        return image is not None and b"GPSLatitude" in image.info.get("xmp", b"")
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return False
