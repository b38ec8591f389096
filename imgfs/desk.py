"""What a worker has in hand: it reads the requests, has most answered on the spot, and hands pyfuse3 the others.

Owns the reading of the device, what pyfuse3's main loop uses of trio, and the worker's rows of requests. Must not know
the store, nor what a request does.

pyfuse3 looks trio up by a global name of its own at each request (its asyncio module lives by that): each of its
tasks takes a lock, waits for the descriptor, reads a request, handles it, answers it, and comes back to the lock. So
there, and nowhere else, it shows that the last request of the task is answered. Where it waits for the descriptor, the
desk reads requests itself, as long as they can be answered on the spot (express.py), and polls the device for a moment
when there is none: a client that got its answer mostly asks on at once. A request that takes more is put into a file
in memory, which for one read takes the place of the device that libfuse has. What libfuse answers goes to the device.

*Concurrency:* one loop, one thread. A worker says on the board that it reads, and no more when the request is in its
row. Timers and signals come at most `_IN_A_ROW` requests or moments late.
"""

import contextlib
import enum
import errno
import inspect
import os
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pyfuse3
import trio

from imgfs import wire
from imgfs.awake import PATIENCE_S, Awake
from imgfs.board import ANSWERED, LAST, PAUSE, READING_SINCE_NS, WATCHER, Board
from imgfs.device import Device
from imgfs.disk import Buffer, WouldBlock
from imgfs.errors import MountFailed
from imgfs.late import Express, LateRequests, Unsynced
from imgfs.replies import Reply
from imgfs.requests import TASKS_MAX, Request, Requests, Result

T = TypeVar("T")

_MOMENT_MS = 1
# Requests that are taken in a row before all other tasks get their turn.
_IN_A_ROW = 32
# Whoever was woken for a request that another worker took sleeps: this long, then twice that, so often. A client that
# asks alone has one worker's attention, and two that both wake for it are slower than one.
_NAP_S = 0.001
_NAPS_MAX = 4
# pyfuse3 starts so many tasks when all others are busy, and ends none: rows are given to them for good, and a buffer of
# a MiB each.
PYFUSE3_TASKS_MAX = 64
# Descriptors that select(2) takes: it waits for less than a millisecond, as poll(2) cannot.
_SELECTED_MAX = 1023
# One answer to INIT, or what libfuse answers without a handler.
_REPLY_BYTES_MAX = 1024


class _Lock:
    """As `async with trio.Lock()`, but to take a free one is no checkpoint, and who asks on may take it again.

    trio hands a lock that is let go to whoever waits for it, so that two tasks would take turns at every request. Here
    the other is woken, and finds the lock free if the one that had it waits for something else by then.
    """

    def __init__(self, came_back: Callable[[], None]) -> None:
        self._came_back = came_back
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        self._came_back()
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._held = False
        self._waiting.unpark()


class _Nothing:
    """Leaves everything to pyfuse3."""

    def answer(self, head: wire.Head, request: memoryview, row: int) -> Reply | None:
        return None

    def go_on(self) -> None:
        pass

    def ask_disk(self, head: wire.Head) -> bool:
        return False

    async def answer_late(self, head: wire.Head, request: bytes, row: int) -> Reply:
        raise NotImplementedError

    def ask_sync(self, told: Callable[[Exception | None], None]) -> None:
        raise NotImplementedError

    def synced(self, head: wire.Head, request: bytes, error: Exception | None) -> Reply | None:
        raise NotImplementedError


class TrialPassed(Exception):
    """A worker that was only to be tried has answered INIT as it should."""


class _Wait:
    """Counts the handlers that wait for something; `with` it around what they wait for."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.count -= 1


class _Came(enum.Enum):
    """What there was to read."""

    NOTHING = enum.auto()
    """No request, or none for us."""

    MANY = enum.auto()
    """As many as may be answered before all other tasks get their turn."""

    ONE_FOR_PYFUSE3 = enum.auto()
    """One that was handed over."""


class _Seat:
    """One task of pyfuse3's main loop."""

    __slots__ = ("applied", "request", "row")

    def __init__(self, row: int) -> None:
        self.row = row
        self.request: Request | None = None
        self.applied: Result | None = None  # what `resent` will return


class Desk:
    """The requests that one worker has in hand."""

    def __init__(
        self, worker: int, device: Device, board: Board, requests: Requests, *, trial: bool = False, awake: bool = False
    ) -> None:
        """*trial*: answer INIT, raise `TrialPassed`, and touch nothing that is shared. *awake*: as `Awake` wants it."""
        self.wait = _Wait()
        """Handlers that wait for a thread or a lock say so: meanwhile every task gets its turn."""

        self.express: Express = _Nothing()
        """Answers requests past pyfuse3."""

        self._trial = trial
        self._device = device
        self._board = board
        self._post = board.posts[worker]
        self._number = worker + 1
        self._requests = requests
        self._first_row = worker * TASKS_MAX
        self._seats: dict[object, _Seat] = {}
        # Rows for what is answered late; those before are for tasks of pyfuse3.
        self._late_rows = range(self._first_row + PYFUSE3_TASKS_MAX, self._first_row + TASKS_MAX)
        self._late: LateRequests | None = None
        self._in_a_row = 0
        self._woken = False
        self._awake = Awake(wanted=awake)
        # The end that libfuse takes for the device until INIT is answered, and ours.
        self._theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._took_over = False
        self._fuse = -1  # the device, once INIT is answered
        self._buffer = memoryview(b"")
        self._buffers = [self._buffer]  # as readv wants it
        # A request that pyfuse3 gets; while it has to be read, `theirs` is this file.
        self._handed = os.memfd_create("imgfs-request", os.MFD_CLOEXEC)
        self._handed_bytes = 0
        self._asked = False

    def close(self) -> None:
        """Free what a desk has that nobody serves from."""
        self._theirs.close()
        self._ours.close()
        self._awake.close()
        os.close(self._handed)

    def serve_late_in(self, nursery: trio.Nursery) -> None:
        """Answer in *nursery* what has to wait for the disk."""
        self._late = LateRequests(self.express, self._requests, self._late_rows, self._post, nursery, self._write)

    # -- pyfuse3's session ------------------------------------------------------------------------------------

    @property
    def session_path(self) -> str:
        """What pyfuse3.init takes for a mountpoint."""
        return f"/dev/fd/{self._theirs.fileno()}"

    def install(self) -> None:
        """Let pyfuse3 work with this desk; before `pyfuse3.init`."""
        lowlevel = SimpleNamespace(**vars(trio.lowlevel))
        lowlevel.wait_readable = self._wait_for_request
        ours = SimpleNamespace(**vars(trio))
        ours.Lock, ours.lowlevel = lambda: _Lock(self._came_back), lowlevel
        pyfuse3.trio = ours  # type: ignore[attr-defined]
        self._ours.send(self._device.init)

    def _take_over(self) -> None:
        """INIT is answered: tell the kernel if it was not told yet, and put the device where the socket was."""
        self._took_over = True
        reply = self._ours.recv(_REPLY_BYTES_MAX)
        told = self._board.init_reply
        if not told:
            self._device.answer(reply)
            self._board.init_reply = reply
        elif not wire.same_session(told, reply):
            raise MountFailed("a worker of this release would promise the kernel something else than was promised")
        if self._trial:
            raise TrialPassed
        self._fuse = self._device.descriptor if wire.can_resend(self._device.init) else self._device.clone()
        # Another worker may have read what we saw.
        os.set_blocking(self._fuse, False)
        os.dup2(self._fuse, self._theirs.fileno(), inheritable=False)
        self._ours.close()
        # A worker that is killed while the kernel copies a request into pages that are not there yet fails that
        # request, with EIO: have them there.
        self._buffer = memoryview(bytearray(b"\xff") * (wire.max_write(reply) + wire.READ_BYTES_EXTRA))
        self._buffers = [self._buffer]
        self._awake.listen_to(self._fuse)
        self._post.ready = True

    # -- one request ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What was handed over has come to its handler."""
        if self._handed_bytes:
            self._take_back()

    def _came_back(self) -> None:
        """The task that calls has answered what it had in hand, if anything."""
        if self._handed_bytes:
            # There was no handler for it: libfuse has put its answer behind the request.
            reply = os.pread(self._handed, _REPLY_BYTES_MAX, self._handed_bytes)
            self._take_back()
            if reply:
                self._write((reply,))
        task = trio.lowlevel.current_task()
        seat = self._seats.get(task)
        if seat is None:
            seat = self._seats[task] = _Seat(self._first_row + len(self._seats))
        elif seat.request is not None:
            seat.request = seat.applied = None
            self._requests.end(seat.row)
            self._post.words[ANSWERED] += 1

    def _hand_over(self, seat: _Seat, request: Request, size: int) -> None:
        """Let pyfuse3 read the *request* of *size* bytes that is in the buffer, next."""
        seat.request = request
        self._handed_bytes = size
        os.pwrite(self._handed, self._buffer[:size], 0)
        os.ftruncate(self._handed, size)
        os.lseek(self._handed, 0, os.SEEK_SET)
        os.dup2(self._handed, self._theirs.fileno(), inheritable=False)

    def _take_back(self) -> None:
        """pyfuse3 has read it: what it answers is for the device."""
        self._handed_bytes = 0
        os.dup2(self._fuse, self._theirs.fileno(), inheritable=False)

    def _write(self, reply: Reply) -> None:
        try:
            os.writev(self._fuse, reply)
        except OSError as error:
            if error.errno != errno.ENOENT:  # nobody waits for it any more
                raise

    def forget(self, inode: int) -> None:
        """Let the kernel ask again for bytes and attributes of *inode*, or for the entries of that directory.

        Waits for requests that are under way, so it must be called in a thread.
        """
        self._tell(wire.forget_inode(inode))

    def forget_name(self, parent: int, name: bytes) -> None:
        """Let the kernel ask again for *name*; in a thread, too."""
        self._tell(wire.forget_name(parent, name))

    def give(self, inode: int, content: Buffer) -> None:
        """Let the kernel keep *content* as the bytes of *inode*.

        Waits for requests that ask for these bytes, so nobody may have it open yet.
        """
        self._tell(wire.keep_bytes(inode, len(content)), content)

    def _tell(self, *message: Buffer) -> None:
        with contextlib.suppress(OSError):  # it remembers nothing
            os.writev(self._fuse, message)

    def waited(self, time_ns: int) -> None:
        """Note that a request had to wait for the disk for so long."""
        self._post.waited(time_ns)

    def row(self) -> int:
        """Return the row of the request of the task that calls."""
        return self._seats[trio.lowlevel.current_task()].row

    def resent(self) -> Result | None:
        """Return what the request of the task that calls was applied with before, if it was; only once."""
        seat = self._seats[trio.lowlevel.current_task()]
        if seat.applied is not None or seat.request is None:
            return seat.applied
        return self._requests.resent(seat.row, seat.request)

    def expect_setxattr(self) -> None:
        """Raise FUSEError if the handler of getxattr is called for a setxattr that was applied before.

        For a setxattr that must create, pyfuse3 asks by getxattr first, and answers EEXIST by itself.
        """
        seat = self._seats[trio.lowlevel.current_task()]
        if seat.request is not None and seat.request.opcode == wire.Opcode.SETXATTR:
            seat.applied = self.resent()
            if seat.applied is not None:
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    # -- reading ----------------------------------------------------------------------------------------------

    def _read(self) -> int:
        """Read a request; return its size, 0 if there is none for us.

        Raises:
            OSError: ENODEV: the mount is gone.
        """
        try:
            return os.readv(self._fuse, self._buffers)
        except OSError as error:
            # Another worker had it, or the caller gave up.
            if error.errno not in (errno.EAGAIN, errno.ENOENT):
                raise
            return 0

    def _watch(self, patience_ms: int) -> bool:
        """Return whether there is a request; wait for it unless another worker does."""
        words = self._board.words
        woken, self._woken = self._woken, False
        if words[WATCHER] not in (0, self._number):
            return self._awake.look()
        if woken and words[LAST] not in (0, self._number) and not self._requests.busy(words[LAST] - 1):
            return False  # it was woken, too, and has at hand what it has prepared for who asks
        words[WATCHER] = self._number
        found = self._awake.wait(patience_ms)
        words[WATCHER] = 0
        return found

    def _serve(self, patient: bool) -> _Came:
        """Answer requests until one is not for us, or none comes; not *patient*, the first must be there already."""
        seat = self._seats[trio.lowlevel.current_task()]
        row, requests, buffer = seat.row, self._requests, self._buffer
        answer, go_on = self.express.answer, self.express.go_on
        shared, ours, late = self._board.words, self._post.words, self._late
        expected = False  # behind one request there mostly is another, and to poll costs as much as to read
        while self._in_a_row < _IN_A_ROW:
            self._in_a_row += 1
            if late is not None and late.due_ns:
                late.retry()
                patient = True
                if not expected and late.due_ns:
                    expected = self._awake.wait_until(late.due_ns)
                    if not expected:
                        continue
            if not expected and not self._watch(self._patience_ms() if patient else 0):
                return _Came.NOTHING
            # In this order: who shuts the gate sees that we read, or we see that it is shut.
            ours[READING_SINCE_NS] = time.monotonic_ns()
            if shared[PAUSE]:
                ours[READING_SINCE_NS] = 0
                return _Came.NOTHING
            try:
                size = self._read()
            except OSError as error:
                ours[READING_SINCE_NS] = 0
                if error.errno != errno.ENODEV:
                    raise
                return _Came.ONE_FOR_PYFUSE3  # libfuse finds out by itself
            if not size:
                ours[READING_SINCE_NS] = 0
                expected = False
                continue
            raw = buffer[:size]
            head = wire.IN_HEADER.unpack_from(raw)
            if head[1] in wire.UNANSWERED:
                ours[READING_SINCE_NS] = 0
                continue
            self._awake.asked(head[6])
            request = wire.identify(head)
            requests.begin(row, request)
            shared[LAST] = self._number if self._awake.alone else 0
            ours[READING_SINCE_NS] = 0
            expected = not self.wait.count
            try:
                reply = answer(head, raw, row)
            except WouldBlock:
                retried = self._fuse <= _SELECTED_MAX
                alone = self._awake.alone
                if late is not None and late.put_off(head, raw, request, row, retried=retried, alone=alone):
                    patient = True
                    continue
                reply = None
            except Unsynced:
                if late is not None and late.await_sync(head, raw, request, row):
                    continue
                reply = None
            if reply is None:
                self._hand_over(seat, request, size)
                return _Came.ONE_FOR_PYFUSE3
            self._write(reply)
            requests.end(row)
            ours[ANSWERED] += 1
            go_on()
            patient = True
        return _Came.MANY

    def _patience_ms(self) -> int:
        """Return for how long the next request is waited for before all other tasks get their turn."""
        waits = self.wait.count or (self._late is not None and self._late.in_threads)
        return 0 if waits else _MOMENT_MS

    async def _wait_for_request(self, _: int) -> None:
        """Return when there is a request that pyfuse3 has to read; answer all others."""
        if not self._took_over:
            if not self._asked:
                self._asked = True
                return  # INIT waits in the socket
            self._take_over()
        naps = 0
        patient = True
        while True:
            answered = self._post.answered
            came = self._serve(patient)
            if came is _Came.ONE_FOR_PYFUSE3:
                return
            if came is _Came.MANY:
                self._in_a_row = 0
                await trio.lowlevel.checkpoint()
                continue
            self._in_a_row = 0
            if self._late is not None:
                self._late.hand_to_threads()  # the gate is shut: they shall be answered all the same
            if self._post.answered != answered:
                naps = 0
            if self._board.paused or 0 < naps <= _NAPS_MAX:
                await trio.sleep(_NAP_S * 2 ** max(0, naps - 1))
            else:
                await self._wait_for_any()
                self._woken = True
                naps = 0
            naps += 1
            patient = False

    async def _wait_for_any(self) -> None:
        """Return when there is a request; if that takes long, processors may halt meanwhile."""
        if self._awake.keeps:
            with trio.move_on_after(PATIENCE_S):
                await trio.lowlevel.wait_readable(self._fuse)
                return
            self._awake.let_halt()
        await trio.lowlevel.wait_readable(self._fuse)


def at_desk(desk: Desk, operations: T) -> T:
    """Let every handler of *operations* say at *desk* that it has begun."""

    def noted(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(*args: Any) -> Any:
            desk.begin()
            return handler(*args)

        return handle

    for name, handler in vars(pyfuse3.Operations).items():
        if inspect.iscoroutinefunction(handler):
            setattr(operations, name, noted(getattr(operations, name)))
    return operations
