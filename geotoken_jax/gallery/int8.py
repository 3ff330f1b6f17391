"""Vectors in one byte a number: each as integers from -127 to 127 with a float32 scale of its own."""

from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Int8

from geotoken_jax import records

#: Rows that are quantized at once: 2304 wide 38 MB of float32.
_BLOCK = 4096


def quantized(vectors: Float[Any, "*n C"]) -> tuple[Int8[np.ndarray, "*n C"], Float32[np.ndarray, "*n"]]:
    """Returns the integers nearest to the vectors, and the scale of each: its largest number is 127 scales."""
    vectors = np.asarray(vectors, np.float32)
    scale = np.maximum(np.abs(vectors).max(-1), np.finfo(np.float32).tiny) / 127
    return np.rint(vectors / scale[..., None]).astype(np.int8), scale


def restored(values: Int8[np.ndarray, "*n C"], scale: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n C"]:
    """Returns the vectors, each number off by half a scale at most."""
    return values.astype(np.float32) * scale[..., None]


def write(vectors: Float[Any, "N *n C"], path: epath.Path, scales: epath.Path) -> None:
    """Writes vectors, which may be memory-mapped, and from `path` itself, as two flat arrays; never all in memory."""
    beside = path.parent / f".{path.name}.partial"
    values = np.lib.format.open_memmap(beside, mode="w+", dtype=np.int8, shape=vectors.shape)
    scale = np.empty(vectors.shape[:-1], np.float32)
    for first in range(0, len(vectors), _BLOCK):
        part = slice(first, first + _BLOCK)
        values[part], scale[part] = quantized(vectors[part])
    values.flush()
    records.save_array(scales, scale)
    beside.replace(path)


class Quantized:
    """Vectors [N, D] that are restored as they are asked for (geotoken_jax.gallery.index.Vectors)."""

    def __init__(self, values: Int8[np.ndarray, "N D"], scale: Float32[np.ndarray, " N"]):
        self._values, self._scale = values, scale

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: Any) -> Float32[np.ndarray, "n D"]:
        return restored(self._values[rows], self._scale[rows])
