"""Remembers for a while which access times were set: the store keeps none, as under `noatime`.

Owns the times of some inodes that had theirs set last, in shared memory, so that every worker shows the same, and
setting the other time alone leaves them as they are. Who is not among these has its modification time in their place.
Must not know FUSE, nor the store.

*Concurrency:* a row is written and read without a lock: its inode is taken out before its time changes, and put back
after. Two that share a row push each other out.
"""

import numpy as np
import numpy.typing as npt

from imgfs.layout import ATIME, ATIMES_AT, ATIMES_MAX
from imgfs.memory import Memory


class AccessTimes:
    """The access times that were set last, by inode."""

    def __init__(self, memory: Memory) -> None:
        rows = memoryview(memory.map)[ATIMES_AT : ATIMES_AT + ATIME.size * ATIMES_MAX]
        self._inodes = rows.cast("Q")
        self._times_ns = rows.cast("q")

    def close(self) -> None:
        self._inodes.release()
        self._times_ns.release()

    def put(self, inode: int, atime_ns: int) -> None:
        """Remember *atime_ns*, in place of what another inode may have in that row."""
        at = 2 * (inode % ATIMES_MAX)
        self._inodes[at] = 0
        self._times_ns[at + 1] = atime_ns
        self._inodes[at] = inode

    def get(self, inode: int, mtime_ns: int) -> int:
        """Return the access time of *inode*; that is its *mtime_ns* unless another was put."""
        at = 2 * (inode % ATIMES_MAX)
        if self._inodes[at] != inode:
            return mtime_ns
        atime_ns = self._times_ns[at + 1]
        return atime_ns if self._inodes[at] == inode else mtime_ns

    def get_many(self, inodes: npt.NDArray[np.int64], mtimes_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As `get`, of many."""
        known, times_ns = np.frombuffer(self._inodes, np.int64), np.frombuffer(self._times_ns, np.int64)
        at = inodes % ATIMES_MAX * 2
        before = known[at] == inodes
        atimes_ns = times_ns[at + 1]
        return np.where(before & (known[at] == inodes), atimes_ns, mtimes_ns)
