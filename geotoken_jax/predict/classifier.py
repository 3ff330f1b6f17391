"""Geolocation as classification (PlaNet, Weyand et al. 2016) over cells with roughly equal numbers of photos."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Int64, UInt8

from geotoken_jax import records
from geotoken_jax.align.heads import Head
from geotoken_jax.batch import Spec, spec
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import from_unit_vectors, to_unit_vectors

#: Photos per batch. With 26,263 cells, as in PlaNet, the log-probabilities of a batch take 27 MB.
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """Settings of the baseline `classifier` (config.baselines.classifier).

    max_photos: largest number of gallery photos in a cell; a cell with more is split into its four children.
    min_photos: smallest number of gallery photos in a cell; a cell with fewer is dropped. hidden: width of the hidden
    layer. dropout: dropout rate of the hidden layer. candidates: number of most probable cells in a prediction.
    """

    max_photos: int
    min_photos: int
    hidden: int
    dropout: float
    candidates: int


class Cells:
    """S2 cells of any level that do not overlap, indexed in the order of the Hilbert curve."""

    def __init__(self, starts: Int64[np.ndarray, " V"], sizes: Int64[np.ndarray, " V"]):
        """starts: index on the curve (see `_curve_index`) of the first level-20 cell inside each cell, in ascending
        order. sizes: number of level-20 cells inside each cell."""
        self._starts, self._stops = starts, starts + sizes

    def __len__(self) -> int:
        return len(self._starts)

    def of(self, tokens: UInt8[np.ndarray, "n 21"]) -> Int32[np.ndarray, " n"]:
        """Returns the index of the cell that contains each photo, -1 if no cell does.

        tokens: level-20 tokens, as stored in tables.
        """
        at = _curve_index(tokens)
        cell = np.searchsorted(self._starts, at, side="right") - 1
        return np.where((cell >= 0) & (at < self._stops[cell]), cell, -1).astype(np.int32)


def partition(tokens: UInt8[np.ndarray, "N 21"], max_photos: int, min_photos: int) -> Cells:
    """Returns the cells into which PlaNet's partition divides the gallery.

    The first cells are the six faces of S2. As long as a cell has more than max_photos photos, it is split into its
    four children, but never below level 20. Then cells with fewer than min_photos photos are dropped.

    tokens: level-20 tokens of the gallery photos, as stored in tables.
    """
    left = np.sort(_curve_index(tokens))
    starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for level in range(records.LEVEL + 1):
        size = 4 ** (records.LEVEL - level)
        cell, inverse, count = np.unique(left // size, return_inverse=True, return_counts=True)
        whole = (count <= max_photos) | (level == records.LEVEL)
        numbers = cell[whole & (count >= min_photos)]
        starts.append(numbers * size)
        sizes.append(np.full(len(numbers), size))
        left = left[~whole[inverse]]
    order = np.argsort(np.concatenate(starts))
    return Cells(np.concatenate(starts)[order], np.concatenate(sizes)[order])


def _curve_index(tokens: UInt8[np.ndarray, "n 21"]) -> Int64[np.ndarray, " n"]:
    """Returns the index, from 0, of each photo's level-20 cell on the Hilbert curve through all six faces."""
    at = np.zeros(len(tokens), np.int64)
    for k in range(1 + records.LEVEL):
        at = 4 * at + tokens[:, k]
    return at


def centers(coordinates: Float[np.ndarray, "N 2"], cell: Int[np.ndarray, " N"], cells: int) -> Float[np.ndarray, "V 2"]:
    """Returns the mean location of each cell's photos, in degrees.

    cell: index of each photo's cell, -1 if the photo is in none. cells: V, the number of cells.
    """
    inside = cell >= 0
    sums = np.zeros((cells, 3))
    np.add.at(sums, cell[inside], to_unit_vectors(*coordinates[inside].T))
    return np.stack(from_unit_vectors(sums), axis=-1)


class Photos:
    """Reads photos of a table. Photos outside all cells are left out.

    A call returns a dict with two arrays. vectors [b, 3 C] float32: input of the classifier, see `_inputs`. cell [b]
    int32: index of the cell that contains the photo.
    """

    def __init__(self, table: Table, cells: Cells):
        self._table = table
        cell = cells.of(table.tokens())
        self._rows = np.flatnonzero(cell >= 0)
        self._cell = cell[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"vectors": _inputs(self._table.embeddings(self._rows[rows])), "cell": self._cell[rows]}


def _inputs(embeddings: Float[np.ndarray, "B 3 C"]) -> Float32[np.ndarray, "B D"]:
    """Returns each photo's three unit vectors, concatenated and multiplied by sqrt(C).

    The factor brings the components to a size of about 1, as the initial weights expect.
    """
    return np.asarray(embeddings, np.float32).reshape(len(embeddings), -1) * math.sqrt(embeddings.shape[-1])


class ClassifierTask:
    """Trains p(cell | photo), a softmax over all cells. The method `batch` specifies the batches."""

    def __init__(self, settings: ClassifierSettings, width: int, cells: int):
        """width: C, the length of one vector. cells: V, the number of cells."""
        self._shape, self._dropout = (3 * width, settings.hidden, cells), settings.dropout
        self.flops = 6.0 * settings.hidden * (3 * width + cells)

    def batch(self, size: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        vectors [B, 3 C] float32: the photo's three embeddings, as `_inputs` returns them. cell [B] int32: index of the
        photo's cell. In evaluation also valid [B] bool: False for examples that only pad the batch.
        """
        return spec(size, vectors=((self._shape[0],), jnp.float32), cell=((), jnp.int32))

    def init(self, rngs: nnx.Rngs) -> Head:
        return Head(self._shape, self._dropout, rngs=rngs)

    def loss(
        self, model: Head, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean cross-entropy in nats, and a dict with the accuracy.

        The accuracy is the share of photos whose most probable cell is the true one.
        key: random key for dropout; no dropout if None.
        """
        logits = model(batch["vectors"], key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["cell"])
        right = logits.argmax(-1) == batch["cell"]
        valid = batch.get("valid")
        return jnp.average(losses, weights=valid), {"accuracy": jnp.average(right, weights=valid)}


def rank(model: Head, photos: Table, k: int) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Returns the k most probable cells of every photo of a table and their log-probabilities, best first."""
    run = nnx.jit(lambda model, x: jax.lax.top_k(jax.nn.log_softmax(model(x)), k))
    log_p, cells = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
    for first in range(0, len(photos), _BATCH):
        best = run(model, jnp.asarray(_inputs(photos.embeddings(slice(first, first + _BATCH)))))
        for batches, batch in zip((log_p, cells), best, strict=True):
            batches.append(np.asarray(batch))
    return np.concatenate(cells), np.concatenate(log_p)
