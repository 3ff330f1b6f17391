"""Benchmarks: photos with known coordinates that are evaluated only. Each benchmark becomes a split of its own.

A benchmark is a folder of photos, and usually a table with their ids and coordinates: IM2GPS3K, YFCC4K, YFCC26k,
commons26, or the user's own.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data_prep.csv_rows import read_rows
from data_prep.extended import kept_shards
from data_prep.sources import UNKNOWN, Drop, FileSource, GrowingSource, NotedSource, Photo, Provenance, Readable, Source
from data_prep.sources.folder import OPTIONAL, ListedSource, Listing, existing_file, files_of
from data_prep.sources.matching import pair
from data_prep.sources.yfcc import INFO
from geotoken_jax import settings, tables
from geotoken_jax.backbone.preprocess import ENDINGS
from geotoken_jax.manifests import StageError
from geotoken_jax.preparation import BenchmarkSettings

#: Field -> accepted names of its column in config.benchmarks.photos.NAME.authors, a table of photos and their authors.
_AUTHORS = {"id": tables.COLUMNS["id"], "author": ("author", "ownernsid")}
#: Name of the only split of a benchmark. If the benchmark is prepared together with a source, its split is named after
#: the benchmark instead.
_SPLIT = "test"


@dataclasses.dataclass(frozen=True)
class Benchmark(ListedSource):
    """A benchmark as a source of photos. All its photos are in one split, in the order of the table."""

    name: str
    settings: BenchmarkSettings
    provenance = UNKNOWN

    @property
    def section(self) -> str:
        return f"benchmarks.photos.{self.name}"

    @property
    def places(self) -> tuple[str, str]:
        return self.settings.path, self.settings.table

    def listing(self) -> Listing:
        options = self.settings
        files = files_of(options.path, f"{self.section}.path")
        if options.table:
            rows = self._rows()
        else:
            rows = (Photo(name, name, b"", math.nan, math.nan) for name in files.photos())
        photos = list(pair(rows, files, lambda name: name))
        if not photos:
            raise StageError(
                f"config.{self.section}.path is {options.path!r}, which has no photos: set it to a folder with files "
                f"that end in {', '.join(ENDINGS)}"
            )
        return Listing({_SPLIT: photos}, options.photos_per_shard, exif=not options.table)

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes, and "settings" -> the benchmark's settings."""
        authors = self.settings.authors
        sums = super().fingerprint()
        if authors:
            sums[authors] = str(existing_file(authors, f"{self.section}.authors").stat().st_size)
        return {**sums, "settings": json.dumps(settings.plain(self.settings), sort_keys=True)}

    def _rows(self) -> list[Photo | Drop]:
        """Returns the rows of the table. If a row has no author, the table of authors can supply it."""
        options = self.settings
        table = existing_file(options.table, f"{self.section}.table")
        if table.suffix == ".txt":
            rows = read_rows(table, INFO)
        else:
            optional = {**OPTIONAL, "author": options.author} if options.author else OPTIONAL
            only = {"split": options.rows} if options.rows else {}
            rows = read_rows(table, tables.COLUMNS, optional, only)
        rows = list(rows)
        if not options.authors:
            return rows
        named = _authors(existing_file(options.authors, f"{self.section}.authors"), (row.id for row in rows))
        return [
            dataclasses.replace(row, author=named.get(_key(row.id), row.author))
            if isinstance(row, Photo) and row.author == row.id
            else row
            for row in rows
        ]


def _authors(path: Path, ids: Iterable[str]) -> dict[str, str]:
    """Reads a table of authors. Returns key of a photo (see `_key`) -> its author, without photos that are not in it.

    path: path of the table: a CSV, or a .txt file with the columns of YFCC100M. ids: ids of the photos.
    """
    wanted, found = {_key(name) for name in ids}, {}
    positions = {name: INFO[name] for name in ("id", "author")}
    listed = tables.read_positions(path, positions) if str(path).endswith(".txt") else tables.read(path, _AUTHORS)
    for row in listed:
        name = _key(str(row.values.get("id", "")))
        if name in wanted and row.values["author"]:
            found[name] = str(row.values["author"])
    return found


def _key(name: str) -> str:
    """Returns a photo's file name without folder and .jpg. Two tables can name the same photo in different forms."""
    stem = name.replace("\\", "/").rpartition("/")[2]
    return stem[: -len(".jpg")] if stem.lower().endswith(".jpg") else stem


@dataclasses.dataclass(frozen=True)
class WithBenchmarks:
    """A source with benchmarks as further splits. The split of a benchmark has the benchmark's name.

    Benchmarks can be added later with `geotoken prepare --update`, like photos.
    """

    source: Source
    benchmarks: tuple[Benchmark, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def provenance(self) -> Provenance:
        return self.source.provenance

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> number of shards. Raises StageError if a benchmark has the name of a split of the source."""
        splits = dict(self.source.splits)
        for benchmark in self.benchmarks:
            if benchmark.name in splits:
                raise StageError(
                    f"config.benchmarks.photos.{benchmark.name} has the name of a split of the source "
                    f"{self.source.name}: use another name"
                )
            splits[benchmark.name] = benchmark.splits[_SPLIT]
        return splits

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        """Yields one shard's photos and drops."""
        return _read(self.source, self.benchmarks, split, shard)

    def notes(self) -> Iterator[str]:
        """Yields sentences on files that are left out, for messages."""
        for source in (self.source, *self.benchmarks):
            if isinstance(source, NotedSource):
                yield from source.notes()

    def of_source(self) -> dict[str, str]:
        """Returns the fingerprint of the source without benchmarks."""
        return self.source.fingerprint() if isinstance(self.source, FileSource) else {}

    def fingerprint(self) -> dict[str, str]:
        """Returns file -> text that changes if the file changes."""
        of_benchmarks = {
            f"benchmark {benchmark.name}: {file}": text
            for benchmark in self.benchmarks
            for file, text in benchmark.fingerprint().items()
        }
        return {**self.of_source(), **of_benchmarks}

    def has_rows_added(self, file: str, before: str) -> bool:
        """Returns whether rows were added at the end of a table of the source, and nothing else in it has changed."""
        return isinstance(self.source, GrowingSource) and self.source.has_rows_added(file, before)

    def takes(self, file: str) -> bool:
        """Returns whether a new file may be added: files of benchmarks may, and files that the source supports."""
        return file not in self.of_source() or (isinstance(self.source, GrowingSource) and self.source.takes(file))

    def added(self, before: str) -> Readable:
        """Returns the new benchmarks and the new photos of the source. before: see GrowingSource."""
        added = self.source.added(before) if isinstance(self.source, GrowingSource) else None
        return _Added(added, tuple(one for one in self.benchmarks if one.name not in kept_shards(before)))


@dataclasses.dataclass(frozen=True)
class _Added:
    """New photos of a source, and new benchmarks.

    source: the new photos; None if the source supports no additions. benchmarks: the new benchmarks.
    """

    source: Readable | None
    benchmarks: tuple[Benchmark, ...]

    @property
    def splits(self) -> Mapping[str, int]:
        of_source = self.source.splits if self.source else {}
        return {**of_source, **{benchmark.name: benchmark.splits[_SPLIT] for benchmark in self.benchmarks}}

    def read(self, split: str, shard: int) -> Iterator[Photo | Drop]:
        return _read(self.source, self.benchmarks, split, shard)


def _read(source: Readable | None, benchmarks: Iterable[Benchmark], split: str, shard: int) -> Iterator[Photo | Drop]:
    """Returns one shard's photos and drops: from the benchmark if the split has its name, else from the source."""
    for benchmark in benchmarks:
        if benchmark.name == split:
            return benchmark.read(_SPLIT, shard)
    assert source is not None
    return source.read(split, shard)
