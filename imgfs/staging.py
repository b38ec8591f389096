"""Images that are being written: their bytes in files under staging/, their state in shared memory.

Owns the staging files and entries. Must not know needles: the store turns an entry into one when it is flushed.

*Concurrency:* entries are made, changed and ended by the holder of the table's lock, in the change that says the same
in the table. Any process can open the file of an entry by its number.
"""

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from imgfs.disk import Buffer, Disk
from imgfs.errors import TooManyOpen
from imgfs.layout import AT_STAGED_STATE, PAGE, STAGED, STAGED_AT, STAGED_BYTES, STAGED_MAX, STAGED_STATE, Word
from imgfs.memory import Memory

DIRTY = 1  # flag: differs from what the volumes hold
SPOILED = 2  # flag: a write found the disk full, so that this is not what somebody meant; alone: nothing is staged
ATTRIBUTED = 4  # flag: extended attributes wait in a file of their own for the first needle of the image
_TURN = 8  # flag: which of two such files it is
_EMPTY = 16  # flag of an entry that nobody finds: its file holds nothing that counts
_EMPTY_STATE = STAGED_STATE.pack(_EMPTY, 0, 0, 0, 0)

_U64 = struct.Struct("<Q")
_INODE_AND_STATE = struct.Struct("<Q" + STAGED_STATE.format.removeprefix("<"))
assert AT_STAGED_STATE == 8
_REMEMBERED = 64
# So many files keep so much at most when the image in them is ended: 16 MiB in all.
_KEPT_FILES, _KEPT_BYTES_MAX = 64, 256 << 10
_AT_NAME = STAGED.size - 256  # its length in one byte, then the name


class Staged(NamedTuple):
    """An entry, unpacked: what the image will be once it is flushed."""

    inode: int
    flags: int
    owner: int
    size: int
    mtime_ns: int
    ctime_ns: int
    creator: int = 0
    """Process that created an image which others must not see before it is closed; 0: all may."""
    name_length: int = 0
    name_field: bytes = b""

    @property
    def name(self) -> bytes:
        """The name of an image that no needle has named yet."""
        return self.name_field[: self.name_length]

    @property
    def dirty(self) -> bool:
        return bool(self.flags & DIRTY)


class State(NamedTuple):
    """What of an entry changes while the image is written; the fields are those of `Staged`."""

    flags: int
    owner: int
    size: int
    mtime_ns: int
    ctime_ns: int


def is_refused(flags: int) -> bool:
    """Return whether the entry with these *flags* stands for writes that were refused, and has no bytes of its own."""
    return flags & (DIRTY | SPOILED) == SPOILED


# `_make` of what has the right number of fields by nature.
_staged: Callable[..., Staged] = tuple.__new__
_state: Callable[..., State] = tuple.__new__


class Staging:
    """The entries, found by inode, and their files."""

    def __init__(self, disk: Disk, directory: str, memory: Memory) -> None:
        self._disk = disk
        self._directory = directory
        self._memory = memory
        self._numbers: dict[int, int] = {}  # inode -> entry, a cache: the entry itself decides
        self._freed: deque[int] = deque(maxlen=_REMEMBERED)  # entries that were free when we last looked, likewise
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Be a process of its own; files that the parent opened serve both."""
        self._lock = threading.Lock()
        self._numbers.clear()
        self._freed.clear()

    def close(self) -> None:
        for file in self._files.values():
            self._disk.close(file)
        self._files.clear()

    def clear(self) -> None:
        """Remove what a daemon that died left behind: it was never closed."""
        for name in self._disk.names(self._directory):
            self._disk.unlink(f"{self._directory}/{name}")

    def find(self, inode: int) -> int:
        """Return the number of the entry of *inode*, -1 if it is not being written."""
        number = self._numbers.get(inode, -1)
        if number >= 0 and self._inode(number) == inode:
            return number
        used = self._memory.words[Word.STAGED]
        inodes = np.ndarray((used,), "<u8", self._memory.map, STAGED_AT, (STAGED_BYTES,))
        found = np.flatnonzero(inodes == inode)
        if not len(found):
            self._numbers.pop(inode, None)
            return -1
        self._numbers[inode] = int(found[0])
        return int(found[0])

    def _inode(self, number: int) -> int:
        """Return the inode that entry *number* belongs to, 0 if nobody finds it."""
        inode: int = _U64.unpack_from(self._memory.map, STAGED_AT + STAGED_BYTES * number)[0]
        return inode

    def entry(self, number: int) -> Staged:
        """Return entry *number*."""
        return _staged(Staged, STAGED.unpack_from(self._memory.map, STAGED_AT + STAGED_BYTES * number))

    def state(self, number: int) -> State:
        """Return what of entry *number* can change; within the lock."""
        at = STAGED_AT + STAGED_BYTES * number + AT_STAGED_STATE
        return _state(State, STAGED_STATE.unpack_from(self._memory.map, at))

    def name(self, number: int) -> bytes:
        """Return the name that entry *number* was begun with; within the lock."""
        at = STAGED_AT + STAGED_BYTES * number + _AT_NAME
        mapping = self._memory.map
        return mapping[at + 1 : at + 1 + mapping[at]]

    def look(self, number: int) -> Staged:
        """Return entry *number* as it was before or after a change; outside of any."""
        words = self._memory.words
        before = words[Word.COUNTER]
        entry = self.entry(number)
        if before & 1 or words[Word.COUNTER] != before:
            return self._memory.consistent(lambda: self.entry(number))
        return entry

    def look_state(self, number: int, inode: int) -> State | None:
        """Return the state of entry *number*, as `look`; None if it is not that of *inode*."""
        words, at = self._memory.words, STAGED_AT + STAGED_BYTES * number
        before = words[Word.COUNTER]
        found = _INODE_AND_STATE.unpack_from(self._memory.map, at)
        if before & 1 or words[Word.COUNTER] != before:
            found = self._memory.consistent(lambda: _INODE_AND_STATE.unpack_from(self._memory.map, at))
        return _state(State, found[1:]) if found[0] == inode else None

    def put(self, number: int, state: tuple[int, int, int, int, int]) -> None:
        """Within `Memory.change`: make *state*, the fields of a `State`, that of entry *number*."""
        self._memory.put(STAGED_AT + STAGED_BYTES * number + AT_STAGED_STATE, STAGED_STATE.pack(*state))

    def update(self, number: int, state: tuple[int, int, int, int, int]) -> None:
        """As `put`, in one step for every reader."""
        with self._memory.change():
            self.put(number, state)

    def clean(self, number: int) -> None:
        """Within `Memory.change`: note that needles hold what is in entry *number*."""
        flags, owner, size, mtime_ns, ctime_ns = self.state(number)
        self.put(number, (flags & ~(DIRTY | ATTRIBUTED), owner, size, mtime_ns, ctime_ns))

    def _free_entry(self) -> int:
        """Return the number of an entry that nobody finds, STAGED_MAX if there is none."""
        while self._freed:
            number = self._freed.pop()
            if not self._inode(number):
                return number
        used = self._memory.words[Word.STAGED]
        inodes = np.ndarray((used,), "<u8", self._memory.map, STAGED_AT, (STAGED_BYTES,))
        free = np.flatnonzero(inodes == 0)
        return int(free[0]) if len(free) else used

    def begin(self, entry: Staged, pieces: Iterable[Buffer] = ()) -> int:
        """Make *entry* with a file that holds *pieces*; return its number, for `publish`: nobody finds it yet.

        Raises:
            TooManyOpen: so many images are being written that no entry is left.
        """
        used, number = self._memory.words[Word.STAGED], self._free_entry()
        if number >= STAGED_MAX:
            raise TooManyOpen(f"{STAGED_MAX} images are being written; close some")
        # One that has no bytes takes nothing of a disk which may have no room for an empty file.
        if (number == used or self.state(number).flags != _EMPTY) and not is_refused(entry.flags):
            self.free(number)
        try:
            at = 0
            for piece in pieces:
                self.write(number, at, piece)
                at += len(piece)
        except BaseException:
            self.free(number)
            raise
        if number == used:
            self._memory.words[Word.STAGED] = used + 1
        at = STAGED_AT + STAGED_BYTES * number
        data = STAGED.pack(*entry)
        self._memory.map[at + 8 : at + len(data)] = data[8:]
        return number

    def publish(self, number: int, inode: int) -> None:
        """Within `Memory.change`, the one that says so in the table: let the entry *number*, just begun, be found."""
        self._memory.put(STAGED_AT + STAGED_BYTES * number, inode.to_bytes(8, "little"))
        self._numbers[inode] = number

    def withdraw(self, number: int) -> int:
        """Within `Memory.change`, the one that says so in the table: let nobody find entry *number*; `free` follows.

        Return the inode it was of.
        """
        inode = self._inode(number)
        self._numbers.pop(inode, None)
        self._memory.put(STAGED_AT + STAGED_BYTES * number, bytes(8))
        return inode

    def free(self, number: int) -> None:
        """Free the bytes of entry *number*, which nobody finds, but keep a file of the size that most images have.

        The next image that is staged there writes over it, up to the size that its own entry says, which takes a fifth
        of the time of giving the pages back and getting others.
        """
        flags, _, size, _, _ = self.state(number)
        if not is_refused(flags) and (number >= _KEPT_FILES or not PAGE <= size <= _KEPT_BYTES_MAX):
            self._disk.truncate(self.file(number), 0)
        at = STAGED_AT + STAGED_BYTES * number + AT_STAGED_STATE
        self._memory.map[at : at + len(_EMPTY_STATE)] = _EMPTY_STATE
        self._freed.append(number)

    def inodes(self) -> list[int]:
        """Return the inodes of all entries."""
        used = self._memory.words[Word.STAGED]
        inodes = np.ndarray((used,), "<u8", self._memory.map, STAGED_AT, (STAGED_BYTES,))
        return [int(inode) for inode in inodes[inodes > 0]]

    def file(self, number: int) -> int:
        """Return a descriptor of the file of entry *number*, which any worker can open by that number."""
        file = self._files.get(number)
        if file is not None:
            return file
        with self._lock:
            file = self._files.get(number)
            if file is None:
                path = f"{self._directory}/{number:04d}"
                file = self._files[number] = self._disk.open(path, writable=True, create=True)
            return file

    def read(self, number: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        """Return up to *size* bytes at *offset* of the file; WouldBlock as Disk.read."""
        return self._disk.read(self.file(number), offset, size, nowait=nowait) if size > 0 else b""

    def write(self, number: int, offset: int, data: Buffer) -> None:
        """Write *data* at *offset*; the caller updates the entry."""
        self._disk.write(self.file(number), offset, [data])

    def attributes(self, number: int) -> bytes:
        """Return the extended attributes that wait for entry *number*, as `write_attributes` got them."""
        return self._disk.read_file(self._attributes_path(number, self.state(number).flags))

    def write_attributes(self, number: int, data: bytes) -> State:
        """Return the state of *number* as it is when the extended attributes *data* wait for it; `put` makes it so."""
        state = self.state(number)
        flags = (state.flags | ATTRIBUTED) ^ _TURN
        file = self._disk.open(self._attributes_path(number, flags), writable=True, create=True)
        try:
            self._disk.truncate(file, 0)
            self._disk.write(file, 0, [data])
        finally:
            self._disk.close(file)
        return state._replace(flags=flags)

    def _attributes_path(self, number: int, flags: int) -> str:
        return f"{self._directory}/{number:04d}.xattrs{1 if flags & _TURN else 0}"

    def truncate(self, number: int, size: int) -> None:
        """Cut or extend the file; the caller updates the entry."""
        self._disk.truncate(self.file(number), size)
