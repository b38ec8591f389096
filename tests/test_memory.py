"""The shared memory: one change is one step for every reader, and what a dead writer left is undone."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator

import pytest
from tables import another_mapping

from imgfs.layout import (
    JOURNAL_DATA_MAX,
    JOURNAL_ENTRIES,
    MEMORY_BYTES,
    OWNERS_AT,
    PAGE,
    RECORDS_AT,
    Word,
)
from imgfs.memory import Memory

AT = RECORDS_AT


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def die_halfway(memory: Memory, data: bytes = b"new") -> None:
    """Leave *memory* as a writer does that is killed within a change."""
    memory.words[Word.JOURNAL] = 0
    memory.words[Word.COUNTER] += 1
    memory.put(AT, data)


def test_what_a_change_stored_is_seen_by_every_mapping(memory: Memory) -> None:
    other = another_mapping(memory)
    with memory.lock(), memory.change():
        memory.put(AT, b"abc")
        memory.put_u32(AT + 4, 0x01020304)
        memory.put_u16(AT + 8, 0x0506)
        memory.put_word(Word.FILES, 7)
        memory.fill(AT + 100, b"xyz")
    assert other.map[AT : AT + 10] == b"abc\0\x04\x03\x02\x01\x06\x05"
    assert other.map[AT + 100 : AT + 103] == b"xyz"
    assert other.words[Word.FILES] == 7
    assert other.words[Word.COUNTER] % 2 == 0
    other.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_undoes_the_change(memory: Memory, error: type[BaseException]) -> None:
    with memory.lock(), memory.change():
        memory.put(AT, b"old")
    before = memory.words[Word.COUNTER]
    with pytest.raises(error), memory.lock(), memory.change():
        memory.put(AT, b"new")
        memory.put(AT + 1, b"er")
        raise error
    assert memory.map[AT : AT + 3] == b"old"
    assert memory.words[Word.COUNTER] == before + 2


def test_the_next_holder_of_the_lock_undoes_what_a_dead_writer_began(memory: Memory) -> None:
    with memory.lock(), memory.change():
        memory.put(AT, b"old")
    die_halfway(memory)
    other = another_mapping(memory)
    with other.lock():
        assert other.map[AT : AT + 3] == b"old"
        assert other.words[Word.COUNTER] % 2 == 0
    other.close()


def test_before_images_go_back_in_reverse(memory: Memory) -> None:
    with memory.lock(), memory.change():
        memory.put(AT, b"1234")
    die_halfway(memory, b"ab")
    memory.put(AT + 1, b"cd")
    memory.put(AT, b"efgh")
    with memory.lock():
        assert memory.map[AT : AT + 4] == b"1234"


def test_a_reader_undoes_what_a_dead_writer_began(memory: Memory) -> None:
    die_halfway(memory)
    other = another_mapping(memory)
    assert other.consistent(lambda: other.map[AT : AT + 3]) == b"\0\0\0"
    other.close()


def test_a_reader_waits_for_a_living_writer(memory: Memory) -> None:
    other = another_mapping(memory)
    inside, seen = threading.Event(), threading.Event()

    def write() -> None:
        with memory.lock(), memory.change():
            memory.put(AT, b"n")
            inside.set()
            seen.wait(0.2)  # longer than a reader's patience
            memory.put(AT + 1, b"w")

    thread = threading.Thread(target=write)
    thread.start()
    assert inside.wait(10)
    assert other.consistent(lambda: other.map[AT : AT + 2]) == b"nw"
    seen.set()
    thread.join(10)
    assert not thread.is_alive()
    other.close()


def test_a_reader_reads_again_when_a_writer_came_between(memory: Memory) -> None:
    tries = []

    def read() -> bytes:
        tries.append(memory.map[AT : AT + 1])
        if len(tries) == 1:
            with memory.lock(), memory.change():
                memory.put(AT, b"n")
            raise IndexError("what a reader meets between two stores means nothing")
        if len(tries) == 2:
            with memory.lock(), memory.change():
                memory.put(AT, b"m")
        return memory.map[AT : AT + 1]

    assert memory.consistent(read) == b"m"
    assert tries == [b"\0", b"n", b"m"]


def test_an_error_that_is_none_of_the_writers_comes_out(memory: Memory) -> None:
    def read() -> None:
        raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        memory.consistent(read)


def test_the_lock_may_be_taken_again_by_its_holder_and_by_nobody_else(memory: Memory) -> None:
    other = another_mapping(memory)
    with memory.lock():
        with memory.lock():
            pass
        with pytest.raises(BlockingIOError):
            fcntl.flock(other._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with other.lock():
        pass
    other.close()


def test_threads_take_turns(memory: Memory) -> None:
    def add() -> None:
        for _ in range(200):
            with memory.lock(), memory.change():
                value = memory.words[Word.FILES]
                time.sleep(0)
                memory.put_word(Word.FILES, value + 1)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert memory.words[Word.FILES] == 600


def test_more_than_the_journal_holds_is_refused_and_undone(memory: Memory) -> None:
    with pytest.raises(AssertionError, match="more than one change may take"), memory.lock(), memory.change():
        memory.put(AT, bytes(JOURNAL_DATA_MAX + 1))
    with pytest.raises(AssertionError, match=f"{JOURNAL_ENTRIES} journal entries"), memory.lock(), memory.change():
        for _ in range(JOURNAL_ENTRIES + 1):
            memory.put(AT, b"x")
    assert memory.map[AT : AT + 1] == b"\0"
    assert memory.words[Word.COUNTER] % 2 == 0


def test_the_mapping_takes_memory_only_where_it_is_used(memory: Memory) -> None:
    assert MEMORY_BYTES > 1 << 33
    assert memory.resident_bytes() <= 2 * PAGE
    memory.fill(OWNERS_AT, bytes([1]) * 8 * PAGE)
    assert 8 * PAGE <= memory.resident_bytes() <= 10 * PAGE
    memory.discard(OWNERS_AT + 1, 8 * PAGE - 2)
    assert 2 * PAGE <= memory.resident_bytes() <= 4 * PAGE
    assert memory.map[OWNERS_AT] == memory.map[OWNERS_AT + 8 * PAGE - 1] == 1
    assert memory.map[OWNERS_AT + PAGE : OWNERS_AT + 7 * PAGE] == bytes(6 * PAGE)
    memory.discard(OWNERS_AT + 1, PAGE)
    assert memory.map[OWNERS_AT] == 1


def test_closing_gives_everything_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = Memory()
    other = another_mapping(memory)
    memory.close()
    other.words[Word.FILES] = 1  # the memory lives as long as its last mapping
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before
