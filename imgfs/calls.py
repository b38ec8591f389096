"""How a handler calls the store: at once where that takes no time, else from a thread; again when there is room.

Owns the lock and the threads of a worker. Must not know what is called.

*Concurrency:* on one trio loop, which never waits for the disk. Changes run one after the other.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from imgfs.desk import Desk
from imgfs.disk import WouldBlock
from imgfs.group_sync import GroupSync
from imgfs.requests import NOBODY
from imgfs.store import Store

T = TypeVar("T")

# Copying less takes less time than handing the call to a thread and hearing of its end.
INLINE_BYTES = 256 << 10
# Requests that wait for the disk at the same time; more than a disk can make use of.
THREADS = 32
# Another worker holds the lock for some 70 us for each change, longer if it is taken off its processor meanwhile. Once
# one change goes to a thread for that, all that come meanwhile follow it there, at ten times the cost.
_LOCK_WAIT_NS, _LOCK_PAUSE_S = 3_000_000, 20e-6
# On a full disk a change waits so long for space to be given back.
ROOM_S, ROOM_POLL_S = 10.0, 0.01


class Calls:
    """The calls of one worker."""

    def __init__(self, store: Store, desk: Desk) -> None:
        self._store = store
        self._desk = desk
        self._changes = trio.Lock()
        self._threads = trio.CapacityLimiter(THREADS)
        self.syncs = GroupSync(store.sync_for)
        """Makes durable all that is done."""

    async def cold(self, look: Callable[..., T], *args: Any) -> T:
        """Return `look(*args)`, from a thread if it has to wait for the disk."""
        try:
            return look(*args, nowait=True)
        except WouldBlock:
            since_ns = time.monotonic_ns()
            try:
                return await self.in_thread(look, *args)
            finally:
                self._desk.waited(time.monotonic_ns() - since_ns)

    async def find_room(self, row: int | None = None) -> bool:
        """Wait until the space of what is kept for undelete is given back; return whether anybody does that.

        *row* is that of the request which waits; without it, that of the task that calls.
        """
        asked = self._store.ask_for_room()
        if asked:
            requests = self._store.requests
            row = self._desk.row() if row is None else row
            requests.wait(row, waiting=True)
            try:
                with trio.move_on_after(ROOM_S), self._desk.wait:
                    # Another process answers: there is nothing here that it could wake.
                    while not self._store.has_answered(asked):  # noqa: ASYNC110
                        await trio.sleep(ROOM_POLL_S)
            finally:
                requests.wait(row, waiting=False)
        return bool(asked)

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        with self._desk.wait:
            return await trio.to_thread.run_sync(call, *args, limiter=self._threads)

    @staticmethod
    def start(call: Callable[[], None]) -> None:
        """Run *call* in a thread, that nobody waits for."""
        trio.lowlevel.start_thread_soon(call, lambda result: result.unwrap())

    async def change(self, change: Callable[..., T], *args: Any) -> T:
        """Return `change(*args)`, a change that takes no longer than it would take to hand it to a thread."""
        return await self.change_of(0, change, *args)

    async def change_of(self, size: int, change: Callable[..., T], *args: Any) -> T:
        """Return `change(*args)`, a change that copies *size* bytes: from a thread if they are many.

        From a thread too if another worker is at a change of its own: that one may copy many.
        """
        row = self._desk.row()
        try:
            return self.at_once(row, size, change, *args)
        except WouldBlock:
            pass
        with self._desk.wait:
            async with self._changes:
                # Those behind wait less for it on the loop than for a thread.
                try:
                    return self._on_loop(row, size, change, *args)
                except WouldBlock:
                    pass
                return await self.in_thread(_requested, self._store, row, change, *args)

    def at_once(self, row: int, size: int, change: Callable[..., T], *args: Any, **named: Any) -> T:
        """Return `change(*args)`, which the request of *row* asked for and which copies *size* bytes.

        Raises:
            WouldBlock: they are many, or somebody else is at a change; nothing was done.
        """
        # Nothing runs between this test and the end of the call, so the lock need not be taken: that would cost
        # a turn of the loop. Who waits for it holds it from the moment its holder lets go, and is not overtaken.
        if self._changes.locked():
            raise WouldBlock
        return self._on_loop(row, size, change, *args, **named)

    def _on_loop(self, row: int, size: int, change: Callable[..., T], *args: Any, **named: Any) -> T:
        """As `at_once`, for who is not held up by another change of this worker."""
        store = self._store
        if size > INLINE_BYTES or store.must_roll(size) or not self._try_lock():
            raise WouldBlock
        try:
            return _requested(store, row, change, *args, **named)
        finally:
            store.unlock()

    def _try_lock(self) -> bool:
        """Lock the store if nobody holds it for longer than small changes take."""
        store = self._store
        if store.try_lock():
            return True
        deadline_ns = time.monotonic_ns() + _LOCK_WAIT_NS
        while time.monotonic_ns() < deadline_ns:
            time.sleep(_LOCK_PAUSE_S)
            if store.try_lock():
                return True
        return False


def _requested(store: Store, row: int, change: Callable[..., T], *args: Any, **named: Any) -> T:
    """Return `change(*args)`, which the request of *row* asked for; no other change runs in this process."""
    store.requester = row
    try:
        return change(*args, **named)
    finally:
        store.requester = NOBODY
