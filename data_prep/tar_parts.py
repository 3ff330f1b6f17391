"""Reads one tar that is split into parts, without joining them. A member or a header may span two parts.

Parts may be files or objects of a bucket (s3://, gs://).
"""

import bisect
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from geotoken_jax.manifests import StageError

#: Most bytes per read, and of a member's data. The length in a damaged header therefore cannot use up the memory.
MAX_READ = 1 << 26
#: Most bytes of zeros that may follow the last member; GNU tar writes up to 20 blocks (10 KiB).
_MAX_END = 1 << 20
#: Bytes per request if all of a part of a bucket is read in order. A request takes as long as reading some megabytes.
_AHEAD = 1 << 23


class Parts:
    """The parts of a tar as one file with `read`, `seek` and `tell`. Each part is opened when it is first read.

    ahead: whether the parts of a bucket are read ahead. Otherwise only the bytes that are asked for are transferred.
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
        """Bytes of all parts."""
        return self._starts[-1]

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position

    def read(self, length: int) -> bytes:
        """Returns `length` bytes, fewer at the end of the last part. Raises StageError if `length` exceeds MAX_READ."""
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
        """Returns text for messages about a position in the tar: the path of its part, and the byte in this part."""
        part = self._part(min(position, self.length - 1))
        return f"{self.paths[part]} at byte {position - self._starts[part]:,}"

    def _part(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1


def is_url(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def _open_part(path: epath.Path, ahead: bool) -> IO[bytes]:
    if not is_url(path):
        # A buffer has the size of the file system's blocks, 4 MB on Lustre: to read the headers, all would be read.
        return open(path, "rb", buffering=0)
    from fsspec.core import url_to_fs  # here, because few callers need it

    files, name = url_to_fs(os.fspath(path))
    cache = {"cache_type": "readahead", "block_size": _AHEAD} if ahead else {"cache_type": "none"}
    return files.open(name, "rb", **cache)  # pyright: ignore[reportReturnType]


def find_header(parts: Parts, start: int, end: int) -> int:
    """Returns the first position in [start, end) of a block with a valid header checksum, or `end` if there is none.

    The block need not be the first header of a member: it can be a later one, or in the data of a member.
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
    """Yields the members of a tar in order. Reads only headers (ustar, GNU and pax).

    start: position of a header. If it is the first header of a member, all members from this one on are yielded as in a
    read from 0. If the tar is cut short within a member, this member is yielded too. Its data then end beyond the last
    part. Raises StageError if no header follows a member: the tar is damaged, or a part is missing or has a wrong size.
    """
    offset = start
    try:
        tar = _open(parts, start)
        while info := tar.next():
            if tar.offset <= offset:
                raise tarfile.ReadError("a member of negative size")
            offset = tar.offset
            tar.members.clear()  # tarfile stores each member, 1 KB  # pyright: ignore[reportAttributeAccessIssue]
            yield info
    except (tarfile.TarError, ValueError, LookupError, RecursionError) as error:
        if offset <= parts.length:  # else the last member is cut short
            raise _damaged(parts, offset, str(error)) from error
        return
    parts.seek(offset)
    rest = parts.length - offset
    # A header cut short at the end is no error, like a member cut short: all members before are complete.
    if rest >= tarfile.BLOCKSIZE and (rest > _MAX_END or parts.read(rest).strip(b"\0")):
        raise _damaged(parts, offset, "no header there")


def member(parts: Parts, offset: int) -> tarfile.TarInfo:
    """Returns the member whose first header is at `offset` (`TarInfo.offset`)."""
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
