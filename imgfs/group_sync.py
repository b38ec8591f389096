"""One sync for all that wait for one.

Owns who waits for which run. Must not know what is synced.

*Concurrency:* on one trio loop; the sync itself runs in a thread.
"""

from collections.abc import Callable

import trio

# Who was just served may be back soon: the next run waits for it so long, or for half of what the last one took.
_PATIENCE_S = 0.002


class GroupSync:
    """Runs *sync* in a thread, once for all that wait: a run that starts after you came covers you.

    Those who come during a run wait for the next; those that the run has served come back while that one is under way.
    So writers that do nothing else would fall into two groups that take turns, each run for half of them. Where some
    wait when a run ends, the next one waits a moment for those who were served.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._one_run = trio.Lock()
        self._started = 0
        self._error: Exception | None = None
        self._waiting = 0
        self._expected = 0
        self._patience_s = 0.0
        self._complete = trio.Event()

    async def wait(self) -> None:
        """Return when all that was done before the call is durable, or raise what the run for it raised."""
        mine = self._started + 1
        self._waiting += 1
        if self._waiting >= self._expected:
            self._complete.set()
        async with self._one_run:
            # The lock is handed on in order of arrival, so the last run is the one that covers us.
            if self._started < mine:
                await self._gather()
                await self._run()
            if self._error is not None:
                raise self._error

    async def _gather(self) -> None:
        """Wait for those who are expected."""
        if self._waiting < self._expected:
            self._complete = trio.Event()
            with trio.move_on_after(self._patience_s):
                await self._complete.wait()

    async def _run(self) -> None:
        self._started += 1
        self._error = None
        served, self._waiting = self._waiting, 0
        start = trio.current_time()
        try:
            await trio.to_thread.run_sync(self._sync)
        except Exception as error:
            self._error = error
        self._patience_s = min(_PATIENCE_S, (trio.current_time() - start) / 2)
        self._expected = served + self._waiting if self._waiting else 0
