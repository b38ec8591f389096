"""Remembers for a while which access times were set: the store keeps none, as under `noatime`.

Owns the times of inodes that had theirs set last, so that setting the other time alone leaves them as they are. Who is
not among these has its modification time in their place. Must not know FUSE, nor the store.

*Concurrency:* in memory that all workers of a mount share by fork. An entry that two of them write at once, or that is
read halfway, does not match its checksum, and is as good as forgotten.
"""

import mmap
import struct

# What utimensat(2) sets in two calls lies close together; more would only cost memory.
INODES_MAX = 4096
# Inodes that share a place; of these, those put last are kept.
_WAYS = 4
_ENTRY = struct.Struct("<QqQ")  # inode, time, a checksum of both
_MASK = (1 << 64) - 1


class AccessTimes:
    """The access times that were set last, by inode."""

    def __init__(self, inodes_max: int = INODES_MAX) -> None:
        self._ways = min(_WAYS, inodes_max)
        self._places = inodes_max // self._ways
        self._bytes = _ENTRY.size * self._ways
        self._nothing = bytes(self._bytes)
        self._map = mmap.mmap(-1, self._bytes * self._places)

    def put(self, inode: int, atime_ns: int) -> None:
        """Remember *atime_ns*, and forget what was put longest ago if there are too many."""
        kept = [entry for entry in self._at(inode) if entry[0] != inode][: self._ways - 1]
        entries = [(inode, atime_ns), *kept]
        data = b"".join(_ENTRY.pack(number, time, _check(number, time)) for number, time in entries)
        start = inode % self._places * self._bytes
        self._map[start : start + self._bytes] = data.ljust(self._bytes, b"\0")

    def get(self, inode: int, mtime_ns: int) -> int:
        """Return the access time of *inode*; that is its *mtime_ns* unless another was put."""
        return next((time for number, time in self._at(inode) if number == inode), mtime_ns)

    def _at(self, inode: int) -> list[tuple[int, int]]:
        """Return the entries of the place of *inode*, the one put last first."""
        start = inode % self._places * self._bytes
        data = self._map[start : start + self._bytes]
        if data == self._nothing:
            return []
        entries = _ENTRY.iter_unpack(data)
        return [(number, time) for number, time, check in entries if number and check == _check(number, time)]


def _check(inode: int, time_ns: int) -> int:
    return (inode * 0x9E37_79B9_7F4A_7C15 ^ time_ns) & _MASK
