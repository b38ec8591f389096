"""Reads small files in a process of its own, while the import stores those that were read before.

Owns that process and the shared memory it reads into. Must not know the store. It saves time, and decides nothing: of a
file that cannot be read, or that is not for an append of many, it says only that it has not got it; who asked opens it
himself then, and meets what there is to meet. The same goes for all files once the process is dead.

*Concurrency:* one reader, one asker. The rooms of the shared memory go round: the reader fills one and says so in a
pipe; who asked gives it back in another, when all that was in it is in the store. It is forked only where that is
safe, while this process has one thread, and it closes all that it inherits, the store's lock too.
"""

import mmap
import os
import signal
import stat
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from imgfs import child
from imgfs.batch import IMAGES_AT_ONCE
from imgfs.format import storable_ns
from imgfs.log import SMALL_BYTES

# A fork and its faults take as long as reading so many files.
FILES_MIN = 100
# What is stored together: few enough bytes to be in the processor's cache still when they are written.
GROUP_BYTES = 512 << 10
_ROOMS = 8
# Given back together, so that the reader, which is faster, is not woken for each: that takes as long as to store one.
_ROOMS_BACK = 4

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LENGTH = struct.Struct("<I")
_FILE = struct.Struct("<iIIIq")  # size, mode, uid, gid, mtime in ns
_NOT_READ = _FILE.pack(-1, 0, 0, 0, 0)
# A room: what is said of its files, then their bytes. The last file may go a MiB beyond the group's bytes.
_DATA_AT = _FILE.size * IMAGES_AT_ONCE
_ROOM_BYTES = _DATA_AT + GROUP_BYTES + SMALL_BYTES


class FileRead(NamedTuple):
    """A file of one name and at most a MiB, as it was read."""

    data: memoryview
    mode: int
    uid: int
    gid: int
    mtime_ns: int  # as `storable_ns` gives it


class ReadAhead:
    """The reader of one import, from the first directory that is worth one."""

    def __init__(self, is_plain: Callable[[int], bool], emptied: Callable[[], None]) -> None:
        """*is_plain*: whether an open file has nothing but its bytes; *emptied* stores all that was taken so far."""
        self._is_plain = is_plain
        self._emptied = emptied
        self._reader: _Reader | None = None
        self._asked = 0  # files that were asked for and not taken
        self._group: list[FileRead | None] = []  # last first
        self._has_room = False

    def ask(self, directory: bytes, names: Sequence[bytes]) -> None:
        """Let the files *names* in *directory* be read; `take` gives them in that order."""
        if self._asked:
            self.close()  # who asked before has given up, and the pipes are full of that
        if self._reader is None and len(names) >= FILES_MIN and _is_alone():
            try:
                self._reader = _Reader(self._is_plain)
            except OSError:
                return  # there can be no more processes or files
        if self._reader is not None and names:
            try:
                self._reader.ask(b"\0".join((directory, *names)))
            except OSError:
                self.close()
            else:
                self._asked = len(names)

    def take(self) -> FileRead | None:
        """Return the next file that was asked for; None if it was not read. The bytes are good until the next call."""
        if not self._asked:
            return None
        if not self._group and not self._next_group():
            return None
        self._asked -= 1
        return self._group.pop()

    def _next_group(self) -> bool:
        assert self._reader is not None
        self._emptied()
        try:
            if self._has_room:
                self._reader.give_back()
            self._group = self._reader.group()
        except OSError:
            self._group = []
        if not self._group:
            self.close()  # it was killed
        self._has_room = bool(self._group)
        return self._has_room

    def close(self) -> None:
        """End the reader; what was taken stays good."""
        self._asked, self._group, self._has_room = 0, [], False
        if self._reader is not None:
            self._reader.end()
            self._reader = None


def _is_alone() -> bool:
    """Return whether this process has one thread, so that a child that goes on in Python is safe."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def read_into(file: int, room: memoryview) -> memoryview:
    """Fill *room* with what is in *file* from where it stands; return less of it only where *file* ends."""
    done = os.readv(file, [room])
    while done < len(room) and (more := os.readv(file, [room[done:]])):
        done += more
    return room[:done]


class _Reader:
    """The process, the pipes to and from it, and the rooms."""

    def __init__(self, is_plain: Callable[[int], bool]) -> None:
        self._rooms = _rooms()
        self._turn = 0
        self._emptied = 0
        files: list[int] = []
        try:
            for _ in range(3):
                files += os.pipe()
            wanted, self._wanted, free, self._free, self._full, full = files
            os.write(self._free, bytes(_ROOMS))

            def work() -> None:
                _keep_only(wanted, free, full)
                _serve(wanted, free, full, self._rooms, is_plain)

            self._pid = child.fork("reader", work)
        except BaseException:
            for file in files:
                os.close(file)
            raise
        for file in (wanted, free, full):
            os.close(file)

    def ask(self, request: bytes) -> None:
        data = memoryview(_LENGTH.pack(len(request)) + request)
        while data:
            data = data[os.write(self._wanted, data) :]

    def give_back(self) -> None:
        """Let the room be filled again whose files `group` returned last."""
        self._emptied += 1
        if self._emptied == _ROOMS_BACK:
            os.write(self._free, bytes(_ROOMS_BACK))
            self._emptied = 0

    def group(self) -> list[FileRead | None]:
        """Return the next files, last first; none if the process is dead."""
        said = _receive(self._full, _LENGTH.size)
        if not said:
            return []
        room = self._rooms[self._turn]
        self._turn = (self._turn + 1) % _ROOMS
        (count,) = _LENGTH.unpack(said)
        found: list[FileRead | None] = []
        at = _DATA_AT
        for size, *rest in _FILE.iter_unpack(room[: _FILE.size * count]):
            if size < 0:
                found.append(None)
            else:
                found.append(FileRead(room[at : at + size], *rest))
                at += size
        found.reverse()
        return found

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)  # it has nothing to lose
        os.waitpid(self._pid, 0)
        for file in (self._wanted, self._free, self._full):
            os.close(file)


def _rooms() -> list[memoryview]:
    """Return the rooms, in memory that a child shares."""
    memory = memoryview(mmap.mmap(-1, _ROOM_BYTES * _ROOMS))
    return [memory[at : at + _ROOM_BYTES] for at in range(0, len(memory), _ROOM_BYTES)]


# -- in the process that reads --------------------------------------------------------------------------------


def _keep_only(*files: int) -> None:
    """Close all that was inherited but standard input and outputs and *files*."""
    start = 3
    for file in (*sorted(files), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, file)
        start = file + 1


def _receive(file: int, size: int) -> bytes:
    """Return *size* bytes from a pipe, nothing if nobody writes to it any more."""
    parts = []
    while size:
        part = os.read(file, size)
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _serve(wanted: int, free: int, full: int, rooms: list[memoryview], is_plain: Callable[[int], bool]) -> None:
    """Read what is asked for until nobody asks any more."""
    turn = 0
    while head := _receive(wanted, _LENGTH.size):
        path, *names = _receive(wanted, *_LENGTH.unpack(head)).split(b"\0")
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            directory = -1  # nothing is found in that
        done = 0
        while done < len(names) and os.read(free, 1):
            count = _fill(rooms[turn], directory, names[done : done + IMAGES_AT_ONCE], is_plain)
            os.write(full, _LENGTH.pack(count))
            turn = (turn + 1) % _ROOMS
            done += count
        if directory >= 0:
            os.close(directory)


def _fill(room: memoryview, directory: int, names: Sequence[bytes], is_plain: Callable[[int], bool]) -> int:
    """Read the first of *names* that there is place for; return how many, those that cannot be read too."""
    rows = []
    at, end = _DATA_AT, _DATA_AT + GROUP_BYTES
    for name in names:
        row = _read(directory, name, room, at, is_plain)
        rows.append(row)
        if row is not _NOT_READ:
            at += _FILE.unpack(row)[0]
            if at >= end:
                break
    data = b"".join(rows)
    room[: len(data)] = data
    return len(rows)


def _read(directory: int, name: bytes, room: memoryview, at: int, is_plain: Callable[[int], bool]) -> bytes:
    """Read the file to *at* in *room*, if it is one for an append of many; return its row."""
    try:
        file = os.open(name, _FLAGS, dir_fd=directory)
    except OSError:
        return _NOT_READ
    try:
        status = os.fstat(file)
        mode, size = status.st_mode, status.st_size
        if not stat.S_ISREG(mode) or status.st_nlink > 1 or size > SMALL_BYTES or not is_plain(file):
            return _NOT_READ
        data = read_into(file, room[at : at + size])
        return _FILE.pack(len(data), mode, status.st_uid, status.st_gid, storable_ns(status.st_mtime_ns))
    except OSError:
        return _NOT_READ
    finally:
        os.close(file)
