"""Random augmented views of a photo. They imitate photos by other cameras, from other angles, at the same place."""

import dataclasses
import math

import numpy as np
from PIL import Image

#: Name of the split whose photos have views, and name of the split that contains these views.
SOURCE_SPLIT, VIEWS_SPLIT = "train", "train_views"
_TONES = np.linspace(0, 1, 256)


@dataclasses.dataclass(frozen=True)
class ViewsSettings:
    """Random views of training photos.

    count: number of views per photo, at least 0. seed: seed of all views. rotation: largest rotation in degrees, in
    both directions. crop: smallest share of each side that a view keeps, in (0, 1]. gamma: exposure; standard deviation
    of the logarithm of the exponent of pixel values. color: color cast; standard deviation of the logarithm of each
    channel's factor. flip: if true, a view is mirrored with probability 1/2.
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
            raise ValueError(f"count is {self.count}: choose 0 or more")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}: choose a share above 0 and at most 1")


def views(image: Image.Image, row: int, settings: ViewsSettings) -> list[Image.Image]:
    """Returns all views of a photo, seeded with settings.seed and row. row: index of the photo in its split."""
    return [view(image, np.random.default_rng((settings.seed, row, v)), settings) for v in range(settings.count)]


def view(image: Image.Image, rng: np.random.Generator, settings: ViewsSettings) -> Image.Image:
    """Returns a random view of an RGB image: a rotated crop with another exposure and color cast.

    The crop keeps the aspect ratio and the scale of the image. Outside the image, the crop shows the mirrored image.
    """
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    cropped = rng.uniform(settings.crop, 1.0) * np.array(image.size)  # width, height
    center = cropped / 2 + rng.uniform(size=2) * (image.size - cropped)
    mirrored = rng.uniform() < 0.5 and settings.flip
    gamma = math.exp(rng.normal(0, settings.gamma))
    color = np.exp(rng.normal(0, settings.color, 3))
    color /= color.max()  # the largest factor is 1, so no value is clipped

    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    reach = np.abs(turn) @ cropped / 2 + 1  # interpolation reads one more pixel
    first, last = np.floor(center - reach).astype(int), np.ceil(center + reach).astype(int)
    columns, rows = (_inside(np.arange(*ends), n) for *ends, n in zip(first, last, image.size, strict=True))
    patch = Image.fromarray(np.asarray(image).take(rows, 0).take(columns, 1))
    size = np.maximum(1, np.rint(cropped).astype(int))
    onto = turn * (cropped / size) * (-1 if mirrored else 1, 1)
    begin = center - first - onto @ (size / 2)
    matrix = np.column_stack([onto, begin]).ravel().tolist()
    # Bilinear takes 40 % of the time of bicubic. Thumbnail features of bilinear and bicubic views have a mean cosine of
    # 0.998. Thumbnail features of a view and of its photo have a mean cosine of 0.70.
    turned = patch.transform(tuple(size.tolist()), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    tones = np.outer(255 * color, _TONES**gamma)
    return turned.point(tones.ravel().tolist())  # point() rounds the tones


def _inside(positions: np.ndarray, n: int) -> np.ndarray:
    """Returns the pixel index, 0 to n - 1, at each position along a side of n pixels that is mirrored at both ends."""
    positions = positions % (2 * n)
    return np.minimum(positions, 2 * n - 1 - positions)
