"""The base class of all errors that a user can fix, and messages for errors of the operating system."""

import errno
import os
from typing import Any

#: Number of an OSError -> advice to the user, which ends the error message.
CURES = {
    errno.EACCES: "change its permissions, or use another place",
    errno.EPERM: "change its permissions, or use another place",
    errno.EROFS: "use a place that you may write to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path; a part of it is a file, not a folder",
    errno.EISDIR: "name a file in that folder",
    errno.EEXIST: "remove it, or use another place",
    errno.ELOOP: "remove the link that leads to itself",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOSPC: "free some space there, and run the same command again",
    errno.EDQUOT: "free some space there, and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n), and run the same command again",
    errno.ENFILE: "close other programs that hold files open, and run the same command again",
    errno.EIO: "check the disk, and run the same command again",
    errno.ESTALE: "mount the file system again, and run the same command again",
}


class UserError(Exception):
    """An error that a user can fix. The message is one sentence with the problem, its place and the fix."""


def explain(error: BaseException, place: Any = "") -> str:
    """Returns a message of one sentence for an error of the operating system, of memory or of text encoding.

    place: file or folder that was in use. The message contains it if the error itself names no file.
    """
    if isinstance(error, MemoryError):
        return (
            f"the memory of this machine is used up{_at(place)}: use smaller batches or fewer workers, or a machine "
            "with more memory, and run the same command again"
        )
    if isinstance(error, UnicodeError):
        return f"a text cannot be converted{_at(place)} ({error}): use names and files in UTF-8"
    if isinstance(error, OSError) and error.errno:
        files = [os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, (str, bytes, os.PathLike))]
        where = " -> ".join(files) or str(place) or "a file or a connection"
        cure = CURES.get(error.errno, "check it, and run the same command again")
        return " ".join(f"{where} cannot be used ({error.strerror or error}): {cure}".split())
    return " ".join(str(error).split())


def _at(place: Any) -> str:
    return f" at {place}" if str(place) else ""
