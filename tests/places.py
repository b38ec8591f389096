"""A new directory for each test, once on a mounted store and once on plain XFS: what a test demands is what XFS does.

Owns one mount for all tests of a module, so that a test of one system call costs milliseconds; and the system calls
that Python does not have. Must not know what is tested.

Its fixtures are registered in `conftest.py`.
"""

import contextlib
import ctypes
import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import pytest
from mounted import SETTINGS, Mounted, XfsDisk, as_user, imgfs

from imgfs.store import make_store

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def shared(disk: XfsDisk, site: Path) -> Iterator[Mounted]:
    """A store that is mounted as long as the tests of a module run; each works in a directory of its own."""
    name = f"shared{random.getrandbits(32):08x}"
    store, point = disk.path / name, site / name
    point.mkdir()
    make_store(str(store), SETTINGS, uid=0, gid=0)
    mounted = Mounted(store, point)
    try:
        mounted.start("allow_other,dev,suid,xattr")
        yield mounted
    finally:
        try:
            mounted.tear_down()
            imgfs("check", store, code=mounted.check_code)
        finally:
            shutil.rmtree(store)


@pytest.fixture(params=["imgfs", "xfs"])
def place(request: pytest.FixtureRequest, shared: Mounted, disk: XfsDisk) -> Iterator[Path]:
    """An empty directory on the mount, then one on plain XFS: everybody may go in, only root may write."""
    shared.watch()
    with _directory(shared.point if request.param == "imgfs" else disk.path) as directory:
        yield directory


@pytest.fixture
def here(shared: Mounted) -> Iterator[Path]:
    """An empty directory on the mount, for what has no equal on XFS."""
    shared.watch()
    with _directory(shared.point) as directory:
        yield directory


@contextlib.contextmanager
def _directory(top: Path) -> Iterator[Path]:
    directory = top / f"place{random.getrandbits(64):016x}"
    directory.mkdir(mode=0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


# -- what lies in a directory -----------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"content"),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path, 0o644),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o644),
    "block device": lambda path: os.mknod(path, stat.S_IFBLK | 0o644, os.makedev(7, 300)),
    "character device": lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3)),
}
NO_DIRECTORIES = [kind for kind in KINDS if kind != "directory"]


class DirectoryEntry(NamedTuple):
    """What readdir(3) tells of an entry."""

    name: bytes
    inode: int
    position: int  # as telldir(3) says it, for what comes after
    type_bits: int  # S_IFDIR >> 12 and so on


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


class Listing:
    """An open directory, read as the C library reads it; a context manager."""

    def __init__(self, path: Path) -> None:
        _libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
        _libc.telldir.restype = ctypes.c_long
        self._stream = ctypes.c_void_p(_checked(_libc.opendir(os.fsencode(path)) or -1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def __iter__(self) -> Iterator[DirectoryEntry]:
        while at := _libc.readdir(self._stream):
            entry = _Dirent.from_address(at)
            yield DirectoryEntry(entry.d_name, entry.d_ino, entry.d_off, entry.d_type)

    def seek(self, position: int) -> None:
        """Go on behind the entry with that position; 0 is the start."""
        _libc.seekdir(self._stream, ctypes.c_long(position))

    def tell(self) -> int:
        """Return where the next entry comes from."""
        return int(_libc.telldir(self._stream))


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open the file at *path*, making it if *flags* say so; close it at the end."""
    file = os.open(path, flags, 0o644)
    try:
        yield file
    finally:
        os.close(file)


# -- system calls that Python does not have ---------------------------------------------------------------------------


def _checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Rename with *flags*."""
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Set times; each is seconds and nanoseconds, or 0 and UTIME_NOW or UTIME_OMIT."""
    times = (ctypes.c_long * 4)(*atime, *mtime)
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags))


def fallocate(file: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2) itself, not what the C library does in its place."""
    _checked(_libc.fallocate(file, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def link_of_open(file: int, path: Path) -> None:
    """Give the open image *file* a name."""
    source = os.fsencode(f"/proc/self/fd/{file}")
    _checked(_libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW))


# -- other users ------------------------------------------------------------------------------------------------------

OWNER, GROUP = 1234, 2345
OTHER, OTHER_GROUP = 4321, 5432


def outcome_as(uid: int, gid: int, call: Callable[..., object], *arguments: object) -> str:
    """Call *call* as another user; return the name of the error it fails with, or `ok`."""
    (outcome,) = outcomes_as(uid, gid, lambda: call(*arguments))
    return outcome


def outcomes_as(uid: int, gid: int, *calls: Callable[[], object]) -> list[str]:
    """Call all of *calls* as another user, in this order; return how each ended, as `outcome_as`."""
    results, report = os.pipe()

    def run() -> None:
        for call in calls:
            try:
                call()
                os.write(report, b"ok ")
            except OSError as error:
                os.write(report, errno.errorcode[error.errno or 0].encode() + b" ")

    try:
        as_user(uid, gid, run)
        return os.read(results, 10_000).decode().split()
    finally:
        os.close(results)
        os.close(report)
