"""Tables without a disk, for tests: makes needles, applies them, and says what a table holds.

Owns the numbering of needles, places and slots. Must not know files.

*Concurrency:* none.
"""

import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from imgfs.buckets import bucket_count, region_class
from imgfs.format import FLAG_BARE, FLAG_LAST, NEEDLES_START, Kind, Needle, Tag, inode_of, slot_of
from imgfs.layout import (
    ARENA_AT,
    ARENA_UNIT,
    LINK_BYTES,
    LINKS_AT,
    RARE,
    RARE_AT,
    RARE_HEADS_AT,
    RECORD_BYTES,
    RECORDS_AT,
    WORDS,
    WORDS_AT,
    Flag,
    Word,
)
from imgfs.memory import Memory
from imgfs.records import Place, Record
from imgfs.table import Table

SEED = 7
ROOT = 1
SECOND_NS = 1_000_000_000
_U32 = struct.Struct("<I")


@dataclass
class Writer:
    """Appends needles to a table as the log does, but to no volume; `needles` holds what was appended, and where."""

    table: Table
    rest: int = 0
    needles: list[tuple[Needle, Place]] = field(default_factory=list)
    volume: int = 0
    offset: int = NEEDLES_START
    name_offset: int = 16
    now_ns: int = 1_700_000_000 * SECOND_NS

    def on(self, table: Table) -> "Writer":
        """Return a writer that goes on where this one is, on another mapping of the same table."""
        return replace(self, table=table, needles=self.needles.copy())

    def append(self, needle: Needle) -> Needle:
        """Give *needle* a time and a place, and apply it in one change."""
        self.now_ns += SECOND_NS
        needle.ctime_ns = needle.ctime_ns or self.now_ns
        place = Place(self.volume, self.offset, self.name_offset if needle.name else 0)
        with self.table.memory.lock(), self.table.memory.change():
            self.table.apply(needle, place)
            self.table.memory.put_word(Word.NEXT_SEQUENCE, len(self.needles) + 1)
        self.needles.append((needle, place))
        self.offset += needle.length
        self.name_offset += 1 + len(needle.name) if needle.name else 0
        return needle

    def roll(self) -> None:
        """Go on in the next volume."""
        self.volume, self.offset, self.name_offset = self.volume + 1, NEEDLES_START, 16

    def root(self) -> int:
        return self.append(Needle(Kind.DIRECTORY, ROOT, ROOT, mtime_ns=5)).inode

    def new_inode(self) -> int:
        with self.table.memory.lock():
            return inode_of(*self.table.next_slot(self.rest, lambda slot: False))

    def make(self, parent: int, name: bytes, kind: Kind = Kind.FILE, size: int = 0, owner: int = 0) -> int:
        """Make an image, a directory or a link, and return its inode."""
        return self.put(self.new_inode(), parent, name, kind, size, owner)

    def put(self, inode: int, parent: int, name: bytes, kind: Kind = Kind.FILE, size: int = 0, owner: int = 0) -> int:
        self.append(Needle(kind, inode, parent, name, size, owner=owner, mtime_ns=self.now_ns + 1))
        return inode

    def link(self, inode: int, parent: int, name: bytes) -> int:
        """Give *inode* a further name; return the inode of that entry."""
        extras: dict[int, bytes] = {Tag.TARGET: inode.to_bytes(8, "little")}
        return self.append(Needle(Kind.LINK, self.new_inode(), parent, name, extras=extras)).inode

    def set_xattrs(self, inode: int, size: int) -> None:
        """Append *size* bytes of extended attributes."""
        self.append(Needle(Kind.XATTR, inode, data_size=size))

    def _farewell(self, entry: int) -> tuple[int, dict[int, bytes]]:
        """Return what the needle says that takes *entry* away, as the store finds out."""
        table, slot = self.table, slot_of(entry)
        record = table.record(slot)
        if record.kind == Kind.DIRECTORY:
            return 0, {}
        target = table.target(slot, record)
        names = table.names(slot_of(target), table.record(slot_of(target)))
        if target != entry:
            return FLAG_LAST if names == 1 else 0, {Tag.TARGET: target.to_bytes(8, "little")}
        return FLAG_BARE if names > 1 else 0, {}

    def delete(self, inode: int) -> None:
        flags, extras = self._farewell(inode)
        self.append(Needle(Kind.DELETE, inode, flags=flags, extras=extras))

    def rename(self, inode: int, parent: int, name: bytes, replaced: int = 0) -> None:
        flags, extras = self._farewell(replaced) if replaced else (0, {})
        if replaced:
            extras[Tag.REPLACED] = replaced.to_bytes(8, "little")
        self.append(Needle(Kind.RENAME, inode, parent, name, flags=flags, extras=extras))

    def set_attributes(self, inode: int, owner: int, mtime_ns: int) -> None:
        self.append(Needle(Kind.ATTRIBUTES, inode, owner=owner, mtime_ns=mtime_ns))

    def settle_directories(self) -> None:
        """Give each directory that changed by implication a needle of its own, as before a checkpoint."""
        for slot in range(self.table.memory.words[Word.SLOTS]):
            record = self.table.record(slot)
            if record.live and record.stale:
                needle = Needle(Kind.ATTRIBUTES, inode_of(slot, record.generation), owner=record.owner)
                needle.mtime_ns, needle.ctime_ns = record.mtime_ns, record.ctime_s * SECOND_NS
                self.append(needle)


def new_table() -> Table:
    return Table(Memory(), SEED)


def attached(table: Table) -> Table:
    """Return the same table as another process sees it."""
    return Table(another_mapping(table.memory), SEED)


def another_mapping(memory: Memory) -> Memory:
    return Memory(os.dup(memory.descriptor))


def listing(table: Table, directory: int) -> list[tuple[int, int]]:
    """Return (position, slot) of all entries of the directory in slot *directory*."""
    rows: list[tuple[int, int]] = []
    while found := table.buckets.after(directory, rows[-1][0] if rows else 0):
        rows += found
    return rows


def free_queue(table: Table) -> list[int]:
    """Return the freed slots in the order in which they will be used."""
    words = table.memory.words
    slots, reference = [], words[Word.FREE_HEAD]
    while reference:
        slots.append(reference - 1)
        reference = _U32.unpack_from(table.memory.map, LINKS_AT + LINK_BYTES * slots[-1])[0]
    assert words[Word.FREE_TAIL] == (slots[-1] + 1 if slots else 0)
    assert words[Word.FREE_COUNT] == len(slots)
    return slots


class Dump(NamedTuple):
    """All that can be seen in a table."""

    words: tuple[int, ...]
    records: tuple[Record, ...]
    listings: dict[int, tuple[tuple[int, int], ...]]  # by slot
    found: dict[int, tuple[int, ...]]  # slot -> the slots found under the hash of its name
    free: tuple[int, ...]
    free_regions: tuple[tuple[int, ...], ...]  # by size class
    owners: tuple[Any, ...]
    volumes: tuple[Any, ...]


def dump(table: Table) -> Dump:
    """Return what *table* holds, once it is known that no word in it contradicts another."""
    words = table.memory.words
    records = tuple(map(table.record, range(words[Word.SLOTS])))
    kept = set(range(WORDS)) - {Word.COUNTER, Word.JOURNAL}
    result = Dump(
        tuple(words[word] for word in sorted(kept)),
        records,
        {slot: tuple(listing(table, slot)) for slot, row in enumerate(records) if row.live and row.kind == 2},
        {
            slot: tuple(table.buckets.find(row.parent - 1, row.hash_generation & 0xFF_FFFF))
            for slot, row in enumerate(records)
            if row.live and slot and table.is_directory(row.parent - 1)
        },
        tuple(free_queue(table)),
        tuple(tuple(free_regions(table.memory, size_class)) for size_class in range(32)),
        tuple(map(table.owner, range(words[Word.OWNERS]))),
        tuple(map(table.volume, range(words[Word.VOLUMES]))),
    )
    check(table, result)
    return result


def free_regions(memory: Memory, size_class: int) -> list[int]:
    """Return the units of the freed bucket regions of *size_class*."""
    units: list[int] = []
    reference = memory.words[Word.ARENA_FREE + size_class]
    while reference:
        units.append(reference - 1)
        reference = _U32.unpack_from(memory.map, ARENA_AT + units[-1] * ARENA_UNIT)[0]
    return units


def check(table: Table, seen: Dump) -> None:
    """Make sure that the counts are true, each live record is listed once where it says, and no region is lost."""
    words = table.memory.words
    live = [slot for slot, record in enumerate(seen.records) if record.live]
    kinds = [seen.records[slot].kind for slot in live]
    assert words[Word.DIRECTORIES] == kinds.count(Kind.DIRECTORY)
    assert words[Word.SYMLINKS] == kinds.count(Kind.SYMLINK)
    assert words[Word.FILES] == kinds.count(Kind.FILE) + kinds.count(Kind.SPECIAL)
    stale = sum(record.stale for record in seen.records)
    assert words[Word.STALE_DIRECTORIES] == stale
    listed = seen.listings
    for slot, rows in listed.items():
        assert list(rows) == sorted(set(rows))
        assert table.buckets.children(slot) == len(rows)
        directories = [child for _, child in rows if seen.records[child].kind == Kind.DIRECTORY]
        assert table.subdirectories(slot) == len(directories)
    everywhere = sorted(child for rows in listed.values() for _, child in rows)
    named = [slot for slot in live if slot and seen.records[slot].parent]
    assert everywhere == named, "each name is in one directory"
    check_rare(table, seen.records)
    assert all(seen.records[child].parent == slot + 1 for slot, rows in listed.items() for _, child in rows)
    assert all(slot in found for slot, found in seen.found.items())
    assert sorted(seen.free) == [slot for slot in range(len(seen.records)) if slot not in set(live)]
    regions = [
        (seen.records[slot].offset8, 1 << region_class(bucket_count(len(rows))))
        for slot, rows in listed.items()
        if bucket_count(len(rows)) > 1
    ]
    regions += [(unit, 1 << size_class) for size_class, units in enumerate(seen.free_regions) for unit in units]
    end = 0
    for unit, size in sorted(regions):
        assert unit == end, "bucket regions overlap, or one is lost"
        end += size
    assert end == words[Word.ARENA_END]


def check_rare(table: Table, records: Sequence[Record]) -> None:
    """Make sure that links are counted, that who has no name of its own has links, and that no entry is lost."""
    links = Counter(record.size - 1 for record in records if record.live and record.kind == Kind.LINK)
    for slot, record in enumerate(records):
        if record.live and record.kind not in (Kind.DIRECTORY, Kind.LINK):
            entry = table.rare.get(slot, record.generation)
            assert entry.links == links[slot]
            assert not links[slot] or record.flags & Flag.LINKED
            assert links[slot] or record.parent, f"nothing names slot {slot}"
    words = table.memory.words
    chained = 0
    for head in range(len(records)):
        (reference,) = _U32.unpack_from(table.memory.map, RARE_HEADS_AT + 4 * head)
        while reference:
            chained += 1
            (reference,) = _U32.unpack_from(table.memory.map, RARE_AT + RARE.size * (reference - 1))
    free, reference = 0, words[Word.RARE_FREE]
    while reference:
        free += 1
        (reference,) = _U32.unpack_from(table.memory.map, RARE_AT + RARE.size * (reference - 1))
    assert (chained, free) == (words[Word.RARE_COUNT], words[Word.RARE_ENTRIES] - words[Word.RARE_COUNT])


def raw(table: Table) -> bytes:
    """Return the bytes of all words, records and links, but for the counter and the journal."""
    memory, slots = table.memory, table.memory.words[Word.SLOTS] + 8
    words = bytearray(memory.map[WORDS_AT : WORDS_AT + 8 * WORDS])
    words[8 * Word.COUNTER : 8 * Word.JOURNAL + 8] = bytes(16)
    records = memory.map[RECORDS_AT : RECORDS_AT + RECORD_BYTES * slots]
    rare = memory.map[RARE_AT : RARE_AT + RARE.size * 64] + memory.map[RARE_HEADS_AT : RARE_HEADS_AT + 4 * slots]
    return bytes(words) + rare + records + memory.map[LINKS_AT : LINKS_AT + LINK_BYTES * slots]
