"""Open images: one 64-bit word each in shared memory, so that any worker can serve a handle another gave out.

Owns the words. Must not know what is read or written through them.

*Concurrency:* a word is stored in one instruction; a free one is claimed under a thread lock, by one process.
"""

import threading

import numpy as np

from imgfs.errors import BadHandle, TooManyOpen
from imgfs.layout import HANDLES_AT, HANDLES_MAX, Word
from imgfs.memory import Memory

WRITE = 1  # flag: opened for writing
_INODE_BITS = 40
_INODE_MASK = (1 << _INODE_BITS) - 1
_NONCE_SHIFT = 48


class Handles:
    """The table of open images; a handle is index | nonce << 32, so that a late release hits no later open."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._words = memoryview(memory.map)[HANDLES_AT : HANDLES_AT + 8 * HANDLES_MAX].cast("Q")
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._nonce = 0

    def close(self) -> None:
        self._words.release()

    def open(self, inode: int, flags: int) -> int:
        """Return a new handle on *inode*.

        Raises:
            TooManyOpen: all 65,536 are in use.
        """
        with self._lock:
            if self._free:
                index = self._free.pop()
            else:
                index = self._memory.words[Word.HANDLES]
                if index >= HANDLES_MAX:
                    raise TooManyOpen(f"{HANDLES_MAX} images are open; close some")
                self._memory.words[Word.HANDLES] = index + 1
            self._nonce = nonce = self._nonce + 1 & 0xFFFF
        self._words[index] = inode & _INODE_MASK | flags << _INODE_BITS | nonce << _NONCE_SHIFT
        return index | nonce << 32

    def get(self, handle: int) -> tuple[int, int]:
        """Return (inode, flags) of an open *handle*.

        Raises:
            BadHandle: it is not open, or was closed and its place is taken by another.
        """
        index, nonce = handle & 0xFFFF_FFFF, handle >> 32
        word = self._words[index] if index < HANDLES_MAX else 0
        if not word & _INODE_MASK or word >> _NONCE_SHIFT != nonce:
            raise BadHandle(f"handle {handle:#x} is not open")
        return word & _INODE_MASK, word >> _INODE_BITS & 0xFF

    def release(self, handle: int) -> tuple[int, int]:
        """Close *handle*; return the (inode, flags) it had. BadHandle as `get`."""
        inode, flags = self.get(handle)
        index = handle & 0xFFFF_FFFF
        self._words[index] = 0
        with self._lock:
            self._free.append(index)
        return inode, flags

    def in_use(self, slot: int) -> bool:
        """Return whether a handle is open on any generation of *slot*."""
        return bool((self._used() & 0xFFFF_FFFF == slot + 1).any())

    def writers(self, inode: int) -> int:
        """Return how many handles are open for writing on *inode*."""
        key = inode & _INODE_MASK | WRITE << _INODE_BITS
        return int(np.count_nonzero(self._used() & ((1 << _NONCE_SHIFT) - 1) == key))

    def count(self) -> int:
        """Return how many handles are open."""
        return int(np.count_nonzero(self._used()))

    def _used(self) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return np.frombuffer(self._memory.map, np.uint64, self._memory.words[Word.HANDLES], HANDLES_AT)
