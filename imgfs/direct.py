"""Reads files from the disk itself, past the page cache, and not faster than it is told to.

Owns the few MiB it has read last. Must not know what the bytes mean. Bytes that the disk cannot read come as a pattern
that nothing written has, so that whoever verifies them finds them wrong; `unreadable` says where they are.

*Concurrency:* none; one thread reads.
"""

import errno
import fcntl
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable

from imgfs.disk import Disk

# Read at once: long runs for the disk, and a MiB of an image touches two of them at most.
_WINDOW_BYTES = 1 << 20
_WINDOWS_MAX = 4  # the footer of a large image is read before its data
# O_DIRECT wants offsets, sizes and buffers aligned to what the disk reads at once; no disk has more than this.
BLOCK_BYTES = 4096
UNREADABLE = b"\xde\xad" * (BLOCK_BYTES // 2)


class RateLimit:
    """Lets so many bytes through in a second; waits for the rest."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """*bytes_per_s*: 0 means as fast as it goes."""
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    def take(self, size: int) -> None:
        """Note that *size* bytes were read, and wait until the next ones may be."""
        if not self._bytes_per_s:
            return
        now = self._clock()
        # What was not used while somebody else had the processor is not made up for: that would be a burst.
        self._free_at = max(self._free_at, now) + size / self._bytes_per_s
        self._sleep(self._free_at - now)


class DirectDisk(Disk):
    """A disk whose files are read past the page cache; with files that are open for writing it does as `Disk`."""

    def __init__(self, limit: RateLimit | None = None) -> None:
        super().__init__()
        self._limit = limit or RateLimit(0)
        self._cached: set[int] = set()  # files that the file system reads through the page cache only
        self._windows: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._paths: dict[int, str] = {}
        self.unreadable: list[tuple[str, int]] = []
        """Path and offset of each 4 KiB that the disk could not read."""

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        if writable or create or exclusive:
            return super().open(path, writable=writable, create=create, exclusive=exclusive)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            file = super().open(path)
            self._cached.add(file)
        self._paths[file] = path
        return file

    def close(self, file: int) -> None:
        super().close(file)
        self._cached.discard(file)
        self._paths.pop(file, None)
        for key in [key for key in self._windows if key[0] == file]:
            del self._windows[key]

    def read(self, file: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        if file not in self._paths:
            return super().read(file, offset, size, nowait=nowait)
        parts = []
        while size > 0:
            number, at = divmod(offset, _WINDOW_BYTES)
            part = self._window(file, number, min(at + size, _WINDOW_BYTES))[at : at + size]
            parts.append(part)
            if not part or at + len(part) < _WINDOW_BYTES:
                break
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _window(self, file: int, number: int, wanted: int) -> bytes:
        """Return a window of *file*: *wanted* bytes of it at least, if the file has them by now."""
        key = (file, number)
        found = self._windows.get(key)
        if found is not None and len(found) >= min(wanted, self.size(file) - number * _WINDOW_BYTES):
            self._windows.move_to_end(key)
            return found
        data = self._windows[key] = self._load(file, number * _WINDOW_BYTES)
        if len(self._windows) > _WINDOWS_MAX:
            self._windows.popitem(last=False)
        return data

    def _load(self, file: int, start: int) -> bytes:
        if file in self._cached:
            self._drop(file, start)  # else it would be memory that is verified
        try:
            data = self._pread(file, start, _WINDOW_BYTES)
        except OSError as error:
            if error.errno == errno.EINVAL and file not in self._cached:
                # There are file systems that refuse it only here.
                fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._cached.add(file)
                return self._load(file, start)
            if error.errno != errno.EIO:
                raise
            data = self._blocks(file, start)
        if file in self._cached:
            self._drop(file, start)
        self._limit.take(len(data))
        return data

    def _blocks(self, file: int, start: int) -> bytes:
        """Return what can be read of a window, a block at a time."""
        parts = []
        for at in range(start, min(start + _WINDOW_BYTES, self.size(file)), BLOCK_BYTES):
            size = min(BLOCK_BYTES, self.size(file) - at)
            try:
                parts.append(self._pread(file, at, BLOCK_BYTES)[:size])
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.unreadable.append((self._paths[file], at))
                parts.append(UNREADABLE[:size])
        return b"".join(parts)

    def _pread(self, file: int, start: int, size: int) -> bytes:
        """Return up to *size* bytes at *start*, both multiples of a block."""
        with mmap.mmap(-1, size) as buffer:  # lies at the start of a page, as O_DIRECT wants it
            done = 0
            while done < size:
                with memoryview(buffer) as view, view[done:] as rest:
                    count = os.preadv(file, [rest], start + done)
                done += count
                if not count or done % BLOCK_BYTES:
                    break  # the end of the file
            return buffer[:done]

    @staticmethod
    def _drop(file: int, start: int) -> None:
        os.posix_fadvise(file, start, _WINDOW_BYTES, os.POSIX_FADV_DONTNEED)
