"""Photos as alignment from pixels reads them: decoded, turned into other views where asked, and prepared."""

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
    """What a reader needs of a backbone, see backbone.Backbone."""

    min_side: int

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]: ...


class Pixels:
    """Reads features/ with photos/ in the place of their features: image [b, h, w, 3] uint8, the rest as Features.

    Rows of the two are the same photos. threads: that decode. views: how far a photo's views go from it in training,
    None for the photo itself; each depends on the seed and on the example's number alone.
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
        return self._read(self._itself, rows)

    def vary(self, rows: np.ndarray, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what the reader does of rows, each as it is seen as this example (pipeline.Varying)."""
        return self._read(self._view, rows, examples) if self._views else self(rows)

    def _read(self, look: Callable[..., np.ndarray], rows: np.ndarray, *more: np.ndarray) -> dict[str, np.ndarray]:
        return {**self._features(rows), "image": np.stack(list(self._pool.map(look, rows, *more)))}

    def _itself(self, row: int) -> np.ndarray:
        return self._tower.prepare(self._photos[row]["image"])

    def _view(self, row: int, example: int) -> np.ndarray:
        assert self._views, "a view without settings"
        image = open_image(self._photos[row]["image"], math.ceil(self._tower.min_side / self._views.crop))
        return self._tower.prepare(view(image, np.random.default_rng((self._seed, example)), self._views))
