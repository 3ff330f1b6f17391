"""Handles the files of a work directory: lists them, computes checksums, writes them atomically and locks folders."""

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

#: The owner of a lock renews it every _RENEW_S seconds. If a lock was not renewed for _DEAD_S seconds, its owner is
#: dead. A process that waits for this checks the lock _CHECKS times.
_RENEW_S, _DEAD_S, _CHECKS = 5.0, 30.0, 30
#: Path of the file of a lock that this process holds -> the file, opened.
_held_locks: dict[str, IO[str]] = {}
#: Short name of this machine, for names of files. Processes on two machines can have the same number.
_MACHINE = f"{zlib.crc32(socket.gethostname().encode()):08x}"
#: Largest limit on open files that this package sets or uses.
_MOST_FILES = 65_536
#: Number of files that are read at the same time to compute checksums.
READERS = min(8, os.cpu_count() or 1)


class LockedError(UserError, RuntimeError):
    """Another process writes the same folder."""


def matching(folder: epath.PathLike, pattern: str) -> list[epath.Path]:
    """Returns the paths in a folder whose names match a pattern, such as *.npy, sorted; [] if there is no folder.

    Only names in the folder are compared with the pattern. `epath.Path.glob` would compare the folder's path too, which
    may contain brackets and stars.
    """
    folder = epath.Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def partial(path: epath.PathLike) -> epath.Path:
    """Returns the temporary path at which this process writes a file. It is different for every process."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.{processes.index()}.{_MACHINE}.{os.getpid()}.partial"


def commit(temporary: epath.PathLike, path: epath.PathLike) -> None:
    """Renames a complete file to its final name. Afterwards the file survives a crash of the machine.

    The first fsync stores the contents. Without it, the disk could store the name before the contents. The second
    fsync, of the folder, stores the name.
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
    """Yields a temporary path. When the context ends, renames the file there to `path`; after an error, removes it."""
    temporary = partial(path)
    try:
        yield temporary
        commit(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def raise_open_files_limit() -> None:
    """Lets this process open as many files as the system allows, up to _MOST_FILES."""
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
    """Returns [size in bytes, SHA-256 in hexadecimal] of a file, as ledgers and manifests store them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return [file.tell(), digest.hexdigest()]


def checksums(folder: epath.PathLike, names: Iterable[str]) -> dict[str, list[Any]]:
    """Returns name -> `checksum` of each file, for files in a folder. Several files are read at the same time."""
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
    """Locks a folder, so that no other process writes it until this process unlocks the folder or ends.

    If a stage runs in several processes that share a folder, each process locks it for its own index (processes.index).

    The lock is a file that contains its owner: a process and the machine on which it runs. In addition, the operating
    system locks this file, if the file system supports locks. If the owner is killed, the operating system releases its
    lock at once. If the owner is on another machine, or if the file system has no locks, the time of the file decides:
    the owner renews it every 5 seconds, and this function waits up to 30 seconds for a renewal. Without a renewal, the
    owner is dead, and this process takes the lock.

    Removes the partial files of earlier processes. Raises LockedError, with machine and process, if another process
    writes the folder.
    """
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if path in _held_locks:
        return
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open while the folder is written)
        locked = _try_lock(file)
        file.seek(0)
        other = file.read().strip()
        here = locked and other.endswith(f" on {socket.gethostname()}")
        if locked is False or (other and not here and _is_renewed(path, other)):
            file.close()
            raise LockedError(
                f"{folder} is being written by {other or 'another process'}: wait until it ends, or use another "
                f"--workdir; if it no longer runs, remove {path}"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # the previous owner has removed the file in the meantime
    file.truncate(0)
    file.write(_process_name() + "\n")
    file.flush()
    if not locked and not _is_owned(path):
        file.close()
        raise LockedError(f"{folder} is being written by another process: wait until it ends")
    _held_locks[path] = file
    _start_renewing()
    for parent, _, names in os.walk(os.path.dirname(path)):
        for name in fnmatch.filter(names, f".*.{processes.index()}.*.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(parent, name))


def unlock(folder: epath.PathLike) -> None:
    """Releases the lock of a folder, if this process holds it."""
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if file := _held_locks.pop(path, None):
        with contextlib.suppress(OSError):
            if _owner(path) == _process_name():
                os.unlink(path)
        file.close()


def _process_name() -> str:
    """Returns the name of this process in locks and messages, e.g. "process 4711 on host1"."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _owner(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # NFS reads a file from the server again when it is opened
        return file.read().strip()


def _is_renewed(path: str, owner: str) -> bool:
    """Returns whether the file of a lock changes within _DEAD_S seconds.

    The file changes if its owner renews its time, or if another process takes the lock. The time is compared with the
    file's earlier time, not with the clock of this machine, because the clocks of two machines differ.
    """
    print(
        f"{owner} has locked {os.path.dirname(path)}: waiting up to {_DEAD_S:g} s to see if this process still runs",
        file=sys.stderr,
    )
    before = None
    for _ in range(_CHECKS):
        try:
            with open(path, encoding="utf-8") as file:
                now = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:  # the owner has released the lock
            return False
        if before and now != before:
            return True
        before = now
        time.sleep(_DEAD_S / _CHECKS)
    return False


def _is_owned(path: str) -> bool:
    """Returns whether this process owns a lock that it has just written, on a file system without locks.

    Another process may write the same file at the same time. After a short wait, the file contains its owner.
    """
    time.sleep(_DEAD_S / _CHECKS)
    with contextlib.suppress(FileNotFoundError):
        return _owner(path) == _process_name()
    return False


@functools.cache
def _start_renewing() -> None:
    threading.Thread(target=_renew_forever, name="lock", daemon=True).start()


def _renew_forever() -> None:
    """Renews the times of the files of this process's locks, forever."""
    while True:
        for path in list(_held_locks):
            with contextlib.suppress(OSError):
                if _owner(path) == _process_name():
                    os.utime(path)
        time.sleep(_RENEW_S)


def writers(folder: epath.PathLike) -> list[int]:
    """Returns the indices (see processes.index) of the other processes that write a folder now."""
    return [int(path.name.rpartition(".")[2]) for path in matching(folder, ".lock.*") if _is_held(path)]


def _is_held(path: epath.Path) -> bool:
    """Returns whether another process holds a lock.

    The operating system cannot answer this if the owner is on another machine. Then the time of the lock's file is
    compared with the time of this process's own lock in the folder. Both are renewed every _RENEW_S seconds.
    """
    own = path.parent / f".lock.{processes.index()}"
    if path == own:
        return False
    try:
        with open(path, "r+", encoding="utf-8") as file:
            owner = file.read().strip()
            locked = _try_lock(file) if owner else False  # if the file is empty, its owner is about to write it
            if locked is not None and owner.endswith(f" on {socket.gethostname()}"):
                return not locked
            return locked is False or os.stat(own).st_mtime - os.fstat(file.fileno()).st_mtime < _DEAD_S
    except FileNotFoundError:
        return False


def _try_lock(file: Any) -> bool | None:
    """Tries to take the operating system's lock of an open file, and returns whether this process now holds it.

    Returns None if the operating system or the file system has no locks.
    """
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
    for path in list(_held_locks):
        unlock(os.path.dirname(path))
