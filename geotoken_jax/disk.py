"""Files of a work directory: listing them, their names while they are written, and the lock of a folder's writer."""

import atexit
import contextlib
import fnmatch
import os
import socket
from typing import IO, Any

from etils import epath

from geotoken_jax import processes
from geotoken_jax.errors import UserError

#: Path of a lock that this process holds -> its open file.
_held: dict[str, IO[str]] = {}


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
    return path.parent / f".{path.name}.{processes.index()}.{os.getpid()}.partial"


def lock(folder: epath.PathLike) -> None:
    """Makes this process the only one of its index that writes a folder, until it unlocks the folder or ends.

    Removes the partial files that an earlier process has left. Raises LockedError, with host and process, if another
    process writes the folder. The system releases the lock of a process that is killed.
    """
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if path in _held:
        return
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open while the folder is written)
        if not _try(file):
            file.seek(0)
            other = file.read().strip() or "another process"
            file.close()
            raise LockedError(
                f"{folder} is being written by {other}: wait until it ends, or use another --workdir; if it no longer "
                f"runs, remove {path}"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its owner has removed it in the meantime
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file
    for parent, _, names in os.walk(os.path.dirname(path)):
        for name in fnmatch.filter(names, f".*.{processes.index()}.*.partial"):
            os.unlink(os.path.join(parent, name))


def unlock(folder: epath.PathLike) -> None:
    """Releases the lock of a folder, if this process holds it."""
    path = os.path.join(os.path.realpath(folder), f".lock.{processes.index()}")
    if file := _held.pop(path, None):
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()


def _try(file: Any) -> bool:
    """Returns whether this process now holds the lock of an open file, or the file system has no locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@atexit.register
def _unlock_all() -> None:
    for path in list(_held):
        unlock(os.path.dirname(path))
