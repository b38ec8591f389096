"""Several processes at once, on a mount as on plain XFS: who is first, who waits, who sees what."""

import contextlib
import fcntl
import mmap
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import failure
from places import opened

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix sharing")]

DEADLINE_S = 30.0

# A child that starts with a copy of this process could hold its locks.
_processes = multiprocessing.get_context("fork")


def _in_processes(count: int, work: Callable[[int], None]) -> None:
    """Let *count* processes do `work(number)` at the same time; none may fail."""
    started = [_processes.Process(target=work, args=(number,)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(DEADLINE_S)
    assert [process.exitcode for process in started] == [0] * count


def test_only_one_of_several_makes_a_name(place: Path) -> None:
    names = [place / f"{number}" for number in range(40)]

    def make(number: int) -> None:
        for name in names:
            with contextlib.suppress(FileExistsError):
                made = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.close(made)
                with open(place / f"won by {number}", "ab") as file:
                    file.write(b"x")

    _in_processes(3, make)
    assert sum(path.stat().st_size for path in place.glob("won by *")) == 40


def test_several_that_append_lose_nothing(place: Path) -> None:
    image = place / "image"
    image.touch()

    def append(number: int) -> None:
        with opened(image, os.O_WRONLY | os.O_APPEND) as file:
            for count in range(60):
                assert os.write(file, b"%d:%04d\n" % (number, count)) == 7

    _in_processes(3, append)
    lines = image.read_bytes().splitlines()
    assert sorted(lines) == sorted(b"%d:%04d" % (number, count) for number in range(3) for count in range(60))
    for number in range(3):
        mine = [line for line in lines if line.startswith(b"%d:" % number)]
        assert mine == sorted(mine)
    with opened(image, os.O_WRONLY | os.O_APPEND) as file:
        os.pwrite(file, b"end", 0)  # appends all the same, on Linux
    assert image.read_bytes().endswith(b"end")


def test_the_limit_of_a_process(place: Path) -> None:
    def write(_: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened(place / "image", os.O_RDWR | os.O_CREAT) as file:
            assert os.write(file, bytes(10_000)) == 5000
            assert failure(os.write, file, b"x") == "EFBIG"
            assert failure(os.ftruncate, file, 5001) == "EFBIG"

    _in_processes(1, write)
    assert (place / "image").stat().st_size == 5000


# -- locks and mappings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf])
def test_locks(place: Path, lock: Callable[..., None]) -> None:
    image = place / "image"
    image.touch()

    def refused(exclusive: int) -> None:
        with opened(image, os.O_RDWR) as file:
            assert failure(lock, file, exclusive | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")

    def granted(exclusive: int) -> None:
        with opened(image, os.O_RDWR) as file:
            lock(file, exclusive | fcntl.LOCK_NB)

    with opened(image, os.O_RDWR) as file:
        lock(file, fcntl.LOCK_EX)
        _in_processes(1, lambda _: refused(fcntl.LOCK_EX))
        _in_processes(1, lambda _: refused(fcntl.LOCK_SH))
        lock(file, fcntl.LOCK_SH)
        _in_processes(1, lambda _: granted(fcntl.LOCK_SH))
        _in_processes(1, lambda _: refused(fcntl.LOCK_EX))
        lock(file, fcntl.LOCK_UN)
        _in_processes(1, lambda _: granted(fcntl.LOCK_EX))
        lock(file, fcntl.LOCK_EX)
    _in_processes(1, lambda _: granted(fcntl.LOCK_EX))


def test_locks_of_ranges_wait_for_each_other(place: Path) -> None:
    """Several processes count in one file, under a lock of some of its bytes."""
    image = place / "image"
    image.write_bytes(b"00000000")

    def count(_: int) -> None:
        with opened(image, os.O_RDWR) as file:
            for _ in range(30):
                fcntl.lockf(file, fcntl.LOCK_EX, 4, 2)
                number = int(os.pread(file, 8, 0))
                os.pwrite(file, b"%08d" % (number + 1), 0)
                fcntl.lockf(file, fcntl.LOCK_UN, 4, 2)

    _in_processes(3, count)
    assert image.read_bytes() == b"00000090"


def test_a_lock_goes_with_its_process(place: Path) -> None:
    image = place / "image"
    image.touch()
    ready, tell = os.pipe()

    def hold(_: int) -> None:
        file = os.open(image, os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(tell, b"x")
        signal.pause()

    holder = _processes.Process(target=hold, args=(0,))
    holder.start()
    assert os.read(ready, 1) == b"x"
    with opened(image, os.O_RDWR) as file:
        assert failure(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
        holder.kill()
        holder.join(DEADLINE_S)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(ready)
    os.close(tell)


def test_a_shared_mapping(place: Path) -> None:
    image = place / "image"
    image.write_bytes(bytes(100_000))

    def change(_: int) -> None:
        with opened(image, os.O_RDWR) as file, mmap.mmap(file, 100_000) as mapping:
            mapping[50_000:50_005] = b"child"

    with opened(image, os.O_RDWR) as file, mmap.mmap(file, 100_000) as mapping:
        _in_processes(1, change)
        assert mapping[50_000:50_005] == b"child"
        mapping[0:6] = b"parent"
        assert os.pread(file, 6, 0) == b"parent"
        os.pwrite(file, b"written", 90_000)
        assert mapping[90_000:90_007] == b"written"
        with mmap.mmap(file, 100_000, mmap.MAP_PRIVATE) as private:
            private[0:6] = b"secret"
            assert mapping[0:6] == b"parent"
        mapping.flush()
    content = image.read_bytes()
    assert (content[:6], content[50_000:50_005], content[90_000:90_007]) == (b"parent", b"child", b"written")
