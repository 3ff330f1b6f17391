"""Stores vectors as int8: integers from -127 to 127, and one float32 scale per vector."""

from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int8

from geotoken_jax import disk, records

#: Rows quantized at a time: at width 2304, 38 MB of float32.
_BLOCK = 4096


def quantized(vectors: Float[Any, "*n C"]) -> tuple[Int8[np.ndarray, "*n C"], Float32[np.ndarray, "*n"]]:
    """Returns the quantized vectors and their scales. A scale is the largest magnitude in a vector, divided by 127."""
    vectors = np.asarray(vectors, np.float32)
    scale = np.maximum(np.abs(vectors).max(-1), np.finfo(np.float32).tiny) / 127
    return np.rint(vectors / scale[..., None]).astype(np.int8), scale


def restored(values: Int8[np.ndarray, "*n C"], scale: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n C"]:
    """Returns the vectors in float32. The error of a component is at most half a scale."""
    return values.astype(np.float32) * scale[..., None]


def write(vectors: Float[Any, "N *n C"], path: epath.Path, scales: epath.Path) -> None:
    """Writes int8 vectors to `path` and their scales to `scales`. Memory holds one block of vectors at a time.

    vectors: array in memory or memory-mapped. It may be mapped from `path`: this file is replaced only at the end.
    """
    with disk.writing(path) as partial:
        values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int8, shape=vectors.shape)
        scale = np.empty(vectors.shape[:-1], np.float32)
        for first in range(0, len(vectors), _BLOCK):
            part = slice(first, first + _BLOCK)
            values[part], scale[part] = quantized(vectors[part])
        values.flush()
        records.save_array(scales, scale)


class Int8Vectors:
    """Int8 vectors [N, D] as a geotoken_jax.gallery.index.Vectors: rows are restored to float32 when they are read."""

    def __init__(self, values: Int8[np.ndarray, "N D"], scale: Float32[np.ndarray, " N"]):
        self._values, self._scale = values, scale

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "n D"]:
        return restored(self._values[rows], self._scale[rows])
