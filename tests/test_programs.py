"""Programs at work while the daemon is killed; and rsync, which then brings all up to date.

What single programs leave on a mount is looked at in `test_programs_*.py`.
"""

import os
import subprocess
import threading
from pathlib import Path

import pytest
from mounted import Mounted, make_tree, run, seen, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]


def _rsync(source: Path, target: Path) -> None:
    run("rsync", "-a", "--modify-window=-1", f"{source}/", target)


def test_rsync_brings_a_tree_up_to_date_and_deletes(mounted: Mounted, tmp_path: Path) -> None:
    old, new, target = tmp_path / "old", tmp_path / "new", mounted.point / "tree"
    for source, seed in ((old, 1), (new, 2)):
        source.mkdir()
        make_tree(source, seed)
    target.mkdir()
    _rsync(old, target)
    run("rsync", "-a", "--delete", "--modify-window=-1", f"{new}/", target)
    assert seen(target) == seen(new)
    assert run("rsync", "-ai", "--delete", "--modify-window=-1", f"{new}/", target) == ""


def _check_equal(source: Path, target: Path) -> None:
    assert run("diff", "-r", "--no-dereference", source, target) == ""
    assert run("rsync", "-anc", "--delete", "--itemize-changes", "--modify-window=-1", f"{source}/", target) == ""


def test_every_closed_image_outlives_a_daemon_that_is_killed_during_a_copy(mounted: Mounted) -> None:
    """Three writers note what they have closed, until the daemon is killed in the middle of it."""
    closed: list[tuple[str, bytes]] = []
    started: dict[str, bytes] = {}

    def write(writer: int) -> None:
        for number in range(100_000):
            name = f"{writer}-{number}"
            data = os.urandom(1 + number * 7919 % 300_000)
            started[name] = data
            try:
                (mounted.point / name).write_bytes(data)
            except OSError:
                return
            closed.append((name, data))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for goal in (60, 160):
        assert mounted.process is not None
        wait_until(lambda goal=goal: len(closed) >= goal, "some images are in", process=mounted.process)  # type: ignore[misc]
    mounted.kill()
    for writer in writers:
        writer.join()
    mounted.start()
    for name, data in closed:
        assert (mounted.point / name).read_bytes() == data
    for name in set(os.listdir(mounted.point)) - {name for name, _ in closed}:
        # close() had not returned: it may be there, but then it is whole.
        assert (mounted.point / name).read_bytes() == started[name]


def test_a_copy_that_was_cut_off_is_completed_by_the_next(mounted: Mounted, tmp_path: Path) -> None:
    source, target = tmp_path / "source", mounted.point / "tree"
    source.mkdir()
    make_tree(source, seed=3, images=400)
    target.mkdir()
    with subprocess.Popen(
        ["cp", "-a", f"{source}/.", target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as copy:
        assert mounted.process is not None
        wait_until(lambda: len(list(target.rglob("*.jpg"))) > 50, "cp is under way", process=mounted.process)
        mounted.kill()
        copy.wait(30)
    mounted.start()
    _rsync(source, target)
    _check_equal(source, target)
    assert seen(target) == seen(source)


def test_overwriting_keeps_the_old_image_until_the_close(mounted: Mounted) -> None:
    image = mounted.point / "image"
    image.write_bytes(b"old" * 100_000)
    os.utime(image, ns=(0, 7))
    # The descriptor dies with the mount; nobody closes it before.
    writing = os.open(image, os.O_WRONLY | os.O_TRUNC)
    os.write(writing, b"new")
    mounted.kill()
    with pytest.raises(OSError, match="not connected"):
        os.write(writing, b"more")
    with pytest.raises(OSError, match="not connected"):
        os.close(writing)
    mounted.start()
    assert image.read_bytes() == b"old" * 100_000
    assert image.stat().st_mtime_ns == 7
    image.write_bytes(b"new")
    mounted.kill()
    mounted.start()
    assert image.read_bytes() == b"new"
