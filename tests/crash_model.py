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
from typing import Any, NamedTuple

import pytest
from powercut import SimulatedDisk
from survivors import NOTHING_UNSYNCED

from imgfs.errors import Damaged
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


Snapshot = dict[bytes, Node]
Plain = tuple[Kind, int, int, int, bytes | None]  # a node without what the store chooses itself


def plain(snapshot: Snapshot) -> dict[bytes, Plain]:
    return {path: node[:5] for path, node in snapshot.items()}


def read_image(store: Store, inode: int) -> bytes:
    handle = store.open_image(inode)
    try:
        return bytes(store.read(handle, 0, store.attr(inode).size + 1))
    finally:
        store.release(handle)


def snapshot(store: Store, *, damaged: bool = False) -> Snapshot:
    """Return all that a reader sees, by path; check that the ways to see it agree. *damaged*: an EIO is no failure."""
    found: Snapshot = {}

    def look(path: bytes, inode: int) -> None:
        attr = store.attr(inode)
        data = None
        if attr.kind != Kind.DIRECTORY:
            try:
                data = store.readlink(inode) if attr.kind == Kind.SYMLINK else read_image(store, inode)
            except Damaged:
                if not damaged:
                    raise
        else:
            entries = list(store.list(inode))
            assert len({entry.name for entry in entries}) == len(entries), f"a name twice in {path!r}: {entries}"
            subdirectories = 0
            for entry in entries:
                below = path + b"/" + entry.name
                assert store.lookup(inode, entry.name) == entry.inode, below
                assert store.parent(entry.inode) == inode, below
                assert store.name(entry.inode) == entry.name
                look(below, entry.inode)
                subdirectories += found[below].kind == Kind.DIRECTORY
            assert attr.nlink == 2 + subdirectories, path
        if data is not None:
            assert len(data) == attr.size, path
        found[path] = Node(
            attr.kind, attr.mode, attr.uid, attr.gid, data, inode, attr.nlink, attr.size, attr.mtime_ns, attr.ctime_ns
        )

    look(b"", ROOT)
    kinds = [node.kind for node in found.values()]
    counts = store.counts()
    assert [counts.images, counts.directories, counts.symlinks] == [
        kinds.count(kind) for kind in (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK)
    ]
    return found


@dataclass
class Cut:
    """The moment before a step: what the disk was, and how much had been promised."""

    step: int
    what: str
    disk: SimulatedDisk
    acknowledged: int  # operations that had returned; one more may be in hand
    synced: int  # of those, how many a sync covers that has returned

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
    model: dict[bytes, Plain] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_store(STORE, self.settings, self.disk, uid=UID, gid=GID)
        self.disk.trace.clear()
        self.open()
        self.model[b""] = (Kind.DIRECTORY, 0o755, UID, GID, None)
        self.history.append(self._look())
        self._before = self.history[0]

    def open(self) -> None:
        self.store = Store.open(STORE, disk=self.disk, settings=self.settings)

    def record(self) -> None:
        """From now on keep the disk as it is before each step."""

        def before(what: str) -> None:
            disk = self.disk.copy()
            self.cuts.append(Cut(self.disk.steps, what, disk, self.acknowledged, self.synced))

        self.disk.before_step = before

    @property
    def acknowledged(self) -> int:
        return len(self.history) - 1

    def _look(self) -> Snapshot:
        seen = snapshot(self.store)
        assert plain(seen) == self.model
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

    def create(self, path: bytes, data: bytes, mode: int = 0o644) -> None:
        """As open(O_CREAT), write and close do it."""
        with self._operation():
            _, handle = self.store.create_image(*self._at(path), mode, UID, GID)
            self._write(handle, data)
            self.model[path] = (Kind.FILE, mode, UID, GID, data)

    def _write(self, handle: int, data: bytes) -> None:
        for at in range(0, len(data), 128 * KIB):
            self.store.write(handle, at, data[at : at + 128 * KIB])
        self.store.flush(handle)
        self.store.release(handle)

    def overwrite(self, path: bytes, data: bytes) -> None:
        with self._operation():
            self._write(self.store.open_image(self.store.resolve(path), write=True, truncate=True), data)
            self.model[path] = (*self.model[path][:4], data)

    def append(self, path: bytes, data: bytes) -> None:
        with self._operation():
            inode = self.store.resolve(path)
            handle = self.store.open_image(inode, write=True)
            self.store.write(handle, self.store.attr(inode).size, data)
            self.store.flush(handle)
            self.store.release(handle)
            self.model[path] = (*self.model[path][:4], (self.model[path][4] or b"") + data)

    def put(self, path: bytes, data: bytes, mode: int = 0o600) -> None:
        with self._operation():
            self.store.put(
                *self._at(path), data, len(data), mode=mode, uid=UID, gid=GID, mtime_ns=self.clock.now_ns // 2
            )
            self.model[path] = (Kind.FILE, mode, UID, GID, data)

    def truncate(self, path: bytes, size: int) -> None:
        with self._operation():
            self.store.truncate(self.store.resolve(path), size)
            self.model[path] = (*self.model[path][:4], (self.model[path][4] or b"")[:size].ljust(size, b"\0"))

    def mkdir(self, path: bytes, mode: int = 0o755) -> None:
        with self._operation():
            self.store.mkdir(*self._at(path), mode, UID, GID)
            self.model[path] = (Kind.DIRECTORY, mode, UID, GID, None)

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._operation():
            self.store.symlink(*self._at(path), target, UID, GID)
            self.model[path] = (Kind.SYMLINK, 0o777, UID, GID, target)

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
            for path in [path for path in self.model if path == old or path.startswith(old + b"/")]:
                self.model[new + path[len(old) :]] = self.model.pop(path)

    def set_attr(self, path: bytes, *, mode: int | None = None, uid: int | None = None, mtime_ns: int = 1) -> None:
        with self._operation():
            self.store.set_attr(self.store.resolve(path), mode=mode, uid=uid, mtime_ns=mtime_ns)
            kind, old_mode, old_uid, gid, data = self.model[path]
            new_mode, new_uid = old_mode if mode is None else mode, old_uid if uid is None else uid
            self.model[path] = (kind, new_mode, new_uid, gid, data)

    def sync(self) -> None:
        covered = self.acknowledged
        self.store.sync()
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

    def finish(self) -> Cut:
        """Close the store; the cut after that, at which everything is durable, is also kept."""
        self.close()
        self.disk.before_step = None
        cut = Cut(self.disk.steps, "the end", self.disk.copy(), self.acknowledged, self.synced)
        self.cuts.append(cut)
        return cut


def photo(size: int, seed: int) -> bytes:
    return Random(seed).randbytes(size)


def small_images(work: Workload) -> None:
    """Every operation, over three volumes; synced now and then, once in the middle of a volume."""
    long_name = b"n" * 255
    work.mkdir(b"/a")
    work.mkdir(b"/a/deep", 0o700)
    work.create(b"/a/one", photo(3000, 1))
    work.create(b"/two", photo(517, 2), 0o640)
    work.create(b"/empty", b"")
    work.sync()
    work.overwrite(b"/a/one", photo(7000, 3))
    work.symlink(b"/link", b"a/one")
    work.create(b"/a/\xff\xfe \n", photo(100, 4))
    work.rename(b"/two", b"/a/one")  # over another, in another directory
    work.set_attr(b"/a/one", mode=0o400, mtime_ns=123_456_789_012)
    work.fsync(b"/a/one")
    work.unlink(b"/empty")
    work.create(b"/empty", photo(1, 5))  # the same name again
    work.put(b"/" + long_name, photo(9000, 6))
    work.append(b"/" + long_name, photo(900, 7))
    work.put(b"/" + long_name, photo(20_000, 8))  # over an image, same inode
    work.rename(b"/a/deep", b"/deep")
    work.create(b"/deep/x", photo(12_000, 9))
    work.truncate(b"/deep/x", 5000)
    work.set_attr(b"/deep", mode=0o1777, uid=7, mtime_ns=-1)
    work.create(b"/deep/.tmp", photo(2000, 10))
    work.rename(b"/deep/.tmp", b"/deep/x")  # as an editor saves
    work.sync()
    work.mkdir(b"/gone")
    work.create(b"/gone/y", photo(300, 11))
    work.unlink(b"/gone/y")
    work.rmdir(b"/gone")
    work.unlink(b"/link")
    work.symlink(b"/link", b"")
    work.create(b"/deep/reuse", photo(800, 12))  # a slot of the deleted, of another generation
    work.rename(b"/deep", b"/a/deep")
    work.overwrite(b"/a/deep/x", photo(15_000, 13))
    work.create(b"/a/deep/.tmp", photo(14_000, 14))
    work.rename(b"/a/deep/.tmp", b"/a/deep/reuse")
    work.put(b"/last", photo(18_000, 15))
    work.sync()
    work.mkdir(b"/e")
    work.mkdir(b"/f")
    work.rename(b"/e", b"/f")  # a directory over an empty one
    work.create(b"/f/one", photo(10, 16))
    work.rename(b"/a/one", b"/f/one")
    work.truncate(b"/last", 0)
    work.set_attr(b"/f/one", mtime_ns=5)
    work.rename(b"/f/one", b"/f/two")
    work.unlink(b"/a/\xff\xfe \n")


def large_images(work: Workload) -> None:
    """Images above 1 MiB, which are written in pieces and alone may be larger than a volume."""
    mib = 1 << 20
    work.create(b"/large", photo(mib + 1, 20))
    work.put(b"/piece", photo(30_000, 21))
    work.sync()
    work.put(b"/huge", photo(mib + mib // 2, 22))
    work.rename(b"/huge", b"/large")


# -- after the crash ------------------------------------------------------------------------------------------


def content(disk: SimulatedDisk) -> dict[str, bytes]:
    """Return all that a recovery looks at: what was being written is not looked at, only removed."""
    return {path: b"" if "/staging/" in path else disk.content(path) for path in disk.paths()}


def open_store(disk: SimulatedDisk, settings: Settings = SETTINGS, *, writable: bool = True) -> Store:
    return Store.open(STORE, disk=disk, settings=settings, writable=writable)


def recovered(disk: SimulatedDisk, settings: Settings = SETTINGS) -> Snapshot:
    """Return what a reader sees who opens the store on *disk* without writing a byte."""
    steps = disk.steps
    with_reader = open_store(disk, settings, writable=False)
    try:
        assert not with_reader.report.damage, "a crash is no damage"
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
    kind, mode, uid, gid, data, inode, nlink, size, mtime_ns, ctime_ns = node
    head = data if data is None else data[:8]
    return f"({kind.name} {mode:o} {uid} {gid} {head!r} {inode=:x} {nlink=} {size=} {mtime_ns=} {ctime_ns=})"


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


def assert_same(seen: Snapshot, wanted: Snapshot, where: str) -> None:
    assert seen == wanted, f"{where}:\n{difference(seen, wanted)}"


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
