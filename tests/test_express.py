"""What is answered on the spot is what pyfuse3's handlers answer; what cannot be is left to them, undone."""

import errno
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from door import PID, ROW, Door, Held
from mounted import WORKER_DEATHS, Mounted, wait_until
from stores import TINY, content, disk_of, names, new_store, put

from imgfs.acts import DOTS
from imgfs.calls import INLINE_BYTES
from imgfs.errors import EXIT_DAMAGED
from imgfs.listers import PATIENCE
from imgfs.requests import Request
from imgfs.store import ROOT
from imgfs.wire import OUT_HEADER, Opcode


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door(new_store())
    yield door
    door.close()


def test_an_image_is_written_read_and_removed(door: Door) -> None:
    created = door.create(b"image")
    assert created is not None
    inode, handle = created
    assert door.write(handle, b"bytes") is not None
    assert door.flush(handle) is not None
    assert content(door.store, inode) == b"bytes", "what was flushed is the image"
    assert door.release(handle) is not None
    reading = door.open(inode)
    assert reading is not None
    assert door.read(reading, 1, 100) == b"ytes"
    assert door.flush(reading) is not None
    assert door.release(reading) is not None
    assert door.lookup(b"image") is not None
    assert door.unlink(b"image") is not None
    assert names(door.store) == set()


def test_what_waits_for_the_disk_is_left_to_a_thread(door: Door) -> None:
    inode = put(door.store, ROOT, b"image")
    handle = door.open(inode)
    assert handle is not None
    disk_of(door.store).cold = True
    assert door.lookup(b"image") is None
    assert door.open(inode) is None
    assert door.read(handle, 0, 9) is None
    assert door.store.requests.in_hand(0) == []


def test_an_answer_that_waits_for_the_disk_costs_no_patience_until_it_is_given(door: Door) -> None:
    put(door.store, ROOT, b"image")
    disk_of(door.store).cold = True
    listing = struct.pack("<QQIIQII", 0, DOTS, 4096, 0, 0, 0, 0)
    for _ in range(2 * PATIENCE):
        assert door.ask(Opcode.READDIRPLUS, ROOT, listing) is None
    disk_of(door.store).cold = False
    reply = door.ask(Opcode.READDIRPLUS, ROOT, listing)
    assert reply is not None
    with_attributes = b"".join(reply)
    for _ in range(PATIENCE):
        reply = door.ask(Opcode.READDIRPLUS, ROOT, listing)
        assert reply is not None
    assert b"".join(reply) != with_attributes


def test_the_disk_begins_to_read_what_was_looked_up_when_that_is_answered(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(door.store, ROOT, b"image")
    door.store.mkdir(ROOT, b"directory", 0o755, 0, 0)
    asked: list[int] = []
    monkeypatch.setattr(disk_of(door.store), "prefetch", lambda file, offset, size: asked.append(offset))
    assert door.lookup(b"image") is not None
    assert asked == []
    for _ in range(2):
        door.express.go_on()
        assert len(asked) == 1, "once"
    assert door.lookup(b"directory") is not None
    door.express.go_on()
    assert len(asked) == 1


def test_a_disk_that_refuses_to_begin_harms_nobody(door: Door) -> None:
    inode = put(door.store, ROOT, b"image")
    assert door.lookup(b"image") is not None
    disk_of(door.store).fail_next("prefetch", errno.EIO)
    door.express.go_on()
    assert door.open(inode) is not None


def test_what_somebody_else_holds_up_is_left_undone(door: Door) -> None:
    created = door.create(b"image")
    assert created is not None
    inode, handle = created
    assert door.write(handle, b"old") is not None
    with Held(door.store):
        assert door.create(b"other") is None
        assert door.write(handle, b"new") is None
        assert door.flush(handle) is None
        assert door.fsync(handle) is None
        assert door.unlink(b"image") is None
        reading = door.open(inode)
        assert reading is not None, "reading takes no lock"
        assert door.read(reading, 0, 9) == b"old"
    assert names(door.store) == {b"image"}


async def test_who_waits_behind_a_change_in_a_thread_needs_none(door: Door) -> None:
    """Else a thread for one would have all that come meanwhile behind it, for as long as they come."""
    ran: list[tuple[int, bool]] = []

    def change(number: int) -> None:
        with door.store.lock():
            ran.append((number, threading.current_thread() is threading.main_thread()))

    async def handle(number: int) -> None:
        door.desk._came_back()  # it is a task of pyfuse3's
        await door.calls.change(change, number)

    async with trio.open_nursery() as nursery:
        with Held(door.store):
            for number in range(3):
                nursery.start_soon(handle, number)
                await trio.testing.wait_all_tasks_blocked()
            assert ran == []
    assert ran == [(0, False), (1, True), (2, True)]


def test_what_copies_much_is_left_to_a_thread(door: Door) -> None:
    created = door.create(b"image")
    assert created is not None
    inode, handle = created
    assert door.write(handle, bytes(INLINE_BYTES + 1)) is None
    assert door.store.attr(inode).size == 0
    assert TINY.volume_bytes_max > 3 * 4096
    assert door.write(handle, bytes(TINY.volume_bytes_max)) is None, "the volume would have to be sealed first"


def test_errors_and_other_ways_to_open_are_for_the_handlers(door: Door) -> None:
    inode = put(door.store, ROOT, b"image")
    assert door.open(inode, os.O_WRONLY) is None
    assert door.open(inode, os.O_RDONLY | os.O_TRUNC) is None
    assert door.store.attr(inode).size == 4
    assert door.open(ROOT) is None
    assert door.open(inode + (1 << 32)) is None
    assert door.unlink(b"absent") is None
    assert door.create(b"image") is None
    assert door.lookup(b"x" * 256) is None
    assert door.ask(Opcode.STATFS, ROOT, b"") is None
    entry = door.lookup(b"absent")
    assert entry is not None, "a name that is not there is an answer, which the kernel keeps"
    assert int.from_bytes(entry[0][OUT_HEADER.size :][:8]) == 0


def test_a_change_that_a_dead_worker_may_have_applied_is_for_the_handlers(door: Door) -> None:
    requests = door.store.requests
    asked = Request(Opcode.UNLINK, PID, ROOT, 5)
    requests.begin(ROW, asked)
    with door.store.lock(), door.store._memory.change():
        requests.applied(ROW, 0)
    put(door.store, ROOT, b"image")
    assert requests.settle(0, [asked]) == []
    assert door.unlink(b"image") is None
    assert door.create(b"other") is None
    assert names(door.store) == {b"image"}


def test_bytes_that_were_damaged_are_not_opened(door: Door) -> None:
    inode = put(door.store, ROOT, b"image", b"some bytes")
    place = door.store.spot(inode)
    disk = disk_of(door.store)
    (volume,) = [path for path in disk.paths() if path.endswith(f"{place.volume:08d}.vol")]
    at = disk.content(volume).index(b"some bytes", place.offset)
    for offset in (place.offset, place.offset + 40, at - 1, at, at + 9, at + 10, at + 14):
        disk.flip(volume, offset, 1)
        assert door.open(inode) is None, offset
        disk.flip(volume, offset, 1)
        handle = door.open(inode)
        assert handle is not None
        assert door.release(handle) is not None


@pytest.mark.mount
@pytest.mark.root
def test_pyfuse3_answers_the_same(stopped: Mounted) -> None:
    """Everything that is answered on the spot, done through both doors of one store."""

    def use(top: Path) -> list[object]:
        seen: list[object] = []
        path = top / "image"
        parent = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(parent)
        os.close(parent)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o604)
        os.write(descriptor, b"some bytes")
        os.fsync(descriptor)
        seen.append(_told(os.fstat(descriptor)))
        os.close(descriptor)
        os.chmod(path, 0o4755)
        os.utime(path, ns=(-1_500_000_000, -2_500_000_001))
        seen.append(_told(os.stat(path)))
        seen.append(path.read_bytes())
        with open(path, "r+b") as file:
            file.write(b"S")
        seen.append(_told(os.stat(path)))
        with open(path, "rb") as file:
            path.unlink()
            seen += [file.read(), _told(os.fstat(file.fileno()))]
        seen.append(path.exists())
        return seen

    def _told(found: os.stat_result) -> tuple[object, ...]:
        own = min(0, found.st_mtime_ns)  # of the others nobody knows when
        return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_blocks, own

    stopped.start("timeout=0")
    at_once = use(stopped.point)
    stopped.stop()
    stopped.start("timeout=0", fault=("never-at-once", ""))
    assert use(stopped.point) == at_once


@pytest.mark.mount
@pytest.mark.root
def test_what_the_disk_has_to_give_is_answered_once_though_workers_die(stopped: Mounted) -> None:
    images = {f"{number:03d}": bytes([number]) * (1000 * number + 1) for number in range(60)}
    stopped.expected_log += WORKER_DEATHS
    stopped.start("workers=2,timeout=0")
    for name, data in images.items():
        (stopped.point / name).write_bytes(data)
    os.sync()
    wrong: list[str] = []

    def read(chosen: list[str]) -> None:
        wrong.extend(name for name in chosen if (stopped.point / name).read_bytes() != images[name])

    for _ in range(8):
        _let_go(stopped.store)
        readers = [threading.Thread(target=read, args=(list(images)[first::4],)) for first in range(4)]
        for reader in readers:
            reader.start()
        for pid in stopped.children("worker"):
            os.kill(pid, signal.SIGKILL)
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
    assert wrong == []


@pytest.mark.mount
@pytest.mark.root
def test_who_looks_an_image_up_has_it_read_from_the_disk(stopped: Mounted) -> None:
    stopped.start("timeout=0")
    (stopped.point / "image").write_bytes(b"image" * 4000)
    os.sync()
    (volume,) = stopped.store.glob("volumes/*.vol")
    with volume.open("rb") as file:

        def is_in_memory() -> bool:
            try:
                return os.preadv(file.fileno(), [bytearray(20_000)], 0, os.RWF_NOWAIT) >= 20_000
            except BlockingIOError:
                return False

        _let_go(stopped.store)
        assert not is_in_memory()
        (stopped.point / "image").stat()
        wait_until(is_in_memory, "the image is in memory")


@pytest.mark.mount
@pytest.mark.root
def test_what_the_disk_does_not_give_soon_is_for_a_thread(stopped: Mounted) -> None:
    """The gate is shut meanwhile, too: who waits for the disk is answered all the same."""
    stopped.expected_log += WORKER_DEATHS
    stopped.start("workers=2,timeout=0", fault=("slow-disk", ""))
    images = {f"{number}": bytes([number]) * 5000 for number in range(20)}
    for name, data in images.items():
        (stopped.point / name).write_bytes(data)
    wrong: list[str] = []

    def read() -> None:
        wrong.extend(name for name, data in images.items() if (stopped.point / name).read_bytes() != data)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    os.kill(stopped.children("worker")[0], signal.SIGKILL)
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert wrong == []


@pytest.mark.mount
@pytest.mark.root
def test_damage_that_the_disk_gives_later_is_an_error(mounted: Mounted) -> None:
    (mounted.point / "image").write_bytes(b"some bytes" * 500)
    mounted.stop()
    (volume,) = (mounted.store / "volumes").glob("*.vol")
    with open(volume, "r+b") as file:
        file.seek(volume.read_bytes().index(b"some bytes") + 2000)
        file.write(b"\xff")
    mounted.start()
    _let_go(mounted.store)
    mounted.expected_log.append(r"open: volume 1, offset \d+, inode 0x2: the data of this image is damaged")
    mounted.check_code = EXIT_DAMAGED
    for _ in range(2):  # the second time from memory, by pyfuse3's handler
        with pytest.raises(OSError, match="Input/output error"):
            (mounted.point / "image").read_bytes()


def _let_go(store: Path) -> None:
    """Let nothing of the volumes of *store* be in memory."""
    for path in (store / "volumes").iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
