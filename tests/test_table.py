"""The table: slots and their generations, names, owners, counts, and needles that contradict it."""

import struct
from collections.abc import Iterator

import pytest
from tables import ROOT, SECOND_NS, Writer, dump, free_queue, listing, new_table

from imgfs.buckets import record_at
from imgfs.errors import Damaged, StoreLimit
from imgfs.format import Kind, Needle, inode_of, slot_of
from imgfs.layout import AT_SUBDIRECTORIES, SLOTS_MAX, SUBDIRECTORIES_MANY, Flag, Word
from imgfs.records import Place, VolumeEntry
from imgfs.table import Table


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer(new_table())
    writer.root()
    yield writer
    dump(writer.table)  # checks that nothing in it contradicts the rest
    writer.table.memory.close()


@pytest.fixture
def table(writer: Writer) -> Table:
    return writer.table


def lookup(table: Table, parent: int, name: bytes) -> list[int]:
    return table.buckets.find(slot_of(parent), table.hash(name))


# -- what needles do ----------------------------------------------------------------------------------------------


def test_a_needle_becomes_a_record(writer: Writer, table: Table) -> None:
    writer.roll()
    inode = writer.make(ROOT, b"name", size=123, owner=4)
    needle, place = writer.needles[-1]
    record = table.record(slot_of(inode))
    assert (record.kind, record.live, record.generation) == (Kind.FILE, True, 0)
    assert (record.volume, record.name_volume, record.offset8 * 8, record.name_offset) == (1, 1, place.offset, 16)
    assert (record.parent, record.size, record.owner) == (ROOT, 123, 4)
    assert (record.mtime_ns, record.ctime_s) == (needle.mtime_ns, needle.ctime_ns // SECOND_NS)
    assert lookup(table, ROOT, b"name") == [slot_of(inode)]


def test_renaming_keeps_the_bytes_where_they_are(writer: Writer, table: Table) -> None:
    inode, directory = writer.make(ROOT, b"old", size=9), writer.make(ROOT, b"d", Kind.DIRECTORY)
    before = table.record(slot_of(inode))
    writer.roll()
    writer.rename(inode, directory, b"new")
    after = table.record(slot_of(inode))
    assert (after.volume, after.offset8, after.size) == (before.volume, before.offset8, before.size)
    assert (after.mtime_ns, after.owner) == (before.mtime_ns, before.owner)
    assert (after.name_volume, after.parent) == (1, slot_of(directory) + 1)
    assert lookup(table, directory, b"new") == [slot_of(inode)]
    assert lookup(table, ROOT, b"old") == []


def test_a_renamed_directory_keeps_its_entries(writer: Writer, table: Table) -> None:
    one, other = (writer.make(ROOT, name, Kind.DIRECTORY) for name in (b"one", b"other"))
    below = writer.make(one, b"below", Kind.DIRECTORY)
    for number in range(20):
        writer.make(below, b"%d" % number)
    children = listing(table, slot_of(below))
    writer.rename(below, other, b"here")
    assert listing(table, slot_of(below)) == children
    assert [table.subdirectories(slot_of(each)) for each in (ROOT, one, other)] == [2, 0, 1]
    writer.rename(below, ROOT, b"there")
    assert [table.subdirectories(slot_of(each)) for each in (ROOT, one, other)] == [3, 0, 0]


def test_entries_that_change_change_the_times_of_their_directory(writer: Writer, table: Table) -> None:
    directory = writer.make(ROOT, b"d", Kind.DIRECTORY)
    inode = writer.make(directory, b"a")
    for change in (
        lambda: writer.make(directory, b"b"),
        lambda: writer.rename(inode, directory, b"c"),
        lambda: writer.rename(inode, ROOT, b"c"),
        lambda: writer.rename(inode, directory, b"a"),
        lambda: writer.delete(inode),
    ):
        change()
        record = table.record(slot_of(directory))
        assert (record.mtime_ns, record.ctime_s) == (writer.now_ns, writer.now_ns // SECOND_NS)
        assert record.flags & Flag.STALE_MTIME
    assert table.memory.words[Word.STALE_DIRECTORIES] == 2
    writer.settle_directories()
    assert table.memory.words[Word.STALE_DIRECTORIES] == 0
    other = writer.make(directory, b"other")
    writer.settle_directories()
    writer.put(other, directory, b"other", size=1)  # another content changes no directory
    assert not table.record(slot_of(directory)).flags & Flag.STALE_MTIME


def test_a_removed_directory_is_owed_no_needle_for_its_times(writer: Writer, table: Table) -> None:
    directory = writer.make(ROOT, b"d", Kind.DIRECTORY)
    writer.delete(writer.make(directory, b"a"))
    writer.delete(directory)
    assert table.memory.words[Word.STALE_DIRECTORIES] == 1  # the root
    assert slot_of(writer.make(ROOT, b"b")) == 2
    assert slot_of(writer.make(ROOT, b"c")) == 1
    assert table.memory.words[Word.STALE_DIRECTORIES] == 1


def test_what_is_deleted_rests_with_all_that_it_was(writer: Writer, table: Table) -> None:
    inode = writer.make(ROOT, b"a", size=5)
    before = table.record(slot_of(inode))
    writer.delete(inode)
    after = table.record(slot_of(inode))
    assert not after.live
    assert after._replace(flags=before.flags, ctime_s=before.ctime_s) == before
    assert lookup(table, ROOT, b"a") == []


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL])
def test_the_counts_follow(writer: Writer, table: Table, kind: Kind) -> None:
    words = table.memory.words

    def counts() -> list[int]:
        return [words[word] for word in (Word.FILES, Word.DIRECTORIES, Word.SYMLINKS)]

    before = counts()
    assert before == [0, 1, 0]
    inode = writer.make(ROOT, b"a", kind)
    changed = {Kind.DIRECTORY: [0, 2, 0], Kind.SYMLINK: [0, 1, 1]}.get(kind, [1, 1, 0])
    assert counts() == changed
    writer.put(inode, ROOT, b"b", kind)
    assert counts() == changed
    writer.delete(inode)
    assert counts() == before
    writer.delete(inode)
    assert counts() == before


def test_an_image_may_be_put_in_place_of_a_link(writer: Writer, table: Table) -> None:
    inode = writer.make(ROOT, b"a", Kind.SYMLINK)
    writer.put(inode, ROOT, b"a", Kind.FILE)
    assert table.record(slot_of(inode)).kind == Kind.FILE
    assert (table.memory.words[Word.FILES], table.memory.words[Word.SYMLINKS]) == (1, 0)


def test_very_many_subdirectories_are_no_longer_counted(writer: Writer, table: Table) -> None:
    inode = writer.make(ROOT, b"a", Kind.DIRECTORY)
    at = record_at(0) + AT_SUBDIRECTORIES
    struct.pack_into("<H", table.memory.map, at, SUBDIRECTORIES_MANY - 1)
    writer.make(ROOT, b"b", Kind.DIRECTORY)
    assert table.subdirectories(0) == SUBDIRECTORIES_MANY
    writer.make(ROOT, b"c", Kind.DIRECTORY)
    writer.delete(inode)
    assert table.subdirectories(0) == SUBDIRECTORIES_MANY
    struct.pack_into("<H", table.memory.map, at, 2)


# -- slots --------------------------------------------------------------------------------------------------------


def test_slots_rest_and_come_back_with_the_next_generation(writer: Writer, table: Table) -> None:
    images = [writer.make(ROOT, b"%d" % number) for number in range(5)]
    for inode in images[:4]:
        writer.delete(inode)
    writer.rest = 3
    assert [slot_of(inode) for inode in images[:4]] == free_queue(table)
    again = writer.make(ROOT, b"again")
    assert again == inode_of(slot_of(images[0]), 1)
    assert writer.make(ROOT, b"new") == inode_of(6, 0)
    writer.delete(again)
    assert free_queue(table) == [2, 3, 4, 1]


def test_generations_go_round(writer: Writer, table: Table) -> None:
    seen = []
    for _ in range(258):
        seen.append(writer.make(ROOT, b"a"))
        writer.delete(seen[-1])
    assert seen == [inode_of(1, generation & 0xFF) for generation in range(258)]


def test_a_slot_that_a_handle_needs_goes_to_the_end_of_the_queue(writer: Writer, table: Table) -> None:
    images = [writer.make(ROOT, b"%d" % number) for number in range(20)]
    for inode in images[:3]:
        writer.delete(inode)
    with table.memory.lock():
        assert table.next_slot(0, lambda slot: slot == 1) == (2, 1)
        assert free_queue(table) == [2, 3, 1]
        assert table.next_slot(0, lambda slot: True) == (21, 0), "all are needed: a new one"
    for inode in images[3:]:
        writer.delete(inode)
    with table.memory.lock():
        assert table.next_slot(0, lambda slot: slot < 20) == (21, 0), "so long it does not look"


def test_a_needle_may_bring_back_a_slot_that_waits_in_the_queue(writer: Writer, table: Table) -> None:
    images = [writer.make(ROOT, b"%d" % number) for number in range(4)]
    for inode in images:
        writer.delete(inode)
    for number, left in ((2, [1, 3, 4]), (4, [1, 3]), (1, [3]), (3, [])):
        writer.put(inode_of(number, 1), ROOT, b"back %d" % number, Kind.DIRECTORY)
        assert free_queue(table) == left
        dump(table)
    assert writer.make(ROOT, b"new") == inode_of(5, 0)


def test_the_table_may_be_full(writer: Writer, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.make(ROOT, b"a")
    monkeypatch.setattr("imgfs.table.SLOTS_MAX", 2)
    with pytest.raises(StoreLimit, match="at most 2 images"):
        writer.new_inode()
    writer.delete(2)
    assert writer.new_inode() == inode_of(1, 1)


@pytest.mark.parametrize("slot", [-1, 1, SLOTS_MAX, 1 << 40])
def test_a_slot_that_never_was_has_an_empty_record(table: Table, slot: int) -> None:
    assert set(table.record(slot)) == {0}
    assert not table.record(slot).live


# -- owners, volumes ----------------------------------------------------------------------------------------------


def test_owners_are_numbered_in_the_order_of_their_first_use(writer: Writer, table: Table) -> None:
    owners = [(0, 0, 0o755), (1, 2, 0o4711), ((1 << 32) - 2, 0, 0)]
    for number, owner in enumerate(owners):
        assert table.owner_index(*owner) == number
        writer.append(Needle(Kind.OWNER, 0, owner=number, uid=owner[0], gid=owner[1], mode=owner[2]))
        assert table.owner_index(*owner) == number
        assert table.owner(number) == owner
    assert [table.owner_volume(number) for number in range(4)] == [0, 0, 0, -1]
    writer.roll()
    writer.append(Needle(Kind.OWNER, 0, owner=1, uid=1, gid=2, mode=0o4711))
    assert [table.owner_volume(number) for number in range(3)] == [0, 1, 0]
    assert table.memory.words[Word.OWNERS] == 3


def test_another_process_finds_the_owners_that_this_one_defined(writer: Writer, table: Table) -> None:
    other = Table(table.memory, 7)
    assert other.owner_index(5, 5, 5) == 0
    writer.append(Needle(Kind.OWNER, 0, owner=0, uid=1, gid=2, mode=3))
    assert (other.owner_index(5, 5, 5), other.owner_index(1, 2, 3)) == (1, 0)


def test_owners_and_volumes_may_run_out(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgfs.owners.OWNERS_MAX", 0)
    with pytest.raises(StoreLimit, match="combinations"):
        table.owner_index(1, 1, 1)
    with table.memory.change():
        assert table.add_volume(VolumeEntry(9, 8192, 1, 0)) == 0
    assert table.volume(0) == VolumeEntry(9, 8192, 1, 0)
    monkeypatch.setattr("imgfs.table.VOLUMES_MAX", 1)
    with pytest.raises(StoreLimit, match="volumes"), table.memory.change():
        table.add_volume(VolumeEntry(10, 8192, 1, 0))


# -- needles that contradict the table ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "needle",
    [
        Needle(Kind.DELETE, inode_of(1, 1)),
        Needle(Kind.DELETE, inode_of(7, 0)),
        Needle(Kind.DELETE, ROOT),
        Needle(Kind.DELETE, 0),
        Needle(Kind.RENAME, inode_of(1, 1), ROOT, b"other"),
        Needle(Kind.RENAME, inode_of(7, 0), ROOT, b"other"),
        Needle(Kind.ATTRIBUTES, inode_of(1, 1), owner=3, mtime_ns=1),
        Needle(Kind.ATTRIBUTES, inode_of(7, 0), owner=3, mtime_ns=1),
        Needle(Kind.CHECKPOINT, 0),
        Needle(Kind.XATTR, inode_of(1, 1), data_size=8),
    ],
    ids=lambda needle: f"{Kind(needle.kind).name} {needle.inode:#x}",
)
def test_what_says_nothing_about_a_living_inode_changes_nothing(writer: Writer, table: Table, needle: Needle) -> None:
    writer.make(ROOT, b"a")
    before = dump(table)
    with table.memory.change():
        table.apply(needle, Place(0, 8192, 16))
    assert dump(table) == before


def test_an_image_in_what_is_no_directory_is_damage_and_changes_nothing(writer: Writer, table: Table) -> None:
    inode = writer.make(ROOT, b"a")
    before = dump(table)
    for needle in (
        Needle(Kind.FILE, inode_of(2, 0), inode, b"b"),
        Needle(Kind.FILE, inode_of(2, 0), 99, b"b"),
        Needle(Kind.RENAME, inode, 99, b"b"),
    ):
        with pytest.raises(Damaged, match="no directory"), table.memory.change():
            table.apply(needle, Place(0, 8192, 16))
        assert dump(table) == before


def test_a_put_replaces_what_another_generation_left_in_its_slot(writer: Writer, table: Table) -> None:
    old = writer.make(ROOT, b"a", Kind.SYMLINK)
    new = writer.put(inode_of(slot_of(old), 3), ROOT, b"b")
    assert lookup(table, ROOT, b"a") == []
    assert lookup(table, ROOT, b"b") == [slot_of(new)]
    assert free_queue(table) == []
    assert (table.memory.words[Word.SYMLINKS], table.memory.words[Word.FILES]) == (0, 1)
