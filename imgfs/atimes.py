"""Remembers for a while which access times were set: the store keeps none, as under `noatime`.

Owns the times of the inodes that had theirs set last, so that setting the other time alone leaves them as they are.
Who is not among these has its modification time in their place. Must not know FUSE, nor the store.

*Concurrency:* used from one thread.
"""

# What utimensat(2) sets in two calls lies close together; more would only cost memory.
INODES_MAX = 4096


class AccessTimes:
    """The access times that were set last, by inode."""

    def __init__(self, inodes_max: int = INODES_MAX) -> None:
        self._inodes_max = inodes_max
        self._times_ns: dict[int, int] = {}

    def put(self, inode: int, atime_ns: int) -> None:
        """Remember *atime_ns*, and forget what was put longest ago if there are too many."""
        self._times_ns.pop(inode, None)
        self._times_ns[inode] = atime_ns
        if len(self._times_ns) > self._inodes_max:
            del self._times_ns[next(iter(self._times_ns))]

    def get(self, inode: int, mtime_ns: int) -> int:
        """Return the access time of *inode*; that is its *mtime_ns* unless another was put."""
        return self._times_ns.get(inode, mtime_ns)
