"""Fuzzes the way of a photo, from a request's body to what the model takes, led by the coverage of our own code.

python -m tests.tools.fuzz_bodies CORPUS [libFuzzer's options]; seeds are added to CORPUS. Anything but a refusal or an
ImageError is a fault, and so is a sentence of more than one line or with a name of this machine. Needs atheris.
"""

import base64
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["geotoken_jax.serve", "geotoken_jax.backbone", "python_multipart", "PIL"]):
    from PIL import Image

    Image.init()  # imports its readers
    from geotoken_jax.backbone.preprocess import ImageError
    from geotoken_jax.backbone.thumbnail import Thumbnail, ThumbnailSettings
    from geotoken_jax.serve import bodies, limits

KINDS = ("multipart/form-data; boundary=b", "application/json", "")  # of nothing: the body is a photo itself
SAID = re.compile(r"0x|<|\n|Traceback|\.py|/(home|root|tmp|usr|work)")
MAX_PIXELS = 1_000_000
prepare = Thumbnail(ThumbnailSettings(4)).prepare


def one(data: bytes) -> None:
    """Takes a body as the service does; the first byte says of which kind it is."""
    kind, body = KINDS[data[0] % len(KINDS)] if data else "", data[1:]
    for name, most in (("photo", None), ("photos", 3)):
        try:
            found = bodies.photos(kind, body, name, most) if kind else [body]
        except limits.Refused as refused:
            assert refused.status == 422 and not SAID.search(str(refused)), refused
            continue
        assert 0 < len(found) <= (most or 1)
        for photo in found:
            try:
                prepared = prepare(bodies.decoded(photo, MAX_PIXELS))
            except ImageError as error:
                assert not SAID.search(bodies.sentence(error)), error
            else:
                assert prepared.shape == (4, 4, 3) and prepared.dtype == np.uint8


def seeds() -> Iterator[bytes]:
    """Yields small bodies of every kind, with photos of every format and of the modes that differ."""
    photos = list(images())
    for photo in photos:
        yield b"\x02" + photo
    part = 'Content-Disposition: form-data; name="{}"; filename="x"\r\nContent-Type: image/jpeg\r\n\r\n'
    for name, sent in (("photo", photos[:1]), ("photos", photos[:2])):
        parts = b"".join(b"--b\r\n" + part.format(name).encode() + photo + b"\r\n" for photo in sent)
        yield b"\x00" + parts + b"--b--\r\n"
        listed = [base64.b64encode(photo).decode() for photo in sent]
        yield b"\x01" + json.dumps({name: listed if name == "photos" else listed[0]}).encode()


def images() -> Iterator[bytes]:
    """Yields encoded files of a few pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    colors = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    gray16 = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1000)
    palette = colors.quantize(8)
    frames: dict[str, Any] = {"save_all": True, "append_images": [colors.transpose(Image.Transpose.ROTATE_180)]}
    for image, kind, options in (
        (colors, "JPEG", {"exif": turned}),
        (colors, "JPEG", {"progressive": True, "icc_profile": bytes(range(200))}),
        (colors.convert("CMYK"), "JPEG", {}),
        (colors, "PNG", {"exif": turned}),
        (colors.convert("RGBA"), "PNG", {}),
        (gray16, "PNG", {}),
        (palette, "PNG", {"transparency": 3}),
        (colors, "PNG", frames),
        (colors, "WEBP", {"lossless": True}),
        (colors, "WEBP", frames),
        (palette, "GIF", frames),
        (colors, "BMP", {}),
        (palette, "BMP", {}),
        (colors, "TIFF", {"compression": "tiff_lzw", "exif": turned}),
        (gray16, "TIFF", {}),
        (colors.convert("CMYK"), "TIFF", {"compression": "tiff_deflate"}),
        (colors.convert("F"), "TIFF", {}),
        (colors.convert("1"), "TIFF", {"compression": "group4"}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()


def main() -> None:
    """Fuzzes until libFuzzer ends the process."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    corpus = Path(sys.argv[1])
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number:02d}").write_bytes(seed)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
