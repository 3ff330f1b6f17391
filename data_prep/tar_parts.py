"""Reads a tar that is split into several files, its parts, without joining them into one file.

A member or a header may span two parts. A part is a file on disk, or an object in a bucket (s3://, gs://).
"""

import bisect
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from geotoken_jax.manifests import StageError

#: Largest number of bytes per read, and thus of a member's data. The limit protects the memory: a damaged header can
#: contain any length.
MAX_READ = 1 << 26
#: Largest number of zero bytes that may follow the last member. By default, GNU tar writes up to 21 blocks (10.5 KiB).
_MAX_END = 1 << 20
#: Bytes per request if a part in a bucket is read from beginning to end. The delay of a request equals the transfer
#: time of some megabytes, so requests are larger than that.
_AHEAD = 1 << 23


class Parts:
    """The parts of a tar, readable as one file with `read`, `seek` and `tell`. A part is opened when it is first read.

    ahead: only for parts in a bucket: if true, bytes after the requested ones are transferred in advance; if false,
    only the requested bytes are transferred.
    """

    def __init__(self, paths: Sequence[epath.Path], ahead: bool = False):
        self.paths, self._ahead = list(paths), ahead
        self.lengths = [path.stat().length for path in self.paths]
        self._starts = [0, *itertools.accumulate(self.lengths)]
        self._files: dict[int, IO[bytes]] = {}
        self._position = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def length(self) -> int:
        """Size of all parts together, in bytes."""
        return self._starts[-1]

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position

    def read(self, length: int) -> bytes:
        """Returns the next `length` bytes, or fewer if the tar ends before. Raises StageError if length > MAX_READ."""
        if length > MAX_READ:
            raise StageError(
                f"the header before {self.where(self._position)} asks for {length:,} bytes, more than {MAX_READ:,}: "
                "the tar is damaged there; download this part again"
            )
        end = min(self._position + length, self.length)
        pieces = []
        while self._position < end:
            part = self._part(self._position)
            if part not in self._files:
                self._files[part] = _open_part(self.paths[part], self._ahead)
            file = self._files[part]
            file.seek(self._position - self._starts[part])
            piece = file.read(min(end, self._starts[part + 1]) - self._position)
            if not piece:
                raise StageError(
                    f"{self.where(self._position)} is missing, because the file became shorter while it was read: "
                    "restore the file and run the same command again"
                )
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def where(self, position: int) -> str:
        """Returns a position in the tar as text for messages: "PATH OF THE PART at byte NUMBER"."""
        part = self._part(min(position, self.length - 1))
        return f"{self.paths[part]} at byte {position - self._starts[part]:,}"

    def _part(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1


def is_url(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def _open_part(path: epath.Path, ahead: bool) -> IO[bytes]:
    if not is_url(path):
        # No buffer: it would have the size of the file system's blocks, 4 MB on Lustre, and the read of a header of 512
        # bytes would fill it.
        return open(path, "rb", buffering=0)
    from fsspec.core import url_to_fs  # imported here, because few callers need it

    files, name = url_to_fs(os.fspath(path))
    cache = {"cache_type": "readahead", "block_size": _AHEAD} if ahead else {"cache_type": "none"}
    return files.open(name, "rb", **cache)  # pyright: ignore[reportReturnType]


def find_header(parts: Parts, start: int, end: int) -> int:
    """Returns the first position in [start, end) of a block with a valid header checksum, or `end` if there is none.

    The block need not be the first header of a member. A member can have several headers, and the data of a member can
    contain a block that looks like a header.
    """
    position = -(-start // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    parts.seek(position)
    while position < end:
        try:
            tarfile.TarInfo.frombuf(parts.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            position += tarfile.BLOCKSIZE
        else:
            return position
    return end


def members(parts: Parts, start: int = 0) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar in order. Reads only the headers (ustar, GNU and pax).

    If the tar is cut short within a member, this member is yielded too, although its data are incomplete.

    start: position of a header. It should be the first header of a member: otherwise the first member that is yielded
    can be wrong. Raises StageError if no header follows a member: the tar is damaged, or a part is missing or has a
    wrong size.
    """
    offset = start
    try:
        tar = _open(parts, start)
        while info := tar.next():
            if tar.offset <= offset:
                raise tarfile.ReadError("a member of negative size")
            offset = tar.offset
            tar.members.clear()  # else tarfile keeps 1 KB per member  # pyright: ignore[reportAttributeAccessIssue]
            yield info
    except (tarfile.TarError, ValueError, LookupError, RecursionError) as error:
        if offset <= parts.length:  # otherwise the error is only that the last member is cut short
            raise _damaged(parts, offset, str(error)) from error
        return
    parts.seek(offset)
    rest = parts.length - offset
    # A last header that is cut short is no error, like a last member that is cut short: the others are complete.
    if rest >= tarfile.BLOCKSIZE and (rest > _MAX_END or parts.read(rest).strip(b"\0")):
        raise _damaged(parts, offset, "no header there")


def member(parts: Parts, offset: int) -> tarfile.TarInfo:
    """Returns the member whose first header is at `offset`, the position in `TarInfo.offset`."""
    info = _open(parts, offset).next()
    if info is None:
        raise _damaged(parts, offset, "no header there")
    return info


def data(parts: Parts, info: tarfile.TarInfo) -> bytes:
    """Returns a member's data. Raises StageError if it has more than MAX_READ bytes."""
    parts.seek(info.offset_data)
    return parts.read(info.size)


def _open(parts: Parts, offset: int) -> tarfile.TarFile:
    parts.seek(offset)
    return tarfile.TarFile(fileobj=parts)  # pyright: ignore[reportArgumentType]


def _damaged(parts: Parts, offset: int, why: str) -> StageError:
    return StageError(
        f"the tar cannot be read from {parts.where(offset)} on ({why}): this part or one before it is damaged or "
        "incomplete; compare the sizes of the parts with the distributor's and download those that differ again"
    )
