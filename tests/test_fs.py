"""What surrounds the handlers: no exception gets past them, and those who wait for the disk share its syncs."""

import errno
import logging
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from imgfs import group_sync
from imgfs.answers import all_answered
from imgfs.errors import Damaged, NotFound, Spoiled, StoreFull
from imgfs.fs import Filesystem
from imgfs.group_sync import GroupSync

DEADLINE_S = 30.0
HANDLERS = """
    lookup getattr setattr readlink mknod mkdir unlink rmdir symlink rename link open read write flush release
    fsync opendir readdir releasedir fsyncdir statfs create
"""


@all_answered
class Broken:
    """Handlers that raise what they are told."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def read(self, number: int) -> int:
        raise self._error

    async def write(self, number: int) -> int:
        return number + 1

    async def _private(self) -> None:
        raise self._error

    def forget(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "number", "logged"),
    [
        (FUSEError(errno.EPERM), errno.EPERM, ""),
        (NotFound("no such image"), errno.ENOENT, ""),
        (Damaged("bytes are wrong"), errno.EIO, "read: bytes are wrong"),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, "read: [Errno 28] full"),
        (OSError(errno.EDQUOT, "quota"), errno.ENOSPC, "read: [Errno 122] quota"),
        (OSError(errno.EACCES, "denied"), errno.EIO, "read: [Errno 13] denied"),
        (ZeroDivisionError("a bug"), errno.EIO, "read failed; this is a bug"),
        (MemoryError(), errno.EIO, "read failed; this is a bug"),
    ],
)
async def test_every_exception_becomes_an_errno(
    error: Exception, number: int, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(error)
    with pytest.raises(FUSEError) as caught:
        await broken.read(1)
    assert caught.value.errno == number
    assert [record.getMessage()[: len(logged)] for record in caplog.records] == ([logged] if logged else [])
    assert await broken.write(1) == 2


async def test_a_bug_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FUSEError):
        await Broken(ZeroDivisionError("a bug")).read(1)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


@pytest.mark.parametrize(("error", "tries"), [(StoreFull("no room"), 2), (Spoiled("no room in time"), 1)])
async def test_room_is_sought_where_it_helps(error: Exception, tries: int) -> None:
    tried = []

    @all_answered
    class Full:
        async def flush(self) -> None:
            tried.append("flush")
            raise error

        async def find_room(self) -> bool:
            tried.append("find")
            return True

    with pytest.raises(FUSEError) as caught:
        await Full().flush()
    assert caught.value.errno == errno.ENOSPC
    assert tried == ["flush", "find", "flush"][: 2 * tries - 1]


async def test_cancellation_passes() -> None:
    @all_answered
    class Slow:
        async def read(self) -> None:
            await trio.sleep_forever()

    with trio.move_on_after(0) as scope:
        await Slow().read()
    assert scope.cancelled_caught


def test_every_handler_of_the_filesystem_is_wrapped() -> None:
    handlers = [name for name, value in vars(Filesystem).items() if hasattr(value, "__wrapped__")]
    assert set(handlers) >= set(HANDLERS.split())


class Syncs:
    """Counts the syncs that run; each waits until it is let go."""

    def __init__(self) -> None:
        self.started = 0
        self.error: Exception | None = None
        self.serves_all = False
        self._began = threading.Semaphore(0)
        self._may_end = threading.Semaphore(0)

    def __call__(self, asked: Callable[[], int]) -> int:
        served = asked()
        self.started += 1
        self._began.release()
        assert self._may_end.acquire(timeout=DEADLINE_S)
        if self.error is not None:
            raise self.error
        return asked() if self.serves_all else served

    async def wait_for_begin(self) -> None:
        assert await trio.to_thread.run_sync(self._began.acquire, True, DEADLINE_S)

    def let_go(self, runs: int) -> None:
        self._may_end.release(runs)


async def test_those_who_come_during_a_sync_share_the_next() -> None:
    syncs = Syncs()
    group = GroupSync(syncs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.wait)
        await syncs.wait_for_begin()
        for _ in range(5):
            nursery.start_soon(group.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert syncs.started == 1
        syncs.let_go(2)
    assert syncs.started == 2


async def test_the_next_waits_for_those_who_were_served_or_wait_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_sync, "_PATIENCE_S", DEADLINE_S)
    syncs = Syncs()
    group = GroupSync(syncs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.wait)
        await syncs.wait_for_begin()
        for _ in range(3):
            nursery.start_soon(group.wait)
        await trio.testing.wait_all_tasks_blocked()
        syncs.let_go(2)
        await trio.sleep(0.05)
        assert syncs.started == 1, "one was served, and is expected again"
        nursery.start_soon(group.wait)
    assert syncs.started == 2
    async with trio.open_nursery() as nursery:
        for number in range(4):
            await trio.sleep(0.01)
            assert syncs.started == 2, f"four were served, {number} came back"
            nursery.start_soon(group.wait)
        syncs.let_go(1)
    assert syncs.started == 3


async def test_who_does_not_come_back_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs()
    group = GroupSync(syncs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.wait)
        await syncs.wait_for_begin()
        for _ in range(3):
            nursery.start_soon(group.wait)
        await trio.testing.wait_all_tasks_blocked()
        syncs.let_go(2)
    assert syncs.started == 2, "not for ever"
    syncs.let_go(2)
    await group.wait()
    monkeypatch.setattr(group_sync, "_PATIENCE_S", DEADLINE_S)
    await group.wait()
    assert syncs.started == 4


async def test_a_failed_sync_fails_for_all_it_was_for_and_for_nobody_else() -> None:
    syncs = Syncs()
    syncs.error = OSError(errno.EIO, "lost")
    group = GroupSync(syncs)
    failed = []

    async def wait() -> None:
        try:
            await group.wait()
        except OSError as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await syncs.wait_for_begin()
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        syncs.let_go(2)
    assert (syncs.started, len(failed)) == (2, 4)
    syncs.error = None
    syncs.let_go(1)
    await wait()
    assert (syncs.started, len(failed)) == (3, 4)


async def test_those_who_come_before_another_process_lets_a_sync_begin_are_served_by_it() -> None:
    syncs = Syncs()
    syncs.serves_all = True
    group = GroupSync(syncs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.wait)
        await syncs.wait_for_begin()
        for _ in range(5):
            nursery.start_soon(group.wait)
        await trio.testing.wait_all_tasks_blocked()
        syncs.let_go(1)
    assert syncs.started == 1


async def test_who_asks_is_told_while_the_loop_does_something_else() -> None:
    syncs = Syncs()
    group, told, heard = GroupSync(syncs), threading.Semaphore(0), []

    def tell(error: Exception | None) -> None:
        heard.append((error, threading.current_thread() is threading.main_thread()))
        told.release()

    group.ask(tell)
    syncs.let_go(1)
    assert told.acquire(timeout=DEADLINE_S)
    assert heard == [(None, False)]


def test_what_goes_wrong_in_telling_ends_the_loop() -> None:
    def tell(_: Exception | None) -> None:
        raise OSError(errno.EBADF, "the device")

    async def ask() -> None:
        GroupSync(lambda asked: asked()).ask(tell)
        await trio.sleep(DEADLINE_S)

    with pytest.raises(trio.TrioInternalError) as caught:
        trio.run(ask)
    cause = caught.value.__cause__
    assert isinstance(cause, BaseExceptionGroup)
    assert cause.subgroup(OSError) is not None
