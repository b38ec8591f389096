"""The bulk load gives the same table as applying needle by needle, and takes at most 48 bytes per image."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tables import ROOT, SECOND_NS, Writer, dump, listing, new_table

from imgfs.format import INDEX_RECORD_BYTES, Kind, Needle, inode_of, slot_of
from imgfs.index import pack_record
from imgfs.layout import Flag, Word
from imgfs.load import Loader, live_bytes, rebuild_free_queue, stale_directories
from imgfs.memory import Memory
from imgfs.records import VolumeEntry
from imgfs.table import Table

OWNERS = [(0, 0, 0o755), (1000, 1000, 0o644), (1000, 0, 0o600), ((1 << 32) - 2, 5, 0o4755)]
NAMES = [b"%d" % number for number in range(30)]


class History:
    """Does what a store might do, and lets a table follow needle by needle; what makes no sense is passed over."""

    def __init__(self, rest: int) -> None:
        self.writer = Writer(new_table(), rest=rest)
        self.entries: dict[int, dict[bytes, int]] = {ROOT: {}}  # directory -> name -> inode
        self.kinds: dict[int, Kind] = {ROOT: Kind.DIRECTORY}
        self.parents: dict[int, tuple[int, bytes]] = {}
        self.targets: dict[int, int] = {}  # of links
        self._defined: set[int] = set()
        self._begin_volume()
        self.writer.append(Needle(Kind.DIRECTORY, ROOT, ROOT, owner=self._owner(0), mtime_ns=1))

    def _begin_volume(self) -> None:
        table = self.writer.table
        with table.memory.change():
            table.add_volume(VolumeEntry(self.writer.volume + 1, 8192, 0, 0))
        self._defined.clear()

    def _owner(self, index: int) -> int:
        """Return owner *index*; the first time in a volume a needle says what it means."""
        known = self.writer.table.memory.words[Word.OWNERS]
        for number in {min(index, known), index} if index > known else {index}:
            if number not in self._defined:
                uid, gid, mode = OWNERS[number]
                self.writer.append(Needle(Kind.OWNER, 0, uid=uid, gid=gid, mode=mode, owner=number))
                self._defined.add(number)
        return index

    def _directory(self, number: int) -> int:
        directories = sorted(self.entries)
        return directories[number % len(directories)]

    def _entry(self, number: int) -> int:
        inodes = sorted(self.parents)
        return inodes[number % len(inodes)] if inodes else 0

    def _forget(self, inode: int) -> None:
        parent, name = self.parents.pop(inode)
        del self.entries[parent][name]
        self.targets.pop(inode, None)
        self.entries.pop(inode, None)

    def make(self, kind: Kind, where: int, name: int, owner: int) -> None:
        directory, owner = self._directory(where), self._owner(owner % len(OWNERS))
        if NAMES[name] not in self.entries[directory]:
            size = 0 if kind == Kind.DIRECTORY else name * 100
            inode = self.writer.make(directory, NAMES[name], kind, size, owner)
            self.entries[directory][NAMES[name]], self.kinds[inode] = inode, kind
            self.parents[inode] = directory, NAMES[name]
            if kind == Kind.DIRECTORY:
                self.entries[inode] = {}

    def overwrite(self, number: int, owner: int) -> None:
        inode, owner = self._entry(number), self._owner(owner % len(OWNERS))
        inode = self.targets.get(inode, inode)
        if inode and self.kinds[inode] != Kind.DIRECTORY:
            parent, name = self.parents.get(inode, (0, b""))  # none of its own is left, perhaps
            self.writer.put(inode, parent, name, self.kinds[inode], number, owner)

    def link(self, number: int, where: int, name: int) -> None:
        inode, directory = self._entry(number), self._directory(where)
        if inode and self.kinds[inode] != Kind.DIRECTORY and NAMES[name] not in self.entries[directory]:
            target = self.targets.get(inode, inode)
            entry = self.writer.link(target, directory, NAMES[name])
            self.entries[directory][NAMES[name]], self.kinds[entry] = entry, self.kinds[inode]
            self.parents[entry], self.targets[entry] = (directory, NAMES[name]), target

    def set_xattrs(self, number: int, size: int) -> None:
        inode = self._entry(number)
        if inode:
            self.writer.set_xattrs(self.targets.get(inode, inode), size)

    def delete(self, number: int) -> None:
        inode = self._entry(number)
        if inode and not self.entries.get(inode):
            self._forget(inode)
            self.writer.delete(inode)

    def rename(self, number: int, where: int, name: int) -> None:
        inode, directory = self._entry(number), self._directory(where)
        above = directory
        while above not in (ROOT, inode):
            above = self.parents[above][0]
        target = self.entries[directory].get(NAMES[name], 0)
        same = self.targets.get(inode, inode) == self.targets.get(target, target)
        if not inode or above == inode or same or self.entries.get(target):
            return
        if target and (self.kinds[inode] == Kind.DIRECTORY) != (self.kinds[target] == Kind.DIRECTORY):
            return
        if target:
            self._forget(target)
        old_parent, old_name = self.parents[inode]
        del self.entries[old_parent][old_name]
        self.entries[directory][NAMES[name]] = inode
        self.parents[inode] = directory, NAMES[name]
        self.writer.rename(inode, directory, NAMES[name], target)

    def set_attributes(self, number: int, owner: int) -> None:
        inode = self._entry(number) or ROOT
        self.writer.set_attributes(self.targets.get(inode, inode), self._owner(owner % len(OWNERS)), number * SECOND_NS)

    def roll(self) -> None:
        """Begin another volume, as the log does."""
        self.writer.settle_directories()
        self.writer.roll()
        self._begin_volume()

    def loaded(self) -> Table:
        """Return the table that the index files of all volumes give."""
        table = new_table()
        loader = Loader(table.memory)
        for volume in range(self.writer.volume + 1):
            rows = [(needle, place) for needle, place in self.writer.needles if place.volume == volume]
            records = b"".join(index_record(table, needle, place.offset, place.name_offset) for needle, place in rows)
            with table.memory.change():
                assert table.add_volume(VolumeEntry(volume + 1, 8192, 0, 0)) == volume
            loader.add(records, volume)
        assert loader.link() == []
        rebuild_free_queue(table.memory)
        return table


def index_record(table: Table, needle: Needle, offset: int, name_offset: int) -> bytes:
    return pack_record(needle, offset, name_offset, table.hash(needle.name) if needle.name else 0)


def observable(table: Table) -> dict[str, Any]:
    """Return what of *table* must not depend on how it was filled."""
    seen = dump(table)
    live = {slot: record for slot, record in enumerate(seen.records) if record.live}
    # Where a directory's buckets lie is its own affair.
    rows = {slot: row._replace(offset8=0) if row.kind == Kind.DIRECTORY else row for slot, row in live.items()}
    rows[0] = rows[0]._replace(hash_generation=0)  # the root has no name, whose hash nobody looks for
    words = table.memory.words
    return {
        "records": rows,
        "generations": [record.generation for record in seen.records],
        "subdirectories": {slot: table.subdirectories(slot) for slot in seen.listings},
        "listings": seen.listings,
        "found": {slot: sorted(found) for slot, found in seen.found.items()},
        "free": sorted(seen.free),
        "owners": [(table.owner(index), table.owner_volume(index)) for index in range(words[Word.OWNERS])],
        "counts": [words[word] for word in (Word.SLOTS, Word.FILES, Word.DIRECTORIES, Word.SYMLINKS, Word.VOLUMES)],
        "rare": {slot: table.rare.get(slot, row.generation) for slot, row in live.items()},
        "live bytes": [list(column) for column in live_bytes(table.memory)],
    }


NUMBERS = st.integers(0, 60)
OWNER_NUMBERS = st.integers(0, len(OWNERS) - 1)
OPERATIONS = st.one_of(
    st.tuples(st.just("make"), st.just(Kind.FILE), st.integers(0, 3), st.integers(0, 29), OWNER_NUMBERS),
    st.tuples(
        st.just("make"),
        st.sampled_from([Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL]),
        st.integers(0, 5),
        st.integers(0, 29),
        OWNER_NUMBERS,
    ),
    st.tuples(st.just("overwrite"), NUMBERS, OWNER_NUMBERS),
    st.tuples(st.just("delete"), NUMBERS),
    st.tuples(st.just("rename"), NUMBERS, st.integers(0, 5), st.integers(0, 29)),
    st.tuples(st.just("set_attributes"), NUMBERS, OWNER_NUMBERS),
    st.tuples(st.just("link"), NUMBERS, st.integers(0, 5), st.integers(0, 29)),
    st.tuples(st.just("set_xattrs"), NUMBERS, st.sampled_from([0, 0, 8, 100])),
    st.tuples(st.just("roll")),
)
# A directory that grows past several buckets, and shrinks again.
CROWD = [("make", Kind.DIRECTORY, 0, 0, 0), *(("make", Kind.FILE, 1, name, 1) for name in range(30))]

RENAMED = [("make", Kind.FILE, 0, 1, 0), ("rename", 0, 0, 2)]


LINKED = [("make", Kind.FILE, 0, 1, 0), ("link", 0, 0, 2), ("link", 0, 0, 3)]


@settings(max_examples=250, deadline=None)
@given(rest=st.integers(0, 3), operations=st.lists(OPERATIONS, min_size=1, max_size=80), crowd=st.booleans())
@example(rest=0, crowd=False, operations=[("make", Kind.FILE, 0, 1, 0), ("set_attributes", 0, 1), ("rename", 0, 0, 2)])
@example(rest=0, crowd=True, operations=[("delete", 5)] * 25)
@example(rest=0, crowd=False, operations=[*LINKED, ("delete", 2)])
@example(rest=0, crowd=False, operations=[*LINKED, ("delete", 0), ("overwrite", 1, 0), ("delete", 0), ("delete", 0)])
@example(rest=0, crowd=False, operations=[*LINKED, ("roll",), ("delete", 0), ("roll",), ("delete", 1), ("delete", 0)])
@example(rest=0, crowd=False, operations=[*LINKED, ("set_xattrs", 1, 8), ("delete", 0), ("roll",), ("rename", 1, 0, 4)])
@example(rest=0, crowd=False, operations=[*LINKED, ("make", Kind.FILE, 0, 9, 0), ("roll",), ("rename", 3, 0, 1)])
@example(rest=0, crowd=False, operations=[*RENAMED, ("overwrite", 0, 0)])
@example(rest=0, crowd=False, operations=[*RENAMED, ("delete", 0), ("make", Kind.FILE, 0, 3, 0)])
@example(rest=0, crowd=False, operations=[*RENAMED, ("set_attributes", 0, 1), ("roll",), ("delete", 0), *RENAMED])
def test_the_bulk_load_equals_needle_by_needle(rest: int, operations: list[Any], crowd: bool) -> None:
    history = History(rest)
    for name, *arguments in CROWD + operations if crowd else operations:
        getattr(history, name)(*arguments)
    history.writer.settle_directories()
    loaded = history.loaded()
    one_by_one = observable(history.writer.table)
    assert observable(loaded) == one_by_one
    assert not list(stale_directories(loaded.memory))
    # The model that chose the operations agrees, too.
    names = {slot_of(key): {slot_of(inode) for inode in rows.values()} for key, rows in history.entries.items()}
    assert {key: {slot for _, slot in rows} for key, rows in one_by_one["listings"].items()} == names
    for table in (loaded, history.writer.table):
        table.memory.close()


def test_a_loaded_table_takes_further_needles() -> None:
    history = History(rest=0)
    for name, *arguments in [*CROWD, ("delete", 3), ("delete", 9), ("roll",)]:
        getattr(history, name)(*arguments)
    loaded = history.loaded()
    writer = history.writer.on(loaded)
    directory = history.entries[ROOT][NAMES[0]]
    freed = writer.make(directory, b"in a freed slot")
    assert freed >> 32 == 1
    for name, inode in list(history.entries[directory].items()):
        writer.rename(inode, ROOT, name + b" moved")
    writer.delete(freed)
    writer.delete(directory)
    assert len(dump(loaded).listings[0]) == len(history.entries[directory])
    loaded.memory.close()


def test_linking_in_batches_equals_linking_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(rest=0)
    for name, *arguments in CROWD + [("make", Kind.FILE, 0, name, 0) for name in range(6)]:
        getattr(history, name)(*arguments)
    history.writer.settle_directories()
    monkeypatch.setattr("imgfs.load._BATCH", 4)
    loaded = history.loaded()
    assert observable(loaded) == observable(history.writer.table)
    loaded.memory.close()


def test_an_entry_whose_directory_was_lost_is_an_orphan() -> None:
    history = History(rest=0)
    for operation in (("make", Kind.DIRECTORY, 0, 0, 0), ("make", Kind.FILE, 1, 1, 0), ("make", Kind.FILE, 0, 2, 0)):
        history.make(*operation[1:])  # type: ignore[arg-type]
    lost = history.entries[ROOT][NAMES[0]]
    needles = [row for row in history.writer.needles if row[0].inode != lost]
    table = new_table()
    loader = Loader(table.memory)
    loader.add(b"".join(index_record(table, needle, place.offset, 16) for needle, place in needles), 0)
    assert loader.link() == [slot_of(history.entries[lost][NAMES[1]])]
    assert [slot for _, slot in listing(table, 0)] == [slot_of(history.entries[ROOT][NAMES[2]])]
    assert table.memory.words[Word.FILES] == 2
    table.memory.close()


def test_nothing_to_load() -> None:
    table = new_table()
    loader = Loader(table.memory)
    loader.add(b"", 0)
    assert loader.link() == []
    rebuild_free_queue(table.memory)
    assert table.memory.words[Word.SLOTS] == 0
    table.memory.close()


# -- memory -------------------------------------------------------------------------------------------------------


def many_records(images: int, directories: int) -> bytes:
    """Return the index records of *directories* in the root, and so many *images* in all of them."""
    kinds = ["u1", "<u4", "<u4", "<u4", "<u4", "<u4", "<i8", "<u4", "<u2", "<u4"]
    row = np.dtype(list(zip("kspnobmtwh", kinds, strict=True)))
    records = np.zeros(1 + directories + images, row)
    assert row.itemsize == INDEX_RECORD_BYTES
    number = np.arange(len(records))
    records["k"] = np.where(number <= directories, Kind.DIRECTORY, Kind.FILE)
    records["s"] = number + 1
    records["p"] = np.where(number <= directories, 1, 2 + number % max(directories, 1))
    records["h"] = np.random.default_rng(1).integers(0, 1 << 24, len(records))
    records["n"], records["o"], records["b"] = 1024 + number, 16 + number, number
    return records.tobytes()


def resident_bytes(images: int, directories: int) -> int:
    """Return the memory that so many images take, loaded in bulk."""
    memory = Memory()
    loader = Loader(memory)
    loader.add(many_records(images, directories), 0)
    assert loader.link() == []
    rebuild_free_queue(memory)
    assert memory.words[Word.FILES] == images
    table = Table(memory, 0)
    assert sum(table.buckets.children(slot) for slot in range(directories + 1)) == images + directories
    resident = memory.resident_bytes()
    memory.close()
    return resident


@pytest.mark.parametrize("directories", [1, 200])
def test_an_image_takes_at_most_48_bytes_of_memory(directories: int) -> None:
    images = 200_000
    base = resident_bytes(0, directories)
    slope = (resident_bytes(images, directories) - base) / images
    assert 39 < slope <= 48


def test_an_image_takes_at_most_48_bytes_of_memory_added_one_by_one() -> None:
    table = new_table()
    writer = Writer(table)
    writer.root()
    base, images = table.memory.resident_bytes(), 20_000
    for number in range(images):
        writer.put(inode_of(number + 1, 0), ROOT, b"%d" % number)
        writer.needles.clear()
    assert (table.memory.resident_bytes() - base) / images <= 48
    assert not table.record(1).flags & Flag.DEAD
    table.memory.close()
