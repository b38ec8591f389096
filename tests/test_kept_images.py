"""What was deleted or replaced is kept in the volumes for as long as was asked for, or until the disk needs room."""

import os
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
from compacted import compact, kept_images, needles, rows_of
from crash_model import Clock
from powercut import SimulatedDisk
from snapshots import assert_same, snapshot
from stores import TINY, abandon_all, disk_of, new_store, put, rebuilt

from imgfs import reclaim
from imgfs.format import Kind
from imgfs.layout import VOLUME_SEALED
from imgfs.reclaim import Reclaimer
from imgfs.store import ROOT, Store

DAY_S = 86_400.0
SIZE = 9000


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the log, and of reclaiming."""
    clock = Clock(monkeypatch)
    now = types.SimpleNamespace(time=lambda: clock.now_ns / 1e9, monotonic=lambda: clock.now_ns / 1e9)
    monkeypatch.setattr(reclaim, "time", now)
    return clock


def later(clock: Clock, seconds: float) -> None:
    clock.now_ns += int(seconds * 1e9)


def image(number: int) -> bytes:
    return b"%d " % number * (SIZE // len(b"%d " % number))


def kept(store: Store) -> set[bytes]:
    return {name for name, _ in kept_images(disk_of(store))}


def deletes(store: Store) -> int:
    return sum(needle.kind == Kind.DELETE for _, _, needle in needles(disk_of(store)))


def fill_and_delete(store: Store, clock: Clock) -> None:
    """Make twelve images; delete 0 to 3 an hour apart, overwrite 4 and rename 5 over 6."""
    for number in range(12):
        put(store, ROOT, b"%d" % number, image(number))
    for number in range(4):
        store.unlink(ROOT, b"%d" % number)
        later(clock, 3600)
    put(store, ROOT, b"4", b"new")
    store.rename(ROOT, b"5", ROOT, b"6")
    put(store, ROOT, b"filler", bytes(20_000))
    put(store, ROOT, b"another", bytes(30_000))


def compact_all(store: Store, reclaimer: Reclaimer) -> None:
    sealed = [row for row in rows_of(store).values() if store._table.volume(row).flags & VOLUME_SEALED]
    assert len(sealed) >= 2
    compact(store, sealed, cutoff_s=int(reclaimer.cutoff_s()))


def test_what_was_deleted_outlives_punching_and_compaction_until_its_time(clock: Clock) -> None:
    store = new_store(replace(TINY, rest_slots=64))  # a slot that is used again makes its dead look younger
    fill_and_delete(store, clock)
    wanted = snapshot(store)
    reclaimer = store.reclaimer(retention_s=DAY_S)
    assert reclaimer.punch(everything=True).holes == 0
    compact_all(store, reclaimer)
    assert_same(snapshot(store), wanted, "compacted")
    gone = {(b"%d" % number, image(number)) for number in (0, 1, 2, 3, 4, 6)}
    assert gone <= kept_images(disk_of(store))
    assert deletes(store) == 4, "when they went is kept too"
    store = rebuilt(store)
    assert_same(snapshot(store), wanted, "from the volumes alone")
    reclaimer = store.reclaimer(retention_s=DAY_S)
    reclaimer.punch(everything=True)
    assert gone <= kept_images(disk_of(store))

    later(clock, DAY_S - 2.5 * 3600)  # 0 and 1 were deleted 25.5 and 24.5 hours ago
    assert reclaimer.punch(everything=True).holes
    assert kept(store) & {b"0", b"1", b"2", b"3"} == {b"2", b"3"}
    assert_same(snapshot(store), wanted, "some of them are gone")
    later(clock, DAY_S)
    reclaimer.punch(everything=True)
    assert not kept(store) & {b"0", b"1", b"2", b"3"}
    assert not {(b"4", image(4)), (b"6", image(6))} & kept_images(disk_of(store))
    put(store, ROOT, b"seals", bytes(60_000))
    put(store, ROOT, b"and goes on", bytes(10_000))
    wanted = snapshot(store)
    compact_all(store, reclaimer)
    assert deletes(store) == 0, "what nobody can want back needs no end"
    assert_same(snapshot(rebuilt(store)), wanted, "from the volumes alone, afterwards")


class SmallDisk(SimulatedDisk):
    """A disk that tells how much room it has, as a test wants."""

    free_bytes = 1 << 40

    def space(self, path: str) -> os.statvfs_result:
        blocks = 1 << 20  # of 512 bytes; a twentieth is to be free
        return os.statvfs_result((512, 512, blocks, self.free_bytes // 512, self.free_bytes // 512, 0, 0, 0, 0, 255))

    @property
    def spare_bytes(self) -> int:
        return (1 << 29) // 20 + TINY.headroom_bytes


@pytest.mark.parametrize(
    ("short_bytes", "goes"), [(0, 0), (1, 1), (SIZE + 1500, 2), (2 * SIZE + 1500, 3), (1 << 20, 4)]
)
def test_a_shortage_takes_the_oldest_and_no_more_than_it_needs(clock: Clock, short_bytes: int, goes: int) -> None:
    disk = SmallDisk()
    store = new_store(disk=disk)
    for number in range(8):
        put(store, ROOT, b"%d" % number, image(number))
    order = [6, 1, 4, 3]  # not that of their places
    for number in order:
        store.unlink(ROOT, b"%d" % number)
        later(clock, 60)
    reclaimer = store.reclaimer(retention_s=DAY_S)
    disk.free_bytes = disk.spare_bytes + 512
    assert reclaimer.punch(everything=True).holes == 0
    disk.free_bytes = disk.spare_bytes - short_bytes if short_bytes else disk.free_bytes
    later(clock, 5)
    reclaimer.punch()
    assert kept(store) & {b"%d" % number for number in order} == {b"%d" % number for number in order[goes:]}
    assert {b"0", b"2", b"5", b"7"} <= kept(store)


def test_who_waits_for_room_does_not_wait_for_the_next_sweep(clock: Clock) -> None:
    disk = SmallDisk()
    store = new_store(disk=disk)
    for number in range(3):
        put(store, ROOT, b"%d" % number, image(number))
    reclaimer = store.reclaimer(retention_s=DAY_S)
    disk.free_bytes = 0
    reclaimer.punch()
    store.unlink(ROOT, b"0")
    assert reclaimer.punch().holes == 0, "it was looked into a moment ago"
    assert reclaimer.punch(urgent=True).holes
    assert b"0" not in kept(store)


def test_nothing_is_freed_while_somebody_may_be_reading_it() -> None:
    store = new_store()
    for number in range(12):
        put(store, ROOT, b"%d" % number, image(number))
    for number in range(6):
        store.unlink(ROOT, b"%d" % number)
    answered = False
    reclaimer = store.reclaimer(settle=lambda: answered)
    assert reclaimer.punch(everything=True).holes == 0
    old = set(rows_of(store))
    for group in reclaimer.worthwhile(reclaimer.survey()):
        assert reclaimer.compact(group).volumes
    assert old < set(rows_of(store)), "the copy is there, and what it replaces too"
    assert not reclaimer.finish()
    assert b"0" in kept(store)
    answered = True
    assert reclaimer.finish()
    assert not old <= set(rows_of(store))
    assert b"0" not in kept(store)
