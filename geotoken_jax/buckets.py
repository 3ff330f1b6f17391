"""A work directory in a bucket: a copy on a local disk, which stages read and fill, and what keeps the two equal.

ArrayRecord reads and NumPy maps local files only, and Orbax 0.12.8 writes to no bucket but gs://, so every stage works
on the copy. What has changed in the bucket is fetched before a stage; what the stage changes goes there while it works,
a manifest after all that it speaks of. So any machine goes on where another one was stopped.
"""

import contextlib
import json
import logging
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from geotoken_jax import processes, workdir
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import StageError

T = TypeVar("T")
#: Seconds between two looks at what has changed here, and so what a machine that vanishes may take with it.
EVERY = 30.0
#: Verb -> the large folders that it does not read, and that are not fetched for it.
_UNREAD = {
    "index": ("photos",),
    "train": ("photos", "features"),
    "learn": ("photos", "features"),
    "export": ("photos", "features", "tokens"),
}
#: In the copy: name -> [mark of the bucket's file, size and time of the copy's] when the two were equal.
_INDEX = ".bucket.json"
#: Files that are being written: ours, and Orbax's.
_UNFINISHED = re.compile(r"\.partial$|\.orbax-checkpoint-tmp")


@contextlib.contextmanager
def mirrored(folder: str | None, verb: str, read: Sequence[str] = ()) -> Iterator[str | None]:
    """Gives the copy of a work directory in a bucket, and keeps the two equal; any other folder as it is.

    folder: may be a URL such as s3://bucket/run or gs://bucket/run; its copy is in `runs/buckets`, or where
    GEOTOKEN_BUCKETS says. verb: what is to be done there; read: large folders that it reads this time, though it seldom
    does. Raises SettingsError if the URL cannot be a work directory, and StageError if the bucket cannot be read or
    written.
    """
    if folder is None or not workdir.is_url(folder):
        yield folder
        return
    mirror = _Mirror(_checked(folder.rstrip("/")))
    mirror.fetch(tuple(name for name in _UNREAD.get(verb, ()) if name not in read))
    ended = threading.Event()
    pushes = threading.Thread(target=mirror.push_until, args=(ended,), daemon=True)
    pushes.start()
    try:
        yield str(mirror.copy)
    except Exception as error:  # the user knows the folder by its URL
        error.args = tuple(a.replace(str(mirror.copy), mirror.url) if isinstance(a, str) else a for a in error.args)
        raise
    finally:
        ended.set()
        pushes.join()
        mirror.push()


def _checked(url: str) -> str:
    match = re.fullmatch(r"[a-z0-9]+://([^/]+)(/[^/?#]+)*", url)
    if "@" in url or "?" in url:  # neither is shown: a key may be in it
        raise SettingsError(
            "--workdir has a user, a key or a question mark in its URL: write it as in s3://bucket/run, and give "
            "credentials as the provider's own tools take them (environment, file, or the machine's role)"
        )
    if match is None or ".." in url.split("/"):
        raise SettingsError(f"--workdir={url} is not the URL of a folder in a bucket: write it as in s3://bucket/run")
    if processes.count() > 1:
        raise SettingsError(
            f"--workdir={url} serves one process, which uses all accelerators of its machine, and there are "
            f"{processes.count()}: mount the bucket, or use a file system that all of them share"
        )
    return url


class _Mirror:
    """A folder in a bucket and its copy."""

    def __init__(self, url: str):
        import fsspec  # only who asks for a bucket waits for it

        scheme, _, rest = url.partition("://")
        self.url, self.copy = url, Path(os.environ.get("GEOTOKEN_BUCKETS", "runs/buckets"), scheme, rest).resolve()
        try:
            self._bucket, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            fix = f"pip install 'geotoken-jax[{scheme}]'" if scheme in ("s3", "gs") else "use s3:// or gs://"
            raise SettingsError(f"--workdir={url} cannot be reached ({error}): {fix}") from error
        self._root = f"{root}/"
        index = self.copy / _INDEX
        self._index: dict[str, list] = json.loads(index.read_text()) if index.exists() else {}
        self._here: set[str] = set()  # what has been in the copy since this began

    def fetch(self, unread: tuple[str, ...]) -> None:
        """Brings what has changed in the bucket. unread: folders that stay as they are, but for their manifests."""

        def read(name: str) -> bool:
            return _top(name) not in unread or name.endswith("manifest.json")

        self.copy.mkdir(parents=True, exist_ok=True)
        with self._reaching("read and written"):
            # A bucket that cannot be written to is noticed now, not when there is something to lose.
            self._bucket.pipe_file(f"{self._root}.writable", b"")
            self._bucket.rm_file(f"{self._root}.writable")
        there = {name: info for name, info in self._there().items() if read(name)}
        known = {name for name, info in there.items() if self._index.get(name, [None])[0] == _mark(info)}
        missed = {name for name in self._index.keys() - there.keys() if read(name)}
        elsewhere = {_top(name) for name in (there.keys() - known) | missed}
        for name in self._files().keys() - there.keys():
            # Another machine went on without it; else it is of this one, which ended before it was pushed.
            if read(name) and _top(name) in elsewhere:
                (self.copy / name).unlink()
        for name in missed:
            del self._index[name]
        wanted = [name for name in there if name not in known or not (self.copy / name).exists()]
        if wanted:
            with Progress(f"fetch {self.url}", sum(there[name]["size"] for name in wanted), "B") as progress:
                for name, state in zip(wanted, self._each(self._fetch_file, wanted, "read"), strict=True):
                    self._index[name] = [_mark(there[name]), *state]
                    progress.add(there[name]["size"])
        self._here = set(self._files())
        self._save_index()

    def _fetch_file(self, name: str) -> list[int]:
        beside = self.copy / f"{name}.partial"
        beside.parent.mkdir(parents=True, exist_ok=True)
        self._bucket.get_file(self._root + name, str(beside))
        beside.replace(self.copy / name)
        return _state(self.copy / name)

    def push_until(self, ended: threading.Event) -> None:
        """Pushes now and then; a failure is said in the log, and tried again."""
        while not ended.wait(EVERY):
            try:
                self.push()
            except StageError as error:
                logging.warning("%s", error)

    def push(self) -> None:
        """Brings to the bucket what has changed here, and removes there what has been removed here."""
        manifests = {name for name in self._files() if name.endswith("manifest.json")}
        files = self._files()  # found after the manifests: all that those speak of is among these
        changed = [name for name, state in files.items() if self._index.get(name, [None])[1:] != state]
        first = [name for name in changed if not name.endswith("manifest.json")]
        last = [name for name in changed if name in manifests]
        for names in (first, last):
            list(self._each(self._push_file, names, "written"))
        gone = list(self._here - files.keys())  # old checkpoints, after those that replace them
        for name in self._each(self._remove_file, gone, "written"):
            self._index.pop(name, None)
        self._here = set(files)
        if changed or gone:
            there = self._there()
            self._index |= {name: [_mark(there[name]), *files[name]] for name in first + last if name in there}
            self._save_index()

    def _push_file(self, name: str) -> None:
        try:
            self._bucket.put_file(str(self.copy / name), self._root + name)
        except FileNotFoundError:
            if (self.copy / name).exists():  # else of a checkpoint that has been replaced meanwhile
                raise

    def _remove_file(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            self._bucket.rm_file(self._root + name)
        return name

    def _there(self) -> dict[str, dict[str, Any]]:
        """Returns name -> what the bucket says of every file of the folder there."""
        with self._reaching("read"):
            found = self._bucket.find(self._root, detail=True)
        return {name.removeprefix(self._root): info for name, info in found.items()}

    def _files(self) -> dict[str, list[int]]:
        """Returns name -> state of every file of the copy that is not being written."""
        found = {}
        for folder, _, names in os.walk(self.copy):
            for path in (Path(folder, name) for name in names if name != _INDEX):
                name = path.relative_to(self.copy).as_posix()
                if not _UNFINISHED.search(name):
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = _state(path)
        return found

    def _save_index(self) -> None:
        workdir.write_bytes(epath.Path(self.copy / _INDEX), json.dumps(self._index).encode())

    def _each(self, do: Callable[[str], T], names: Iterable[str], what: str) -> Iterator[T]:
        with self._reaching(what), ThreadPoolExecutor(8) as pool:
            yield from pool.map(do, names)

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the provider's library, which has its own for each
            cause = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise StageError(
                f"{self.url} cannot be {what} ({cause}): look at its name, the network and the credentials; what is "
                f"not there yet is in {self.copy}, and the same command goes on"
            ) from error


def _top(name: str) -> str:
    return name.split("/")[0]


def _mark(info: dict[str, Any]) -> str:
    """Returns what differs after a file in a bucket has been written again."""
    return str(info.get("ETag") or info.get("etag") or info.get("created"))


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
