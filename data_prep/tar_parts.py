"""One tar in parts, read in place: the parts in order are the tar, and a member or a header may lie across two."""

import bisect
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from etils import epath

from geotoken_jax.workdir import StageError

#: Most bytes read at a time. A header's own length field must not decide how much memory is taken.
MAX_READ = 1 << 26
#: Zeros after the last member; GNU tar writes up to 20 blocks of them.
_MAX_END = 1 << 20


class Parts:
    """Files laid end to end, as one file to read (`read`, `seek`, `tell`); each is opened when it is first reached."""

    def __init__(self, paths: Sequence[epath.Path]):
        self.paths = list(paths)
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
        """Returns up to `length` bytes, fewer at the end only. Raises StageError if they are more than MAX_READ."""
        if length > MAX_READ:
            raise StageError(f"{self.where(self._position)} asks for {length:,} bytes: the tar is damaged there")
        end = min(self._position + length, self.length)
        pieces = []
        while self._position < end:
            part = self._part(self._position)
            if part not in self._files:
                self._files[part] = self.paths[part].open("rb")
            file = self._files[part]
            file.seek(self._position - self._starts[part])
            piece = file.read(min(end, self._starts[part + 1]) - self._position)
            if not piece:
                raise StageError(f"{self.where(self._position)} is gone: the file changed while it was read")
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def where(self, position: int) -> str:
        """Returns the place that a position is at, for messages."""
        part = self._part(min(position, self.length - 1))
        return f"{self.paths[part]} at byte {position - self._starts[part]:,}"

    def _part(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1


def find_header(parts: Parts, start: int, end: int) -> int:
    """Returns the first place in [start, end) where a header seems to be, by its checksum; `end` if there is none.

    It may be the second header of a member that has more, or lie in the data of one: see `members`.
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
    """Yields the members of a tar in order, reading their headers alone (ustar, GNU and pax).

    start: where the first header is. From a member that a whole reading has, all the others follow as they do there.
    The last may be cut short: then its data end after the parts do. Raises StageError where something else than a
    header follows a member: the tar is damaged, or a part is missing or of a wrong size.
    """
    offset = start
    try:
        tar = _open(parts, start)
        while info := tar.next():
            if tar.offset <= offset:
                raise tarfile.ReadError("a member of negative size")
            offset = tar.offset
            tar.members.clear()  # tarfile keeps every one, 1 KB each  # pyright: ignore[reportAttributeAccessIssue]
            yield info
    except (tarfile.TarError, ValueError, LookupError, RecursionError) as error:
        if offset <= parts.length:  # else the last member is cut short
            raise _damaged(parts, offset, str(error)) from error
        return
    parts.seek(offset)
    rest = parts.length - offset
    # A header cut short is like a member cut short: what is before it is whole.
    if rest >= tarfile.BLOCKSIZE and (rest > _MAX_END or parts.read(rest).strip(b"\0")):
        raise _damaged(parts, offset, "no header there")


def member(parts: Parts, offset: int) -> tarfile.TarInfo:
    """Returns the member whose first header is at `offset` (`TarInfo.offset`)."""
    info = _open(parts, offset).next()
    if info is None:
        raise _damaged(parts, offset, "no header there")
    return info


def data(parts: Parts, info: tarfile.TarInfo) -> bytes:
    """Returns the data of a member, of MAX_READ bytes at most."""
    parts.seek(info.offset_data)
    return parts.read(info.size)


def _open(parts: Parts, offset: int) -> tarfile.TarFile:
    parts.seek(offset)
    return tarfile.TarFile(fileobj=parts)  # pyright: ignore[reportArgumentType]


def _damaged(parts: Parts, offset: int, why: str) -> StageError:
    return StageError(
        f"the tar cannot be read on from {parts.where(offset)} ({why}): this part, or one before it, is damaged or "
        "not whole; get it again and compare its size with the distributor's"
    )
