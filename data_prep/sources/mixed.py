"""Several sources as one: their photos are in one data set, each with the name of its source.

The name of the source and `/` are put before each id, so that ids of different sources differ. The origin of the source
and `/` are put before each author: people of the same name in two sources are different authors, unless the sources
have the same origin.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.sources import Drop, FileSource, NotedSource, Photo, Provenance, Source
from geotoken_jax.preparation import SourceSettings, keys_of


@dataclasses.dataclass(frozen=True)
class Member:
    """One of several sources. name: name in config.photos.sources. kind, origin: see SourceSettings."""

    name: str
    kind: str
    origin: str
    source: Source

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards."""
        with keys_of(self.name, self.kind):
            return self.source.splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops, with the name of the source before their ids."""
        with keys_of(self.name, self.kind):
            for item in self.source.read(split, shard):
                changes: dict[str, Any] = {"id": f"{self.name}/{item.id}" if item.id else ""}
                if isinstance(item, Photo):
                    unknown = item.author in ("", item.id)
                    changes["author"] = changes["id"] if unknown else f"{self.origin}/{item.author}"
                    changes["source"] = self.name
                yield dataclasses.replace(item, **changes)

    def notes(self) -> Iterator[str]:
        """Yields sentences on files that are left out, for messages."""
        if isinstance(self.source, NotedSource):
            yield from (f"{self.name}: {note}" for note in self.source.notes())

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes."""
        if not isinstance(self.source, FileSource):
            return {}
        with keys_of(self.name, self.kind):
            return {f"{self.name}: {file}": text for file, text in self.source.fingerprint().items()}


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Several sources as one source of photos (`data_prep.sources.Source`).

    Shards of a split are shards of its first source, then of the next one. members: the sources, sorted by name.
    """

    members: tuple[Member, ...]
    name = "mixed"

    @classmethod
    def of(cls, sources: Mapping[str, Source], settings: Mapping[str, SourceSettings]) -> "Mixed":
        """Returns sources as one. sources: name -> source. settings: name -> config.photos.sources.NAME."""
        return cls(tuple(Member(name, of.kind, of.origin, sources[name]) for name, of in sorted(settings.items())))

    @property
    def provenance(self) -> Provenance:
        """Origin and terms of the photos: the sentences of all sources. The license is "other" if licenses differ."""
        stated = [member.source.provenance for member in self.members]
        licenses = {one.license for one in stated}
        texts = (dict.fromkeys(getattr(one, field) for one in stated) for field in ("origin", "terms", "citation"))
        origin, terms, citation = (" ".join(text for text in of if text) for of in texts)
        return Provenance(licenses.pop() if len(licenses) == 1 else "other", origin, terms, citation)

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards."""
        splits: dict[str, int] = {}
        for member in self.members:
            for split, shards in member.splits.items():
                splits[split] = splits.get(split, 0) + shards
        return splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops. All of them are of one source."""
        for member in self.members:
            shards = member.splits.get(split, 0)
            if shard < shards:
                yield from member.read(split, shard)
                return
            shard -= shards

    def notes(self) -> Iterator[str]:
        """Yields sentences on files that are left out, for messages."""
        for member in self.members:
            yield from member.notes()

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes. Each file has the name of its source before it."""
        return {file: text for member in self.members for file, text in member.fingerprint().items()}
