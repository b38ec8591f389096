"""Copies a file: by sharing its blocks where the file system can do that, else its bytes, without the holes.

Owns how bytes get from one file to another. Must not know what they mean, nor which files are copied.

*Concurrency:* others may append to the source meanwhile. A clone is the source at one moment; what is copied byte by
byte is not, so whoever copies has to know what may change.
"""

from collections.abc import Callable
from enum import StrEnum

from imgfs.disk import Disk
from imgfs.errors import NotSupported
from imgfs.settings import MIB

_PIECE_BYTES = 4 * MIB


class Reflink(StrEnum):
    """Whether files are to share their blocks."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Copier:
    """Copies between open files of *disk*; *advanced* hears of each number of bytes that was done."""

    def __init__(self, disk: Disk, reflink: Reflink, advanced: Callable[[int], None]) -> None:
        self._disk = disk
        self._reflink = reflink
        self._advanced = advanced

    def clone(self, source: int, target: int) -> bool:
        """Let *target* be what *source* is now, by sharing its blocks; return False where bytes have to be copied.

        Raises:
            NotSupported: it cannot, and nothing else was wanted.
            OSError: as the disk says.
        """
        if self._reflink == Reflink.NEVER:
            return False
        self._disk.truncate(target, 0)
        if self._disk.clone(source, target):
            self._advanced(self._disk.size(target))
            return True
        if self._reflink == Reflink.ALWAYS:
            raise NotSupported(
                "the two places cannot share blocks, which needs one XFS or btrfs for both; --reflink=auto copies"
            )
        return False

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let *target*, from *start* on, be the bytes of *source* up to *end*; holes stay holes."""
        disk = self._disk
        disk.truncate(target, start)
        at = start
        while at < end:
            data = min(disk.next_data(source, at), end)
            self._advanced(data - at)
            at, hole = data, min(disk.next_hole(source, data), end)
            while at < hole:
                piece = disk.read(source, at, min(_PIECE_BYTES, hole - at))
                if not piece:
                    return  # somebody has cut it
                disk.write(target, at, [piece])
                at += len(piece)
                self._advanced(len(piece))
        if disk.size(target) < end:
            disk.truncate(target, end)

    def is_same(self, source: int, target: int, start: int, end: int) -> bool:
        """Return whether both have the same bytes from *start* to *end*."""
        disk = self._disk
        for at in range(start, end, _PIECE_BYTES):
            size = min(_PIECE_BYTES, end - at)
            piece = disk.read(source, at, size)
            if len(piece) < size or piece != disk.read(target, at, size):
                return False
        return True
