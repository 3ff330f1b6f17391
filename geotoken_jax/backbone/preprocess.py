"""Prepares the input of all backbones: decodes, resizes and normalizes photos, and writes place names as texts.

`geotoken export` copies this file beside standalone.py, where it needs numpy and Pillow alone.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8
try:
    from etils import epath

    from geotoken_jax.errors import UserError  # pyright: ignore[reportAssignmentType]
    from geotoken_jax.settings import SettingsError
except ImportError:  # beside standalone.py
    epath, SettingsError = pathlib, ValueError  # pyright: ignore[reportAssignmentType]

    class UserError(Exception):
        """Something that a user can mend."""


#: Largest image that is decoded: number of pixels (300 MB as RGB), and pixels on its longer side.
MAX_PIXELS = 100_000_000
MAX_SIDE = 30_000
#: Accepted formats, by Pillow's names. Pillow's other readers are never called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")
#: Endings of the files in a folder that are read as photos. A file that the user names can have any ending.
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif",
    ".hif", ".avif",
)  # fmt: skip
#: Values that can stand for white in gray images that are not 8-bit. A 12-bit camera writes 0 ... 4095 into 16 bits.
_FULL_SCALE = (1, 255, 1023, 4095, 16_383, 65_535, 2**32 - 1)
#: Largest share of a JPEG's rows that may be missing at its end.
_MISSING_ROWS = 0.1

#: EXIF orientation -> transposition that turns the photo upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class ImageError(UserError, ValueError):
    """A photo cannot be read. The message is one sentence: the photo, the fault and the remedy."""


def open_image(source: Any, min_side: int | None = None, whole: bool = False) -> Image.Image:
    """Returns a photo decoded as an upright RGB image.

    EXIF orientation is applied. Transparent images are composited over white. If the file is an animation, the first
    frame is returned. Gray values that are float or have more than 8 bits are scaled to 0 ... 255. White is the
    smallest of 1 (float only), 255, 1023, 4095, 16383, 65535 and 2^32 - 1 that is not below the largest value.

    source: path, bytes of an encoded file, PIL image, or uint8 array [h, w, 3] or [h, w]. A PIL image is not changed.
    min_side: smallest shorter side, in pixels, that the caller needs. A larger JPEG may be decoded at 1/2, 1/4 or 1/8
    of its size, if its shorter side still has min_side pixels. If None, photos are decoded in full size.
    whole: if True, a JPEG that lacks rows at its end is an error. If False, up to a tenth of the rows may be missing;
    they are gray, and a warning is logged.

    Raises ImageError if the source has another type, if the file is missing, is damaged or has none of FORMATS, or if
    the image is larger than MAX_PIXELS or MAX_SIDE. The size is checked before any pixel is decoded.
    """
    if isinstance(source, Image.Image):
        encoded = _unread_bytes(source)
        if encoded is not None:
            return open_image(encoded, min_side, whole)
        _check_size(source, "the image")
        return _decode(_copied(source), "the image")
    if isinstance(source, np.ndarray):
        image = _from_array(source)
        _check_size(image, "the array")
        return _decode(image, "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), "the image given as bytes", min_side, whole)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"a photo is a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}: convert it"
        )
    path = epath.Path(source)
    if not path.exists():
        raise ImageError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ImageError(f"{path} is a folder: give the path of a photo in it")
    try:
        with path.open("rb") as file:
            # A pipe, such as /dev/stdin, cannot be read from its start again.
            return _read(file if file.seekable() else io.BytesIO(file.read()), str(path), min_side, whole)
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror or error}): check its permissions") from error


def prepare(photo: Any, how: Mapping[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a photo decoded, resized and cropped for a backbone.

    photo: see `open_image`. how: Backbone.preparation. If its `kind` is "square", the result is the central square,
    resized to `side` pixels; the photo may be decoded at the shorter side `min_side`. If it is "processor", the other
    keys are the fields of Processor. Raises ImageError.
    """
    if how["kind"] == "processor":
        return Processor(**{key: value for key, value in how.items() if key != "kind"}).fit(open_image(photo))
    image, size = open_image(photo, how["min_side"]), how["side"]
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def thumbnail(photo: Any, side: int, quality: int, min_side: int | None = None) -> bytes:
    """Returns a photo as the bytes of a JPEG file whose longer side is at most `side` pixels.

    The file has no EXIF data and no comments. photo, min_side: arguments source and min_side of `open_image`. quality:
    JPEG quality. Raises ImageError if the photo cannot be read.
    """
    image = open_image(photo, min_side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def place_text(city: str, state: str, country: str) -> str:
    """Returns the text for a place, e.g. "A street view photo taken in Lyon, France", as in the paper G3.

    Empty names are left out. The text is empty if all names are empty.
    """
    names = [name for name in (city, state, country) if name]
    return f"A street view photo taken in {', '.join(names)}" if names else ""


@dataclasses.dataclass(frozen=True)
class Processor:
    """A published image processor: it resizes a photo, crops its center, and normalizes pixels.

    side: side of the square result, in pixels. shortest: shorter side of the resized photo before it is cropped, in
    pixels; if None, the photo is resized to side x side without cropping, and its aspect ratio changes. resample:
    Pillow's filter for resizing. scale, mean, std: constants of normalization. A value v from 0 to 255 becomes
    (v * scale - mean) / std, with mean and std per channel.
    """

    side: int
    shortest: int | None
    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {**dataclasses.asdict(self), "resample": int(self.resample)}

    @classmethod
    def read(cls, config: Mapping[str, Any], side: int) -> Processor:
        """Returns the processor that a preprocessor_config.json describes.

        config: contents of the file. side: side of the square images that the checkpoint's tower reads, in pixels.
        Raises SettingsError if the processor's results are not side x side pixels.
        """
        size, crop = config.get("size", 224), config.get("crop_size", side)
        size, crop = (
            x if isinstance(x, Mapping) else {name: x} for x, name in ((size, "shortest_edge"), (crop, "height"))
        )
        crops = config.get("do_center_crop", "shortest_edge" in size)
        shortest = size.get("shortest_edge")
        cut = {crop["height"], crop.get("width", crop["height"])} if crops else {size.get("height"), size.get("width")}
        # Without a shorter side, the processor resizes to height x width, even if it crops afterwards.
        fits = shortest >= side if shortest else {size.get("height"), size.get("width")} == {side}
        if cut != {side} or not fits or not config.get("do_resize", True):
            raise SettingsError(
                f"the image processor in config.embed.huggingface.path (size {dict(size)}, crop_size {dict(crop)}) "
                f"does not make the {side} x {side} pixels that config.json asks for: download the folder again"
            )
        normalizes = config.get("do_normalize", True)
        return cls(
            side=side,
            shortest=shortest,
            resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
            scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config["image_mean"]) if normalizes else (0.0,) * 3,
            std=tuple(config["image_std"]) if normalizes else (1.0,) * 3,
        )

    def fit(self, image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
        """Returns an RGB image resized and cropped to side x side pixels."""
        width, height, side = *image.size, self.side
        wide, high = side, side  # size of the whole image after resizing
        if self.shortest:
            wide, high = (max(self.shortest, int(self.shortest * n / min(image.size))) for n in image.size)
        left, top = (wide - side) // 2, (high - side) // 2
        if wide * high <= MAX_PIXELS:
            whole = image.resize((wide, high), Image.Resampling(self.resample))
            return np.asarray(whole.crop((left, top, left + side, top + side)))
        # The published processor resizes the whole image, which takes 4.5 GB for an image of 30,000 x 1 pixels. Here
        # only the crop is resized. Its pixels differ slightly, because Pillow stores the box in float32 and may resize
        # the two axes in the other order.
        box = (left * width / wide, top * height / high, (left + side) * width / wide, (top + side) * height / high)
        return np.asarray(image.resize((side, side), Image.Resampling(self.resample), box=box))

    def normalize(self, pixels: UInt8[Any, "B h w 3"]) -> Float32[Any, "B h w 3"]:
        """Returns normalized pixels.

        Call it on the device, because uint8 pixels have a quarter of the bytes of float32 pixels to transfer. pixels:
        numpy or jax array.
        """
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) * self.scale - mean) / std


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise ImageError(
            f"an array photo is uint8 [h, w, 3] or [h, w], not {array.dtype} {list(array.shape)}: convert it"
        )
    return Image.fromarray(array)


def open_header(file: IO[bytes]) -> Image.Image | None:
    """Reads the header of an image file and no pixels. Returns None if the file has none of FORMATS.

    If the header is damaged, Pillow can raise almost any exception.
    """
    # Image.open is not used: it warns above 89 million pixels and raises above 179 million. These limits are global.
    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = (_heif_image, _is_heif) if name == "HEIF" else Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            return factory(file, "")
    return None


def _heif_image(file: IO[bytes], name: str) -> Image.Image:
    # The reader is not registered with Pillow, because that would change Pillow's formats for all code in the process.
    import pillow_heif

    return pillow_heif.HeifImageFile(file, name)


def _is_heif(prefix: bytes) -> bool:
    return prefix[4:8] == b"ftyp" and prefix[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc")


def _read(file: IO[bytes], where: str, min_side: int | None, whole: bool) -> Image.Image:
    if not file.read(1):
        raise ImageError(f"{where} is empty (0 bytes): copy or download it again")
    file.seek(0)
    try:
        image = open_header(file)
    except Image.DecompressionBombError as error:  # the WebP reader checks the size itself
        raise ImageError(f"{where} is too large ({error}): make it smaller") from error
    except ModuleNotFoundError as error:
        raise ImageError(
            f"{where} is a HEIF photo, which needs pillow-heif: `pip install pillow-heif`, or convert it to JPEG"
        ) from error
    except Exception as error:
        repaired = _without_png_texts(file)
        if repaired is None:
            raise _damaged(where, error) from error
        return _read(repaired, where, min_side, whole)
    if image is None:
        raise ImageError(f"{where} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image: convert it to JPEG")
    with image:
        _check_size(image, where)
        try:
            return _decode(image, where, min_side)
        except ImageError:
            repaired = None if whole else _with_jpeg_end(file)
            if repaired is None:
                raise
    return _complete(_decode(repaired, where, min_side), where)


def _without_png_texts(file: IO[bytes]) -> IO[bytes] | None:
    """Returns a PNG file without its texts, or None if it has none. Pillow refuses long texts, e.g. 2 MB of XMP."""
    file.seek(0)
    data = file.read()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[at:end])
        at = end
    repaired = b"".join(kept)
    return io.BytesIO(repaired) if len(repaired) < len(data) else None


def _with_jpeg_end(file: IO[bytes]) -> Image.Image | None:
    """Returns a JPEG with an end marker added, or None if the file is not a JPEG.

    If the end marker is there, libjpeg fills missing rows with gray.
    """
    file.seek(0)
    data = file.read()
    return open_header(io.BytesIO(data + b"\xff\xd9")) if data.startswith(b"\xff\xd8") else None


def _complete(image: Image.Image, where: str) -> Image.Image:
    """Returns the image and logs a warning that rows are missing. Raises ImageError if too many rows are missing."""
    pixels = np.asarray(image)
    varied = np.flatnonzero((pixels != pixels[-1, -1]).any((1, 2)))
    missing = 1 - (varied[-1] + 1) / len(pixels) if len(varied) else 1.0
    if missing > _MISSING_ROWS:
        raise ImageError(f"{where} is damaged or cut short (it lacks {missing:.0%} of its rows): copy it again")
    logging.getLogger(__name__).warning("%s lacks its last bytes; the rest is used: copy it again", where)
    return image


def _unread_bytes(image: Image.Image) -> bytes | None:
    """Returns the bytes of the file of a PIL image if it is not decoded yet and is at its first frame, else None.

    The caller decodes the image from these bytes. The pixels are the same as if the image were given by its path.
    """
    file = getattr(image, "fp", None)
    if not getattr(image, "tile", None) or file is None or file.closed or not file.seekable() or image.tell():
        return None
    position = file.tell()
    file.seek(0)
    try:
        return file.read()
    finally:
        file.seek(position)


def _copied(image: Image.Image) -> Image.Image:
    """Returns a copy of an image. Raises ImageError if the image is closed or damaged."""
    try:
        return image.copy()
    except Exception as error:
        closed = getattr(image, "fp", True) is None or "closed" in str(error)
        if closed:
            raise ImageError("the image is closed: pass it before it is closed, or pass its path") from error
        raise _damaged("the image", error) from error


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels or a side of {MAX_SIDE:,}"
        raise ImageError(f"{where} is {width:,} x {height:,} pixels, more than {limit}: make it smaller")


def _decode(image: Image.Image, where: str, min_side: int | None = None) -> Image.Image:
    try:
        if min_side:
            image.draft(None, (min_side, min_side))
        image.load()
        turn = _UPRIGHT.get(_orientation(image))  # read after load(), because load() turns a TIFF upright itself
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise _damaged(where, error) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels can be intact even if EXIF is damaged
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's convert would clip values at 255
        gray = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = gray.max()
        full = next((scale for scale in _FULL_SCALE[0 if image.mode == "F" else 1 :] if top <= scale), top)
        image = Image.fromarray((gray * (255 / full)).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _damaged(where: str, error: Exception) -> ImageError:
    return ImageError(f"{where} is damaged or cut short ({error}): copy or download it again")
