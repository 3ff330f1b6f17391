"""Finds photos of equal bytes, and photos of nearly the same picture, such as a copy in another size or quality.

Photos are compared by their fingerprints of 88 bytes: a digest of the file and a gray thumbnail of the picture. Two
pictures are nearly the same if their thumbnails differ little. The thumbnails of pictures without contrast, such as a
clear sky, hardly differ from each other, so such pictures are compared by their bytes only.
"""

import hashlib

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt64
from scipy.sparse import coo_array, csgraph

from data_prep import images

#: Type of a photo's fingerprint. digest: first half of the SHA-256 of the file. gray: thumbnail of the picture.
FINGERPRINT = np.dtype([("digest", "u1", (16,)), ("gray", "u1", images.THUMBNAIL)])
#: A thumbnail is compared with others only if the standard deviation of its pixels is at least this number of gray
#: levels.
_MIN_CONTRAST = 12.0
#: Number of hash keys per thumbnail, number of products per key, and step to which products are rounded, in gray
#: levels (see `_keys`). Two thumbnails that differ by 1 gray level share at least one of their 8 keys with probability
#: 0.9999. For thumbnails that differ by 3 gray levels, the probability is 0.9.
_KEYS, _PRODUCTS, _STEP = 8, 12, 24.0
#: A photo is compared with at most this number of photos with the same key.
_MAX_COMPARED = 64
#: Number of collected pairs above which the groups are merged.
_MAX_PAIRS = 1 << 20
#: Number of thumbnails that are converted to float at a time.
_BATCH = 1 << 16


def fingerprint(image: bytes) -> np.ndarray:
    """Returns the FINGERPRINT of an encoded image. If the image cannot be decoded, the thumbnail is black."""
    found, gray = np.zeros((), FINGERPRINT), images.thumbnail(image)
    found["digest"] = np.frombuffer(hashlib.sha256(image).digest()[:16], np.uint8)
    found["gray"] = 0 if gray is None else gray
    return found


def hashes(gray: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Returns the difference hashes of thumbnails [n, 8, 9].

    Each bit compares a pixel with its right neighbor: it is 1 if the pixel is darker. The highest bit belongs to the
    top left pixel; the others follow row by row.
    """
    bits = np.packbits((gray[:, :, :-1] < gray[:, :, 1:]).reshape(len(gray), 64), axis=1)
    return bits.view(">u8")[:, 0].astype(np.uint64)


def groups(fingerprints: Shaped[np.ndarray, " n"], difference: float) -> tuple[list[np.ndarray], int]:
    """Returns the groups of duplicates, and the number of photos that have the same bytes as another photo.

    A group is an ascending array of rows in `fingerprints`. Groups are transitive: if A and B are duplicates, and B and
    C are, then A, B and C are in one group. About 150 bytes of memory are needed per photo, besides the fingerprints.

    fingerprints: array of type FINGERPRINT. difference: largest root-mean-square difference of the thumbnails of two
    duplicates, in gray levels. If 0, only photos of equal bytes are duplicates.
    """
    found = _Groups(len(fingerprints))
    pairs = _equal(fingerprints["digest"])
    found.add(*pairs)
    if difference > 0:
        _add_similar(found, fingerprints["gray"], difference)
    found.merge()
    rows = np.argsort(found.labels, kind="stable")
    ends = np.flatnonzero(np.diff(found.labels[rows])) + 1
    several = [group for group in np.split(rows, ends) if len(group) > 1]
    return sorted(several, key=lambda group: int(group[0])), len(np.unique(pairs))


class _Groups:
    """A partition of n rows into groups. At first each row is a group of its own.

    labels: number of the group of each row, [n].
    """

    def __init__(self, n: int):
        self.labels = np.arange(n)
        self._pairs, self._collected = [], 0

    def add(self, one: Int[np.ndarray, " m"], other: Int[np.ndarray, " m"]) -> None:
        """Joins the groups of one[i] and other[i], for every i. `labels` may be outdated until `merge` is called."""
        self._pairs.append(self.labels[np.stack([one, other])])
        self._collected += len(one)
        if self._collected > _MAX_PAIRS:
            self.merge()

    def merge(self) -> None:
        """Updates `labels` with all pairs that were added."""
        n = len(self.labels)
        if self._collected:
            one, other = np.concatenate(self._pairs, axis=1)
            graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(n, n))
            self.labels = csgraph.connected_components(graph, directed=False)[1][self.labels]
        self._pairs, self._collected = [], 0


def _equal(digests: np.ndarray) -> Int[np.ndarray, "2 m"]:
    """Returns pairs of rows with equal digests."""
    high, low = np.ascontiguousarray(digests).view(np.uint64).T
    order = np.lexsort((low, high))
    same = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    return np.stack([order[:-1][same], order[1:][same]])


def _add_similar(found: _Groups, gray: np.ndarray, difference: float) -> None:
    """Joins the groups of rows whose thumbnails differ by up to `difference`.

    Only rows that share a key are compared. This is locality-sensitive hashing (Datar et al. 2004).
    """
    keys, contrast = _keys(gray)
    rows = np.flatnonzero(contrast)
    for key in keys.T:
        order = rows[np.argsort(key[rows], kind="stable")]
        key, at = key[order], np.arange(len(order))
        for ahead in range(1, _MAX_COMPARED + 1):
            at = at[at < len(key) - ahead]
            at = at[key[at] == key[at + ahead]]
            if not len(at):
                break
            one, other = order[at], order[at + ahead]
            apart = found.labels[one] != found.labels[other]
            one, other = one[apart], other[apart]
            similar = _similar(gray, one, other, difference)
            found.add(one[similar], other[similar])
        found.merge()


def _keys(gray: np.ndarray) -> tuple[UInt64[np.ndarray, "n keys"], Bool[np.ndarray, " n"]]:
    """Returns the hash keys of thumbnails [n, 8, 9], and a mask of the thumbnails with enough contrast.

    A key is a hash of _PRODUCTS dot products of the thumbnail with random unit vectors. The products are rounded. After
    rounding, the products of similar thumbnails are mostly equal, so similar thumbnails often share a key.
    """
    rng = np.random.default_rng(0)
    pixels = images.THUMBNAIL[0] * images.THUMBNAIL[1]
    directions = rng.choice(np.array([-1, 1], np.float32), (pixels, _KEYS * _PRODUCTS)) / np.float32(pixels**0.5)
    offsets = rng.uniform(0, _STEP, _KEYS * _PRODUCTS).astype(np.float32)
    factors = rng.integers(0, 1 << 63, (_KEYS, _PRODUCTS), np.uint64) * np.uint64(2) + np.uint64(1)
    keys, contrast = np.empty((len(gray), _KEYS), np.uint64), np.empty(len(gray), bool)
    for first in range(0, len(gray), _BATCH):
        part = slice(first, first + _BATCH)
        flat = np.asarray(gray[part], np.float32).reshape(-1, pixels)
        contrast[part] = flat.std(1) >= _MIN_CONTRAST
        steps = np.floor((flat @ directions + offsets) / _STEP).astype(np.int64).astype(np.uint64)
        keys[part] = (steps.reshape(-1, _KEYS, _PRODUCTS) * factors).sum(2)  # modulo 2^64
    return keys, contrast


def _similar(gray: np.ndarray, one: np.ndarray, other: np.ndarray, difference: float) -> Bool[np.ndarray, " m"]:
    """Returns for each i whether the thumbnails in rows one[i] and other[i] differ by at most `difference`."""
    similar = np.empty(len(one), bool)
    for first in range(0, len(one), _BATCH):
        part = slice(first, first + _BATCH)
        pair = gray[one[part]].astype(np.float32) - gray[other[part]]
        similar[part] = np.sqrt(np.square(pair).mean((1, 2))) <= difference
    return similar
