"""What every backbone needs before its first number: a photo as an RGB image, a place's names as a sentence."""

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import Image

from geotoken_jax.settings import SettingsError

#: Largest image taken in, read from its header: decoded it is 300 MB.
MAX_PIXELS = 100_000_000
MAX_SIDE = 30_000
#: Pillow's names of the formats taken in; its other readers are never reached.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
#: Endings of files that are taken for photos in a folder; a file that is named itself may have any.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

#: EXIF orientation -> the turn that sets the photo upright.
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


class ImageError(ValueError):
    """A photo cannot be read; the message says what is wrong, where, and what to do, in one sentence."""


def open_image(source: Any, min_side: int | None = None) -> Image.Image:
    """Returns a photo as an upright RGB image, decoded.

    source: a path, an encoded file's bytes, a PIL image, or a uint8 array [h, w, 3] or [h, w].
    min_side: shortest side, in pixels, that suffices; a larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its size.

    EXIF orientation is applied, alpha laid over white, 16-bit gray scaled to 8, the first frame of an animation taken.
    Raises ImageError if there is no such file, it is no image of FORMATS, it is damaged, or it is larger than
    MAX_PIXELS or MAX_SIDE: size is judged before any pixel is decoded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the image", min_side)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array", min_side)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), "the image given as bytes", min_side)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"a photo is a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")
    path = epath.Path(source)
    if not path.exists():
        raise ImageError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ImageError(f"{path} is a folder: name the photos in it")
    try:
        with path.open("rb") as file:
            return _read(file, str(path), min_side)
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror or error}): check its permissions") from error


def thumbnail(photo: Any, side: int, quality: int, min_side: int | None = None) -> bytes:
    """Returns a JPEG of a photo's pixels, at most `side` of them along either side, without EXIF and comments.

    photo, min_side: as `open_image` takes them. Raises ImageError.
    """
    image = open_image(photo, min_side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def place_text(city: str, state: str, country: str) -> str:
    """Returns the sentence that stands for a place, missing names dropped; empty if all are missing (G3's prompt)."""
    names = [name for name in (city, state, country) if name]
    return f"A street view photo taken in {', '.join(names)}" if names else ""


@dataclasses.dataclass(frozen=True)
class Processor:
    """A published image processor: a photo is resized, its center cut out, then rescaled and normalized.

    side: of what comes out, in pixels. shortest: of the resized photo's two sides; None: it is resized to `side` twice,
    whatever its shape. scale, mean, std: a pixel of 0 ... 255 times scale, less its channel's mean, over its deviation.
    """

    side: int
    shortest: int | None
    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], side: int) -> "Processor":
        """Returns the processor of a preprocessor_config.json; side: what the checkpoint is made for.

        Raises SettingsError if what comes out has another side.
        """
        size, crop = config.get("size", 224), config.get("crop_size", side)
        size, crop = (
            x if isinstance(x, Mapping) else {name: x} for x, name in ((size, "shortest_edge"), (crop, "height"))
        )
        crops = config.get("do_center_crop", "shortest_edge" in size)
        shortest = size.get("shortest_edge")
        cut = {crop["height"], crop.get("width", crop["height"])} if crops else {size.get("height"), size.get("width")}
        if cut != {side} or (shortest if crops else side) < side or not config.get("do_resize", True):
            raise SettingsError(
                f"preprocessor_config.json (size {dict(size)}, crop_size {dict(crop)}) does not make the "
                f"{side} x {side} pixels that config.json asks for: download both again"
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
        """Returns the part of an RGB image that is seen, resized."""
        width, height, side = *image.size, self.side
        wide, high = side, side  # of the whole image, resized
        if self.shortest:
            wide, high = (max(self.shortest, int(self.shortest * n / min(image.size))) for n in image.size)
        left, top = (wide - side) // 2, (high - side) // 2
        if wide * high <= MAX_PIXELS:
            whole = image.resize((wide, high), self.resample)
            return np.asarray(whole.crop((left, top, left + side, top + side)))
        # Resized in whole, as published, an image of 30,000 x 1 pixels takes 4.5 GB. The part alone is alike, not the
        # same: Pillow keeps its place in float32 and may take the axes in the other order.
        box = (left * width / wide, top * height / high, (left + side) * width / wide, (top + side) * height / high)
        return np.asarray(image.resize((side, side), self.resample, box=box))

    def normalize(self, pixels: UInt8[Any, "B h w 3"]) -> Float32[Any, "B h w 3"]:
        """Returns pixels as the tower takes them, numpy and jax alike: sent to a device as bytes they are a quarter."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) * self.scale - mean) / std


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise ImageError(
            f"an array photo is uint8 [h, w, 3] or [h, w], not {array.dtype} {list(array.shape)}: convert it"
        )
    return Image.fromarray(array)


def _read(file: IO[bytes], where: str, min_side: int | None) -> Image.Image:
    # Not Image.open: above 89 million pixels that warns, above 179 million it raises, through settings of the process.
    Image.init()
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{where} is empty (0 bytes): copy or download it again")
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            try:
                image = factory(file, "")
            except Image.DecompressionBombError as error:  # WebP's reader judges its size itself
                raise ImageError(f"{where} is too large ({error}): make it smaller") from error
            except Exception as error:  # a damaged header makes Pillow raise nearly anything
                raise _damaged(where, error) from error
            with image:
                return _decode(image, where, min_side)
    raise ImageError(f"{where} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image: convert it to JPEG")


def _decode(image: Image.Image, where: str, min_side: int | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels or a side of {MAX_SIDE:,}"
        raise ImageError(f"{where} is {width:,} x {height:,} pixels, more than {limit}: make it smaller")
    try:
        if min_side:
            image.draft(None, (min_side, min_side))
        image.load()
        turn = _UPRIGHT.get(_orientation(image))  # after load: Pillow turns a TIFF itself
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise _damaged(where, error) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing of the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit gray at 255
        gray = np.asarray(image).astype(np.float32) * (255 / 65535)
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _damaged(where: str, error: Exception) -> ImageError:
    return ImageError(f"{where} is damaged or cut short ({error}): copy or download it again")
