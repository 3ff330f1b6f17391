"""The augmented gallery: all gallery photos and their augmented views. Also a search for the photos nearest to a point.

A view is a random crop of a photo with another exposure and color cast (backbone/views.py).
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.spatial import KDTree

from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, to_unit_vectors

#: A set of W views of gallery photos, as a pair. First: function from numbers of views [m], 0 to W - 1, to their image
#: embeddings [m, C]. Second: gallery row of each view's photo [W].
Views = tuple[Callable[[np.ndarray], np.ndarray], Int[np.ndarray, " W"]]


class AugmentedGallery:
    """A list of images: first all N gallery photos, then their W augmented views. W may be 0.

    owner [N + W]: gallery row of each image's photo.
    images_of [N, 1 + V]: numbers of the images of each gallery photo, first the photo itself, then its views. V is the
    largest number of views of a photo. For a photo with fewer views, its own number fills the remaining columns.
    """

    def __init__(self, gallery: Table, views: Sequence[Views]):
        """views: sets of views. A set may have views of some photos only, and several views of a photo."""
        photos = np.arange(len(gallery))
        self._gallery, self._views = gallery, views
        #: Number of the first image of each set of views, then the number of all images.
        self._starts = len(photos) + np.cumsum([0, *(len(of) for _, of in views)])
        owner = np.concatenate([np.zeros(0, np.int64), *(of for _, of in views)])
        self.owner = np.concatenate([photos, owner])
        order = np.argsort(owner, kind="stable")
        first, last = (np.searchsorted(owner[order], photos, side)[:, None] for side in ("left", "right"))
        v = np.arange((last - first).max())
        images = len(photos) + order[np.minimum(first + v, len(order) - 1)]
        self.images_of = np.concatenate([photos[:, None], np.where(v < last - first, images, photos[:, None])], 1)

    def __len__(self) -> int:
        return len(self.owner)

    def images(self, rows: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m C"]:
        """Returns the embeddings of images. rows: numbers of the images, from 0 to N + W - 1."""
        embeddings = np.empty((len(rows), self._gallery.width), np.float32)
        photo = rows < len(self._gallery)
        embeddings[photo] = self._gallery.embeddings(rows[photo])[:, 0]
        for (read, _), first, stop in zip(self._views, self._starts[:-1], self._starts[1:], strict=True):
            here = (rows >= first) & (rows < stop)
            embeddings[here] = read(rows[here] - first)
        return embeddings


class NearestPhotos:
    """Finds the photos nearest to a point on Earth, in a k-d tree of unit vectors."""

    def __init__(self, coordinates: Float[np.ndarray, "N 2"]):
        """coordinates: latitude and longitude of the photos, in degrees."""
        self._tree = KDTree(to_unit_vectors(*coordinates.T))

    def __call__(
        self, coordinates: Float[np.ndarray, "n 2"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns the rows of the k photos nearest to each point, and their distances in km.

        A row is an index into the photos that the search was made for. If there are fewer than k photos, all are
        returned. coordinates: latitude and longitude of the points, in degrees.
        """
        k = min(k, self._tree.n)
        chord, rows = map(np.asarray, self._tree.query(to_unit_vectors(*coordinates.T), k))
        rows, chord = (x.reshape(len(coordinates), k) for x in (rows, chord))  # KDTree drops the axis if k is 1
        return rows, 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))
