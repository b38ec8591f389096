"""Where small syncs follow one another the blocks that come next were written before; nobody ever sees them."""

import dataclasses
from collections.abc import Iterator
from random import Random

import pytest
from copied import take, tree_at
from powercut import SimulatedDisk
from stores import PATH, TINY, abandon, abandon_all, disk_of, new_store, open_store, put, tree
from survivors import EVERYTHING

from imgfs.cloning import Copier, Reflink
from imgfs.format import ALIGNMENT
from imgfs.layout import Word
from imgfs.store import ROOT, Store
from imgfs.survey import Damage

VOLUME = f"{PATH}/volumes/00000001.vol"
SECOND = f"{PATH}/volumes/00000002.vol"
AHEAD = TINY.volume_bytes_max // 16
IMAGE = b"image" * 40


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def put_and_sync(store: Store, *names: bytes, data: bytes = IMAGE) -> None:
    for name in names:
        put(store, ROOT, name, data)
        sync(store)


def sync(store: Store) -> None:
    """Sync as for who calls fsync."""
    assert store.sync_for(lambda: 1) == 1


def end_of(store: Store) -> int:
    return store._memory.words[Word.ACTIVE_END]


def behind(store: Store, path: str = VOLUME) -> bytes:
    """Return what stands behind the log."""
    return disk_of(store).content(path)[end_of(store) :]


def test_most_small_syncs_find_their_blocks_written() -> None:
    store = new_store()
    sizes = []
    for number in range(30):
        put_and_sync(store, b"%d" % number)
        assert not any(behind(store))
        sizes.append(len(disk_of(store).content(VOLUME)))
    assert len(set(sizes)) < 8
    assert max(sizes) <= end_of(store) + AHEAD


def test_the_map_of_a_store_in_use_does_not_show_them_as_dead() -> None:
    store = new_store()
    put_and_sync(store, b"a", b"b", b"c")
    assert behind(store)
    usage = open_store(disk_of(store), writable=False).usage()
    (listed,) = usage.volumes()
    assert listed.size == usage.of(listed).size == end_of(store)


def test_nothing_is_written_ahead_of_large_syncs() -> None:
    store = new_store()
    put_and_sync(store, b"a", b"b", b"c", data=bytes(AHEAD))
    assert behind(store) == b""


def test_nothing_is_written_ahead_where_nobody_asks_for_a_sync() -> None:
    store = new_store()
    for number in range(30):
        put(store, ROOT, b"%d" % number)
    assert behind(store) == b""
    for number in range(3):
        store.sync()  # as a mount does every few seconds
        assert behind(store) == b""
        put(store, ROOT, b"more %d" % number)


def test_no_more_is_written_than_a_volume_may_hold() -> None:
    store = new_store()
    number = 0
    while SECOND not in disk_of(store).paths():
        assert len(disk_of(store).content(VOLUME)) <= max(TINY.volume_bytes_max, end_of(store))
        put_and_sync(store, b"%d" % number)
        number += 1
    assert disk_of(store).content(VOLUME).rstrip(b"\0")[-1:], "a seal"
    assert store._table.volume(0).end == len(disk_of(store).content(VOLUME))


def test_the_last_room_of_a_disk_is_not_taken_for_it() -> None:
    disk = SimulatedDisk(capacity_bytes=1 << 30)
    store = new_store(disk=disk)
    put(store, ROOT, b"first", IMAGE)
    disk.capacity_bytes = disk._used_bytes() + TINY.headroom_bytes + AHEAD // 2
    store._log._granted_bytes = 0
    sync(store)
    assert behind(store) == b""
    put_and_sync(store, b"there is room for images")


def test_a_disk_that_refuses_it_does_no_harm() -> None:
    store = new_store()
    put(store, ROOT, b"first", IMAGE)
    disk_of(store).fail_next("write", 28, written=100)
    sync(store)
    assert behind(store) == bytes(100)
    put_and_sync(store, b"second")
    assert set(tree(store)) >= {b"/first", b"/second"}


def test_a_clean_stop_leaves_none_of_it() -> None:
    settings = dataclasses.replace(TINY, saved_slots_min=0)
    store = new_store(settings)
    put_and_sync(store, b"a", b"b")
    assert behind(store)
    store.close()
    disk = disk_of(store)
    again = open_store(disk, settings, writable=False)
    assert again.report.log_end == len(disk.content(VOLUME))
    assert again.report.replayed_needles == 0, "the kept table is believed"


def test_nor_does_a_stop_with_nothing_to_do() -> None:
    store = new_store(dataclasses.replace(TINY, checkpoint_needles=1))
    put_and_sync(store, b"a")
    assert behind(store)
    assert store._memory.words[Word.CHECKPOINT_RECORDS] == store._memory.words[Word.INDEX_RECORDS]
    store.close()
    disk = disk_of(store)
    assert open_store(disk, writable=False).report.log_end == len(disk.content(VOLUME))


@pytest.mark.parametrize("power", [False, True])
def test_a_crash_leaves_nothing_torn(power: bool) -> None:
    store = new_store()
    put_and_sync(store, b"a", b"b", b"c")
    held, end, disk = tree(store), end_of(store), disk_of(store)
    assert behind(store)
    abandon(store)
    disk = disk.after_power_cut(EVERYTHING) if power else disk.after_kill()
    read = open_store(disk.copy(), writable=False)
    assert (read.report.torn_bytes, read._table.volume(0).end) == (0, end)
    assert tree(read) == held
    assert [item for item in read.check() if isinstance(item, Damage)] == []
    again = open_store(disk)
    assert again.report.torn_bytes == 0
    assert not again.report.damage
    assert tree(again) == held
    assert SECOND not in disk.paths(), "it goes on where it was"
    put_and_sync(again, b"d")


def test_what_is_torn_is_told_without_the_zeros_behind_it() -> None:
    store = new_store()
    put_and_sync(store, b"a", b"b", b"c")
    disk, end = disk_of(store).after_kill(), end_of(store)
    abandon(store)
    content = bytearray(disk.content(VOLUME))
    content[end + 8 : end + 20] = b"half of some"
    disk.set_content(VOLUME, bytes(content))
    assert open_store(disk).report.torn_bytes == 20


def test_a_crash_between_a_seal_and_its_cut_is_no_damage() -> None:
    store = new_store()
    disk = disk_of(store)
    kept: list[SimulatedDisk] = []

    def watch(step: str) -> None:
        if step.startswith(f"truncate {VOLUME}"):
            kept.append(disk.after_kill())

    put_and_sync(store, b"a", b"b")
    held = set(tree(store))
    disk.before_step = watch
    put(store, ROOT, b"does not fit", bytes(TINY.volume_bytes_max - end_of(store)))
    (found,) = kept
    assert len(found.content(VOLUME)) > len(disk.content(VOLUME)), "zeros behind the seal"
    again = open_store(found)
    assert set(tree(again)) == held
    put_and_sync(again, b"and on")
    again.close()
    with Store.open(PATH, disk=found, settings=TINY, writable=False, saved=False) as read:
        assert not read.report.damage
        assert [item for item in read.check() if isinstance(item, Damage)] == []


def test_a_snapshot_is_not_held_up_by_what_is_written_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody puts an image, durably, between copying and comparing, each time."""
    store = new_store()
    put_and_sync(store, b"a", b"b")
    count = 0
    is_same = Copier.is_same

    def meanwhile(self: Copier, source: int, target: int, start: int, end: int) -> bool:
        nonlocal count
        count += 1
        put_and_sync(store, b"more %d" % count)
        return is_same(self, source, target, start, end)

    monkeypatch.setattr(Copier, "is_same", meanwhile)
    held = tree(store)
    disk = disk_of(store)
    take(disk, Reflink.NEVER)
    assert count < 4
    copied = tree_at(disk)
    assert held.items() <= copied.items()


def test_a_snapshot_has_all_of_a_needle_that_ends_in_zeros() -> None:
    settings = dataclasses.replace(TINY, volume_bytes_max=1 << 30, checkpoint_needles=1 << 16)
    store, chance = new_store(settings), Random(1)
    put_and_sync(store, b"first")
    disk = disk_of(store)

    def last_word(length: int) -> bytes:
        put(store, ROOT, b"last", chance.randbytes(length))
        return disk.content(VOLUME)[end_of(store) - ALIGNMENT : end_of(store)]

    # Of one length in eight all but one byte of the last word are zeros anyway: few needles of that length will do,
    # and the zeros written ahead reach behind them.
    length = next(length for length in range(1, 1 + ALIGNMENT) if not any(last_word(length)[1:]))
    while any(last_word(length)):
        pass
    end = end_of(store)
    sync(store)
    assert len(disk.content(VOLUME)) > end == end_of(store)
    held = tree(store)
    take(disk, Reflink.NEVER)
    assert tree_at(disk) == held
