"""What a worker has in hand: which request each task of pyfuse3 works on, and when it reads the next.

Owns what pyfuse3's main loop uses of trio, and the worker's rows of requests. Must not know the store, nor what a
request does.

pyfuse3 looks trio up by a global name of its own at each request (its asyncio module lives by that): each of its
tasks takes a lock, waits for the descriptor, reads a request, handles it, answers it, and comes back to the lock. So
there, and nowhere else, it shows that the last request of the task is answered. For every request trio's lock would
cost a turn of the loop, and its wait for the descriptor another and three system calls. Here a free lock is just
taken, and the device is polled first, for a moment: a client that got its answer mostly asks on at once. While any
request waits for something, a thread or a lock, all is as trio does it.

*Concurrency:* one loop, one thread. A worker reads while it holds the gate, and lets go of it when the handler starts,
its row being written. Timers and signals come at most `_IN_A_ROW` requests or moments late.
"""

import ctypes
import os
import select
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pyfuse3
import trio

from imgfs import wire
from imgfs.board import Board
from imgfs.device import Device
from imgfs.errors import MountFailed
from imgfs.gate import Gate
from imgfs.requests import TASKS_MAX, Request, Requests, Result

T = TypeVar("T")

_MOMENT_MS = 1
# Requests that are taken in a row before all other tasks get their turn.
_IN_A_ROW = 32
# How long another worker may hold the gate, on a busy machine, before we stop asking at each turn of the loop.
_TURNS_MAX = 8
_PAUSE_S = 0.001
_M_PERTURB = -6  # mallopt: fill what is allocated, with this byte inverted
# One answer to INIT.
_REPLY_BYTES_MAX = 1024


_libc = ctypes.CDLL(None)


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


class _Seat:
    """One task of pyfuse3's main loop."""

    __slots__ = ("applied", "has_buffer", "request", "row")

    def __init__(self, row: int) -> None:
        self.row = row
        self.request: Request | None = None
        self.has_buffer = False
        self.applied: Result | None = None  # what `resent` will return


class Desk:
    """The requests that one worker has in hand."""

    def __init__(
        self, worker: int, device: Device, gate: Gate, board: Board, requests: Requests, *, trial: bool = False
    ) -> None:
        """*trial*: answer INIT, raise `TrialPassed`, and touch nothing that is shared."""
        self.wait = _Wait()
        """Handlers that wait for a thread or a lock say so: meanwhile every task gets its turn."""

        self._trial = trial
        self._device = device
        self._gate = gate
        self._board = board
        self._post = board.posts[worker]
        self._requests = requests
        self._first_row = worker * TASKS_MAX
        self._seats: dict[object, _Seat] = {}
        self._has_gate = False
        self._allocating = False
        self._in_a_row = 0
        self._poll = select.poll()
        # The end that libfuse takes for the device until INIT is answered, and ours.
        self._theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._took_over = False
        self._asked = False

    # -- pyfuse3's session ------------------------------------------------------------------------------------

    @property
    def session_path(self) -> str:
        """What pyfuse3.init takes for a mountpoint."""
        return f"/dev/fd/{self._theirs.fileno()}"

    def install(self) -> None:
        """Let pyfuse3 work with this desk; before `pyfuse3.init`."""
        lowlevel = SimpleNamespace(**vars(trio.lowlevel))
        lowlevel.wait_readable = self._wait_readable
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
        mine = self._device.descriptor if wire.can_resend(self._device.init) else self._device.clone()
        os.dup2(mine, self._theirs.fileno(), inheritable=False)
        self._ours.close()
        self._poll.register(self._theirs.fileno(), select.POLLIN)
        self._post.ready = True

    # -- one request ------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """*request* was read by the task that calls; others may read now."""
        seat = self._seats[trio.lowlevel.current_task()]
        self._requests.begin(seat.row, request)
        if seat.request is None:
            self._post.in_hand += 1
        seat.request = request  # for one setxattr pyfuse3 calls getxattr first
        if self._allocating:
            _libc.mallopt(_M_PERTURB, 0)
            self._allocating = False
        if self._has_gate:
            self._release_gate()

    def _came_back(self) -> None:
        """The task that calls has answered what it had in hand, if anything."""
        if self._has_gate:
            self._release_gate()  # what it read was answered without a handler
        task = trio.lowlevel.current_task()
        seat = self._seats.get(task)
        if seat is None:
            seat = self._seats[task] = _Seat(self._first_row + len(self._seats))
        elif seat.request is not None:
            self._requests.end(seat.row)
            seat.request = seat.applied = None
            post = self._post
            post.in_hand -= 1
            post.answered += 1

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

    def expect_setxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Raise FUSEError if the request of the task that calls, a getxattr, is a setxattr that was applied before.

        For a setxattr that must create, pyfuse3 asks by getxattr first, and answers EEXIST by itself.
        """
        seat = self._seats[trio.lowlevel.current_task()]
        seat.applied = self._requests.resent(seat.row, wire.HANDLERS["setxattr"](inode, name, b"", ctx))
        if seat.applied is not None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    # -- the gate ---------------------------------------------------------------------------------------------

    def _release_gate(self) -> None:
        self._has_gate = False
        self._post.gate_since_ns = 0
        self._gate.let_go()

    def _try_gate(self) -> bool:
        """Take the gate if it is free and there is something to read."""
        if self._board.paused or not self._gate.try_take():
            return False
        self._post.gate_since_ns = time.monotonic_ns()
        # Whoever had the gate before may have read what we saw. Should it vanish now, the supervisor interrupts us.
        if self._poll.poll(0):
            self._has_gate = True
            return True
        self._release_gate()
        return False

    async def _wait_readable(self, descriptor: int) -> None:
        """Return when there is a request to read, the gate being ours."""
        await self._wait_for_request(descriptor)
        seat = self._seats[trio.lowlevel.current_task()]
        if not seat.has_buffer:
            # libfuse now allocates the buffer of this task. A worker that is killed while the kernel copies a request
            # into pages that are not there yet fails that request, with EIO: have them there.
            seat.has_buffer = True
            _libc.mallopt(_M_PERTURB, 1)
            self._allocating = True

    async def _wait_for_request(self, descriptor: int) -> None:
        if not self._took_over:
            if not self._asked:
                self._asked = True
                return  # INIT waits in the socket
            self._take_over()
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        elif not self.wait.count and self._spin():
            return
        turns = 0
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            if self._try_gate():
                return
            turns += 1
            if turns > _TURNS_MAX or self._board.paused:
                await trio.sleep(_PAUSE_S)

    def _spin(self) -> bool:
        """Poll for a moment, without trio; return whether there is a request for us."""
        deadline_ns = time.monotonic_ns() + _MOMENT_MS * 1_000_000
        poll = self._poll.poll
        while poll(_MOMENT_MS):
            if self._try_gate():
                return True
            if time.monotonic_ns() > deadline_ns:
                return False
        return False


def at_desk(desk: Desk, operations: T) -> T:
    """Let every handler of *operations* note at *desk* which request it has in hand."""

    def noted(handler: Callable[..., Any], identify: Callable[..., Request]) -> Callable[..., Any]:
        def handle(*args: Any) -> Any:
            desk.begin(identify(*args))
            return handler(*args)

        return handle

    for name, identify in wire.HANDLERS.items():
        setattr(operations, name, noted(getattr(operations, name), identify))
    return operations
