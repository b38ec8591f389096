"""The requests of a worker that wait for the disk: each has a row of its own, and is answered when its bytes are there.

Owns when one is tried again, and their rows. Must not know the device, nor what a request asks for.

What waits for a sync is answered by the thread that syncs. An open that waits is tried again after some microseconds,
a few times: a quick disk has read the image by then, and to hand a request to a thread costs more than to read an
image. A thread waits for what takes longer.

*Concurrency:* on the loop of a worker, which calls `retry` when `due_ns` has come, in tasks of its nursery, and in the
thread that syncs, which writes answers and gives rows back by itself: each is one step of the interpreter.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import trio

from imgfs import wire
from imgfs.board import Post
from imgfs.disk import WouldBlock
from imgfs.replies import Reply
from imgfs.requests import Request, Requests

# A request is tried again when the disk has mostly answered by then, which is learned between these bounds, and then
# so often, each time after a part of what it has waited. The disk was asked before, when the image was looked up.
_LEAST_NS, _MOST_NS = 10_000, 1_000_000
# To try in vain takes time that others have use for, so beside others a request waits so long at least.
_LEAST_OF_MANY_NS = 50_000
_TRIES, _PART = 8, 4


class Unsynced(Exception):
    """What was asked for is done, but has to be made durable before it is answered."""


class Express(Protocol):
    """Who answers requests past pyfuse3, each noted in a row as being in hand."""

    def answer(self, head: wire.Head, request: memoryview, row: int) -> Reply | None:
        """Answer on the spot; None: pyfuse3 shall. Raises `WouldBlock` where `answer_late` shall, and `Unsynced`."""

    def ask_sync(self, told: Callable[[Exception | None], None]) -> None:
        """Have *told* called, in a thread, when all that is done is durable, or could not be made so."""

    def synced(self, head: wire.Head, request: bytes, error: Exception | None) -> Reply | None:
        """Answer what waited for a sync, which raised *error*; in a thread. None: `answer_late` shall."""

    def go_on(self) -> None:
        """Do what is left to do for who was just answered."""

    def ask_disk(self, head: wire.Head) -> bool:
        """Let the disk begin to read what `answer` had to wait for; return whether it is little."""

    async def answer_late(self, head: wire.Head, request: bytes, row: int) -> Reply:
        """Answer when the disk has given what is asked for."""


class _Late(NamedTuple):
    """A request that waits."""

    head: wire.Head
    raw: bytes
    row: int
    since_ns: int
    due_ns: int  # when it is tried again
    tries: int = 0


class LateRequests:
    """Those of one worker that wait; it has *rows* for them, and writes answers with *write*."""

    def __init__(
        self,
        express: Express,
        requests: Requests,
        rows: Iterable[int],
        post: Post,
        nursery: trio.Nursery,
        write: Callable[[Reply], None],
    ) -> None:
        self._express = express
        self._requests = requests
        self._free_rows = list(rows)
        self._post = post
        self._nursery = nursery
        self._write = write
        self._token = trio.lowlevel.current_trio_token()
        self._waiting: deque[_Late] = deque()
        self._usual_ns = 10 * _LEAST_NS
        self.due_ns = 0
        """When the first of them is tried again; 0: none is."""
        self.in_threads = 0
        """How many of them are for threads, which hand back what they found on the loop."""

    def put_off(
        self, head: wire.Head, raw: memoryview, request: Request, row: int, *, retried: bool, alone: bool
    ) -> bool:
        """Take over the *request* of *row*; return whether there is room. Only if it may be *retried*, it is.

        *alone*: nobody else has asked for anything of late.
        """
        own_row = self._take_over(request, row)
        if own_row is None:
            return False
        now_ns = time.monotonic_ns()
        wait_ns = self._usual_ns if alone else max(self._usual_ns, _LEAST_OF_MANY_NS)
        late = _Late(head, bytes(raw), own_row, now_ns, now_ns + wait_ns)
        if self._express.ask_disk(head) and retried:
            self._waiting.append(late)
            self.due_ns = min(self.due_ns or late.due_ns, late.due_ns)
        else:
            self._hand_to_thread(late)
        return True

    def await_sync(self, head: wire.Head, raw: memoryview, request: Request, row: int) -> bool:
        """As `put_off`, for a request that is answered when all that is done is durable."""
        own_row = self._take_over(request, row)
        if own_row is None:
            return False
        late, token = _Late(head, bytes(raw), own_row, 0, 0), self._token

        def told(error: Exception | None) -> None:
            reply = self._express.synced(head, late.raw, error)
            if reply is not None:
                self._answer(late, reply)
            else:
                token.run_sync_soon(self._hand_to_thread, late)

        self._express.ask_sync(told)
        return True

    def _take_over(self, request: Request, row: int) -> int | None:
        """Note the *request* of *row* in one of our rows, and return that; None if all are taken."""
        if not self._free_rows:
            return None
        own_row = self._free_rows.pop()
        self._requests.begin(own_row, request)
        self._requests.end(row)
        return own_row

    def retry(self) -> None:
        """Answer those that the disk has meanwhile given what they wait for; who waits for long gets a thread."""
        now_ns = time.monotonic_ns()
        if now_ns < self.due_ns:
            return
        for _ in range(len(self._waiting)):
            late = self._waiting.popleft()
            if now_ns < late.due_ns:
                self._waiting.append(late)
                continue
            try:
                reply = self._express.answer(late.head, memoryview(late.raw), late.row)
            except WouldBlock:
                if late.tries < _TRIES:
                    now_ns = time.monotonic_ns()
                    due_ns = now_ns + max(_LEAST_NS, (now_ns - late.since_ns) // _PART)
                    self._waiting.append(late._replace(due_ns=due_ns, tries=late.tries + 1))
                    continue
                reply = None
            if reply is not None:
                self._answer(late, reply)
                self._learn(late.tries)
                self._post.waited(time.monotonic_ns() - late.since_ns)
            else:
                self._hand_to_thread(late)
        self.due_ns = min((late.due_ns for late in self._waiting), default=0)

    def _learn(self, tries: int) -> None:
        """The disk was quick, or *tries* were in vain."""
        change_ns = self._usual_ns // 16 * (tries or -1)
        self._usual_ns = min(max(self._usual_ns + change_ns, _LEAST_NS), _MOST_NS)

    def hand_to_threads(self) -> None:
        """Try none again: the worker has to stop for a while."""
        self.due_ns = 0
        while self._waiting:
            self._hand_to_thread(self._waiting.popleft())

    def _hand_to_thread(self, late: _Late) -> None:
        self.in_threads += 1
        self._nursery.start_soon(self._answer_in_thread, late)

    async def _answer_in_thread(self, late: _Late) -> None:
        try:
            self._answer(late, await self._express.answer_late(late.head, late.raw, late.row))
        finally:
            self.in_threads -= 1

    def _answer(self, late: _Late, reply: Reply) -> None:
        self._write(reply)
        self._requests.end(late.row)
        self._free_rows.append(late.row)
        self._post.answered_late()
