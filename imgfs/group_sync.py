"""One sync for all that wait for one.

Owns who waits for which run. Must not know what is synced.

*Concurrency:* on one trio loop; the sync itself runs in a thread.
"""

from collections.abc import Callable

import trio


class GroupSync:
    """Runs *sync* in a thread, once for all that wait: a run that starts after you came covers you."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._one_run = trio.Lock()
        self._started = 0
        self._error: Exception | None = None

    async def wait(self) -> None:
        """Return when all that was done before the call is durable, or raise what the run for it raised."""
        mine = self._started + 1
        async with self._one_run:
            # The lock is handed on in order of arrival, so the last run is the one that covers us.
            if self._started < mine:
                self._started += 1
                self._error = None
                try:
                    await trio.to_thread.run_sync(self._sync)
                except Exception as error:
                    self._error = error
            if self._error is not None:
                raise self._error
