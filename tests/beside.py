"""The same is done on a mount and in a directory of plain XFS; what can be seen of both afterwards must be equal.

Owns what "equal" means: everything a program can see of a file but the inode's number, ctime, atime, the blocks it
takes and the size of a directory, which belong to the file system. Owns the one mount that the tests of a module
share, each in a directory of its own; when the last has run the store is mounted anew, and must show what each test
has left. Must not know which programs are run.

Its fixtures are registered in `conftest.py`.
"""

import hashlib
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from mounted import SETTINGS, Mounted, XfsDisk, imgfs, run

from imgfs.settings import MIB
from imgfs.store import make_store

T = TypeVar("T")

# In place of a time at which the test was running already: it is never the same on both sides.
NOW = -1
# The kernel's clock for files goes in steps.
CLOCK_STEP_NS = 10**8
# A link that leads nowhere, as long as XFS takes one.
LONG_LINK = b"x/" * 511 + b"x"
# security.capability, version 2: effective, CAP_NET_RAW permitted.
CAPABILITY = (0x02000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)


class Facts(NamedTuple):
    """What a program can see of one file, wherever that lies."""

    mode: int
    uid: int
    gid: int
    links: int
    size: int
    mtime_ns: int
    device: int
    same_as: bytes  # the first path that leads to the same inode
    attributes: tuple[tuple[str, bytes], ...]
    content: bytes  # a digest, the target of a link, nothing for all else


def facts(directory: Path, now_ns: int = 2**63) -> dict[bytes, Facts]:
    """Return all that is seen below *directory*, by path; times from *now_ns* on are NOW."""
    top = os.fsencode(directory)
    paths = [b"."]
    for place, directories, files in os.walk(top):
        paths += (os.path.relpath(os.path.join(place, name), top) for name in directories + files)
    first: dict[int, bytes] = {}
    found = {}
    for path in sorted(paths):
        inode = os.lstat(os.path.join(top, path)).st_ino
        found[path] = _facts_of(os.path.join(top, path), first.setdefault(inode, path), now_ns)
    return found


def _facts_of(path: bytes, same_as: bytes, now_ns: int) -> Facts:
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    content = b""
    if kind == stat.S_IFLNK:
        content = os.readlink(path)
    elif kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return Facts(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        0 if kind == stat.S_IFDIR else status.st_size,
        status.st_mtime_ns if status.st_mtime_ns < now_ns else NOW,
        status.st_rdev,
        same_as,
        tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
        content,
    )


class Beside:
    """A directory on a mount, one of plain XFS, and a third one on that XFS to copy from and to."""

    def __init__(self, mounted: Mounted, mount: Path, plain: Path, outside: Path) -> None:
        self.mounted = mounted
        self.mount = mount
        self.plain = plain
        self.outside = outside
        self._now_ns = time.time_ns() - CLOCK_STEP_NS

    def run(self, *command: str | Path, code: int = 0, user: str | None = None) -> str:
        """Run *command* in both places; return what it wrote, which must be the same."""
        return self.each(lambda place: run(*command, code=code, user=user, cwd=place))

    def each(self, call: Callable[[Path], T]) -> T:
        """Call *call* with both places; return what it returns, which must be the same."""
        on_mount, on_plain = call(self.mount), call(self.plain)
        assert on_mount == on_plain
        return on_mount

    def write(self, name: str, data: bytes) -> None:
        """Make the image *name* in both places."""
        self.each(lambda place: (place / name).write_bytes(data))

    def check(self) -> dict[bytes, Facts]:
        """Return all that is seen in both places, by path."""
        return self.each(lambda place: facts(place, self._now_ns))


# -- what is put in ---------------------------------------------------------------------------------------------------


def make_photos(directory: Path, seed: int) -> None:
    """Fill *directory* with 40 files of 4 MiB in sum: all sorts of names, sizes, modes, owners, times, links."""
    chance = random.Random(seed)
    top = os.fsencode(directory)
    places = [top, top + b"/a", top + b"/a/b c", top + "/ä/深".encode()]
    for place in places:
        os.makedirs(place, exist_ok=True)
    names = [b"n" * 255, "日本.jpg".encode(), b"new\nline", b"\xff\xfe not text", b"-rf", b"back\\slash, comma", b" "]
    names += [b"%04d.jpg" % number for number in range(33)]
    sizes = [0, 1, 4095, 4096, 131072, 262145, MIB, MIB + 1] + [chance.randrange(60_000) for _ in range(32)]
    for name, size in zip(names, sizes, strict=True):
        path = chance.choice(places) + b"/" + name
        with open(path, "wb") as file:
            file.write(chance.randbytes(size))
        os.chown(path, *chance.choice([(0, 0), (33, 33), (1234, 100)]))
        os.chmod(path, chance.choice([0o644, 0o600, 0o755, 0o444, 0o000]))
        os.utime(path, ns=(0, chance.randrange(-(10**18), 16 * 10**17)))
    os.symlink(b"a/b c", top + b"/link")
    os.symlink(LONG_LINK, top + b"/long link")
    for path in [top + b"/link", top + b"/long link", *reversed(places), top + "/ä".encode()]:
        os.utime(path, ns=(0, chance.randrange(16 * 10**17)), follow_symlinks=False)


def make_special(top: Path) -> None:
    """Make the directory *top*, with further names of images, files of other kinds, and extended attributes."""
    (top / "below").mkdir(parents=True)
    os.setxattr(top / "below", "user.album", "Sömmer".encode())
    image = top / "image"
    image.write_bytes(b"image" * 1000)
    os.link(image, top / "other name")
    os.link(image, top / "below" / "third name")
    os.setxattr(image, "user.comment", b"a comment\0with a zero")
    os.setxattr(image, "user.empty", b"")
    os.setxattr(image, "user.large", b"l" * 20_000)
    os.setxattr(image, "trusted.note", b"for root alone")
    program = top / "program"
    program.write_bytes(b"#!/bin/true\n")
    os.chown(program, 33, 33)
    os.chmod(program, 0o4755)
    os.setxattr(program, "security.capability", CAPABILITY)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
    os.mknod(top / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(top / "terminal", stat.S_IFCHR | 0o620, os.makedev(4, 1))
    os.link(top / "fifo", top / "below" / "fifo")
    os.symlink("image", top / "link")
    os.link(top / "link", top / "link's other name", follow_symlinks=False)
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, 10**18 + number), follow_symlinks=False)
    os.utime(top, ns=(0, 10**18))


# -- the mount --------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """A mounted store, a directory of plain XFS beside it, and what the tests have left in the store, by directory."""

    mounted: Mounted
    plain: Path
    left: dict[Path, dict[bytes, Facts]]


@pytest.fixture(scope="module")
def beside_module(disk: XfsDisk, site: Path) -> Iterator[Shared]:
    """One mount for the tests of a module, with extended attributes; what they left must outlive it."""
    name = f"beside{random.getrandbits(32):08x}"
    store, point, plain = disk.path / name, site / name, disk.path / f"{name}-plain"
    for directory in (point, plain):
        directory.mkdir()
    make_store(str(store), SETTINGS, uid=0, gid=0)
    mounted = Mounted(store, point)
    shared = Shared(mounted, plain, {})
    try:
        mounted.start("allow_other,xattr")
        yield shared
        mounted.watch()
        mounted.stop()
        mounted.start("allow_other,xattr")
        for place, left in shared.left.items():
            assert facts(place) == left, place.name
    finally:
        try:
            mounted.tear_down()
            imgfs("check", store)
        finally:
            shutil.rmtree(store)
            shutil.rmtree(plain)


@pytest.fixture
def beside(beside_module: Shared, request: pytest.FixtureRequest) -> Iterator[Beside]:
    """Empty directories, one on the mount, the others on plain XFS."""
    name = re.sub(r"\W+", "-", request.node.name)
    shared = beside_module
    mount, plain, outside = shared.mounted.point / name, shared.plain / "plain", shared.plain / "outside"
    for directory in (mount, plain, outside):
        directory.mkdir()
    shared.mounted.watch()
    try:
        yield Beside(shared.mounted, mount, plain, outside)
        shared.left[mount] = facts(mount)
    finally:
        shutil.rmtree(plain)
        shutil.rmtree(outside)
