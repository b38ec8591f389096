"""The simulated disk: steps, cuts, kills, faults, damage, and that it is otherwise like a real disk."""

import errno
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from powercut import PowerCut, SimulatedDisk
from survivors import CONTENT_ONLY, EVERYTHING, NOTHING_UNSYNCED, STRATEGIES, random_survivor

from imgfs.disk import Disk, WouldBlock


def write(disk: SimulatedDisk, path: str, offset: int, data: bytes, *, sync: bool = False) -> None:
    file = disk.open(path, writable=True, create=True)
    disk.write(file, offset, [data])
    if sync:
        disk.sync(file)
    disk.close(file)


def durable_file(path: str = "/f", content: bytes = b"aaaa") -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.set_content(path, content)
    return disk


def tree(disk: SimulatedDisk) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths()}


def assert_raises(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        call(*arguments)
    assert caught.value.errno == number


def unsynced_writes() -> SimulatedDisk:
    disk = durable_file()
    write(disk, "/f", 1, b"bbbb")
    write(disk, "/f", 5, b"cc")
    write(disk, "/f", 7, b"dd")
    return disk


# -- the seam -------------------------------------------------------------------------------------------------


def test_no_call_of_disk_reaches_the_real_one() -> None:
    calls = {name for name in vars(Disk) if not name.startswith("_")}
    # These consist of others.
    assert calls - {"replace_file", "read_file", "content_end", "holes"} <= vars(SimulatedDisk).keys()


def test_replace_file_goes_through_the_seam() -> None:
    disk = durable_file()
    disk.replace_file("/f", b"bbb")
    assert disk.trace == [
        "create /f.new",
        "truncate /f.new 0",
        "write /f.new 0+3",
        "sync /f.new",
        "rename /f.new /f",
        "sync directory /",
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replace_file_is_atomic_whatever_survives(strategy: str) -> None:
    for cut_at in range(7):
        disk = durable_file()
        disk.cut_at = cut_at
        if cut_at < 6:
            with pytest.raises(PowerCut):
                disk.replace_file("/f", b"bbb")
        else:
            disk.replace_file("/f", b"bbb")
        for choice in (STRATEGIES[strategy], *map(random_survivor, range(20))):
            found = disk.after_power_cut(choice).content("/f")
            assert found == b"bbb" if cut_at == 6 else found in (b"aaaa", b"bbb")


# -- steps ----------------------------------------------------------------------------------------------------


def test_the_power_goes_before_the_step_and_stays_off() -> None:
    disk = durable_file()
    disk.cut_at = 1
    file = disk.open("/f", writable=True)
    disk.write(file, 4, [b"b"])
    with pytest.raises(PowerCut, match=r"before step 1: write /f 5\+1"):
        disk.write(file, 5, [b"c"])
    assert disk.content("/f") == b"aaaab"
    assert disk.trace == ["write /f 4+1"]
    assert disk.steps == 1
    later: list[tuple[Callable[..., object], object]] = [(disk.size, file), (disk.close, file), (disk.exists, "/f")]
    for call, argument in later:
        with pytest.raises(PowerCut, match="off"):
            call(argument)


def test_a_power_cut_is_no_exception_that_code_may_handle() -> None:
    assert not issubclass(PowerCut, Exception)


def test_what_changes_nothing_is_no_step() -> None:
    disk = durable_file()
    file = disk.open("/f", writable=True, create=True)
    disk.write(file, 0, [b""])
    disk.read(file, 0, 4)
    disk.rename("/f", "/f")
    disk.prefetch(file, 0, 4)
    assert not disk.hint_extent_size(file, 1 << 20)
    disk.close(file)
    assert_raises(errno.ENOENT, disk.unlink, "/nothing")
    assert disk.trace == []


def test_a_write_can_be_killed_halfway() -> None:
    disk = durable_file()
    disk.cut_at, disk.cut_written = 0, 2
    with pytest.raises(PowerCut):
        write(disk, "/f", 4, b"bbbb")
    assert disk.after_kill().content("/f") == b"aaaabb"


def test_each_step_is_announced_before_it_happens() -> None:
    disk = SimulatedDisk()
    states: list[tuple[str, dict[str, bytes]]] = []
    disk.before_step = lambda what: states.append((what, tree(disk.after_power_cut(EVERYTHING))))
    write(disk, "/f", 0, b"a")
    assert states == [("create /f", {}), ("write /f 0+1", {"/f": b""})]


# -- a kill, copies, locks ------------------------------------------------------------------------------------


def test_after_a_kill_all_is_there_but_open_files_and_locks() -> None:
    disk = unsynced_writes()
    file = disk.open("/f")
    assert disk.lock("/lock") is not None
    disk.unlink("/lock")
    assert disk.lock("/lock") is not None
    disk.cut_at = disk.steps
    with pytest.raises(PowerCut):
        disk.unlink("/f")
    after = disk.after_kill()
    assert tree(after) == {"/f": b"abbbbccdd", "/lock": b""}
    assert_raises(errno.EBADF, after.size, file)
    assert after.lock("/lock") is not None
    assert after.steps == 0
    assert tree(after.after_power_cut(NOTHING_UNSYNCED)) == {"/f": b"aaaa"}


def test_a_lock_is_held_until_its_file_is_closed() -> None:
    disk = SimulatedDisk()
    held = disk.lock("/lock")
    assert held is not None
    assert disk.lock("/lock") is None
    other = disk.open("/lock")
    disk.close(other)
    assert disk.lock("/lock") is None
    assert disk.copy().lock("/lock") is None
    assert disk.after_power_cut(EVERYTHING).lock("/lock") is not None
    disk.close(held)
    assert disk.lock("/lock") is not None


def test_a_duplicate_shares_the_lock_and_survives_the_other() -> None:
    disk = durable_file("/lock")
    held = disk.lock("/lock")
    assert held is not None
    disk = disk.copy()
    twin = disk.duplicate(held)
    disk.close(held)
    assert disk.size(twin) == 4
    reader = disk.open("/lock")
    assert disk.is_locked(reader)
    disk.close(twin)
    assert not disk.is_locked(reader)


def test_a_copy_and_its_original_go_separate_ways() -> None:
    disk = unsynced_writes()
    file = disk.open("/f", writable=True)
    twin = disk.copy()
    disk.write(file, 0, [b"1"])
    twin.write(file, 8, [b"2"])
    assert twin.content("/f") == b"abbbbccd2"
    twin.unlink("/f")
    assert disk.content("/f") == b"1bbbbccdd"
    assert twin.read(file, 0, 99) == b"abbbbccd2"
    assert tree(twin) == {}
    assert disk.after_power_cut(NOTHING_UNSYNCED).content("/f") == b"aaaa"
    assert twin.after_power_cut(CONTENT_ONLY).content("/f") == b"abbbbccd2"
    assert twin.trace[:-2] == disk.trace[:-1]


def test_a_copy_is_in_the_same_state() -> None:
    disk = durable_file()
    disk.fail_next("size", errno.EIO)
    disk.cold = True
    file = disk.open("/f")
    twin, after = disk.copy(), disk.after_power_cut(EVERYTHING)
    for each in (disk, twin):
        assert_raises(errno.EIO, each.size, file)
    for each, opened in ((twin, file), (after, after.open("/f"))):
        with pytest.raises(WouldBlock):
            each.read(opened, 0, 1, nowait=True)
    disk.cut_at = 0
    with pytest.raises(PowerCut):
        disk.unlink("/f")
    with pytest.raises(PowerCut, match="off"):
        disk.copy().exists("/f")


def test_damage_stays_in_the_copy() -> None:
    disk = durable_file()
    disk.copy().flip("/f", 0)
    assert disk.content("/f") == disk.after_power_cut(NOTHING_UNSYNCED).content("/f") == b"aaaa"


def test_what_survived_is_apart_from_where_it_came_from() -> None:
    disk = durable_file()
    after = disk.after_power_cut(EVERYTHING)
    write(after, "/f", 0, b"b", sync=True)
    write(disk, "/f", 0, b"c", sync=True)
    after.flip("/f", 1)
    assert (disk.content("/f"), after.content("/f")) == (b"caaa", b"b\x9eaa")


# -- faults, room, damage -------------------------------------------------------------------------------------


def test_faults_come_when_asked_for() -> None:
    disk = durable_file()
    disk.fail_next("open", errno.EMFILE, after=1, times=2)
    file = disk.open("/f", writable=True)
    for _ in range(2):
        with pytest.raises(OSError, match="/f") as caught:
            disk.open("/f")
        assert caught.value.errno == errno.EMFILE
    assert disk.open("/f") > file
    disk.fail_next("write", errno.EIO, written=2)
    assert_raises(errno.EIO, disk.write, file, 4, [b"bbb"])
    assert disk.content("/f") == b"aaaabb"
    disk.write(file, 6, [b"c"])
    assert disk.content("/f") == b"aaaabbc"


def test_a_full_disk_takes_a_prefix_and_agrees_with_its_free_space() -> None:
    disk = SimulatedDisk(capacity_bytes=4096)
    file = disk.open("/f", writable=True, create=True)
    disk.write(file, 0, [b"a" * 1000])
    space = disk.space("/")
    assert (space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize) == (4096, 3072)
    assert_raises(errno.ENOSPC, disk.write, file, 1000, [b"b" * 4000])
    assert disk.size(file) == 4096
    disk.write(file, 0, [b"c" * 4096])
    assert_raises(errno.ENOSPC, disk.truncate, file, 4097)
    assert disk.space("/").f_bavail == 0
    disk.unlink("/f")
    assert disk.space("/").f_bavail == 0
    disk.close(file)
    assert disk.space("/").f_bavail == 8
    assert_raises(errno.ENOENT, disk.space, "/f")


def test_damage_is_in_every_version_of_a_byte() -> None:
    disk = unsynced_writes()
    disk.flip("/f", 1, 0x01)
    disk.flip("/f", -1, 0x01)
    assert disk.content("/f") == b"acbbbccde"
    assert disk.after_power_cut(EVERYTHING).content("/f") == b"acbbbccde"
    assert disk.after_power_cut(NOTHING_UNSYNCED).content("/f") == b"a\x60aa"
    with pytest.raises(IndexError):
        disk.flip("/f", 9)


def test_set_content_and_remove_are_durable() -> None:
    disk = unsynced_writes()
    disk.set_content("/f", b"x")
    disk.set_content("/g", b"y")
    assert all(tree(disk.after_power_cut(choice)) == {"/f": b"x", "/g": b"y"} for choice in STRATEGIES.values())
    disk.remove("/f")
    assert all(tree(disk.after_power_cut(choice)) == {"/g": b"y"} for choice in STRATEGIES.values())
    assert_raises(errno.ENOENT, disk.remove, "/f")
    assert disk.trace == unsynced_writes().trace


def test_a_cold_disk_makes_readers_wait() -> None:
    disk = durable_file()
    file = disk.open("/f")
    assert disk.read(file, 1, 9, nowait=True) == b"aaa"
    disk.cold = True
    with pytest.raises(WouldBlock):
        disk.read(file, 0, 1, nowait=True)
    assert disk.read(file, 0, 1) == b"a"
    assert disk.read(file, 4, 1, nowait=True) == b""


# -- against the real disk ------------------------------------------------------------------------------------

PATHS = st.sampled_from(["a", "b", "d", "e", "d/a", "d/b", "d/e", "d/e/a", "n" * 256, "d/" + "n" * 255])
FILES = st.integers(0, 4)
OFFSETS = st.integers(0, 40)
OPERATIONS = st.one_of(
    st.tuples(st.just("open"), PATHS, st.fixed_dictionaries(dict.fromkeys(("writable", "create"), st.booleans()))),
    st.tuples(st.just("open"), PATHS, st.just({"writable": True, "create": True, "exclusive": True})),
    st.tuples(st.just("write"), FILES, OFFSETS, st.lists(st.binary(max_size=9), max_size=3)),
    st.tuples(st.just("truncate"), FILES, st.integers(-1, 40)),
    st.tuples(st.just("read"), FILES, st.integers(-1, 40), st.integers(-1, 40)),
    st.tuples(st.sampled_from(["close", "size", "sync", "duplicate", "is_locked"]), FILES),
    st.tuples(st.sampled_from(["names", "exists", "mkdir", "unlink", "sync_directory", "lock"]), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("replace_file"), PATHS, st.binary(max_size=9)),
)


class Runner:
    """Runs operations on *disk*; files are numbered in the order in which they were handed out."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self.disk = disk
        self._directory = directory
        self._files: list[int] = []

    def run(self, name: str, *arguments: Any) -> Any:
        """Return what the operation answers or raises."""
        try:
            answer = self._run(name, arguments)
        except OSError as error:
            return type(error), error.errno, error.filename, error.filename2
        if name in ("open", "lock", "duplicate") and answer is not None:
            self._files.append(answer)
            return len(self._files)
        return answer

    def _run(self, name: str, arguments: tuple[Any, ...]) -> Any:
        values: list[Any] = [f"{self._directory}/{value}" if isinstance(value, str) else value for value in arguments]
        if isinstance(values[0], int):
            number, none = values[0], 10**6
            values[0] = self._files[number] if number < len(self._files) else none
            if name == "close" and values[0] != none:
                self._files[number] = none  # the real disk gives the descriptor to the next file
        options = values.pop() if isinstance(values[-1], dict) else {}
        return getattr(self.disk, name)(*values, **options)

    def close(self) -> None:
        for number in range(len(self._files)):
            self.run("close", number)


@settings(max_examples=200, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=40))
def test_without_a_cut_it_is_like_the_real_disk(operations: list[tuple[Any, ...]]) -> None:
    simulated = SimulatedDisk()
    with tempfile.TemporaryDirectory() as directory:
        for parent in (*reversed(Path(directory).parents[:-1]), directory):
            simulated.mkdir(str(parent))
        runners = Runner(simulated, directory), Runner(Disk(), directory)
        for name, subject, *arguments in operations:
            if name == "open" and os.path.isdir(f"{directory}/{subject}") and not any(arguments[0].values()):
                continue  # only the real disk can open a directory
            ours, real = (runner.run(name, subject, *arguments) for runner in runners)
            assert ours == real, f"{name} {subject} {arguments}"
        for runner in runners:
            runner.close()
        files = [path for path in Path(directory).rglob("*") if path.is_file()]
        assert tree(simulated) == {str(path): path.read_bytes() for path in files}
        assert tree(simulated.after_power_cut(EVERYTHING)) == tree(simulated) == tree(simulated.after_kill())


@settings(max_examples=200, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=30), random=st.randoms(use_true_random=False))
def test_all_that_is_synced_survives_any_number_of_cuts(operations: list[tuple[Any, ...]], random: Random) -> None:
    disk = SimulatedDisk()
    runner = Runner(disk, "")
    for operation in operations:
        runner.run(*operation)
    settled = disk.copy()
    for directory in ("/", "/d", "/e", "/b", "/a", "/d/a", "/d/b", "/d/e"):
        if settled.exists(directory) and directory not in settled.paths():
            settled.sync_directory(directory)
    for path in settled.paths():
        settled.sync(settled.open(path))
    assert tree(settled.after_power_cut(random)) == tree(disk)
    found = disk.after_power_cut(random)
    again = found.after_power_cut(random)
    assert tree(again) == tree(found), "what survived one cut survives the next"
