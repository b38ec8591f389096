"""What people run on a directory of photos works on a mount: cp, rsync, diff, sqlite3, git, mogrify."""

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted import Mounted, make_tree, run, seen, wait_until
from PIL import Image

from imgfs.settings import MIB

pytestmark = [pytest.mark.mount, pytest.mark.root]


def _cp(source: Path, target: Path) -> None:
    run("cp", "-a", f"{source}/.", target)


def _rsync(source: Path, target: Path) -> None:
    run("rsync", "-a", "--modify-window=-1", f"{source}/", target)


@pytest.mark.parametrize("copy", [_cp, _rsync])
def test_a_tree_goes_in_and_comes_out_equal(
    mounted: Mounted, tmp_path: Path, copy: Callable[[Path, Path], None]
) -> None:
    source, target, back = tmp_path / "source", mounted.point / "tree", tmp_path / "back"
    source.mkdir()
    target.mkdir()
    make_tree(source, seed=1)
    before = seen(source)
    copy(source, target)
    _check_equal(source, target)
    assert seen(target) == before
    mounted.stop()
    mounted.start()
    mounted.drop_caches()
    _check_equal(source, target)
    assert seen(target) == before
    back.mkdir()
    copy(target, back)
    assert seen(back) == before


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


def test_sqlite(mounted: Mounted) -> None:
    path = mounted.point / "photos.db"
    for mode in ("delete", "wal"):
        database = sqlite3.connect(path)
        assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
        database.execute(f"create table {mode}_photos (name text primary key, data blob)")
        for number in range(20):
            with database:
                database.execute(f"insert into {mode}_photos values (?, ?)", (f"{number}.jpg", os.urandom(20_000)))
        database.close()
    assert run("sqlite3", path, "pragma integrity_check", "select count(*) from wal_photos") == "ok\n20\n"
    mounted.kill()
    mounted.start()
    assert run("sqlite3", path, "pragma integrity_check", "select count(*) from delete_photos") == "ok\n20\n"


def test_git(mounted: Mounted, tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", mounted.point / "clone"
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "gc.auto=0", "-c", "safe.directory=*"]
    run("git", "init", "-q", "-b", "main", origin)
    make_tree(origin / "photos", seed=4)
    for path in origin.glob("photos/**/*"):
        if not path.is_symlink():
            path.chmod(0o755)
    run("git", "-C", origin, *identity, "add", "-A")
    run("git", "-C", origin, *identity, "commit", "-q", "-m", "photos")
    run("git", *identity, "clone", "-q", "--no-hardlinks", origin, clone)
    run("git", "-C", clone, *identity, "fsck", "--strict", "--no-progress")
    assert run("git", "-C", clone, *identity, "status", "--porcelain") == ""
    (clone / "new.txt").write_text("new")
    run("git", "-C", clone, *identity, "add", "new.txt")
    run("git", "-C", clone, *identity, "commit", "-q", "-m", "new")
    run("git", "-C", clone, *identity, "gc", "-q")
    mounted.stop()
    mounted.start()
    run("git", "-C", clone, *identity, "fsck", "--strict", "--no-progress")
    assert run("git", "-C", clone, *identity, "status", "--porcelain") == ""


def test_mogrify(mounted: Mounted) -> None:
    for number in range(5):
        photo = Image.effect_noise((300, 200), 50 + number).convert("RGB")
        photo.save(mounted.point / f"{number}.jpg", quality=90)
    run("mogrify", "-resize", "50%", *(mounted.point / f"{number}.jpg" for number in range(5)))
    mounted.stop()
    mounted.start()
    assert sorted(os.listdir(mounted.point)) == [f"{number}.jpg" for number in range(5)]
    for number in range(5):
        with Image.open(mounted.point / f"{number}.jpg") as photo:
            photo.load()
            assert photo.size == (150, 100)


def test_find_du_and_tar(root: Path, tmp_path: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "image").write_bytes(bytes(MIB))
    assert run("find", root, "-type", "f") == f"{root}/a/b/image\n"
    assert run("du", "--block-size=1K", "-s", root).split()[0] == "1024"
    run("tar", "-cf", tmp_path / "a.tar", "-C", root, "a")
    run("tar", "-xf", tmp_path / "a.tar", "-C", root, "--transform=s/^a/c/")
    assert (root / "c" / "b" / "image").read_bytes() == bytes(MIB)
    run("rm", "-rf", root / "a", root / "c")
    assert os.listdir(root) == []
