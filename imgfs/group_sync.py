"""One sync for all that wait for one.

Owns who waits for which run, and the thread that syncs. Must not know what is synced, nor who waits.

*Concurrency:* asked on one trio loop. The thread tells those who wait by itself: for them the loop need not wake. It
is there while anybody waits; a lock covers who does.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio

# Who was just served may be back soon: the next run waits for it so long.
_PATIENCE_S = 0.001

# Called in the thread, with what the run has raised, None if nothing; must not wait for anything.
Told = Callable[[Exception | None], None]


class GroupSync:
    """Runs *sync* in a thread, once for all that wait: a run that starts after you came covers you.

    Those who come during a run wait for the next; those that the run has served come back while that one is under way.
    So writers that do nothing else would fall into two groups that take turns, each run for half of them, or the first
    to come back would get a run of its own. The next run waits a moment for all those who waited for the last one, or
    wait by its end.
    """

    def __init__(self, sync: Callable[[Callable[[], int]], int]) -> None:
        """*sync* is given what counts who has asked so far, and returns for how many of them it was done.

        What it raises is for those who had asked when it was called.
        """
        self._sync = sync
        self._lock = threading.Lock()
        self._waiting: deque[Told] = deque()
        self._asked = 0  # ever
        self._served = 0
        self._runs = False  # the thread is at it
        self._expected = 0
        self._gathers = False  # it waits until `_complete` is released
        self._complete = threading.Lock()
        self._complete.acquire()

    def ask(self, told: Told) -> None:
        """Have *told* called, in the thread, when all that was done before is durable, or could not be made so.

        What *told* raises ends the loop.
        """
        with self._lock:
            self._waiting.append(told)
            self._asked += 1
            runs, self._runs = self._runs, True
            if self._gathers and len(self._waiting) >= self._expected:
                self._gathers = False
                self._complete.release()
        if not runs:
            token = trio.lowlevel.current_trio_token()
            trio.lowlevel.start_thread_soon(lambda: self._serve(token), _nothing)

    async def wait(self) -> None:
        """Return when all that was done before the call is durable, or raise what the run for it raised."""
        token, ended = trio.lowlevel.current_trio_token(), trio.Event()
        failure: Exception | None = None

        def told(error: Exception | None) -> None:
            nonlocal failure
            failure = error
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(ended.set)

        self.ask(told)
        await ended.wait()
        if failure is not None:
            raise failure

    # -- in the thread ----------------------------------------------------------------------------------------

    def _serve(self, token: trio.lowlevel.TrioToken) -> None:
        """Sync until nobody waits."""
        try:
            while self._serve_those_who_wait():
                pass
        except BaseException as error:
            # Nobody looks after this thread: who waits for it would wait for ever.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_raise, error)

    def _serve_those_who_wait(self) -> bool:
        """Sync once; return whether somebody still waits."""
        self._gather()
        count, error = self._asked, None
        try:
            count = self._sync(self._count)
        except Exception as failure:
            error = failure
        with self._lock:
            served = [self._waiting.popleft() for _ in range(count - self._served)]
            self._served = count
            self._expected = len(served) + len(self._waiting)
            # From here on another thread may serve who comes.
            self._runs = goes_on = bool(self._waiting)
        for told in served:
            told(error)
        return goes_on

    def _count(self) -> int:
        return self._asked

    def _gather(self) -> None:
        """Wait for those who are expected."""
        with self._lock:
            self._gathers = len(self._waiting) < self._expected
            if not self._gathers:
                return
        if not self._complete.acquire(timeout=_PATIENCE_S):
            with self._lock:
                came, self._gathers = not self._gathers, False
            if came:
                self._complete.acquire()


def _nothing(_: object) -> None:
    """Take what a thread returns."""


def _raise(error: BaseException) -> None:
    raise error
