"""Detects placeholders: images that replace a deleted photo, such as Flickr's "no longer available"."""

import collections
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from geotoken_jax.backbone.preprocess import ImageError, open_image
from geotoken_jax.preparation import PlaceholderSettings


def is_placeholder(image: bytes, known: PlaceholderSettings) -> bool:
    """Returns whether an image's difference hash differs from one of `known.hashes` in at most `known.distance` bits.

    image: encoded image. Returns False if it cannot be decoded. If there are no hashes, it is not decoded.
    """
    if not known.hashes:
        return False
    try:
        image_hash = dhash(image)
    except ImageError:
        return False
    return any((image_hash ^ int(value, 16)).bit_count() <= known.distance for value in known.hashes)


def dhash(image: bytes) -> int:
    """Returns the difference hash of an encoded image, of 64 bits. Raises ImageError if it cannot be decoded.

    A bit is 1 if a pixel of the 9 x 8 gray thumbnail is darker than its right neighbor. The highest bit is for the top
    left pixel; the others follow row by row.
    """
    # Sides of 72 pixels are enough for the thumbnail, and let a large JPEG be decoded at 1/8 of its size.
    gray = open_image(image, min_side=72).convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(gray)
    return int.from_bytes(np.packbits(pixels[:, :-1] < pixels[:, 1:]).tobytes())


def repeated_files(sizes: Int[np.ndarray, " n"], read: Callable[[int], bytes], limit: int) -> Bool[np.ndarray, " n"]:
    """Returns a mask of the files whose bytes occur in more than `limit` files.

    sizes: file sizes in bytes. read: function that returns the bytes of a file, given its index in `sizes`. A file is
    read only if more than `limit` files have its size. Among 4 million photos of 5 to 300 KB, 14 have the
    same size on average, so with a limit of 100 hardly any file but placeholders is read.
    """
    same = np.zeros(len(sizes), bool)
    order = np.argsort(sizes, kind="stable")
    _, first, counts = np.unique(sizes[order], return_index=True, return_counts=True)
    for start, count in zip(first[counts > limit], counts[counts > limit], strict=True):
        group = order[start : start + count]
        digests = [hashlib.sha256(read(int(n))).digest() for n in group]
        occurrences = collections.Counter(digests)
        same[group] = [occurrences[digest] > limit for digest in digests]
    return same
