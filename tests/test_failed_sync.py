"""A sync that failed is never forgotten: what is whole goes to a new volume, and who asked is told."""

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from killed_store import SMALL, MortalDisk, killed_at, on_disk
from killed_store import new_store as new_real_store
from mortal import Killed
from powercut import SimulatedDisk
from stores import PATH, abandon_all, content, disk_of, names, new_store, open_store, put, tree, write_image
from survivors import NOTHING_UNSYNCED

from imgfs.errors import Damaged, DiskFailure, StoreFull
from imgfs.layout import Word
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store

LARGE = Settings(volume_bytes_max=8 << 20, headroom_bytes=0, checkpoint_needles=1000, rest_slots=2)


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


class State(NamedTuple):
    """All of a store that a copy could miss."""

    tree: dict[bytes, object]
    attributes: dict[bytes, dict[bytes, bytes]]
    links: dict[bytes, int]
    times: dict[bytes, int]


def state_of(store: Store) -> State:
    seen = tree(store)
    every = {path: found.inode for path, found in seen.items()}
    return State(
        dict(seen),
        {
            path: {name: store.get_xattr(inode, name) for name in store.list_xattrs(inode)}
            for path, inode in every.items()
        },
        {path: store.attr(inode).nlink for path, inode in every.items()},
        {path: store.attr(inode).mtime_ns for path, inode in every.items()},
    )


def furnish(store: Store) -> None:
    """Put something durable into *store*, and then one of each change behind it."""
    durable = store.mkdir(ROOT, b"durable", 0o755, 1, 1)
    for name in (b"kept", b"changed", b"renamed", b"deleted", b"swapped"):
        put(store, durable, name, b"old " + name)
    store.sync()
    directory = store.mkdir(ROOT, b"d", 0o700, 3, 4)
    put(store, directory, b"new", b"new bytes")
    put(store, directory, b"large", bytes(range(256)) * 6 * KIB)
    put(store, durable, b"changed", b"first")
    put(store, durable, b"changed", b"second")
    store.rename(durable, b"renamed", directory, b"elsewhere")
    store.rename(directory, b"new", durable, b"also renamed")
    store.unlink(durable, b"deleted")
    store.symlink(directory, b"link", b"target", 5, 6)
    store.special(directory, b"pipe", 0o10644, 0, 5, 6)
    store.link(store.lookup(durable, b"changed"), durable, b"second name")
    store.set_xattr(store.lookup(durable, b"kept"), b"user.a", b"value")
    store.exchange(durable, b"kept", durable, b"swapped")
    store.set_attr(directory, mode=0o711, mtime_ns=12345)
    put(store, directory, b"last", b"last")


def fail(store: Store, *, times: int = 1) -> None:
    disk_of(store).fail_next("sync", errno.EIO, times=times)
    with pytest.raises(DiskFailure, match="Input/output error"):
        store.sync()


def test_all_that_is_whole_is_durable_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(LARGE)
    furnish(store)
    handle = store.open_image(store.resolve(b"d/large"))
    before = state_of(store)
    volumes = store.counts().volumes
    fail(store)
    assert "appended again" in caplog.text
    assert "lost with" not in caplog.text
    assert state_of(store) == before
    assert store.counts().volumes == volumes + 1
    assert (
        store.locate(store.resolve(b"d/large")).volume == store.locate(store.resolve(b"d/last")).volume == volumes + 1
    )
    assert bytes(store.read(handle, 1000, 100)) == (bytes(range(256)) * 5)[1000:1100]
    for disk in (disk_of(store).after_power_cut(NOTHING_UNSYNCED), disk_of(store).after_kill()):
        with Store.open(PATH, disk=disk, settings=LARGE) as twin:
            assert state_of(twin) == before
            assert not twin.report.damage
            put(twin, ROOT, b"goes on")
    put(store, ROOT, b"goes on", b"here")
    store.sync()
    store.close()
    store = open_store(disk_of(store), LARGE)
    assert content(store, store.resolve(b"goes on")) == b"here"
    assert not store.report.damage
    store.close()


def test_what_is_not_whole_is_named_and_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(LARGE)
    put(store, ROOT, b"a", b"old")
    store.sync()
    inode = put(store, ROOT, b"a", b"the bytes that the disk loses")
    put(store, ROOT, b"b", b"whole")
    writer = store.open_image(inode, write=True)
    place = store.locate(inode)
    disk_of(store).flip(f"{PATH}/volumes/{place.volume:08d}.vol", place.data_offset)
    fail(store)
    assert f"the image with inode {inode}" in caplog.text
    with pytest.raises(Damaged):
        store.open_image(inode)
    with pytest.raises(DiskFailure, match="lost"):
        store.fsync(writer)
    assert content(store, store.resolve(b"b")) == b"whole"
    with Store.open(PATH, disk=disk_of(store).after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert content(twin, twin.resolve(b"a")) == b"old"
        assert content(twin, twin.resolve(b"b")) == b"whole"
    put(store, ROOT, b"a", b"anew")
    store.fsync(writer)
    assert content(store, inode) == b"anew"
    store.close()


def test_what_was_synced_is_kept_where_that_could_not_be_noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind the mark has to be read again, and that may fail, too."""
    store = new_store(LARGE)
    disk = disk_of(store)
    put(store, ROOT, b"a", b"acknowledged")
    with monkeypatch.context() as patch:
        patch.setattr(store._memory, "try_acquire", lambda: False)  # somebody is at a change
        store.sync()
    put(store, ROOT, b"b", b"not yet")
    disk.fail_next("read", errno.EIO)
    fail(store)
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert content(twin, twin.resolve(b"a")) == b"acknowledged"
        assert not twin.report.damage


def test_it_may_fail_again_and_again() -> None:
    store = new_store(LARGE)
    for turn in range(4):
        put(store, ROOT, b"%d" % turn, b"turn %d" % turn)
        write_image(store, ROOT, b"w%d" % turn, b"written")
        fail(store)
    before = state_of(store)
    with Store.open(PATH, disk=disk_of(store).after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert state_of(twin) == before
        assert not twin.report.damage
    store.close()


def test_a_seal_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    for nth in range(3):
        store = new_store()
        for number in range(5):
            put(store, ROOT, b"%d" % number, b"%d" % number * 10_000)
        disk_of(store).fail_next("sync", errno.EIO, after=nth)
        with pytest.raises(DiskFailure):
            put(store, ROOT, b"too much", bytes(20_000))
        put(store, ROOT, b"next", bytes(20_000))
        assert names(store) == {b"0", b"1", b"2", b"3", b"4", b"next"}
        before = state_of(store)
        store.sync()
        with Store.open(PATH, disk=disk_of(store).after_power_cut(NOTHING_UNSYNCED), settings=store.settings) as twin:
            assert state_of(twin) == before
            assert not twin.report.damage
        store.close()


def test_no_room_for_it_now() -> None:
    store = new_store(LARGE, SimulatedDisk(4 << 20))
    put(store, ROOT, b"a", bytes(1 << 20))
    disk = disk_of(store)
    capacity, disk.capacity_bytes = disk.capacity_bytes, 1 << 20
    fail(store)
    with pytest.raises(StoreFull):
        put(store, ROOT, b"b")
    with pytest.raises(StoreFull):
        store.unlink(ROOT, b"a")
    disk.capacity_bytes = capacity
    put(store, ROOT, b"b")
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert names(twin) == {b"a"}
    store.close()


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
def test_a_crash_at_any_step_of_it(power: bool) -> None:
    store = new_store(LARGE)
    furnish(store)
    before = state_of(store)
    disk = disk_of(store)
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        durable = state_of(twin)
    stops: list[tuple[str, SimulatedDisk]] = []
    disk.before_step = lambda what: stops.append((what, disk.copy()))
    fail(store)
    disk.before_step = None
    stops.append(("done", disk.copy()))
    assert len(stops) > 20
    found = []
    for what, stopped in stops:
        again = stopped.after_power_cut(NOTHING_UNSYNCED) if power else stopped.after_kill()
        with Store.open(PATH, disk=again, settings=LARGE) as twin:
            assert not twin.report.damage, what
            found.append(state_of(twin))
            put(twin, ROOT, b"goes on")
    if power:
        found = list(itertools.dropwhile(lambda state: state == durable, found))
        assert 0 < len(found) < len(stops)
    assert all(state == before for state in found)
    store.close()


def test_who_is_killed_within_a_sync_may_have_heard_of_lost_pages_alone() -> None:
    store = new_store(LARGE)
    put(store, ROOT, b"a")
    disk = disk_of(store)
    real_sync = disk.sync

    def lose_and_die(file: int) -> None:
        with pytest.raises(OSError, match="Input/output error"):
            real_sync(file)
        raise Killed

    disk.sync = lose_and_die  # type: ignore[method-assign]
    disk.fail_next("sync", errno.EIO)
    with pytest.raises(Killed):
        store.sync()
    disk.sync = real_sync  # type: ignore[method-assign]
    store.sync()
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert names(twin) == {b"a"}
    store.close()


def test_a_new_volume_is_synced_though_one_that_had_its_row_was() -> None:
    store = new_store(LARGE)
    words = store._memory.words
    put(store, ROOT, b"a", b"old")
    words[Word.SYNCED] = words[Word.ACTIVE] + 1 << 48 | LARGE.volume_bytes_max
    fail(store)
    put(store, ROOT, b"b", b"new")
    store.sync()
    with Store.open(PATH, disk=disk_of(store).after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        assert names(twin) == {b"a", b"b"}
    store.close()


def test_one_sync_serves_those_who_asked_before_it_began() -> None:
    with new_real_store() as store:
        put(store, ROOT, b"a")
        calls: list[int] = []
        other = Store.attach(store.path, os.dup(store.memory_descriptor), None, settings=store.settings)
        store._log._sync_active()  # type: ignore[union-attr]
        other._disk.sync = calls.append  # type: ignore[method-assign]
        other.sync()
        assert calls == []
        put(store, ROOT, b"b")
        other.sync()
        assert len(calls) == 1
        other.leave()


class FailingDisk(MortalDisk):
    """The first sync of it fails."""

    failed = False

    def sync(self, file: int) -> None:
        if not self.failed:
            self.failed = True
            raise OSError(errno.EIO, "Input/output error")
        super().sync(file)


def sync_fails(worker: Store) -> None:
    with pytest.raises(DiskFailure):
        worker.sync()


@pytest.mark.parametrize("torn", [False, True], ids=["between steps", "within a step"])
def test_killed_at_any_step_of_it_the_next_worker_goes_on(torn: bool) -> None:
    settings = replace(SMALL, volume_bytes_max=8 << 20, checkpoint_needles=1000)
    for step in itertools.count(1 if torn else 0, 4 if torn else 3):
        with new_real_store(settings) as store:
            furnish(store)
            before = state_of(store)
            was_killed = killed_at(store, step, sync_fails, torn=torn, disk=FailingDisk)
            assert state_of(store) == before
            store.roll_forward()
            put(store, ROOT, b"goes on")
            assert state_of(store).tree.keys() == before.tree.keys() | {b"/goes on"}
            store.unlink(ROOT, b"goes on")
            assert state_of(store) == before
            with on_disk(store) as twin:
                assert state_of(twin) == before
                assert not twin.report.damage
        if not was_killed:
            break
    assert step > 50


# -- where all of that fails, too ---------------------------------------------------------------------------------


@pytest.fixture
def failed() -> SimulatedDisk:
    """A disk whose store saw two syncs fail after `a` was put, and was closed."""
    disk = SimulatedDisk()
    make_store(PATH, disk=disk, uid=0, gid=0)
    store = Store.open(PATH, disk=disk)
    put(store, ROOT, b"a")
    fail_twice = [(ROOT, b"b"), (ROOT, b"c")]
    disk.fail_next("sync", errno.EIO, times=2)
    with pytest.raises(DiskFailure, match="Input/output error"):
        store.sync()
    for parent, name in fail_twice:
        with pytest.raises(DiskFailure, match="mount again"):
            put(store, parent, name)
    with pytest.raises(DiskFailure, match="mount again"):
        store.sync()
    assert content(store, store.lookup(ROOT, b"a")) == b"data", "reading goes on"
    with pytest.raises(DiskFailure):
        store.close()
    return disk


def test_the_next_opening_writes_what_the_failed_sync_lost(failed: SimulatedDisk) -> None:
    """The kernel holds the lost pages for clean: a sync alone would call them durable, and they would be gone."""
    disk = failed.after_kill()
    with Store.open(PATH, disk=disk) as store:
        put(store, ROOT, b"c")
        store.sync()
        disk = disk.after_power_cut(NOTHING_UNSYNCED)
    with Store.open(PATH, disk=disk) as store:
        assert names(store) == {b"a", b"c"}
        assert not store.report.damage
        assert not store.report.torn_bytes
