"""Copies a store out into a directory, past FUSE: all kinds of files, with their links, as `cp -a` would.

Owns the order of the copy and what it leaves out. Must not know who watches, nor how anything is printed.

*Concurrency:* see `transfer`.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from imgfs.disk import Buffer
from imgfs.errors import Damaged, InvalidArgument
from imgfs.file_xattrs import FileXattrs
from imgfs.format import Kind
from imgfs.store import ROOT, Attr, Entry, Store
from imgfs.transfer import DEVICES, PIECE_BYTES, Observer, Tally, batches, reason

T = TypeVar("T")

_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# The disk that is written to has failed or is full: no other image would fare better.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
# The file system has no links, has no more of them for this file, or the first name lies on another one.
_NO_LINK_ERRORS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.ENOENT})


class _Enter(NamedTuple):
    """A directory still to be copied."""

    path: bytes
    inode: int


class _First(NamedTuple):
    """The name that was the first to be exported of several, and how many are still to come."""

    path: bytes
    left: int


class _Exported(NamedTuple):
    """A directory whose entries are all out of the store; its mode and times come last."""

    path: bytes
    inode: int


def export_tree(store: Store, target: bytes, observer: Observer) -> Tally:
    """Copy the whole *store* into the directory *target*, which is made if it is missing.

    What is no directory and has the same name is replaced. A damaged image is left out and told to the observer.
    Owners, devices, and extended attributes other than those of `user.` come out only for root. Nothing is synced:
    the copy is as durable as one by `cp`.

    Raises:
        InvalidArgument: *target* lies within the store.
        OSError: *target* cannot be written, or its disk is full; no half image stays behind.
    """
    return _Export(store, observer).run(target)


class _Export:
    """One run of `export_tree`."""

    def __init__(self, store: Store, observer: Observer) -> None:
        self._store = store
        self._observer = observer
        self._tally = Tally()
        self._as_root = os.geteuid() == 0
        self._owner = os.geteuid(), os.getegid()
        self._firsts: dict[int, _First] = {}
        self._xattrs = FileXattrs(store, self._tally, observer)

    def run(self, target: bytes) -> Tally:
        inside = os.path.realpath(os.fsencode(self._store.path))
        if os.path.commonpath([inside, os.path.realpath(target)]) == inside:
            raise InvalidArgument(f"'{os.fsdecode(target)}' lies within the store; name a directory outside")
        os.makedirs(target, exist_ok=True)
        pending: list[_Enter | _Exported] = [_Enter(target, ROOT)]
        while pending:
            step = pending.pop()
            if isinstance(step, _Exported):
                self._leave(step)
            else:
                pending.extend(self._enter(step))
        return self._tally

    def _enter(self, step: _Enter) -> list[_Enter | _Exported]:
        """Copy the entries of a directory; return what remains to be done, last first."""
        if step.inode != ROOT and not self._directory(step.path):
            return []
        later: list[_Enter | _Exported] = [_Exported(step.path, step.inode)]
        for batch in batches(self._store.list(step.inode)):
            # Most trees were written in the order of their inodes, so this is the order of the disk.
            for entry in sorted(batch, key=_entry_inode):
                path = os.path.join(step.path, entry.name)
                attr = self._store.attr(entry.inode)
                if attr.kind == Kind.DIRECTORY:
                    later.append(_Enter(path, entry.inode))
                else:
                    self._entry(path, attr)
        return later

    def _directory(self, path: bytes) -> bool:
        """Make the directory *path*; return whether its entries can be copied."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            # A link that leads to a directory must not be followed: what is copied would end up elsewhere.
            if os.path.islink(path) or not os.path.isdir(path):
                self._skip(path, "something else has that name")
                return False
        except OSError as error:
            self._fail(path, error)
            return False
        self._tally.directories += 1
        return True

    def _leave(self, step: _Exported) -> None:
        attr = self._store.attr(step.inode)
        try:
            self._dress(step.path, attr)
        except OSError as error:
            self._fail(step.path, error)

    def _entry(self, path: bytes, attr: Attr) -> None:
        try:
            if attr.nlink > 1:
                self._one_of_several(path, attr)
            else:
                self._make(path, attr)
        except Damaged as error:
            self._tally.damaged += 1
            self._skip(path, str(error))
        except OSError as error:
            self._fail(path, error)
        self._observer.advanced(self._tally)

    def _one_of_several(self, path: bytes, attr: Attr) -> None:
        """Copy the first of several names, make each further one a link to it."""
        first, left = self._firsts.get(attr.inode, (b"", attr.nlink))
        linked = bool(first) and self._link(path, first)
        if not linked and not self._make(path, attr):
            return
        if left > 1:
            self._firsts[attr.inode] = _First(first if linked else path, left - 1)
        else:
            self._firsts.pop(attr.inode, None)

    def _link(self, path: bytes, first: bytes) -> bool:
        """Make *path* a further name of the file at *first*; return False where it cannot be one."""
        try:
            _in_place(path, lambda: os.link(first, path, follow_symlinks=False))
        except OSError as error:
            if error.errno not in _NO_LINK_ERRORS:
                raise
            self._tally.separated += 1
            return False
        self._tally.hard_links += 1
        return True

    def _make(self, path: bytes, attr: Attr) -> bool:
        """Copy what has *attr* to *path*; return False if it was skipped."""
        if attr.kind == Kind.FILE:
            self._image(path, attr)
        elif attr.kind == Kind.SYMLINK:
            self._symlink(path, attr)
        elif stat.S_IFMT(attr.mode) in DEVICES and not self._as_root:
            self._skip(path, "only root can make a device")
            return False
        else:
            _in_place(path, lambda: os.mknod(path, stat.S_IFMT(attr.mode) | 0o600, attr.device))
            self._dress(path, attr)
            self._tally.special_files += 1
        return True

    def _dress(self, path: bytes, attr: Attr) -> None:
        """Give a directory or special file its owner, attributes, mode and times, in an order that keeps them."""
        if self._as_root:
            os.chown(path, attr.uid, attr.gid)
        self._xattrs.take_out(attr.inode, path, path)
        os.chmod(path, self._mode(attr))
        os.utime(path, ns=(attr.mtime_ns, attr.mtime_ns))

    def _image(self, path: bytes, attr: Attr) -> None:
        handle = self._store.open_image(attr.inode)
        try:
            # The first piece is read before the file is made: of a damaged image of up to 4 MiB nothing appears.
            data = self._store.read(handle, 0, PIECE_BYTES)
            file = _in_place(path, lambda: os.open(path, _WRITE_FLAGS, 0o600))
            try:
                self._fill(file, path, handle, data, attr)
            except BaseException:
                # Half an image must not look like a whole one.
                os.unlink(path)
                raise
            finally:
                os.close(file)
        finally:
            self._store.release(handle)
        self._tally.images += 1

    def _fill(self, file: int, path: bytes, handle: int, data: Buffer, attr: Attr) -> None:
        """Write the image open as *handle*, of which *data* is the beginning, with its attributes."""
        done = 0
        while True:
            _write_whole(file, data)
            done += len(data)
            self._tally.data_bytes += len(data)
            if done >= attr.size:
                break
            self._observer.advanced(self._tally)
            data = self._store.read(handle, done, PIECE_BYTES)
            if not data:
                raise Damaged(f"it ends after {done} of {attr.size} bytes")
        if self._as_root:
            os.fchown(file, attr.uid, attr.gid)
        self._xattrs.take_out(attr.inode, file, path)
        os.fchmod(file, self._mode(attr))
        os.utime(file, ns=(attr.mtime_ns, attr.mtime_ns))

    def _symlink(self, path: bytes, attr: Attr) -> None:
        target = self._store.readlink(attr.inode)
        _in_place(path, lambda: os.symlink(target, path))
        if self._as_root:
            os.lchown(path, attr.uid, attr.gid)
        self._xattrs.take_out(attr.inode, path, path)
        os.utime(path, ns=(attr.mtime_ns, attr.mtime_ns), follow_symlinks=False)
        self._tally.symlinks += 1

    def _mode(self, attr: Attr) -> int:
        """Return the mode bits to set: a set-id bit goes only with its owner."""
        mode = stat.S_IMODE(attr.mode)
        if self._as_root or (attr.uid, attr.gid) == self._owner:
            return mode
        return mode & ~(stat.S_ISUID | stat.S_ISGID)

    def _fail(self, path: bytes, error: OSError) -> None:
        if error.errno in _DISK_ERRORS:
            error.filename = path
            raise error
        self._skip(path, reason(error))

    def _skip(self, path: bytes, reason: str) -> None:
        self._tally.skipped += 1
        self._observer.skipped(path, reason)


def _entry_inode(entry: Entry) -> int:
    return entry.inode


def _in_place(path: bytes, make: Callable[[], T]) -> T:
    """Return what *make* returns, which makes a new file at *path*, in place of a file or link that is there."""
    try:
        return make()
    except FileExistsError:
        os.unlink(path)
        return make()


def _write_whole(file: int, data: Buffer) -> None:
    done = os.write(file, data)
    while done < len(data):
        done += os.write(file, memoryview(data)[done:])
