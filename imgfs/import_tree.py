"""Copies a directory tree into a store, past FUSE: directories, images and symbolic links, as `cp -a` would.

Owns the order of the copy and what it leaves out. Must not know who watches, nor how anything is printed.

*Concurrency:* see `transfer`.
"""

import os
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from imgfs.errors import Exists, InvalidArgument, IsADirectory, NameTooLong, NotADirectory, NotFound, TooLarge
from imgfs.format import IMAGE_BYTES_MAX, Kind
from imgfs.store import ROOT, Store
from imgfs.transfer import PIECE_BYTES, Observer, Tally, Totals, batches, reason

# Power loss can take this much of a running import.
_SYNC_BYTES = 256 << 20
_SYNC_S = 5.0

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
# What a single entry can have against it; anything else ends the copy.
_ENTRY_ERRORS = (IsADirectory, NotADirectory, NameTooLong, TooLarge, InvalidArgument)


class _SourceFailed(Exception):
    """A file could not be read to its end; must not be mistaken for a failure of the store's disk."""


class _Enter(NamedTuple):
    """A directory still to be copied; *inode* is 0 while the store has none for it."""

    path: bytes
    inode: int
    parent: int = 0
    name: bytes = b""


class _Imported(NamedTuple):
    """A directory whose entries are all in the store: its times come last, since each entry changes them."""

    inode: int
    fresh: bool
    status: os.stat_result


def measure_tree(source: bytes) -> Iterator[Totals]:
    """Count the files below the directory *source*; yield the sums as they grow, the last one is the whole.

    What cannot be read counts for nothing here; the copy will name it.
    """
    images = data_bytes = 0
    pending = [source]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        images += 1
                        data_bytes += entry.stat(follow_symlinks=False).st_size
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError:
            continue
        yield Totals(images, data_bytes)
    yield Totals(images, data_bytes)


def import_tree(store: Store, source: bytes, observer: Observer, *, into: bytes = b"", resume: bool = False) -> Tally:
    """Copy what is in the directory *source* into the directory *into* of *store*, and its own mode and times too.

    Directories that are missing are made; an image or link of the same name is replaced. With *resume*, an image that
    has the size and the mtime of its file is taken as copied. Owners are kept only for root. When it returns, all of
    it is durable; when it raises, closing the store makes durable what was copied.

    Raises:
        NotADirectory: *into* leads through something else.
        StoreFull: the disk is full; what was copied is whole.
    """
    return _Import(store, observer, resume=resume).run(source, into)


class _Import:
    """One run of `import_tree`."""

    def __init__(self, store: Store, observer: Observer, *, resume: bool) -> None:
        self._store = store
        self._observer = observer
        self._resume = resume
        self._tally = Tally()
        self._as_root = os.geteuid() == 0
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._store_directory = _identity(os.stat(store.path))
        self._synced_bytes = 0
        self._synced_s = time.monotonic()

    def run(self, source: bytes, into: bytes) -> Tally:
        pending: list[_Enter | _Imported] = [_Enter(source, self._make_path(into))]
        while pending:
            step = pending.pop()
            if isinstance(step, _Imported):
                self._leave(step)
            else:
                pending.extend(self._enter(step))
        self._store.sync()
        return self._tally

    def _make_path(self, path: bytes) -> int:
        inode = ROOT
        for name in filter(None, path.split(b"/")):
            try:
                inode = self._store.lookup(inode, name)
            except NotFound:
                inode = self._store.mkdir(inode, name, 0o755, self._uid, self._gid)
        if self._store.attr(inode).kind != Kind.DIRECTORY:
            raise NotADirectory(f"'{os.fsdecode(path)}' in the store is not a directory; name another with --into")
        return inode

    def _enter(self, step: _Enter) -> list[_Enter | _Imported]:
        """Copy the entries of a directory; return what remains to be done, last first."""
        path = step.path
        try:
            status = os.stat(path) if step.inode else os.lstat(path)
            if _identity(status) == self._store_directory:
                self._skip(path, "it is the store itself")
                return []
            scan = os.scandir(path)
        except OSError as error:
            self._skip(path, reason(error))
            return []
        with scan:
            try:
                inode, fresh = (step.inode, False) if step.inode else self._directory(step.parent, step.name, status)
            except _ENTRY_ERRORS as error:
                self._skip(path, str(error))
                return []
            later: list[_Enter | _Imported] = [_Imported(inode, fresh, status)]
            try:
                for batch in batches(scan):
                    batch.sort(key=os.DirEntry.inode)
                    for entry in batch:
                        if entry.is_dir(follow_symlinks=False):
                            later.append(_Enter(entry.path, 0, inode, entry.name))
                        else:
                            self._entry(entry, inode, fresh)
            except OSError as error:
                self._skip(path, reason(error))
        return later

    def _leave(self, step: _Imported) -> None:
        status = step.status
        if step.fresh:
            self._store.set_attr(step.inode, mtime_ns=status.st_mtime_ns)
        else:
            uid, gid, mode = self._owner(status)
            self._store.set_attr(step.inode, mode=mode, uid=uid, gid=gid, mtime_ns=status.st_mtime_ns)

    def _directory(self, parent: int, name: bytes, status: os.stat_result) -> tuple[int, bool]:
        """Return the inode of a directory of the store, and whether it was made now."""
        uid, gid, mode = self._owner(status)
        try:
            inode = self._store.mkdir(parent, name, mode, uid, gid)
        except Exists:
            inode = self._store.lookup(parent, name)
            if self._store.attr(inode).kind != Kind.DIRECTORY:
                raise NotADirectory("the store has something else of that name") from None
            return inode, False
        self._tally.directories += 1
        return inode, True

    def _entry(self, entry: "os.DirEntry[bytes]", directory: int, fresh: bool) -> None:
        try:
            if entry.is_file(follow_symlinks=False):
                self._image(entry, directory, fresh)
            elif entry.is_symlink():
                self._symlink(entry, directory)
            else:
                kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
                self._skip(entry.path, f"{_SPECIAL.get(kind, 'a special file')} cannot be stored")
        except _ENTRY_ERRORS as error:
            self._skip(entry.path, str(error))
        except _SourceFailed as error:
            self._skip(entry.path, str(error))
        self._observer.advanced(self._tally)
        if self._tally.data_bytes - self._synced_bytes >= _SYNC_BYTES or time.monotonic() - self._synced_s >= _SYNC_S:
            self._store.sync()
            self._synced_bytes = self._tally.data_bytes
            self._synced_s = time.monotonic()

    def _image(self, entry: "os.DirEntry[bytes]", directory: int, fresh: bool) -> None:
        if self._resume and not fresh and self._is_there(entry, directory):
            self._tally.resumed += 1
            return
        try:
            file = os.open(entry.path, _READ_FLAGS)
        except OSError as error:
            raise _SourceFailed(reason(error)) from None
        before = self._tally.data_bytes
        try:
            status = os.fstat(file)
            size = status.st_size
            if size > IMAGE_BYTES_MAX:
                raise TooLarge("an image has at most 4 GiB - 1 bytes")
            data: bytes | Iterator[bytes]
            if size <= PIECE_BYTES:
                # A file that shrank meanwhile is taken as it is now; of one that grew, what belongs to its mtime.
                data = _read_whole(file, size)
                size = len(data)
            else:
                data = self._pieces(file, size)
            uid, gid, mode = self._owner(status)
            self._store.put(directory, entry.name, data, size, mode=mode, uid=uid, gid=gid, mtime_ns=status.st_mtime_ns)
        except BaseException:
            # Pieces of it may be counted already.
            self._tally.data_bytes = before
            raise
        finally:
            os.close(file)
        self._tally.images += 1
        self._tally.data_bytes = before + size
        if status.st_nlink > 1:
            self._tally.hard_links += 1

    def _pieces(self, file: int, size: int) -> Iterator[bytes]:
        """Yield the *size* bytes of a large file; an interrupt may come between two pieces."""
        while size:
            piece = _read_whole(file, min(size, PIECE_BYTES))
            if not piece:
                raise _SourceFailed("it became shorter while it was read")
            size -= len(piece)
            yield piece
            self._tally.data_bytes += len(piece)
            self._observer.advanced(self._tally)

    def _is_there(self, entry: "os.DirEntry[bytes]", directory: int) -> bool:
        try:
            attr = self._store.attr(self._store.lookup(directory, entry.name))
            status = entry.stat(follow_symlinks=False)
        except (NotFound, OSError):
            return False
        return attr.kind == Kind.FILE and (attr.size, attr.mtime_ns) == (status.st_size, status.st_mtime_ns)

    def _symlink(self, entry: "os.DirEntry[bytes]", directory: int) -> None:
        try:
            target = os.readlink(entry.path)
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            raise _SourceFailed(reason(error)) from None
        uid, gid, _ = self._owner(status)
        try:
            inode = self._store.symlink(directory, entry.name, target, uid, gid)
        except Exists:
            inode = self._replace_with_symlink(directory, entry.name, target, uid, gid)
        self._store.set_attr(inode, mtime_ns=status.st_mtime_ns)
        self._tally.symlinks += 1

    def _replace_with_symlink(self, directory: int, name: bytes, target: bytes, uid: int, gid: int) -> int:
        old = self._store.lookup(directory, name)
        kind = self._store.attr(old).kind
        if kind == Kind.DIRECTORY:
            raise IsADirectory("the store has a directory of that name")
        if kind == Kind.SYMLINK and self._store.readlink(old) == target:
            self._store.set_attr(old, uid=uid, gid=gid)
            return old
        # Under another name first, so that the old entry is there until the new one is.
        temporary = b".imgfs-import-%d" % os.getpid()
        inode = self._store.symlink(directory, temporary, target, uid, gid)
        self._store.rename(directory, temporary, directory, name)
        return inode

    def _owner(self, status: os.stat_result) -> tuple[int, int, int]:
        """Return uid, gid and mode; who is not root cannot give files away, nor a set-id bit with them."""
        mode = stat.S_IMODE(status.st_mode)
        if self._as_root:
            return status.st_uid, status.st_gid, mode
        if (status.st_uid, status.st_gid) != (self._uid, self._gid):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        return self._uid, self._gid, mode

    def _skip(self, path: bytes, reason: str) -> None:
        self._tally.skipped += 1
        self._observer.skipped(path, reason)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read_whole(file: int, size: int) -> bytes:
    """Return up to *size* bytes from where *file* stands; fewer only at its end."""
    try:
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
    except OSError as error:
        raise _SourceFailed(reason(error)) from None
    return data
