"""Exact search for nearest neighbors on all local devices.

The vectors are split over the devices. Each query is compared with all vectors.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from geotoken_jax.batch import padded, padded_size

#: Queries and rows per block of scores on each device: 34 MB of scores.
_QUERIES, _ROWS = 512, 16_384
_SPLIT, _REPLICATED = PartitionSpec("devices"), PartitionSpec()


class DeviceSearch:
    """Stores vectors on the local devices, and finds the vectors nearest to queries.

    On a machine without an accelerator, the device is its CPU.
    """

    def __init__(self, vectors: Any, dtype: Any):
        """vectors: vectors [N, D], as a geotoken_jax.gallery.index.Vectors. dtype: float32 or bfloat16, the type of
        vectors and queries on the devices. The products of their components are summed in float32."""
        devices = jax.local_devices()
        self._mesh = Mesh(np.array(devices), ("devices",))
        self._n, parts = len(vectors), []
        each = max(1, -(-self._n // len(devices)))
        each += -each % min(_ROWS, each)  # whole blocks
        for i, device in enumerate(devices):
            first, last = min(i * each, self._n), min((i + 1) * each, self._n)
            part = np.zeros((each, vectors[:0].shape[1]), dtype)
            for row in range(first, last, _ROWS):
                block = slice(row, min(row + _ROWS, last))
                part[row - first : block.stop - first] = vectors[block]
            parts.append(jax.device_put(part, device).block_until_ready())
        shape, split = (each * len(devices), parts[0].shape[1]), NamedSharding(self._mesh, _SPLIT)
        self._vectors = jax.make_array_from_single_device_arrays(shape, split, parts)

    def candidates(self, queries: Float32[np.ndarray, "n D"], count: int) -> Int32[np.ndarray, "n count"]:
        """Returns the rows of the vectors with the largest inner products, best first, ties by row.

        count: number of rows per query. If there are fewer vectors, the last rows are -1.
        """
        found = []
        for first in range(0, len(queries), _QUERIES):
            block = queries[first : first + _QUERIES]
            filled = padded(block, padded_size(len(block), _QUERIES)).astype(self._vectors.dtype)
            placed = jax.device_put(filled, NamedSharding(self._mesh, _REPLICATED))
            scores, rows = _search(self._mesh, self._n, count, self._vectors, placed)
            # Scores and rows stay device arrays here, so that the search of the next block starts before this one ends.
            found.append((scores, rows, len(block)))
        results = [_best(np.asarray(s)[:n], np.asarray(r)[:n], count) for s, r, n in found]
        return np.concatenate(results) if results else np.zeros((0, count), np.int32)


def _best(scores: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Returns the rows of the largest scores, [n, count], from the best candidates of all devices."""
    missing = max(0, count - scores.shape[1])
    scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    best = np.lexsort((rows, -scores), axis=1)[:, :count]
    return np.where(np.isneginf(np.take_along_axis(scores, best, 1)), -1, np.take_along_axis(rows, best, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(mesh: Mesh, n: int, count: int, vectors: Array, queries: Array) -> tuple[Array, Array]:
    """Returns the scores and rows of each device's best candidates, [queries, devices x candidates]."""

    def on_each_device(vectors: Array, queries: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index("devices") * len(vectors)
        size = min(_ROWS, len(vectors))
        kept = min(count, len(vectors))
        start = (jnp.full((len(queries), kept), -jnp.inf), jnp.full((len(queries), kept), -1, jnp.int32))

        def block(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            begin, values = part
            # On TPU the default precision would round float32 factors to bfloat16.
            products = jnp.matmul(
                queries, values.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
            rows = begin + jnp.arange(size, dtype=jnp.int32)
            new, at = jax.lax.top_k(jnp.where(rows < n, products, -jnp.inf), min(kept, size))
            scores = jnp.concatenate([best[0], new], axis=1)
            numbers = jnp.concatenate([best[1], begin + at.astype(jnp.int32)], axis=1)
            scores, at = jax.lax.top_k(scores, kept)
            return (scores, jnp.take_along_axis(numbers, at, axis=1)), None

        blocks = vectors.reshape(-1, size, vectors.shape[1])
        begins = first + size * jnp.arange(len(blocks), dtype=jnp.int32)
        return jax.lax.scan(block, start, (begins, blocks))[0]

    results = PartitionSpec(None, "devices")
    return jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(_SPLIT, _REPLICATED), out_specs=(results, results), check_vma=False
    )(vectors, queries)
