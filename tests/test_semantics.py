"""Several processes at one image or directory of a real mount: appending, mapping, locking, listing; and O_DIRECT."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounted import DEADLINE_S, Mounted, failure, run, wait_until
from places import Listing

from imgfs.settings import MIB

pytestmark = [
    pytest.mark.mount,
    pytest.mark.root,
    # The watchdog of a mount is a thread, which no child has; it does nothing but wait.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

COUNTER = struct.Struct("<Q")
# More than one answer of readdir holds, and than a directory's buckets have at once.
ENTRIES = 2000


@contextlib.contextmanager
def processes(*calls: Callable[[], object]) -> Iterator[list[int]]:
    """Run each of *calls* in a process of its own, beside the block; none may fail, unless the block waits for it."""
    children: list[int] = []
    try:
        for call in calls:
            child = os.fork()
            if child == 0:
                _run_and_exit(call)
            children.append(child)
        yield children
        for child in list(children):
            wait_until(lambda child=child: _ended(child), "a process ends")  # type: ignore[misc]
            children.remove(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _run_and_exit(call: Callable[[], object]) -> None:
    code = 1
    try:
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(child: int) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) == 0
    return pid == child


# -- writing together -------------------------------------------------------------------------------------------------


def test_what_four_processes_append_is_whole_and_in_order(mounted: Mounted) -> None:
    image, each = mounted.point / "log", 150

    def append(writer: int) -> None:
        chance = random.Random(writer)
        with open(image, "ab", buffering=0) as file:
            for number in range(each):
                # Up to some pages, so that many records cross the end of one.
                file.write(b"%d %d %s\n" % (writer, number, b"x" * chance.choice([1, 50, 5000, 20_000])))

    with processes(*(lambda writer=writer: append(writer) for writer in range(4))):
        pass
    mounted.stop()
    mounted.start()
    written: dict[int, list[int]] = {writer: [] for writer in range(4)}
    for line in image.read_bytes().splitlines():
        writer, number, filling = line.split(b" ")
        assert set(filling) == {ord("x")}
        written[int(writer)].append(int(number))
    assert written == {writer: list(range(each)) for writer in range(4)}


def test_two_processes_pass_a_ball_through_a_shared_mapping(mounted: Mounted) -> None:
    image, rounds = mounted.point / "shared", 500
    image.write_bytes(bytes(64 * mmap.PAGESIZE))

    def play(side: int) -> None:
        """Take the ball when it is ours, write down that it was, give it back."""
        end = time.monotonic() + DEADLINE_S
        with open(image, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            for number in range(rounds):
                while COUNTER.unpack_from(mapping, 0)[0] != 2 * number + side:
                    assert time.monotonic() < end
                    os.sched_yield()
                page = number % 63 + 1
                at = page * mmap.PAGESIZE + 8 * side
                COUNTER.pack_into(mapping, at, COUNTER.unpack_from(mapping, at)[0] + 1)
                COUNTER.pack_into(mapping, 0, 2 * number + side + 1)

    with processes(lambda: play(0), lambda: play(1)):
        pass
    for _ in range(2):
        data = image.read_bytes()
        assert COUNTER.unpack_from(data, 0)[0] == 2 * rounds
        for page in range(1, 64):
            expected = len(range(page - 1, rounds, 63))
            assert struct.unpack_from("<QQ", data, page * mmap.PAGESIZE) == (expected, expected)
        mounted.stop()
        mounted.start()


def test_a_mapping_sees_what_is_written_and_the_other_way_round(here: Path) -> None:
    image = here / "image"
    image.write_bytes(bytes(100_000))
    with open(image, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as mapping:
        os.pwrite(file.fileno(), b"by write", 40_000)
        assert mapping[40_000:40_008] == b"by write"
        mapping[50_000:50_005] = b"by it"
        assert os.pread(file.fileno(), 5, 50_000) == b"by it"
        os.ftruncate(file.fileno(), 45_000)
        os.ftruncate(file.fileno(), 100_000)
        assert mapping[50_000:50_005] == bytes(5)
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        private[40_000:40_008] = b"not kept"
        private.close()
    assert image.read_bytes() == bytes(40_000) + b"by write" + bytes(100_000 - 40_008)


def test_a_mapping_that_outlives_every_descriptor_is_kept(mounted: Mounted) -> None:
    """No close tells of what it writes. (Python's own mapping keeps a descriptor.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    image, size = mounted.point / "image", 10 * mmap.PAGESIZE
    image.write_bytes(bytes(size))
    for number in range(1, 5):
        file = os.open(image, os.O_RDWR)
        shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED
        mapping = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), *shared, file, ctypes.c_long(0)))
        os.close(file)
        ctypes.memset(mapping, number, size - 100)
        assert libc.munmap(mapping, ctypes.c_size_t(size)) == 0
        expected = bytes([number]) * (size - 100) + bytes(100)
        assert image.read_bytes() == expected
        if number % 2:
            mounted.stop()
            mounted.start()
            assert image.read_bytes() == expected


# -- O_DIRECT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 4096, 128 << 10, MIB, 3 * MIB + 512])
def test_o_direct_writes_and_reads_what_others_see(mounted: Mounted, size: int) -> None:
    image = mounted.point / "image"
    with mmap.mmap(-1, size) as aligned:
        for number in range(0, size, 8):
            COUNTER.pack_into(aligned, number, number * 0x9E3779B97F4A7C15 % (1 << 64))
        expected = aligned[:]
        direct = os.open(image, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwritev(direct, [aligned], 0) == size
            assert image.read_bytes() == expected
            # What lies in the page cache by now must not outlive a direct write, nor hide from a direct read.
            assert os.pwritev(direct, [memoryview(aligned)[:512]], size - 512) == 512
            expected = expected[: size - 512] + expected[:512]
            assert image.read_bytes() == expected
            with open(image, "r+b", buffering=0) as file:
                file.write(b"cached")
            expected = b"cached" + expected[6:]
            aligned[:] = bytes(size)
            assert os.preadv(direct, [aligned], 0) == size
            assert aligned[:] == expected
            # Ours need not be aligned.
            assert os.pread(direct, 100, 3) == expected[3:103]
            assert os.pwrite(direct, b"odd", 7) == 3
            expected = expected[:7] + b"odd" + expected[10:]
            # Past the end there is nothing, and a read that reaches over it is short.
            assert os.preadv(direct, [aligned], size) == 0
            assert os.preadv(direct, [aligned], size - 512) == 512
        finally:
            os.close(direct)
    mounted.stop()
    mounted.start()
    assert image.read_bytes() == expected


# -- locks ------------------------------------------------------------------------------------------------------------


def _flock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_EX)


def _fcntl(file: int) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX, 100, 10)


@pytest.mark.parametrize("lock", [_flock, _fcntl])
def test_who_has_the_lock_is_alone(here: Path, lock: Callable[[int], None]) -> None:
    image, each = here / "counter", 200
    image.write_bytes(COUNTER.pack(0))

    def count() -> None:
        for _ in range(each):
            # Closing it lets go of the lock, of either kind.
            with open(image, "r+b", buffering=0) as file:
                lock(file.fileno())
                value = COUNTER.unpack(os.pread(file.fileno(), 8, 0))[0]
                os.sched_yield()
                os.pwrite(file.fileno(), COUNTER.pack(value + 1), 0)

    with processes(count, count, count):
        pass
    assert COUNTER.unpack(image.read_bytes())[0] == 3 * each


def test_a_lock_is_refused_while_another_process_has_it_and_ends_with_that(here: Path) -> None:
    image, held = here / "image", here / "held"
    image.write_bytes(bytes(1000))

    def hold() -> None:
        file = os.open(image, os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX, 100, 200)
        fcntl.lockf(file, fcntl.LOCK_SH, 100, 500)
        held.touch()
        time.sleep(2 * DEADLINE_S)

    with processes(hold) as children, open(image, "r+b") as file:
        number = file.fileno()
        wait_until(held.exists, "the other has its locks")
        assert failure(fcntl.flock, number, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
        assert failure(fcntl.flock, number, fcntl.LOCK_SH | fcntl.LOCK_NB) == "EAGAIN"
        assert failure(fcntl.lockf, number, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 299) == "EAGAIN"
        assert failure(fcntl.lockf, number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 500) == "EAGAIN"
        fcntl.lockf(number, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 500)
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, 200, 0)
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 250, 1, 0)
        kind, _, start, length, owner = struct.unpack("hhqqi4x", fcntl.fcntl(number, fcntl.F_GETLK, asked))
        assert (kind, start, length, owner) == (fcntl.F_WRLCK, 200, 100, children[0])
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children.pop(0), 0)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_waits_for_a_lock_gets_it(here: Path) -> None:
    image, waits = here / "image", here / "waits"
    image.touch()

    def wait() -> None:
        with open(image, "r+b") as file:
            waits.touch()
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_EX)

    with open(image, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        with processes(wait) as children:
            wait_until(waits.exists, "the other waits")
            assert not _ended(children[0])
            fcntl.lockf(file, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_UN)


# -- listing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(here: Path) -> Path:
    """A directory with many entries."""
    directory = here / "crowd"
    directory.mkdir()
    for number in range(ENTRIES):
        (directory / f"{number}").touch()
    return directory


def test_seekdir_goes_to_any_place_that_telldir_told(crowd: Path) -> None:
    with Listing(crowd) as listing:
        start = listing.tell()
        entries = list(listing)
        names = [os.fsdecode(entry.name) for entry in entries]
        positions = [start, *(entry.position for entry in entries)]
        assert sorted(names) == sorted([".", "..", *(f"{number}" for number in range(ENTRIES))])
        assert len(set(positions)) == len(positions)
        chance = random.Random(1)
        for place in chance.sample(range(len(names)), 300):
            listing.seek(positions[place])
            assert listing.tell() == positions[place]
            assert os.fsdecode(next(iter(listing)).name) == names[place]
        listing.seek(positions[-1])
        assert list(listing) == []
        # Who has it open may still be told what is gone; what is left stays where it was.
        gone = {name for name in names if name.isdigit() and chance.random() < 0.5}
        for name in gone:
            os.unlink(crowd / name)
        for place in chance.sample(range(len(names)), 40):
            listing.seek(positions[place])
            rest = [os.fsdecode(entry.name) for entry in listing]
            assert [name for name in rest if name not in gone] == [name for name in names[place:] if name not in gone]
        # Who begins again sees what is new.
        (crowd / "new").touch()
        listing.seek(0)
        assert b"new" in [entry.name for entry in listing]


def test_a_listing_has_all_that_stays_once_while_others_come_and_go(crowd: Path) -> None:
    """Listings, a process that makes and deletes, and one that renames."""
    stop = crowd.parent / "stop"

    def make_and_delete() -> None:
        number = 0
        while not stop.exists():
            for part in range(20):
                (crowd / f"new {number} {part}").touch()
            for part in range(20):
                (crowd / f"new {number} {part}").unlink()
            number += 1

    def rename() -> None:
        number = 0
        moved = crowd / "moved 0"
        moved.touch()
        while not stop.exists():
            number += 1
            moved = moved.rename(crowd / f"moved {number}")

    stay = {f"{number}" for number in range(ENTRIES)}
    with processes(make_and_delete, rename):
        try:
            wait_until(lambda: (crowd / "new 3 0").exists(), "the others are at work")
            for _ in range(40):
                names = os.listdir(crowd)
                assert len(set(names)) == len(names)
                assert {name for name in names if name[0].isdigit()} == stay
        finally:
            stop.touch()


def test_two_empty_one_directory_while_a_third_fills_it(here: Path) -> None:
    """Nothing is passed over by who deletes what it lists, and nobody is told of what is not there for long."""
    directory, full = here / "directory", here / "full"
    directory.mkdir()

    def fill() -> None:
        for number in range(ENTRIES):
            (directory / f"{number}").write_bytes(b"%d" % number)
        full.touch()

    def empty() -> None:
        while True:
            last = full.exists()
            for name in os.listdir(directory):
                with contextlib.suppress(FileNotFoundError):  # the other was faster
                    os.unlink(directory / name)
            if last:
                return

    with processes(fill, empty, empty):
        pass
    assert os.listdir(directory) == []
    os.rmdir(directory)


def test_rm_rf_leaves_nothing(here: Path) -> None:
    tree = here / "tree"
    for number in range(20):
        place = tree / f"{number % 5}" / f"{number}"
        place.mkdir(parents=True)
        for image in range(100):
            (place / f"{image}.jpg").touch()
        (place / "link").symlink_to("0.jpg")
    other = here / "other"
    shutil.copytree(tree, other, symlinks=True)
    run("rm", "-rf", tree)
    with processes(lambda: shutil.rmtree(other, ignore_errors=True), lambda: shutil.rmtree(other, ignore_errors=True)):
        pass
    assert set(os.listdir(here)) <= {"other"}
    shutil.rmtree(other, ignore_errors=True)
    assert os.listdir(here) == []


# -- fio --------------------------------------------------------------------------------------------------------------


def test_fio_finds_what_it_wrote(here: Path) -> None:
    """Four processes write blocks at random in images of their own, and each block says what must be in it."""
    run(
        "fio",
        "--name=verify",
        f"--directory={here}",
        "--rw=randrw",
        "--bsrange=512-128k",
        "--blockalign=512",
        "--size=3m",
        "--numjobs=4",
        "--nrfiles=2",
        "--file_service_type=random",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=32",
        "--fsync=64",
        "--randrepeat=0",
        "--group_reporting",
    )
