"""Search of the gallery in several channels, for the reranker's candidates.

A channel is one way to find gallery photos of the place in a photo: it compares one kind of vectors, in one index. The
names of the channels are explained at model.reranker.CHANNELS. The channel "index" searches the gallery's own index.
Every other channel has an index in the subfolder NAME of channels/.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Float32, Int

from geotoken_jax import checkpoint, records
from geotoken_jax.batch import blocks
from geotoken_jax.gallery import index
from geotoken_jax.gallery.exclude import Exclusion
from geotoken_jax.gallery.index import Index
from geotoken_jax.gallery.neighbors import Neighbors, search_neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.model.comparator import Comparator, ComparatorSettings, ComparatorTask
from geotoken_jax.predict.pool import Pool
from geotoken_jax.settings import SettingsError
from geotoken_jax.vectors import unit

#: Images per call of the comparator. Smaller batches are padded to this number, so only one shape is compiled.
_BLOCK = 256


class Channels:
    """The opened channels of a gallery. The method `search` searches all of them."""

    def __init__(
        self,
        names: Sequence[str],
        folder: epath.Path,
        settings: ComparatorSettings,
        gallery: Table,
        searched: Index,
        threads: int,
    ):
        """names: names of the channels to open. folder: the folder channels/ of a work directory or of an export.
        settings: settings of the comparator. searched: the gallery's own index. threads: number of threads per search.

        Raises SettingsError if channels/ was made for a gallery with another number of photos.
        """
        self.names = tuple(names)
        self._owner = records.open_array(folder / "owner.npy")
        if self._owner.max(initial=-1) + 1 != len(gallery):
            raise SettingsError(
                f"{folder} was made for {self._owner.max(initial=-1) + 1:,} gallery photos, but the gallery has "
                f"{len(gallery):,}: in a work directory, remove {folder} and run `geotoken learn`; in an export, "
                "export again"
            )
        self._images_per_photo = -(-len(self._owner) // len(gallery))  # the photo and its views: mean, rounded up
        self._indexes = {
            name: searched if name == "index" else index.load(folder / name / "index", threads) for name in names
        }
        self._vectors: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "index": index_vectors,
            "location": lambda query: unit(np.asarray(query[:, 1], np.float32)),
        }
        if "backbone" in names:
            whitening = np.load(folder / "backbone" / "whitening.npy")
            self._vectors["backbone"] = lambda query: whitened(whitening, np.asarray(query[:, 0], np.float32))
        if "comparator" in names:
            task = ComparatorTask(settings, np.zeros(gallery.width, np.float32))
            comparator = checkpoint.read_module(folder / "comparator" / "parameters.safetensors", task.init)
            self._vectors["comparator"] = lambda query: encode(comparator, np.asarray(query[:, 0], np.float32))

    def search(self, pool: Pool, depth: int) -> tuple[Int[np.ndarray, "b C n"], Float[np.ndarray, "b C n"]]:
        """Returns the gallery rows and the scores of each photo's neighbors in every channel, best first.

        Gallery photos that a rule in pool.exclude excludes are left out. If a channel finds fewer than n neighbors, the
        last rows are -1 and their scores -inf. depth: n, the number of neighbors per channel.
        """
        found = [self._search(name, self._vectors[name](pool.query), depth, pool.exclude) for name in self.names]
        rows, scores = (np.stack(parts, 1) for parts in zip(*found, strict=True))
        return rows, scores

    def _search(self, name: str, queries: np.ndarray, depth: int, exclude: Sequence[Exclusion]) -> Neighbors:
        if name != "comparator":
            return search_neighbors(self._indexes[name], queries, depth, exclude)
        owner = self._owner
        # This index has several images per gallery photo. The rules take the gallery row of each image.
        rules = [lambda queries, rows, rule=rule: rule(queries, owner[rows]) for rule in exclude]
        rows, scores = search_neighbors(self._indexes[name], queries, depth * self._images_per_photo, rules)
        return _distinct(np.where(rows < 0, -1, owner[rows]), scores, depth)


def _distinct(rows: Int[np.ndarray, "b m"], scores: Float[np.ndarray, "b m"], k: int) -> Neighbors:
    """Returns the first k distinct gallery rows per photo with their scores, in the given order.

    Rows of -1 are skipped. If fewer than k rows are left, the last ones are -1 and their scores -inf.
    """
    order = np.argsort(rows, 1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    again = np.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
    left_out = np.empty(rows.shape, bool)
    np.put_along_axis(left_out, order, again, 1)
    left_out |= rows < 0
    first = np.argsort(left_out, 1, kind="stable")[:, :k]
    missing = np.take_along_axis(left_out, first, 1)
    rows, scores = (np.take_along_axis(values, first, 1) for values in (rows, scores))
    return np.where(missing, -1, rows).astype(np.int32), np.where(missing, -np.inf, scores).astype(np.float32)


def whitening(images: Float[np.ndarray, "n C"]) -> Float32[np.ndarray, "C+1 C"]:
    """Returns the parameters of `whitened`, computed from image embeddings.

    Row 0 is the mean of the embeddings' unit vectors. The other C rows are a matrix that gives all principal components
    nearly the same variance. 1 % of the largest variance is added to every variance: components with almost no variance
    are not enlarged to the size of the others.

    Effect on EarthView's split test_shift, whose map style the gallery does not have: the first neighbor is within 25
    km for 45.5 % of the photos, and for 33.2 % without whitening.
    """
    vectors = unit(images).astype(np.float64)
    mean = vectors.mean(0)
    variance, components = np.linalg.eigh((vectors - mean).T @ (vectors - mean) / len(vectors))
    matrix = components / np.sqrt(np.maximum(variance, 0) + 0.01 * max(variance[-1], 1e-12))
    return np.concatenate([mean[None], matrix]).astype(np.float32)


def whitened(whitening: Float32[np.ndarray, "C+1 C"], images: Float[np.ndarray, "n C"]) -> Float32[np.ndarray, "n C"]:
    """Returns whitened image embeddings, as unit vectors. whitening: result of the function `whitening`."""
    return unit((unit(images) - whitening[0]) @ whitening[1:])


def encode(comparator: Comparator, images: Float[np.ndarray, "n C"]) -> Float32[np.ndarray, "n D"]:
    """Returns the comparator's unit vectors for image embeddings."""
    graph, state = nnx.split(comparator)
    vectors = [np.asarray(_encode(graph, state, x.astype(np.float32)))[:n] for x, n in blocks(images, _BLOCK)]
    return np.concatenate([np.zeros((0, comparator.output.out_features), np.float32), *vectors])


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, images: np.ndarray) -> jax.Array:
    return nnx.merge(graph, state)(images)
