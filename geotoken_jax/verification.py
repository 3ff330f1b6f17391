"""Compares the files of a work directory with the sizes and the SHA-256 that its manifests and ledgers record."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import disk, manifests
from geotoken_jax.manifests import StageError
from geotoken_jax.workdir import Workdir

#: Verbs for which `geotoken verify --mend` makes only the bad files again, because their folders consist of shards.
MENDED = ("prepare", "embed", "index")


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of comparing the files of a folder.

    folder: name of the folder in the work directory. files: number of recorded files. size: sum of their sizes in
    bytes. bad: path of a bad file in the folder -> reason, such as "is missing". complete: whether the folder's stage
    has finished.
    """

    folder: str
    files: int
    size: int
    bad: dict[str, str]
    complete: bool

    @property
    def verb(self) -> str:
        """The verb of `geotoken` that makes the folder."""
        return manifests.PATH[self.folder.split("/")[0]]

    def lines(self) -> list[str]:
        """Returns one line on the folder, and one per bad file."""
        if not self.files and not self.bad:
            return [f"{self.folder + '/':32} cannot be checked, because an earlier release made it without checksums"]
        state = f"{len(self.bad):,} bad" if self.bad else "ok"
        end = "" if self.complete else "; not complete"
        first = f"{self.folder + '/':32} {state}: {self.files:,} files, {self.size / 1e9:,.3f} GB{end}"
        return [first, *(f"  {self.folder}/{name} {reason}" for name, reason in self.bad.items())]


def check(workdir: Workdir) -> Iterator[Report]:
    """Yields a report per folder of a work directory, in the order of the stages."""
    folders = [folder for folder in workdir.begun_folders() if folder.split("/")[0] in manifests.PATH]
    order = list(manifests.PATH)
    for folder in sorted(folders, key=lambda folder: (order.index(folder.split("/")[0]), folder)):
        yield check_folder(workdir, folder)


def check_folder(workdir: Workdir, folder: str) -> Report:
    """Returns the report on a folder. A folder that is not complete is compared with the ledgers of its shards."""
    path, bad = workdir.path / folder, {}
    complete = (path / "manifest.json").exists()
    try:
        recorded = workdir.manifest(folder).files if complete else manifests.recorded(path)
        complete = complete or manifests.is_mended(path)
    except StageError as error:
        recorded, bad = {}, {"manifest.json": f"cannot be used: {error}"}
    bad |= _bad(path, recorded)
    return Report(folder, len(recorded), sum(size for size, _ in recorded.values()), bad, complete)


def _bad(path: epath.Path, recorded: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Returns path -> reason for the bad files of a folder. recorded: path in the folder -> size and SHA-256."""

    def compare(name: str) -> str:
        size, digest = recorded[name]
        file = path / name
        try:
            found = os.stat(file).st_size
            if found != size:
                return f"has {found:,} bytes, not {size:,}"
            return "" if disk.checksum(file)[1] == digest else "has other contents than were written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    with concurrent.futures.ThreadPoolExecutor(disk.READERS) as pool:
        reasons = zip(sorted(recorded), pool.map(compare, sorted(recorded)), strict=True)
        return {name: reason for name, reason in reasons if reason}


def refusal(workdir: Workdir, bad: Sequence[Report]) -> StageError:
    """Returns the error for a work directory with bad files. bad: reports on the folders with bad files."""
    files = sum(len(report.bad) for report in bad)
    verbs = list(dict.fromkeys(report.verb for report in bad))
    mendable = [verb for verb in verbs if verb in MENDED]
    others = [verb for verb in verbs if verb not in MENDED]
    cures = []
    if mendable:
        cures.append(f"make them again with `geotoken verify {workdir.path} --mend --config=FILE`")
    cures += [f"make {report.folder} again: remove it, and run its audit" for report in bad if report.verb == "audit"]
    cures += [f"make all of it again with `geotoken all --remake={verb}`" for verb in others if verb != "audit"]
    return StageError(f"{files:,} files of {workdir.path} are bad, as listed: restore them, or {', and '.join(cures)}")
