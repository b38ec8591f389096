"""What a power cut may leave of contents and names, and what it may not: a test for each rule."""

import errno
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from powercut import SimulatedDisk
from survivors import (
    CONTENT_ONLY,
    EVERYTHING,
    FIRST_HALF,
    GARBAGE,
    LAST_ONLY,
    LENGTHS_ONLY,
    NAMES_ONLY,
    NOTHING_UNSYNCED,
    STRATEGIES,
    File,
    Operation,
    by_path,
    prefix,
    random_survivor,
)


def write(disk: SimulatedDisk, path: str, offset: int, data: bytes, *, sync: bool = False) -> None:
    file = disk.open(path, writable=True, create=True)
    disk.write(file, offset, [data])
    if sync:
        disk.sync(file)
    disk.close(file)


def truncate(disk: SimulatedDisk, path: str, size: int) -> None:
    file = disk.open(path, writable=True)
    disk.truncate(file, size)
    disk.close(file)


def durable_file(path: str = "/f", content: bytes = b"aaaa") -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.set_content(path, content)
    return disk


def tree(disk: SimulatedDisk) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths()}


def survivors(disk: SimulatedDisk, seeds: int = 300) -> list[dict[str, bytes]]:
    return [tree(disk.after_power_cut(random_survivor(seed))) for seed in range(seeds)]


# -- content --------------------------------------------------------------------------------------------------

CONTENTS = {
    "NOTHING_UNSYNCED": b"aaaa",
    "EVERYTHING": b"abbbbccdd",
    "NAMES_ONLY": b"aaaa",
    "CONTENT_ONLY": b"abbbbccdd",
    "LENGTHS_ONLY": b"aaaa\0\0\0\0\0",
    "LAST_ONLY": b"aaaa\0\0\0dd",
    "FIRST_HALF": b"abbbb",
}


def unsynced_writes() -> SimulatedDisk:
    disk = durable_file()
    write(disk, "/f", 1, b"bbbb")
    write(disk, "/f", 5, b"cc")
    write(disk, "/f", 7, b"dd")
    return disk


@pytest.mark.parametrize("strategy", CONTENTS)
def test_content_left_by_each_strategy(strategy: str) -> None:
    assert unsynced_writes().after_power_cut(STRATEGIES[strategy]).content("/f") == CONTENTS[strategy]


def test_garbage_stands_only_where_the_file_grew() -> None:
    disk = unsynced_writes()
    truncate(disk, "/f", 12)
    found = disk.after_power_cut(GARBAGE).content("/f")
    assert found[:4] == b"aaaa"
    assert found[4:9] not in (b"bccdd", bytes(5))
    assert found[9:] == bytes(3)  # never written, so a hole


def test_a_prefix_ends_at_any_byte() -> None:
    disk = unsynced_writes()
    states = [disk.after_power_cut(prefix(size)).content("/f") for size in range(disk.unsynced_bytes("/f") + 1)]
    assert states == [
        *(b"aaaa", b"abaa", b"abba", b"abbb"),
        *(b"abbbb", b"abbbbc", b"abbbbcc", b"abbbbccd", b"abbbbccdd"),
    ]


def test_an_unsynced_truncation_may_be_lost_alone() -> None:
    disk = durable_file()
    truncate(disk, "/f", 0)
    write(disk, "/f", 1, b"b")
    assert disk.content("/f") == b"\0b"
    assert disk.after_power_cut(LAST_ONLY).content("/f") == b"abaa"
    assert [disk.after_power_cut(prefix(size)).content("/f") for size in range(3)] == [b"aaaa", b"", b"\0b"]


def test_what_a_truncation_cut_off_does_not_come_back() -> None:
    disk = durable_file()
    write(disk, "/f", 4, b"bbbb")
    truncate(disk, "/f", 6)
    truncate(disk, "/f", 8)
    found = disk.after_power_cut(replace(GARBAGE, length=lambda place: place.number > 0)).content("/f")
    assert (found[:4], found[6:]) == (b"aaaa", bytes(2))


def test_synced_content_always_survives() -> None:
    disk = unsynced_writes()
    file = disk.open("/f")
    disk.sync(file)
    assert all(found == {"/f": b"abbbbccdd"} for found in survivors(disk))
    write(disk, "/f", 0, b"x")
    assert disk.after_power_cut(NOTHING_UNSYNCED).content("/f") == b"abbbbccdd"


def test_random_survivors_lose_and_tear_in_every_way() -> None:
    disk = durable_file(content=b"a" * 100)
    write(disk, "/f", 100, b"b" * 3000)
    found = {state["/f"] for state in survivors(disk, 2000)}
    sector_ends = {512 * number for number in range(1, 7)}
    whole = b"a" * 100 + b"b" * 3000
    prefixes = {len(each) for each in found if whole.startswith(each)}
    assert {100, 3100} <= prefixes
    assert prefixes & sector_ends
    assert prefixes - sector_ends - {100, 3100}
    tails = [each.lstrip(b"a").lstrip(b"b") for each in found]
    assert any(len(tail) > 1 and not tail.strip(b"\0") for tail in tails), "no tail of zeros"
    assert any(tail.startswith(b"\0") and tail.endswith(b"b") for tail in tails), "no gap of zeros"
    assert any(len(set(tail)) > 9 and tail.endswith(b"bb") for tail in tails), "no gap of garbage"
    assert any(len(set(tail)) > 9 and not tail.endswith(b"bb") for tail in tails), "no tail of garbage"
    assert all(each.startswith(b"a" * 100) for each in found)


def test_files_are_reordered() -> None:
    disk = durable_file()
    disk.set_content("/g", b"")
    write(disk, "/f", 0, b"b")
    write(disk, "/g", 0, b"b")
    assert tree(disk.after_power_cut(by_path("g", EVERYTHING, NOTHING_UNSYNCED))) == {"/f": b"aaaa", "/g": b"b"}
    combinations = {(state["/f"], state["/g"]) for state in survivors(disk)}
    assert {(f, g) for f in (b"aaaa", b"baaa") for g in (b"", b"b")} <= combinations


def test_by_path_keeps_each_survivors_way_of_filling_holes() -> None:
    disk = SimulatedDisk()
    write(disk, "/f", 0, b"a" * 100)
    write(disk, "/g", 0, b"a" * 100)
    found = disk.after_power_cut(by_path("g", GARBAGE, LENGTHS_ONLY))
    assert found.content("/f") == bytes(100)
    assert len(set(found.content("/g"))) > 9


def test_a_seed_decides_the_same_each_time() -> None:
    assert survivors(unsynced_writes(), 50) == survivors(unsynced_writes(), 50)


@given(st.randoms(use_true_random=False))
def test_hypothesis_can_decide(random: Random) -> None:
    assert unsynced_writes().after_power_cut(random).content("/f")[:1] == b"a"


WRITES = st.lists(st.builds(Operation, st.integers(0, 20), st.binary(min_size=1, max_size=20)), max_size=6)


@given(st.binary(max_size=20), WRITES, st.randoms(use_true_random=False))
def test_a_byte_is_old_or_new_or_a_hole_past_the_old_end(old: bytes, writes: list[Operation], random: Random) -> None:
    file = File(bytearray(old))
    for operation in writes:
        file.apply(operation)
    found = file.survive("/f", random_survivor(random)).durable
    assert len(old) <= len(found) <= len(file.data)
    for offset, byte in enumerate(found[: len(old)]):
        written = [data[offset - start] for start, data, *_ in writes if data and 0 <= offset - start < len(data)]
        assert byte in (old[offset], *written)


# -- a failed sync --------------------------------------------------------------------------------------------


def failed_sync() -> tuple[SimulatedDisk, int]:
    disk = durable_file()
    file = disk.open("/f", writable=True)
    disk.write(file, 4, [b"bb"])
    disk.fail_next("sync", errno.EIO)
    with pytest.raises(OSError, match="error"):
        disk.sync(file)
    return disk, file


def test_what_a_failed_sync_left_is_not_saved_by_a_later_one() -> None:
    disk, file = failed_sync()
    disk.write(file, 6, [b"cc"])
    disk.sync(file)
    assert disk.content("/f") == b"aaaabbcc"
    assert disk.after_power_cut(NOTHING_UNSYNCED).content("/f") == b"aaaa\0\0cc"
    assert disk.after_power_cut(EVERYTHING).content("/f") == b"aaaabbcc"
    assert all(state["/f"][6:] == b"cc" for state in survivors(disk))


def test_what_is_written_again_after_a_failed_sync_is_saved() -> None:
    disk, file = failed_sync()
    disk.write(file, 4, [b"bb"])
    disk.sync(file)
    assert all(state == {"/f": b"aaaabb"} for state in survivors(disk))


# -- names ----------------------------------------------------------------------------------------------------


def test_a_synced_file_without_a_synced_name_is_lost() -> None:
    disk = SimulatedDisk()
    write(disk, "/f", 0, b"a", sync=True)
    assert tree(disk.after_power_cut(NOTHING_UNSYNCED)) == {}
    assert tree(disk.after_power_cut(CONTENT_ONLY)) == {}
    assert tree(disk.after_power_cut(NAMES_ONLY)) == {"/f": b"a"}


def test_a_synced_name_of_a_file_that_was_not_is_empty_or_torn() -> None:
    disk = SimulatedDisk()
    write(disk, "/f", 0, b"abcd")
    disk.sync_directory("/")
    assert tree(disk.after_power_cut(NOTHING_UNSYNCED)) == {"/f": b""}
    assert tree(disk.after_power_cut(FIRST_HALF)) == {"/f": b"ab"}


def test_an_unsynced_unlink_may_be_undone() -> None:
    disk = durable_file()
    disk.unlink("/f")
    assert {len(state) for state in survivors(disk)} == {0, 1}
    disk.sync_directory("/")
    assert survivors(disk, 20) == [{}] * 20


def test_a_rename_is_whole_old_or_whole_new() -> None:
    disk = durable_file("/old", b"1")
    disk.set_content("/new", b"2")
    disk.rename("/old", "/new")
    states = survivors(disk)
    assert {"/old": b"1", "/new": b"2"} in states
    assert {"/new": b"1"} in states
    assert all(state in ({"/old": b"1", "/new": b"2"}, {"/new": b"1"}) for state in states)


def test_names_survive_each_on_its_own() -> None:
    disk = SimulatedDisk()
    for path in ("/a", "/b", "/c"):
        write(disk, path, 0, b"x")
    assert {tuple(state) for state in survivors(disk)} >= {(), ("/a",), ("/c",), ("/a", "/c"), ("/a", "/b", "/c")}


def test_changes_that_share_a_name_arrive_in_order() -> None:
    disk = SimulatedDisk()
    write(disk, "/f.new", 0, b"1", sync=True)
    disk.rename("/f.new", "/f")
    write(disk, "/f.new", 0, b"2", sync=True)
    states = survivors(disk)
    expected: list[dict[str, bytes]] = [{}, {"/f.new": b"1"}, {"/f": b"1"}, {"/f": b"1", "/f.new": b"2"}]
    assert all(state in states for state in expected)
    assert all(state in expected for state in states)


@pytest.mark.parametrize("synced", ["/a", "/b"])
def test_syncing_either_directory_saves_a_rename_between_them(synced: str) -> None:
    disk = SimulatedDisk()
    disk.mkdir("/a")
    disk.mkdir("/b")
    disk.sync_directory("/")
    write(disk, "/a/f", 0, b"1", sync=True)
    disk.rename("/a/f", "/b/f")
    assert {tuple(state) for state in survivors(disk)} == {(), ("/a/f",), ("/b/f",)}
    disk.sync_directory(synced)
    assert all(state == {"/b/f": b"1"} for state in survivors(disk, 20))


def test_syncing_one_directory_leaves_the_others_as_they_are() -> None:
    disk = SimulatedDisk()
    disk.mkdir("/a")
    disk.mkdir("/b")
    disk.sync_directory("/")
    disk.mkdir("/b/d")
    write(disk, "/a/f.new", 0, b"1", sync=True)
    disk.rename("/a/f.new", "/a/f")
    write(disk, "/a/f.new", 0, b"2", sync=True)
    disk.sync_directory("/b")
    assert {tuple(state.items()) for state in survivors(disk)} == {
        (),
        (("/a/f.new", b"1"),),
        (("/a/f", b"1"),),
        (("/a/f", b"1"), ("/a/f.new", b"2")),
    }
    assert disk.after_power_cut(NOTHING_UNSYNCED).names("/b") == ["d"]


def test_an_unsynced_directory_takes_along_what_is_in_it() -> None:
    disk = SimulatedDisk()
    disk.mkdir("/d")
    write(disk, "/d/f", 0, b"1", sync=True)
    disk.sync_directory("/d")
    assert {tuple(state) for state in survivors(disk)} == {(), ("/d/f",)}


def test_an_inode_keeps_its_content_under_any_name() -> None:
    disk = durable_file()
    file = disk.open("/f", writable=True)
    disk.rename("/f", "/g")
    disk.sync_directory("/")
    disk.write(file, 0, [b"b"])
    disk.sync(file)
    assert all(state == {"/g": b"baaa"} for state in survivors(disk, 20))
