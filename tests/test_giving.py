"""The kernel is given an image while it is opened: never what is old by then, nor what it would have to wait for."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from door import Held
from mounted import WORKER_DEATHS, Mounted, wait_until
from stores import disk_of, new_store, put, write_image

from imgfs.disk import Buffer, WouldBlock
from imgfs.errors import ImgfsError
from imgfs.format import slot_of
from imgfs.giving import Giving
from imgfs.image_reading import Seen
from imgfs.store import ROOT, Store

DATA = b"some bytes"
SECOND = b"other bytes"


class Kernel:
    """Takes what it is given."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.given: list[tuple[int, bytes]] = []
        self.shared = memoryview(bytearray(8 * 65)).cast("Q")
        self.giving: Giving = store.giving(self.shared, self._take)
        self.meanwhile: Callable[[], None] = lambda: None

    def _take(self, inode: int, content: Buffer) -> None:
        self.given.append((inode, bytes(content)))
        self.meanwhile()

    def seen(self, inode: int) -> Seen:
        seen = self.store.see(inode)
        assert seen is not None
        return seen

    def open(self, inode: int) -> int:
        """Open *inode* as a worker does."""
        seen = self.seen(inode)
        handle = self.store.take_handle(inode)
        self.giving.give(inode, seen)
        return handle


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with closing(new_store()) as store:
        yield Kernel(store)


def test_what_was_looked_up_is_given_once(kernel: Kernel) -> None:
    one, other = put(kernel.store, ROOT, b"one", DATA), put(kernel.store, ROOT, b"other", SECOND)
    assert not kernel.giving.expects(one)
    kernel.giving.expect(one)
    assert kernel.giving.expects(one)
    assert not kernel.giving.expects(other)
    kernel.open(one)
    assert kernel.given == [(one, DATA)]
    assert not kernel.giving.expects(one)


def test_nothing_is_given_while_somebody_else_has_it_open(kernel: Kernel) -> None:
    """Who reads may have the kernel wait for a page of it, and who writes has newer bytes in one."""
    inode = put(kernel.store, ROOT, b"image", DATA)
    for write in (False, True):
        handle = kernel.store.open_image(inode, write=write)
        kernel.store.release(kernel.open(inode))
        assert kernel.given == []
        kernel.store.release(handle)
    kernel.open(inode)
    assert kernel.given == [(inode, DATA)]


def test_what_is_old_by_now_is_not_given(kernel: Kernel) -> None:
    store = kernel.store
    inode = put(store, ROOT, b"image", DATA)
    for change in (lambda: store.truncate(inode, 4, at_once=True), lambda: store.truncate(inode, 2)):
        seen = kernel.seen(inode)
        change()
        store.take_handle(inode)
        kernel.giving.give(inode, seen)
        assert kernel.given == []


def test_what_is_being_written_is_not_seen_so(kernel: Kernel) -> None:
    store = kernel.store
    inode = put(store, ROOT, b"image", DATA)
    writer = store.open_image(inode, write=True)
    store.write(writer, 0, SECOND)
    assert store.see(inode) is None
    assert store.see(ROOT) is None
    assert store.see(put(store, ROOT, b"large", bytes(129 << 10))) is None


def test_nobody_waits_to_give(kernel: Kernel) -> None:
    inode = put(kernel.store, ROOT, b"image", DATA)
    kernel.store.release(kernel.store.open_image(inode))  # the first handle of a process takes the lock
    with Held(kernel.store):
        handle = kernel.open(inode)
    assert kernel.given == []
    assert bytes(kernel.store.read(handle, 0, 99)) == DATA


def test_who_opens_to_write_comes_after_what_is_being_given(kernel: Kernel) -> None:
    inode = put(kernel.store, ROOT, b"image", DATA)
    kernel.store.release(kernel.store.open_image(inode))
    with Held(kernel.store), pytest.raises(WouldBlock):
        kernel.store.open_image(inode, write=True, nowait=True)
    kernel.open(inode)
    assert kernel.given == [(inode, DATA)], "the handle that was refused is not open"


def test_who_opens_what_is_being_given_comes_after_that(kernel: Kernel) -> None:
    """Whatever it reads, the kernel would wait for it, and this worker for the kernel."""
    store = kernel.store
    inode, other = put(store, ROOT, b"image", DATA), put(store, ROOT, b"other", DATA)
    store.release(store.open_image(inode))
    refused: list[type[Exception]] = []

    def another_worker() -> None:
        store.release(store.open_image(other, nowait=True))
        try:
            store.open_image(inode, nowait=True)
        except WouldBlock as error:
            refused.append(type(error))

    def meanwhile() -> None:
        thread = threading.Thread(target=another_worker)
        thread.start()
        thread.join(60)

    kernel.meanwhile = meanwhile
    store.release(kernel.open(inode))
    assert refused == [WouldBlock]
    store.release(store.open_image(inode, nowait=True))
    assert not store._handles.in_use(slot_of(inode))


def test_who_died_while_it_gave_keeps_nobody_out(kernel: Kernel) -> None:
    inode = put(kernel.store, ROOT, b"image", DATA)
    kernel.shared[0] = inode
    kernel.store.release(kernel.store.open_image(inode, nowait=True))
    kernel.open(inode)
    assert kernel.given == [(inode, DATA)]


def test_damage_is_not_given(kernel: Kernel) -> None:
    inode = write_image(kernel.store, ROOT, b"image", DATA)
    place, disk = kernel.store.spot(inode), disk_of(kernel.store)
    (volume,) = [path for path in disk.paths() if path.endswith(f"{place.volume:08d}.vol")]
    disk.flip(volume, disk.content(volume).index(DATA, place.offset), 1)
    assert kernel.store.see(inode) is None
    with pytest.raises(ImgfsError):
        kernel.store.open_image(inode)


@pytest.mark.mount
@pytest.mark.root
def test_whoever_opens_an_image_after_it_was_changed_reads_what_it_is_now(stopped: Mounted) -> None:
    """Names are looked up each time, so that each open would give what it has verified."""
    stopped.start("workers=2,timeout=0")
    paths = [stopped.point / f"{number}" for number in range(4)]
    version = [0] * len(paths)  # even: nobody is writing
    for path in paths:
        path.write_bytes(_content(0))
    wrong: list[str] = []
    checked, end = [0], threading.Event()

    def read() -> None:
        while not end.is_set():
            number = random.randrange(len(paths))
            before = version[number]
            found = _read(paths[number])
            if version[number] == before and not before % 2:
                checked[0] += 1
                if found != _content(before):
                    wrong.append(f"image {number}, version {before}: {len(found)} bytes of {found[:1]!r}")

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for turn in range(1500):
        number = turn % len(paths)
        version[number] += 1
        content = _content(version[number] + 1)
        _change(paths[number], content, in_place=turn % 3)
        version[number] += 1
    end.set()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert wrong == []
    assert checked[0] > 100


@pytest.mark.mount
@pytest.mark.root
def test_workers_die_while_they_give(stopped: Mounted) -> None:
    """Several read the same images: some are given them, some ask, and nobody waits for a page for ever."""
    stopped.expected_log += WORKER_DEATHS
    stopped.start("workers=2,timeout=0")
    paths = [stopped.point / f"{number}" for number in range(2)]
    for path in paths:
        path.write_bytes(_content(1))
    wrong: list[str] = []
    end = threading.Event()

    def read() -> None:
        while not end.is_set():
            path = random.choice(paths)
            if _read(path) != _content(1):
                wrong.append(path.name)

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        killed = random.choice(stopped.children("worker"))
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda gone=killed: _served(stopped, gone), "another takes its place", process=stopped.process)  # type: ignore[misc]
    end.set()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert wrong == []


def _served(mounted: Mounted, gone: int) -> bool:
    workers = mounted.children("worker")
    return gone not in workers and len(workers) == 2


def _read(path: Path) -> bytes:
    """Return what *path* holds; the kernel forgets it, so that the next one has to be given it, or to ask."""
    with open(path, "rb") as file:
        found = file.read()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def _content(version: int) -> bytes:
    return bytes([version % 251]) * (5000 + 3000 * (version % 5))


def _change(path: Path, content: bytes, in_place: int) -> None:
    if in_place == 0:
        os.truncate(path, len(content))
    descriptor = os.open(path, os.O_WRONLY | (os.O_TRUNC if in_place == 1 else 0))
    try:
        os.write(descriptor, content)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)
