"""A table whose writer dies at a chosen store into it, between two or in the middle of one; and real processes.

Owns the counting of stores. Must not know what is stored.

*Concurrency:* none.
"""

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tables import SEED

from imgfs.layout import MEMORY_BYTES, WORDS, WORDS_AT
from imgfs.memory import Memory
from imgfs.table import Table

DEADLINE_S = 60


class Killed(BaseException):
    """The process was killed; nothing of it runs any more."""


class Life:
    """Counts stores; the one of number *last*, from 0, is the one in which the writer dies, torn in the middle."""

    def __init__(self, last: int | None, *, torn: bool, end: Callable[[], None] | None = None) -> None:
        self.stores = 0
        self._last = last
        self._torn = torn
        self._end = end

    def store(self, write: Callable[[int], None], size: int) -> None:
        """Let *write* store its first bytes: all, or as far as the writer gets."""
        number, self.stores = self.stores, self.stores + 1
        if self._last is None or number < self._last:
            write(size)
            return
        if number == self._last and self._torn:
            write(size // 2)
        if self._end is not None:
            self._end()
        raise Killed


class MortalMap(mmap.mmap):
    life: Life

    def __setitem__(self, where: Any, data: Any) -> None:
        def write(size: int) -> None:
            super(MortalMap, self).__setitem__(slice(where.start, where.start + size), data[:size])

        self.life.store(write, len(data))


class MortalWords:
    """The 64-bit words; one of them is stored whole or not at all."""

    def __init__(self, words: memoryview, life: Life) -> None:
        self._words = words
        self._life = life

    def __getitem__(self, word: int) -> int:
        value: int = self._words[word]
        return value

    def __setitem__(self, word: int, value: int) -> None:
        def write(size: int) -> None:
            if size == 8:
                self._words[word] = value

        self._life.store(write, 8)

    def release(self) -> None:
        self._words.release()


class MortalMemory(Memory):
    """The mapping of a process that will be killed."""

    def __init__(self, descriptor: int, life: Life) -> None:
        super().__init__(descriptor)
        self.words.release()
        self.map.close()
        self.map = MortalMap(self.descriptor, MEMORY_BYTES)
        self.map.life = life
        words = memoryview(self.map)[WORDS_AT : WORDS_AT + 8 * WORDS].cast("Q")
        self.words = MortalWords(words, life)  # type: ignore[assignment]


@contextmanager
def mortal(table: Table, life: Life) -> Iterator[Table]:
    memory = MortalMemory(os.dup(table.memory.descriptor), life)
    try:
        yield Table(memory, SEED)
    finally:
        memory.close()


def in_process(run: Callable[[], object]) -> int:
    """Return the pid of a process of its own that does *run* and ends without a word."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        os._exit(1)
    os._exit(0)


def status_of(pid: int) -> int:
    """Wait for the process *pid* to end, and return its wait status."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the other process did not end")
        time.sleep(0.001)
