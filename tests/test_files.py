"""Files, directories and links on a real mount behave as on any file system."""

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest
from mounted import Mounted, XfsDisk, failure, wait_until

from imgfs.settings import MIB

pytestmark = [pytest.mark.mount, pytest.mark.root]

GIB4 = 1 << 32
AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
LOST = r"what was written to .* is lost: .*"


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 131072, MIB - 1, MIB, MIB + 1, 5 * MIB + 3])
def test_what_is_written_is_read(mounted: Mounted, size: int) -> None:
    image = mounted.point / "image"
    data = os.urandom(size)
    image.write_bytes(data)
    assert image.stat().st_size == size
    mounted.drop_caches()
    assert image.read_bytes() == data
    mounted.stop()
    mounted.start()
    assert image.read_bytes() == data


def test_write_at_any_offset(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"a" * 1000)
    with open(image, "r+b") as file:
        file.seek(10)
        file.write(b"bc")
        file.seek(2000)
        file.write(b"end")
    assert image.read_bytes() == b"a" * 10 + b"bc" + b"a" * 988 + bytes(1000) + b"end"


def test_append(root: Path) -> None:
    image = root / "image"
    for part in (b"one ", b"two ", b"three"):
        with open(image, "ab") as file:
            file.write(part)
    assert image.read_bytes() == b"one two three"


def test_two_that_append_at_once_lose_nothing(root: Path) -> None:
    image = root / "image"
    with open(image, "ab", buffering=0) as one, open(image, "ab", buffering=0) as other:
        for _ in range(50):
            one.write(b"1")
            other.write(b"2")
    assert sorted(image.read_bytes()) == [ord("1")] * 50 + [ord("2")] * 50


def test_an_open_image_reads_back_what_was_written_so_far(root: Path) -> None:
    with open(root / "image", "w+b", buffering=0) as file:
        file.write(b"x" * 300_000)
        assert os.fstat(file.fileno()).st_size == 300_000
        assert os.stat(root / "image").st_size == 300_000
        file.seek(299_999)
        assert file.read() == b"x"
        assert (root / "image").read_bytes() == b"x" * 300_000


def test_truncate(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"0123456789")
    os.truncate(image, 4)
    assert image.read_bytes() == b"0123"
    os.truncate(image, 8)
    assert image.read_bytes() == b"0123" + bytes(4)
    with open(image, "r+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 2)
        assert os.fstat(file.fileno()).st_size == 2
        file.seek(4)
        file.write(b"x")
    assert image.read_bytes() == b"01\0\0x"
    with open(image, "wb"):
        assert image.stat().st_size == 0
    assert image.read_bytes() == b""


def test_truncate_survives_the_daemon_without_a_close(mounted: Mounted) -> None:
    image = mounted.point / "image"
    image.write_bytes(b"0123456789")
    os.truncate(image, 4)
    mounted.kill()
    mounted.start()
    assert image.read_bytes() == b"0123"


def test_truncate_survives_the_daemon_also_where_the_release_is_still_on_its_way(mounted: Mounted) -> None:
    # The kernel waits for no release: as an image that is open, but has nothing that was not flushed.
    image = mounted.point / "image"
    file = os.open(image, os.O_WRONLY | os.O_CREAT)
    os.write(file, b"0123456789")
    os.fsync(file)
    os.truncate(image, 4)
    mounted.kill()
    with pytest.raises(OSError, match="not connected"):
        os.close(file)
    mounted.start()
    assert image.read_bytes() == b"0123"


def test_several_images_are_written_at_once(root: Path) -> None:
    files = [open(root / f"{number}", "wb", buffering=0) for number in range(40)]  # noqa: SIM115
    for part in range(5):
        for number, file in enumerate(files):
            file.write(b"%d %d;" % (number, part) * 1000)
    for file in files:
        file.close()
    for number in range(40):
        expected = b"".join(b"%d %d;" % (number, part) * 1000 for part in range(5))
        assert (root / f"{number}").read_bytes() == expected


def test_what_a_mapping_writes_is_kept(mounted: Mounted) -> None:
    image = mounted.point / "image"
    image.write_bytes(bytes(100_000))
    with open(image, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    mapping[5:8] = b"abc"
    mapping.flush()
    mapping[50_000:50_003] = b"xyz"
    mapping.close()
    expected = bytearray(100_000)
    expected[5:8], expected[50_000:50_003] = b"abc", b"xyz"
    assert image.read_bytes() == expected
    mounted.stop()
    mounted.start()
    assert image.read_bytes() == expected


def test_fsync_of_files_and_directories(root: Path) -> None:
    with open(root / "image", "wb") as file:
        for _ in range(3):
            file.write(b"x" * 100_000)
            os.fsync(file.fileno())
            os.fdatasync(file.fileno())
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def test_a_size_past_the_limit_is_efbig(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"whole")
    with open(image, "r+b", buffering=0) as file:
        assert failure(os.pwrite, file.fileno(), b"x", GIB4 - 1) == "EFBIG"
        assert failure(os.ftruncate, file.fileno(), GIB4) == "EFBIG"
    assert failure(os.truncate, image, 999_999_999_999_999) == "EFBIG"
    assert image.read_bytes() == b"whole"


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_any_bytes_up_to_255(root: Path) -> None:
    top = os.fsencode(root) + b"/"
    every_byte = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    names = {b"n" * 255, every_byte, "ü".encode() * 127, b" ", b"...", b"-rf", b"\\", b"\xff"}
    for name in names:
        with open(top + name, "wb") as file:
            file.write(name)
        os.mkdir(top + name[:200] + b" dir")
    assert set(os.listdir(top)) == names | {name[:200] + b" dir" for name in names}
    for name in names:
        with open(top + name, "rb") as file:
            assert file.read() == name


def test_a_name_of_256_bytes_is_too_long_for_every_call(root: Path) -> None:
    name = root / ("n" * 256)
    (root / "image").touch()
    for call, arguments in [
        (os.stat, (name,)),
        (os.mkdir, (name,)),
        (open, (name, "w")),
        (os.unlink, (name,)),
        (os.symlink, ("target", name)),
        (os.rename, (root / "image", name)),
    ]:
        assert failure(call, *arguments) == "ENAMETOOLONG"  # type: ignore[arg-type]


def test_what_was_not_there_is_there_when_made(root: Path) -> None:
    for name in ("image", "directory"):
        for _ in range(2):
            assert failure(os.stat, root / name) == "ENOENT"
    (root / "image").touch()
    (root / "directory").mkdir()
    assert sorted(os.listdir(root)) == ["directory", "image"]
    os.rename(root / "image", root / "other")
    assert failure(os.stat, root / "image") == "ENOENT"
    os.stat(root / "other")


def test_errors_are_those_of_any_file_system(root: Path) -> None:
    (root / "image").touch()
    (root / "full").mkdir()
    (root / "full" / "image").touch()
    assert failure(os.mkdir, root / "image") == "EEXIST"
    assert failure(os.open, root / "image", os.O_CREAT | os.O_EXCL) == "EEXIST"
    assert failure(os.rmdir, root / "full") == "ENOTEMPTY"
    assert failure(os.rmdir, root / "image") == "ENOTDIR"
    assert failure(os.unlink, root / "full") == "EISDIR"
    assert failure(os.rename, root / "image", root / "full") == "EISDIR"
    assert failure(os.rename, root / "full", root / "image") == "ENOTDIR"
    assert failure(os.rename, root / "full", root / "full" / "below") == "EINVAL"
    assert failure(os.open, root / "full", os.O_RDWR) == "EISDIR"
    assert failure(os.stat, root / "image" / "below") == "ENOTDIR"
    assert failure(os.getxattr, root / "image", "user.comment") == "ENOTSUP"
    assert failure(os.setxattr, root / "image", "user.comment", b"") == "ENOTSUP"


# -- rename and unlink ------------------------------------------------------------------------------------------------


def test_rename_over_an_existing_image(root: Path) -> None:
    old, new = root / "old", root / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.utime(new, ns=(0, 12345))
    number = new.stat().st_ino
    with open(old, "rb") as file:
        os.rename(new, old)
        assert file.read() == b"old"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert os.listdir(root) == ["old"]
    assert old.read_bytes() == b"new"
    assert (old.stat().st_ino, old.stat().st_mtime_ns) == (number, 12345)


def test_rename_of_a_directory_copies_nothing(mounted: Mounted) -> None:
    root = mounted.point
    directory = root / "directory"
    directory.mkdir()
    for number in range(20):
        (directory / f"{number}").write_bytes(os.urandom(100_000))
    (root / "target").mkdir()
    before = _volume_bytes(mounted.store)
    os.rename(directory, root / "target" / "moved")
    (root / "empty").mkdir()
    os.rename(root / "target" / "moved", root / "empty")  # over an empty directory
    assert _volume_bytes(mounted.store) - before < 4096
    assert sorted(os.listdir(root)) == ["empty", "target"]
    assert len(os.listdir(root / "empty")) == 20


def test_flags_of_rename(root: Path) -> None:
    a, b = root / "a", root / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    assert failure(_renameat2, a, b, RENAME_NOREPLACE) == "EEXIST"
    assert failure(_renameat2, a, b, RENAME_NOREPLACE | RENAME_EXCHANGE) == "EINVAL"
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b")
    _renameat2(a, root / "c", RENAME_NOREPLACE)
    os.rename(b, b)
    assert sorted(os.listdir(root)) == ["b", "c"]


def _renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_unlinked_but_open_images_stay_readable(mounted: Mounted) -> None:
    image = mounted.point / "image"
    data = os.urandom(3 * MIB)
    image.write_bytes(data)
    with open(image, "rb") as file:
        image.unlink()
        assert failure(os.stat, image) == "ENOENT"
        for number in range(50):
            (mounted.point / f"{number}").write_bytes(b"other")
        mounted.drop_caches()
        assert file.read() == data
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == len(data)


def test_an_image_unlinked_while_it_is_written_leaves_nothing(mounted: Mounted) -> None:
    with open(mounted.point / "image", "w+b", buffering=0) as file:
        file.write(b"x" * 100_000)
        os.unlink(mounted.point / "image")
        file.write(b"y")
        file.seek(99_999)
        assert file.read() == b"xy"
    assert os.listdir(mounted.point) == []
    mounted.stop()
    mounted.start()
    assert os.listdir(mounted.point) == []


def test_readers_of_a_name_that_is_replaced_always_see_a_whole_image(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"\0" * 50_000)
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                data = image.read_bytes()
            except OSError as error:
                wrong.append(error)
                return
            if len(data) != 50_000 or len(set(data)) != 1:
                wrong.append(data[:10])
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(200):
        (root / "upload").write_bytes(bytes([number]) * 50_000)
        os.rename(root / "upload", image)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []


# -- directories ------------------------------------------------------------------------------------------------------


def test_many_entries_are_listed_once_each_also_while_some_go(root: Path) -> None:
    names = {f"{number:04d}" for number in range(1500)}
    for name in names:
        (root / name).touch()
    assert sorted(os.listdir(root)) == sorted(names)
    seen = []
    with os.scandir(root) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert sorted(seen) == sorted(names)
    assert os.listdir(root) == []


def test_a_removed_open_directory_is_empty(root: Path) -> None:
    (root / "directory").mkdir()
    directory = os.open(root / "directory", os.O_RDONLY)
    os.rmdir(root / "directory")
    assert os.listdir(directory) == []
    assert os.fstat(directory).st_nlink == 0
    assert failure(lambda: os.open("image", os.O_CREAT | os.O_WRONLY, dir_fd=directory)) == "ENOENT"
    os.close(directory)


def test_links_counted_and_dots_lead_up(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    assert root.stat().st_nlink == 3
    assert (root / "a").stat().st_nlink == 3
    assert os.stat(root / "a" / "b" / "..").st_ino == (root / "a").stat().st_ino
    (root / "c").mkdir()
    os.rename(root / "a" / "b", root / "c" / "b")
    assert os.stat(root / "c" / "b" / "..").st_ino == (root / "c").stat().st_ino
    assert (root / "a").stat().st_nlink == 2


def test_symbolic_links(root: Path) -> None:
    (root / "image").write_bytes(b"through the link")
    os.symlink("image", root / "link")
    os.symlink(b"\xff" * 4095, root / "long")
    assert os.readlink(root / "link") == "image"
    assert os.readlink(os.fsencode(root / "long")) == b"\xff" * 4095
    assert (root / "link").read_bytes() == b"through the link"
    assert os.lstat(root / "link").st_size == 5
    os.symlink("loop", root / "loop")
    assert failure(os.stat, root / "loop") == "ELOOP"


# -- the disk below ---------------------------------------------------------------------------------------------------


def test_statfs_shows_the_disk_below(root: Path, disk: XfsDisk) -> None:
    (root / "image").touch()
    mine, below = os.statvfs(root), os.statvfs(disk.path)
    assert mine.f_blocks * mine.f_frsize == below.f_blocks * below.f_frsize
    assert mine.f_bavail * mine.f_frsize == pytest.approx(below.f_bavail * below.f_frsize, abs=4 * MIB)
    assert mine.f_namemax == 255
    used = mine.f_files - mine.f_ffree
    (root / "another").touch()
    assert os.statvfs(root).f_files - os.statvfs(root).f_ffree == used + 1
    (root / "large").write_bytes(bytes(3 * MIB))
    assert (root / "large").stat().st_blocks * 512 >= 3 * MIB
    assert os.statvfs(root).f_bavail <= mine.f_bavail


def test_a_full_disk_says_so_and_loses_nothing(mounted: Mounted, disk: XfsDisk) -> None:
    mounted.expected_log.append(LOST)
    root = mounted.point
    old = os.urandom(2 * MIB)
    (root / "old").write_bytes(old)
    written: list[int] = []

    def fill() -> None:
        for number in range(200):
            (root / f"{number}").write_bytes(b"%03d" % number * (MIB // 3))
            written.append(number)

    with disk.filled_up(leaving=40 * MIB):
        assert failure(fill) == "ENOSPC"
        assert written
        assert failure((root / "old").write_bytes, bytes(2 * MIB)) == "ENOSPC"
        # The last word is spoken by RELEASE, which nobody waits for.
        wait_until(lambda: (root / "old").read_bytes() == old, "the old image is back")
        mounted.kill()
        mounted.start()
        assert (root / "old").read_bytes() == old
        for number in written:
            assert (root / f"{number}").read_bytes() == b"%03d" % number * (MIB // 3)
        (root / "old").unlink()
        assert not (root / "old").exists()
    (root / "new").write_bytes(b"room again")
    assert (root / "new").read_bytes() == b"room again"


def test_the_kernel_forgets_what_could_not_be_written(mounted: Mounted, disk: XfsDisk) -> None:
    mounted.expected_log.append(LOST)
    old, new = mounted.point / "old", mounted.point / "new"
    old.write_bytes(b"old" * 100_000)
    for image in (old, new):
        writing = os.open(image, os.O_WRONLY | os.O_CREAT)
        os.write(writing, b"lost" * 100_000)
        with disk.filled_up(leaving=MIB):
            # Now the kernel has attributes and pages that it would keep for a day.
            assert os.fstat(writing).st_size == 400_000
            assert image.read_bytes() == b"lost" * 100_000
            assert failure(os.close, writing) == "ENOSPC"
            # The last word is spoken by RELEASE, which nobody waits for.
            wait_until(lambda: "is lost" in mounted.log.read_text(), "it is given up")
            if image == old:
                wait_until(lambda: old.read_bytes() == b"old" * 100_000, "the old image is back")
                assert old.stat().st_size == 300_000
            else:
                wait_until(lambda: not os.path.exists(new), "the new name is gone")
            assert os.listdir(mounted.point) == ["old"]


def test_who_opens_an_image_again_is_not_told_of_a_write_that_was_refused(mounted: Mounted, disk: XfsDisk) -> None:
    mounted.expected_log.append(LOST)
    image = mounted.point / "image"
    image.write_bytes(b"old" * 100)
    with disk.filled_up(leaving=MIB):
        writing = os.open(image, os.O_RDWR)
        for _ in range(2):
            assert failure(os.pwrite, writing, b"new", 0) == "ENOSPC"
        assert (os.pread(writing, 6, 0), os.fstat(writing).st_size) == (b"oldold", 300)
        assert failure(os.close, writing) == "ENOSPC"
        wait_until(lambda: "is lost" in mounted.log.read_text(), "it is given up")
    writing = os.open(image, os.O_RDWR)
    os.pwrite(writing, b"new", 0)
    os.close(writing)
    assert image.read_bytes() == b"new" + b"old" * 99


def test_a_hole_larger_than_the_disk_is_refused_and_harmless(mounted: Mounted) -> None:
    mounted.expected_log.append(LOST)
    image = mounted.point / "image"
    image.write_bytes(b"whole")
    writing = os.open(image, os.O_WRONLY)
    try:
        os.pwrite(writing, b"x", GIB4 - 2)
    finally:
        assert failure(os.close, writing) == "ENOSPC"
    mounted.kill()
    mounted.start()
    assert image.read_bytes() == b"whole"


def _volume_bytes(store: Path) -> int:
    return sum(volume.stat().st_size for volume in (store / "volumes").glob("*.vol"))
