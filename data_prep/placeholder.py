"""Pictures that stand for a photo that is gone, such as Flickr's "no longer available"."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from geotoken_jax.backbone.preprocess import ImageError, open_image


@dataclasses.dataclass(frozen=True)
class PlaceholderSettings:
    """hashes: of known placeholders, as `dhash` makes them, in 16 hexadecimal digits; none: no photo is decoded.
    distance: bits in which a placeholder may differ from its hash. identical: photos that may have the same bytes;
    where more do, all of them are placeholders."""

    hashes: tuple[str, ...]
    distance: int
    identical: int

    def __post_init__(self):
        for value in self.hashes:
            if not re.fullmatch("[0-9a-f]{16}", str(value)):
                raise ValueError(
                    f"config.photos.mp16_pro.placeholder.hashes has {value!r}: write each as 16 of the digits 0-9a-f"
                )
        if not 0 <= self.distance < 64:
            raise ValueError(f"config.photos.mp16_pro.placeholder.distance is {self.distance}: use 0 to 63 bits")
        if self.identical < 1:
            raise ValueError(f"config.photos.mp16_pro.placeholder.identical is {self.identical}: use 1 or more")

    def match(self, image: bytes) -> bool:
        """Says whether an encoded image looks like a known placeholder; one that cannot be decoded does not."""
        if not self.hashes:
            return False
        try:
            found = dhash(image)
        except ImageError:
            return False
        return any((found ^ int(known, 16)).bit_count() <= self.distance for known in self.hashes)


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
