"""What a store must hold after a crash: a workload that remembers each state it went through, and who checks them.

Owns the rules a recovered store is held against: it equals the state after some prefix of what was acknowledged, at
least as long as the last sync covers, and at most what was in flight beyond. Must not know how recovery works.

*Concurrency:* none; one thread at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from powercut import SimulatedDisk
from snapshots import Attributes, Plain, Snapshot, assert_same, difference, groups, plain, snapshot
from survivors import NOTHING_UNSYNCED

from imgfs.batch import NewImage
from imgfs.format import Kind, Needle
from imgfs.log import Log
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store
from imgfs.volume import Gap, Volume

STORE = "/store"
VOLUMES = f"{STORE}/volumes"
SETTINGS = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0, checkpoint_needles=8, rest_slots=2)
UID, GID = 1000, 100
# No time of a change is whole seconds, nor the same as that of another.
_START_NS = 1_700_000_000_123_456_789
_TICK_NS = 1_700_000_001


class Clock:
    """The time of the log: it stands still within an operation, so that live and recovered stores tell the same."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_ns = _START_NS
        patch.setattr(Log, "now_ns", lambda _: self.now_ns)

    def tick(self) -> None:
        self.now_ns += _TICK_NS


@dataclass(eq=False)
class Thing:
    """What the model holds under one path, or under several."""

    kind: Kind
    mode: int
    data: bytes | None = None
    uid: int = UID
    gid: int = GID
    attributes: dict[bytes, bytes] = field(default_factory=dict)
    device: int = 0

    @property
    def plain(self) -> Plain:
        return self.kind, self.mode, self.uid, self.gid, self.data


@dataclass
class Cut:
    """The moment before a step: what the disk was, and how much had been promised."""

    step: int
    what: str
    disk: SimulatedDisk
    acknowledged: int  # operations that had returned
    synced: int  # of those, how many a sync covers that has returned
    in_hand: int = 1  # how many more were asked for, and may have been done

    @property
    def highest(self) -> int:
        """The last state that may be there."""
        return self.acknowledged + self.in_hand

    def __str__(self) -> str:
        return f"before step {self.step} ({self.what}): {self.synced} synced, {self.acknowledged} acknowledged"


@dataclass
class Workload:
    """Runs operations on a store, and keeps what the store held after each: `history[n]` after *n* operations."""

    clock: Clock
    settings: Settings = SETTINGS
    disk: SimulatedDisk = field(default_factory=SimulatedDisk)
    history: list[Snapshot] = field(default_factory=list)
    synced: int = 0
    in_hand: int = 1
    model: dict[bytes, Thing] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_store(STORE, self.settings, self.disk, uid=UID, gid=GID)
        self.disk.trace.clear()
        self.open()
        self.model[b""] = Thing(Kind.DIRECTORY, 0o755)
        self.history.append(self._look())
        self._before = self.history[0]

    def open(self) -> None:
        self.store = Store.open(STORE, disk=self.disk, settings=self.settings)

    def record(self) -> None:
        """From now on keep the disk as it is before each step."""

        def before(what: str) -> None:
            disk = self.disk.copy()
            self.cuts.append(Cut(self.disk.steps, what, disk, self.acknowledged, self.synced, self.in_hand))

        self.disk.before_step = before

    @property
    def acknowledged(self) -> int:
        return len(self.history) - 1

    def _look(self) -> Snapshot:
        seen = snapshot(self.store)
        assert plain(seen) == {path: thing.plain for path, thing in self.model.items()}
        assert groups({path: node.inode for path, node in seen.items()}) == groups(self.model)
        for path, thing in self.model.items():
            assert dict(seen[path].attributes or ()) == thing.attributes, path
            assert seen[path].device == thing.device, path
        return seen

    @contextmanager
    def _operation(self) -> Iterator[None]:
        self.clock.tick()
        yield
        self.history.append(self._look())

    def _at(self, path: bytes) -> tuple[int, bytes]:
        directory, _, name = path.rpartition(b"/")
        return self.store.resolve(directory), name

    # -- operations -------------------------------------------------------------------------------------------

    def create(self, path: bytes, data: bytes, mode: int = 0o644, attributes: Attributes = ()) -> None:
        """As open(O_CREAT), fsetxattr, write and close do it."""
        with self._operation():
            inode, handle = self.store.create_image(*self._at(path), mode, UID, GID)
            for name, value in attributes:
                self.store.set_xattr(inode, name, value)
            self._write(handle, data)
            self.model[path] = Thing(Kind.FILE, mode, data, attributes=dict(attributes))

    def _write(self, handle: int, data: bytes) -> None:
        for at in range(0, len(data), 128 * KIB):
            self.store.write(handle, at, data[at : at + 128 * KIB])
        self.store.flush(handle)
        self.store.release(handle)

    def overwrite(self, path: bytes, data: bytes) -> None:
        with self._operation():
            self._write(self.store.open_image(self.store.resolve(path), write=True, truncate=True), data)
            self.model[path].data = data

    def append(self, path: bytes, data: bytes) -> None:
        with self._operation():
            inode = self.store.resolve(path)
            handle = self.store.open_image(inode, write=True)
            self.store.write(handle, self.store.attr(inode).size, data)
            self.store.flush(handle)
            self.store.release(handle)
            self.model[path].data = (self.model[path].data or b"") + data

    def put(self, path: bytes, data: bytes, mode: int = 0o600) -> None:
        with self._operation():
            self.store.put(
                *self._at(path), data, len(data), mode=mode, uid=UID, gid=GID, mtime_ns=self.clock.now_ns // 2
            )
            thing = self.model.setdefault(path, Thing(Kind.FILE, mode))
            thing.kind, thing.mode, thing.data, thing.uid, thing.device = Kind.FILE, mode, data, UID, 0

    def put_new(self, images: dict[bytes, bytes], mode: int = 0o644) -> None:
        """Put *images*, by path, with calls that take many each; each of them counts as an operation."""
        wanted = [
            NewImage(*self._at(path), data, UID, GID, mode, self.clock.now_ns // 2) for path, data in images.items()
        ]
        paths = list(images)
        while wanted:
            self.clock.tick()
            self.in_hand = len(wanted)
            count = self.store.put_new(wanted)
            self.in_hand = 1
            self.model |= {path: Thing(Kind.FILE, mode, images[path]) for path in paths[:count]}
            seen = self._look()
            before = self.history[-1]
            for done in range(1, count + 1):
                touched = {path.rpartition(b"/")[0] for path in paths[:done]}
                state = {path: node for path, node in seen.items() if path not in paths[done:count]}
                late = {path for path, node in state.items() if node.kind == Kind.DIRECTORY} - touched
                self.history.append(state | {path: before[path] for path in late})
            wanted, paths = wanted[count:], paths[count:]

    def truncate(self, path: bytes, size: int) -> None:
        with self._operation():
            self.store.truncate(self.store.resolve(path), size)
            self.model[path].data = (self.model[path].data or b"")[:size].ljust(size, b"\0")

    def mkdir(self, path: bytes, mode: int = 0o755) -> None:
        with self._operation():
            self.store.mkdir(*self._at(path), mode, UID, GID)
            self.model[path] = Thing(Kind.DIRECTORY, mode)

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._operation():
            self.store.symlink(*self._at(path), target, UID, GID)
            self.model[path] = Thing(Kind.SYMLINK, 0o777, target)

    def special(self, path: bytes, mode: int, device: int = 0) -> None:
        with self._operation():
            self.store.special(*self._at(path), mode, device, UID, GID)
            self.model[path] = Thing(Kind.SPECIAL, mode, b"", device=device)

    def link(self, path: bytes, new: bytes) -> None:
        with self._operation():
            self.store.link(self.store.resolve(path), *self._at(new))
            self.model[new] = self.model[path]

    def unlink(self, path: bytes) -> None:
        with self._operation():
            self.store.unlink(*self._at(path))
            del self.model[path]

    def rmdir(self, path: bytes) -> None:
        with self._operation():
            self.store.rmdir(*self._at(path))
            del self.model[path]

    def rename(self, old: bytes, new: bytes) -> None:
        with self._operation():
            self.store.rename(*self._at(old), *self._at(new))
            if self.model[old] is not self.model.get(new):
                self.model = {path: thing for path, thing in self.model.items() if path != new}
                self._move({old: new})

    def exchange(self, one: bytes, other: bytes) -> None:
        with self._operation():
            self.store.exchange(*self._at(one), *self._at(other))
            self._move({one: other, other: one})

    def _move(self, names: dict[bytes, bytes]) -> None:
        """Give each path that is, or lies below, one of *names* another."""

        def moved(path: bytes) -> bytes:
            above = [name for name in names if path == name or path.startswith(name + b"/")]
            return names[above[0]] + path[len(above[0]) :] if above else path

        self.model = {moved(path): thing for path, thing in self.model.items()}

    def set_attr(self, path: bytes, *, mode: int | None = None, uid: int | None = None, mtime_ns: int = 1) -> None:
        with self._operation():
            self.store.set_attr(self.store.resolve(path), mode=mode, uid=uid, mtime_ns=mtime_ns)
            thing = self.model[path]
            if mode is not None:
                thing.mode = thing.mode & ~0o7777 | mode
            thing.uid = thing.uid if uid is None else uid

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        with self._operation():
            self.store.set_xattr(self.store.resolve(path), name, value)
            self.model[path].attributes[name] = value

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        with self._operation():
            self.store.remove_xattr(self.store.resolve(path), name)
            del self.model[path].attributes[name]

    def sync(self) -> None:
        covered = self.acknowledged
        self.store.sync_for(lambda: 1)  # as a mount does for who calls fsync
        self.synced = covered

    def fsync(self, path: bytes) -> None:
        """Make one image durable; in a log that is a sync."""
        covered = self.acknowledged
        handle = self.store.open_image(self.store.resolve(path), write=True)
        self.store.fsync(handle)
        self.synced = covered
        self.store.release(handle)

    def close(self) -> None:
        self.store.close()
        self.synced = self.acknowledged

    def restart(self) -> None:
        self.close()
        self.open()

    def finish(self) -> Cut:
        """Close the store; the cut after that, at which everything is durable, is also kept."""
        self.close()
        self.disk.before_step = None
        cut = Cut(self.disk.steps, "the end", self.disk.copy(), self.acknowledged, self.synced)
        self.cuts.append(cut)
        return cut


def photo(size: int, seed: int) -> bytes:
    return Random(seed).randbytes(size)


# -- after the crash ------------------------------------------------------------------------------------------


def content(disk: SimulatedDisk) -> dict[str, bytes]:
    """Return all that a recovery looks at: what was being written is not looked at, only removed."""
    return {path: b"" if "/staging/" in path else disk.content(path) for path in disk.paths()}


def without_index(disk: SimulatedDisk) -> SimulatedDisk:
    for path in disk.paths():
        if path.endswith((".idx", ".names")):
            disk.remove(path)
    return disk


def open_store(disk: SimulatedDisk, settings: Settings = SETTINGS, *, writable: bool = True) -> Store:
    return Store.open(STORE, disk=disk, settings=settings, writable=writable)


def recovered(disk: SimulatedDisk, settings: Settings = SETTINGS) -> Snapshot:
    """Return what a reader sees who opens the store on *disk* without writing a byte."""
    steps = disk.steps
    with_reader = open_store(disk, settings, writable=False)
    try:
        assert not with_reader.report.damage, f"a crash is no damage: {[*map(str, with_reader.report.damage)]}"
        seen = snapshot(with_reader)
    finally:
        with_reader.close()
    assert disk.steps == steps, "reading changed the disk"
    return seen


def promised(history: list[Snapshot], seen: Snapshot, lowest: int, highest: int) -> bool:
    """Return whether *seen* is one of the states from number *lowest* on to *highest*."""
    states = history[lowest : highest + 1]
    return seen in states or any(_only_touched(seen, before, after) for before, after in pairwise(states))


def _only_touched(seen: Snapshot, before: Snapshot, after: Snapshot) -> bool:
    """Return whether *seen* is the state *before*, but for directories that have the times they have *after*.

    Creating an image touches its directory, and if a volume is sealed before the image is flushed, that is on disk.
    """
    if seen.keys() != before.keys():
        return False
    for path, node in seen.items():
        old, new = before[path], after.get(path)
        if node == old:
            continue
        if new is None or old.kind != Kind.DIRECTORY:
            return False
        if node != old._replace(mtime_ns=new.mtime_ns, ctime_ns=new.ctime_ns):
            return False
    return True


def assert_promised(history: list[Snapshot], seen: Snapshot, lowest: int, highest: int, where: Any) -> None:
    if not promised(history, seen, lowest, highest):
        later = [n for n, state in enumerate(history) if state == seen]
        known = f"it is state {later}" if later else "no state it ever had"
        differences = [difference(seen, state) for state in history[lowest : highest + 1]]
        nearest = min(differences, key=len)
        raise AssertionError(f"{where}: states {lowest} to {highest} were promised; {known}:\n{nearest}")


def live_on(disk: SimulatedDisk, seen: Snapshot, clock: Clock, settings: Settings = SETTINGS) -> None:
    """Open the store on *disk*, which holds *seen*, for writing; what it takes from then on must be as good as ever."""
    store = open_store(disk, settings)
    assert not store.report.damage
    assert snapshot(store) == seen, "a writer sees something else than a reader"
    clock.tick()
    files = [path for path, node in seen.items() if node.kind == Kind.FILE]
    directory = store.mkdir(ROOT, b"later", 0o755, UID, GID)
    store.put(directory, b"new", photo(5000, 90), 5000, mode=0o644, uid=UID, gid=77, mtime_ns=9)
    if files:
        where, _, name = files[0].rpartition(b"/")
        store.rename(store.resolve(where), name, directory, b"moved")
    store.sync()
    wanted = snapshot(store)
    assert_same(recovered(disk.after_power_cut(NOTHING_UNSYNCED), settings), wanted, "synced after the recovery")
    clock.tick()
    store.unlink(directory, b"new")
    for number in range(4):  # enough for a checkpoint, and at times for a new volume
        store.put(directory, b"%d" % number, photo(9000, number), 9000, mode=0o644, uid=UID, gid=GID, mtime_ns=9)
    wanted = snapshot(store)
    store.close()
    assert_same(recovered(disk.after_power_cut(NOTHING_UNSYNCED), settings), wanted, "closed after the recovery")
    check_log(disk)


def needles(disk: SimulatedDisk) -> Iterator[tuple[str, int, Needle | Gap]]:
    """Yield (path, offset, needle or gap) of all volumes, in order, up to where each ends."""
    volumes = [Volume.open(disk, path) for path in disk.paths() if path.endswith(".vol")]
    ends = {volume.header.previous.volume_id: volume.header.previous for volume in volumes if volume.header.previous}
    for volume in volumes:
        previous = ends.get(volume.header.volume_id)
        for item in volume.scan(8192, previous.index_state.end if previous else volume.size()):
            if isinstance(item, Gap):
                yield volume.path, item.start, item
            else:
                yield volume.path, *item
        volume.close()


def check_log(disk: SimulatedDisk) -> None:
    """Check what no reader sees: sequence numbers rise, and no durable mark is a lie."""
    last = 0
    for path, offset, needle in needles(disk):
        assert isinstance(needle, Needle), f"{path}, offset {offset}: a gap"
        assert needle.sequence > last, f"{path}, offset {offset}: sequence {needle.sequence} after {last}"
        assert needle.durable <= offset
        last = needle.sequence


def half_written(cut: Cut, following: Cut, share: float) -> SimulatedDisk | None:
    """Return the disk of one killed in the middle of the write that is the step of *cut*; None for another step."""
    call, path, *where = cut.what.split(" ")
    if call != "write":
        return None
    path = path if path in following.disk.paths() else path.removesuffix(".new")  # it was opened by its first name
    start, size = (int(number) for number in where[0].split("+"))
    disk = cut.disk.after_kill()
    data = following.disk.content(path)[start : start + size]
    file = disk.open(path, writable=True)
    disk.write(file, start, [data[: int(len(data) * share)]])
    disk.close(file)
    disk.trace.clear()
    return disk
