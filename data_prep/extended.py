"""Adds new photos of a source to a complete photos/, for `geotoken prepare --update`.

The earlier shards of photos/ are kept, and the new photos get shards of their own. Photos that were accepted or dropped
earlier are not read again, with one exception. A table row whose image was missing, or an image whose table row was
missing, counts as new if the missing one is there now.
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

#: Reasons of drops that end when the missing row, image or part of an image is added to the source.
INCOMPLETE = ("no image", "no metadata", "truncated")


@dataclasses.dataclass(frozen=True)
class Extended:
    """A source whose first shards are the earlier shards of photos/, followed by shards of the new photos.

    Only the new shards can be read. source: source of all photos. before: folder that contains the files which photos/
    had before the update.
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
        """Split -> number of shards, earlier and new ones together."""
        kept, added = kept_shards(self.before), self._added.splits
        return {split: kept.get(split, 0) + added.get(split, 0) for split in {**kept, **added}}

    @property
    def _added(self) -> Readable:
        return _added(self.source, self.before)

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields the photos and drops of a new shard. shard: number in the split; earlier shards have lower numbers."""
        return self._added.read(split, shard - kept_shards(self.before).get(split, 0))


@functools.lru_cache(maxsize=1)
def _added(source: GrowingSource, before: str) -> Readable:
    return source.added(before)


@functools.lru_cache(maxsize=1)
def kept_shards(before: str) -> dict[str, int]:
    """Returns split -> number of shards. before: folder that contains the files of photos/."""
    shards: dict[str, int] = {}
    for ledger in disk.matching(os.path.join(before, LEDGERS), "*.array_record-?????-of-?????.json"):
        split = ledger.name.partition(".array_record-")[0].rpartition("-")[2]
        shards[split] = shards.get(split, 0) + 1
    return shards


def forget() -> None:
    """Clears the caches, so that the next call looks for new photos again."""
    _added.cache_clear()
    kept_shards.cache_clear()


@dataclasses.dataclass(frozen=True)
class Known:
    """Photos and drops of the earlier shards.

    ids: ids of the accepted photos. dropped: id of a dropped photo -> reasons for which it was dropped.
    """

    ids: frozenset[str]
    dropped: Mapping[str, frozenset[str]]

    @classmethod
    def load(cls, before: str, splits: Iterable[str]) -> "Known":
        """Reads the ledgers of the given splits. before: folder that contains the files of photos/."""
        folder, ids, dropped = epath.Path(before) / LEDGERS, set(), {}
        for split in splits:
            for path in disk.matching(folder, f"*-{split}.array_record-*.ids.npy"):
                ids.update(np.char.decode(records.open_array(path)).tolist())
            for path in disk.matching(folder, f"*-{split}.array_record-?????-of-?????.json"):
                for name, reason in json.loads(path.read_bytes())["dropped"]:
                    dropped[name] = dropped.get(name, frozenset()) | {reason}
        return cls(frozenset(ids), dropped)

    def has(self, item: Photo | Drop) -> bool:
        """Returns whether the earlier shards have this photo or drop, so that it is not new.

        A photo that was dropped for a reason in INCOMPLETE only is new.
        """
        name = item.id.encode(errors="backslashreplace").decode()
        reasons = self.dropped.get(name, frozenset())
        if isinstance(item, Drop):
            return item.reason in reasons
        return name in self.ids or bool(reasons.difference(INCOMPLETE))
