"""How fast background work may go: so many bytes per second, and slower while readers have to wait.

Owns that judgement. Must not know what is read or written, nor who waits.

*Concurrency:* one thread.
"""

import time
from collections.abc import Callable

# Below this nobody complains, above it the work gives way.
_PATIENCE_NS = 5_000_000
_LOOK_S = 0.1
_LEAST = 1 / 32
# Waits are saved up: each one takes longer than it should, the more so on a busy machine. What that or a slow disk has
# taken may be made up for, but not in a burst that readers feel.
_NAP_S = 0.002
_CATCH_UP_S = 0.05
_IDLE_MAX_S = 0.25


class Pace:
    """A brake for one piece of work."""

    def __init__(self, bytes_per_s: float, waits: Callable[[], tuple[int, int]]) -> None:
        """*waits* returns how many reads have waited for the disk so far, and how many ns in all."""
        self._bytes_per_s = bytes_per_s
        self._waits = waits
        self._share = 1.0
        self._usual_ns = 0.0
        self._seen = waits()
        self._looked_s = time.monotonic()
        self._free_s = self._woke_s = self._looked_s

    def rest(self) -> None:
        """Learn how long readers wait while nothing is done; call it now and then."""
        self._woke_s = time.monotonic()
        wait_ns = self._wait_ns()
        if wait_ns:
            self._usual_ns = wait_ns if not self._usual_ns else 0.8 * self._usual_ns + 0.2 * wait_ns

    def done(self, size: int) -> None:
        """Wait as long as *size* more bytes take."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S:
            wait_ns = self._wait_ns()
            if wait_ns > max(_PATIENCE_NS, 2 * self._usual_ns):
                self._share = max(_LEAST, self._share / 2)
            else:
                self._share = min(1.0, self._share * 1.25)
            self._looked_s = now_s
        # Both by its rate, and by the part of the time that it works: what is bound by the disk would not notice a
        # lower limit.
        self._free_s = max(self._free_s, now_s - _CATCH_UP_S) + size / (self._bytes_per_s * self._share)
        idle_s = min(_IDLE_MAX_S, (now_s - self._woke_s) * (1 / self._share - 1))
        wait_s = max(self._free_s - now_s, idle_s)
        if wait_s > _NAP_S:
            time.sleep(wait_s)
            self._woke_s = time.monotonic()

    def _wait_ns(self) -> float:
        """Return how long a read has waited on average since the last call, 0 if none has."""
        before, self._seen = self._seen, self._waits()
        reads = self._seen[0] - before[0]
        return (self._seen[1] - before[1]) / reads if reads > 0 else 0.0
