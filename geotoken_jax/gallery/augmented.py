"""The gallery's photos with their augmented views, as one set of images, and the photos nearest to a point."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.spatial import KDTree

from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, to_unit_vectors

#: Views of gallery photos: a function of row numbers that returns their image embeddings [m, C], and the gallery row of
#: the photo that each shows.
Views = tuple[Callable[[np.ndarray], np.ndarray], Int[np.ndarray, " W"]]


class AugmentedGallery:
    """The image embeddings of all N gallery photos and, after them, of their W augmented views, if there are any.

    An image is a gallery photo or a view of one. owner [N + W]: gallery row of each image. of [N, 1 + V]: images of
    each gallery photo, first the photo itself, then its views; V is the largest number of views of a photo. A photo
    with fewer is padded with itself.
    """

    def __init__(self, gallery: Table, views: Sequence[Views]):
        """views: sets of views, each of any number of photos."""
        photos = np.arange(len(gallery))
        self._gallery, self._views = gallery, views
        #: First image of each set of views, then the number of images.
        self._starts = len(photos) + np.cumsum([0, *(len(of) for _, of in views)])
        owner = np.concatenate([np.zeros(0, np.int64), *(of for _, of in views)])
        self.owner = np.concatenate([photos, owner])
        order = np.argsort(owner, kind="stable")
        first, last = (np.searchsorted(owner[order], photos, side)[:, None] for side in ("left", "right"))
        v = np.arange((last - first).max())
        images = len(photos) + order[np.minimum(first + v, len(order) - 1)]
        self.of = np.concatenate([photos[:, None], np.where(v < last - first, images, photos[:, None])], 1)

    def __len__(self) -> int:
        return len(self.owner)

    def images(self, rows: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m C"]:
        """Returns the embeddings of the images in `rows`."""
        embeddings = np.empty((len(rows), self._gallery.width), np.float32)
        photo = rows < len(self._gallery)
        embeddings[photo] = self._gallery.embeddings(rows[photo])[:, 0]
        for (read, _), first, stop in zip(self._views, self._starts[:-1], self._starts[1:], strict=True):
            here = (rows >= first) & (rows < stop)
            embeddings[here] = read(rows[here] - first)
        return embeddings


class NearestPhotos:
    """Finds the gallery photos nearest to a point, in a k-d tree of unit vectors."""

    def __init__(self, coordinates: Float[np.ndarray, "N 2"]):
        self._tree = KDTree(to_unit_vectors(*coordinates.T))

    def __call__(
        self, coordinates: Float[np.ndarray, "n 2"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns the gallery rows of the k nearest photos, or of all if there are fewer, and their distances in km."""
        k = min(k, self._tree.n)
        chord, rows = map(np.asarray, self._tree.query(to_unit_vectors(*coordinates.T), k))
        rows, chord = (x.reshape(len(coordinates), k) for x in (rows, chord))  # KDTree drops the axis if k is 1
        return rows, 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))
