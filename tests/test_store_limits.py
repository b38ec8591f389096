"""A full disk, a failing disk, and opening a store: by a second writer, for reading, one of a newer release."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator

import pytest
from crc32c import crc32c
from powercut import SimulatedDisk
from stores import (
    PATH,
    TINY,
    abandon_all,
    content,
    disk_of,
    killed,
    killed_content,
    names,
    new_store,
    open_store,
    put,
    read_all,
    reopened,
    staged_files,
    tree,
)

from imgfs.errors import (
    BadHandle,
    Busy,
    ImgfsError,
    InvalidArgument,
    NewerFormat,
    NoStore,
    ReadOnly,
    StoreFull,
)
from imgfs.settings import KIB, Settings
from imgfs.store import ROOT, Store, make_store


@pytest.fixture
def store() -> Store:
    return new_store()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


# -- a full disk --------------------------------------------------------------------------------------------------


def fill(store: Store) -> int:
    """Put images into *store* until it is full; return how many."""
    number = 0
    while True:
        try:
            put(store, ROOT, b"fill %d" % number, b"f" * 5000)
        except StoreFull:
            return number
        number += 1


def test_a_full_disk_refuses_images_and_lets_them_be_deleted() -> None:
    store = new_store(disk=SimulatedDisk(400 * KIB))
    old = put(store, ROOT, b"old", b"old")
    _, handle = store.create_image(ROOT, b"unborn", 0o644, 0, 0)
    count = fill(store)
    assert count > 20
    assert store.space().available * store.space().block_size >= 10 * KIB, "the headroom is kept"
    before = tree(store)
    writer = store.open_image(old, write=True)
    for call in (
        lambda: put(store, ROOT, b"fill 0", b"x" * 6000),
        lambda: put(store, ROOT, b"new", b"x" * 6000),
        lambda: store.write(handle, 0, b"x" * 6000),
        lambda: store.write(writer, 0, b"x" * 6000),
        lambda: store.truncate(old, 1 << 20),
    ):
        with pytest.raises(StoreFull) as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
        assert tree(store) == before
    assert killed_content(store, b"old") == b"old"
    for each in (writer, handle):
        with pytest.raises(StoreFull):
            store.release(each)
    for number in range(count):
        store.unlink(ROOT, b"fill %d" % number)
    store.rename(ROOT, b"old", ROOT, b"kept")
    store.sync()
    store = killed(store)
    assert {path: found.data for path, found in tree(store).items()} == {b"/kept": b"old"}
    store.close()


def test_a_disk_that_was_empty_a_moment_ago_still_lets_images_go(store: Store) -> None:
    """What was granted then must not have a full volume sealed, for the next one would find no room to begin."""
    disk = disk_of(store)
    put(store, ROOT, b"a", b"bytes")
    (path,) = (path for path in disk.paths() if path.endswith(".vol"))
    put(store, ROOT, b"b", b"x" * (TINY.volume_bytes_max - len(disk.content(path)) - 200))
    assert store.counts().volumes == 1, "nothing more fits into this one, not even a tombstone"
    disk.capacity_bytes = disk._used_bytes() + 1000
    store.unlink(ROOT, b"a")
    assert names(store) == {b"b"}
    assert store.counts().volumes == 1
    store.close()


def test_what_lacks_a_write_never_replaces_the_old_image() -> None:
    """A program that goes on after ENOSPC, and finds room again before it closes, would leave half an image."""
    store = new_store(disk=SimulatedDisk(400 * KIB))
    inode = put(store, ROOT, b"a", b"old")
    count = fill(store)
    store.unlink(ROOT, b"fill 0")
    handle = store.open_image(inode, write=True, truncate=True)
    with pytest.raises(StoreFull):
        store.write(handle, 0, b"x" * 6000)
    disk = disk_of(store)
    disk.capacity_bytes = 800 * KIB
    store.write(handle, 6000, b"y" * 10)
    for call in (store.flush, store.fsync, store.release):
        with pytest.raises(StoreFull, match="the old one stays"):
            call(handle)
    assert content(store, inode) == b"old"
    handle = store.open_image(inode, write=True, truncate=True)
    store.write(handle, 0, b"new")
    store.release(handle)
    assert content(store, inode) == b"new"
    assert count
    store.close()


@pytest.mark.parametrize("written", [0, 1, 50, 100, 4000])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_disk_that_fills_up_within_an_append_leaves_the_old_image(store: Store, after: int, written: int) -> None:
    inode = put(store, ROOT, b"a", b"old")
    before = tree(store)
    handle = store.open_image(inode, write=True)
    store.write(handle, 0, b"n" * 5000)
    disk_of(store).fail_next("write", errno.ENOSPC, after=after, written=written)
    with pytest.raises(StoreFull):
        store.flush(handle)
    assert killed_content(store, b"a") == b"old"
    assert store.attr(inode).size == 5000, "what was written is still staged"
    store.flush(handle)
    assert killed_content(store, b"a") == b"n" * 5000
    store.release(handle)
    put(store, ROOT, b"b", b"after")
    store = killed(store)
    assert content(store, store.lookup(ROOT, b"a")) == b"n" * 5000
    assert content(store, store.lookup(ROOT, b"b")) == b"after"
    assert store.report.torn_bytes == 0
    assert before[b"/a"].inode == inode
    store.close()


def test_an_unborn_image_that_finds_no_room_at_close_is_gone(store: Store) -> None:
    _, handle = store.create_image(ROOT, b"a", 0o644, 0, 0)
    store.write(handle, 0, b"x" * 100)
    disk_of(store).fail_next("write", errno.ENOSPC, times=2)
    with pytest.raises(StoreFull):
        store.flush(handle)
    with pytest.raises(StoreFull):
        store.release(handle)
    assert tree(store) == {}
    assert store.counts().images == 0
    assert not any(map(len, staged_files(store)))
    with pytest.raises(BadHandle):
        store.read(handle, 0, 1)


def test_an_append_that_cannot_be_cut_back_ends_all_changes(store: Store) -> None:
    put(store, ROOT, b"a", b"old")
    disk = disk_of(store)
    disk.fail_next("write", errno.EIO, written=10)
    disk.fail_next("truncate", errno.EIO)
    with pytest.raises(ImgfsError):
        put(store, ROOT, b"b")
    for _ in range(2):
        with pytest.raises(ImgfsError, match="mount again"):
            put(store, ROOT, b"c")
    assert names(store) == {b"a"}
    store = killed(store)
    assert names(store) == {b"a"}
    put(store, ROOT, b"b")
    store.close()


# -- opening ------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_the_first_ones_pid(store: Store) -> None:
    put(store, ROOT, b"a", b"shared")
    with pytest.raises(Busy, match=rf"in use by process {os.getpid()}\b"):
        open_store(disk_of(store))
    reader = open_store(disk_of(store), writable=False)
    assert content(reader, reader.lookup(ROOT, b"a")) == b"shared"
    reader.close()
    put(store, ROOT, b"b")
    with pytest.raises(Busy):
        open_store(disk_of(store))
    store = reopened(store)
    assert names(store) == {b"a", b"b"}
    store.close()


def test_a_store_opened_for_reading_refuses_changes_and_touches_nothing(store: Store) -> None:
    inode = put(store, ROOT, b"a", b"data")
    store.close()
    disk = disk_of(store)
    steps = disk.steps
    with open_store(disk, writable=False) as reader:
        handle = reader.open_image(inode)
        calls: list[Callable[[], object]] = [
            lambda: put(reader, ROOT, b"b"),
            lambda: reader.mkdir(ROOT, b"b", 0, 0, 0),
            lambda: reader.symlink(ROOT, b"b", b"x", 0, 0),
            lambda: reader.create_image(ROOT, b"b", 0, 0, 0),
            lambda: reader.unlink(ROOT, b"a"),
            lambda: reader.rmdir(ROOT, b"a"),
            lambda: reader.rename(ROOT, b"a", ROOT, b"b"),
            lambda: reader.set_attr(inode, mode=0),
            lambda: reader.truncate(inode, 0),
            lambda: reader.open_image(inode, write=True),
            lambda: reader.open_image(inode, write=True, truncate=True),
            reader.sync,
        ]
        for call in calls:
            with pytest.raises(ReadOnly):
                call()
        assert read_all(reader, handle) == b"data"
        reader.flush(handle)
        reader.fsync(handle)
        reader.release(handle)
        assert names(reader) == {b"a"}
    assert disk.steps == steps


def test_a_newer_store_is_refused(store: Store) -> None:
    store.close()
    disk = disk_of(store)
    path = f"{PATH}/imgfs.json"
    fields = json.loads(disk.content(path)) | {"format": 99, "readable_by": "9.9"}
    del fields["checksum"]
    checksum = f"{crc32c(json.dumps(fields, sort_keys=True).encode()):08x}"
    disk.set_content(path, json.dumps(fields | {"checksum": checksum}).encode())
    for writable in (True, False):
        with pytest.raises(NewerFormat, match=re.escape("this store has format 99; install imgfs 9.9 or newer")):
            open_store(disk, writable=writable)
    assert disk.lock(f"{PATH}/lock") is not None


def test_where_no_store_is(store: Store) -> None:
    disk = SimulatedDisk()
    with pytest.raises(NoStore, match="imgfs mkfs /store"):
        open_store(disk)
    disk.mkdir(PATH)
    with pytest.raises(NoStore):
        open_store(disk)


def test_a_store_is_made_only_where_nothing_is(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="not empty"):
        make_store(PATH, TINY, disk_of(store), uid=0, gid=0)
    for size in (64 * KIB - 1, (32 << 30) + 1):
        with pytest.raises(InvalidArgument, match="65536 to"):
            make_store("/other", Settings(volume_bytes_max=size), disk_of(store), uid=0, gid=0)
    make_store("/other", TINY, disk_of(store), uid=3, gid=4, mode=0o700)
    with Store.open("/other", disk=disk_of(store)) as other:
        assert other.attr(ROOT)[2:5] == (0o700, 3, 4)
        assert other.settings.volume_bytes_max == TINY.volume_bytes_max


def test_volumes_roll(store: Store) -> None:
    for number in range(40):
        put(store, ROOT, b"%d" % number, bytes([number]) * 9000)
    counts = store.counts()
    assert counts.volumes >= 6
    assert counts.volume_bytes <= counts.volumes * TINY.volume_bytes_max
    assert counts.live_bytes == 40 * 9000
    before = tree(store)
    assert tree(store := killed(store)) == before
    assert tree(store := reopened(store)) == before
    assert store.report.torn_bytes == 0
    large = put(store, ROOT, b"large", b"x" * 200_000)  # more than a volume may hold: one of its own
    put(store, ROOT, b"after")
    assert content(store, large) == b"x" * 200_000
    store.close()
