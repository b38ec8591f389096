"""The requests that workers have in hand, in shared memory: what is left of them when a worker dies.

Owns a row for each, and the list of requests of dead workers that the kernel resent. Must not know FUSE beyond the
number of a request, nor what an applied request did.

A mutation marks its row as applied in the same step in which it changes the table, so a row of a dead worker tells
whether that happened. Whether it was answered the kernel tells: it resends what was not. Applied and resent: the
list says what to answer (`resent`). Applied and not resent, or neither: nothing is left to do.

*Concurrency:* a row belongs to one task of one worker. The list is taken from under the table's lock, and written
by `settle`, which runs while no worker has anything in hand.
"""

import struct
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

from imgfs.handles import Handles
from imgfs.layout import NOTE, NOTES_AT, REQUEST, REQUESTS_AT, REQUESTS_MAX, TASKS_MAX, WORKERS_MAX, Word
from imgfs.memory import Memory

__all__ = ["NOBODY", "TASKS_MAX", "WORKERS_MAX", "Request", "Requests", "Result"]

NOBODY = -1  # in place of a row: what is done is not done for a request
# What the kernel resends is read at once; a request that its sender gave up meanwhile never comes.
_NOTE_NS = 60 * 1_000_000_000

_RESULT = struct.Struct("<QQ")
_ROW_WORDS = REQUEST.size // 8
_NOTE_WORDS = NOTE.size // 8
# Words of a row, and of a note.
_HANDLE, _INODE, _APPLIED, _PID, _NODE, _UNIQUE, _WAITING, _OPCODE, _UNUSED, _TIME = range(10)


class Request(NamedTuple):
    """A request, as the kernel numbers it; the other fields are for who reads the log."""

    opcode: int  # 1 to 255
    pid: int  # the thread's, as the kernel sends it
    node: int
    unique: int  # never given again while the mount lives


class Result(NamedTuple):
    """What an applied request gave; 0 for what it does not give."""

    inode: int
    handle: int


class Requests:
    """The rows: number worker * TASKS_MAX + task."""

    def __init__(self, memory: Memory, handles: Handles) -> None:
        self._memory = memory
        self._handles = handles
        self._map = memory.map
        self._rows = memoryview(memory.map)[REQUESTS_AT : REQUESTS_AT + REQUEST.size * REQUESTS_MAX].cast("Q")
        self._notes = memoryview(memory.map)[NOTES_AT : NOTES_AT + NOTE.size * REQUESTS_MAX].cast("Q")

    def close(self) -> None:
        self._rows.release()
        self._notes.release()

    # -- by the worker ----------------------------------------------------------------------------------------

    def begin(self, row: int, request: Request) -> None:
        """Note that *row* has *request* in hand."""
        opcode, pid, node, unique = request
        # The opcode is stored last and in one byte: the row is taken with all of it, or free.
        REQUEST.pack_into(self._map, REQUESTS_AT + REQUEST.size * row, 0, 0, 0, pid, node, unique, 0, opcode)

    def opened(self, row: int, handle: int) -> None:
        """Note that the request of *row* was given *handle*, which is closed if it is never answered."""
        self._rows[_ROW_WORDS * row + _HANDLE] = handle

    def applied(self, row: int, inode: int) -> None:
        """Within `Memory.change`: note that this change is all that the request of *row* asked for."""
        self._memory.put(REQUESTS_AT + REQUEST.size * row + 8 * _INODE, _RESULT.pack(inode, 1))

    def wait(self, row: int, *, waiting: bool) -> None:
        """Note that the request of *row* waits for room, or not any more: then it is begun anew."""
        self._rows[_ROW_WORDS * row + _WAITING] = waiting

    def end(self, row: int) -> None:
        """Note that the request of *row* is answered."""
        self._rows[_ROW_WORDS * row + _OPCODE] = 0

    def any_noted(self) -> bool:
        """Return whether `resent` might tell of anything."""
        return self._memory.words[Word.NOTES] != 0

    def resent(self, row: int, request: Request) -> Result | None:
        """Return what *request* gave, if a worker that died had applied it; from now on *row* keeps that."""
        if not self.any_noted():
            return None
        with self._memory.lock():
            return self._take(row, request)

    def _take(self, row: int, request: Request) -> Result | None:
        oldest, applied, taken = time.monotonic_ns() - _NOTE_NS, 0, None
        for at in self._noted():
            if not self._notes[at + _APPLIED]:
                continue
            if taken is None and self._note_at(at) == request and self._notes[at + _TIME] > oldest:
                taken = Result(self._notes[at + _INODE], self._notes[at + _HANDLE])
                self.opened(row, taken.handle)
                self._rows[_ROW_WORDS * row + _INODE] = taken.inode
                self._rows[_ROW_WORDS * row + _APPLIED] = 1
                self._notes[at + _OPCODE] = 0
            else:
                applied += 1
        self._memory.words[Word.NOTES] = applied
        return taken

    # -- by whoever starts workers ----------------------------------------------------------------------------

    def in_hand(self, worker: int) -> list[tuple[int, Request, Result | None]]:
        """Return (row, request, result if it was applied) of all that *worker* has not answered."""
        found = []
        for row in range(worker * TASKS_MAX, (worker + 1) * TASKS_MAX):
            words = self._rows[_ROW_WORDS * row : _ROW_WORDS * (row + 1)].tolist()
            if words[_OPCODE]:
                request = Request(words[_OPCODE], words[_PID], words[_NODE], words[_UNIQUE])
                result = Result(words[_INODE], words[_HANDLE]) if words[_APPLIED] else None
                found.append((row, request, result))
        return found

    def at_work(self, worker: int) -> dict[int, Request]:
        """Return, by row, what *worker* has in hand and is at: all but what waits for room."""
        found = self.in_hand(worker)
        return {row: request for row, request, _ in found if not self._rows[_ROW_WORDS * row + _WAITING]}

    def busy(self, worker: int) -> bool:
        """Return whether *worker* has anything in hand."""
        first = worker * TASKS_MAX * _ROW_WORDS
        return any(self._rows[first + _OPCODE : first + TASKS_MAX * _ROW_WORDS : _ROW_WORDS])

    def clear(self, worker: int) -> None:
        """Forget all rows of *worker*."""
        for row in range(worker * TASKS_MAX, (worker + 1) * TASKS_MAX):
            self.end(row)

    def settle(self, worker: int, resent: Collection[Request]) -> list[Request]:
        """Settle what *worker*, which died, had in hand; return what has to be done again.

        *resent* is all that the kernel sent again. Comes after `Store.roll_forward`, which may find that one of them
        was applied.
        """
        self._forget_notes_but(resent)
        waiting, again = set(resent), []
        for row, request, result in self.in_hand(worker):
            if request in waiting:
                waiting.remove(request)  # one that was just being taken over has two rows
                if result is not None:
                    self._note(request, result)
                else:
                    handle = self._rows[_ROW_WORDS * row + _HANDLE]
                    if handle:
                        self._handles.free(handle)
                    again.append(request)
            self.end(row)
        return again

    # -- the list ---------------------------------------------------------------------------------------------

    def _noted(self) -> Iterator[int]:
        """Yield where each note begins."""
        for at in range(0, self._memory.words[Word.NOTE_ROWS] * _NOTE_WORDS, _NOTE_WORDS):
            if self._notes[at + _OPCODE]:
                yield at

    def _note_at(self, at: int) -> Request:
        notes = self._notes
        return Request(notes[at + _OPCODE], notes[at + _PID], notes[at + _NODE], notes[at + _UNIQUE])

    def _forget_notes_but(self, resent: Collection[Request]) -> None:
        """Forget what the kernel did not send again: it was answered, or its sender gave it up."""
        wanted, words, top, applied = set(resent), self._memory.words, 0, 0
        for at in self._noted():
            if self._note_at(at) in wanted:
                top = at // _NOTE_WORDS + 1
                applied += self._notes[at + _APPLIED]
                continue
            self._notes[at + _OPCODE] = 0
            if self._notes[at + _APPLIED] and self._notes[at + _HANDLE]:
                self._handles.free(self._notes[at + _HANDLE])
        words[Word.NOTE_ROWS], words[Word.NOTES] = top, applied

    def _find(self, request: Request) -> int:
        """Return where the note of *request* begins; a new one if there is none, -1 if all are taken."""
        free = -1
        words = self._memory.words
        for number in range(words[Word.NOTE_ROWS]):
            at = number * _NOTE_WORDS
            if not self._notes[at + _OPCODE]:
                free = at if free < 0 else free
            elif self._note_at(at) == request:
                return at
        if free < 0:
            number = words[Word.NOTE_ROWS]
            if number >= REQUESTS_MAX:
                return -1
            words[Word.NOTE_ROWS], free = number + 1, number * _NOTE_WORDS
        opcode, pid, node, unique = request
        NOTE.pack_into(self._map, NOTES_AT + 8 * free, 0, 0, 0, pid, node, unique, 0, opcode, 0, 0)
        return free

    def _note(self, request: Request, result: Result) -> None:
        at = self._find(request)
        if at < 0:
            return
        self._notes[at + _HANDLE] = result.handle
        self._notes[at + _INODE] = result.inode
        self._notes[at + _TIME] = time.monotonic_ns()
        self._notes[at + _APPLIED] = 1
        self._memory.words[Word.NOTES] += 1
