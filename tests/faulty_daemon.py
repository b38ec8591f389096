"""`imgfs` with a fault planted in what its workers do: run as `faulty_daemon.py FAULT ARGUMENT imgfs-arguments...`.

Owns the faults. It runs the real program; only the one thing that a fault names goes wrong.
"""

import contextlib
import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyfuse3 import FUSEError

from imgfs import child, maintenance, supervisor, wire, worker
from imgfs.acts import Acts
from imgfs.cli import main
from imgfs.disk import Disk, WouldBlock
from imgfs.express import Express
from imgfs.fs import Filesystem
from imgfs.images import Images
from imgfs.memory import Memory
from imgfs.requests import Request

# What a handler does that another process can see: each is a point to die at.
_DISK_STEPS = ("write", "append", "truncate", "unlink", "rename", "sync", "open", "create")


def die_at_name(name: str) -> None:
    """A worker that looks *name* up dies of a crash."""
    lookup = Acts.lookup

    def crash(self: Acts, parent: int, asked: bytes, thread: int, **named: Any) -> Any:
        if asked == name.encode():
            os.kill(os.getpid(), signal.SIGSEGV)
        return lookup(self, parent, asked, thread, **named)

    Acts.lookup = crash  # type: ignore[method-assign]


def die_at_start(_: str) -> None:
    """A worker dies before it reads anything."""

    def crash(*_: object) -> None:
        os._exit(3)

    worker.work = crash  # type: ignore[assignment]


def count_requests(path: str) -> None:
    """Nothing goes wrong: a file of counts, see bench/counting.py, says what one worker was asked for."""
    from bench.counting import count_in

    count_in(path)


def little_patience(seconds: str) -> None:
    """A worker that stands still for so long, in whatever way, is killed."""
    supervisor._NO_BEAT_NS = supervisor._STANDSTILL_NS = int(float(seconds) * 1e9)


def frozen_in_a_look(marker: str) -> None:
    """Where the file *marker* is, all of the daemon is stopped just when the supervisor looks whether a worker is."""
    little_patience("2")
    is_stopped = child.is_stopped

    def freeze(pid: int) -> bool:
        if _claim(marker) is not None:
            for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(each), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        return is_stopped(pid)

    child.is_stopped = freeze


def never_resent(_: str) -> None:
    """The kernel is one that cannot send requests again."""
    wire.can_resend = lambda init: False  # type: ignore[assignment]


def never_at_once(_: str) -> None:
    """Workers answer nothing on the spot: pyfuse3 gets every request."""
    Express.answer = lambda *_: None  # type: ignore[method-assign,assignment]


def slow_disk(_: str) -> None:
    """Nothing that an image consists of is in memory before a thread has waited for it."""

    def slow(self: Disk, file: int, offset: int, size: int) -> bytearray:
        raise WouldBlock

    Disk.read_resident = slow  # type: ignore[method-assign]


def no_handler_syncs(_: str) -> None:
    """What pyfuse3's handlers would make durable fails."""

    async def fail(*_: object) -> None:
        raise FUSEError(errno.ENOTSUP)

    Filesystem.fsync = Filesystem.fsyncdir = fail  # type: ignore[method-assign,assignment]


def failing_sync(marker: str) -> None:
    """The disk fails the next sync, once there is a file *marker*."""
    sync = Disk.sync

    def fail(self: Disk, file: int) -> None:
        if _claim(marker) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(self, file)

    Disk.sync = fail  # type: ignore[method-assign]


def slow_syncs(_: str) -> None:
    """The disk takes its time to make anything durable."""
    sync = Disk.sync

    def slow(self: Disk, file: int) -> None:
        time.sleep(0.02)
        sync(self, file)

    Disk.sync = slow  # type: ignore[method-assign]


def hang_at_name(name: str) -> None:
    """A worker that looks *name* up does not come back from it, the first time."""
    marker, _, name = name.rpartition(":")
    lookup = Acts.lookup

    def hang(self: Acts, parent: int, asked: bytes, thread: int, **named: Any) -> Any:
        if asked == name.encode() and _claim(marker) is not None:
            time.sleep(3600)
        return lookup(self, parent, asked, thread, **named)

    Acts.lookup = hang  # type: ignore[method-assign]


def hang_in_a_read(marker: str) -> None:
    """A worker that has said that it reads waits for long, the first time; a signal interrupts that."""
    from imgfs.desk import Desk

    read = Desk._read

    def hang(self: Desk) -> int:
        if _claim(marker) is not None:
            ctypes.PyDLL(None).pause()
        return read(self)

    Desk._read = hang  # type: ignore[method-assign]


def hang_behind_a_read(marker: str) -> None:
    """A worker that has read an unlink waits before it notes that, the first time; a signal interrupts that.

    The file *marker*.pid says which worker.
    """
    identify = wire.identify

    def hang(head: wire.Head) -> Request:
        if head[1] == wire.Opcode.UNLINK and _claim(marker) is not None:
            Path(f"{marker}.pid").write_text(str(os.getpid()))
            ctypes.PyDLL(None).pause()
        return identify(head)

    wire.identify = hang


def hold_a_read(marker: str) -> None:
    """A worker that knows where an image lies reads it only when there is a file *marker*.go, the first time.

    Who gives space back waits for it, but not for long.
    """
    whole = Images.whole

    def hold(self: Images, *args: Any, **named: Any) -> Any:
        if _claim(marker) is not None:
            deadline = time.monotonic() + 60
            while not os.path.exists(f"{marker}.go") and time.monotonic() < deadline:
                time.sleep(0.01)
        return whole(self, *args, **named)

    Images.whole = hold  # type: ignore[method-assign]
    maintenance._SETTLE_S = 0.5


def slow_sync_of_maintenance(seconds: str) -> None:
    """The process that gives space back waits so long for each sync of a volume."""
    run, sync = maintenance._Maintenance.run, Disk.sync

    def slow(self: Disk, file: int) -> None:
        time.sleep(float(seconds))
        sync(self, file)

    def run_slowly(self: maintenance._Maintenance) -> None:
        Disk.sync = slow  # type: ignore[method-assign]
        run(self)

    maintenance._Maintenance.run = run_slowly  # type: ignore[method-assign]


def die_at_step(marker: str) -> None:
    """A worker that finds the file *marker* when it begins a change takes it, and dies at the step it names.

    Steps are the beginning of the handler, every call that changes a file, the end of every change of the table, and
    the end of the handler, when only the answer is missing.
    """
    left = -1

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            step()
            try:
                return call(*args, **named)
            finally:
                step()

        return run

    for name in _DISK_STEPS:
        if hasattr(Disk, name):
            setattr(Disk, name, counted(getattr(Disk, name)))
    Memory.end = counted(Memory.end)  # type: ignore[method-assign]

    @contextlib.contextmanager
    def armed() -> Iterator[None]:
        nonlocal left
        claimed = _claim(marker)
        if claimed is not None:
            left = claimed
        step()
        try:
            yield
        finally:
            step()
            if claimed is not None and left >= 0:
                # All steps are done, and it lives: nothing more to try.
                os.close(os.open(f"{marker}.survived", os.O_WRONLY | os.O_CREAT))
                left = -1

    def armed_handler(handler: Callable[..., Any]) -> Callable[..., Any]:
        async def run(*args: Any) -> Any:
            with armed():
                return await handler(*args)

        return run

    def armed_answer(answer: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            with armed():
                return answer(*args, **named)

        return run

    changes = (
        "create mkdir mknod symlink link unlink rmdir rename setattr setxattr removexattr write flush release open"
    )
    for name in changes.split():
        setattr(Filesystem, name, armed_handler(getattr(Filesystem, name)))
        if hasattr(Express, f"_{name}"):
            setattr(Express, f"_{name}", armed_answer(getattr(Express, f"_{name}")))


def _claim(marker: str) -> int | None:
    """Take the file *marker*, if nobody else has; return the number in it."""
    try:
        os.rename(marker, f"{marker}.{os.getpid()}")
    except FileNotFoundError:
        return None
    with open(f"{marker}.{os.getpid()}") as file:
        number = int(file.read() or 0)
    os.unlink(f"{marker}.{os.getpid()}")
    return number


FAULTS = {
    "count-requests": count_requests,
    "die-at-name": die_at_name,
    "die-at-start": die_at_start,
    "die-at-step": die_at_step,
    "failing-sync": failing_sync,
    "frozen-in-a-look": frozen_in_a_look,
    "hold-a-read": hold_a_read,
    "hang-at-name": hang_at_name,
    "hang-in-a-read": hang_in_a_read,
    "hang-behind-a-read": hang_behind_a_read,
    "little-patience": little_patience,
    "never-at-once": never_at_once,
    "never-resent": never_resent,
    "no-handler-syncs": no_handler_syncs,
    "slow-disk": slow_disk,
    "slow-sync-of-maintenance": slow_sync_of_maintenance,
    "slow-syncs": slow_syncs,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]](sys.argv[2])
    sys.exit(main(sys.argv[3:]))
