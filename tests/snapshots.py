"""All that a reader can see of a store, taken in one go and compared.

Owns the ways to look, which have to agree. Must not know what a store should hold.

*Concurrency:* none.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from imgfs.errors import Damaged
from imgfs.format import Kind
from imgfs.store import ROOT, Store

T = TypeVar("T")

Attributes = tuple[tuple[bytes, bytes], ...]


class Node(NamedTuple):
    """Everything a reader can see of one path."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    data: bytes | None  # of an image or a link; None: EIO
    inode: int
    nlink: int
    size: int
    mtime_ns: int
    ctime_ns: int
    attributes: Attributes | None = ()  # those that were set; None: EIO
    device: int = 0


Snapshot = dict[bytes, Node]
Plain = tuple[Kind, int, int, int, bytes | None]  # a node without what the store chooses itself


def plain(snapshot: Snapshot) -> dict[bytes, Plain]:
    return {path: node[:5] for path, node in snapshot.items()}


def groups(inodes: Mapping[bytes, object]) -> set[frozenset[bytes]]:
    """Return which paths are names of the same."""
    found: dict[object, set[bytes]] = {}
    for path, inode in inodes.items():
        found.setdefault(inode, set()).add(path)
    return {frozenset(paths) for paths in found.values()}


def read_image(store: Store, inode: int) -> bytes:
    handle = store.open_image(inode)
    try:
        return bytes(store.read(handle, 0, store.attr(inode).size + 1))
    finally:
        store.release(handle)


def attributes_of(store: Store, inode: int) -> Attributes:
    return tuple((name, store.get_xattr(inode, name)) for name in sorted(store.list_xattrs(inode)))


def snapshot(store: Store, *, damaged: bool = False) -> Snapshot:
    """Return all that a reader sees, by path; check that the ways to see it agree. *damaged*: an EIO is no failure."""
    found: Snapshot = {}
    names: dict[int, list[tuple[int, bytes]]] = {}  # of what is no directory

    def read(what: Callable[[], T]) -> T | None:
        try:
            return what()
        except Damaged:
            if not damaged:
                raise
            return None

    def look(path: bytes, inode: int) -> None:
        attr = store.attr(inode)
        data = None
        if attr.kind == Kind.FILE:
            data = read(lambda: read_image(store, inode))
        elif attr.kind == Kind.SYMLINK:
            data = read(lambda: store.readlink(inode))
        elif attr.kind == Kind.SPECIAL:
            data = b""
        else:
            entries = list(store.list(inode))
            assert len({entry.name for entry in entries}) == len(entries), f"a name twice in {path!r}: {entries}"
            subdirectories = 0
            for entry in entries:
                below = path + b"/" + entry.name
                assert store.lookup(inode, entry.name) == entry.inode, below
                look(below, entry.inode)
                if found[below].kind == Kind.DIRECTORY:
                    subdirectories += 1
                    assert (store.parent(entry.inode), store.name(entry.inode)) == (inode, entry.name), below
                else:
                    names.setdefault(entry.inode, []).append((inode, entry.name))
            assert attr.nlink == 2 + subdirectories, path
        if data is not None:
            assert len(data) == attr.size, path
        found[path] = Node(
            attr.kind,
            attr.mode,
            attr.uid,
            attr.gid,
            data,
            inode,
            attr.nlink,
            attr.size,
            attr.mtime_ns,
            attr.ctime_ns,
            read(lambda: attributes_of(store, inode)),
            attr.device,
        )

    look(b"", ROOT)
    nodes = {node.inode: node for node in found.values()}
    for inode, places in names.items():
        assert (store.parent(inode), store.name(inode)) in places, places
        assert nodes[inode].nlink == len(places), f"{nodes[inode].nlink} links, but these names: {places}"
    kinds = [node.kind for node in nodes.values()]
    counts = store.counts()
    assert counts.images == kinds.count(Kind.FILE) + kinds.count(Kind.SPECIAL)
    assert (counts.directories, counts.symlinks) == (kinds.count(Kind.DIRECTORY), kinds.count(Kind.SYMLINK))
    return found


def difference(seen: Snapshot, wanted: Snapshot) -> str:
    """Return in which paths two states differ, and how."""
    lines = []
    for path in sorted(seen.keys() | wanted.keys()):
        one, other = seen.get(path), wanted.get(path)
        if one != other:
            lines.append(f"{path[-40:]!r}: {_brief(one)} instead of {_brief(other)}")
    return "\n".join(lines)


def _brief(node: Node | None) -> str:
    if node is None:
        return "nothing"
    kind, mode, uid, gid, data, inode, nlink, size, mtime_ns, ctime_ns, attributes, device = node
    head = data if data is None else data[:8]
    times = f"{mtime_ns=} {ctime_ns=}"
    more = f"{attributes} {device=:x}" if attributes or device else ""
    return f"({kind.name} {mode:o} {uid} {gid} {head!r} {inode=:x} {nlink=} {size=} {times} {more})"


def assert_same(seen: Snapshot, wanted: Snapshot, where: str) -> None:
    assert seen == wanted, f"{where}:\n{difference(seen, wanted)}"
