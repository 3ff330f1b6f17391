"""Files of a work directory: listing them, their sums, how they are written, and the lock of a folder's writer."""

import atexit
import concurrent.futures
import contextlib
import fnmatch
import functools
import hashlib
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from etils import epath

from geotoken_jax import processes
from geotoken_jax.errors import UserError

#: Seconds between two renewals of a lock, seconds without one after which its process is dead, and the number of times
#: that another process looks in these.
_RENEW_S, _DEAD_S, _LOOKS = 5.0, 30.0, 30
#: Path of a lock that this process holds -> its open file.
_held: dict[str, IO[str]] = {}
#: This machine in names of files. Two machines can have processes of the same number.
_MACHINE = f"{zlib.crc32(socket.gethostname().encode()):08x}"
#: Largest limit on open files that this package sets or uses.
_MOST_FILES = 65_536
#: Files that are read at a time to compute sums.
READERS = min(8, os.cpu_count() or 1)


class LockedError(UserError, RuntimeError):
    """Another process writes the same folder."""


def matching(folder: epath.PathLike, pattern: str) -> list[epath.Path]:
    """Returns the files of a folder with names of a pattern, such as *.npy, sorted; none if there is no such folder.

    The folder's own name is no pattern, unlike in `epath.Path.glob`: it can contain brackets and stars.
    """
    folder = epath.Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def partial(path: epath.PathLike) -> epath.Path:
    """Returns the path of a file while it is written. No two processes use the same."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.{processes.index()}.{_MACHINE}.{os.getpid()}.partial"


def commit(temporary: epath.PathLike, path: epath.PathLike) -> None:
    """Gives a file that is completely written its final name, so that it survives a crash of the machine.

    Without the first fsync, the name can reach the disk before the contents; the second one stores the name.
    """
    _sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":  # Windows cannot open folders
        _sync(os.path.dirname(os.path.abspath(path)))


def _sync(path: epath.PathLike) -> None:
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields the temporary path of a file; when the context ends, the file is at `path`, and after an error nowhere."""
    temporary = partial(path)
    try:
        yield temporary
        commit(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def raise_open_files_limit() -> None:
    """Lets this process open as many files as the system allows."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if open_files_limit() < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_files_limit() -> int:
    """Returns the number of files that this process may open."""
    try:
        import resource
    except ImportError:  # on Windows
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


def checksum(path: epath.PathLike) -> list[Any]:
    """Returns the size of a file in bytes, and its SHA-256 in hexadecimal: the form of ledgers and manifests."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return [file.tell(), digest.hexdigest()]


def checksums(folder: epath.PathLike, names: Iterable[str]) -> dict[str, list[Any]]:
    """Returns name -> size and SHA-256 for files of a folder. Several files are read at a time."""
    names = sorted(names)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(os.path.join(folder, name)), names), strict=True))


def files(folder: epath.PathLike, skipped: Iterable[str] = ()) -> list[str]:
    """Returns the paths of all files in a folder and its subfolders, relative to the folder, sorted.

    Hidden files and folders, such as locks and partial files, are left out. skipped: patterns of names of files and
    folders that are left out too.
    """
    names = []
    hidden = (".*", *skipped)
    for parent, folders, entries in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatchcase(name, p) for p in hidden)]
        kept = [name for name in entries if not any(fnmatch.fnmatchcase(name, p) for p in hidden)]
        names += [os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/") for name in kept]
    return sorted(names)


def lock(folder: epath.PathLike) -> None:
    """Makes this process the only one of its index that writes a folder, until it unlocks the folder or ends.

    The lock is a file with process and machine, which the system locks where it can, and whose time its process renews.
    A killed process loses the system's lock at once. On another machine, or on a file system without locks, a process
    is dead if it has not renewed the time for 30 seconds, for which this function then waits.

    Removes the partial files that an earlier process has left. Raises LockedError, with machine and process, if another
    process writes the folder.
    """
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if path in _held:
        return
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open while the folder is written)
        locked = _try(file)
        file.seek(0)
        other = file.read().strip()
        here = locked and other.endswith(f" on {socket.gethostname()}")
        if locked is False or (other and not here and _alive(path, other)):
            file.close()
            raise LockedError(
                f"{folder} is being written by {other or 'another process'}: wait until it ends, or use another "
                f"--workdir; if it no longer runs, remove {path}"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its owner has removed it in the meantime
    file.truncate(0)
    file.write(_name() + "\n")
    file.flush()
    if not locked and not _claimed(path):
        file.close()
        raise LockedError(f"{folder} is being written by another process: wait until it ends")
    _held[path] = file
    _start_renewing()
    for parent, _, names in os.walk(os.path.dirname(path)):
        for name in fnmatch.filter(names, f".*.{processes.index()}.*.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(parent, name))


def unlock(folder: epath.PathLike) -> None:
    """Releases the lock of a folder, if this process holds it."""
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if file := _held.pop(path, None):
        with contextlib.suppress(OSError):
            if _owner(path) == _name():
                os.unlink(path)
        file.close()


def _name() -> str:
    """Returns the name of this process in locks and messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _owner(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # NFS renews what it knows of a file when the file is opened
        return file.read().strip()


def _alive(path: str, owner: str) -> bool:
    """Returns whether a lock's owner renews its time, or another process takes it, within _DEAD_S seconds.

    Only differences are looked at, since the clocks of two machines differ.
    """
    print(f"{owner} has begun {os.path.dirname(path)}: waiting up to {_DEAD_S:g} s to see if it runs", file=sys.stderr)
    before = None
    for _ in range(_LOOKS):
        try:
            with open(path, encoding="utf-8") as file:
                now = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:  # it has ended
            return False
        if before and now != before:
            return True
        before = now
        time.sleep(_DEAD_S / _LOOKS)
    return False


def _claimed(path: str) -> bool:
    """Returns whether a lock of a file system without locks is still ours after others could have taken it too."""
    time.sleep(_DEAD_S / _LOOKS)
    with contextlib.suppress(FileNotFoundError):
        return _owner(path) == _name()
    return False


@functools.cache
def _start_renewing() -> None:
    threading.Thread(target=_renew, name="lock", daemon=True).start()


def _renew() -> None:
    """Renews the times of this process's locks."""
    while True:
        for path in list(_held):
            with contextlib.suppress(OSError):
                if _owner(path) == _name():
                    os.utime(path)
        time.sleep(_RENEW_S)


def writers(folder: epath.PathLike) -> list[int]:
    """Returns the indices of the other processes that write a folder now."""
    return [int(path.name.rpartition(".")[2]) for path in matching(folder, ".lock.*") if _is_held(path)]


def _is_held(path: epath.Path) -> bool:
    """Returns whether another process holds a lock.

    Where the system cannot tell, as on another machine, the lock's time is compared with the time of this process's
    own lock in the folder, which is renewed as often.
    """
    own = path.parent / f".lock.{processes.index()}"
    if path == own:
        return False
    try:
        with open(path, "r+", encoding="utf-8") as file:
            owner = file.read().strip()
            locked = _try(file) if owner else False  # an empty lock is being taken: do not disturb
            if locked is not None and owner.endswith(f" on {socket.gethostname()}"):
                return not locked
            return locked is False or os.stat(own).st_mtime - os.fstat(file.fileno()).st_mtime < _DEAD_S
    except FileNotFoundError:
        return False


def _try(file: Any) -> bool | None:
    """Returns whether this process now holds the system's lock of an open file; None if there are no such locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@atexit.register
def _unlock_all() -> None:
    for path in list(_held):
        unlock(os.path.dirname(path))
