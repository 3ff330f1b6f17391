"""Takes in photos that were added to a source.

Shards that were made before are kept, and the added photos get shards of their own. Photos and drops that were known
before are never read again. A row without an image and an image without a row count as added if the other one has come.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from etils import epath

from data_prep.sources import Drop, GrowingSource, Photo, Provenance, Readable
from geotoken_jax import disk, records
from geotoken_jax.manifests import LEDGERS

#: Reasons of drops that an added row or image ends.
INCOMPLETE = ("no image", "no metadata", "truncated")


@dataclasses.dataclass(frozen=True)
class Extended:
    """A source with the shards made before, which cannot be read again, and then the shards of the added photos.

    source: source of all photos. before: folder with the files of photos/ before.
    """

    source: GrowingSource
    before: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def provenance(self) -> Provenance:
        return self.source.provenance

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards, kept and new."""
        kept, added = kept_shards(self.before), self._added.splits
        return {split: kept.get(split, 0) + added.get(split, 0) for split in {**kept, **added}}

    @property
    def _added(self) -> Readable:
        return _added(self.source, self.before)

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields the photos and drops of a new shard."""
        return self._added.read(split, shard - kept_shards(self.before).get(split, 0))


@functools.lru_cache(maxsize=1)
def _added(source: GrowingSource, before: str) -> Readable:
    return source.added(before)


@functools.lru_cache(maxsize=1)
def kept_shards(before: str) -> dict[str, int]:
    """Returns split -> number of shards in a folder with the files of photos/."""
    shards: dict[str, int] = {}
    for ledger in disk.matching(os.path.join(before, LEDGERS), "*.array_record-?????-of-?????.json"):
        split = ledger.name.partition(".array_record-")[0].rpartition("-")[2]
        shards[split] = shards.get(split, 0) + 1
    return shards


def forget() -> None:
    """Makes sources find the added photos again, which may be others."""
    _added.cache_clear()
    kept_shards.cache_clear()


@dataclasses.dataclass(frozen=True)
class Known:
    """Photos and drops of the shards that were made before. ids: accepted photos. dropped: id -> its reasons."""

    ids: frozenset[str]
    dropped: Mapping[str, frozenset[str]]

    @classmethod
    def load(cls, before: str, splits: Iterable[str]) -> "Known":
        """Reads the ledgers of some splits in a folder with the files of photos/."""
        folder, ids, dropped = epath.Path(before) / LEDGERS, set(), {}
        for split in splits:
            for path in disk.matching(folder, f"*-{split}.array_record-*.ids.npy"):
                ids.update(np.char.decode(records.open_array(path)).tolist())
            for path in disk.matching(folder, f"*-{split}.array_record-?????-of-?????.json"):
                for name, reason in json.loads(path.read_bytes())["dropped"]:
                    dropped[name] = dropped.get(name, frozenset()) | {reason}
        return cls(frozenset(ids), dropped)

    def has(self, item: Photo | Drop) -> bool:
        """Returns whether a photo or drop was known before, and is the same now."""
        name = item.id.encode(errors="backslashreplace").decode()
        reasons = self.dropped.get(name, frozenset())
        if isinstance(item, Drop):
            return item.reason in reasons
        return name in self.ids or bool(reasons.difference(INCOMPLETE))
