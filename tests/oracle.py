"""What a store with any damage or lie in its files may show: asked for everything, and held against its case.

Owns the rules: what is read was once written under that inode; what was not touched is served. Must not know which
mutators there are, nor how the store was opened.

*Concurrency:* none; one store at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, ParamSpec, TypeVar

from cases import Case, current, number
from damage_model import LOST, At
from snapshots import Snapshot, assert_same, attributes_of, read_image, snapshot

from imgfs.errors import ImgfsError
from imgfs.format import VOLUME_HEADER_COPIES, Kind
from imgfs.layout import Word
from imgfs.settings import MIB
from imgfs.store import ROOT, Store
from imgfs.view import Entry, check_name

T = TypeVar("T")
P = ParamSpec("P")

# What the table of a store with so few images may take.
TABLE_BYTES_MAX = 32 * MIB


class Seen(NamedTuple):
    """What could be read of one path; None: an error."""

    inode: int
    kind: Kind
    data: bytes | None


def attempt(do: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T | None:
    """Return what *do* returns, None if it says that it cannot."""
    try:
        return do(*arguments, **more)
    except ImgfsError:
        return None


def entries(store: Store, directory: int) -> list[Entry]:
    return list(store.list(directory))


def walk(store: Store) -> dict[bytes, Seen]:
    """Return all that can be reached by name; trust nothing."""
    found: dict[bytes, Seen] = {}
    pending = [(b"", ROOT)]
    known = set()
    while pending:
        path, inode = pending.pop()
        attr = attempt(store.attr, inode)
        if attr is None:
            found[path] = Seen(inode, Kind.FREE, None)
            continue
        data: bytes | None = b""
        if attr.kind == Kind.FILE:
            data = attempt(read_image, store, inode)
        elif attr.kind == Kind.SYMLINK:
            data = attempt(store.readlink, inode)
        found[path] = Seen(inode, attr.kind, data)
        if attr.kind == Kind.DIRECTORY and inode not in known:
            known.add(inode)
            for entry in attempt(entries, store, inode) or ():
                check_name(entry.name)
                attempt(store.lookup, inode, entry.name)
                pending.append((path + b"/" + entry.name, entry.inode))
    return found


def poke(store: Store) -> dict[int, bytes]:
    """Ask for everything of every inode there is, named or not; return the images that could be read."""
    images: dict[int, bytes] = {}
    words = store._memory.words
    for slot in range(min(words[Word.SLOTS], 200)):
        inode = slot + 1 | store._table.record(slot).generation << 32
        for ask in (store.attr, store.name, store.locate, store.has_xattrs):
            attempt(ask, inode)
        parent = attempt(store.parent, inode)
        if parent is not None:
            attempt(store.attr, parent)
        attempt(entries, store, inode)
        data = attempt(read_image, store, inode)
        if data is not None:
            images[inode] = data
    attempt(store.counts)
    return images


def ask_strangely(store: Store, random: Random) -> None:
    """Ask for inodes and handles as a stale or made-up file handle of NFS does."""
    for _ in range(3):
        inode = number(random, 64)
        for ask in (
            store.attr,
            store.name,
            store.parent,
            store.readlink,
            store.list_xattrs,
            store.prefetch,
            store.locate,
        ):
            attempt(ask, inode)
        attempt(store.lookup, inode, b"a")
        attempt(entries, store, inode)
        handle = attempt(store.open_image, inode)
        if handle is not None:
            attempt(store.release, handle)
        attempt(store.read, number(random, 64), 0, 10)
        attempt(store.release, number(random, 64))


@dataclass
class Oracle:
    case: Case

    def __post_init__(self) -> None:
        seed, case = self.case.seed, self.case
        # Volumes are replayed in this order; those that were compacted come later only by their names.
        last = max(seed.headers, key=lambda path: (seed.headers[path].first_sequence, path))
        tail = [at for at in seed.needles if at.path == last]
        durable = max((at.needle.durable for at in tail if not case.spoils(at.path, at.offset, at.end)), default=0)
        # Where the log may end early, nothing was promised of what comes after.
        torn = case.spoils(last, durable, 1 << 40)
        self.exact = case.harmless
        self.served: dict[int, bytes] = {}
        if not (case.lying or case.rearranged or torn):
            needed = current(seed.needles)
            gone = [path for path in seed.headers if self._headless(path)]
            for node in seed.wanted.values():
                at = needed.get(node.inode)
                if at and node.kind in (Kind.FILE, Kind.SYMLINK) and at.path not in gone and not self._spoiled(at):
                    self.served[node.inode] = node.data or b""

    def _spoiled(self, at: At) -> bool:
        return self.case.spoils(at.path, at.offset, at.end)

    def _headless(self, path: str) -> bool:
        return all(self.case.spoils(path, start, start + 200) for start in VOLUME_HEADER_COPIES)

    def image(self, inode: int, data: bytes) -> None:
        known = self.case.seed.images.get(inode, frozenset())
        assert data in known or data in self.case.images.get(inode, ()), f"inode {inode:#x}: wrong bytes {data[:20]!r}"

    def attributes(self, store: Store, inode: int) -> None:
        told = attempt(attributes_of, store, inode)
        known = self.case.seed.attributes.get(inode, frozenset())
        assert not told or told in known or told in self.case.attributes.get(inode, ()), f"{inode:#x}: {told}"

    def look(self, store: Store) -> dict[bytes, Seen]:
        """Check all that *store* shows, and return it."""
        case = self.case
        assert store._memory.resident_bytes() < TABLE_BYTES_MAX, "the table takes too much memory"
        if not (case.lying or case.rearranged):
            told = snapshot(store, damaged=True)
            found = {path: Seen(node.inode, node.kind, node.data) for path, node in told.items()}
            self._names(told)
            if self.exact:
                assert_same(told, case.seed.wanted, "volumes that were not changed")
        else:
            found = walk(store)
        images = poke(store) if case.lying or case.rearranged else {}
        for path, (inode, kind, data) in found.items():
            if kind in (Kind.FILE, Kind.SYMLINK) and data is not None:
                images[inode] = data
            assert path.count(b"/") < 100
        for inode, data in images.items():
            self.image(inode, data)
            self.attributes(store, inode)
        for inode, data in self.served.items():
            assert images.get(inode) == data, f"inode {inode:#x} was not touched, and is not served"
        return found

    def _names(self, told: Snapshot) -> None:
        for path, node in told.items():
            name = path.rpartition(b"/")[2]
            known = name in self.case.seed.names.get(node.inode, ()) or name.startswith(LOST)
            assert known or node.inode == ROOT, f"{path!r} was never a name of inode {node.inode:#x}"
