"""Every call to the file system below the store goes through this module, so that tests can cut the power before any.

Owns nothing but the descriptors it hands out. Must not know what the bytes mean.

*Concurrency:* a `Disk` holds no state but what it has learned of the kernel; a file may be used from several
threads at once, each call with its own offset.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence

Buffer = bytes | bytearray | memoryview

# struct fsxattr of linux/fs.h: xflags, extsize, nextents, projid, cowextsize, 8 bytes of padding.
_FSXATTR = struct.Struct("<IIIII8x")
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x800
# _IOW(0x94, 9, int) of linux/fs.h, and what it fails with where two files cannot share blocks.
_FICLONE = 0x40049409
_CANNOT_SHARE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
# One read returns at most this much; the kernel itself stops a little below 2 GiB.
_READ_BYTES_MAX = 1 << 30
# More buffers than this the kernel does not take in one call.
_IOV_MAX = 1024
_ZEROS_READ_BYTES = 1 << 20


class WouldBlock(Exception):
    """The bytes are not in memory; ask again from a thread that may wait for the disk."""


_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE, which needs FALLOC_FL_KEEP_SIZE


class Disk:
    """The file system the store lies on; paths are those of the process, files are descriptors."""

    def __init__(self) -> None:
        self._nowait_flag = getattr(os, "RWF_NOWAIT", 0)

    # -- files ------------------------------------------------------------------------------------------------

    def open(self, path: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        """Open the file at *path* and return its descriptor; *exclusive* makes an existing file an error."""
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        return os.open(path, flags, 0o600)

    def close(self, file: int) -> None:
        os.close(file)

    def read_file(self, path: str) -> bytes:
        """Return all of the file at *path*."""
        file = self.open(path)
        try:
            return self.read(file, 0, self.size(file))
        finally:
            self.close(file)

    def duplicate(self, file: int) -> int:
        """Return another descriptor of the same open file."""
        return os.dup(file)

    def size(self, file: int) -> int:
        """Return the length of *file* in bytes."""
        return os.fstat(file).st_size

    def next_hole(self, file: int, offset: int) -> int:
        """Return where at or behind *offset* a hole begins; the size of *file* if nowhere, or if nobody can tell."""
        try:
            return os.lseek(file, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return os.fstat(file).st_size

    def read(self, file: int, offset: int, size: int, *, nowait: bool = False) -> bytes:
        """Return up to *size* bytes at *offset*; fewer only where the file ends.

        Raises:
            WouldBlock: *nowait* is set and some of the bytes would have to come from the disk.
        """
        if nowait and self._nowait_flag:
            return bytes(self.read_resident(file, offset, size))
        data = os.pread(file, min(size, _READ_BYTES_MAX), offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        done = len(data)
        while done < size:
            data = os.pread(file, min(size - done, _READ_BYTES_MAX), offset + done)
            if not data:
                break
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def content_end(self, file: int, start: int, end: int) -> int:
        """Return where between *start* and *end* nothing but zeros follows; *start* if there is nothing else."""
        while end > start:
            position = max(start, end - _ZEROS_READ_BYTES)
            content = self.read(file, position, end - position).rstrip(b"\0")
            if content:
                return position + len(content)
            end = position
        return start

    def read_into(self, file: int, offset: int, buffer: memoryview) -> int:
        """Fill *buffer* with what stands at *offset*; return how many bytes, fewer only where the file ends."""
        done = 0
        while done < len(buffer):
            with buffer[done:] as rest:
                count = os.preadv(file, [rest], offset + done)
            if not count:
                break
            done += count
        return done

    def read_resident(self, file: int, offset: int, size: int) -> bytearray:
        """As `read`, of what is in memory, WouldBlock for all else; not a byte is copied twice."""
        buffer = bytearray(size)
        try:
            done = os.preadv(file, [buffer], offset, self._nowait_flag)
        except BlockingIOError:
            raise WouldBlock from None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # This file system has no RWF_NOWAIT: always let a thread wait.
            raise WouldBlock from None
        if done < size:
            if offset + done < self.size(file):
                raise WouldBlock
            del buffer[done:]
        return buffer

    def write(self, file: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write *buffers* one after the other at *offset*, all of them or an OSError."""
        left = sum(map(len, buffers))
        while left:
            # A single one without the list of buffers that the kernel would copy.
            one = len(buffers) == 1
            done = os.pwrite(file, buffers[0], offset) if one else os.pwritev(file, buffers[:_IOV_MAX], offset)
            offset += done
            left -= done
            if left:
                buffers = _behind(buffers, done)

    def truncate(self, file: int, size: int) -> None:
        """Cut or extend *file* to *size* bytes."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Make the data of *file* and its length durable."""
        os.fdatasync(file)

    def prefetch(self, file: int, offset: int, size: int) -> None:
        """Let the disk start to read *size* bytes at *offset*; return at once."""
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)

    def hint_extent_size(self, file: int, size: int) -> bool:
        """Ask XFS to allocate *file* in extents of *size* bytes; return whether the file system took the hint."""
        attributes = bytearray(_FSXATTR.size)
        try:
            fcntl.ioctl(file, _FS_IOC_FSGETXATTR, attributes)
            xflags, _, extents, project, cow_size = _FSXATTR.unpack(attributes)
            hinted = _FSXATTR.pack(xflags | _FS_XFLAG_EXTSIZE, size, extents, project, cow_size)
            fcntl.ioctl(file, _FS_IOC_FSSETXATTR, hinted)
        except OSError:
            return False
        return True

    def punch(self, file: int, offset: int, size: int) -> bool:
        """Free the blocks of *size* bytes at *offset*, which read as zeros; return whether the file system can."""
        if _libc.fallocate64(file, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(size)) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise OSError(number, os.strerror(number))

    def clone(self, source: int, target: int) -> bool:
        """Let *target*, which is empty, be what *source* is at one moment, by sharing its blocks.

        Return whether the file system can; if not, nothing was done. What is still in the page cache is included.
        """
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno not in _CANNOT_SHARE:
                raise
            return False
        return True

    def next_data(self, file: int, offset: int) -> int:
        """Return where at or behind *offset* there is anything but a hole; the size of the file if nowhere."""
        try:
            return os.lseek(file, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return os.fstat(file).st_size

    def allocated_bytes(self, file: int) -> int:
        """Return how much of the disk *file* takes."""
        return os.fstat(file).st_blocks * 512

    def copy_times(self, source: int, target: int) -> None:
        """Give *target* the times of *source*."""
        status = os.fstat(source)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def holes(self, file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where each hole of *file* between *start* and *end* begins and ends."""
        position = start
        while position < end:
            hole = self.next_hole(file, position)
            if hole >= end:
                return
            position = min(self.next_data(file, hole), end)
            # Filled, or cut off, since the line before.
            if position <= hole:
                return
            yield hole, position

    # -- names ------------------------------------------------------------------------------------------------

    def names(self, directory: str) -> list[str]:
        """Return the names in *directory*, sorted."""
        return sorted(os.listdir(directory))

    def exists(self, path: str) -> bool:
        """Return whether there is anything at *path*; an OSError if that may not be known."""
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            return False
        return True

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: str) -> None:
        """Remove the empty directory at *path*."""
        os.rmdir(path)

    def copy_owner(self, source: str, target: str) -> None:
        """Give what is at *target* to the owner of *source*; only root can, for others nothing changes."""
        status = os.stat(source)
        if os.geteuid() == 0:
            os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        """Give the file or directory at *source* the name *target*, in place of what had it."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        """Make the names in the directory at *path* durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace_file(self, path: str, data: bytes) -> None:
        """Make *data* the whole content of the file at *path*, in one durable step."""
        temporary = path + ".new"
        file = self.open(temporary, writable=True, create=True)
        try:
            self.truncate(file, 0)
            self.write(file, 0, [data])
            self.sync(file)
        finally:
            self.close(file)
        self.rename(temporary, path)
        self.sync_directory(os.path.dirname(path))

    # -- the whole file system --------------------------------------------------------------------------------

    def space(self, path: str) -> os.statvfs_result:
        """Return the size and the free space of the file system that holds *path*."""
        return os.statvfs(path)

    def lock(self, path: str) -> int | None:
        """Take the lock file at *path* for as long as the returned descriptor is open; None if another has it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                return None
            raise
        return descriptor

    def lock_directory(self, path: str) -> int | None:
        """Lock the directory at *path* itself, under whatever name, as `lock` does a file."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                return None
            raise
        return descriptor

    def is_locked(self, file: int) -> bool:
        """Return whether another open file has the lock on *file*; a lock that *file* itself has is given up."""
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False


def _behind(buffers: Sequence[Buffer], done: int) -> list[Buffer]:
    """Return what is left of *buffers* behind their first *done* bytes."""
    pending: list[Buffer] = [memoryview(buffer) for buffer in buffers]
    while done >= len(pending[0]):
        done -= len(pending.pop(0))
    pending[0] = memoryview(pending[0])[done:]
    return pending
