"""One shared mapping, changed so that a writer may be killed between any two stores.

Owns the mapping, the sequence counter, the journal of before-images and the writer's lock. Must not know what
the words mean.

*Concurrency:* one writer at a time, by `lock`, across threads and processes. Readers take no lock: they read the
counter, read what they want, and read the counter again (`consistent`). It is odd while the table changes. Before
the writer overwrites a word it saves the old bytes in the journal; whoever takes the lock and finds the counter odd
puts them back (`_roll_back`), and carries an unfinished append on (`on_unfinished`). The counter and the journal's
length are aligned 64-bit words, stored in one instruction; x86 and the interpreter lock keep stores in order.
"""

import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from imgfs.disk import WouldBlock
from imgfs.errors import OtherLayout
from imgfs.layout import (
    JOURNAL_AT,
    JOURNAL_DATA_MAX,
    JOURNAL_ENTRIES,
    JOURNAL_ENTRY,
    LAYOUT_VERSION,
    MEMORY_BYTES,
    OWNERS_AT,
    PAGE,
    WORDS,
    WORDS_AT,
    Word,
)

T = TypeVar("T")

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
# Each change of the store does these some ten times: plain globals are found faster than attributes of a class.
_COUNTER, _JOURNAL, _APPENDING = Word.COUNTER, Word.JOURNAL, Word.APPENDING
_pack_word = struct.Struct("<Q").pack
_TRY = fcntl.LOCK_EX | fcntl.LOCK_NB
_ENTRY_BYTES, _pack_entry = JOURNAL_ENTRY.size, JOURNAL_ENTRY.pack_into
_MAP_NORESERVE = 0x4000
# A reader that finds the counter odd for so long no longer believes that the writer lives.
_WRITER_PATIENCE_S = 0.05


class _Lock:
    """`with memory.lock()`: an object that is there already; a generator for each use takes three times as long."""

    def __init__(self, memory: "Memory") -> None:
        self._memory = memory

    def __enter__(self) -> None:
        self._memory.acquire()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._memory.release()


class _Change:
    """`with memory.change()`, likewise."""

    def __init__(self, memory: "Memory") -> None:
        self._memory = memory

    def __enter__(self) -> None:
        self._memory.begin()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._memory.end(error)


class _OneSync:
    """`with memory.one_sync`: one process and thread at a time; dies with its holder, and never waits for `lock`."""

    # struct flock of fcntl.h: type, whence, start, length, pid, and the padding of a 64-bit number at the end.
    _WHOLE = struct.Struct("@hhqqi0q")

    def __init__(self, file: int) -> None:
        self._file = file
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            # A kind of lock of its own, beside the flock of the same file.
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, self._WHOLE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, self._WHOLE.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0))
        finally:
            self._threads.release()


class Memory:
    """The mapping and its discipline; `descriptor` is what another process needs to map the same."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Map *descriptor*, a new memory without one; it is closed by `close`.

        Raises:
            OtherLayout: another release of imgfs made it.
        """
        if descriptor is None:
            descriptor = os.memfd_create("imgfs-table", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, MEMORY_BYTES)
        elif os.fstat(descriptor).st_size != MEMORY_BYTES:
            raise OtherLayout("the table in memory has another size than that of this release")
        self.descriptor = descriptor
        self.map = mmap.mmap(descriptor, MEMORY_BYTES, mmap.MAP_SHARED | _MAP_NORESERVE)
        # A core dump of a sparse mapping of gigabytes helps nobody.
        self.map.madvise(mmap.MADV_DONTDUMP)
        self.words = memoryview(self.map)[WORDS_AT : WORDS_AT + 8 * WORDS].cast("Q")
        version = self.words[Word.VERSION]
        if version not in (0, LAYOUT_VERSION):
            self.words.release()
            self.map.close()
            raise OtherLayout(f"the table in memory has layout {version}, that of this release is {LAYOUT_VERSION}")
        self.words[Word.VERSION] = LAYOUT_VERSION
        # Carries on what a killed writer had begun to append; without it, that waits for somebody who can.
        self.on_unfinished: Callable[[], None] | None = None
        self._lock = _Lock(self)
        self._change = _Change(self)
        self._lock_file = -1
        self._open_lock()

    def _open_lock(self) -> None:
        # flock belongs to the open file, so each process opens the memory anew; a descriptor that came by fork
        # would share its lock with the parent.
        self._lock_file = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        self._thread_lock = threading.RLock()
        self._lock_depth = 0
        self.one_sync = _OneSync(self._lock_file)

    def after_fork(self) -> None:
        """Be a process of its own: in a child, before anything else is done with the memory."""
        os.close(self._lock_file)
        self._open_lock()

    def close(self) -> None:
        """Unmap; the memory is gone with its last mapping."""
        self.words.release()
        try:
            self.map.close()
        except BufferError:
            pass  # the traceback of an error still holds a view; the mapping goes with it
        os.close(self._lock_file)
        os.close(self.descriptor)

    def resident_bytes(self) -> int:
        """Return how much memory the mapping takes."""
        return os.fstat(self.descriptor).st_blocks * 512

    # -- writing ----------------------------------------------------------------------------------------------

    def lock(self) -> AbstractContextManager[None]:
        """Be the only writer; a change that a killed writer left half done is undone first, an append carried on."""
        return self._lock

    def acquire(self) -> None:
        """Enter `lock`."""
        self._thread_lock.acquire()
        try:
            if not self._lock_depth:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        except BaseException:
            self._thread_lock.release()
            raise
        self._entered()

    def _entered(self) -> None:
        self._lock_depth += 1
        if self._lock_depth == 1:
            words = self.words
            if words[_COUNTER] & 1 or words[_APPENDING]:
                self._carry_on()

    def _carry_on(self) -> None:
        """Having just taken the lock: put right what a killed writer left."""
        try:
            if self.words[Word.COUNTER] & 1:
                self._roll_back()
            if self.words[Word.APPENDING] and self.on_unfinished is not None:
                self.on_unfinished()
        except BaseException:
            self.release()
            raise

    def try_acquire(self) -> bool:
        """Enter `lock` and return True, or return False at once if another thread or process is in it."""
        if not self._thread_lock.acquire(False):
            return False
        if not self._lock_depth:
            try:
                fcntl.flock(self._lock_file, _TRY)
            except BlockingIOError:
                self._thread_lock.release()
                return False
            except BaseException:
                self._thread_lock.release()
                raise
        self._entered()
        return True

    def pass_through(self, *, nowait: bool) -> None:
        """Enter `lock` and leave it: what others had begun within it is over. WouldBlock: *nowait*, and it is not."""
        if not nowait:
            self.acquire()
        elif not self.try_acquire():
            raise WouldBlock
        self.release()

    def release(self) -> None:
        """Leave `lock`."""
        self._lock_depth -= 1
        try:
            if not self._lock_depth:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def change(self) -> AbstractContextManager[None]:
        """Within `lock`: make the stores of this block one step for every reader; an exception undoes them."""
        return self._change

    def begin(self) -> None:
        """Enter `change`."""
        words = self.words
        words[_JOURNAL] = 0
        words[_COUNTER] += 1

    def end(self, error: BaseException | None) -> None:
        """Leave `change`."""
        if error is not None:
            # KeyboardInterrupt too: the next change would forget the before-images of this one.
            self._roll_back()
        else:
            self.words[_COUNTER] += 1

    def put(self, offset: int, data: bytes) -> None:
        """Within `change`: store *data* at *offset*, its before-image saved."""
        words, mapping = self.words, self.map
        count = words[_JOURNAL]
        size = len(data)
        if count >= JOURNAL_ENTRIES or size > JOURNAL_DATA_MAX:
            raise AssertionError(f"{count} journal entries, {size} bytes: more than one change may take")
        end = offset + size
        _pack_entry(mapping, JOURNAL_AT + count * _ENTRY_BYTES, offset, size, mapping[offset:end])
        words[_JOURNAL] = count + 1
        mapping[offset:end] = data

    def put_u32(self, offset: int, value: int) -> None:
        """Within `change`: store a 32-bit *value* at *offset*."""
        self.put(offset, _U32.pack(value))

    def put_u16(self, offset: int, value: int) -> None:
        """Within `change`: store a 16-bit *value* at *offset*."""
        self.put(offset, _U16.pack(value))

    def put_word(self, word: int, value: int) -> None:
        """Within `change`: store *value* in a 64-bit word."""
        self.put(WORDS_AT + 8 * word, _pack_word(value))

    def fill(self, offset: int, data: bytes | memoryview) -> None:
        """Store *data* where nothing points yet; a rolled-back change leaves it behind, unseen."""
        self.map[offset : offset + len(data)] = data

    def load(self, offset: int, data: memoryview) -> None:
        """Store *data*, while nobody shares the memory: through its descriptor, which spares a fault for each page."""
        done = 0
        while done < len(data):
            with data[done:] as rest:
                done += os.pwrite(self.descriptor, rest, offset + done)

    def clear(self) -> None:
        """Empty all but the words, while nobody shares the memory."""
        self.discard(OWNERS_AT, MEMORY_BYTES - OWNERS_AT)

    def discard(self, offset: int, size: int) -> None:
        """Give the whole pages within *size* bytes at *offset* back; they read as zeros, and nothing may need them."""
        start = -(-offset // PAGE) * PAGE
        length = (offset + size) // PAGE * PAGE - start
        if length > 0:
            self.map.madvise(mmap.MADV_REMOVE, start, length)

    def _roll_back(self) -> None:
        """Put every before-image back, last first, and make the counter even."""
        for index in reversed(range(self.words[Word.JOURNAL])):
            offset, length, data = JOURNAL_ENTRY.unpack_from(self.map, JOURNAL_AT + index * JOURNAL_ENTRY.size)
            self.map[offset : offset + length] = data[:length]
        self.words[Word.COUNTER] += 1

    # -- reading ----------------------------------------------------------------------------------------------

    def consistent(self, read: Callable[[], T]) -> T:
        """Return what *read* returns when no writer was at work meanwhile; its exceptions count only then, too."""
        words = self.words
        while True:
            before = words[_COUNTER]
            if before & 1:
                self._await_writer(before)
                continue
            try:
                result = read()
            except Exception:
                if words[_COUNTER] == before:
                    raise
                continue
            if words[_COUNTER] == before:
                return result

    def _await_writer(self, seen: int) -> None:
        deadline = time.monotonic() + _WRITER_PATIENCE_S
        while self.words[Word.COUNTER] == seen:
            if time.monotonic() > deadline:
                with self.lock():
                    return
            time.sleep(0)
