"""A disk in memory whose power can be cut before any step, and that can fail, fill up, and be damaged.

Owns open files, locks, and the count of steps; `survivors` says what is durable and what is left after a cut. `sync`
makes content and length of a file durable, never its name; `sync_directory` the names in it, never content. Must not
know what the bytes mean. Harsher than real: holes count as used space, a directory cannot be opened, no descriptor is
used twice. Paths start at the root and hold no `..`.

*Concurrency:* none; one thread at a time.
"""

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from survivors import NAME_BYTES_MAX, Directory, File, Operation, Survivor, Tree, os_error, random_survivor

from imgfs.disk import Buffer, Disk, WouldBlock

_BLOCK_BYTES = 512
_HOLE_BYTES = 4096
_ENDLESS_BYTES = 1 << 31  # less than what a log takes for plenty, so that it asks at every change


class PowerCut(BaseException):
    """The power went off; no `except Exception` may carry on after it."""


@dataclass(eq=False)
class _Open:
    """An open file; several descriptors may stand for it, and it is it that holds a lock."""

    file: File
    path: str
    writable: bool


@dataclass
class _Fault:
    method: str
    number: int
    after: int
    times: int
    written: int


def _is_below(path: str, directory: str) -> bool:
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(directory), ""))


class SimulatedDisk(Disk):
    """A file system in memory that knows what of it is durable; at first `/` is all there is.

    Attributes:
        trace: what each step did. A step is a call that changed something; `cut_at = n` prevents that of `trace[n]`.
        cut_at: the power goes off before the step of this number, counted from 0; then every call raises PowerCut.
        cut_written: if that step is a write, so many of its bytes still get to the page cache (as when killed in it).
        before_step: called with the description of each step before it happens; may copy the disk, not change it.
        capacity_bytes: what would let the sum of all lengths exceed it fails with ENOSPC; None: no limit.
        cold: nothing is in the page cache, so a read that may not wait raises WouldBlock.
        shares_blocks: files can be cloned.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        super().__init__()
        self.trace: list[str] = []
        self.cut_at: int | None = None
        self.cut_written = 0
        self.before_step: Callable[[str], object] | None = None
        self.capacity_bytes = capacity_bytes
        self.cold = False
        self.shares_blocks = True
        self._dead = False
        self._faults: list[_Fault] = []
        self._tree = Tree()
        self._open: dict[int, _Open] = {}  # by descriptor; none is used twice
        self._locks: dict[File, _Open] = {}
        self._descriptor = 2

    # -- for the test -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return len(self.trace)

    def fail_next(self, method: str, number: int, *, after: int = 0, times: int = 1, written: int = 0) -> None:
        """Let *method*, once it was called *after* times, raise OSError *number*; a write gets *written* bytes far."""
        self._faults.append(_Fault(method, number, after, times, written))

    def paths(self) -> list[str]:
        """Return the paths of all files, sorted."""
        return sorted(path for path, _ in self._tree.files())

    def unsynced_bytes(self, path: str) -> int:
        """Return the size from which on `prefix` keeps all of the file at *path*."""
        return self._tree.file(path).unsynced_bytes()

    def content(self, path: str) -> bytes:
        return bytes(self._tree.file(path).data)

    def set_content(self, path: str, data: bytes) -> None:
        """Give the file at *path*, made if need be, durable content; the names in its directory become durable."""
        slot = self._tree.parent(path)
        if self._tree.get(path) is None:
            self._tree.change({slot: File(bytearray())})
        self._tree.file(path).reset(data)
        self._tree.settle(slot[0])

    def flip(self, path: str, offset: int, mask: int = 0xFF) -> None:
        """Damage one byte wherever it is kept; a negative *offset* counts from the end."""
        self._tree.file(path).flip(offset, mask)

    def remove(self, path: str) -> None:
        """Remove the file or directory at *path*; the names in its directory become durable."""
        self._tree.find(path)
        slot = self._tree.parent(path)
        self._tree.change({slot: None})
        self._tree.settle(slot[0])

    def copy(self) -> "SimulatedDisk":
        """Return the same disk at the same moment: open files, locks, trace and faults too, but not `before_step`."""
        disk = SimulatedDisk(self.capacity_bytes)
        disk.trace, disk.cut_at, disk.cut_written = self.trace.copy(), self.cut_at, self.cut_written
        disk.cold, disk.shares_blocks, disk._dead = self.cold, self.shares_blocks, self._dead
        disk._faults = [replace(fault) for fault in self._faults]
        twins = {each: replace(each) for each in self._open.values()}
        disk._tree, files = self._tree.copy(each.file for each in twins)
        for twin, file in zip(twins.values(), files, strict=True):
            twin.file = file
        disk._open = {number: twins[opened] for number, opened in self._open.items()}
        disk._locks = {twins[holder].file: twins[holder] for holder in self._locks.values()}
        disk._descriptor = self._descriptor
        return disk

    def after_kill(self) -> "SimulatedDisk":
        """Return the disk as the next process finds it when this one died but the machine did not."""
        disk = self.copy()
        disk.trace, disk.cut_at, disk.cut_written, disk._dead = [], None, 0, False
        disk._faults, disk._open, disk._locks = [], {}, {}
        return disk

    def after_power_cut(self, choice: Survivor | Random) -> "SimulatedDisk":
        """Return the disk as found if the power goes off now, or went off at `cut_at`; all that is on it is durable."""
        disk = SimulatedDisk(self.capacity_bytes)
        disk.cold, disk.shares_blocks = self.cold, self.shares_blocks
        disk._tree = self._tree.survive(random_survivor(choice) if isinstance(choice, Random) else choice)
        return disk

    # -- below the calls --------------------------------------------------------------------------------------

    def _fault(self, method: str) -> _Fault | None:
        if self._dead:
            raise PowerCut("the power is off")
        for fault in self._faults:
            if fault.method == method and fault.times:
                if not fault.after:
                    fault.times -= 1
                    return fault
                fault.after -= 1
        return None

    def _call(self, method: str, *paths: str) -> None:
        if fault := self._fault(method):
            raise os_error(fault.number, *paths)

    def _step(self, what: str) -> None:
        if self.cut_at is not None and self.steps >= self.cut_at:
            self._dead = True
            raise PowerCut(f"before step {self.steps}: {what}")
        if self.before_step:
            self.before_step(what)
        self.trace.append(what)

    def _opened(self, file: int) -> _Open:
        if file not in self._open:
            raise os_error(errno.EBADF)
        return self._open[file]

    def _used_bytes(self) -> int:
        unlinked = {each.file for each in self._open.values()}
        return sum(len(file.data) for file in unlinked.union(file for _, file in self._tree.files()))

    def _room(self, file: File, size: int) -> int:
        """Return how long *file* may become when it is asked to become *size* bytes long."""
        if self.capacity_bytes is None or size <= len(file.data):
            return size
        return min(size, len(file.data) + max(0, self.capacity_bytes - self._used_bytes()))

    # -- the calls of Disk ------------------------------------------------------------------------------------

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        self._call("open", path)
        if create and self._tree.get(path) is None:
            self._create(path)
        elif create and exclusive:
            raise os_error(errno.EEXIST, path)
        return self._hand_out(_Open(self._tree.file(path), path, writable))

    def _create(self, path: str) -> None:
        self._step(f"create {path}")
        self._tree.change({self._tree.parent(path): File(bytearray())})

    def _hand_out(self, opened: _Open) -> int:
        self._descriptor += 1
        self._open[self._descriptor] = opened
        return self._descriptor

    def close(self, file: int) -> None:
        self._call("close")
        opened = self._opened(file)
        del self._open[file]
        if self._locks.get(opened.file) is opened and opened not in self._open.values():
            del self._locks[opened.file]

    def duplicate(self, file: int) -> int:
        self._call("duplicate")
        return self._hand_out(self._opened(file))

    def size(self, file: int) -> int:
        self._call("size")
        return len(self._opened(file).file.data)

    def read(self, file: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        self._call("read")
        if offset < 0 or size < 0:
            raise os_error(errno.EINVAL)
        data = self._opened(file).file.data
        if nowait and self.cold and size and offset < len(data):
            raise WouldBlock
        return bytes(data[offset : offset + size])

    def read_resident(self, file: int, offset: int, size: int) -> bytearray:
        return bytearray(self.read(file, offset, size, nowait=True))

    def read_into(self, file: int, offset: int, buffer: memoryview) -> int:
        data = self.read(file, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, file: int, offset: int, buffers: Sequence[Buffer]) -> None:
        fault = self._fault("write")
        data = b"".join(buffers)
        if not data and not fault:
            return
        opened = self._opened(file)
        if not opened.writable or offset < 0:
            raise os_error(errno.EINVAL if opened.writable else errno.EBADF)
        wanted = min(len(data), fault.written) if fault else len(data)
        written = max(0, self._room(opened.file, offset + wanted) - offset)
        if written:
            try:
                self._step(f"write {opened.path} {offset}+{written}")
            except PowerCut:
                if self.cut_written:
                    opened.file.apply(Operation(offset, data[: min(written, self.cut_written)]))
                raise
            opened.file.apply(Operation(offset, data[:written]))
        if fault or written < len(data):
            raise os_error(fault.number if fault else errno.ENOSPC)

    def truncate(self, file: int, size: int) -> None:
        self._call("truncate")
        if size < 0 or not self._opened(file).writable:
            raise os_error(errno.EINVAL)
        opened = self._opened(file)
        if self._room(opened.file, size) < size:
            raise os_error(errno.ENOSPC)
        self._step(f"truncate {opened.path} {size}")
        opened.file.apply(Operation(size, None))

    def sync(self, file: int) -> None:
        fault = self._fault("sync")
        opened = self._opened(file)
        self._step(f"sync {opened.path}" + (" fails" if fault else ""))
        opened.file.sync(fails=fault is not None)
        if fault:
            raise os_error(fault.number)

    def next_hole(self, file: int, offset: int) -> int:
        # What is all zeros counts as a hole, as a copy of the file may have one there.
        data = self._opened(file).file.data
        for start in range(-(-offset // _HOLE_BYTES) * _HOLE_BYTES, len(data) - _HOLE_BYTES + 1, _HOLE_BYTES):
            if not any(data[start : start + _HOLE_BYTES]):
                return start
        return len(data)

    def next_data(self, file: int, offset: int) -> int:
        data = self._opened(file).file.data
        while offset < len(data):
            start = offset // _HOLE_BYTES * _HOLE_BYTES
            block = data[start : start + _HOLE_BYTES]
            if len(block) < _HOLE_BYTES or any(block):
                return offset
            offset = start + _HOLE_BYTES
        return len(data)

    def prefetch(self, file: int, offset: int, size: int) -> None:
        self._call("prefetch")
        self._opened(file)

    def hint_extent_size(self, file: int, size: int) -> bool:
        self._call("hint_extent_size")
        return False

    def punch(self, file: int, offset: int, size: int) -> bool:
        self._call("punch")
        opened = self._opened(file)
        size = min(size, len(opened.file.data) - offset)
        self._step(f"punch {opened.path} {offset}+{size}")
        opened.file.apply(Operation(offset, bytes(size), punched=True))
        return True

    def clone(self, source: int, target: int) -> bool:
        self._call("clone")
        if not self.shares_blocks:
            return False
        opened, data = self._opened(target), bytes(self._opened(source).file.data)
        assert opened.writable, "a file that may not be written"
        assert not opened.file.data, "a file that is not empty"
        if self._room(opened.file, len(data)) < len(data):
            raise os_error(errno.ENOSPC)
        self._step(f"clone {self._opened(source).path} {opened.path}")
        opened.file.apply(Operation(0, data))
        return True

    def allocated_bytes(self, file: int) -> int:
        return self.size(file)

    def copy_times(self, source: int, target: int) -> None:
        self._call("copy_times")
        assert {source, target} <= self._open.keys()

    def names(self, directory: str) -> list[str]:
        self._call("names", directory)
        return sorted(self._tree.directory(directory).names)

    def exists(self, path: str) -> bool:
        self._call("exists", path)
        try:
            self._tree.find(path)
        except OSError:
            return False
        return True

    def mkdir(self, path: str) -> None:
        self._call("mkdir", path)
        if self._tree.get(path) is not None:
            raise os_error(errno.EEXIST, path)
        self._step(f"mkdir {path}")
        self._tree.change({self._tree.parent(path): Directory({})})

    def rmdir(self, path: str) -> None:
        self._call("rmdir", path)
        if self._tree.directory(path).names:
            raise os_error(errno.ENOTEMPTY, path)
        self._step(f"rmdir {path}")
        self._tree.change({self._tree.parent(path): None})

    def copy_owner(self, source: str, target: str) -> None:
        self._call("copy_owner", source, target)
        self._tree.find(source)
        self._tree.find(target)

    def rename(self, source: str, target: str) -> None:
        self._call("rename", source, target)
        old, new = self._tree.parent(source, source, target), self._tree.parent(target, source, target)
        node = self._tree.get(source, source, target)
        if node is None:
            raise os_error(errno.ENOENT, source, target)
        replaced = self._tree.get(target, source, target)
        if node is replaced:
            return
        if _is_below(target, source):
            raise os_error(errno.EINVAL, source, target)
        if isinstance(replaced, Directory) and isinstance(node, File) and not _is_below(source, target):
            raise os_error(errno.EISDIR, source, target)
        if isinstance(replaced, Directory) and replaced.names:
            raise os_error(errno.ENOTEMPTY, source, target)
        if isinstance(replaced, File) and isinstance(node, Directory):
            raise os_error(errno.ENOTDIR, source, target)
        self._step(f"rename {source} {target}")
        self._tree.change({old: None, new: node})

    def unlink(self, path: str) -> None:
        self._call("unlink", path)
        self._tree.file(path)
        self._step(f"unlink {path}")
        self._tree.change({self._tree.parent(path): None})

    def sync_directory(self, path: str) -> None:
        self._call("sync_directory", path)
        directory = self._tree.directory(path)
        self._step(f"sync directory {path}")
        self._tree.settle(directory)

    def space(self, path: str) -> os.statvfs_result:
        self._call("space", path)
        self._tree.find(path)
        total = (_ENDLESS_BYTES if self.capacity_bytes is None else self.capacity_bytes) // _BLOCK_BYTES
        free = max(0, total - -(-self._used_bytes() // _BLOCK_BYTES))
        return os.statvfs_result((_BLOCK_BYTES, _BLOCK_BYTES, total, free, free, 0, 0, 0, 0, NAME_BYTES_MAX))

    def lock(self, path: str) -> int | None:
        self._call("lock", path)
        if self._tree.get(path) is None:
            self._create(path)
        opened = _Open(self._tree.file(path), path, True)
        return self._hand_out(opened) if self._locks.setdefault(opened.file, opened) is opened else None

    def lock_directory(self, path: str) -> int | None:
        self._call("lock_directory", path)
        self._tree.directory(path)
        return self._hand_out(_Open(File(bytearray()), path, False))  # nobody else is there

    def is_locked(self, file: int) -> bool:
        self._call("is_locked")
        opened = self._opened(file)
        if self._locks.get(opened.file) is opened:
            del self._locks[opened.file]  # asking for a shared lock and letting go of it costs the holder its own
        return opened.file in self._locks
