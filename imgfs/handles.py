"""Open images: one 64-bit word each in shared memory, so that any worker can serve a handle another gave out.

Owns the words. Must not know what is read or written through them.

*Concurrency:* a word is stored in one instruction. Free words belong to processes, by the chunk: only its owner hands
out words of a chunk, under a thread lock; anybody may free one. A chunk is taken under the table's lock; those of a
process that died are taken again.
"""

import os
import struct
import threading
from collections.abc import Callable

import numpy as np

from imgfs.disk import WouldBlock
from imgfs.errors import BadHandle, DiskFailure, TooManyOpen
from imgfs.layout import HANDLE_CHUNK, HANDLE_OWNER, HANDLE_OWNERS, HANDLE_OWNERS_AT, HANDLES_AT, HANDLES_MAX, Word
from imgfs.memory import Memory

WRITE = 1  # flag: opened for writing
_INODE_BITS = 40
_INODE_MASK = (1 << _INODE_BITS) - 1
_NONCE_SHIFT = 48
_NONCE_MAX = 0xFFFF
_LOW = struct.Struct("<I")  # the lower half of a word, which says the slot
# With fewer free words in its own chunks a process takes another, so that it need not look for them too often.
_FREE_MIN = 8
# So many words are looked through in some microseconds.
_FEW = 4096


class Handles:
    """The table of open images; a handle is index | nonce << 32, so that a late release hits no later open."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._words = memoryview(memory.map)[HANDLES_AT : HANDLES_AT + 8 * HANDLES_MAX].cast("Q")
        size = HANDLE_OWNER.size * HANDLE_OWNERS
        self._owners = memoryview(memory.map)[HANDLE_OWNERS_AT : HANDLE_OWNERS_AT + size].cast("I")
        self.after_fork()

    def after_fork(self) -> None:
        """Be a process of its own: the free words are those of the parent."""
        self._pid = os.getpid()
        self._free: list[int] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        self._words.release()
        self._owners.release()

    def open(self, inode: int, flags: int, note: Callable[[int], None] | None = None, *, nowait: bool = False) -> int:
        """Return a new handle on *inode*; *note* is told of it before it is open.

        Raises:
            TooManyOpen: all 65,536 are in use.
            WouldBlock: *nowait* is set, and another process has the table's lock, which is needed now and then.
        """
        while True:
            with self._lock:
                if self._free:
                    index = self._free.pop()
                    # Each handle of a word has another nonce, whoever gave it out; none is 0, so no handle is.
                    nonce = self._words[index] >> _NONCE_SHIFT
                    nonce = nonce + 1 if nonce < _NONCE_MAX else 1
                    handle = index | nonce << 32
                    if note is not None:
                        # Killed between the two, we leave a note of a handle that was never open. Nobody else may
                        # give it out, or it would be closed when the note is settled.
                        self._words[index] = nonce << _NONCE_SHIFT
                        note(handle)
                    self._words[index] = inode & _INODE_MASK | flags << _INODE_BITS | nonce << _NONCE_SHIFT
                    return handle
            if not nowait:
                self._memory.acquire()
            elif not self._memory.try_acquire():
                raise WouldBlock
            try:
                self._find_free()
            finally:
                self._memory.release()

    def open_directory(self, inode: int) -> int:
        """Return a handle on the directory *inode*; it takes no word, for it says how many syncs had failed by now."""
        return inode & _INODE_MASK | (self._memory.words[Word.FAILURES] & _NONCE_MAX) << _NONCE_SHIFT

    def check_directory(self, handle: int) -> None:
        """Raise DiskFailure if a sync has failed since `open_directory` gave *handle* out: changes may be lost."""
        if handle >> _NONCE_SHIFT != self._memory.words[Word.FAILURES] & _NONCE_MAX:
            raise DiskFailure("the disk lost data since this directory was opened")

    def _find_free(self) -> None:
        """Within the table's lock: look for words of our own that others have freed, or take a chunk."""
        with self._lock:
            if self._free:
                return
            free = self._free_in(np.flatnonzero(np.asarray(self._owners) == self._pid))
            if len(free) < _FREE_MIN:
                chunk = self._ownerless_chunk()
                if chunk >= 0:
                    self._owners[chunk] = self._pid
                    words = self._memory.words
                    words[Word.HANDLES] = max(words[Word.HANDLES], HANDLE_CHUNK * (chunk + 1))
                    free += self._free_in(np.array([chunk]))
            if not free:
                raise TooManyOpen(f"{HANDLES_MAX} images are open; close some")
            self._free = free[::-1]

    def _ownerless_chunk(self) -> int:
        """Return a chunk with free words that no living process owns, the lowest; -1 if there is none."""
        owners = np.asarray(self._owners)
        # A set: the first np.unique of a process loads masked arrays, for 7 ms and a MiB.
        dead = [pid for pid in set(owners.tolist()) if not pid or not _lives(pid)]
        for chunk in np.flatnonzero(np.isin(owners, dead)):
            if self._free_in(np.array([chunk])):
                return int(chunk)
        return -1

    def _free_in(self, chunks: "np.ndarray[tuple[int], np.dtype[np.intp]]") -> list[int]:
        """Return the free words of *chunks*, lowest first."""
        words = np.frombuffer(self._memory.map, np.uint64, HANDLES_MAX, HANDLES_AT).reshape(-1, HANDLE_CHUNK)
        row, column = np.nonzero(words[chunks] & np.uint64(_INODE_MASK) == 0)
        return [int(index) for index in chunks[row] * HANDLE_CHUNK + column]

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
        freed = (handle >> 32) << _NONCE_SHIFT
        if self._owners[index // HANDLE_CHUNK] == self._pid:
            with self._lock:
                self._words[index] = freed
                self._free.append(index)
        else:
            self._words[index] = freed
        return inode, flags

    def free(self, handle: int) -> None:
        """Close *handle*, which was never answered, unless that is done."""
        try:
            self.release(handle)
        except BadHandle:
            pass  # it was noted, and never opened

    def in_use(self, slot: int) -> bool:
        """Return whether a handle is open on any generation of *slot*."""
        return self._starts(_LOW.pack(slot + 1)) > 0

    def is_only_one(self, inode: int) -> bool:
        """Return whether *inode* has one handle; False too where it would take long to find out."""
        used = self._memory.words[Word.HANDLES]
        return used <= _FEW and self._starts(_LOW.pack(inode & 0xFFFF_FFFF)) == 1

    def slots(self) -> list[int]:
        """Return the slots that handles are open on."""
        low = self._used() & 0xFFFF_FFFF
        return [slot - 1 for slot in sorted(set(low.tolist())) if slot]

    def writers(self, inode: int) -> int:
        """Return how many handles are open for writing on *inode*."""
        return self._starts((inode & _INODE_MASK | WRITE << _INODE_BITS).to_bytes(_NONCE_SHIFT // 8, "little"))

    def count(self) -> int:
        """Return how many handles are open."""
        return int(np.count_nonzero(self._used() & _INODE_MASK))

    def _starts(self, start: bytes) -> int:
        """Return how many words start with these bytes, the lowest first.

        A search of a copy: of the few words that are mostly in use, numpy would take ten times as long to look at them.
        """
        data = self._memory.map[HANDLES_AT : HANDLES_AT + 8 * self._memory.words[Word.HANDLES]]
        count, at = 0, data.find(start)
        while at >= 0:
            count += at % 8 == 0
            at = data.find(start, at + 1)
        return count

    def _used(self) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return np.frombuffer(self._memory.map, np.uint64, self._memory.words[Word.HANDLES], HANDLES_AT)


def directory_of(handle: int) -> int:
    """Return the inode of a *handle* that `Handles.open_directory` gave out."""
    return handle & _INODE_MASK


def _lives(pid: int) -> bool:
    """Return whether there is a process *pid*."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is none of ours: the number was used again
    return True
