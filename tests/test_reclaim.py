"""On a real mount: what is deleted gives its space back, and nobody who reads or writes notices."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import Load
from mount_load import check_image, image
from mounted import PROJECT, WORKER_DEATHS, Mounted, XfsDisk, give_back_ahead, imgfs, wait_until
from web_server import Nginx

from imgfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_NO_SPACE, EXIT_OK
from imgfs.layout import Word
from imgfs.memory import Memory
from imgfs.settings import KIB, MIB, Settings
from imgfs.store import make_store

pytestmark = [pytest.mark.mount, pytest.mark.root]

NOW = "allow_other,retention=0"
COMPACTED = r"compacted \d+ volumes? into volume \d+: \d+ bytes copied, -?\d+ freed"
DEATHS = (*WORKER_DEATHS, r"the maintenance process \(\d+\) died of SIGKILL; starting another")
LOAD_S = 4.0


@pytest.fixture
def small(stopped: Mounted) -> Mounted:
    """A store of small volumes, not mounted yet."""
    make_small(stopped)
    return stopped


def make_small(mounted: Mounted) -> None:
    shutil.rmtree(mounted.store)
    make_store(str(mounted.store), Settings(volume_bytes_max=MIB), uid=0, gid=0)
    mounted.expected_log.append(COMPACTED)


def disk_bytes(mounted: Mounted) -> int:
    """Return what the volumes take of the disk, but for what XFS takes of it ahead of what is written."""
    give_back_ahead(mounted.store)
    total = 0
    for path in (mounted.store / "volumes").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def free_bytes(mounted: Mounted) -> int:
    """Return what df shows for the mount, as `disk_bytes`."""
    give_back_ahead(mounted.store)
    space = os.statvfs(mounted.point)
    return space.f_bavail * space.f_frsize


def fill(directory: Path, count: int, size: int, seed: int = 0) -> None:
    directory.mkdir(exist_ok=True)
    for number in range(count):
        (directory / f"{number}").write_bytes(image(seed + number, size))


def assert_whole(directory: Path) -> None:
    for path in directory.iterdir():
        check_image(path.read_bytes(), str(path))


@pytest.mark.parametrize(("size", "count"), [(1000, 1500), (50_000, 60), (3 * MIB, 2)])
def test_df_falls_within_seconds_of_rm(stopped: Mounted, size: int, count: int) -> None:
    """Also of images of which many share a block, and none has one of its own."""
    stopped.start(NOW)
    fill(stopped.point / "gone", count, size)
    fill(stopped.point / "stays", 3, size, seed=count)
    before, shown = disk_bytes(stopped), free_bytes(stopped)
    shutil.rmtree(stopped.point / "gone")
    wait_until(lambda: disk_bytes(stopped) < before - 0.8 * size * count, "the volumes take less")
    wait_until(lambda: free_bytes(stopped) > shown + 0.8 * size * count, "df shows it")
    facts = json.loads(imgfs("info", "--json", stopped.store))
    assert facts["disk_bytes"] < before - 0.8 * size * count
    assert facts["volume_bytes"] > size * count
    stopped.drop_caches()
    assert_whole(stopped.point / "stays")


def test_df_falls_of_an_rm_that_space_is_given_back_during(stopped: Mounted) -> None:
    """XFS has set more aside by then, behind what the rm itself has written."""
    size, count = 1000, 1500
    stopped.start(NOW)
    fill(stopped.point / "gone", count, size)
    before, shown = disk_bytes(stopped), free_bytes(stopped)
    for number in range(count):
        (stopped.point / "gone" / f"{number}").unlink()
        if number in (count // 5, count // 2):
            imgfs("compact", "--dry-run", stopped.store)  # looks for what is dead before it answers
    wait_until(lambda: disk_bytes(stopped) < before - 0.8 * size * count, "the volumes take less")
    wait_until(lambda: free_bytes(stopped) > shown + 0.8 * size * count, "df shows it")


def test_who_has_waited_for_the_disk_looks_again_soon(stopped: Mounted) -> None:
    """Only what takes the processor makes the next look come later."""
    stopped.start(NOW, fault=("slow-sync-of-maintenance", "2"))
    for number in range(3):
        (stopped.point / f"{number}").write_bytes(image(number, MIB))
    before = disk_bytes(stopped)
    for number in range(2):
        (stopped.point / f"{number}").unlink()
        wait_until(lambda freed=number + 0.8: disk_bytes(stopped) < before - freed * MIB, f"{number} is freed")


def test_what_is_open_is_readable_until_it_is_closed(stopped: Mounted) -> None:
    stopped.start(NOW)
    size = 6 * MIB  # opening verifies less, and what is verified stays in a cache that takes less
    names = ("unlinked", "replaced", "other")
    for number, name in enumerate(names):
        (stopped.point / name).write_bytes(image(number, size))
    (stopped.point / "new").write_bytes(b"new")
    with open(stopped.point / "unlinked", "rb") as unlinked, open(stopped.point / "replaced", "rb") as replaced:
        before = disk_bytes(stopped)
        (stopped.point / "unlinked").unlink()
        (stopped.point / "new").rename(stopped.point / "replaced")
        (stopped.point / "other").unlink()
        wait_until(lambda: disk_bytes(stopped) < before - 0.8 * size, "what is not open is freed")
        stopped.drop_caches()
        for number, file in enumerate((unlinked, replaced)):
            assert file.read() == image(number, size)
        assert disk_bytes(stopped) > before - 1.5 * size
    wait_until(lambda: disk_bytes(stopped) < before - 2.8 * size, "what was open is freed")
    assert (stopped.point / "replaced").read_bytes() == b"new"


def test_nothing_is_freed_under_a_request_that_began_before(stopped: Mounted, tmp_path: Path) -> None:
    """A worker has looked up where the target of a link lies, and reads it when the link is long gone."""
    marker, target = tmp_path / "marker", "x" * 4000
    stopped.start(NOW + ",workers=2", fault=("hold-a-read", str(marker)))
    (stopped.point / "before").write_bytes(image(1, 50_000))
    (stopped.point / "link").symlink_to(target)
    (stopped.point / "behind").write_bytes(image(2, 50_000))
    (stopped.point / "stays").write_bytes(b"x")
    seen: list[str] = []
    reading = threading.Thread(target=lambda: seen.append(os.readlink(stopped.point / "link")))
    marker.touch()
    reading.start()
    try:
        wait_until(lambda: not marker.exists(), "a worker has it in hand")
        before = disk_bytes(stopped)
        for name in ("before", "link", "behind"):
            (stopped.point / name).unlink()
        imgfs("compact", "--dry-run", stopped.store)  # looks for what is dead once more before it answers
        assert disk_bytes(stopped) > before - 20_000
    finally:
        Path(f"{marker}.go").touch()
        reading.join()
    assert seen == [target]
    wait_until(lambda: disk_bytes(stopped) < before - 80_000, "it is freed when that is answered")


# -- compaction beside readers and writers ----------------------------------------------------------------------------


def compacting(mounted: Mounted) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "imgfs", "compact", "-q", mounted.store]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=PROJECT
    )


def compact_once(mounted: Mounted, *codes: int) -> int:
    with compacting(mounted) as command:
        text, _ = command.communicate(timeout=60)
    assert command.returncode in (EXIT_OK, *codes), text
    return command.returncode


@contextlib.contextmanager
def load(mounted: Mounted) -> Iterator[Load]:
    running = Load(mounted.point, 1)
    try:
        yield running
        running.finish()
    finally:
        running.stop()


def until(seconds: float, running: Load, what: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not running.has_failed():
        what()


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def compactions(mounted: Mounted) -> int:
    return mounted.log.read_text().count("compacted ")


def test_compaction_while_others_read_and_write(small: Mounted) -> None:
    small.start(NOW + ",workers=2,compact_rate=1000")
    with load(small) as running:
        until(LOAD_S, running, lambda: compact_once(small))
    assert compactions(small) > 0


def test_everybody_is_killed_meanwhile(small: Mounted) -> None:
    """The maintenance process every 100 ms, and now and then a worker."""
    small.expected_log += DEATHS
    small.start(NOW + ",workers=2,compact_rate=1000")
    chance = random.Random(1)

    def round_of_it() -> None:
        with compacting(small) as command:
            for _ in range(chance.randrange(2, 9)):
                time.sleep(0.1)
                kill(small.children("maint"))
                if chance.random() < 0.3:
                    kill(small.children("worker")[:1])
            text, _ = command.communicate(timeout=60)
        assert command.returncode in (EXIT_OK, EXIT_FAILURE, EXIT_BUSY), text

    with load(small) as running:
        until(LOAD_S, running, round_of_it)
    wait_until(lambda: compact_once(small, EXIT_FAILURE, EXIT_BUSY) == EXIT_OK, "the last one is left alone")
    assert "maintenance process" in small.log.read_text()
    names = os.listdir(small.store / "volumes")
    assert not [name for name in names if name.endswith(".copy")]


def test_nginx_serves_meanwhile(web_server: Nginx, mounted: Mounted) -> None:
    mounted.stop()
    make_small(mounted)
    mounted.start(NOW + ",compact_rate=1000")
    fill(mounted.point / "served", 700, 3000)
    web_server.start()
    surprises: list[str] = []
    asked = 0
    over = threading.Event()

    def ask() -> None:
        nonlocal asked
        chance = random.Random(2)
        while not over.is_set():
            number = chance.randrange(0, 700, 4)
            answer = web_server.ask(f"/served/{number}")
            asked += 1
            if answer.status != 200 or answer.body != image(number, 3000):
                surprises.append(f"{number}: {answer.status}, {len(answer.body)} bytes")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for kept in (2, 4):
            for number in range(700):
                if number % kept:
                    (mounted.point / "served" / f"{number}").unlink(missing_ok=True)
            compact_once(mounted)
    finally:
        over.set()
        thread.join()
    assert surprises == []
    assert asked > 20
    assert compactions(mounted) > 0


# -- what stays small -------------------------------------------------------------------------------------------------


def rows(mounted: Mounted) -> int:
    """Return how many rows the table of volumes has in the daemon."""
    assert mounted.process is not None
    directory = f"/proc/{mounted.process.pid}/fd"
    for name in os.listdir(directory):
        if os.readlink(f"{directory}/{name}").startswith("/memfd:imgfs-table"):
            memory = Memory(os.open(f"{directory}/{name}", os.O_RDWR))
            try:
                return memory.words[Word.VOLUMES]
            finally:
                memory.close()
    raise AssertionError("the daemon has no table")


def test_filled_and_emptied_ten_times_it_is_no_larger(small: Mounted) -> None:
    small.start(NOW + ",compact_rate=1000")
    sizes = []
    for turn in range(10):
        fill(small.point / "images", 60, 20_000, seed=turn)
        assert_whole(small.point / "images")
        shutil.rmtree(small.point / "images")
        compact_once(small)
        if turn >= 2:
            # What died last is freed by the next look of the maintenance process.
            most = max(size for size, _ in sizes[:2]) + 64 * KIB
            wait_until(lambda most=most: disk_bytes(small) <= most, f"no more than {most}, after {sizes}")
        sizes.append((disk_bytes(small), rows(small)))
    assert max(count for _, count in sizes) < 10, f"rows are not used again: {sizes}"


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_what_is_kept_never_lets_a_write_fail(stopped: Mounted, disk: XfsDisk) -> None:
    """More is written and deleted than the disk holds, within the time for which it would be kept."""
    stopped.start("allow_other,retention=86400")
    with disk.filled_up(leaving=80 * MIB):
        for turn in range(40):
            for number in range(4):
                (stopped.point / f"{number}").write_bytes(image(turn, MIB + turn))
            for number in range(4):
                (stopped.point / f"{number}").unlink()


def test_who_truncates_on_a_full_disk_is_not_waited_for(stopped: Mounted, disk: XfsDisk) -> None:
    """It waits for room itself: with an open, which else reads."""
    stopped.start("allow_other,retention=86400")
    for turn in range(3):
        fill(stopped.point / "images", 20, MIB, seed=turn)
        with disk.filled_up(leaving=8 * MIB):
            for number in range(1, 20):
                (stopped.point / "images" / f"{number}").unlink()
            (stopped.point / "images" / "0").write_bytes(image(turn, MIB))
        assert_whole(stopped.point / "images")


@pytest.mark.parametrize("retention", [0, 86_400])
def test_rm_gives_room_on_a_full_disk(stopped: Mounted, disk: XfsDisk, retention: int) -> None:
    stopped.start(f"allow_other,retention={retention}")
    with disk.filled_up(leaving=48 * MIB):
        count = 0
        with contextlib.suppress(OSError):
            while True:
                (stopped.point / f"{count}").write_bytes(image(count, MIB))
                count += 1
        assert count > 10
        (stopped.point / f"{count}").unlink(missing_ok=True)
        for number in range(count // 2):
            (stopped.point / f"{number}").unlink()
        (stopped.point / f"{count - 1}").write_bytes(image(count - 1, MIB))
        # XFS itself gives blocks back a little later, and keeps some.
        for number in range(count // 4):
            (stopped.point / f"again{number}").write_bytes(image(number, MIB))
        for number in range(count // 2, count):
            assert (stopped.point / f"{number}").read_bytes() == image(number, MIB)


def test_compact_refuses_where_a_copy_has_no_room(small: Mounted, disk: XfsDisk) -> None:
    small.start(NOW)
    fill(small.point / "images", 900, 3000)
    for number in range(0, 900, 2):
        (small.point / "images" / f"{number}").unlink()
    with disk.filled_up(leaving=8 * MIB):
        told = imgfs("compact", "-q", small.store, code=EXIT_NO_SPACE)
        assert told.count("\n") == 1
        assert "not enough room" in told
        small.stop()
        told = imgfs("compact", "-q", "--retention=0", small.store, code=EXIT_NO_SPACE)
        assert told.count("\n") == 1
    small.start(NOW)
    compact_once(small)
    assert compactions(small) > 0
    assert_whole(small.point / "images")
