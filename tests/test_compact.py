"""Compaction: the tree stays what it was, now, after a kill, a restart and a rebuild; nothing deleted comes back."""

import contextlib
import random
import stat
from collections.abc import Callable, Iterator

import pytest
from compacted import compact, needles
from powercut import SimulatedDisk
from stores import PATH, TINY, abandon_all, disk_of, killed, new_store, open_store, put, read_all, reopened

from imgfs.compact import Keep
from imgfs.errors import ImgfsError
from imgfs.format import Kind
from imgfs.layout import VOLUME_GONE, Word
from imgfs.needed import NEVER_S
from imgfs.repair import Repair
from imgfs.settings import MIB
from imgfs.store import ROOT, Store

Shown = dict[bytes, tuple[object, ...]]


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def rebuilt(store: Store) -> Store:
    """Close *store* and open what its volumes alone say."""
    store.close()
    disk = disk_of(store)
    for path in disk.paths():
        if path.endswith((".idx", ".names")):
            disk.unlink(path)
    return open_store(disk, store.settings)


def shown(store: Store, directory: int = ROOT, path: bytes = b"") -> Shown:
    """Return all that can be seen of *store*, by path."""
    found: Shown = {path or b"/": tuple(store.attr(directory)) + tuple(_xattrs(store, directory))}
    for entry in store.list(directory):
        attr, here = store.attr(entry.inode), path + b"/" + entry.name
        assert store.lookup(directory, entry.name) == entry.inode
        if attr.kind == Kind.DIRECTORY:
            found |= shown(store, entry.inode, here)
            continue
        data = b""
        if attr.kind == Kind.FILE:
            handle = store.open_image(entry.inode)
            data = read_all(store, handle)
            store.release(handle)
        elif attr.kind == Kind.SYMLINK:
            data = store.readlink(entry.inode)
        found[here] = (*attr, data, *_xattrs(store, entry.inode))
    return found


def _xattrs(store: Store, inode: int) -> list[tuple[bytes, bytes]]:
    return [(name, store.get_xattr(inode, name)) for name in sorted(store.list_xattrs(inode))]


class Changes:
    """Random changes of a store; what makes no sense is passed over."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, store: Store) -> None:
        pick = self._random
        paths = list(_paths(store))
        directories = [inode for _, _, inode, kind in paths if kind == Kind.DIRECTORY] + [ROOT]
        files = [row for row in paths if row[3] != Kind.DIRECTORY]
        name = b"%d" % pick.randrange(12)
        parent = pick.choice(directories)
        data = pick.randbytes(pick.choice([0, 10, 500, 3000, 9000]))
        some = pick.choice(files) if files else None
        match pick.randrange(14):
            case 0 | 1 | 2 | 3:
                _try(lambda: put(store, parent, name, data, pick.randrange(1 << 40)))
            case 4:
                _try(lambda: store.mkdir(parent, name, 0o755, 1, 1))
            case 5 if some:
                _try(lambda: store.unlink(some[0], some[1]))
            case 6 if paths:
                old = pick.choice(paths)
                _try(lambda: store.rename(old[0], old[1], parent, name))
            case 7 if some:
                _try(lambda: store.link(some[2], parent, name))
            case 8 if paths:
                inode = pick.choice(paths)[2]
                _try(lambda: store.set_attr(inode, mode=pick.randrange(0o1000), mtime_ns=pick.randrange(1 << 40)))
            case 9 if paths:
                inode = pick.choice(paths)[2]
                _try(
                    lambda: store.set_xattr(inode, b"user.%d" % pick.randrange(2), pick.randbytes(pick.randrange(300)))
                )
            case 10:
                _try(lambda: store.symlink(parent, name, b"target" * pick.randrange(1, 9), 2, 2))
            case 11:
                _try(lambda: store.special(parent, name, stat.S_IFIFO | 0o600, 0, 3, 3))
            case 12 if paths:
                one, two = pick.choice(paths), pick.choice(paths)
                _try(lambda: store.exchange(one[0], one[1], two[0], two[1]))
            case 13 if paths:
                old = pick.choice(paths)
                _try(lambda: store.rmdir(old[0], old[1]))

    def compact(self, store: Store, *, remove: bool = True) -> bool:
        compaction = store.reclaimer().compaction
        rows = store._volumes.rows(sealed=True)
        if not rows:
            return False
        first = self._random.randrange(len(rows))
        rows = rows[first : first + self._random.randint(1, 4)]
        keep = Keep(store._handles.slots(), self._random.choice([0, NEVER_S]))
        row = compaction.run(compaction.plan(rows, keep), 0)
        assert compaction.unfinished() == [row]
        if remove:
            assert compaction.remove(row, store._handles.slots())
        return True


def _try(change: Callable[[], object]) -> None:
    with contextlib.suppress(ImgfsError):
        change()


def _paths(store: Store, directory: int = ROOT) -> Iterator[tuple[int, bytes, int, Kind]]:
    for entry in list(store.list(directory)):
        kind = store.attr(entry.inode).kind
        yield directory, entry.name, entry.inode, kind
        if kind == Kind.DIRECTORY:
            yield from _paths(store, entry.inode)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Or else the store's id, and with it the order of names, would make another history of the same seed each time.
    monkeypatch.setattr("os.urandom", random.Random(seed).randbytes)
    changes, pick = Changes(seed), random.Random(-seed - 1)
    store = new_store()
    compacted = 0
    for _ in range(14):
        for _ in range(30):
            changes.one(store)
        before = shown(store)
        if pick.random() < 0.5:
            store.reclaimer().punch(everything=True)
            assert shown(store) == before
        if pick.random() < 0.7:
            compacted += changes.compact(store)
        assert shown(store) == before
        again = pick.choice([killed, reopened, rebuilt])
        store = again(store)
        assert shown(store) == before, again.__name__
        assert not store.report.damage
        assert store.contradictions() == []
        assert not [found for found in store.check() if hasattr(found, "text")]
    store.close()
    repair = Repair(PATH, disk_of(store), store.settings)
    with repair.run() as store:
        assert shown(store) == before
    assert (repair.done, repair.left) == ([], [])
    assert compacted


@pytest.mark.parametrize("owners", range(4))
def test_what_a_copy_brings_forward_stands_for_nothing_it_left_out(owners: int) -> None:
    """An image that got another name and other bytes is no contradiction, though the rename is left out."""
    store = new_store()
    put(store, ROOT, b"old name", b"in the volume before")
    first = store._memory.words[Word.ACTIVE]
    while store._memory.words[Word.ACTIVE] == first:
        put(store, ROOT, b"filler", bytes(5000))
    store.rename(ROOT, b"old name", ROOT, b"new name")
    put(store, ROOT, b"new name", b"other bytes")
    for number in range(owners):
        # A copy begins with the needles that tell of owners, whatever was put before them.
        store.put(ROOT, b"%d" % number, b"", 0, mode=0o600, uid=10 + number, gid=3, mtime_ns=1)
    second = store._memory.words[Word.ACTIVE]
    while store._memory.words[Word.ACTIVE] == second:
        put(store, ROOT, b"filler", bytes(5000))
    compact(store, [second])
    store = reopened(store)
    assert Kind.RENAME not in {needle.kind for _, _, needle in needles(disk_of(store))}
    assert store.contradictions() == []


class ReadingDisk(SimulatedDisk):
    """Counts the bytes that are read."""

    read_bytes = 0

    def read(self, file: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        data = super().read(file, offset, size, nowait=nowait)
        self.read_bytes += len(data)
        return data


@pytest.mark.parametrize("size", [20_000, MIB, MIB + 1, 3 * MIB])
def test_what_is_copied_is_read_once(size: int) -> None:
    disk = ReadingDisk()
    store = new_store(TINY, disk)
    for number in range(8):
        put(store, ROOT, b"%d" % number, random.Random(number).randbytes(size))
        store.set_xattr(store.resolve(b"%d" % number), b"user.a", bytes(10_000))
    before = shown(store)
    compaction = store.reclaimer().compaction
    plan = compaction.plan(store._volumes.rows(sealed=True), Keep())
    disk.read_bytes = 0
    row = compaction.run(plan, 0)
    assert plan.bytes_after > 5 * size
    assert disk.read_bytes < 1.2 * plan.bytes_after
    assert compaction.unfinished() == [row]
    assert compaction.remove(row, [])
    assert shown(reopened(store)) == before


def test_what_is_deleted_is_punched_out() -> None:
    store = new_store()
    for number in range(10):
        put(store, ROOT, b"%d" % number, b"x" * 5000)
    for number in range(1, 9):
        store.unlink(ROOT, b"%d" % number)
    assert store.reclaimer().punch().hole_bytes > 7 * 4096
    assert shown(rebuilt(store)).keys() == {b"/", b"/0", b"/9"}


def test_a_store_that_is_filled_and_emptied_stays_small() -> None:
    store = new_store()
    sizes = []
    for _ in range(6):
        for number in range(100):
            put(store, ROOT, b"%d" % number, bytes(3000))
        for number in range(100):
            store.unlink(ROOT, b"%d" % number)
        reclaimer = store.reclaimer()
        while groups := reclaimer.worthwhile(reclaimer.survey()):
            assert reclaimer.compact(groups[0]).volumes
        sizes.append((store.counts().volume_bytes, store._memory.words[Word.VOLUMES], store._memory.words[Word.SLOTS]))
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.2)
    assert {row.flags & VOLUME_GONE for row in map(store._table.volume, range(sizes[-1][1]))} == {0, VOLUME_GONE}
    assert shown(rebuilt(store)).keys() == {b"/"}
