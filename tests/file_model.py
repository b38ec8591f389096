"""A model of one image that many handles and a mapping read and write: pages of bytes, and zeros between them.

Owns the steps and what must come of them. Must not know who chooses the steps.

*Concurrency:* none.
"""

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from exerciser import Pair, Step, both, pick

PAGE_BYTES = 4096
# Around the sizes at which something changes: a page, what the kernel asks for at once, what is copied on the loop.
SIZES = (1, 100, 511, 4095, 4096, 4097, 12_288, 65_536, 131_072, 131_073, 262_145)
# Most steps happen below this; some reach out to where an image has MiBs that are verified one by one.
REACH_BYTES = 140_000
FAR_BYTES = 5 << 20
PATTERN_BYTES = 300_000
HANDLES_MAX = 5
# open(2)'s flags. XFS takes only aligned requests with O_DIRECT, so beside the mount it is left out.
KINDS = {
    "rw": os.O_RDWR,
    "append": os.O_RDWR | os.O_APPEND,
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "direct": os.O_RDWR | os.O_DIRECT,
}
# Every mode of fallocate(2) that keeps what is in the file, and the others.
FALLOCATE_MODES = (0x00, 0x01, 0x03, 0x08, 0x10, 0x11, 0x20, 0x40)
_libc = ctypes.CDLL(None, use_errno=True)


class SparseBytes:
    """The bytes of a file of any size, of which few are not zero."""

    def __init__(self) -> None:
        self.size = 0
        self._pages: dict[int, bytearray] = {}

    def read(self, offset: int, size: int) -> bytes:
        end = min(self.size, offset + size)
        parts = []
        while offset < end:
            number, start = divmod(offset, PAGE_BYTES)
            stop = min(PAGE_BYTES, start + end - offset)
            page = self._pages.get(number)
            parts.append(bytes(stop - start) if page is None else page[start:stop])
            offset += stop - start
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        if not data:
            return
        self.size = max(self.size, offset + len(data))
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, PAGE_BYTES)
            piece = data[at : at + PAGE_BYTES - start]
            page = self._pages.setdefault(number, bytearray(PAGE_BYTES))
            page[start : start + len(piece)] = piece
            at += len(piece)

    def resize(self, size: int) -> None:
        number, start = divmod(size, PAGE_BYTES)
        if size < self.size:
            for gone in [page for page in self._pages if page >= number + bool(start)]:
                del self._pages[gone]
            if start and (page := self._pages.get(number)) is not None:
                page[start:] = bytes(PAGE_BYTES - start)
        self.size = size


class Handle(NamedTuple):
    kind: str
    files: Pair[int]

    @property
    def reads(self) -> bool:
        return self.kind != "write"

    @property
    def writes(self) -> bool:
        return self.kind != "read"


class FileModel:
    """One image."""

    STEPS: ClassVar[Sequence[str]] = (
        *("write",) * 8,
        *("read",) * 6,
        *("append", "cut", "copy", "poke") * 3,
        *("open", "close", "peek", "sync", "copy_within", "map") * 2,
        *("cut_to_nothing", "msync", "unmap", "allocate", "refuse_to_allocate", "seek", "forget", "look"),
    )

    def __init__(self, directories: Pair[Path]) -> None:
        self._paths = Pair(directories.mount / "image", directories.twin / "image")
        self._content = SparseBytes()
        self._handles: list[Handle] = []
        self._mappings: Pair[mmap.mmap] | None = None
        self._pattern = random.Random(0).randbytes(PATTERN_BYTES)
        for directory in directories:
            (directory / "pattern").write_bytes(self._pattern)
        pair = both(lambda path: os.open(path / "pattern", os.O_RDONLY), directories, same=False)
        assert pair is not None
        self._patterns = Handle("read", pair)
        self._open("rw", os.O_CREAT | os.O_EXCL)
        self._taken = 0

    def take(self, step: Step) -> None:
        self._taken += 1
        if not self._handles:
            self.open(step)
        method: Callable[[Step], None] = getattr(self, step.name)
        method(step)
        sizes = both(lambda path: os.stat(path).st_size, self._paths)
        assert sizes == (self._content.size, self._content.size)

    def check(self) -> None:
        if self._mappings is not None:
            # What is written back only later moves the time then: a reader's close no longer sees to it.
            self._mappings.mount.flush()
        expected = self._content.read(0, self._content.size)
        assert self._paths.mount.read_bytes() == expected
        assert self._paths.twin.read_bytes() == expected
        status = self._paths.mount.stat()
        for handle in self._handles:
            now = os.fstat(handle.files.mount)
            assert (now.st_ino, now.st_size, now.st_mtime_ns) == (status.st_ino, len(expected), status.st_mtime_ns)
            if handle.reads:
                assert os.pread(handle.files.mount, len(expected) + 1, 0) == expected

    def let_go(self) -> None:
        self._close_all()
        self.unmap(None)
        if self._patterns.files.mount >= 0:
            both(os.close, self._patterns.files)
        self._patterns = Handle("read", Pair(-1, -1))

    # -- handles ----------------------------------------------------------------------------------------------

    def open(self, step: Step) -> None:
        if len(self._handles) >= HANDLES_MAX:
            self.close(step)
        self._open(pick(list(KINDS), step.a), 0)

    def _open(self, kind: str, flags: int) -> None:
        flags |= KINDS[kind]
        pair = both(os.open, self._paths, Pair(flags, flags & ~os.O_DIRECT), same=False)
        assert pair is not None
        self._handles.append(Handle(kind, pair))

    def close(self, step: Step) -> None:
        both(os.close, self._handles.pop(step.a % len(self._handles)).files)

    def _close_all(self) -> None:
        while self._handles:
            both(os.close, self._handles.pop().files)

    def cut_to_nothing(self, step: Step) -> None:
        """Open with O_TRUNC."""
        if len(self._handles) >= HANDLES_MAX:
            self.close(step)
        self._open("rw", os.O_TRUNC)
        self._content.resize(0)

    # -- bytes ------------------------------------------------------------------------------------------------

    def write(self, step: Step) -> None:
        handle = pick(self._handles, step.a)
        data, offset = self._data(step.b), self._offset(step.c)
        cut = step.a % len(data)
        parts = [data[:cut], data[cut:]] if step.b % 3 else [data]
        written = both(lambda file: os.pwritev(file, parts, offset), handle.files)
        assert (written is not None) == handle.writes
        if written is not None:
            assert written.mount == len(data)
            # On Linux a write to an O_APPEND descriptor appends, wherever it should go.
            self._content.write(self._content.size if handle.kind == "append" else offset, data)

    def append(self, step: Step) -> None:
        data = self._data(step.b)
        with open(self._paths.mount, "ab", buffering=0) as mount, open(self._paths.twin, "ab", buffering=0) as twin:
            written = both(lambda file: file.write(data), Pair(mount, twin))
        assert written is not None
        assert written.mount == len(data)
        self._content.write(self._content.size, data)

    def read(self, step: Step) -> None:
        handle = pick(self._handles, step.a)
        size, offset = pick(SIZES, step.b), self._offset(step.c)
        found = both(lambda file: os.pread(file, size, offset), handle.files)
        assert (found is not None) == handle.reads
        if found is not None:
            assert found.mount == self._content.read(offset, size)

    def cut(self, step: Step) -> None:
        """Cut or extend."""
        handle, size = pick(self._handles, step.a), self._offset(step.c)
        if step.b % 2:
            both(lambda path: os.truncate(path, size), self._paths)
        elif both(lambda file: os.ftruncate(file, size), handle.files) is None:
            assert not handle.writes
            return
        self._content.resize(size)

    def copy(self, step: Step) -> None:
        """copy_file_range from another image."""
        handle = pick(self._handles, step.a)
        start, size = step.b % PATTERN_BYTES, pick(SIZES, step.b)
        self._copy(self._patterns, handle, start, self._offset(step.c), min(size, PATTERN_BYTES - start), self._pattern)

    def copy_within(self, step: Step) -> None:
        """copy_file_range from the image to itself, which may not overlap."""
        source, target = pick(self._handles, step.a), pick(self._handles, step.b)
        start, size = self._offset(step.b), pick(SIZES, step.a)
        size = max(0, min(size, self._content.size - start))
        self._copy(source, target, start, self._offset(step.c), size, None)

    def _copy(self, source: Handle, target: Handle, start: int, offset: int, size: int, data: bytes | None) -> None:
        def copy(source: int, target: int) -> int:
            done = 0
            while done < size:
                some = os.copy_file_range(source, target, size - done, start + done, offset + done)
                if not some:
                    break
                done += some
            return done

        done = both(copy, source.files, target.files)
        if done is not None:
            assert done.mount == size
            copied = self._content.read(start, size) if data is None else data[start : start + size]
            self._content.write(offset, copied)

    def allocate(self, step: Step) -> None:
        """posix_fallocate, which the C library does by writing zeros where the file system cannot."""
        offset, size = self._offset(step.c), pick(SIZES, step.b)
        for handle in [handle for handle in self._handles if handle.kind in ("rw", "direct")][:1]:
            both(lambda file: os.posix_fallocate(file, offset, size), handle.files)
            self._content.resize(max(self._content.size, offset + size))

    def refuse_to_allocate(self, step: Step) -> None:
        """fallocate in each of its modes is refused, and changes nothing."""
        for handle in [handle for handle in self._handles if handle.writes][:1]:
            offset, size = ctypes.c_int64(pick(SIZES, step.b)), ctypes.c_int64(PAGE_BYTES)
            assert _libc.fallocate(handle.files.mount, pick(FALLOCATE_MODES, step.a), offset, size) == -1
            assert ctypes.get_errno() == errno.EOPNOTSUPP

    # -- the mapping ------------------------------------------------------------------------------------------

    def map(self, step: Step) -> None:
        """Have what is there now in a shared mapping, whatever becomes of the handle."""
        handle = pick(self._handles, step.a)
        if self._content.size and handle.kind not in ("read", "write"):
            self.unmap(step)
            size = self._content.size
            self._mappings = both(lambda file: mmap.mmap(file, size), handle.files, same=False)

    def _mapped(self, step: Step) -> tuple[Pair[mmap.mmap], int, int] | None:
        """Return the mapping and which part of it to use: behind the end of the file would be SIGBUS."""
        if self._mappings is None:
            self.map(step)
        end = min(self._content.size, len(self._mappings.mount)) if self._mappings else 0
        if self._mappings is None or not end:
            return None
        offset = self._offset(step.c) % end
        return self._mappings, offset, min(pick(SIZES, step.b), end - offset)

    def poke(self, step: Step) -> None:
        if (mapped := self._mapped(step)) is not None:
            mappings, offset, size = mapped
            data = self._data(step.b)[:size]
            for mapping in mappings:
                mapping[offset : offset + len(data)] = data
            self._content.write(offset, data)

    def peek(self, step: Step) -> None:
        if (mapped := self._mapped(step)) is not None:
            mappings, offset, size = mapped
            assert mappings.mount[offset : offset + size] == self._content.read(offset, size)

    def msync(self, step: Step) -> None:
        if self._mappings is not None:
            both(lambda mapping: mapping.flush(), self._mappings)

    def unmap(self, step: Step | None) -> None:
        if self._mappings is not None:
            both(lambda mapping: mapping.close(), self._mappings)
            self._mappings = None

    # -- looking, and what must change nothing ----------------------------------------------------------------

    def sync(self, step: Step) -> None:
        both(pick((os.fsync, os.fdatasync), step.b), pick(self._handles, step.a).files)

    def forget(self, step: Step) -> None:
        """Let the kernel drop pages, or names and attributes."""
        if step.b % 8:
            both(lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED), pick(self._handles, step.a).files)
        else:
            Path("/proc/sys/vm/drop_caches").write_text("2")

    def look(self, step: Step) -> None:
        self.check()

    def seek(self, step: Step) -> None:
        """What SEEK_DATA passes over is zeros, and SEEK_HOLE ends at the end."""
        file = pick(self._handles, step.a).files.mount
        at, size = 0, self._content.size
        while at < size:
            data = _seek(file, at, os.SEEK_DATA)
            assert not any(self._content.read(at, (size if data is None else data) - at))
            if data is None:
                break
            assert at <= data < size
            at = os.lseek(file, data, os.SEEK_HOLE)
            assert data < at <= size
        assert _seek(file, size, os.SEEK_DATA) is _seek(file, size, os.SEEK_HOLE) is None
        assert os.lseek(file, 0, os.SEEK_END) == size

    def _data(self, number: int) -> bytes:
        return random.Random(self._taken * 31 + number).randbytes(pick(SIZES, number))

    def _offset(self, number: int) -> int:
        """Return a place near the start, at a page, at the end, or seldom far out."""
        number, how = divmod(number, 128)
        if how == 0:
            return number * 640 % FAR_BYTES
        if how <= 24:
            return number % (REACH_BYTES // PAGE_BYTES) * PAGE_BYTES
        if how <= 32:
            return min(self._content.size, REACH_BYTES)
        return number * 24 % REACH_BYTES + how


def _seek(file: int, offset: int, how: int) -> int | None:
    try:
        return os.lseek(file, offset, how)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None  # there is no more
        raise
