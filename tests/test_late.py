"""When a request that waits for the disk is tried again."""

import time
from typing import Any

import trio
from shared_rows import Shared

from imgfs.board import Board
from imgfs.disk import WouldBlock
from imgfs.late import _LEAST_NS, _LEAST_OF_MANY_NS, _TRIES, LateRequests
from imgfs.replies import Reply
from imgfs.requests import Request
from imgfs.wire import Head, Opcode

HEAD = (0, int(Opcode.OPEN), 7, 2, 0, 0, 1, 0, 0)


class Disk:
    """Answers when it is *ready*."""

    def __init__(self) -> None:
        self.ready = True
        self.asked = self.late = 0

    def answer(self, head: Head, request: memoryview, row: int) -> Reply:
        self.asked += 1
        if not self.ready:
            raise WouldBlock
        return (b"at once",)

    def ask_disk(self, head: Head) -> bool:
        return True

    async def answer_late(self, head: Head, request: bytes, row: int) -> Reply:
        self.late += 1
        return (b"late",)


class Waiting:
    """Requests that wait for a *disk*, and what was written."""

    def __init__(self, shared_rows: Shared, nursery: trio.Nursery) -> None:
        self.disk: Any = Disk()
        self.written: list[Reply] = []
        requests, post = shared_rows.requests, Board().posts[0]
        self.late = LateRequests(self.disk, requests, range(1, 3), post, nursery, self.written.append)

    def put_off(self, *, alone: bool) -> int:
        """Put a request off; return in how many ns it is tried again, at least."""
        since_ns = time.monotonic_ns()
        assert self.late.put_off(HEAD, memoryview(b""), Request(Opcode.OPEN, 1, 2, 7), 0, retried=True, alone=alone)
        return self.late.due_ns - since_ns

    def retry(self) -> None:
        while self.late.due_ns:
            self.late.retry()


async def test_who_asks_alone_of_a_quick_disk_is_tried_sooner_than_who_asks_beside_others(shared_rows: Shared) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(shared_rows, nursery)
        waits_ns = []
        for _ in range(100):
            waits_ns.append(waiting.put_off(alone=True))
            waiting.retry()
        # Whoever measures is held up now and then.
        assert _LEAST_NS <= min(waits_ns) < _LEAST_OF_MANY_NS < waits_ns[0]
        assert waiting.put_off(alone=False) >= _LEAST_OF_MANY_NS
        waiting.retry()
    assert len(waiting.written) == 101


async def test_who_waits_for_long_gets_a_thread_after_some_tries(shared_rows: Shared) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(shared_rows, nursery)
        waiting.disk.ready = False
        waiting.put_off(alone=True)
        waiting.retry()
        assert waiting.disk.asked == _TRIES + 1
    assert waiting.written == [(b"late",)]


async def test_of_a_slow_disk_it_is_tried_later(shared_rows: Shared) -> None:
    async with trio.open_nursery() as nursery:
        waiting = Waiting(shared_rows, nursery)
        first_ns = min(waiting.put_off(alone=True) for _ in range(2))
        waiting.retry()
        waits_ns = []
        for _ in range(60):
            waiting.disk.ready = False
            waits_ns.append(waiting.put_off(alone=True))
            asked = waiting.disk.asked
            while waiting.disk.asked < asked + 3:
                waiting.late.retry()
            waiting.disk.ready = True
            waiting.retry()
    assert waits_ns[-1] > 2 * first_ns
