"""`imgfs snapshot` on a real XFS: beside a mount that is written to, killed anywhere, on a disk that gets full."""

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ascending import KEPT, newest_in, writing
from command_line import Run, flip, place_of, volume_file
from killed_store import MortalDisk, die
from mortal import Life, in_process, status_of
from mounted import Mounted, XfsDisk, imgfs, make_tree, run, seen, wait_until

from imgfs.cli import progress
from imgfs.cloning import Reflink
from imgfs.disk import Disk
from imgfs.errors import EXIT_BUSY, EXIT_DAMAGED, EXIT_FAILURE, EXIT_NO_STORE, EXIT_USAGE, StoreFull
from imgfs.settings import KIB, MIB, Settings
from imgfs.snapshot import UNFINISHED, take_snapshot
from imgfs.store import ROOT, Store, make_store


class Nobody:
    """A watcher that does not look."""

    def started(self, volumes: int, volume_bytes: int) -> None:
        pass

    def advanced(self, volumes: int, volume_bytes: int) -> None:
        pass

    def opened(self, store: Store) -> None:
        pass


@pytest.fixture
def place(disk: XfsDisk) -> Iterator[Path]:
    """An empty directory on XFS."""
    path = disk.path / f"snapshots{random.getrandbits(32):08x}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def bytes_below(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def images_of(store: Path) -> dict[bytes, bytes]:
    """Return the images at the top of the store at *store*, which must be clean."""
    found = {}
    with Store.open(str(store), writable=False) as opened:
        assert opened.report.damage == []
        for entry in opened.list(ROOT):
            handle = opened.open_image(entry.inode)
            found[entry.name] = bytes(opened.read(handle, 0, MIB))
            opened.release(handle)
    return found


# -- beside a mount ---------------------------------------------------------------------------------------------------


def test_beside_writers_it_has_of_each_all_up_to_some_image(mounted: Mounted, place: Path) -> None:
    taken: list[tuple[Path, list[int], list[int]]] = []
    with writing(mounted.point) as writers:
        for number, reflink in enumerate(["always", "never", "auto"]):
            wait_until(lambda: all(writer.closed > KEPT * 2 for writer in writers), "enough is written")
            before = [writer.closed for writer in writers]
            target = place / f"{number}"
            imgfs("snapshot", "-q", f"--reflink={reflink}", mounted.store, target)
            taken.append((target, before, [writer.begun for writer in writers]))
    for target, before, after in taken:
        imgfs("check", target)
        with Store.open(str(target), writable=False) as snapshot:
            assert snapshot.report.damage == []
            newest = [newest_in(snapshot, writer) for writer in writers]
        assert all(low <= found <= high for low, found, high in zip(before, newest, after, strict=True)), newest
        assert newest != before, "nobody wrote meanwhile"


def test_beside_compaction_and_holes_it_is_whole(stopped: Mounted, place: Path) -> None:
    stopped.expected_log.append(r"compacted .*")
    stopped.start("allow_other,retention=0,compact=95,sync_interval=0.2")
    with writing(stopped.point) as writers:
        wait_until(lambda: all(writer.closed > KEPT * 2 for writer in writers), "something was deleted")
        for number in range(4):
            stopped.watch()
            before = [writer.closed for writer in writers]
            copy = place / f"{number}"
            compaction = threading.Thread(target=imgfs, args=("compact", "-q", stopped.store))
            compaction.start()
            imgfs("snapshot", f"--reflink={('always', 'never')[number % 2]}", stopped.store, copy)
            compaction.join()
            after = [writer.begun for writer in writers]
            imgfs("check", copy)
            with Store.open(str(copy), writable=False) as store:
                assert store.report.damage == []
                newest = [newest_in(store, writer) for writer in writers]
            assert all(first <= middle <= last for first, middle, last in zip(before, newest, after, strict=True))
            shutil.rmtree(copy)


def test_it_can_be_mounted_beside_the_store(mounted: Mounted, place: Path, site: Path) -> None:
    make_tree(mounted.point / "tree", 7)
    wanted = seen(mounted.point)
    text = imgfs("snapshot", mounted.store, place / "copy")
    assert " of them shared, in " in text
    (mounted.point / "later").write_bytes(b"later")
    shutil.rmtree(mounted.point / "tree" / "a")
    point = site / f"point{random.getrandbits(32):08x}"
    point.mkdir()
    copy = Mounted(place / "copy", point)
    try:
        copy.start()
        assert seen(point) == wanted
        (point / "in the copy").write_bytes(b"copy")
        assert not (mounted.point / "in the copy").exists()
        copy.stop()
    finally:
        copy.tear_down()
    imgfs("check", place / "copy")


def test_what_is_being_written_is_not_in_it(mounted: Mounted, place: Path) -> None:
    (mounted.point / "image").write_bytes(b"old")
    with (
        open(mounted.point / "image", "r+b", buffering=0) as old,
        open(mounted.point / "new", "wb", buffering=0) as new,
    ):
        old.write(b"new")
        new.write(b"new")
        # Not by another process: a child that closes what it has inherited flushes it.
        take_snapshot(str(mounted.store), str(place / "copy"), Nobody())
    assert images_of(place / "copy") == {b"image": b"old"}
    assert not os.listdir(place / "copy" / "staging")


def test_a_mount_of_the_store_is_no_place_for_it(mounted: Mounted, place: Path) -> None:
    text = imgfs("snapshot", mounted.store, mounted.point / "copy", code=EXIT_FAILURE)
    assert text == f"imgfs: {mounted.point}/copy lies in a mount of {mounted.store}; name a directory outside of it\n"
    assert os.listdir(mounted.point) == []


def test_no_block_is_there_twice(stopped: Mounted, place: Path) -> None:
    with Store.open(str(stopped.store)) as store:
        for number in range(40):
            store.put(ROOT, b"%d" % number, bytes([number]) * MIB, MIB, mode=0o644, uid=0, gid=0, mtime_ns=0)
    os.sync()
    before = os.statvfs(place).f_bfree
    imgfs("snapshot", stopped.store, place / "copy")
    space = os.statvfs(place)
    assert (before - space.f_bfree) * space.f_bsize < 2 * MIB


# -- cut off ----------------------------------------------------------------------------------------------------------


class MortalSnapshotDisk(MortalDisk):
    """As `MortalDisk`, with the calls that only a snapshot makes."""

    def _at_once(self, call: Callable[[], object]) -> None:
        self._life.store(lambda size: call() if size else None, 1)

    def clone(self, source: int, target: int) -> bool:
        self._at_once(lambda: Disk.clone(self, source, target))
        return True

    def mkdir(self, path: str) -> None:
        self._at_once(lambda: Disk.mkdir(self, path))

    def rmdir(self, path: str) -> None:
        self._at_once(lambda: Disk.rmdir(self, path))


@pytest.fixture
def small(place: Path) -> Path:
    """A store of two volumes on XFS."""
    path = place / "store"
    make_store(str(path), Settings(volume_bytes_max=64 * KIB), uid=0, gid=0)
    with Store.open(str(path)) as store:
        for number in range(5):
            data = bytes([number]) * 20_000
            store.put(ROOT, b"%d" % number, data, len(data), mode=0o644, uid=0, gid=0, mtime_ns=number)
    return path


@pytest.mark.parametrize("reflink", [Reflink.ALWAYS, Reflink.NEVER])
def test_killed_before_any_step_it_is_there_whole_or_not(small: Path, place: Path, reflink: Reflink) -> None:
    before, wanted, target = bytes_below(small), images_of(small), place / "copy"
    there = False
    for step in itertools.count():

        def snapshot(step: int = step) -> None:
            disk = MortalSnapshotDisk(Life(step, torn=True, end=die))
            take_snapshot(str(small), str(target), Nobody(), reflink=reflink, disk=disk)

        # What was killed before lies in the way, until one gets through.
        status = status_of(in_process(snapshot))
        assert status == 0 or os.WIFSIGNALED(status), f"step {step} failed"
        assert bytes_below(small) == before, f"step {step}"
        there = target.exists()
        if there:
            assert images_of(target) == wanted, f"step {step}"
            assert not Path(f"{target}{UNFINISHED}").exists()
            shutil.rmtree(target)
        if status == 0:
            break
    assert there
    assert step > 30


class HopefulDisk(Disk):
    """A disk that says it has room."""

    def space(self, path: str) -> os.statvfs_result:
        return os.statvfs_result((512, 512, 1 << 40, 1 << 40, 1 << 40, 0, 0, 0, 0, 255))


@pytest.mark.parametrize("reflink", [Reflink.ALWAYS, Reflink.NEVER])
def test_a_disk_that_gets_full_keeps_no_half_of_it(small: Path, place: Path, disk: XfsDisk, reflink: Reflink) -> None:
    with Store.open(str(small)) as store:
        for number in range(60):
            data = bytes([number]) * 50_000
            store.put(ROOT, b"more %d" % number, data, len(data), mode=0o644, uid=0, gid=0, mtime_ns=number)
    before, wanted, target = bytes_below(small), images_of(small), place / "copy"
    results = []
    for leaving_mib in (1, 2, 3, 8):
        with disk.filled_up(leaving=leaving_mib * MIB):
            with contextlib.suppress(StoreFull):
                take_snapshot(str(small), str(target), Nobody(), reflink=reflink, disk=HopefulDisk())
            results.append(target.exists())
            assert not Path(f"{target}{UNFINISHED}").exists()
        assert bytes_below(small) == before
        if target.exists():
            assert images_of(target) == wanted
            shutil.rmtree(target)
    assert results[-1]
    assert reflink == Reflink.ALWAYS or not results[0]


# -- the command ------------------------------------------------------------------------------------------------------


def test_what_it_says(filled: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("snapshot", "--reflink=never", filled, tmp_path / "copy")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("snapshot of 20 images, up to change 3")
    assert "2 volumes (0.1 MB), copied, in 0." in done.out
    assert run("snapshot", "-q", filled, tmp_path / "quiet") == (0, "", "")
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0)
    done = run("snapshot", "--reflink=never", filled, tmp_path / "shown")
    assert done.err.splitlines()[0].startswith("copying: 0 of 2 volumes, ")
    assert ", 0:00 left" in done.err.splitlines()[-1]


def test_what_cannot_be_is_one_line(filled: Path, tmp_path: Path, run: Run) -> None:
    copy = tmp_path / "copy"
    for arguments, code, text in (
        ((filled, filled / "copy"), EXIT_FAILURE, f"{filled}/copy lies in the store {filled}; name a directory"),
        ((filled, tmp_path), EXIT_FAILURE, f"{tmp_path} is there already; name a new directory for the snapshot"),
        ((tmp_path, copy), EXIT_NO_STORE, f"there is no store at {tmp_path}; make one with"),
        ((filled, tmp_path / "a" / "b"), EXIT_FAILURE, f"{tmp_path}/a does not exist; make it first"),
        ((filled, "/proc/copy"), EXIT_FAILURE, "/proc/copy.imgfs-snapshot: No such file or directory"),
        ((filled, ""), EXIT_USAGE, "invalid value for 'DEST': the path is empty"),
        (("--reflink=maybe", filled, copy), EXIT_USAGE, "invalid value for '--reflink': 'maybe' is not one of 'auto'"),
    ):
        done = run("snapshot", *arguments)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith(f"imgfs: {text}"), done.err
        assert done.err.count("\n") == 1
    assert not copy.exists()


def test_damage_comes_along_and_is_named(filled: Path, tmp_path: Path, run: Run) -> None:
    place = place_of(filled, "album 0/IMG_0002.jpg", run)
    for name in ("idx", "names"):
        (filled / "volumes" / f"{place['volume']:08d}.{name}").unlink()
    flip(volume_file(filled, place["volume"]), place["offset"] + 20)
    done = run("snapshot", filled, tmp_path / "copy")
    assert done.code == EXIT_DAMAGED
    assert done.err.startswith(f"imgfs: damaged: volume {place['volume']}, offset {place['offset']}: ")
    assert done.out.startswith("snapshot of 19 images")


def test_two_at_a_time_do_not_meet(filled: Path, tmp_path: Path, run: Run) -> None:
    unfinished = tmp_path / f"copy{UNFINISHED}"
    (unfinished / "volumes").mkdir(parents=True)
    (unfinished / "volumes" / "00000001.vol").write_bytes(b"of the other")
    other = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run("snapshot", filled, tmp_path / "copy")
        assert (done.code, done.out) == (EXIT_BUSY, "")
        assert done.err == f"imgfs: another process makes this snapshot just now: it works in {unfinished}\n"
        assert (unfinished / "volumes" / "00000001.vol").read_bytes() == b"of the other"
    finally:
        os.close(other)
    assert run("snapshot", filled, tmp_path / "copy").code == 0
    assert not unfinished.exists()


def test_made_by_root_it_belongs_to_who_has_the_store(small: Path, place: Path) -> None:
    run("chown", "-R", "33:33", small)
    imgfs("snapshot", small, place / "copy")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in [place / "copy", *(place / "copy").rglob("*")]} == {
        (33, 33)
    }
