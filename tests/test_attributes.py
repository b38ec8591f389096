"""Modes, owners and times on a real mount: kept, inherited, checked and moved as on any file system."""

import os
import stat
import time
from pathlib import Path

import pytest
from mounted import Mounted, as_user, failure, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]


def test_times_are_kept_to_the_nanosecond(mounted: Mounted) -> None:
    image = mounted.point / "image"
    image.write_bytes(b"x")
    for mtime_ns in (1_600_000_000_123_456_789, 1, 0, -1, -1_500_000_000_000_000_001):
        os.utime(image, ns=(7, mtime_ns))
        assert image.stat().st_mtime_ns == mtime_ns
    os.utime(mounted.point, ns=(7, 99))
    mounted.stop()
    mounted.start()
    assert image.stat().st_mtime_ns == -1_500_000_000_000_000_001
    assert mounted.point.stat().st_mtime_ns == 99


def test_times_set_on_an_open_image_outlive_its_close(root: Path) -> None:
    with open(root / "image", "wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.utime(file.fileno(), ns=(0, 1_234_567_890_987_654_321))
        os.fchmod(file.fileno(), 0o640)
        os.fchown(file.fileno(), 12, 34)
    status = os.stat(root / "image")
    assert status.st_mtime_ns == 1_234_567_890_987_654_321
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)


def test_times_move_as_they_should(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"1")
    os.utime(image, ns=(0, 0))
    os.utime(root, ns=(0, 0))
    changed_ns = image.stat().st_ctime_ns
    image.write_bytes(b"2")
    assert image.stat().st_mtime_ns > changed_ns
    assert root.stat().st_mtime_ns == 0
    for change in (
        lambda: (root / "other").touch(),
        lambda: os.rename(root / "other", root / "third"),
        lambda: os.unlink(root / "third"),
        lambda: os.mkdir(root / "directory"),
        lambda: os.rmdir(root / "directory"),
        lambda: os.symlink("x", root / "link"),
    ):
        os.utime(root, ns=(0, 0))
        change()
        assert root.stat().st_mtime_ns > changed_ns
    with open(image, "rb", buffering=0) as file:
        written_ns = image.stat().st_mtime_ns
        file.read()
        assert os.fstat(file.fileno()).st_mtime_ns == written_ns


def test_mtime_of_an_open_image_does_not_move_when_it_is_closed(root: Path) -> None:
    with open(root / "image", "wb", buffering=0) as file:
        file.write(b"x")
        written_ns = os.fstat(file.fileno()).st_mtime_ns
        deadline = time.monotonic() + 0.02
        wait_until(lambda: time.monotonic() > deadline, "the clock has moved")
    os.stat(root / "image")
    assert (root / "image").stat().st_mtime_ns == written_ns


def test_owner_mode_and_umask_of_what_is_created(root: Path) -> None:
    root.chmod(0o777)

    def create() -> None:
        os.umask(0o027)
        with open(root / "image", "wb"):
            pass
        os.mkdir(root / "directory")
        os.symlink("x", root / "link")

    as_user(1234, 100, create)
    for name, mode in (("image", 0o640), ("directory", 0o750), ("link", 0o777)):
        status = os.lstat(root / name)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 1234, 100)


def test_a_set_gid_directory_passes_its_group_on(root: Path) -> None:
    (root / "team").mkdir()
    os.chown(root / "team", 0, 4321)
    os.chmod(root / "team", 0o2777)

    def create() -> None:
        os.mkdir(root / "team" / "below")
        with open(root / "team" / "image", "wb"):
            pass

    as_user(1234, 100, create)
    below, image = os.stat(root / "team" / "below"), os.stat(root / "team" / "image")
    assert (below.st_gid, image.st_gid) == (4321, 4321)
    assert below.st_mode & stat.S_ISGID
    assert not image.st_mode & stat.S_ISGID


def test_set_id_bits_go_when_others_change_the_file(root: Path) -> None:
    image = root / "image"
    image.write_bytes(b"x")

    def set_id() -> int:
        return stat.S_IMODE(image.stat().st_mode) & 0o7000

    os.chmod(image, 0o6777)
    assert set_id() == 0o6000
    as_user(1234, 100, lambda: image.open("ab").write(b"y"))
    assert set_id() == 0
    os.chmod(image, 0o6777)
    as_user(1234, 100, lambda: os.truncate(image, 0))
    assert set_id() == 0
    os.chmod(image, 0o6777)
    os.chown(image, 5, 5)
    assert set_id() == 0
    os.chmod(image, 0o2666)  # no x for the group: mandatory locking once, nobody's privilege
    os.chown(image, 6, 6)
    assert set_id() == 0o2000


def test_permissions_are_checked(root: Path) -> None:
    (root / "private").mkdir(0o700)
    (root / "private" / "image").write_bytes(b"secret")
    (root / "readable").write_bytes(b"public")
    os.chmod(root / "readable", 0o644)

    def look() -> None:
        assert failure(os.stat, root / "private" / "image") == "EACCES"
        assert failure(os.unlink, root / "readable") == "EACCES"
        assert failure(os.open, root / "readable", os.O_WRONLY) == "EACCES"
        assert failure(os.chmod, root / "readable", 0o666) == "EPERM"
        assert (root / "readable").read_bytes() == b"public"
        assert os.access(root / "readable", os.R_OK)
        assert not os.access(root / "readable", os.W_OK)

    as_user(1234, 100, look)
