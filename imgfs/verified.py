"""Verified bytes that are kept in memory for a while, so that the reads that follow an open need no further call.

Owns how much is kept, and what is dropped first. Must not know what a key stands for.

*Concurrency:* any thread, under a lock of this process, for a few instructions.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

# So much, no more.
_BYTES_MAX = 8 << 20


class Verified(Generic[T]):
    """What was kept last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._bytes = 0
        self.after_fork()

    def after_fork(self) -> None:
        """Be a process of its own."""
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """Return what is kept under *key*, None if nothing is."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def keep(self, key: Hashable, value: T, size: int) -> None:
        """Keep *value*, which takes *size* bytes, under *key*."""
        with self._lock:
            self._bytes += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, size
            while self._bytes > _BYTES_MAX:
                self._bytes -= self._kept.popitem(last=False)[1][1]
