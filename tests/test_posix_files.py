"""Open files: what they can do, and what they take of the disk, on a mount as on plain XFS."""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from mounted import failure, wait_until
from places import fallocate, opened

from imgfs.settings import MIB

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix files")]

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
IMAGE_BYTES_MAX = (1 << 32) - 1
DEADLINE_S = 30.0
NOT_SUPPORTED = errno.errorcode[errno.EOPNOTSUPP]
FICLONE = 0x40049409
FS_IOC_GETFLAGS = 0x80086601


# -- opening ----------------------------------------------------------------------------------------------------------


def test_flags_of_open(place: Path) -> None:
    image = place / "image"
    image.write_bytes(b"content")
    (place / "directory").mkdir()
    os.symlink("image", place / "link")
    assert failure(os.open, place / "directory", os.O_WRONLY) == "EISDIR"
    assert failure(os.open, place / "directory", os.O_RDONLY | os.O_CREAT) == "EISDIR"
    assert failure(os.open, place / "directory", os.O_RDONLY | os.O_TRUNC) == "EISDIR"
    assert failure(os.open, image, os.O_RDONLY | os.O_DIRECTORY) == "ENOTDIR"
    assert failure(os.open, place / "absent", os.O_RDONLY) == "ENOENT"
    assert failure(os.open, place / "absent" / "image", os.O_RDONLY | os.O_CREAT) == "ENOENT"
    assert failure(os.open, place / "link", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert failure(os.open, place / "link", os.O_RDONLY | os.O_CREAT | os.O_EXCL) == "EEXIST"
    with opened(place / "link", os.O_PATH | os.O_NOFOLLOW) as file:
        assert stat.S_ISLNK(os.fstat(file).st_mode)
        assert failure(os.read, file, 1) == "EBADF"
    with opened(image, os.O_RDONLY) as file:
        assert failure(os.write, file, b"x") == "EBADF"
        assert failure(os.ftruncate, file, 0) == "EINVAL"
    with opened(image, os.O_WRONLY) as file:
        assert failure(os.read, file, 1) == "EBADF"
        assert failure(os.lseek, file, -1, os.SEEK_SET) == "EINVAL"
        assert failure(os.pwrite, file, b"x", -1) == "EINVAL"
    with opened(place / "directory", os.O_RDONLY) as file:
        assert failure(os.read, file, 1) == "EISDIR"
    with opened(image, os.O_RDONLY | os.O_TRUNC) as file:
        assert os.fstat(file).st_size == 0
    # What has no permissions at all can be written by who has just made it.
    with opened(place / "closed", os.O_WRONLY | os.O_CREAT) as file:
        os.fchmod(file, 0)
        os.write(file, b"written")
    assert (place / "closed").stat().st_size == 7


def test_a_program_that_runs_cannot_be_written(place: Path) -> None:
    program = place / "sleep"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "60"])
    try:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program), "it runs")
        assert failure(os.open, program, os.O_WRONLY) == "ETXTBSY"
        assert failure(os.open, program, os.O_RDWR | os.O_TRUNC) == "ETXTBSY"
        assert failure(os.truncate, program, 0) == "ETXTBSY"
        os.rename(program, place / "renamed")
        os.unlink(place / "renamed")
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    shutil.copy("/bin/true", program)
    with opened(program, os.O_WRONLY):
        assert failure(os.execv, program, ["x"]) == "ETXTBSY"
    assert subprocess.run([program], timeout=DEADLINE_S, check=False).returncode == 0


# -- what was unlinked ------------------------------------------------------------------------------------------------


def test_an_open_image_without_a_name_is_all_that_it_was(place: Path) -> None:
    image = place / "image"
    image.write_bytes(b"content")
    with opened(image, os.O_RDWR) as file:
        image.unlink()
        image.write_bytes(b"another")
        os.pwrite(file, b"C", 0)
        os.fchmod(file, 0o600)
        os.fchown(file, 12, 34)
        os.utime(file, ns=(1, 2))
        status = os.fstat(file)
        assert (status.st_nlink, status.st_size, status.st_uid, status.st_gid) == (0, 7, 12, 34)
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o600, 2)
        os.fsync(file)
        os.ftruncate(file, 3)
        assert os.pread(file, 10, 0) == b"Con"
        with opened(Path(f"/proc/self/fd/{file}"), os.O_RDWR) as again:
            assert os.pread(again, 10, 0) == b"Con"
            os.pwrite(again, b"!", 3)
        assert os.pread(file, 10, 0) == b"Con!"
    assert image.read_bytes() == b"another"
    assert os.listdir(place) == ["image"]


def test_a_removed_directory_that_somebody_is_in(place: Path) -> None:
    (place / "directory").mkdir()
    with opened(place / "directory", os.O_RDONLY) as directory:
        os.rmdir(place / "directory")
        assert os.fstat(directory).st_nlink == 0
        assert os.listdir(directory) == []
        for kind in ("file", "directory", "link"):
            make = {
                "file": lambda: os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=directory),
                "directory": lambda: os.mkdir("x", dir_fd=directory),
                "link": lambda: os.symlink("x", "x", dir_fd=directory),
            }[kind]
            assert failure(make) == "ENOENT"
        assert failure(lambda: os.stat("x", dir_fd=directory)) == "ENOENT"
        os.fchmod(directory, 0o700)
        os.fsync(directory)
    (place / "directory").mkdir()
    assert (place / "directory").stat().st_nlink == 2


def test_temporary_files(place: Path) -> None:
    """Where a file system has no O_TMPFILE, the C library and Python take a name and unlink it."""
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.listdir(place) == []
    libc = ctypes.CDLL(None, use_errno=True)
    template = ctypes.create_string_buffer(os.fsencode(place / "XXXXXX"))
    made = libc.mkstemp(template)
    assert made >= 0
    os.close(made)
    assert os.listdir(place) == [os.path.basename(os.fsdecode(template.value))]


def test_tmpfile_is_not_supported(here: Path) -> None:
    assert failure(os.open, here, os.O_TMPFILE | os.O_RDWR) == NOT_SUPPORTED


# -- space ------------------------------------------------------------------------------------------------------------


def test_posix_fallocate(place: Path) -> None:
    image = place / "image"
    image.write_bytes(b"content")
    with opened(image, os.O_RDWR) as file:
        os.posix_fallocate(file, 3, 10_000)
        assert os.fstat(file).st_size == 10_003
        os.posix_fallocate(file, 0, 100)
        assert os.fstat(file).st_size == 10_003
        assert os.pread(file, 20_000, 0) == b"content" + bytes(9_996)
        assert failure(os.posix_fallocate, file, 0, 0) == "EINVAL"
        assert failure(os.posix_fallocate, file, -1, 1) == "EINVAL"
    with opened(image, os.O_RDONLY) as file:
        assert failure(os.posix_fallocate, file, 0, 1) == "EBADF"
    assert image.stat().st_size == 10_003


def test_no_mode_of_fallocate_is_supported(here: Path) -> None:
    """So that posix_fallocate of the C library, and everybody else, falls back to writing."""
    (here / "image").write_bytes(bytes(8192))
    with opened(here / "image", os.O_RDWR) as file:
        for mode in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE):
            assert failure(fallocate, file, mode, 0, 4096) == NOT_SUPPORTED


def test_what_no_request_can_say_is_refused(here: Path) -> None:
    (here / "image").write_bytes(b"content")
    with opened(here / "image", os.O_RDWR) as file:
        assert failure(fcntl.ioctl, file, FICLONE, file) == NOT_SUPPORTED
        assert failure(fcntl.ioctl, file, FS_IOC_GETFLAGS, bytes(8)) == "ENOTTY"


def test_holes(place: Path) -> None:
    image = place / "image"
    with opened(image, os.O_RDWR | os.O_CREAT) as file:
        os.pwrite(file, b"end", 3 * MIB)
        os.pwrite(file, b"start", 0)
        assert os.pread(file, 10, MIB) == bytes(10)
        os.ftruncate(file, 4 * MIB)
    assert image.stat().st_size == 4 * MIB
    content = image.read_bytes()
    assert content == b"start" + bytes(3 * MIB - 5) + b"end" + bytes(MIB - 3)


def test_seek_data_and_hole(place: Path) -> None:
    """A file system may say that all is data, with a hole at the end."""
    image = place / "image"
    image.write_bytes(b"x" * 10_000)
    with opened(image, os.O_RDONLY) as file:
        assert os.lseek(file, 0, os.SEEK_DATA) == 0
        assert os.lseek(file, 5000, os.SEEK_DATA) == 5000
        assert os.lseek(file, 0, os.SEEK_HOLE) == 10_000
        for how in (os.SEEK_DATA, os.SEEK_HOLE):
            assert failure(os.lseek, file, 10_000, how) == "ENXIO"


def test_copy_file_range(place: Path) -> None:
    content = os.urandom(300_000)
    (place / "one").write_bytes(content)
    with opened(place / "one", os.O_RDWR) as source, opened(place / "two", os.O_RDWR | os.O_CREAT) as target:
        left = len(content)
        while left:
            left -= os.copy_file_range(source, target, left)
        assert os.copy_file_range(source, target, 10) == 0
        assert os.pread(target, 400_000, 0) == content
        assert os.copy_file_range(source, source, 1000, 0, 200_000) == 1000
        assert os.pread(source, 1000, 200_000) == content[:1000]
        assert failure(os.copy_file_range, source, source, 1000, 0, 500) == "EINVAL"
    assert (place / "two").read_bytes() == content


def test_splice_and_sendfile(place: Path) -> None:
    content = os.urandom(50_000)
    (place / "image").write_bytes(content)
    readable, writable = os.pipe()
    with (
        opened(place / "image", os.O_RDONLY) as file,
        opened(place / "copy", os.O_WRONLY | os.O_CREAT) as copy,
        open(readable, "rb"),
        open(writable, "wb"),
    ):
        assert os.splice(file, writable, 50_000) == 50_000
        left = 50_000
        while left:
            left -= os.splice(readable, copy, left)
    assert (place / "copy").read_bytes() == content
    server, client = socket.socketpair()
    with server, client, opened(place / "image", os.O_RDONLY) as file:
        assert os.sendfile(server.fileno(), file, 1000, 5000) == 5000
        assert client.recv(10_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == content[1000:6000]


def test_direct_io(place: Path) -> None:
    """XFS takes only whole blocks; a mount takes anything."""
    block = mmap.mmap(-1, 8192)
    block[:] = os.urandom(8192)
    with opened(place / "image", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
        assert os.pwrite(file, block, 4096) == 8192
        back = mmap.mmap(-1, 8192)
        assert os.preadv(file, [back], 4096) == 8192
        assert back[:] == block[:]
        with opened(place / "image", os.O_RDONLY) as cached:
            assert os.pread(cached, 8192, 4096) == block[:]
    assert (place / "image").read_bytes() == bytes(4096) + block[:]


def test_direct_io_of_any_bytes(here: Path) -> None:
    with opened(here / "image", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as file:
        assert os.pwrite(file, b"odd", 5) == 3
        assert os.pread(file, 100, 1) == bytes(4) + b"odd"


def test_vectors_and_flags_of_reads_and_writes(place: Path) -> None:
    with opened(place / "image", os.O_RDWR | os.O_CREAT) as file:
        assert os.writev(file, [b"one ", b"two ", b""]) == 8
        assert os.pwritev(file, [b"three"], 8, os.RWF_DSYNC) == 5
        assert os.pwritev(file, [b" four"], 0, os.RWF_APPEND) == 5
        parts = [bytearray(4), bytearray(100)]
        assert os.preadv(file, parts, 0) == 18
        assert bytes(parts[0] + parts[1][:14]) == b"one two three four"
        os.lseek(file, 0, os.SEEK_END)
        assert os.read(file, 10) == b""
        assert os.pread(file, 10, 1 << 40) == b""


@pytest.mark.parametrize("size", [IMAGE_BYTES_MAX + 1, 999_999_999_999_999, (1 << 63) - 1])
def test_more_than_an_image_can_have_is_efbig(here: Path, size: int) -> None:
    (here / "image").write_bytes(b"content")
    assert failure(os.truncate, here / "image", size) == "EFBIG"
    with opened(here / "image", os.O_RDWR) as file:
        assert failure(os.ftruncate, file, size) == "EFBIG"
        if size < 1 << 62:
            assert failure(os.pwrite, file, b"x", size) == "EFBIG"
    assert (here / "image").read_bytes() == b"content"


def test_statfs(place: Path) -> None:
    with opened(place, os.O_RDONLY) as file:
        by_path, by_file = os.statvfs(place), os.statvfs(file)
    assert by_path.f_namemax == by_file.f_namemax == 255
    assert by_path.f_blocks == by_file.f_blocks >= by_path.f_bfree >= by_path.f_bavail > 0
    assert by_path.f_files > by_path.f_ffree > 0
    assert by_path.f_frsize == 4096
    assert os.pathconf(place, "PC_NAME_MAX") == 255
    assert os.pathconf(place, "PC_PATH_MAX") == 4096
