"""Finds photos of equal bytes, and photos of nearly the same picture, such as a copy in another size or quality.

Each photo has a fingerprint of 88 bytes. Two pictures are nearly the same if their thumbnails differ little. Pictures
without contrast, such as a clear sky, all have the same thumbnail, so they are compared by their bytes only.
"""

import hashlib

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt64
from scipy.sparse import coo_array, csgraph

from data_prep import images

#: A photo's fingerprint. digest: first half of the SHA-256 of its file. gray: thumbnail of its picture.
FINGERPRINT = np.dtype([("digest", "u1", (16,)), ("gray", "u1", images.THUMBNAIL)])
#: Smallest standard deviation of a thumbnail that is compared, in gray levels.
_CONTRAST = 12.0
#: Keys per thumbnail; products per key; width of the steps to which products are rounded, in gray levels. Copies whose
#: thumbnails differ by 1 level have one of 8 keys in common with a probability of 0.9999, by 3 levels of 0.9.
_KEYS, _PRODUCTS, _STEP = 8, 12, 24.0
#: A photo is compared with up to this number of photos with the same key.
_FOLLOWING = 64
#: Pairs that wait until the groups are brought up to date.
_WAITING = 1 << 20
#: Thumbnails that are converted to float at a time.
_ROWS = 1 << 16


def fingerprint(image: bytes) -> np.ndarray:
    """Returns the FINGERPRINT of an encoded image; if it cannot be decoded, its thumbnail is black."""
    found, gray = np.zeros((), FINGERPRINT), images.thumbnail(image)
    found["digest"] = np.frombuffer(hashlib.sha256(image).digest()[:16], np.uint8)
    found["gray"] = 0 if gray is None else gray
    return found


def hashes(gray: np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Returns the difference hashes of thumbnails [n, 8, 9].

    A bit is 1 if a pixel is darker than its right neighbor. The highest bit is for the top left pixel; the others
    follow row by row.
    """
    bits = np.packbits((gray[:, :, :-1] < gray[:, :, 1:]).reshape(len(gray), 64), axis=1)
    return bits.view(">u8")[:, 0].astype(np.uint64)


def groups(fingerprints: Shaped[np.ndarray, " n"], difference: float) -> tuple[list[np.ndarray], int]:
    """Returns the groups of duplicates, each an ascending array of rows, and the number of photos with equal bytes.

    A photo is in one group with each of its duplicates, and so with the duplicates of these. fingerprints: array of
    FINGERPRINT. difference: root-mean-square difference up to which two thumbnails count as equal, in gray levels; 0
    for equal bytes only. Needs about 150 bytes of memory per photo besides the fingerprints.
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
    """Rows in groups, at first each row in its own. labels: [n], the number of each row's group."""

    def __init__(self, n: int):
        self.labels = np.arange(n)
        self._pairs, self._waiting = [], 0

    def add(self, one: Int[np.ndarray, " m"], other: Int[np.ndarray, " m"]) -> None:
        """Joins the groups of pairs of rows, at the latest when `merge` is called."""
        self._pairs.append(self.labels[np.stack([one, other])])
        self._waiting += len(one)
        if self._waiting > _WAITING:
            self.merge()

    def merge(self) -> None:
        """Brings `labels` up to date."""
        n = len(self.labels)
        if self._waiting:
            one, other = np.concatenate(self._pairs, axis=1)
            graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(n, n))
            self.labels = csgraph.connected_components(graph, directed=False)[1][self.labels]
        self._pairs, self._waiting = [], 0


def _equal(digests: np.ndarray) -> Int[np.ndarray, "2 m"]:
    """Returns pairs of rows with equal digests."""
    high, low = np.ascontiguousarray(digests).view(np.uint64).T
    order = np.lexsort((low, high))
    same = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    return np.stack([order[:-1][same], order[1:][same]])


def _add_similar(found: _Groups, gray: np.ndarray, difference: float) -> None:
    """Joins the groups of rows whose thumbnails differ by up to `difference`.

    Only rows with a common key are compared: locality-sensitive hashing (Datar et al. 2004).
    """
    keys, contrast = _keys(gray)
    rows = np.flatnonzero(contrast)
    for key in keys.T:
        order = rows[np.argsort(key[rows], kind="stable")]
        key, at = key[order], np.arange(len(order))
        for ahead in range(1, _FOLLOWING + 1):
            at = at[at < len(key) - ahead]
            at = at[key[at] == key[at + ahead]]
            if not len(at):
                break
            one, other = order[at], order[at + ahead]
            apart = found.labels[one] != found.labels[other]
            one, other = one[apart], other[apart]
            alike = _alike(gray, one, other, difference)
            found.add(one[alike], other[alike])
        found.merge()


def _keys(gray: np.ndarray) -> tuple[UInt64[np.ndarray, "n keys"], Bool[np.ndarray, " n"]]:
    """Returns keys of thumbnails [n, 8, 9], and whether a thumbnail has contrast.

    A key is a hash of products of the thumbnail with random unit vectors. The products are rounded, so that thumbnails
    that differ little mostly have the same.
    """
    rng = np.random.default_rng(0)
    pixels = images.THUMBNAIL[0] * images.THUMBNAIL[1]
    directions = rng.choice(np.array([-1, 1], np.float32), (pixels, _KEYS * _PRODUCTS)) / np.float32(pixels**0.5)
    offsets = rng.uniform(0, _STEP, _KEYS * _PRODUCTS).astype(np.float32)
    factors = rng.integers(0, 1 << 63, (_KEYS, _PRODUCTS), np.uint64) * np.uint64(2) + np.uint64(1)
    keys, contrast = np.empty((len(gray), _KEYS), np.uint64), np.empty(len(gray), bool)
    for first in range(0, len(gray), _ROWS):
        part = slice(first, first + _ROWS)
        flat = np.asarray(gray[part], np.float32).reshape(-1, pixels)
        contrast[part] = flat.std(1) >= _CONTRAST
        steps = np.floor((flat @ directions + offsets) / _STEP).astype(np.int64).astype(np.uint64)
        keys[part] = (steps.reshape(-1, _KEYS, _PRODUCTS) * factors).sum(2)  # modulo 2^64
    return keys, contrast


def _alike(gray: np.ndarray, one: np.ndarray, other: np.ndarray, difference: float) -> Bool[np.ndarray, " m"]:
    """Returns whether the thumbnails of pairs of rows differ by up to `difference`."""
    alike = np.empty(len(one), bool)
    for first in range(0, len(one), _ROWS):
        part = slice(first, first + _ROWS)
        pair = gray[one[part]].astype(np.float32) - gray[other[part]]
        alike[part] = np.sqrt(np.square(pair).mean((1, 2))) <= difference
    return alike
