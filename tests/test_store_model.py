"""A store against a dict: whatever is done, cut off, killed, deleted or damaged, it holds what was promised.

The promise: a kill costs nothing that returned; a power cut costs nothing that was synced, and of the rest it leaves
what the volumes said at some moment since then; a call in which either happened took place or did not.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from powercut import PowerCut, SimulatedDisk
from stores import PATH, Found, abandon, disk_of, new_store, open_store, read_all, tree

from imgfs.errors import Damaged, ImgfsError, IsADirectory, NotADirectory, NotEmpty, StoreFull
from imgfs.format import Kind
from imgfs.settings import KIB
from imgfs.store import ROOT, Store

NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff" * 255])
OWNERS = st.sampled_from([(0o644, 1, 2), (0o600, 1000, 1000), (0o4755, 0, 7)])
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([0, 4000, 12_000, 20_000, 70_000]))
NUMBERS = st.integers(0, 1 << 16)
# Not st.randoms: what is on the disk, and so how often a choice is made, depends on clocks and salts.
SEEDS = st.integers(0, 1 << 32)
HANDLES_MAX = 4
OPERATIONS = ("put", "make", "remove", "rename", "set_attr", "create", "write", "flush", "release", "sync")
State = dict[bytes, Found]


@dataclass(eq=False)
class Node:
    """An inode that has a name or is open: what the volumes say of it, and what its next needle will say."""

    inode: int
    parent: int
    name: bytes
    saved: Found | None
    draft: Found | None = None
    linked: bool = True

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

    def children(self, parent: int) -> dict[bytes, Node]:
        return {node.name: node for node in self.entries() if node.parent == parent}

    def path(self, node: Node) -> bytes:
        return (b"" if node.parent == ROOT else self.path(self.nodes[node.parent])) + b"/" + node.name

    def is_inside(self, directory: int, inode: int) -> bool:
        while directory not in (ROOT, inode):
            directory = self.nodes[directory].parent
        return directory == inode

    def note(self) -> None:
        """Remember what the volumes say now."""
        state = {self.path(node): node.saved for node in self.entries() if node.saved is not None}
        if state != self.states[-1]:
            self.states.append(state)

    def unlink_node(self, node: Node) -> None:
        node.linked = False
        self.forget(node)

    def forget(self, node: Node) -> None:
        if not node.linked and all(other is not node for other, _ in self.handles.values()):
            del self.nodes[node.inode]

    def start_from(self, state: State) -> None:
        """Let the model be what a new process found."""
        inodes = {path: found.inode for path, found in state.items()} | {b"": ROOT}
        self.nodes, self.handles, self.states = {}, {}, [state]
        for path, found in state.items():
            parent, _, name = path.rpartition(b"/")
            self.nodes[found.inode] = Node(found.inode, inodes[parent], name, found)

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "store"):
            return
        assert tree(self.store) == {self.path(node): node.seen for node in self.entries()}
        for handle, (node, _) in self.handles.items():
            assert self.store.handle_inode(handle) == node.inode
            assert read_all(self.store, handle) == node.seen.data
            assert self.store.attr(node.inode).nlink == node.linked
        kinds = [node.seen.kind for node in self.entries()]
        counts = self.store.counts()
        assert (counts.images, counts.symlinks) == (kinds.count(Kind.FILE), kinds.count(Kind.SYMLINK))
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
        if old is not None and inode == old.inode:
            old.saved, old.draft = found, None
        else:
            if old is not None:
                self.unlink_node(old)
                self.note()
            self.nodes[inode] = Node(inode, parent, name, found)
        self.note()

    @rule(where=NUMBERS, name=NAMES, link=st.booleans())
    def make(self, where: int, name: bytes, link: bool) -> None:
        parent = pick(self.directories(), where)
        if name in self.children(parent):
            return
        if link:
            inode = self.store.symlink(parent, name, name * 3, 3, 4)
            found = Found(Kind.SYMLINK, inode, 0o777, 3, 4, self.store.attr(inode).mtime_ns, name * 3)
        else:
            inode = self.store.mkdir(parent, name, 0o750, 3, 4)
            found = Found(Kind.DIRECTORY, inode, 0o750, 3, 4, 0, b"")
        self.nodes[inode] = Node(inode, parent, name, found)
        self.note()

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        node = pick(self.entries(), number)
        if node is None:
            return
        if node.seen.kind != Kind.DIRECTORY:
            self.store.unlink(node.parent, node.name)
        elif self.children(node.inode):
            with pytest.raises(NotEmpty):
                self.store.rmdir(node.parent, node.name)
            return
        else:
            self.store.rmdir(node.parent, node.name)
        self.unlink_node(node)
        self.note()

    @rule(number=NUMBERS, where=NUMBERS, name=NAMES)
    def rename(self, number: int, where: int, name: bytes) -> None:
        node, parent = pick(self.entries(), number), pick(self.directories(), where)
        if node is None or self.is_inside(parent, node.inode):
            return
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
                self.store.rename(node.parent, node.name, parent, name)
            return
        self.store.rename(node.parent, node.name, parent, name)
        if target is node:
            return
        for each in (node, target):
            if each is not None and each.saved is None:
                each.commit()  # an image gets its first needle before it is renamed, or replaced
                self.note()
        if target is not None:
            self.unlink_node(target)
        node.parent, node.name = parent, name
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
        if node.draft is not None:
            node.draft = node.draft._replace(**changes)
            if node.saved is not None and what - {"mtime_ns"}:
                # Mode and owner have a needle of their own at once; the time is that of the new bytes.
                mode, uid, gid = node.draft.mode, node.draft.uid, node.draft.gid
                node.saved = node.saved._replace(mode=mode, uid=uid, gid=gid)
        elif node.saved is not None:
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
        self.nodes[inode] = Node(inode, parent, name, None, draft)
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
        return pick([handle for handle, (_, write) in self.handles.items() if write], number)

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

    # -- what goes wrong ------------------------------------------------------------------------------------------

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open_again(self.disk, self.states[-1:])

    @rule(data=st.data(), step=st.integers(0, 9), power=st.booleans(), seed=SEEDS)
    def stop_within(self, data: st.DataObject, step: int, power: bool, seed: int) -> None:
        """Do something, and go on with the disk as it was before one of its steps."""
        before = self.states.copy()
        disks: list[SimulatedDisk] = []
        start = self.disk.steps

        def keep(_: str) -> None:
            if self.disk.steps == start + step:
                disks.append(self.disk.copy())

        self.disk.before_step = keep
        operation = data.draw(st.sampled_from(OPERATIONS))
        arguments = {"where": NUMBERS, "number": NUMBERS, "name": NAMES, "owner": OWNERS, "size": SIZES.filter(bool)}
        arguments |= {"link": st.booleans(), "offset": st.integers(0, 400), "what": st.just({"mode", "mtime_ns"})}
        method = getattr(self, operation)
        wanted = WANTED[operation]
        try:
            method(**{key: data.draw(arguments[key], label=key) for key in wanted})
        finally:
            self.disk.before_step = None
        if disks:
            self.stop(disks[0], before + self.states, len(before) - 1, power, Random(seed))

    @rule(power=st.booleans(), seed=SEEDS)
    def stop_between(self, power: bool, seed: int) -> None:
        self.stop(self.disk.copy(), self.states, len(self.states) - 1, power, Random(seed))

    @rule(where=NUMBERS, names=st.tuples(NAMES, NAMES, NAMES), seed=SEEDS)
    def lose_what_was_put(self, where: int, names: tuple[bytes, ...], seed: int) -> None:
        for name in names:
            self.put(where, name, 9000, (0o644, 1, 2))
        self.stop_between(True, seed)

    def stop(self, disk: SimulatedDisk, states: list[State], last: int, power: bool, random: Random) -> None:
        """Go on with *disk*; a power cut may leave any of *states*, a kill number *last* or a later one."""
        disk = disk.after_power_cut(random) if power else disk.after_kill()
        abandon(self.store)
        if random.random() < 0.4:
            spoil_index(disk, random)
        if random.random() < 0.3:
            disk.cut_at = random.randrange(12)
            try:
                abandon(open_store(disk))
            except PowerCut:
                pass
            again = random.random() < 0.7
            power = power or again
            disk = disk.after_power_cut(random) if again else disk.after_kill()
        self.open_again(disk, states[0 if power else last :])

    def open_again(self, disk: SimulatedDisk, allowed: list[State]) -> None:
        abandon(self.store)
        self.adopt(open_store(disk))
        state = tree(self.store)
        assert state in allowed
        assert self.store.report.damage == []
        self.start_from(state)

    @rule(number=NUMBERS, byte=NUMBERS, mask=st.integers(1, 255), reopen=st.booleans())
    def damage(self, number: int, byte: int, mask: int, reopen: bool) -> None:
        """Damage costs the image it strikes, and no other; a new process finds it, too."""
        images = [node for node in self.entries() if node.seen.kind == Kind.FILE and node.seen.data]
        written = [node for node, write in self.handles.values() if write]  # these are read from their staging
        node = pick([node for node in images if node not in written], number)
        if node is None:
            return
        if reopen:
            for _ in range(2):  # what was durable at the time of a later needle is not taken for torn
                self.store.sync()
                self.store.set_attr(ROOT, mode=0o755)
        place = self.store.locate(node.inode)
        path = f"{PATH}/volumes/{place.volume:08d}.vol"
        offset = place.data_offset + byte % place.size
        self.disk.flip(path, offset, mask)
        if reopen:
            disk = self.disk.after_kill()
            abandon(self.store)
            self.adopt(open_store(disk))
            self.start_from(self.states[-1])
            node = self.nodes[node.inode]
        with pytest.raises(Damaged, match=f"volume {place.volume}, offset {place.offset}"):
            self.store.open_image(node.inode)
        for other in self.entries():
            if other is not node and other.seen.kind == Kind.FILE:
                handle = self.store.open_image(other.inode)
                assert read_all(self.store, handle) == other.seen.data
                self.store.release(handle)
        self.disk.flip(path, offset, mask)

    @rule(number=NUMBERS, where=NUMBERS, name=NAMES)
    def fill_up(self, number: int, where: int, name: bytes) -> None:
        """A full disk takes no image, keeps all it has, and lets images go."""
        parent = pick(self.directories(), where)
        old = self.children(parent).get(name)
        if old is not None and (old.seen.kind == Kind.DIRECTORY or old.draft is not None):
            return
        self.disk.capacity_bytes = self.disk._used_bytes() + 16 * KIB + 1000
        with pytest.raises(StoreFull):
            self.store.put(parent, name, b"x" * 2000, 2000, mode=0, uid=0, gid=0, mtime_ns=0)
        self.the_store_holds_what_the_model_holds()
        self.disk.capacity_bytes = self.disk._used_bytes() + 1000
        self.remove(number)
        self.disk.capacity_bytes = None


WANTED = {
    "put": ("where", "name", "size", "owner"),
    "make": ("where", "name", "link"),
    "remove": ("number",),
    "rename": ("number", "where", "name"),
    "set_attr": ("number", "owner", "what"),
    "create": ("where", "name", "owner"),
    "write": ("number", "offset", "size"),
    "flush": ("number",),
    "release": ("number",),
    "sync": ("number",),
}


def pick(items: list[Any], number: int) -> Any:
    """Return one of *items*, None if there is none."""
    return items[number % len(items)] if items else None


def spoil_index(disk: SimulatedDisk, random: Random) -> None:
    """Delete, cut, change or exchange some of the derived files."""
    paths = [path for path in disk.paths() if path.endswith((".idx", ".names"))]
    old = {path: disk.content(path) for path in paths}
    for path in random.sample(paths, random.randint(1, len(paths))):
        how = random.choice(("delete", "cut", "flip", "flip", "exchange"))
        size = len(old[path])
        if how == "delete":
            disk.remove(path)
        elif how == "cut":
            disk.set_content(path, old[path][: random.randint(0, size)])
        elif how == "exchange":
            disk.set_content(path, old[random.choice(paths)])
        elif size:
            disk.flip(path, random.randrange(size), random.randint(1, 255))


# No shrinking: it takes minutes. Make max_examples larger and add Phase.shrink to hunt for a bug.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
StoreModel.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, phases=PHASES)
TestStoreModel = StoreModel.TestCase
