"""A model of a tree: directories as dicts, several names for one inode, attributes; and files that stay open.

Owns the steps and what must come of them. What may be done and what is an error is learned from the file system
beside the mount, so the model has no rules of its own. Must not know who chooses the steps.

*Concurrency:* none.
"""

import contextlib
import ctypes
import errno
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from exerciser import Pair, Step, both, pick

NAMES = (b"a", b"b", b"c", b"d.jpg", b"new\nline", b"\xff" * 255, "ü ü".encode(), b"-rf")
SIZES = (0, 1, 100, 4096, 30_000, 140_000)
MODES = (0o644, 0o600, 0o755, 0o444, 0o000)
DIRECTORY_MODES = (0o755, 0o700, 0o1777, 0o2755, 0o500)
OWNERS = ((0, 0), (33, 33), (1234, 100), (-1, 7))
TARGETS = (b"a", b"../b", b"/nowhere", b"x" * 1000)  # XFS takes 1,023 bytes
XATTRS = ("user.a", "user.b" * 30, "trusted.c", "user.d", "security.e")
VALUE_SIZES = (0, 1, 40, 1000, 4000, 65_536)
FLAGS = (0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)
# What is made, without names for the numbers of devices, for no program shall reach one.
SPECIAL = (
    (stat.S_IFIFO, 0),
    (stat.S_IFSOCK, 0),
    (stat.S_IFCHR, os.makedev(240, 7)),
    (stat.S_IFBLK, os.makedev(511, 70_000)),
)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
DEPTH_MAX = 5
OPEN_MAX = 6
# A tree of so many entries takes no more: looking at all of it should stay cheap.
ENTRIES_MAX = 60
MAKING = ("write_file", "make_directory", "make_link", "make_special", "link")
# Attributes that the store makes up, which nobody has set.
MADE_UP = "user.imgfs."
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class Node:
    """An inode."""

    type: int  # the S_IFMT bits
    mode: int
    owner: tuple[int, int]
    content: bytearray = field(default_factory=bytearray)  # or the target of a link
    device: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    entries: dict[bytes, "Node"] = field(default_factory=dict)
    mtime_ns: int | None = None  # None: when it happened
    number: int = 0  # as the mount told it first

    @property
    def is_directory(self) -> bool:
        return self.type == stat.S_IFDIR

    def height(self) -> int:
        return 1 + max((node.height() for node in self.entries.values()), default=0)


class Place(NamedTuple):
    """A name in a directory, and what it leads to."""

    directory: Node
    above: bytes
    depth: int
    name: bytes

    @property
    def path(self) -> bytes:
        return self.above + b"/" + self.name

    @property
    def node(self) -> Node | None:
        return self.directory.entries.get(self.name)


class Held(NamedTuple):
    """An open file."""

    node: Node
    files: Pair[int]


class TreeModel:
    """A directory and all below it."""

    STEPS: ClassVar[Sequence[str]] = (
        *("write_file", "remove") * 5,
        *("make_directory", "rename", "link", "hold") * 4,
        *("exchange", "rename_to_new", "set_xattr", "write_held") * 3,
        *("make_link", "make_special", "change_mode", "set_time", "remove_xattr", "change_owner") * 2,
        *("list_some", "look_at_held", "let_one_go", "forget"),
    )

    def __init__(self, directories: Pair[Path]) -> None:
        self._tops = Pair(os.fsencode(directories.mount), os.fsencode(directories.twin))
        status = os.stat(directories.mount)
        self._root = Node(stat.S_IFDIR, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid))
        self._held: list[Held] = []
        self._taken = 0

    def take(self, step: Step) -> None:
        self._taken += 1
        full = step.name in MAKING and len(self._places()) >= ENTRIES_MAX
        method: Callable[[Step], None] = self.remove if full else getattr(self, step.name)
        method(step)

    # -- choosing ---------------------------------------------------------------------------------------------

    def _places(self) -> list[Place]:
        """Return all that is there, a directory before what is in it."""

        def below(directory: Node, path: bytes, depth: int) -> Iterator[Place]:
            for name, node in directory.entries.items():
                yield Place(directory, path, depth, name)
                yield from below(node, path + b"/" + name, depth + 1)

        return list(below(self._root, b"", 1))

    def _new_place(self, directory: int, name: int) -> Place:
        """Return a name that may be there or not."""
        directories = [(self._root, b"", 1)]
        directories += [
            (place.node, place.path, place.depth + 1)
            for place in self._places()
            if place.node is not None and place.node.is_directory and place.depth < DEPTH_MAX
        ]
        return Place(*pick(directories, directory), pick(NAMES, name))

    def _old_place(self, number: int) -> Place:
        """Return what is there, or seldom what may not be."""
        places = self._places()
        return pick(places, number) if places and number % 11 else self._new_place(number, number)

    def _paths(self, place: Place) -> Pair[bytes]:
        return Pair(self._tops.mount + place.path, self._tops.twin + place.path)

    # -- making -----------------------------------------------------------------------------------------------

    def write_file(self, step: Step) -> None:
        """Make an image, write one anew, or append to it."""
        place = self._new_place(step.a, step.b)
        node = place.node
        if node is not None and node.type in (stat.S_IFCHR, stat.S_IFBLK):
            return  # nobody shall open a device
        data = random.Random(self._taken).randbytes(pick(SIZES, step.c))
        how = pick((os.O_TRUNC, os.O_EXCL, os.O_APPEND), step.c // 8)
        mode = pick(MODES, step.b)

        def write(path: bytes) -> None:
            # Not through links, and without waiting for who might read a pipe.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | how, mode)
            with contextlib.closing(os.fdopen(file, "wb", buffering=0)) as opened:
                opened.write(data)

        if both(write, self._paths(place)) is None:
            return
        if node is None:
            node = self._add(place, Node(stat.S_IFREG, mode, self._owner_in(place.directory)))
        if how != os.O_APPEND:
            node.content.clear()
        node.content += data
        if data or how == os.O_TRUNC:
            node.mtime_ns = None

    def make_directory(self, step: Step) -> None:
        place, mode = self._new_place(step.a, step.b), pick(DIRECTORY_MODES, step.c) & 0o755
        if both(lambda path: os.mkdir(path, mode), self._paths(place)) is not None:
            mode |= place.directory.mode & stat.S_ISGID
            self._add(place, Node(stat.S_IFDIR, mode, self._owner_in(place.directory)))

    def make_link(self, step: Step) -> None:
        """A symbolic one."""
        place, target = self._new_place(step.a, step.b), pick(TARGETS, step.c)
        if both(lambda path: os.symlink(target, path), self._paths(place)) is not None:
            self._add(place, Node(stat.S_IFLNK, 0o777, self._owner_in(place.directory), bytearray(target)))

    def make_special(self, step: Step) -> None:
        place, mode = self._new_place(step.a, step.b), pick(MODES, step.b)
        kind, device = pick(SPECIAL, step.c)
        if both(lambda path: os.mknod(path, kind | mode, device), self._paths(place)) is not None:
            self._add(place, Node(kind, mode, self._owner_in(place.directory), device=device))

    def link(self, step: Step) -> None:
        """One more name for what is there."""
        old, new = self._old_place(step.a), self._new_place(step.b, step.c)
        if both(_link, self._paths(old), self._paths(new)) is not None:
            assert old.node is not None
            self._add(new, old.node)

    def _add(self, place: Place, node: Node) -> Node:
        place.directory.entries[place.name] = node
        place.directory.mtime_ns = None
        return node

    def _owner_in(self, directory: Node) -> tuple[int, int]:
        return (os.geteuid(), directory.owner[1] if directory.mode & stat.S_ISGID else os.getegid())

    # -- changing names ---------------------------------------------------------------------------------------

    def remove(self, step: Step) -> None:
        place, call = self._old_place(step.a), pick((os.unlink, os.unlink, os.rmdir), step.b)
        if both(call, self._paths(place)) is not None:
            del place.directory.entries[place.name]
            place.directory.mtime_ns = None

    def rename(self, step: Step) -> None:
        self._rename(step, 0)

    def rename_to_new(self, step: Step) -> None:
        self._rename(step, RENAME_NOREPLACE)

    def exchange(self, step: Step) -> None:
        self._rename(step, RENAME_EXCHANGE)

    def _rename(self, step: Step, flags: int) -> None:
        old = self._old_place(step.a)
        # Two names of one tree are exchanged only if both are there.
        new = self._old_place(step.b) if flags == RENAME_EXCHANGE or not step.c % 4 else self._new_place(step.b, step.c)
        heights = [(old.node, new.depth)] + [(new.node, old.depth)] * (flags == RENAME_EXCHANGE)
        if any(node is not None and depth + node.height() > DEPTH_MAX + 3 for node, depth in heights):
            return  # such a path would be too long, on the one side only
        if both(lambda old, new: _renameat2(old, new, flags), self._paths(old), self._paths(new)) is None:
            return
        source, target = old.node, new.node
        assert source is not None
        if source is target:
            return  # two names of one inode: nothing happens
        for place in (old, new):
            place.directory.mtime_ns = None
        new.directory.entries[new.name] = source
        if flags == RENAME_EXCHANGE:
            assert target is not None
            old.directory.entries[old.name] = target
        else:
            del old.directory.entries[old.name]

    # -- attributes -------------------------------------------------------------------------------------------

    def change_mode(self, step: Step) -> None:
        place = self._old_place(step.a)
        if place.node is None or place.node.type == stat.S_IFLNK:
            return
        mode = pick(DIRECTORY_MODES if place.node.is_directory else MODES, step.b)
        both(lambda path: os.chmod(path, mode), self._paths(place))
        place.node.mode = mode

    def change_owner(self, step: Step) -> None:
        place, (uid, gid) = self._old_place(step.a), pick(OWNERS, step.b)
        if both(lambda path: os.lchown(path, uid, gid), self._paths(place)) is not None:
            assert place.node is not None
            place.node.owner = (place.node.owner[0] if uid < 0 else uid, gid)

    def set_time(self, step: Step) -> None:
        # From 1957 to 2023.
        place, mtime_ns = self._old_place(step.a), (step.b - 200_000) * 2_000 * 10**9 + step.c * 900
        times = (step.c, mtime_ns)
        if both(lambda path: os.utime(path, ns=times, follow_symlinks=False), self._paths(place)) is not None:
            assert place.node is not None
            place.node.mtime_ns = mtime_ns

    def set_xattr(self, step: Step) -> None:
        place, name, flags = self._old_place(step.a), pick(XATTRS, step.b), pick(FLAGS, step.c)
        value = random.Random(self._taken).randbytes(pick(VALUE_SIZES, step.c // 4))

        def set_value(path: bytes) -> None:
            os.setxattr(path, name, value, flags, follow_symlinks=False)

        if both(set_value, self._paths(place)) is not None:
            assert place.node is not None
            place.node.xattrs[name] = value

    def remove_xattr(self, step: Step) -> None:
        place, name = self._old_place(step.a), pick(XATTRS, step.b)
        if place.node is not None and place.node.xattrs and step.c % 4:
            name = pick(sorted(place.node.xattrs), step.b)
        if both(lambda path: os.removexattr(path, name, follow_symlinks=False), self._paths(place)) is not None:
            assert place.node is not None
            del place.node.xattrs[name]

    # -- open files -------------------------------------------------------------------------------------------

    def hold(self, step: Step) -> None:
        """Keep a file open, whatever becomes of its names."""
        place = self._old_place(step.a)
        if place.node is None or place.node.type != stat.S_IFREG:
            return
        if len(self._held) >= OPEN_MAX:
            self.let_one_go(step)
        files = both(lambda path: os.open(path, os.O_RDWR), self._paths(place), same=False)
        assert files is not None
        self._held.append(Held(place.node, files))

    def write_held(self, step: Step) -> None:
        if self._held:
            held, data = pick(self._held, step.a), random.Random(self._taken).randbytes(pick(SIZES, step.c))
            offset = step.b % (len(held.node.content) + 1)
            both(lambda file: os.pwrite(file, data, offset), held.files)
            held.node.content[offset : offset + len(data)] = data
            if data:
                held.node.mtime_ns = None

    def look_at_held(self, step: Step) -> None:
        links = self._links()
        for held in self._held:
            status = os.fstat(held.files.mount)
            assert status.st_nlink == links.get(held.node, 0)
            assert status.st_size == len(held.node.content)
            assert os.pread(held.files.mount, len(held.node.content) + 1, 0) == held.node.content

    def let_one_go(self, step: Step) -> None:
        if self._held:
            both(os.close, self._held.pop(step.a % len(self._held)).files)

    def let_go(self) -> None:
        while self._held:
            both(os.close, self._held.pop().files)

    # -- looking ----------------------------------------------------------------------------------------------

    def forget(self, step: Step) -> None:
        """Let the kernel forget names and attributes, and with them the pages of what nobody has open."""
        Path("/proc/sys/vm/drop_caches").write_text("2")

    def list_some(self, step: Step) -> None:
        place = self._old_place(step.a)
        if place.node is not None and place.node.is_directory:
            assert set(os.listdir(self._tops.mount + place.path)) == set(place.node.entries)

    def _links(self) -> dict[Node, int]:
        links: dict[Node, int] = {}
        for place in self._places():
            assert place.node is not None
            links[place.node] = links.get(place.node, 0) + 1
        return links

    def check(self) -> None:
        """Compare names, types, link counts, attributes and contents of all there is."""
        links, numbers = self._links(), dict[int, Node]()
        self._check_directory(self._root, b"")
        for place in self._places():
            node, path = place.node, self._tops.mount + place.path
            assert node is not None
            status = os.lstat(path)
            assert (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)) == (node.type, node.mode), path
            assert (status.st_uid, status.st_gid) == node.owner, path
            assert node.mtime_ns in (None, status.st_mtime_ns), path
            node.number = node.number or status.st_ino
            assert status.st_ino == node.number, path
            assert numbers.setdefault(node.number, node) is node, path
            self._check_xattrs(node, path)
            if node.is_directory:
                self._check_directory(node, place.path)
                continue
            assert status.st_nlink == links[node], path
            if node.type == stat.S_IFREG:
                assert status.st_size == len(node.content), path
                assert Path(os.fsdecode(path)).read_bytes() == node.content, path
            elif node.type == stat.S_IFLNK:
                assert os.readlink(path) == node.content, path
            else:
                assert status.st_rdev == node.device, path

    def _check_directory(self, node: Node, path: bytes) -> None:
        path = self._tops.mount + path
        with os.scandir(path) as entries:
            found = {entry.name: _type_of(entry) for entry in entries}
        assert found == {name: _letter(child.type) for name, child in node.entries.items()}, path
        assert os.stat(path).st_nlink == 2 + sum(child.is_directory for child in node.entries.values()), path

    def _check_xattrs(self, node: Node, path: bytes) -> None:
        names = [name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith(MADE_UP)]
        assert sorted(names) == sorted(node.xattrs), path
        for name, value in node.xattrs.items():
            assert os.getxattr(path, name, follow_symlinks=False) == value, (path, name)


def _link(old: bytes, new: bytes) -> None:
    os.link(old, new, follow_symlinks=False)


def _renameat2(old: bytes, new: bytes, flags: int) -> None:
    if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flags):
        error = ctypes.get_errno()
        # For a directory that is not empty POSIX leaves the choice; XFS took the other one.
        raise OSError(errno.ENOTEMPTY if error == errno.EEXIST and not flags else error, "renameat2")


def _type_of(entry: "os.DirEntry[bytes]") -> str:
    """Return what the listing itself says of the type; for special files it takes a stat."""
    if entry.is_symlink():
        return "link"
    return (
        "directory" if entry.is_dir(follow_symlinks=False) else "file" if entry.is_file(follow_symlinks=False) else ""
    )


def _letter(kind: int) -> str:
    return {stat.S_IFLNK: "link", stat.S_IFDIR: "directory", stat.S_IFREG: "file"}.get(kind, "")
