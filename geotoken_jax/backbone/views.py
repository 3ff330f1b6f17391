"""Further views of a photo: what another camera, held otherwise, would have taken of the same place."""

import dataclasses
import math

import numpy as np
from PIL import Image

#: The split whose photos have views, and the split that their views make.
OF, SPLIT = "train", "train_views"
_TONES = np.linspace(0, 1, 256)


@dataclasses.dataclass(frozen=True)
class ViewsSettings:
    """count: of each photo that is trained on. seed: of all their draws.

    rotation: largest, in degrees, either way. crop: smallest share of both sides that is kept. gamma, color: standard
    deviations of the logarithms of the exponent (exposure), and of each channel's factor (cast). flip: every second
    view, by chance, is mirrored.
    """

    count: int
    seed: int
    rotation: float
    crop: float
    gamma: float
    color: float
    flip: bool

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"config.embed.views.count is {self.count}: it must be at least 0")
        if not 0 < self.crop <= 1:
            raise ValueError(f"config.embed.views.crop is {self.crop}: it must be above 0 and at most 1")


def views(image: Image.Image, row: int, settings: ViewsSettings) -> list[Image.Image]:
    """Returns all views of a photo; row: its number in its split, which with the seed decides what they are."""
    return [view(image, np.random.default_rng((settings.seed, row, v)), settings) for v in range(settings.count)]


def view(image: Image.Image, rng: np.random.Generator, settings: ViewsSettings) -> Image.Image:
    """Returns a turned crop of an RGB image, of the same shape and scale, in other light; it mirrors at the borders."""
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    kept = rng.uniform(settings.crop, 1.0) * np.array(image.size)  # width, height
    center = kept / 2 + rng.uniform(size=2) * (image.size - kept)
    mirrored = rng.uniform() < 0.5 and settings.flip
    gamma = math.exp(rng.normal(0, settings.gamma))
    color = np.exp(rng.normal(0, settings.color, 3))
    color /= color.max()  # a cast takes light away, so nothing is clipped

    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    reach = np.abs(turn) @ kept / 2 + 1  # interpolation reads a pixel further
    first, last = np.floor(center - reach).astype(int), np.ceil(center + reach).astype(int)
    columns, rows = (_inside(np.arange(*ends), n) for *ends, n in zip(first, last, image.size, strict=True))
    around = Image.fromarray(np.asarray(image).take(rows, 0).take(columns, 1))
    size = np.maximum(1, np.rint(kept).astype(int))
    onto = turn * (kept / size) * (-1 if mirrored else 1, 1)
    begin = center - first - onto @ (size / 2)
    matrix = np.column_stack([onto, begin]).ravel().tolist()
    # Bilinear takes 40 % of bicubic's time; their thumbnails have a mean cosine of 0.998, those of view and photo 0.70.
    turned = around.transform(tuple(size.tolist()), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    tones = np.outer(255 * color, _TONES**gamma)
    return turned.point(tones.ravel().tolist())  # which rounds them


def _inside(places: np.ndarray, n: int) -> np.ndarray:
    """Returns the pixels that are seen at places on and off a side of n pixels, which mirrors at either end."""
    places = places % (2 * n)
    return np.minimum(places, 2 * n - 1 - places)
