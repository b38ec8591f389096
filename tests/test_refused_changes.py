"""What a full or failing disk refuses half way leaves nothing behind, and what was promised stays promised."""

import errno
import threading

import pytest
from powercut import SimulatedDisk
from survivors import NOTHING_UNSYNCED

from imgfs.errors import DiskFailure, StoreFull
from imgfs.format import Kind
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store

PATH = "/store"
SETTINGS = Settings(volume_bytes_max=64 * KIB, headroom_bytes=0, checkpoint_needles=2)


def new_store(disk: SimulatedDisk) -> Store:
    make_store(PATH, SETTINGS, disk, uid=0, gid=0)
    return Store.open(PATH, disk=disk, settings=SETTINGS)


def put(store: Store, name: bytes, size: int = 100) -> int:
    return store.put(ROOT, name, name[:1] * size, size, mode=0o644, uid=1, gid=1, mtime_ns=5)


def almost_full_volume(disk: SimulatedDisk) -> Store:
    """Return a new store whose volume takes five images, and no sixth of the same size."""
    store = new_store(disk)
    for number in range(5):
        put(store, b"%d" % number, 10_000)
    return store


def content(store: Store, inode: int) -> bytes:
    handle = store.open_image(inode)
    try:
        return bytes(store.read(handle, 0, 1 << 20))
    finally:
        store.release(handle)


def test_a_mode_that_was_synced_survives_though_the_image_is_being_written() -> None:
    disk = SimulatedDisk()
    store = new_store(disk)
    inode = put(store, b"a")
    handle = store.open_image(inode, write=True)
    store.write(handle, 0, b"new")
    store.set_attr(inode, mode=0o600, uid=77, mtime_ns=9)
    assert (store.attr(inode).mode, store.attr(inode).uid, store.attr(inode).mtime_ns) == (0o600, 77, 9)
    store.sync()
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=SETTINGS) as other:
        attr = other.attr(inode)
        assert (attr.mode, attr.uid, content(other, inode)) == (0o600, 77, b"a" * 100)
        assert attr.mtime_ns == 5, "the old bytes must not get the time of the new ones"
    store.release(handle)
    assert (store.attr(inode).mode, store.attr(inode).mtime_ns) == (0o600, 9)
    store.close()


def refused(begun: str) -> tuple[SimulatedDisk, Store, int, int]:
    """Return (disk, store, inode, handle) where a write to an image found no room, before anything was staged of it."""
    disk = SimulatedDisk(400 * KIB)
    store = new_store(disk)
    if begun == "opened":
        inode = put(store, b"1", 1000)
        handle = store.open_image(inode, write=True)
    else:
        inode, handle = store.create_image(ROOT, b"1", 0o644, 0, 0)
        store.write(handle, 0, b"1" * 1000)
        (store.fsync if begun == "fsynced" else store.flush)(handle)
    disk.fail_next("write", errno.ENOSPC)
    with pytest.raises(StoreFull):
        store.write(handle, 1000, b"2" * 1000)
    return disk, store, inode, handle


# Flushed: by the close of another descriptor, as that of a program to which a shell has handed it.
@pytest.mark.parametrize("begun", ["opened", "fsynced", "flushed"])
def test_an_image_that_lacks_a_write_is_not_closed_as_whole(begun: str) -> None:
    disk, store, inode, handle = refused(begun)
    for _ in range(2):
        with pytest.raises(StoreFull, match="open it again"):
            store.write(handle, 2000, b"3" * 1000)
        assert store.flush_bytes(handle), "a close has something to say"
        with pytest.raises(StoreFull, match="the old one stays"):
            store.flush(handle)
    assert (content(store, inode), store.attr(inode).size) == (b"1" * 1000, 1000)
    store.set_attr(inode, mode=0o600, mtime_ns=9)
    with pytest.raises(StoreFull):
        store.release(handle)
    assert (content(store, inode), store.attr(inode).mode, store.attr(inode).mtime_ns) == (b"1" * 1000, 0o600, 9)
    handle = store.open_image(inode, write=True)
    assert store.stage_bytes(handle) == 1000, "nothing is staged any more"
    store.write(handle, 1000, b"4")
    store.release(handle)
    assert content(store, inode) == b"1" * 1000 + b"4"
    store.close()
    with Store.open(PATH, disk=disk, settings=SETTINGS) as store:
        assert content(store, inode) == b"1" * 1000 + b"4"


@pytest.mark.parametrize("begun", ["opened", "fsynced", "flushed"])
def test_who_cuts_an_image_that_lacks_a_write_begins_anew(begun: str) -> None:
    _, store, inode, handle = refused(begun)
    with pytest.raises(StoreFull):
        store.truncate(inode, 500)
    store.truncate(inode, 0)
    store.write(handle, 0, b"anew")
    store.release(handle)
    assert content(store, inode) == b"anew"
    store.close()


def test_what_is_staged_and_clean_when_a_write_is_refused_is_no_longer_used() -> None:
    disk = SimulatedDisk(400 * KIB)
    store = new_store(disk)
    inode, first = store.create_image(ROOT, b"1", 0o644, 0, 0)
    second = store.open_image(inode, write=True)
    store.write(first, 0, b"1" * 1000)
    store.flush(first)
    assert store.has_staged(second), "of two writers one may go on"
    disk.fail_next("write", errno.ENOSPC)
    with pytest.raises(StoreFull):
        store.write(first, 500, b"2" * 1000)
    for handle in (first, second):
        with pytest.raises(StoreFull, match="open it again"):
            store.write(handle, 0, b"3")
        with pytest.raises(StoreFull, match="the old one stays"):
            store.release(handle)
    assert content(store, inode) == b"1" * 1000
    store.close()


def test_a_write_that_finds_room_at_the_second_try_counts() -> None:
    disk = SimulatedDisk()
    store = new_store(disk)
    inode, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 0, b"1" * 1000)
    disk.fail_next("write", errno.ENOSPC)
    with pytest.raises(StoreFull):
        store.write(handle, 1000, b"2" * 1000, last_try=False)
    store.write(handle, 1000, b"2" * 1000)
    store.release(handle)
    assert content(store, inode) == b"1" * 1000 + b"2" * 1000
    store.close()


def test_a_refused_truncate_leaves_nothing_staged() -> None:
    disk = SimulatedDisk(400 * KIB)
    store = new_store(disk)
    inode = put(store, b"a", 5000)
    with pytest.raises(StoreFull):
        store.truncate(inode, 1 << 20)
    assert store.stage_bytes(store.open_image(inode)) == 5000, "nothing is staged"
    assert content(store, inode) == b"a" * 5000
    store.close()


def test_an_fsync_beside_a_seal_that_failed_is_not_acknowledged() -> None:
    """The kernel tells one of the two that pages were lost; the other must not say that all is well."""
    disk = SimulatedDisk()
    store = new_store(disk)
    put(store, b"a")
    in_sync, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    real_sync, first = disk.sync, [True]

    def sync(file: int) -> None:
        if first:
            first.clear()
            in_sync.set()
            assert go_on.wait(30)
            raise OSError(errno.EIO, "lost")  # the kernel says it to whoever asks first
        real_sync(file)

    disk.sync = sync  # type: ignore[method-assign]

    def fsync() -> None:
        try:
            store.sync()
        except DiskFailure as error:
            failures.append(error)

    thread = threading.Thread(target=fsync)
    thread.start()
    assert in_sync.wait(30)
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    with pytest.raises(DiskFailure):
        for number in range(20):  # until the volume is full and has to be sealed
            put(store, b"%d" % number, 9000)
    thread.join(30)
    timer.join(30)
    assert len(failures) == 1
    stored = {entry.name for entry in store.list(ROOT)}
    store.sync()
    with Store.open(PATH, disk=disk.after_power_cut(NOTHING_UNSYNCED), settings=SETTINGS) as other:
        assert {entry.name for entry in other.list(ROOT)} == stored
    store.close()


def test_a_volume_whose_successor_could_not_be_named_stays_sealed() -> None:
    disk = SimulatedDisk()
    store = almost_full_volume(disk)
    disk.fail_next("rename", errno.EIO)
    with pytest.raises(DiskFailure):
        put(store, b"x", 20_000)
    store.sync()
    put(store, b"y", 20_000)
    store.close()
    with Store.open(PATH, disk=disk.after_kill(), settings=SETTINGS) as store:
        assert not store.report.damage
        names = {entry.name for entry in store.list(ROOT)}
        assert names == {b"0", b"1", b"2", b"3", b"4", b"y"}
        assert store.attr(ROOT).kind == Kind.DIRECTORY


def test_a_directory_sync_that_fails_is_final() -> None:
    disk = SimulatedDisk()
    store = almost_full_volume(disk)
    disk.fail_next("sync_directory", errno.EIO)
    with pytest.raises(DiskFailure):
        put(store, b"x", 20_000)
    with pytest.raises(DiskFailure, match="mount again"):
        put(store, b"y", 20_000)
    with pytest.raises(DiskFailure):
        store.close()
    with Store.open(PATH, disk=disk.after_kill(), settings=SETTINGS) as store:
        assert not store.report.damage
        put(store, b"z", 20_000)
