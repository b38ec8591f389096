"""What requests ask of a store, in plain numbers: the same whichever way a request came in.

Owns how a store is shown: what the kernel may remember, who sees an image that was never closed, whose a new image is.
Must not know pyfuse3, nor the bytes of requests and answers.

*Concurrency:* plain calls, that never wait: what may need the disk takes `nowait=True` and then raises `WouldBlock`.
"""

import contextlib
import functools
import stat
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.errors import Stale
from imgfs.format import Kind
from imgfs.listing import Page
from imgfs.store import PERMISSIONS, Attr, Store

# What programs are told to read and write at once: as much as the kernel asks for in one request by default.
BLOCK_BYTES = 128 << 10

# Positions of a listing: 1 is behind `.`, this behind `..`, and that many more than its key behind each other entry.
DOTS = 2

_SET_ID = stat.S_ISUID | stat.S_ISGID
# The mode of a special file says its type itself.
_TYPE_BITS = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.SYMLINK: stat.S_IFLNK, Kind.SPECIAL: 0}
_TYPE_BITS_OF = np.array([_TYPE_BITS.get(kind, 0) for kind in Kind])


class Manner(NamedTuple):
    """How a mount shows its store."""

    timeout_s: float
    """How long the kernel may remember names, absent names and attributes."""

    xattrs: bool = False
    """Without, the kernel asks for an extended attribute once, and never again."""

    publish_at_close: bool = False
    """Only the process that creates an image finds it by name before it is closed."""


class Shown(NamedTuple):
    """What the kernel is told of an entry, and how long it may remember its name."""

    attr: Attr | None  # None: there is no such name
    name_timeout_s: float


class Listed(NamedTuple):
    """An entry of a listing; the kernel goes on behind its *position*."""

    position: int
    name: bytes
    attr: Attr


def mode_of(attr: Attr) -> int:
    """Return permissions and type of *attr* as stat(2) has them."""
    return _TYPE_BITS[attr.kind] | attr.mode


def modes_of(page: Page) -> npt.NDArray[np.int64]:
    """As `mode_of`, for each entry of *page*."""
    modes: npt.NDArray[np.int64] = _TYPE_BITS_OF[page.kinds] | page.modes
    return modes


class Acts:
    """What can be asked of *store*, shown in that *manner*."""

    def __init__(self, store: Store, manner: Manner) -> None:
        self.manner = manner
        self._store = store
        self._absent = Shown(None, manner.timeout_s)
        self._hidden = Shown(None, 0)

    def lookup(self, parent: int, name: bytes, thread: int, *, nowait: bool = False) -> Shown:
        """Find *name* for *thread*. As `Store.lookup`, but for NotFound."""
        store = self._store
        if name == b"." or name == b"..":
            attr = store.attr(parent if name == b"." else store.parent(parent))
            if not attr.nlink:
                raise Stale("a file handle outlived its file")
            return Shown(attr, self.manner.timeout_s)
        inode = store.find(parent, name, nowait=nowait)
        if not inode:
            return self._absent
        attr = store.attr(inode)
        if self.manner.publish_at_close:
            creator = store.creator(inode)
            if creator:
                # The kernel may not remember a name that only the asking process may know.
                return Shown(attr, 0) if creator == _process_of(thread) else self._hidden
        return Shown(attr, self.manner.timeout_s)

    def listing(self, directory: int, position: int, *, nowait: bool = False) -> Iterator[Listed]:
        """Yield the entries of *directory* behind *position*, 0 for all; `.` and `..` come first.

        Raises:
            Stale: it is gone.
            WouldBlock: *nowait* is set and a name is not in memory.
        """
        store = self._store
        yield from self.dots(directory, position)
        hides = self.manner.publish_at_close
        for key, inode, name in store.list(directory, max(position - DOTS, 0), nowait=nowait):
            try:
                if hides and store.creator(inode):
                    continue
                attr = store.attr(inode)
            except Stale:
                continue  # removed meanwhile
            yield Listed(key + DOTS, name, attr)

    def dots(self, directory: int, position: int) -> Iterator[Listed]:
        """Yield of `.` and `..` what comes behind *position*. Stale."""
        store = self._store
        if position < 1:
            yield Listed(1, b".", store.attr(directory))
        if position < DOTS:
            yield Listed(DOTS, b"..", store.attr(self._directory_above(directory)))

    def page(self, directory: int, position: int, count: int, *, nowait: bool = False) -> Page | None:
        """Return some *count* entries behind *position*, but for `.` and `..`; their keys are positions.

        None where it takes `listing`, which raises the same.
        """
        page = self._store.page(directory, max(position - DOTS, 0), count, nowait=nowait)
        return page._replace(keys=page.keys + DOTS) if page is not None else None

    def _directory_above(self, directory: int) -> int:
        try:
            above = self._store.parent(directory)
            self._store.attr(above)
        except Stale:
            return directory  # both are gone; the number is of no use to anybody
        return above

    def group_in(self, directory: int, gid: int) -> tuple[int, int]:
        """Return the group of what *gid* creates in *directory*, and the mode bit a new directory there inherits."""
        _, its_gid, mode = self._store.owner(directory)
        return (its_gid, stat.S_ISGID) if mode & stat.S_ISGID else (gid, 0)

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int, thread: int) -> tuple[int, int]:
        """Make an image for *thread*; return (inode, handle). As `Store.create_image`."""
        group, _ = self.group_in(parent, gid)
        create = self._store.create_image
        if self.manner.publish_at_close:
            create = functools.partial(create, creator=_process_of(thread))
        return create(parent, name, mode & PERMISSIONS, uid, group)

    def created(self, inode: int) -> Shown:
        """Return what the kernel is told of an image that is just being made."""
        return Shown(self._store.attr(inode), 0 if self.manner.publish_at_close else self.manner.timeout_s)

    def mode_without_set_id(self, inode: int) -> int | None:
        """Return the mode that image *inode* has left when others changed it; None if that is the one it has."""
        # The kernel leaves this to us, for libfuse promises it (FUSE_CAP_HANDLE_KILLPRIV).
        mode = self._store.owner(inode)[2]
        if not mode & _SET_ID or self._store.attr(inode).kind != Kind.FILE:
            return None
        # Without the group's x bit, set-gid once meant mandatory locking, not a privilege.
        drop = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
        return mode & ~drop if mode & drop else None

    def loses_privileges(self, inode: int, mode: int) -> bool:
        """Return whether *inode*, which has *mode* and whose bytes change, may lose what it was trusted with."""
        return mode & _SET_ID != 0 or (self.manner.xattrs and self._store.has_xattrs(inode))


def _process_of(thread: int) -> int:
    """Return the process that *thread* belongs to; itself if it is gone or lies in a namespace out of sight."""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Tgid:"):
                return int(line.split()[1])
    return thread
