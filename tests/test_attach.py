"""Another process goes on with an open store: it finds all of it, and both see what the other does."""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_store import SMALL, new_store, on_disk
from mortal import in_process, status_of
from stores import content, names, put, read_all

from imgfs.disk import Disk
from imgfs.errors import Busy, OtherLayout, Stale
from imgfs.layout import Word
from imgfs.opening import STAGING
from imgfs.settings import KIB
from imgfs.store import ROOT, Store, make_store
from imgfs.volumes import VOLUMES, OpenVolume, Volumes


def attached(store: Store) -> Store:
    return Store.attach(store.path, os.dup(store.memory_descriptor), None, settings=store.settings)


def test_what_is_open_stays_open() -> None:
    with new_store() as store:
        inode, handle = store.create_image(ROOT, b"a", 0o640, 1, 2)
        store.write(handle, 0, b"half")
        gone = store.open_image(put(store, ROOT, b"gone", b"unlinked"))
        store.unlink(ROOT, b"gone")
        other = attached(store)
        assert other.lookup(ROOT, b"a") == inode
        assert read_all(other, handle) == b"half"
        assert bytes(other.read(gone, 0, 100)) == b"unlinked"
        other.write(handle, 4, b" and half")
        other.flush(handle)
        assert content(store, inode) == b"half and half"
        store.release(handle)
        other.release(gone)
        assert store._handles.count() == 0
        assert names(other) == names(store) == {b"a"}
        other.leave()


class Reads(Disk):
    """Counts what is read of files that images are staged in."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def read(self, file: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        self.count += f"/{STAGING}/" in os.readlink(f"/proc/self/fd/{file}")
        return super().read(file, offset, size, nowait=nowait)


def _write_and_flush(store: Store, name: bytes, meanwhile: Callable[[int, int], object]) -> bytes:
    """Write an image whole, let something happen to it (inode, handle), flush it; return what it is then."""
    inode, handle = store.create_image(ROOT, name, 0o644, 0, 0)
    store.write(handle, 0, b"all of it")
    meanwhile(inode, handle)
    store.flush(handle)
    store.release(handle)
    return content(store, inode)


def test_what_one_write_brought_is_not_read_again_unless_anything_was_changed_since() -> None:
    with new_store() as first:
        put(first, ROOT, b"owner")
        disk = Reads()
        store = Store.attach(first.path, os.dup(first.memory_descriptor), None, disk=disk, settings=first.settings)
        other = attached(first)

        def of_others(handle: int, offset: int, data: bytes) -> None:
            other.write(handle, offset, data)

        assert _write_and_flush(store, b"alone", lambda *_: None) == b"all of it"
        assert disk.count == 0
        assert _write_and_flush(store, b"over", lambda _, handle: of_others(handle, 4, b"OF")) == b"all OF it"
        assert _write_and_flush(store, b"longer", lambda _, handle: of_others(handle, 9, b"!")) == b"all of it!"
        assert _write_and_flush(store, b"again", lambda _, handle: store.write(handle, 0, b"ALL")) == b"ALL of it"
        assert _write_and_flush(store, b"cut", lambda inode, _: other.truncate(inode, 3)) == b"all"
        assert _write_and_flush(store, b"extended", lambda inode, _: other.truncate(inode, 11)) == b"all of it\0\0"
        assert _write_and_flush(store, b"beside", lambda *_: put(other, ROOT, b"another")) == b"all of it"
        assert _write_and_flush(store, b"dated", lambda inode, _: other.set_attr(inode, mtime_ns=1)) == b"all of it"
        assert disk.count == 7
        other.leave()
        store.leave()


def test_what_is_read_again_is_that_of_its_own_entry() -> None:
    with new_store() as store:
        inode, handle = store.create_image(ROOT, b"first", 0o644, 0, 0)
        second_inode, second = store.create_image(ROOT, b"second", 0o644, 0, 0)
        store.write(handle, 0, b"1")
        store.write(second, 0, b"2")
        store.flush(handle)
        store.flush(second)
        assert (content(store, inode), content(store, second_inode)) == (b"1", b"2")
        store.write(handle, 1, b"behind it")
        store.flush(handle)
        assert content(store, inode) == b"1behind it"


def test_both_append_and_follow_each_other_to_the_next_volume() -> None:
    with new_store() as store:
        other = attached(store)
        for number in range(40):
            put((store, other)[number % 2], ROOT, b"%d" % number, b"%d" % number * 4 * KIB)
        assert store.counts().volumes > 4
        for each in (store, other):
            for number in range(40):
                assert content(each, each.lookup(ROOT, b"%d" % number)) == b"%d" % number * 4 * KIB
        other.sync()
        other.leave()
        put(store, ROOT, b"last")
        with on_disk(store) as again:
            assert len(names(again)) == 41
            assert not again.report.damage


def give_the_active_row_to_another_volume(store: Store) -> None:
    """Fill, empty and compact *store* until its active volume is another in the row that the active one has now."""
    row, first = store._memory.words[Word.ACTIVE], store._table.volume(store._memory.words[Word.ACTIVE]).volume_id
    for _ in range(100):
        for number in range(4):
            put(store, ROOT, b"%d" % number, b"x" * 4 * KIB)
        for number in range(4):
            store.unlink(ROOT, b"%d" % number)
        reclaimer = store.reclaimer()
        for group in reclaimer.worthwhile(reclaimer.survey())[:1]:
            reclaimer.compact(group)
        if store._memory.words[Word.ACTIVE] == row and store._table.volume(row).volume_id != first:
            return
    pytest.fail("the row is not used again")


def test_who_wrote_last_before_its_volume_was_removed_writes_into_the_one_that_has_its_row() -> None:
    """Else what it is told to keep would go into a file without a name, and be lost."""
    with new_store() as store:
        other = attached(store)
        put(other, ROOT, b"first")
        other.unlink(ROOT, b"first")
        give_the_active_row_to_another_volume(store)
        put(other, ROOT, b"late", b"bytes" * 100)
        put(store, ROOT, b"later")
        for each in (store, other):
            assert content(each, each.lookup(ROOT, b"late")) == b"bytes" * 100
            assert names(each) == {b"late", b"later"}
        other.sync()
        other.leave()
        with on_disk(store) as again:
            assert names(again) == {b"late", b"later"}
            assert content(again, again.lookup(ROOT, b"late")) == b"bytes" * 100
            assert not again.report.damage


class _Stalled:
    """A store whose next sync stands still until *meanwhile* was done, between what it wants and doing it."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self._log = store._images.writer()
        self._sync, self._meanwhile = self._log._sync_volume, meanwhile
        self._log._sync_volume = self.sync  # type: ignore[method-assign]

    def sync(self, *arguments: Any) -> tuple[int, int]:
        self._log._sync_volume = self._sync  # type: ignore[method-assign]
        self._meanwhile()
        return self._sync(*arguments)


@pytest.mark.parametrize("synced", [False, True])
def test_a_sync_that_stood_still_says_nothing_of_the_volume_that_has_its_row_now(*, synced: bool) -> None:
    """Else a later fsync would be answered without the disk, or power loss taken for damage."""
    with new_store() as store:
        other = attached(store)
        words = store._memory.words
        told = []

        def meanwhile() -> None:
            give_the_active_row_to_another_volume(store)
            if synced:
                store.sync()
            put(store, ROOT, b"new")
            told.append((words[Word.DURABLE], words[Word.SYNCED]))

        put(other, ROOT, b"first", b"bytes" * 9 * KIB)
        other.unlink(ROOT, b"first")
        _Stalled(other, meanwhile)
        other.sync()
        assert told == [(words[Word.DURABLE], words[Word.SYNCED])]
        assert words[Word.DURABLE] < words[Word.ACTIVE_END]
        other.leave()


class _RemovingDisk(Disk):
    """Another process removes these files just before the names in them are opened."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        super().__init__()
        self._suffixes = suffixes

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        if path.endswith(".names"):
            for suffix in self._suffixes:
                self.unlink(path.removesuffix(".names") + suffix)
        return super().open(path, writable=writable, create=create, exclusive=exclusive)


@pytest.mark.parametrize(
    ("removed", "expected"), [((".vol", ".names"), Stale), ((".names",), FileNotFoundError), ((".vol",), None)]
)
def test_a_volume_that_is_removed_while_it_is_opened_is_gone(
    tmp_path: Path, removed: tuple[str, ...], expected: type[Exception] | None
) -> None:
    path = str(tmp_path / "store")
    make_store(path, uid=0, gid=0)
    store = Store.open(path)
    volumes = Volumes(_RemovingDisk(removed), f"{path}/{VOLUMES}", store._table)
    before = os.listdir("/proc/self/fd")
    if expected is None:
        assert volumes.get(0).volume.header.volume_id == 1, "all of it was opened in time"
    else:
        with pytest.raises(expected):
            volumes.get(0)
        assert os.listdir("/proc/self/fd") == before
    volumes.close()
    store.leave()


def test_no_thread_gets_a_removed_volume_while_another_closes_those_that_are() -> None:
    """It would take it for the one that has its row now, and its names for those of other images."""
    with new_store() as store:
        for number in range(40):
            put(store, ROOT, b"%d" % number, b"x" * 4 * KIB)
        volumes = Volumes(Disk(), f"{store.path}/{VOLUMES}", store._table)
        first, second = volumes.rows()[:2]
        closing, stale = volumes.get(first).volume, volumes.get(second)
        for number in range(40):
            store.unlink(ROOT, b"%d" % number)
        reclaimer = store.reclaimer()
        for group in reclaimer.worthwhile(reclaimer.survey()):
            reclaimer.compact(group)
        assert not {first, second} & set(volumes.rows())
        got: list[object] = []
        close, thread = closing.close, threading.Thread(target=lambda: got.append(_get(volumes, second)))

        def close_while_another_looks() -> None:
            thread.start()
            thread.join(timeout=0.5)  # it waits for us, and mostly needs no more to come that far
            close()

        closing.close = close_while_another_looks  # type: ignore[method-assign]
        assert _get(volumes, first) is not closing
        thread.join()
        assert got
        assert got[0] is not stale
        volumes.close()


def _get(volumes: Volumes, row: int) -> OpenVolume | None:
    try:
        return volumes.get(row)
    except Stale:
        return None


def test_who_asks_while_images_move_after_a_failed_sync_is_not_told_that_they_are_lost() -> None:
    """Their volume ends before them already, and their records point to the next one only a moment later."""
    with new_store() as store:
        other = attached(store)
        inode, handle = store.create_image(ROOT, b"kept", 0o640, 1, 2)
        store.write(handle, 0, b"bytes")
        store.flush(handle)
        log = store._images.writer()
        told: list[Exception | None] = []
        move, asking = log._move_records, threading.Thread(target=lambda: told.append(_error_of(other, handle)))

        def move_while_another_asks() -> None:
            assert other._images._lies_behind(inode)
            asking.start()
            asking.join(timeout=0.5)  # it waits for us
            move()

        log._move_records = move_while_another_asks  # type: ignore[method-assign]
        sync, store._disk.sync = store._disk.sync, _fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="Input/output error"):
            log._sync_active()
        store._disk.sync = sync  # type: ignore[method-assign]
        store.sync()
        asking.join()
        assert told == [None]
        assert content(other, inode) == b"bytes"
        store.release(handle)
        other.leave()


def _fail(file: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _error_of(store: Store, handle: int) -> Exception | None:
    try:
        store.check_kept(handle)
    except Exception as error:
        return error
    return None


def test_it_takes_the_lock_over() -> None:
    with new_store() as store:
        lock = store.lock_descriptor
        assert lock is not None
        heir = Store.attach(store.path, os.dup(store.memory_descriptor), os.dup(lock), settings=store.settings)
        put(heir, ROOT, b"a")
        with pytest.raises(Busy):
            Store.open(store.path)
        heir.leave()


def test_another_layout_is_refused_and_nothing_touched() -> None:
    with new_store() as store:
        words = store._memory.words
        version, words[Word.VERSION] = words[Word.VERSION], 99
        before = len(os.listdir("/proc/self/fd"))
        descriptor = os.dup(store.memory_descriptor)
        with pytest.raises(OtherLayout, match="layout 99"):
            Store.attach(store.path, descriptor, None)
        os.close(descriptor)
        assert len(os.listdir("/proc/self/fd")) == before
        assert words[Word.VERSION] == 99
        words[Word.VERSION] = version
        small = os.memfd_create("small")
        with pytest.raises(OtherLayout, match="another size"):
            Store.attach(store.path, small, None)
        os.close(small)


def test_a_child_that_forked_is_a_process_of_its_own() -> None:
    with new_store(replace(SMALL, volume_bytes_max=256 * KIB)) as store:
        handle = store.open_image(put(store, ROOT, b"before", b"old"), write=True)

        def work() -> None:
            store.after_fork()
            put(store, ROOT, b"child", bytes(200 * KIB))
            put(store, ROOT, b"in the next volume", bytes(100 * KIB))
            store.write(handle, 0, b"new")
            store.release(handle)
            store.sync()

        with store.lock():
            pid = in_process(work)  # it waits: the lock that it inherited is not its own
            put(store, ROOT, b"parent")
        assert status_of(pid) == 0
        assert names(store) == {b"before", b"child", b"parent", b"in the next volume"}
        assert content(store, store.lookup(ROOT, b"before")) == b"new"
        put(store, ROOT, b"after")
        assert content(store, store.lookup(ROOT, b"after")) == b"data"


def test_who_reads_only_may_share_as_well() -> None:
    with new_store() as store:
        inode = put(store, ROOT, b"a", b"bytes")
        path = store.path
        store.sync()
        reader = Store.open(path, writable=False, disk=Disk())

        def work() -> None:
            reader.after_fork()
            assert content(reader, inode) == b"bytes"
            reader.roll_forward()

        assert status_of(in_process(work)) == 0
        assert content(reader, inode) == b"bytes"
        reader.close()
