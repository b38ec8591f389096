"""The past of a store that is mounted and written: shown beside it, and brought back through the mountpoint."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from beside import CAPABILITY
from mounted import Mounted, failure, imgfs, make_tree, seen, wait_until

from imgfs import mountpoint

pytestmark = [pytest.mark.mount, pytest.mark.root]


def moment() -> str:
    """Return the time as a command takes it, when the clock of the store has gone on."""
    time.sleep(0.02)
    now_ns = time.time_ns()
    time.sleep(0.02)
    return f"@{now_ns // 10**9}.{now_ns % 10**9:09d}"


@pytest.fixture
def past(stopped: Mounted) -> Iterator[Mounted]:
    """The same store to be mounted a second time, as it was."""
    point = stopped.point.with_name(stopped.point.name + "-past")
    point.mkdir()
    past = Mounted(stopped.store, point)
    try:
        yield past
    finally:
        past.tear_down()


def test_a_mount_of_the_past_beside_the_writer(stopped: Mounted, past: Mounted) -> None:
    stopped.start("allow_other,xattr")
    times, states = [], []
    for seed in range(3):
        if seed:
            for name in sorted(os.listdir(stopped.point))[::2]:
                path = stopped.point / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        make_tree(stopped.point / str(seed), seed, images=20)
        for old in range(seed):
            if (stopped.point / str(old)).exists():
                (stopped.point / str(old) / "added").write_text(str(seed))
        states.append(seen(stopped.point))
        times.append(moment())
    for number, when in enumerate(times):
        past.start(f"allow_other,asof={when}")
        assert seen(past.point) == states[number]
        assert failure((past.point / "new").touch) == "EROFS"
        past.stop()
    # So it is when the writer has closed the store, and without an index.
    stopped.stop()
    imgfs("rebuild-index", stopped.store)
    past.start(f"allow_other,asof={times[1]}")
    assert seen(past.point) == states[1]
    past.stop()


def test_what_was_deleted_comes_back_through_the_mountpoint(stopped: Mounted) -> None:
    stopped.start("allow_other,xattr")
    album = stopped.point / "album"
    make_tree(album, 5, images=25)
    os.setxattr(album / "a", "user.of", b"a directory")
    with open(album / "program", "wb") as file:
        file.write(b"x" * 100)
    os.setxattr(album / "program", "user.a", b"b" * 1000)
    os.setxattr(album / "program", "security.capability", CAPABILITY)
    os.mkfifo(album / "pipe", 0o620)
    os.utime(album / "pipe", ns=(0, 5_000_000_001))
    os.utime(album, ns=(0, 7_000_000_001))
    before = seen(stopped.point)
    workers = len(stopped.children("worker"))
    shutil.rmtree(album)
    text = imgfs("trash", "restore", stopped.store, "album")
    assert text.startswith("restored 29 images")
    after = seen(stopped.point)
    assert {path: what for path, what in after.items() if path != b"."} == {
        path: what for path, what in before.items() if path != b"."
    }
    assert os.getxattr(album / "program", "user.a") == b"b" * 1000
    assert os.getxattr(album / "program", "security.capability") == CAPABILITY
    assert os.getxattr(album / "a", "user.of") == b"a directory"
    assert len(stopped.children("worker")) == workers
    # It is durable when the command has returned.
    stopped.kill()
    stopped.start("allow_other,xattr")
    assert seen(stopped.point) == after


def test_a_name_that_is_taken_stays_taken(mounted: Mounted) -> None:
    image = mounted.point / "a.jpg"
    image.write_bytes(b"old")
    image.write_bytes(b"new")
    text = imgfs("trash", "restore", mounted.store, "a.jpg", code=1)
    assert "there is something of that name" in text
    assert image.read_bytes() == b"new"
    imgfs("trash", "restore", mounted.store, "a.jpg", "--to", "elsewhere")
    assert (mounted.point / "elsewhere" / "a.jpg").read_bytes() == b"old"
    imgfs("trash", "restore", mounted.store, "a.jpg", "--force")
    assert image.read_bytes() == b"old"
    assert sorted(os.listdir(mounted.point)) == ["a.jpg", "elsewhere"]


def test_no_link_leads_out_of_the_mount(mounted: Mounted, tmp_path: Path) -> None:
    (mounted.point / "d").mkdir()
    (mounted.point / "d" / "a").write_bytes(b"a")
    shutil.rmtree(mounted.point / "d")
    (mounted.point / "d").symlink_to(tmp_path)
    text = imgfs("trash", "restore", mounted.store, "d/a", code=1)
    assert "d/a: /d is no directory any more" in text
    assert os.listdir(tmp_path) == []


def test_what_the_mount_cannot_keep_is_said(mounted: Mounted, stopped: Mounted) -> None:
    mounted.stop()
    mounted.start("allow_other,xattr")
    (mounted.point / "a").write_bytes(b"a")
    os.setxattr(mounted.point / "a", "user.a", b"b")
    (mounted.point / "a").unlink()
    mounted.stop()
    mounted.start("allow_other")
    text = imgfs("trash", "restore", mounted.store, "a")
    assert "a: restored without: extended attribute user.a: mount it with -o xattr" in text
    assert (mounted.point / "a").read_bytes() == b"a"


def test_the_mount_of_the_past_is_not_what_is_written_to(mounted: Mounted, past: Mounted) -> None:
    (mounted.point / "a").write_bytes(b"a")
    when = moment()
    (mounted.point / "a").unlink()
    past.start(f"allow_other,asof={when}")
    assert [mount.writable for mount in mountpoint.of_store(str(mounted.store))] == [True, False]
    imgfs("trash", "restore", mounted.store, "a")
    assert (mounted.point / "a").read_bytes() == b"a"
    mounted.stop()
    wait_until(lambda: len(mountpoint.of_store(str(mounted.store))) == 1, "only the past is mounted")
    (text,) = imgfs("trash", "list", mounted.store).splitlines()
    assert text.endswith(" a")
    imgfs("trash", "restore", mounted.store, text.split()[0], "--to", "b")
    assert imgfs("ls", mounted.store) == "a\nb\n"
    past.stop()
