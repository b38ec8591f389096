"""Copies a directory tree into a store, past FUSE: all kinds of files, with their links, as `cp -a` would.

Owns the order of the copy and what it leaves out. Must not know who watches, nor how anything is printed.

*Concurrency:* see `transfer`.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imgfs.ahead import FileRead, ReadAhead, read_into
from imgfs.batch import NewImage
from imgfs.errors import (
    Damaged,
    Exists,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotFound,
    StoreLimit,
    TooLarge,
    TooManyLinks,
)
from imgfs.file_xattrs import FileXattrs
from imgfs.format import IMAGE_BYTES_MAX, Kind, storable_ns
from imgfs.gathered import Gathered
from imgfs.log import SMALL_BYTES
from imgfs.same_files import File, SameFiles, identity
from imgfs.store import ROOT, Attr, Store
from imgfs.transfer import DEVICES, PIECE_BYTES, Observer, Tally, Totals, batches, reason

# Power loss can take this much of a running import.
_SYNC_BYTES = 256 << 20
_SYNC_S = 5.0

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
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

    path: bytes
    inode: int
    fresh: bool
    status: os.stat_result


def measure_tree(source: bytes) -> Iterator[Totals]:
    """Count the files below the directory *source*; yield the sums as they grow, the last one is the whole.

    What cannot be read counts for nothing here; the copy will name it.
    """
    images = data_bytes = 0
    seen: set[File] = set()
    pending = [source]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        if status.st_nlink > 1:
                            if identity(status) in seen:
                                continue
                            seen.add(identity(status))
                        images += 1
                        data_bytes += status.st_size
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError:
            continue
        yield Totals(images, data_bytes)
    yield Totals(images, data_bytes)


def import_tree(store: Store, source: bytes, observer: Observer, *, into: bytes = b"", resume: bool = False) -> Tally:
    """Copy what is in the directory *source* into the directory *into* of *store*, and its own mode and times too.

    Directories that are missing are made; what else has the name of an entry is replaced, and further names of it
    stay what they were. With *resume*, an image that has the size and the mtime of its file is taken as copied.
    Owners, devices, and attributes other than those of `user.` are kept only for root. When it returns, all of it is
    durable; when it raises, closing the store makes durable what was copied.

    Raises:
        NotADirectory: *into* leads through something else.
        InvalidArgument: *into* leads out of the store, or *source* lies within it.
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
        self._pairs = SameFiles()
        self._xattrs = FileXattrs(store, self._tally, observer)
        self._gathered = Gathered(store, self._tally, _ENTRY_ERRORS, self._skip)
        self._ahead = ReadAhead(self._xattrs.has_none, self._flush)
        # Directories whose entries are all in the store, or gathered.
        self._left: list[_Imported] = []
        self._as_root = os.geteuid() == 0
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._store_directory = identity(os.stat(store.path))
        self._synced_bytes = 0
        self._synced_s = time.monotonic()

    def run(self, source: bytes, into: bytes) -> Tally:
        self._check_outside(source)
        pending: list[_Enter | _Imported] = [_Enter(source, self._make_path(into))]
        try:
            while pending:
                step = pending.pop()
                if isinstance(step, _Imported):
                    self._left.append(step)
                else:
                    pending.extend(self._enter(step))
        finally:
            # However this ends, what was counted is in the store.
            try:
                self._flush()
            finally:
                self._ahead.close()
        self._store.sync()
        return self._tally

    def _flush(self) -> None:
        """Store what is gathered, then settle the directories that have all their entries now."""
        self._gathered.flush()
        while self._left:
            self._leave(self._left.pop(0))

    def _check_outside(self, source: bytes) -> None:
        """Make sure that *source* is not of the files that the store itself consists of."""
        path = os.path.realpath(source)
        while os.path.exists(path):
            if identity(os.stat(path)) == self._store_directory:
                raise InvalidArgument(
                    f"'{os.fsdecode(source)}' is where the store itself lies, which cannot be imported into itself"
                )
            if path == os.path.dirname(path):
                return
            path = os.path.dirname(path)

    def _make_path(self, path: bytes) -> int:
        inode = ROOT
        names = [name for name in path.split(b"/") if name not in (b"", b".")]
        if b".." in names:
            raise InvalidArgument(f"'{os.fsdecode(path)}' leads out of the store; paths there start at its top")
        try:
            for name in names:
                try:
                    inode = self._store.lookup(inode, name)
                except NotFound:
                    inode = self._store.mkdir(inode, name, 0o755, self._uid, self._gid)
            if self._store.attr(inode).kind == Kind.DIRECTORY:
                return inode
        except NotADirectory:
            pass  # said below, in words that have the path in them
        raise NotADirectory(f"'{os.fsdecode(path)}' in the store is not a directory; name another with --into")

    def _enter(self, step: _Enter) -> list[_Enter | _Imported]:
        """Copy the entries of a directory; return what remains to be done, last first."""
        path = step.path
        try:
            status = os.stat(path) if step.inode else os.lstat(path)
            if identity(status) == self._store_directory:
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
            later: list[_Enter | _Imported] = [_Imported(path, inode, fresh, status)]
            empty = fresh or next(self._store.list(inode), None) is None
            try:
                for batch in batches(scan):
                    batch.sort(key=os.DirEntry.inode)
                    others = []
                    for entry in batch:
                        if entry.is_dir(follow_symlinks=False):
                            later.append(_Enter(entry.path, 0, inode, entry.name))
                        else:
                            others.append((entry, entry.is_file(follow_symlinks=False)))
                    # With `resume` most of them may be there.
                    ahead = empty or not self._resume
                    self._ahead.ask(path, [entry.name for entry, is_file in others if is_file and ahead])
                    for entry, is_file in others:
                        self._entry(entry, is_file, inode, empty)
            except OSError as error:
                self._skip(path, reason(error))
        return later

    def _leave(self, step: _Imported) -> None:
        status = step.status
        self._xattrs.bring_in(step.path, step.path, step.inode, fresh=step.fresh)
        if step.fresh:
            self._store.set_attr(step.inode, mtime_ns=status.st_mtime_ns)
        else:
            uid, gid, mode = self._owner_of(status)
            self._store.set_attr(step.inode, mode=mode, uid=uid, gid=gid, mtime_ns=status.st_mtime_ns)

    def _directory(self, parent: int, name: bytes, status: os.stat_result) -> tuple[int, bool]:
        """Return the inode of a directory of the store, and whether it was made now."""
        uid, gid, mode = self._owner_of(status)
        try:
            inode = self._store.mkdir(parent, name, mode, uid, gid)
        except Exists:
            inode = self._store.lookup(parent, name)
            if self._store.attr(inode).kind != Kind.DIRECTORY:
                raise NotADirectory("the store has something else of that name") from None
            return inode, False
        self._tally.directories += 1
        return inode, True

    def _entry(self, entry: "os.DirEntry[bytes]", is_file: bool, directory: int, empty: bool) -> None:
        """Copy what is no directory into *directory*, which was *empty* before this copy, or not."""
        try:
            if is_file:
                self._image(entry, directory, empty)
            else:
                self._gathered.flush()
                self._other(entry, directory, empty)
        except _ENTRY_ERRORS as error:
            self._skip(entry.path, str(error))
        except _SourceFailed as error:
            self._skip(entry.path, str(error))
        self._observer.advanced(self._tally)
        if self._tally.data_bytes - self._synced_bytes >= _SYNC_BYTES or time.monotonic() - self._synced_s >= _SYNC_S:
            self._flush()
            self._store.sync()
            self._synced_bytes = self._tally.data_bytes
            self._synced_s = time.monotonic()

    # -- images -----------------------------------------------------------------------------------------------

    def _image(self, entry: "os.DirEntry[bytes]", directory: int, empty: bool) -> None:
        known = None
        read = self._ahead.take()
        if not empty and (self._resume or self._store.any_rare()):
            known = self._known(directory, entry.name)
        if self._resume and known is not None and self._is_there(entry, known):
            self._xattrs.bring_in(entry.path, entry.path, known.inode, fresh=False)
            return
        if known is None and read is not None:
            self._gather(read, entry, directory)
            return
        try:
            file = os.open(entry.path, _READ_FLAGS)
        except OSError as error:
            raise _SourceFailed(reason(error)) from None
        try:
            status = os.fstat(file)
            if known is None and status.st_nlink < 2 and status.st_size <= SMALL_BYTES and self._xattrs.has_none(file):
                self._gather(self._read(file, status), entry, directory)
                return
            self._gathered.flush()
            self._put(file, status, entry, directory, empty, known)
        finally:
            os.close(file)

    def _read(self, file: int, status: os.stat_result) -> FileRead:
        """Return what is in *file*, at most a MiB."""
        try:
            data = read_into(file, self._gathered.room(status.st_size))
        except OSError as error:
            raise _SourceFailed(reason(error)) from None
        return FileRead(data, status.st_mode, status.st_uid, status.st_gid, storable_ns(status.st_mtime_ns))

    def _gather(self, read: FileRead, entry: "os.DirEntry[bytes]", directory: int) -> None:
        """Let the image that was *read* be stored with others."""
        owner = self._owner(read.uid, read.gid, read.mode)
        self._gathered.add(NewImage(directory, entry.name, read.data, *owner, read.mtime_ns), entry.path)
        if self._gathered.is_full():
            self._flush()

    def _put(
        self,
        file: int,
        status: os.stat_result,
        entry: "os.DirEntry[bytes]",
        directory: int,
        empty: bool,
        known: Attr | None,
    ) -> None:
        """Store the image in *file* in place of what is *known* to have its name, with what else belongs to it."""
        if status.st_nlink > 1 and self._link(status, Kind.FILE, directory, entry.name, empty):
            return
        before = self._tally.data_bytes
        size = status.st_size
        data: bytes | Iterator[bytes]
        try:
            if size > IMAGE_BYTES_MAX:
                raise TooLarge("an image has at most 4 GiB - 1 bytes")
            if size <= PIECE_BYTES:
                # A file that shrank meanwhile is taken as it is now; of one that grew, what belongs to its mtime.
                data = _read_whole(file, size)
                size = len(data)
            else:
                data = self._pieces(file, size)
            uid, gid, mode = self._owner_of(status)

            def put(name: bytes) -> int:
                mtime_ns = status.st_mtime_ns
                return self._store.put(directory, name, data, size, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns)

            # One name of several gives way: the others, in place of which it would be put too, may be other files.
            shared = known is not None and known.nlink > 1
            inode = self._replace(directory, entry.name, put) if shared else put(entry.name)
            self._pairs.put(status, inode)
            self._xattrs.bring_in(file, entry.path, inode, fresh=known is None or shared)
        except BaseException:
            # Pieces of it may be counted already.
            self._tally.data_bytes = before
            raise
        self._tally.images += 1
        self._tally.data_bytes = before + size

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

    def _is_there(self, entry: "os.DirEntry[bytes]", known: Attr) -> bool:
        """Return whether *known*, which has the name of *entry*, is that file as it is now; if so, count it."""
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return False
        if known.kind != Kind.FILE or (known.size, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
            return False
        further = self._pairs.inode(status) is not None
        if not self._pairs.fits(status, known):
            return False
        if further:
            self._tally.hard_links += 1
        else:
            self._tally.resumed += 1
        return True

    # -- symbolic links and special files ---------------------------------------------------------------------

    def _other(self, entry: "os.DirEntry[bytes]", directory: int, empty: bool) -> None:
        path, store = entry.path, self._store
        try:
            status = entry.stat(follow_symlinks=False)
            target = os.readlink(path) if entry.is_symlink() else None
        except OSError as error:
            raise _SourceFailed(reason(error)) from None
        kind = Kind.SPECIAL if target is None else Kind.SYMLINK
        if status.st_nlink > 1 and self._link(status, kind, directory, entry.name, empty):
            return
        type_bits = stat.S_IFMT(status.st_mode)
        if type_bits in DEVICES and not self._as_root:
            raise _SourceFailed("only root can copy a device")
        uid, gid, mode = self._owner_of(status)

        def make(name: bytes) -> int:
            if target is not None:
                return store.symlink(directory, name, target, uid, gid)
            return store.special(directory, name, type_bits | mode, status.st_rdev, uid, gid)

        known = None if empty else self._known(directory, entry.name)
        same = known is not None and self._is_same(known, kind, status, target) and self._pairs.fits(status, known)
        if known is not None and same:
            inode = known.inode
            store.set_attr(inode, mode=mode if target is None else None, uid=uid, gid=gid, mtime_ns=status.st_mtime_ns)
        else:
            inode = make(entry.name) if known is None else self._replace(directory, entry.name, make)
            store.set_attr(inode, mtime_ns=status.st_mtime_ns)
            self._pairs.put(status, inode)
        self._xattrs.bring_in(path, path, inode, fresh=not same)
        if target is None:
            self._tally.special_files += 1
        else:
            self._tally.symlinks += 1

    def _is_same(self, known: Attr, kind: Kind, status: os.stat_result, target: bytes | None) -> bool:
        """Return whether *known* is what would be made, but for owner, mode and times."""
        if known.kind != kind:
            return False
        if target is not None:
            try:
                return self._store.readlink(known.inode) == target
            except Damaged:
                return False
        return stat.S_IFMT(known.mode) == stat.S_IFMT(status.st_mode) and known.device == status.st_rdev

    # -- names ------------------------------------------------------------------------------------------------

    def _known(self, directory: int, name: bytes) -> Attr | None:
        """Return what has that name in the store."""
        try:
            return self._store.attr(self._store.lookup(directory, name))
        except NotFound:
            return None

    def _link(self, status: os.stat_result, kind: Kind, directory: int, name: bytes, empty: bool) -> bool:
        """Give what was copied of a file with several names one more; return False if nothing was, or it cannot be."""
        inode = self._pairs.inode(status)
        if inode is None:
            return False
        attr = self._store.attr(inode)
        if (attr.kind, attr.size, attr.mtime_ns) != (kind, status.st_size, status.st_mtime_ns):
            return False  # it changed meanwhile, or another file has got its number
        known = None if empty else self._known(directory, name)
        if known is None or known.inode != inode:

            def link(to: bytes) -> int:
                self._store.link(attr.inode, directory, to)
                return attr.inode

            try:
                if known is None:
                    link(name)
                else:
                    self._replace(directory, name, link)
            except (TooManyLinks, StoreLimit):
                self._tally.separated += 1
                return False
        self._tally.hard_links += 1
        return True

    def _replace(self, directory: int, name: bytes, make: Callable[[bytes], int]) -> int:
        """Let *make* make an entry in place of what is called *name*; return its inode."""
        if self._store.attr(self._store.lookup(directory, name)).kind == Kind.DIRECTORY:
            raise IsADirectory("the store has a directory of that name")
        # Under another name first, so that the old entry is there until the new one is.
        temporary = b".imgfs-import-%d" % os.getpid()
        try:
            self._store.unlink(directory, temporary)
        except NotFound:
            pass  # nobody was killed here
        inode = make(temporary)
        self._store.rename(directory, temporary, directory, name)
        return inode

    # -- the rest ---------------------------------------------------------------------------------------------

    def _owner(self, uid: int, gid: int, mode: int) -> tuple[int, int, int]:
        """Return uid, gid and mode to store; who is not root cannot give files away, nor a set-id bit with them."""
        mode = stat.S_IMODE(mode)
        if self._as_root:
            return uid, gid, mode
        if (uid, gid) != (self._uid, self._gid):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        return self._uid, self._gid, mode

    def _owner_of(self, status: os.stat_result) -> tuple[int, int, int]:
        return self._owner(status.st_uid, status.st_gid, status.st_mode)

    def _skip(self, path: bytes, reason: str) -> None:
        self._tally.skipped += 1
        self._observer.skipped(path, reason)


def _read_whole(file: int, size: int) -> bytes:
    """Return up to *size* bytes from where *file* stands; fewer only at its end."""
    try:
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
    except OSError as error:
        raise _SourceFailed(reason(error)) from None
    return data
