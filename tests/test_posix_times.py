"""Times on a mount as on plain XFS: which change sets which, and what can be set."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import Mounted, failure, wait_until
from places import (
    AT_SYMLINK_NOFOLLOW,
    KINDS,
    RENAME_EXCHANGE,
    UTIME_NOW,
    UTIME_OMIT,
    link_of_open,
    renameat2,
    utimensat,
)

from imgfs.atimes import AccessTimes

# One mount for all of them.
pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.xdist_group("posix times")]

NOW = (0, UTIME_NOW)
OMIT = (0, UTIME_OMIT)
SECOND_NS = 10**9


def _next_second() -> int:
    """Wait until the clock shows another second, and return that: imgfs shows a ctime in whole seconds."""
    second = int(time.time()) + 1
    # Files get the time of the last tick of the kernel's clock.
    wait_until(lambda: time.time() > second + 0.02, "another second")
    return second


def _mtime(path: Path) -> tuple[int, int]:
    return divmod(os.lstat(path).st_mtime_ns, SECOND_NS)


@pytest.mark.parametrize("kind", KINDS)
def test_now_omit_and_a_time_are_apart(place: Path, kind: str) -> None:
    path = place / "it"
    KINDS[kind](path)

    def set_times(atime: tuple[int, int], mtime: tuple[int, int]) -> tuple[int, int]:
        utimensat(path, atime, mtime, AT_SYMLINK_NOFOLLOW)
        status = os.lstat(path)
        return status.st_atime_ns, status.st_mtime_ns

    old, new = (1_900_000_000, 123_456_789), (1_950_000_000, 987_654_321)
    old_ns, new_ns = (seconds * SECOND_NS + ns for seconds, ns in (old, new))
    assert set_times(old, new) == (old_ns, new_ns)
    assert set_times(new, OMIT) == (new_ns, new_ns)
    assert set_times(OMIT, old) == (new_ns, old_ns)
    assert set_times(OMIT, OMIT) == (new_ns, old_ns)
    before_ns = time.time_ns() - SECOND_NS // 10
    atime_ns, mtime_ns = set_times(OMIT, NOW)
    assert atime_ns == new_ns
    assert before_ns < mtime_ns <= time.time_ns()
    atime_ns, mtime_ns = set_times(NOW, old)
    assert before_ns < atime_ns <= time.time_ns()
    assert mtime_ns == old_ns
    assert failure(utimensat, path, (0, SECOND_NS), OMIT, AT_SYMLINK_NOFOLLOW) == "EINVAL"


@pytest.mark.parametrize(
    "seconds", [1 - (1 << 31), -1, 0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 9_000_000_000]
)
def test_times_far_away(place: Path, seconds: int) -> None:
    """Before 1970, after 2038, after 2106."""
    for ns in (0, 1, 999_999_999):
        for kind in ("file", "directory", "pipe"):
            if not (place / kind).exists():
                KINDS[kind](place / kind)
            utimensat(place / kind, (seconds, ns), (seconds, ns))
            assert _mtime(place / kind) == (seconds, ns)
            assert os.stat(place / kind).st_atime_ns == seconds * SECOND_NS + ns


def test_times_outlive_the_mount(mounted: Mounted) -> None:
    seconds = [-(1 << 33), -1, 0, 1 << 31, 1 << 32, 9_000_000_000]
    for second in seconds:
        (mounted.point / f"{second}").touch()
        utimensat(mounted.point / f"{second}", (0, 0), (second, 999_999_999))
    mounted.kill()
    mounted.start()
    for second in seconds:
        assert _mtime(mounted.point / f"{second}") == (second, 999_999_999)


def test_a_time_that_cannot_be_kept_is_the_nearest_that_can(here: Path) -> None:
    """XFS does so, too, with other limits: imgfs has 64 bits of nanoseconds, 1677 to 2262."""
    image = here / "image"
    image.touch()
    for seconds, kept_ns in ((1 << 40, (1 << 63) - 1), (-(1 << 40), -(1 << 63)), (1 << 62, (1 << 63) - 1)):
        utimensat(image, (0, 0), (seconds, 5))
        assert image.stat().st_mtime_ns == kept_ns
    utimensat(image, (0, 0), (5, 6))
    assert image.stat().st_mtime_ns == 5 * SECOND_NS + 6


def test_reading_changes_no_time(here: Path) -> None:
    (here / "image").write_bytes(b"x" * 10_000)
    (here / "directory").mkdir()
    os.symlink("image", here / "link")
    for name in ("image", "directory", "link"):
        utimensat(here / name, (1, 2), (3, 4), AT_SYMLINK_NOFOLLOW)
    (here / "image").read_bytes()
    os.listdir(here / "directory")
    os.readlink(here / "link")
    for name in ("image", "directory", "link"):
        assert (os.lstat(here / name).st_mtime_ns, os.lstat(here / name).st_ctime) != (0, 0)
        assert _mtime(here / name) == (3, 4)


# -- what moves which time --------------------------------------------------------------------------------------------


def _write(path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(b"x")


def _empty_twice(path: Path) -> None:
    path.write_bytes(b"")
    os.utime(path, ns=(5, 5))
    path.write_bytes(b"")


def _ftruncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        os.ftruncate(file.fileno(), size)


def _link_and_unlink(path: Path) -> None:
    with open(path, "rb") as file:
        link_of_open(file.fileno(), path.parent / "other name")
    os.unlink(path.parent / "other name")


def test_what_changes_an_image_moves_its_ctime(place: Path) -> None:
    changes: dict[str, Callable[[Path], object]] = {
        "write": _write,
        "truncate": lambda path: os.truncate(path, 3),
        "truncate to more": lambda path: os.truncate(path, 70),
        "open to truncate": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
        "chmod": lambda path: os.chmod(path, 0o600),
        "chown": lambda path: os.chown(path, 5, 5),
        "utimes": lambda path: os.utime(path, ns=(0, 0)),
        "link": lambda path: os.link(path, path.with_name(path.name + " again")),
        "link and unlink": _link_and_unlink,
        "rename": lambda path: os.rename(path, path.with_name("x")) or os.rename(path.with_name("x"), path),
        "set an attribute": lambda path: os.setxattr(path, "user.comment", b"x"),
        "remove an attribute": lambda path: os.removexattr(path, "user.there"),
    }
    for name in changes:
        (place / name).write_bytes(b"content")
        os.setxattr(place / name, "user.there", b"x")
    second = _next_second()
    for name, change in changes.items():
        assert (place / name).stat().st_ctime < second
        change(place / name)
        assert (place / name).stat().st_ctime >= second, name


def test_what_fails_or_looks_moves_no_time(place: Path) -> None:
    image = place / "image"
    image.write_bytes(b"content")
    (place / "full").mkdir()
    (place / "full" / "inside").touch()
    before = [os.stat(path) for path in (place, place / "full", image)]
    _next_second()
    for call in (
        lambda: os.mkdir(image),
        lambda: os.rmdir(place / "full"),
        lambda: os.link(image, place / "full"),
        lambda: os.rename(image, place / "full"),
        lambda: os.unlink(place / "full"),
        lambda: os.open(image, os.O_CREAT | os.O_EXCL),
        lambda: os.truncate(image, -1),
        lambda: os.removexattr(image, "user.absent"),
    ):
        failure(call)
    os.close(os.open(image, os.O_RDWR))
    os.listdir(place)
    file = os.open(image, os.O_WRONLY)
    os.write(file, b"")
    os.close(file)
    os.truncate(image, 7)  # as long as it is
    os.rename(image, image)
    after = [os.stat(path) for path in (place, place / "full", image)]
    assert [(status.st_mtime_ns, status.st_ctime_ns) for status in after] == [
        (status.st_mtime_ns, status.st_ctime_ns) for status in before
    ]


def test_what_changes_bytes_moves_mtime(place: Path) -> None:
    changes: dict[str, Callable[[Path], object]] = {
        "write": _write,
        "truncate": lambda path: os.truncate(path, 3),
        "truncate to the same size": lambda path: os.truncate(path, 7),
        "open to truncate": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
        "open nothing to truncate": _empty_twice,
        "ftruncate to the same size": lambda path: _ftruncate(path, 7),
        "chmod": lambda path: os.chmod(path, 0o600),
        "rename": lambda path: os.rename(path, path.with_name("x")) or os.rename(path.with_name("x"), path),
        "link": lambda path: os.link(path, path.with_name(path.name + " again")),
    }
    moved = set()
    for name, change in changes.items():
        (place / name).write_bytes(b"content")
        os.utime(place / name, ns=(5, 5))
        change(place / name)
        if (place / name).stat().st_mtime_ns != 5:
            moved.add(name)
    assert moved == set(changes) - {"truncate to the same size", "chmod", "rename", "link"}


def test_what_changes_names_moves_the_times_of_directories(place: Path) -> None:
    old, new = place / "old", place / "new"
    old.mkdir()
    new.mkdir()
    changes: list[tuple[Callable[[], object], tuple[bool, bool]]] = [
        (lambda: (old / "image").touch(), (True, False)),
        (lambda: (old / "image").touch(), (False, False)),
        (lambda: (old / "image").write_bytes(b"x"), (False, False)),
        (lambda: os.link(old / "image", new / "image"), (False, True)),
        (lambda: os.rename(new / "image", old / "image"), (False, False)),  # names of one image: nothing happens
        (lambda: os.unlink(new / "image"), (False, True)),
        (lambda: os.rename(old / "image", old / "other"), (True, False)),
        (lambda: os.rename(old / "other", new / "other"), (True, True)),
        (lambda: os.mkdir(old / "directory"), (True, False)),
        (lambda: renameat2(old / "directory", new / "other", RENAME_EXCHANGE), (True, True)),
        (lambda: os.rmdir(new / "other"), (False, True)),
        (lambda: os.symlink("x", new / "link"), (False, True)),
        (lambda: os.mkfifo(new / "pipe"), (False, True)),
        (lambda: os.rename(new / "link", old / "directory"), (True, True)),
        (lambda: os.chmod(new / "pipe", 0o600), (False, False)),
        (lambda: os.unlink(new / "pipe"), (False, True)),
    ]
    for number, (change, expected) in enumerate(changes):
        for directory in (old, new):
            os.utime(directory, ns=(5, 5))
        change()
        moved = tuple(directory.stat().st_mtime_ns != 5 for directory in (old, new))
        assert moved == expected, number


def test_the_time_of_a_write_is_not_that_of_the_close(place: Path) -> None:
    image = place / "image"
    with open(image, "wb", buffering=0) as file:
        file.write(b"x")
        written_ns = os.fstat(file.fileno()).st_mtime_ns
        _next_second()
    assert image.stat().st_mtime_ns == written_ns


def test_access_times_are_remembered_for_the_last_that_had_theirs_set() -> None:
    times = AccessTimes(inodes_max=2)
    times.put(1, 10)
    times.put(2, 20)
    times.put(1, 11)
    times.put(3, 30)
    assert [times.get(inode, mtime_ns=7) for inode in (1, 2, 3, 4)] == [11, 7, 30, 7]
