"""Pictures that stand for a photo that is gone, such as Flickr's "no longer available"."""

import collections
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from geotoken_jax.backbone.preprocess import ImageError, open_image
from geotoken_jax.preparation import PlaceholderSettings


def looks_like(image: bytes, known: PlaceholderSettings) -> bool:
    """Says whether an encoded image looks like a known placeholder; one that cannot be decoded does not."""
    if not known.hashes:
        return False
    try:
        found = dhash(image)
    except ImageError:
        return False
    return any((found ^ int(value, 16)).bit_count() <= known.distance for value in known.hashes)


def dhash(image: bytes) -> int:
    """Returns the difference hash of an encoded image: 64 bits, whether each pixel of a 9 x 8 gray thumbnail is darker
    than the one to its right, from the top left on, the highest bit first. Raises ImageError if it cannot be decoded.
    """
    # 72 pixels suffice to shrink from, so a large JPEG is decoded at 1/8 of its size.
    gray = open_image(image, min_side=72).convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(gray)
    return int.from_bytes(np.packbits(pixels[:, :-1] < pixels[:, 1:]).tobytes())


def identical(sizes: Int[np.ndarray, " n"], read: Callable[[int], bytes], limit: int) -> Bool[np.ndarray, " n"]:
    """Says which files have the same bytes as more than `limit - 1` others.

    sizes: of the files, in bytes. read: returns a file by its number. Only files whose size more than `limit` of them
    have are read, size by size: of 4 million photos of 5 to 300 KB a size has 14 on average, so that with a limit of
    100 hardly more than the placeholders themselves are.
    """
    same = np.zeros(len(sizes), bool)
    order = np.argsort(sizes, kind="stable")
    _, first, counts = np.unique(sizes[order], return_index=True, return_counts=True)
    for start, count in zip(first[counts > limit], counts[counts > limit], strict=True):
        group = order[start : start + count]
        digests = [hashlib.sha256(read(int(n))).digest() for n in group]
        among = collections.Counter(digests)
        same[group] = [among[digest] > limit for digest in digests]
    return same
