"""A dict that does what a store does: names, images, handles, and what the volumes say of them at each moment.

Owns the operations, as rules. Must not know what can go wrong.

*Concurrency:* none; one thread at a time.
"""

import stat
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from powercut import SimulatedDisk
from stores import Found, abandon, disk_of, new_store, read_all, tree

from imgfs.errors import (
    ImgfsError,
    InvalidArgument,
    IsADirectory,
    NoAttribute,
    NotADirectory,
    NotEmpty,
)
from imgfs.format import Kind
from imgfs.store import ROOT, Store

NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff" * 255])
OWNERS = st.sampled_from([(0o644, 1, 2), (0o600, 1000, 1000), (0o4755, 0, 7)])
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([0, 4000, 12_000, 20_000, 70_000]))
NUMBERS = st.integers(0, 1 << 16)
HANDLES_MAX = 4
ATTRIBUTES = st.sampled_from([b"user.a", b"trusted.b"])
VALUES = st.sampled_from([None, b"", b"1", b"2" * 300])
MAKES = st.sampled_from([Kind.DIRECTORY, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL])
State = dict[bytes, Found]
Place = tuple[int, bytes]  # directory and name


@dataclass(eq=False)
class Node:
    """An inode that has names or is open: what the volumes say of it, and what its next needle will say."""

    inode: int
    names: list[Place]
    saved: Found | None
    draft: Found | None = None

    @property
    def linked(self) -> bool:
        return bool(self.names)

    @property
    def seen(self) -> Found:
        seen = self.draft or self.saved
        assert seen is not None
        return seen

    def commit(self) -> None:
        self.saved, self.draft = self.seen, None


class StoreModel(RuleBasedStateMachine):
    """`states` is what a power cut may leave: all that the volumes said since the last sync, oldest first."""

    store: Store
    disk: SimulatedDisk

    @initialize()
    def make_store(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.handles: dict[int, tuple[Node, bool]] = {}  # handle -> (image, may write)
        self.states: list[State] = [{}]
        self.time = 1_000
        self.adopt(new_store())

    def adopt(self, store: Store) -> None:
        self.store, self.disk = store, disk_of(store)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            abandon(self.store)

    # -- the model ------------------------------------------------------------------------------------------------

    def entries(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.linked]

    def directories(self) -> list[int]:
        return [ROOT, *(node.inode for node in self.entries() if node.seen.kind == Kind.DIRECTORY)]

    def places(self) -> list[tuple[Node, Place]]:
        """Return each name there is: of what, and where."""
        return [(node, place) for node in self.nodes.values() for place in node.names]

    def children(self, parent: int) -> dict[bytes, Node]:
        return {name: node for node, (directory, name) in self.places() if directory == parent}

    def path(self, parent: int, name: bytes) -> bytes:
        return (b"" if parent == ROOT else self.path(*self.nodes[parent].names[0])) + b"/" + name

    def is_inside(self, directory: int, inode: int) -> bool:
        while directory not in (ROOT, inode):
            directory = self.nodes[directory].names[0][0]
        return directory == inode

    def note(self) -> None:
        """Remember what the volumes say now."""
        state = {self.path(*place): node.saved for node, place in self.places() if node.saved is not None}
        if state != self.states[-1]:
            self.states.append(state)

    def unlink_name(self, node: Node, parent: int, name: bytes) -> None:
        node.names.remove((parent, name))
        self.forget(node)

    def give_birth(self, *nodes: Node | None) -> None:
        """Others are about to speak of these images, which get their first needles before."""
        for node in nodes:
            if node is not None and node.saved is None:
                node.commit()
                self.note()

    def forget(self, node: Node) -> None:
        if not node.linked and all(other is not node for other, _ in self.handles.values()):
            del self.nodes[node.inode]

    def start_from(self, state: State) -> None:
        """Let the model be what a new process found."""
        inodes = {path: found.inode for path, found in state.items()} | {b"": ROOT}
        self.nodes, self.handles, self.states = {}, {}, [state]
        for path, found in state.items():
            parent, _, name = path.rpartition(b"/")
            node = self.nodes.setdefault(found.inode, Node(found.inode, [], found))
            node.names.append((inodes[parent], name))

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "store"):
            return
        assert tree(self.store) == {self.path(*place): node.seen for node, place in self.places()}
        for node in self.entries():
            if node.seen.kind != Kind.DIRECTORY:
                assert self.store.attr(node.inode).nlink == len(node.names)
        for handle, (node, _) in self.handles.items():
            assert self.store.handle_inode(handle) == node.inode
            assert read_all(self.store, handle) == node.seen.data
            assert self.store.attr(node.inode).nlink == len(node.names)
        kinds = [node.seen.kind for node in self.entries()]
        counts = self.store.counts()
        assert counts.images == kinds.count(Kind.FILE) + kinds.count(Kind.SPECIAL)
        assert counts.symlinks == kinds.count(Kind.SYMLINK)
        assert counts.directories == 1 + kinds.count(Kind.DIRECTORY)

    # -- names and whole images -----------------------------------------------------------------------------------

    @rule(where=NUMBERS, name=NAMES, size=SIZES, owner=OWNERS)
    def put(self, where: int, name: bytes, size: int, owner: tuple[int, int, int]) -> None:
        parent = pick(self.directories(), where)
        old = self.children(parent).get(name)
        self.time += 1
        data = Random(self.time).randbytes(size)
        mode, uid, gid = owner
        if old is not None and old.seen.kind == Kind.DIRECTORY:
            with pytest.raises(IsADirectory):
                self.store.put(parent, name, data, size, mode=mode, uid=uid, gid=gid, mtime_ns=self.time)
            return
        inode = self.store.put(parent, name, data, size, mode=mode, uid=uid, gid=gid, mtime_ns=self.time)
        found = Found(Kind.FILE, inode, mode, uid, gid, self.time, data)
        if old is None:
            self.nodes[inode] = Node(inode, [(parent, name)], found)
        else:  # under all its names
            assert inode == old.inode
            attributes = old.saved.attributes if old.saved is not None else found.attributes
            old.saved, old.draft = found._replace(attributes=attributes), None
        self.note()

    @rule(where=NUMBERS, name=NAMES, kind=MAKES)
    def make(self, where: int, name: bytes, kind: Kind) -> None:
        parent = pick(self.directories(), where)
        if name in self.children(parent):
            return
        if kind == Kind.SYMLINK:
            inode = self.store.symlink(parent, name, name * 3, 3, 4)
            found = Found(kind, inode, 0o777, 3, 4, 0, name * 3)
        elif kind == Kind.SPECIAL:
            inode = self.store.special(parent, name, stat.S_IFCHR | 0o620, 0x89AB_CDEF, 3, 4)
            found = Found(kind, inode, stat.S_IFCHR | 0o620, 3, 4, 0, b"", device=0x89AB_CDEF)
        else:
            inode = self.store.mkdir(parent, name, 0o750, 3, 4)
            found = Found(kind, inode, 0o750, 3, 4, 0, b"")
        if kind != Kind.DIRECTORY:
            found = found._replace(mtime_ns=self.store.attr(inode).mtime_ns)
        self.nodes[inode] = Node(inode, [(parent, name)], found)
        self.note()

    @rule(number=NUMBERS, where=NUMBERS, name=NAMES)
    def link(self, number: int, where: int, name: bytes) -> None:
        node = pick([node for node in self.entries() if node.seen.kind != Kind.DIRECTORY], number)
        parent = pick(self.directories(), where)
        if node is None or name in self.children(parent):
            return
        self.store.link(node.inode, parent, name)
        self.give_birth(node)
        node.names.append((parent, name))
        self.note()

    @rule(number=NUMBERS, where=NUMBERS)
    def exchange(self, number: int, where: int) -> None:
        first, second = pick(self.places(), number), pick(self.places(), where)
        if first is None or first[0] is second[0]:
            return
        (node, place), (other, other_place) = first, second
        if self.is_inside(other_place[0], node.inode) or self.is_inside(place[0], other.inode):
            with pytest.raises(InvalidArgument):
                self.store.exchange(*place, *other_place)
            return
        self.store.exchange(*place, *other_place)
        self.give_birth(node, other)
        node.names[node.names.index(place)] = other_place
        other.names[other.names.index(other_place)] = place
        self.note()

    @rule(number=NUMBERS, attribute=ATTRIBUTES, value=VALUES)
    def set_xattr(self, number: int, attribute: bytes, value: bytes | None) -> None:
        """Set an attribute, or without *value* remove it; what waits for the first needle is a draft, too."""
        node = pick(self.entries(), number)
        if node is None:
            return
        attributes = dict(node.seen.attributes)
        if value is not None:
            self.store.set_xattr(node.inode, attribute, value)
            attributes[attribute] = value
        elif attribute in attributes:
            self.store.remove_xattr(node.inode, attribute)
            del attributes[attribute]
        else:
            with pytest.raises(NoAttribute):
                self.store.remove_xattr(node.inode, attribute)
        if node.saved is not None:
            node.saved = node.saved._replace(attributes=frozenset(attributes.items()))
        if node.draft is not None:
            node.draft = node.draft._replace(attributes=frozenset(attributes.items()))
        self.note()

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        picked = pick(self.places(), number)
        if picked is None:
            return
        node, place = picked
        if node.seen.kind != Kind.DIRECTORY:
            self.store.unlink(*place)
        elif self.children(node.inode):
            with pytest.raises(NotEmpty):
                self.store.rmdir(*place)
            return
        else:
            self.store.rmdir(*place)
        self.unlink_name(node, *place)
        self.note()

    @rule(number=NUMBERS, where=NUMBERS, name=NAMES)
    def rename(self, number: int, where: int, name: bytes) -> None:
        picked, parent = pick(self.places(), number), pick(self.directories(), where)
        if picked is None or self.is_inside(parent, picked[0].inode):
            return
        node, place = picked
        target = self.children(parent).get(name)
        error: type[ImgfsError] | None = None
        if target is not None and target is not node:
            if node.seen.kind != Kind.DIRECTORY:
                error = IsADirectory if target.seen.kind == Kind.DIRECTORY else None
            elif target.seen.kind != Kind.DIRECTORY:
                error = NotADirectory
            elif self.children(target.inode):
                error = NotEmpty
        if error is not None:
            with pytest.raises(error):
                self.store.rename(place[0], place[1], parent, name)
            return
        self.store.rename(place[0], place[1], parent, name)
        if target is node:
            return
        self.give_birth(target, node)
        if target is not None:
            self.unlink_name(target, parent, name)
        node.names[node.names.index(place)] = parent, name
        self.note()

    @rule(number=NUMBERS, owner=OWNERS, what=st.sets(st.sampled_from(["mode", "uid", "gid", "mtime_ns"]), min_size=1))
    def set_attr(self, number: int, owner: tuple[int, int, int], what: set[str]) -> None:
        node = pick(self.entries(), number)
        if node is None:
            return
        self.time += 1
        values = dict(zip(("mode", "uid", "gid", "mtime_ns"), (*owner, self.time), strict=True))
        changes: dict[str, Any] = {key: values[key] for key in what}
        self.store.set_attr(node.inode, **changes)
        if node.seen.kind == Kind.DIRECTORY:
            changes.pop("mtime_ns", None)
        if node.seen.kind == Kind.SPECIAL and "mode" in changes:
            changes["mode"] |= stat.S_IFCHR
        if node.draft is not None:
            node.draft = node.draft._replace(**changes)
            changes.pop("mtime_ns", None)  # waits for the bytes it belongs to
        if node.saved is not None:
            node.saved = node.saved._replace(**changes)
        self.note()

    # -- open images ----------------------------------------------------------------------------------------------

    @rule(where=NUMBERS, name=NAMES, owner=OWNERS)
    def create(self, where: int, name: bytes, owner: tuple[int, int, int]) -> None:
        parent = pick(self.directories(), where)
        if name in self.children(parent) or len(self.handles) >= HANDLES_MAX:
            return
        inode, handle = self.store.create_image(parent, name, *owner)
        draft = Found(Kind.FILE, inode, *owner, self.store.attr(inode).mtime_ns, b"")
        self.nodes[inode] = Node(inode, [(parent, name)], None, draft)
        self.handles[handle] = self.nodes[inode], True

    @rule(number=NUMBERS, write=st.booleans(), truncate=st.booleans())
    def open(self, number: int, write: bool, truncate: bool) -> None:
        node = pick([node for node in self.nodes.values() if node.seen.kind == Kind.FILE], number)
        if node is None or len(self.handles) >= HANDLES_MAX:
            return
        handle = self.store.open_image(node.inode, write=write, truncate=write and truncate)
        self.handles[handle] = node, write
        if write and truncate:
            self.changed(node, b"")

    def changed(self, node: Node, data: bytes) -> None:
        node.draft = node.seen._replace(data=data, mtime_ns=self.store.attr(node.inode).mtime_ns)

    def writer(self, number: int) -> int | None:
        handle: int | None = pick([handle for handle, (_, write) in self.handles.items() if write], number)
        return handle

    @rule(number=NUMBERS, offset=st.integers(0, 400), size=SIZES.filter(bool))
    def write(self, number: int, offset: int, size: int) -> None:
        handle = self.writer(number)
        if handle is None:
            return
        node, _ = self.handles[handle]
        self.time += 1
        data, old = Random(self.time).randbytes(size), node.seen.data
        self.store.write(handle, offset, data)
        self.changed(node, (old + bytes(max(0, offset - len(old))))[:offset] + data + old[offset + size :])

    @rule(number=NUMBERS, size=st.integers(0, 400))
    def truncate(self, number: int, size: int) -> None:
        node = pick([node for node in self.nodes.values() if node.seen.kind == Kind.FILE], number)
        if node is None:
            return
        self.store.truncate(node.inode, size)
        old = node.seen.data
        self.changed(node, old[:size] + bytes(max(0, size - len(old))))
        if not any(other is node and write for other, write in self.handles.values()) and node.linked:
            node.commit()
            self.note()

    @rule(number=NUMBERS)
    def flush(self, number: int) -> None:
        handle = self.writer(number)
        if handle is not None:
            self.store.flush(handle)
            self.flushed(self.handles[handle][0])

    def flushed(self, node: Node) -> None:
        if node.linked and node.draft is not None:
            node.commit()
            self.note()

    @rule(number=NUMBERS)
    def release(self, number: int) -> None:
        handle = pick(list(self.handles), number)
        if handle is not None:
            self.store.release(handle)
            node, write = self.handles.pop(handle)
            if write:
                self.flushed(node)
            self.forget(node)

    @rule(number=NUMBERS)
    def sync(self, number: int) -> None:
        handle = pick(list(self.handles), number)
        if handle is None or number % 2:
            self.store.sync()
        else:
            self.store.fsync(handle)
            if self.handles[handle][1]:
                self.flushed(self.handles[handle][0])
        self.states = self.states[-1:]


def pick(items: list[Any], number: int) -> Any:
    """Return one of *items*, None if there is none."""
    return items[number % len(items)] if items else None
