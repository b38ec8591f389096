"""A store against a dict: whatever is done, cut off, killed, deleted or damaged, it holds what was promised.

The promise: a kill costs nothing that returned; a power cut costs nothing that was synced, and of the rest it leaves
what the volumes said at some moment since then; a call in which either happened took place or did not.
"""

from random import Random

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from powercut import PowerCut, SimulatedDisk
from store_model import ATTRIBUTES, MAKES, NAMES, NUMBERS, OWNERS, SIZES, VALUES, State, StoreModel, pick
from stores import PATH, abandon, open_store, read_all, tree

from imgfs.errors import (
    Damaged,
    StoreFull,
)
from imgfs.format import Kind
from imgfs.settings import KIB
from imgfs.store import ROOT

# Not st.randoms: what is on the disk, and so how often a choice is made, depends on clocks and salts.
SEEDS = st.integers(0, 1 << 32)


class FailingStore(StoreModel):
    """A store that is killed, cut off, damaged, and full."""

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
        operation = data.draw(st.sampled_from(sorted(WANTED)))
        arguments = {"where": NUMBERS, "number": NUMBERS, "name": NAMES, "owner": OWNERS, "size": SIZES.filter(bool)}
        arguments |= {"kind": MAKES, "offset": st.integers(0, 400), "what": st.just({"mode", "mtime_ns"})}
        arguments |= {"attribute": ATTRIBUTES, "value": VALUES}
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
    "make": ("where", "name", "kind"),
    "link": ("number", "where", "name"),
    "exchange": ("number", "where"),
    "set_xattr": ("number", "attribute", "value"),
    "remove": ("number",),
    "rename": ("number", "where", "name"),
    "set_attr": ("number", "owner", "what"),
    "create": ("where", "name", "owner"),
    "write": ("number", "offset", "size"),
    "flush": ("number",),
    "release": ("number",),
    "sync": ("number",),
}


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
FailingStore.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, phases=PHASES)
TestStoreModel = FailingStore.TestCase
