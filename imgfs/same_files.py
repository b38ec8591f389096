"""Which inode of a store is which file, so that several names of one file become several names of one inode.

Owns what one import knows of that. Must not know names, nor how anything is copied.

*Concurrency:* see `transfer`.
"""

import os

from imgfs.view import Attr

File = tuple[int, int]  # device and inode number


def identity(status: os.stat_result) -> File:
    """Return which file it is that has *status*."""
    return status.st_dev, status.st_ino


class SameFiles:
    """Which inode of the store is which file, of those that have several names in one or the other."""

    def __init__(self) -> None:
        self._inodes: dict[File, int] = {}
        self._files: dict[int, File] = {}

    def inode(self, status: os.stat_result) -> int | None:
        """Return the inode that is the file of *status*, if it is known."""
        return self._inodes.get(identity(status))

    def put(self, status: os.stat_result, inode: int) -> None:
        """Note that *inode* was made from the file of *status*."""
        if status.st_nlink > 1:
            self._inodes[identity(status)] = inode
            self._files[inode] = identity(status)

    def fits(self, status: os.stat_result, attr: Attr) -> bool:
        """Return whether what has *attr* can be the file of *status*, so that the same names share one inode in both.

        If so, from now on it is.
        """
        if status.st_nlink == attr.nlink == 1:
            return True
        file = identity(status)
        if self._inodes.get(file, attr.inode) != attr.inode or self._files.get(attr.inode, file) != file:
            return False
        self._inodes[file] = attr.inode
        self._files[attr.inode] = file
        return True
