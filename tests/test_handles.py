"""Handles: words in shared memory that several processes give out and free, and that outlive whoever did."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from mortal import in_process, status_of
from tables import another_mapping

from imgfs.errors import BadHandle, TooManyOpen
from imgfs.handles import WRITE, Handles
from imgfs.layout import HANDLE_CHUNK, HANDLES_MAX
from imgfs.memory import Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture
def handles(memory: Memory) -> Iterator[Handles]:
    handles = Handles(memory)
    yield handles
    handles.close()


def test_a_handle_is_what_it_was_opened_as_until_it_is_released(handles: Handles) -> None:
    inode = (3 << 32) + 12345
    reader, writer = handles.open(inode, 0), handles.open(inode, WRITE)
    assert reader != writer
    assert (handles.get(reader), handles.get(writer)) == ((inode, 0), (inode, WRITE))
    assert (handles.writers(inode), handles.count(), handles.in_use(12344)) == (1, 2, True)
    assert handles.release(writer) == (inode, WRITE)
    assert (handles.writers(inode), handles.count()) == (0, 1)
    for handle in (writer, 0, HANDLES_MAX, 1 << 40):
        with pytest.raises(BadHandle):
            handles.release(handle)
    handles.release(reader)
    assert not handles.in_use(12344)


def test_a_late_release_hits_no_later_open(handles: Handles) -> None:
    first = handles.open(1, 0)
    handles.release(first)
    seen = {first}
    for _ in range(3 * HANDLE_CHUNK):
        later = handles.open(2, 0)
        assert later not in seen
        seen.add(later)
        with pytest.raises(BadHandle):
            handles.release(first)
        handles.release(later)


def test_all_of_them_and_no_more(handles: Handles) -> None:
    taken = {handles.open(9, 0) for _ in range(HANDLES_MAX)}
    assert len({handle & 0xFFFF_FFFF for handle in taken}) == HANDLES_MAX
    with pytest.raises(TooManyOpen):
        handles.open(9, 0)
    freed = taken.pop()
    handles.release(freed)
    assert handles.open(9, 0) & 0xFFFF_FFFF == freed & 0xFFFF_FFFF


def test_a_note_is_made_before_the_handle_is_open(handles: Handles) -> None:
    noted: list[int] = []

    def note(handle: int) -> None:
        noted.append(handle)
        with pytest.raises(BadHandle):
            handles.get(handle)

    assert [handles.open(4, 0, note)] == noted


def test_who_dies_between_note_and_open_costs_nobody_a_handle(handles: Handles) -> None:
    noted: list[int] = []

    class Dead(BaseException):
        pass

    def die(handle: int) -> None:
        noted.append(handle)
        raise Dead

    with pytest.raises(Dead):
        handles.open(4, 0, die)
    handles.after_fork()  # what it held in its own memory is gone
    opened = [handles.open(5, 0) for _ in range(HANDLE_CHUNK)]
    handles.free(noted[0])
    assert all(handles.get(handle) == (5, 0) for handle in opened)


def test_processes_never_give_out_the_same(memory: Memory) -> None:
    """Each opens many, frees what the others opened, and dies; their words are given out again."""
    read, write = os.pipe()

    def work() -> None:
        mine = Handles(another_mapping(memory))
        opened = [mine.open(os.getpid(), 0) for _ in range(1000)]
        assert all(mine.get(handle) == (os.getpid(), 0) for handle in opened)
        os.write(write, b"".join(handle.to_bytes(8, "little") for handle in opened[:500]))
        for handle in opened[500:]:
            mine.release(handle)
        os.kill(os.getpid(), signal.SIGKILL)

    pids = [in_process(work) for _ in range(4)]
    assert all(os.WTERMSIG(status_of(pid)) == signal.SIGKILL for pid in pids)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    left = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    assert len(set(left)) == 2000
    handles = Handles(memory)
    assert handles.count() == 2000
    assert {handles.get(handle)[0] for handle in left} == set(pids)
    more = [handles.open(1, 0) for _ in range(HANDLES_MAX - 2000)]
    with pytest.raises(TooManyOpen):
        handles.open(1, 0)
    assert not set(more) & set(left)
    for handle in left:
        handles.release(handle)  # who opened it does not matter
    assert len([handles.open(2, 0) for _ in range(2000)]) == 2000
    handles.close()


def test_nothing_has_to_be_loaded_when_an_image_is_opened() -> None:
    script = """
import sys
from imgfs.handles import Handles
from imgfs.memory import Memory

handles, loaded = Handles(Memory()), set(sys.modules)
handles.release(handles.open(9, 0))
assert handles.slots() == []
print(*set(sys.modules) - loaded)
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "\n"
