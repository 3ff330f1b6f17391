"""Detects placeholders: images that replace a deleted photo, such as Flickr's "no longer available"."""

import collections
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from data_prep import images
from data_prep.duplicates import hashes
from geotoken_jax.preparation import PlaceholderSettings


def is_placeholder(image: bytes, known: PlaceholderSettings) -> bool:
    """Returns whether an encoded image looks like a known placeholder.

    It does if its difference hash and one of `known.hashes` differ in at most `known.distance` bits. An image that
    cannot be decoded is no placeholder.
    """
    code = dhash(image) if known.hashes else None
    return code is not None and any((code ^ int(one, 16)).bit_count() <= known.distance for one in known.hashes)


def dhash(image: bytes) -> int | None:
    """Returns the 64-bit difference hash of an encoded image, or None if the image cannot be decoded."""
    gray = images.thumbnail(image)
    return None if gray is None else int(hashes(gray[None])[0])


def repeated_files(sizes: Int[np.ndarray, " n"], read: Callable[[int], bytes], limit: int) -> Bool[np.ndarray, " n"]:
    """Returns a mask of the files whose bytes occur in more than `limit` files.

    A file is read only if more than `limit` files have its size. With 4 million photos of 5 to 300 KB, there are 14
    files per size on average. So with a limit of 100, hardly any file but placeholders is read.

    sizes: file sizes in bytes. read: function that returns the bytes of a file, given its index in `sizes`.
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
