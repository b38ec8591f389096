"""Where things from the trash are brought back to: a store that is open for writing, or the mountpoint of one.

Owns how something is made whole before it gets its name. Must not know the trash. Paths start at the top of the store,
without a slash; a symbolic link on the way is no directory.

*Concurrency:* none; others may use the mountpoint meanwhile, and none of their names is taken from them.
"""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from imgfs.errors import Exists, ImgfsError, IsADirectory, NotADirectory, NotFound
from imgfs.format import Kind
from imgfs.history import Attributes
from imgfs.store import Store

_RENAME_NOREPLACE = 1
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Content(NamedTuple):
    """What is made anew."""

    kind: Kind
    attributes: Attributes
    size: int
    device: int
    pieces: Iterable[bytes]
    xattrs: Mapping[bytes, bytes]


class Target(Protocol):
    """A tree that things can be put into; each call raises OSError or ImgfsError."""

    def is_directory(self, path: bytes) -> bool | None:
        """Return whether there is a directory at *path*; None if there is nothing."""

    def put(self, path: bytes, content: Content, *, replace: bool) -> list[str]:
        """Make *content* at *path*, whole or not at all, in place of what is there only if *replace* says so.

        Return what of it could not be kept.

        Raises:
            Exists: something is there.
            IsADirectory: a directory is, which is never replaced.
        """

    def make_directory(self, path: bytes, attributes: Attributes, xattrs: Mapping[bytes, bytes]) -> list[str]:
        """Make a directory at *path*; return what of it could not be kept."""

    def set_time(self, path: bytes, mtime_ns: int) -> None:
        """Let the directory at *path* be as old as it was before its entries came back."""

    def finish(self) -> None:
        """Make all of it durable."""


def _passing_name() -> bytes:
    return b".imgfs-restore-%d" % os.getpid()


class StoreTarget:
    """A store that nobody else has open."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def is_directory(self, path: bytes) -> bool | None:
        try:
            return self._store.attr(self._store.resolve(path)).kind == Kind.DIRECTORY
        except (NotFound, NotADirectory):
            return None

    def put(self, path: bytes, content: Content, *, replace: bool) -> list[str]:
        store = self._store
        directory, _, name = path.rpartition(b"/")
        parent, passing = store.resolve(directory), _passing_name()
        there = self.is_directory(path)
        if there:
            raise IsADirectory("a directory has that name")
        if there is not None and not replace:
            raise Exists("there is something of that name")
        with contextlib.suppress(NotFound):
            store.unlink(parent, passing)  # left by one that was killed
        try:
            self._make(parent, passing, content)
            store.rename(parent, passing, parent, name, replace=replace)
        except ImgfsError:
            with contextlib.suppress(ImgfsError):
                store.unlink(parent, passing)
            raise
        return []

    def _make(self, parent: int, name: bytes, content: Content) -> None:
        store = self._store
        uid, gid, mode, mtime_ns = content.attributes
        if content.kind == Kind.FILE:
            inode = store.put(
                parent, name, content.pieces, content.size, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns
            )
        else:
            if content.kind == Kind.SYMLINK:
                inode = store.symlink(parent, name, b"".join(content.pieces), uid, gid)
            else:
                inode = store.special(parent, name, mode, content.device, uid, gid)
            store.set_attr(inode, mode=stat.S_IMODE(mode), mtime_ns=mtime_ns)
        for attribute, value in content.xattrs.items():
            store.set_xattr(inode, attribute, value)

    def make_directory(self, path: bytes, attributes: Attributes, xattrs: Mapping[bytes, bytes]) -> list[str]:
        directory, _, name = path.rpartition(b"/")
        uid, gid, mode, _ = attributes
        inode = self._store.mkdir(self._store.resolve(directory), name, mode, uid, gid)
        for attribute, value in xattrs.items():
            self._store.set_xattr(inode, attribute, value)
        return []

    def set_time(self, path: bytes, mtime_ns: int) -> None:
        self._store.set_attr(self._store.resolve(path), mtime_ns=mtime_ns)

    def finish(self) -> None:
        self._store.sync()


class MountTarget:
    """A store that is mounted for writing at *mountpoint*."""

    def __init__(self, mountpoint: str) -> None:
        self._root = os.open(mountpoint, _DIRECTORY_FLAGS)

    def close(self) -> None:
        os.close(self._root)

    @contextlib.contextmanager
    def _directory(self, path: bytes) -> Iterator[int]:
        """Give a descriptor of the directory at *path*; no link is followed, which could lead out of the mount."""
        directory = os.dup(self._root)
        try:
            for name in path.split(b"/") if path else []:
                below = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
                os.close(directory)
                directory = below
            yield directory
        finally:
            os.close(directory)

    def is_directory(self, path: bytes) -> bool | None:
        above, _, name = path.rpartition(b"/")
        try:
            with self._directory(above) as directory:
                return stat.S_ISDIR(os.stat(name or b".", dir_fd=directory, follow_symlinks=False).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, path: bytes, content: Content, *, replace: bool) -> list[str]:
        above, _, name = path.rpartition(b"/")
        there = self.is_directory(path)
        if there:
            raise IsADirectory("a directory has that name")
        if there is not None and not replace:
            raise Exists("there is something of that name")
        passing = _passing_name()
        with self._directory(above) as directory:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(passing, dir_fd=directory)
            try:
                lost = self._make(directory, passing, content)
                _rename(directory, passing, name, replace=replace)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(passing, dir_fd=directory)
                raise
        return lost

    def _make(self, directory: int, name: bytes, content: Content) -> list[str]:
        if content.kind == Kind.FILE:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=directory)
            try:
                for piece in content.pieces:
                    left = memoryview(piece)
                    while left:
                        left = left[os.write(file, left) :]
                lost = _set_attributes(directory, name, content.attributes, content.xattrs)
                os.utime(file, ns=(content.attributes.mtime_ns, content.attributes.mtime_ns))
            finally:
                os.close(file)
            return lost
        if content.kind == Kind.SYMLINK:
            os.symlink(b"".join(content.pieces), name, dir_fd=directory)
        else:
            os.mknod(name, content.attributes.mode, content.device, dir_fd=directory)
        lost = _set_attributes(
            directory, name, content.attributes, content.xattrs, is_link=content.kind == Kind.SYMLINK
        )
        times = content.attributes.mtime_ns, content.attributes.mtime_ns
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        return lost

    def make_directory(self, path: bytes, attributes: Attributes, xattrs: Mapping[bytes, bytes]) -> list[str]:
        above, _, name = path.rpartition(b"/")
        with self._directory(above) as directory:
            os.mkdir(name, 0o700, dir_fd=directory)
            return _set_attributes(directory, name, attributes, xattrs)

    def set_time(self, path: bytes, mtime_ns: int) -> None:
        with self._directory(path) as directory:
            os.utime(directory, ns=(mtime_ns, mtime_ns))

    def finish(self) -> None:
        os.fsync(self._root)


def _set_attributes(
    directory: int, name: bytes, attributes: Attributes, xattrs: Mapping[bytes, bytes], *, is_link: bool = False
) -> list[str]:
    """Give what is called *name* in *directory* owner, mode and extended attributes; return what it cannot have."""
    lost = []
    mode = stat.S_IMODE(attributes.mode)
    try:
        os.chown(name, attributes.uid, attributes.gid, dir_fd=directory, follow_symlinks=False)
    except PermissionError:
        lost.append("only root can give it back to its owner")
        mode &= ~(stat.S_ISUID | stat.S_ISGID)
    if not is_link:
        os.chmod(name, mode, dir_fd=directory)
    path = b"/proc/self/fd/%d/%s" % (directory, name)
    for attribute, value in xattrs.items():
        try:
            os.setxattr(path, attribute, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            why = "mount it with -o xattr" if error.errno == errno.EOPNOTSUPP else error.strerror
            lost.append(f"extended attribute {os.fsdecode(attribute)}: {why}")
    return lost


def _rename(directory: int, old: bytes, new: bytes, *, replace: bool) -> None:
    """Rename within *directory*, in one step. Exists."""
    if replace:
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    elif _libc.renameat2(directory, old, directory, new, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            raise Exists("there is something of that name")
        raise OSError(number, os.strerror(number))
