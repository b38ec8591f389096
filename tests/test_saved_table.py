"""The table that a clean stop keeps: what the next start sees with it, and when it is believed."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from compacted import reclaim
from powercut import SimulatedDisk
from snapshots import Snapshot, assert_same, snapshot
from stores import PATH, TINY, abandon, abandon_all, killed, new_store, open_store, put, write_image

from imgfs import saved_format
from imgfs.dump import dump
from imgfs.format import hash_seed
from imgfs.layout import Word
from imgfs.memory import Memory
from imgfs.opening import find_store
from imgfs.rebuild import remove_index
from imgfs.saved_format import SAVED_TABLE, SAVED_VERSION, file_bytes
from imgfs.saved_loading import load_table
from imgfs.saved_table import read_front
from imgfs.settings import Settings
from imgfs.snapshot import take_snapshot
from imgfs.store import ROOT, Store
from imgfs.survey import Damage
from imgfs.table import Table
from imgfs.volumes import VOLUMES

KEPT = replace(TINY, saved_slots_min=1)
TABLE = f"{PATH}/{SAVED_TABLE}"


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    abandon_all()


def fill(store: Store) -> None:
    """Put all there is into *store*: several volumes, owners, links, attributes, directories with many entries."""
    album = store.mkdir(ROOT, b"album", 0o750, 3, 4)
    for number in range(40):
        put(store, (ROOT, album)[number % 2], b"%d.jpg" % number, bytes([number]) * (5000 + number), number)
    for number in range(0, 40, 5):
        store.unlink((ROOT, album)[number % 2], b"%d.jpg" % number)
    store.link(store.resolve(b"2.jpg"), album, b"further")
    store.set_xattr(store.resolve(b"4.jpg"), b"user.a", b"b" * 50)
    store.symlink(ROOT, b"link", b"2.jpg", 5, 6)
    inode, handle = store.create_image(ROOT, b"never flushed", 0o600, 7, 8)
    store.unlink(ROOT, b"never flushed")
    store.release(handle)
    assert not store.is_there(inode)


def stopped(fill: Callable[[Store], object] = fill) -> tuple[SimulatedDisk, Snapshot]:
    """Return the disk after the clean stop of a store, and what it held."""
    store = new_store(KEPT)
    fill(store)
    store.sync()
    seen = snapshot(store)
    store.close()
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    assert TABLE in disk.paths()
    return disk, seen


def is_believed(disk: SimulatedDisk, *, writable: bool = True) -> bool:
    """Return whether a start on *disk* would believe the kept table; where it does not, the memory must be empty."""
    store_id = find_store(PATH, disk)[0].store_id
    memory = Memory()
    try:
        loaded = load_table(disk, PATH, Table(memory, hash_seed(store_id)), store_id, writable=writable)
        if loaded is None:
            assert memory.resident_bytes() == _EMPTY_BYTES, "what was not believed should be gone"
            assert not any(memory.words[word] for word in range(Word.SLOTS, len(memory.words)))
        else:
            loaded.volumes.close()
        return loaded is not None
    finally:
        memory.close()


def _empty() -> int:
    memory = Memory()
    size = memory.resident_bytes()
    memory.close()
    return size


_EMPTY_BYTES = _empty()


def seen_at(disk: SimulatedDisk, *, saved: bool = True) -> Snapshot:
    with Store.open(PATH, disk=disk, settings=KEPT, writable=False, saved=saved) as store:
        assert not store.report.damage
        return snapshot(store)


# -- where it is right ------------------------------------------------------------------------------------------------


def test_the_next_start_sees_the_same_without_reading_the_volumes() -> None:
    disk, seen = stopped()
    assert is_believed(disk)
    assert_same(seen_at(disk), seen, "a reader")
    assert_same(seen_at(disk, saved=False), seen, "a reader that does not believe it")
    assert TABLE in disk.paths(), "who only reads removes nothing"
    store = open_store(disk, KEPT)
    assert TABLE not in disk.paths(), "it should not outlive the first change"
    assert store.report.replayed_needles == 0
    assert_same(snapshot(store), seen, "a writer")
    assert not [found for found in store.check() if isinstance(found, Damage)]


def test_what_was_loaded_goes_on_as_well_as_what_was_made() -> None:
    """Slots, owners, buckets, links, attributes: all of it is changed, and then the volumes alone must say the same."""
    disk, _ = stopped()
    store = open_store(disk, KEPT)
    fill_again = store.mkdir(ROOT, b"again", 0o700, 9, 9)
    for number in range(60):
        put(store, fill_again, b"%d" % number, b"x" * 3000)
    for name in (b"1.jpg", b"further"):
        store.unlink(store.resolve(b"album"), name)
    store.remove_xattr(store.resolve(b"4.jpg"), b"user.a")
    store.rename(ROOT, b"4.jpg", fill_again, b"moved")
    store.sync()
    seen = snapshot(store)
    again = killed(store)
    assert_same(snapshot(again), seen, "after a kill")
    again.close()
    assert_same(seen_at(again._disk), seen, "from the table")
    assert_same(seen_at(again._disk, saved=False), seen, "from the index")


def test_many_stops_and_starts() -> None:
    disk, _ = stopped()
    for number in range(5):
        store = open_store(disk, KEPT)
        assert store.report.replayed_needles == 0
        write_image(store, ROOT, b"new %d" % number, b"n" * 9000)
        store.unlink(ROOT, b"%d.jpg" % (2 * number + 2) if number != 4 else b"link")
        store.sync()
        seen = snapshot(store)
        store.close()
        assert_same(seen_at(disk, saved=False), seen, f"stop {number}")


def test_a_compacted_store_keeps_its_table_too() -> None:
    store = new_store(KEPT)
    fill(store)
    reclaim(store)
    seen = snapshot(store)
    store.close()
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    assert is_believed(disk)
    assert_same(seen_at(disk), seen, "a reader")
    again = open_store(disk, KEPT)
    assert_same(snapshot(again), seen, "a writer")


def test_a_small_table_is_not_kept() -> None:
    store = new_store(TINY)
    fill(store)
    store.close()
    assert TABLE not in store._disk.paths()  # type: ignore[attr-defined]
    assert Settings().saved_slots_min > 0


# -- where it is not --------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_noticed() -> None:
    disk, seen = stopped(lambda store: put(store, ROOT, b"one"))
    size = len(disk.content(TABLE))
    assert size < 4000
    for offset in range(size):
        disk.flip(TABLE, offset, 1 << offset % 8)
        assert not is_believed(disk), f"byte {offset}"
        disk.flip(TABLE, offset, 1 << offset % 8)
    assert is_believed(disk)
    disk.flip(TABLE, size // 2)
    store = open_store(disk, KEPT)
    assert_same(snapshot(store), seen, "with a damaged table")


def test_a_piece_of_any_region_that_is_damaged_is_noticed() -> None:
    disk, _ = stopped()
    file = disk.open(TABLE)
    front = read_front(disk, file)
    disk.close(file)
    at = saved_format.front_bytes(front.header)
    regions = [size for _, size in saved_format.pieces(front.header)]
    assert len(regions) >= 5, "owners, links that are counted, buckets, links between records, records"
    for size in regions:
        for offset in (at, at + size // 2, at + size - 1):
            disk.flip(TABLE, offset)
            assert not is_believed(disk), offset
            disk.flip(TABLE, offset)
        at += size
    assert at == len(disk.content(TABLE)) == file_bytes(front.header)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\0", lambda _: b"", lambda d: d[:100]]
)
def test_one_that_was_cut_or_got_longer_is_not_believed(change: Callable[[bytes], bytes]) -> None:
    disk, seen = stopped()
    disk.set_content(TABLE, change(disk.content(TABLE)))
    assert not is_believed(disk)
    assert_same(snapshot(open_store(disk, KEPT)), seen, "a writer")


def test_pieces_of_an_older_table_do_not_pass_for_those_of_this_one() -> None:
    disk, _ = stopped()
    older = disk.content(TABLE)
    with Store.open(PATH, disk=disk, settings=KEPT) as store:
        store.set_attr(store.resolve(b"2.jpg"), mtime_ns=77)
    newer = disk.content(TABLE)
    assert len(older) == len(newer)
    file = disk.open(TABLE)
    start = saved_format.front_bytes(read_front(disk, file).header)
    disk.close(file)
    assert older[start:] != newer[start:]
    disk.set_content(TABLE, newer[:start] + older[start:])
    assert not is_believed(disk)


def stale(change: Callable[[Store], object]) -> SimulatedDisk:
    """Return a disk with the table of before *change*, as a restored backup or a release that knows none leaves it."""
    disk, _ = stopped()
    table = disk.content(TABLE)
    store = open_store(disk, TINY)
    change(store)
    store.sync()
    seen = snapshot(store)
    store.close()
    disk.set_content(TABLE, table)
    assert not is_believed(disk)
    assert_same(seen_at(disk), seen, "a reader")
    assert_same(snapshot(open_store(disk, KEPT)), seen, "a writer")
    return disk


@pytest.mark.parametrize(
    "change",
    [
        lambda store: put(store, ROOT, b"new"),
        lambda store: store.unlink(ROOT, b"2.jpg"),
        lambda store: store.rename(ROOT, b"2.jpg", ROOT, b"3.jpg"),
        lambda store: store.set_attr(store.resolve(b"2.jpg"), mode=0o600),
        lambda store: store.set_xattr(store.resolve(b"2.jpg"), b"user.a", b"c"),
        lambda store: [put(store, ROOT, b"%d" % number, b"d" * 20_000) for number in range(5)],
        lambda store: reclaim(store),
    ],
    ids=["put", "unlink", "rename", "chmod", "xattr", "next volume", "compaction"],
)
def test_what_was_changed_since_makes_it_worthless(change: Callable[[Store], object]) -> None:
    stale(change)


def test_a_store_that_was_killed_has_none_to_believe() -> None:
    disk, _ = stopped()
    table = disk.content(TABLE)
    store = open_store(disk, KEPT)
    put(store, ROOT, b"new")
    again = killed(store)
    assert again.resolve(b"new")
    abandon(again)
    other = store._disk.after_kill()  # type: ignore[attr-defined]
    other.set_content(TABLE, table)
    assert not is_believed(other)


def test_volumes_of_the_same_sizes_with_another_past_are_told_apart() -> None:
    """A backup was restored, and what came then is as long as what had come before."""
    disk, _ = stopped()
    backup = disk.copy()
    sizes = []
    for each, name in ((disk, b"this"), (backup, b"that")):
        store = open_store(each, KEPT)
        put(store, ROOT, name)
        store.close()
        sizes.append({path: len(data) for path in each.paths() if "/volumes/" in path for data in [each.content(path)]})
    assert sizes[0] == sizes[1]
    backup.set_content(TABLE, disk.content(TABLE))
    assert not is_believed(backup)
    with Store.open(PATH, disk=backup, settings=KEPT) as store:
        assert store.resolve(b"that")
        assert b"this" not in {entry.name for entry in store.list(ROOT)}


def test_a_table_of_another_store_is_not_believed() -> None:
    disk, seen = stopped()
    other, _ = stopped()
    disk.set_content(TABLE, other.content(TABLE))
    assert not is_believed(disk)
    assert_same(snapshot(open_store(disk, KEPT)), seen, "a writer")


@pytest.mark.parametrize("what", ["SAVED_VERSION", "LAYOUT_VERSION", "__version__"])
def test_a_table_of_another_release_is_not_believed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, seen = stopped()
    assert is_believed(disk)
    monkeypatch.setattr(saved_format, what, "0.0.9" if what == "__version__" else SAVED_VERSION + 100)
    assert not is_believed(disk)
    assert_same(snapshot(open_store(disk, KEPT)), seen, "a writer")


@pytest.mark.parametrize("suffix", [".idx", ".names"])
@pytest.mark.parametrize("volume", [0, -1])
def test_an_index_that_is_wrong_is_still_made_again(suffix: str, volume: int) -> None:
    disk, seen = stopped()
    path = [path for path in disk.paths() if path.endswith(suffix)][volume]
    right = disk.content(path)
    for wrong in (
        right[:-1],
        right + b"\0",
        right[:-3] + b"\xff" + right[-2:],
        right[:20] + b"\xff" + right[21:],
        None,
    ):
        again = disk.copy()
        if wrong is None:
            again.remove(path)
        else:
            again.set_content(path, wrong)
        assert not is_believed(again)
        store = open_store(again, KEPT)
        assert_same(snapshot(store), seen, "a writer")
        assert again.content(path).startswith(right)
        abandon(store)


def test_a_volume_more_or_less_or_swapped_makes_it_worthless() -> None:
    disk, _ = stopped()
    volumes = [path for path in disk.paths() if path.endswith(".vol")]
    for change in ("remove", "add", "header", "end"):
        again = disk.copy()
        if change == "remove":
            again.remove(volumes[0])
        elif change == "add":
            again.set_content(f"{PATH}/{VOLUMES}/00000099.vol.new", b"")
        elif change == "header":
            again.flip(volumes[1], 30)
            again.flip(volumes[1], 4096 + 30)
        else:
            again.flip(volumes[0], -20)
        assert not is_believed(again), change


# -- where none is kept -----------------------------------------------------------------------------------------------


def test_no_room_for_it_is_no_failure() -> None:
    store = new_store(KEPT)
    fill(store)
    store.sync()
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    disk.capacity_bytes = disk._used_bytes() + KEPT.headroom_bytes + 2000
    store.close()
    assert TABLE not in disk.paths()
    assert f"{TABLE}.new" not in disk.paths()


@pytest.mark.parametrize("method", ["write", "sync", "rename", "sync_directory", "open", "truncate"])
def test_a_disk_that_refuses_it_is_no_failure(method: str) -> None:
    store = new_store(KEPT)
    fill(store)
    store.sync()
    seen = snapshot(store)
    store._log.sync(final=True)  # type: ignore[union-attr]
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    disk.fail_next(method, 5)
    store.close()
    assert not [path for path in disk.paths() if path.endswith(f"{SAVED_TABLE}.new")]
    assert_same(snapshot(open_store(disk.after_kill(), KEPT)), seen, "a writer")


def test_what_is_still_being_written_keeps_it_from_being_kept() -> None:
    store = new_store(KEPT)
    fill(store)
    _, handle = store.create_image(ROOT, b"half", 0o600, 1, 2)
    store.write(handle, 0, b"half")
    store.close()
    disk = store._disk
    assert isinstance(disk, SimulatedDisk)
    assert TABLE not in disk.paths()
    with Store.open(PATH, disk=disk, settings=KEPT) as again:
        assert b"half" not in {entry.name for entry in again.list(ROOT)}


def test_a_damaged_store_finds_its_damage_at_each_start() -> None:
    disk, _ = stopped()
    volumes = [path for path in disk.paths() if path.endswith(".vol")]
    disk.remove(volumes[0].replace(".vol", ".idx"))
    disk.flip(volumes[0], 9000)
    for _ in range(3):
        store = open_store(disk, KEPT)
        damage = store.report.damage
        store.close()
        assert bool(damage) == (TABLE not in disk.paths())


# -- who else meets it ------------------------------------------------------------------------------------------------


def test_a_check_verifies_it_and_believes_the_volumes() -> None:
    disk, _ = stopped()
    disk.flip(TABLE, -5)
    for writable in (False, True):
        store = Store.open(PATH, disk=disk, settings=KEPT, writable=writable, saved=False)
        (damage,) = store.report.damage
        assert str(damage).startswith(f"{SAVED_TABLE}, offset 0, 0 bytes: the kept table is damaged: the checksum")
        assert damage.readable
        assert not damage.needed
        store.close()
    assert is_believed(disk), "the stop of a check keeps a right one again"


def test_a_rebuild_of_the_index_believes_no_table() -> None:
    disk, seen = stopped()
    removed = remove_index(PATH, disk)
    assert TABLE not in disk.paths()
    assert all(path.endswith((".idx", ".names")) for path in removed)
    assert_same(snapshot(open_store(disk, KEPT)), seen, "a writer")


def test_a_snapshot_has_none() -> None:
    disk, seen = stopped()

    class Watcher:
        def started(self, volumes: int, volume_bytes: int) -> None: ...
        def advanced(self, volumes: int, volume_bytes: int) -> None: ...
        def opened(self, store: Store) -> None:
            assert_same(snapshot(store), seen, "the snapshot")

    take_snapshot(PATH, "/copy", Watcher(), disk=disk)
    assert TABLE in disk.paths()
    assert f"/copy/{SAVED_TABLE}" not in disk.paths()


def test_a_dump_tells_front_and_pieces() -> None:
    disk, _ = stopped()
    lines = list(dump(disk, TABLE))
    assert lines[0].fields["kind"] == "table"
    assert (lines[1].word, lines[1].fields["front"]) == ("header", "ok")
    volumes = [line for line in lines if line.word == "volume"]
    assert [line.fields["volume_id"] for line in volumes] == list(range(1, len(volumes) + 1))
    pieces = [line for line in lines if line.word == "piece"]
    assert {line.fields["data"] for line in pieces} == {"ok"}
    assert lines[-1].fields == {"offset": len(disk.content(TABLE))}
    disk.flip(TABLE, -1)
    assert [line.fields["data"] for line in dump(disk, TABLE) if line.word == "piece"][-1] == "BAD"
    disk.flip(TABLE, 200)
    assert [line.fields.get("front") for line in dump(disk, TABLE)][1:] == ["BAD"]
