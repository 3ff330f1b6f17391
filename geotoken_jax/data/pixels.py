"""Reads photos as pixels, for alignment from pixels: decodes them, optionally makes random views, and prepares them for
an image tower."""

import concurrent.futures
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from geotoken_jax.backbone.preprocess import open_image
from geotoken_jax.backbone.views import ViewsSettings, view
from geotoken_jax.data.join import Features
from geotoken_jax.records import Photos


class Preparing(Protocol):
    """The part of backbone.Backbone that prepares photos."""

    min_side: int

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]: ...


class Pixels:
    """Reads features/, with pixels from photos/ as `image` [b, h, w, 3] uint8. The other arrays are as in Features.

    features, photos: readers in which a row number stands for the same photo. tower: backbone that prepares the photos.
    threads: number of threads that decode. views: settings of the random views that replace the photos in training; if
    None, training reads the photos themselves. seed: random seed of the views. A view depends only on its photo, the
    seed and the example's index in training.
    """

    def __init__(
        self, features: Features, photos: Photos, tower: Preparing, threads: int, views: ViewsSettings | None, seed: int
    ):
        self._features, self._photos, self._tower = features, photos, tower
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._views, self._seed = views, seed

    def __len__(self) -> int:
        return len(self._features)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._read(self._photo, rows)

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows with a random view of each photo, or with the photos themselves if `views` is None."""
        return self._read(self._view, rows, examples) if self._views else self(rows)

    def _read(self, image: Callable[..., np.ndarray], rows: np.ndarray, *examples: np.ndarray) -> dict[str, np.ndarray]:
        return {**self._features(rows), "image": np.stack(list(self._pool.map(image, rows, *examples)))}

    def _photo(self, row: int) -> np.ndarray:
        return self._tower.prepare(self._photos[row]["image"])

    def _view(self, row: int, example: int) -> np.ndarray:
        assert self._views, "views need settings"
        image = open_image(self._photos[row]["image"], math.ceil(self._tower.min_side / self._views.crop))
        return self._tower.prepare(view(image, np.random.default_rng((self._seed, example)), self._views))
