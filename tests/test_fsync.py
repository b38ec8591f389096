"""fsync past pyfuse3: flushed on the spot, answered from the thread that syncs, once for all who wait."""

import contextlib
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing
from door import ROW, Door, request_of
from killed_store import new_store as new_real_store
from mounted import WORKER_DEATHS, Mounted, wait_until
from powercut import SimulatedDisk
from stores import PATH, abandon_all, content, disk_of, names, new_store, open_store, put
from survivors import NOTHING_UNSYNCED

from imgfs.board import Board
from imgfs.calls import INLINE_BYTES
from imgfs.errors import EXIT_REPAIRED
from imgfs.fs import Filesystem
from imgfs.late import LateRequests, Unsynced
from imgfs.layout import Word
from imgfs.replies import Reply
from imgfs.settings import Settings
from imgfs.store import ROOT, Store
from imgfs.volume import Volume
from imgfs.wire import OUT_HEADER, Opcode, identify

DEADLINE_S = 60
LARGE = Settings(volume_bytes_max=8 << 20, headroom_bytes=0, checkpoint_needles=1000, rest_slots=2)
LATE_ROWS = range(1, 9)


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door(new_store(LARGE, SimulatedDisk(4 << 20)))
    yield door
    door.close()
    abandon_all()


def write(door: Door, name: bytes, data: bytes = b"bytes") -> int:
    """Begin an image; return the handle."""
    created = door.create(name)
    assert created is not None
    assert door.write(created[1], data) is not None
    return created[1]


def durable_names(store: Store) -> set[bytes]:
    """Return what is in *store* after power loss, as far as it can be read."""
    with Store.open(PATH, disk=disk_of(store).after_power_cut(NOTHING_UNSYNCED), settings=LARGE) as twin:
        found = names(twin)
        return {name for name in found if content(twin, twin.lookup(ROOT, name)) == b"bytes"}


async def until(condition: Callable[[], object]) -> None:
    """Return when *condition* holds, which another thread or task brings about."""
    with trio.fail_after(DEADLINE_S):
        while True:
            if condition():
                return
            await trio.sleep(0.001)


class Waiting:
    """What waits for a sync behind a door, and the answers, by the number of the request."""

    def __init__(self, door: Door, nursery: trio.Nursery) -> None:
        self.answers: dict[int, int] = {}
        post = Board().posts[0]
        self.rows = list(LATE_ROWS)
        self._door = door
        self._requests = door.store.requests
        self._late = LateRequests(door.express, self._requests, self.rows, post, nursery, self._write)

    def _write(self, reply: Reply) -> None:
        _, error, unique = OUT_HEADER.unpack(bytes(reply[0]))
        self.answers[unique] = -error

    def fsync(self, handle: int, unique: int, opcode: int = Opcode.FSYNC) -> bool:
        """Ask for it, as the desk does; return whether it was put off."""
        head, raw = request_of(opcode, 0, struct.pack("<QII", handle, 0, 0), unique)
        request = identify(head)
        self._requests.begin(ROW, request)
        with pytest.raises(Unsynced):
            self._door.express.answer(head, memoryview(raw), ROW)
        return self._late.await_sync(head, memoryview(raw), request, ROW)

    async def all_answered(self, count: int) -> dict[int, int]:
        """Return the errno of each answer when there are *count*, and nothing is left in hand."""
        await until(lambda: len(self.answers) >= count and not self._requests.busy(0))
        assert self._requests.in_hand(0) == []
        return self.answers


class Gate:
    """Lets syncs of a disk begin one by one; each can fail."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.began = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.fails = False
        self._sync = disk.sync
        disk.sync = self._gated  # type: ignore[method-assign]

    def _gated(self, file: int) -> None:
        self.began.release()
        assert self.go_on.acquire(timeout=DEADLINE_S)
        if self.fails:
            self.fails = False
            raise OSError(errno.EIO, "Input/output error")
        self._sync(file)

    async def wait_for_begin(self) -> None:
        assert await trio.to_thread.run_sync(self.began.acquire, True, DEADLINE_S)


async def test_what_was_written_is_durable_when_it_is_answered(door: Door, nursery: trio.Nursery) -> None:
    waiting = Waiting(door, nursery)
    assert waiting.fsync(write(door, b"image"), 1)
    assert waiting.fsync(0, 2, Opcode.FSYNCDIR)
    assert await waiting.all_answered(2) == {1: 0, 2: 0}
    assert durable_names(door.store) == {b"image"}


async def test_what_was_flushed_before_is_synced_all_the_same(door: Door, nursery: trio.Nursery) -> None:
    handle = write(door, b"image")
    assert door.flush(handle) is not None
    assert durable_names(door.store) == set()
    waiting = Waiting(door, nursery)
    assert waiting.fsync(handle, 1)
    assert await waiting.all_answered(1) == {1: 0}
    assert durable_names(door.store) == {b"image"}
    assert door.release(handle) is not None


async def test_those_who_come_during_a_sync_share_the_next_and_its_failure(
    door: Door, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    waiting, gate = Waiting(door, nursery), Gate(disk_of(door.store))
    assert waiting.fsync(write(door, b"first"), 1)
    await gate.wait_for_begin()
    for unique in range(2, 6):
        assert waiting.fsync(write(door, b"%d" % unique), unique)
    assert len(door.store.requests.in_hand(0)) == 5, "whoever settles what a worker leaves finds them"
    gate.go_on.release()
    await gate.wait_for_begin()
    assert waiting.answers == {1: 0}
    gate.fails = True
    gate.go_on.release(20)
    assert await waiting.all_answered(5) == {1: 0} | dict.fromkeys(range(2, 6), errno.EIO)
    assert "appended again" in caplog.text
    assert waiting.fsync(write(door, b"last"), 6)
    assert (await waiting.all_answered(6))[6] == 0
    assert durable_names(door.store) == {b"first", b"2", b"3", b"4", b"5", b"last"}


async def test_who_has_a_directory_open_is_told_of_a_sync_that_failed_meanwhile(
    door: Door, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem = Filesystem(door.store, door.desk, door.acts, door.calls)
    before = door.store.open_directory(ROOT)
    waiting, gate = Waiting(door, nursery), Gate(disk_of(door.store))
    assert waiting.fsync(write(door, b"first"), 1)
    await gate.wait_for_begin()
    door.store.mkdir(ROOT, b"directory", 0o755, 1, 1)
    # The run that is under way fails, and what it did not cover lay behind the mark, too; this waits for the next.
    assert waiting.fsync(before, 2, Opcode.FSYNCDIR)
    gate.fails = True
    gate.go_on.release(20)
    assert await waiting.all_answered(2) == {1: errno.EIO, 2: errno.EIO}
    with pytest.raises(pyfuse3.FUSEError) as told:
        await filesystem.fsyncdir(before, False)
    assert told.value.errno == errno.EIO
    after = await filesystem.opendir(ROOT, pyfuse3.RequestContext())
    await filesystem.fsyncdir(after, False)
    assert waiting.fsync(after, 3, Opcode.FSYNCDIR)
    assert (await waiting.all_answered(3))[3] == 0
    assert "appended again" in caplog.text


async def test_an_image_that_the_disk_lost_is_not_answered_as_durable(door: Door, nursery: trio.Nursery) -> None:
    handle = write(door, b"image", b"bytes that the disk loses")
    assert door.flush(handle) is not None
    place = door.store.locate(door.store.handle_inode(handle))
    disk = disk_of(door.store)
    disk.flip(f"{PATH}/volumes/{place.volume:08d}.vol", place.data_offset)
    disk.fail_next("sync", errno.EIO)
    waiting = Waiting(door, nursery)
    assert waiting.fsync(0, 1, Opcode.FSYNCDIR)
    assert await waiting.all_answered(1) == {1: errno.EIO}
    assert waiting.fsync(handle, 2)
    assert await waiting.all_answered(2) == {1: errno.EIO, 2: errno.EIO}, "it stays lost, whatever later syncs say"


async def test_who_finds_the_disk_full_waits_for_room(door: Door, nursery: trio.Nursery) -> None:
    store, disk = door.store, disk_of(door.store)
    handle = write(door, b"image")
    assert door.flush(handle) is not None
    capacity, disk.capacity_bytes = disk.capacity_bytes, 0
    disk.fail_next("sync", errno.EIO)
    waiting = Waiting(door, nursery)
    assert waiting.fsync(handle, 1)
    assert await waiting.all_answered(1) == {1: errno.EIO}
    assert waiting.fsync(handle, 2)
    assert await waiting.all_answered(2) == {1: errno.EIO, 2: errno.ENOSPC}, "there is nobody who gives space back"
    store.offer_room()
    assert waiting.fsync(handle, 3)
    await until(store.room_asked)
    disk.capacity_bytes = capacity
    store.answer_room(store.room_asked())
    assert (await waiting.all_answered(3))[3] == 0
    assert durable_names(store) == {b"image"}


async def test_who_finds_no_row_is_left_to_pyfuse3(door: Door, nursery: trio.Nursery) -> None:
    waiting, gate = Waiting(door, nursery), Gate(disk_of(door.store))
    handle = write(door, b"image")
    for unique in LATE_ROWS:
        assert waiting.fsync(handle, unique)
    assert not waiting.fsync(handle, 100)
    assert [row for row, _, _ in door.store.requests.in_hand(0)] == [ROW, *LATE_ROWS]
    door.store.requests.end(ROW)
    gate.go_on.release(20)
    assert await waiting.all_answered(len(LATE_ROWS)) == dict.fromkeys(LATE_ROWS, 0)
    for unique in LATE_ROWS:
        assert waiting.fsync(handle, unique), "rows are given back"
    await waiting.all_answered(len(LATE_ROWS))


def test_what_copies_much_and_errors_are_for_the_handler(door: Door) -> None:
    assert door.fsync(12345) is None
    created = door.create(b"image")
    assert created is not None
    handle = created[1]
    for offset in (0, INLINE_BYTES):
        door.store.write(handle, offset, bytes(INLINE_BYTES))
    assert door.fsync(handle) is None
    assert door.store.flush_bytes(handle) > INLINE_BYTES, "nothing was done"


def test_who_asks_while_another_process_syncs_is_served_by_the_next_run() -> None:
    with new_real_store() as store:
        other = Store.attach(store.path, os.dup(store.memory_descriptor), None, settings=store.settings)
        began, go_on, asked, served = threading.Event(), threading.Event(), [1], []
        syncs: list[int] = []

        def slow(_: int) -> None:
            began.set()
            assert go_on.wait(DEADLINE_S)

        store._disk.sync = slow  # type: ignore[method-assign]
        other._disk.sync = syncs.append  # type: ignore[method-assign]
        put(store, ROOT, b"a")
        first = threading.Thread(target=store.sync)
        first.start()
        assert began.wait(DEADLINE_S)
        put(store, ROOT, b"b")
        second = threading.Thread(target=lambda: served.append(other.sync_for(lambda: asked[0])))
        second.start()
        wait_until(other._memory.one_sync._threads.locked, "the other one waits for the sync")
        put(store, ROOT, b"c")
        asked[0] = 2
        go_on.set()
        for thread in (first, second):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        assert served == [2]
        other.sync()
        assert len(syncs) == 1, "all was durable"
        other.leave()


def test_who_was_killed_within_a_sync_is_not_forgotten_for_one_of_the_volume_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have been told of lost pages; so what comes behind it writes all once more."""
    with new_real_store() as store:
        other = Store.attach(store.path, os.dup(store.memory_descriptor), None, settings=store.settings)
        memory, words, log = store._memory, store._memory.words, store._log
        assert log is not None
        put(store, ROOT, b"a")
        late = threading.Thread(target=other.sync)
        turn = memory.one_sync
        with turn:
            late.start()
            wait_until(other._memory.one_sync._threads.locked, "the other one waits for the sync")
            with monkeypatch.context() as patch, memory.lock():
                # Who seals the volume, and who begins to sync the next, come before it.
                patch.setattr(memory, "one_sync", contextlib.nullcontext())
                log._seal()
                log.begin_volume()
            put(store, ROOT, b"b")
            words[Word.SYNCING] = 1
        late.join(DEADLINE_S)
        assert not late.is_alive()
        again: list[tuple[int, int]] = []
        monkeypatch.setattr(Volume, "write_again", lambda _, start, end: again.append((start, end)))
        first, end = words[Word.DURABLE], words[Word.ACTIVE_END]
        other.sync()
        assert again == [(first, end)]
        assert not words[Word.SYNCING]
        other.leave()


def test_nothing_follows_a_seal_that_came_during_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store()
    disk, log = disk_of(store), store._log
    assert log is not None
    for number in range(store.settings.checkpoint_needles + 1):
        put(store, ROOT, b"%d" % number)
    close = disk.close

    def seal(file: int) -> None:
        monkeypatch.undo()
        close(file)
        with store._memory.lock():
            log._seal()  # who did that is killed before it begins the next

    monkeypatch.setattr(disk, "close", seal)
    store.sync()
    assert log._is_sealed()
    put(store, ROOT, b"goes on")
    before = names(store)
    twin = open_store(disk.after_kill())
    assert names(twin) == before
    assert not twin.report.damage
    abandon_all()


@pytest.mark.mount
@pytest.mark.root
def test_pyfuse3_is_not_asked(stopped: Mounted) -> None:
    stopped.start("timeout=0", fault=("no-handler-syncs", ""))
    for number in range(20):
        _write_durably(stopped.point / f"{number}", b"bytes")
    parent = os.open(stopped.point, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(parent)
    os.close(parent)


@pytest.mark.mount
@pytest.mark.root
def test_workers_that_are_killed_while_many_wait_lose_none(stopped: Mounted) -> None:
    stopped.expected_log += WORKER_DEATHS
    stopped.start("workers=2,timeout=0", fault=("slow-syncs", ""))
    failed: list[BaseException] = []
    done = threading.Event()
    written: dict[str, bytes] = {}

    def write_on(writer: int) -> None:
        number = 0
        try:
            while not done.is_set() or number < 3:
                name, data = f"{writer}-{number}", bytes([writer]) * (1000 * number + 1)
                _write_durably(stopped.point / name, data)
                written[name] = data
                number += 1
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write_on, args=(writer,)) for writer in range(8)]
    for writer in writers:
        writer.start()
    for _ in range(6):
        count = len(written)
        wait_until(lambda count=count: len(written) > count or failed, "another image is durable")  # type: ignore[misc]
        for pid in stopped.children("worker"):
            os.kill(pid, signal.SIGKILL)
    done.set()
    for writer in writers:
        writer.join(DEADLINE_S)
        assert not writer.is_alive()
    assert failed == []
    stopped.stop()
    stopped.start()
    assert {path.name: path.read_bytes() for path in stopped.point.iterdir()} == written


@pytest.mark.mount
@pytest.mark.root
def test_a_directory_that_was_open_when_a_sync_failed(stopped: Mounted) -> None:
    marker = stopped.store.with_name("fails")
    stopped.start(fault=("failing-sync", str(marker)))
    stopped.expected_log += ["fsync: .*", "fsyncdir: .*", ".*; what is whole behind byte .* is appended again"]
    stopped.check_code = EXIT_REPAIRED  # the volume that was cut short has too long an index
    (stopped.point / "made").mkdir()
    before = os.open(stopped.point, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(before)
    (stopped.point / "made" / "image").write_bytes(b"bytes")
    marker.touch()
    with pytest.raises(OSError, match="Input/output error"):
        _write_durably(stopped.point / "other", b"bytes")
    with pytest.raises(OSError, match="Input/output error"):
        os.fsync(before)
    assert set(os.listdir(before)) == {"made", "other"}
    os.close(before)
    after = os.open(stopped.point, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(after)
    os.close(after)


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
