"""Trees of files for tests of copying: all that a copy has to keep of one, and somebody who watches the copy.

Must not know the command line.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from imgfs.export_tree import export_tree
from imgfs.import_tree import import_tree
from imgfs.store import Store
from imgfs.transfer import PIECE_BYTES, Tally

OLD_NS = 981_173_106_123_456_789
# A capability as the kernel wants it: version 2, cap_net_raw permitted and effective.
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


class Node(NamedTuple):
    """All that a copy has to keep of one entry."""

    kind: int
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    device: int
    attributes: dict[str, bytes]
    names: frozenset[bytes]
    """The paths that name the same file, but for a directory."""


def snapshot(root: Path) -> dict[bytes, Node]:
    """Return every entry below *root*, and itself, by its path from there."""
    top = os.fsencode(root)
    found = {}
    names: dict[int, set[bytes]] = {}
    for directory, directories, files in os.walk(top):
        for name in [b"", *directories, *files]:
            path = os.path.join(directory, name) if name else directory
            status = os.lstat(path)
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            short = os.path.relpath(path, top)
            if not stat.S_ISDIR(status.st_mode):
                names.setdefault(status.st_ino, set()).add(short)
            attributes = {
                attribute: os.getxattr(path, attribute, follow_symlinks=False)
                for attribute in os.listxattr(path, follow_symlinks=False)
            }
            found[short] = Node(
                stat.S_IFMT(status.st_mode),
                stat.S_IMODE(status.st_mode),
                (status.st_uid, status.st_gid),
                status.st_mtime_ns,
                content,
                status.st_rdev,
                attributes,
                frozenset(names.get(status.st_ino, ())),
            )
    for group in names.values():
        for short in group:
            found[short] = found[short]._replace(names=frozenset(group))
    return found


class Watcher:
    """An observer that keeps what it hears, and may act when the copy is at some point."""

    def __init__(self, act: Callable[[Tally], None] | None = None) -> None:
        self.reasons: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        """By the name of what was copied, what it has not got."""
        self._act = act

    def advanced(self, tally: Tally) -> None:
        if self._act is not None:
            self._act(tally)

    def skipped(self, path: bytes, reason: str) -> None:
        self.reasons[os.path.basename(os.fsdecode(path))] = reason

    def incomplete(self, path: bytes, reason: str) -> None:
        self.missing[os.path.basename(os.fsdecode(path))] = reason


def bring_in(store: Store, source: Path, watcher: Watcher | None = None, **options: object) -> Tally:
    return import_tree(store, os.fsencode(source), watcher or Watcher(), **options)  # type: ignore[arg-type]


def take_out(store: Store, target: Path, watcher: Watcher | None = None) -> Tally:
    return export_tree(store, os.fsencode(target), watcher or Watcher())


def make_socket(path: Path) -> None:
    """Make a socket that nobody listens on."""
    os.mknod(path, stat.S_IFSOCK | 0o600)


def plant_links(root: Path) -> None:
    """Fill *root* with files, symbolic links and special files that have several names here and there."""
    (root / "a" / "deep").mkdir(parents=True)
    (root / "b").mkdir()
    (root / "single").write_bytes(b"single")
    (root / "a" / "photo").write_bytes(os.urandom(5000))
    (root / "a" / "deep" / "again").hardlink_to(root / "a" / "photo")
    (root / "b" / "third").hardlink_to(root / "a" / "photo")
    (root / "large").write_bytes(os.urandom(PIECE_BYTES + 1000))
    (root / "b" / "large too").hardlink_to(root / "large")
    (root / "pointer").symlink_to("single")
    os.link(root / "pointer", root / "b" / "pointer", follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o640)
    (root / "b" / "pipe").hardlink_to(root / "pipe")
    make_socket(root / "b" / "socket")


def plant_attributes(root: Path) -> None:
    os.setxattr(root / "single", "user.comment", b"one\0two\xff")
    os.setxattr(root / "single", "user.empty", b"")
    os.setxattr(root / "large", "user.rating", b"5")
    os.setxattr(root / "b", "user.album", b"holidays")
    os.setxattr(root, "user.top", b"top")


def plant_what_is_roots(root: Path) -> None:
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "b" / "disk", stat.S_IFBLK | 0o600, os.makedev(4095, 1048575))
    (root / "b" / "zero").hardlink_to(root / "null")
    os.chown(root / "pipe", 1234, 5678)
    os.setxattr(root / "pointer", "trusted.of_a_link", b"1", follow_symlinks=False)
    os.setxattr(root / "b" / "disk", "trusted.of_a_device", b"2")
    os.setxattr(root / "b", "security.of_a_directory", b"3")
    (root / "program").write_bytes(b"#!")
    os.chown(root / "program", 1234, 5678)
    os.setxattr(root / "program", "security.capability", CAPABILITY)
    (root / "program").chmod(0o755)


def plant_all(root: Path) -> None:
    plant_links(root)
    plant_attributes(root)
    if os.geteuid() == 0:
        plant_what_is_roots(root)
    for number, path in enumerate([*root.rglob("*"), root]):
        os.utime(path, ns=(OLD_NS, OLD_NS + number), follow_symlinks=False)
