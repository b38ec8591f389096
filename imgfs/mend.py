"""Makes a tree again of what damaged needles left: directories, names and links that only lost needles told of.

Owns which names and directories the lost get. What it makes up must be written down before anything else is (see
opening.py): an inode's number may be given again. Must not know volumes or how needles are found.

*Concurrency:* runs before the store is shared.
"""

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from imgfs.errors import Damaged
from imgfs.format import FLAG_BARE, FLAG_LAST, PUT_KINDS, Kind, Needle, Tag, inode_of, slot_of
from imgfs.layout import Flag, Word
from imgfs.load import linked, live_records, targets
from imgfs.memory import Memory
from imgfs.records import Place
from imgfs.table import Table
from imgfs.volumes import Volumes

ROOT = inode_of(0, 0)
# What gives a name or takes one away.
_NAMING = PUT_KINDS | {Kind.RENAME, Kind.DELETE}


class Mended(NamedTuple):
    """What was wrong with an inode that was mended, and the name it had, if it had one."""

    inode: int
    text: str
    name: bytes = b""
    gone: bool = False  # there was nothing left to be kept


class Mender:
    """Mends one table while needles are replayed into it, and after.

    Attributes:
        lost_directories: inodes of directories that had to be made up.
        rescued: inodes that got a name under the root, and why.
        gone: inodes that are lost, or links to such, of which whole needles speak, and what is told of them.
        rejected: a needle named an entry of what is no directory, which has no name until `mend`.
    """

    def __init__(self, table: Table, volumes: Volumes, *, writable: bool) -> None:
        self._table = table
        self._volumes = volumes
        self._writable = writable
        self.lost_directories: list[int] = []
        self.rescued: dict[int, Mended] = {}
        self.gone: dict[int, Mended] = {}
        self.rejected = False
        # Of inodes that are not there, or not yet: where their extended attributes lie, and how many bytes.
        self._unclaimed: dict[int, tuple[Place, int]] = {}
        # Inodes whose last name was given in what is no directory: they have none until `mend`.
        self._unplaced: set[int] = set()

    # -- while needles are replayed -------------------------------------------------------------------------

    def link_again(self, slot: int) -> None:
        """Make *slot* a child of what is now in the slot of its directory, so that a needle can take it from there.

        The needle that took it out of its own is damaged, and the slot was used again.
        """
        if slot > 0 and self._table.is_directory(self._table.record(slot).parent - 1):
            with self._table.memory.change():
                self._table.adopt(slot)

    def keep_xattrs(self, inode: int, place: Place, size: int) -> None:
        """Keep in mind that *size* bytes at *place* are the extended attributes of *inode*, which is not there."""
        self._unclaimed[inode] = place, size

    def note_xattrs(self, needle: Needle, place: Place) -> None:
        """Keep in mind extended attributes whose inode a damaged needle put; a later one may put it again."""
        for inode in ends(needle) if self._unclaimed else ():
            self._unclaimed.pop(inode, None)
        if needle.kind == Kind.XATTR:
            self._unclaimed.pop(needle.inode, None)
            if not self._table.knows(needle.inode):
                self._unclaimed[needle.inode] = place, needle.data_size

    def note_names(self, needle: Needle) -> None:
        """Forget of what *needle* names, or takes the name of, that its name before could not be given."""
        if self._unplaced and needle.kind in _NAMING:
            self._unplaced -= {needle.inode, needle.extra_u64(Tag.REPLACED)}

    def find_directory(self, inode: int, *, of: int) -> None:
        """Make sure that there is a directory *inode*, in which *of* lies: one that was lost is /lost+found-INODE."""
        if self._table.is_directory(slot_of(inode)) or of == ROOT or self.is_taken(inode):
            return
        if inode != ROOT:
            self.find_directory(ROOT, of=inode)
        name = b"" if inode == ROOT else lost_name(inode)
        now_ns = time.time_ns()
        needle = Needle(Kind.DIRECTORY, inode, ROOT, name, mtime_ns=now_ns, ctime_ns=now_ns)
        self._apply(needle, self._unwritten(name))
        self.lost_directories.append(inode)

    def is_taken(self, directory: int) -> bool:
        """Return whether something lies in the slot of *directory* that is none and must not be lost by making one."""
        record = self._table.record(slot_of(directory))
        return directory != ROOT and record.live and record.kind != Kind.DIRECTORY

    def without_directory(self, needle: Needle) -> list[Needle]:
        """Return what there is to do of *needle*, which names an entry of what is no directory: all but that."""
        self.rejected = True
        self._unplaced.add(needle.inode)
        if needle.kind != Kind.RENAME:
            return [replace(needle, parent=0, name=b"")]
        told = [Needle(Kind.DELETE, needle.inode, ctime_ns=needle.ctime_ns, flags=FLAG_BARE)]
        replaced = needle.extra_u64(Tag.REPLACED)
        if replaced:
            told.append(replace(needle, kind=Kind.DELETE, inode=replaced, name=b""))
        return told

    def make_way(self, told: list[Needle]) -> list[Needle]:
        """Return *told* so that what it puts can be put: what is in its slot, and cannot be the same, ends before."""
        first = told[0]
        if first.kind not in PUT_KINDS:
            return told
        old = self._table.record(slot_of(first.inode))
        if old.live and (old.kind == Kind.DIRECTORY) != (first.kind == Kind.DIRECTORY):
            ended = inode_of(slot_of(first.inode), old.generation)
            told = [Needle(Kind.DELETE, ended, ctime_ns=first.ctime_ns), *told]
        aim = self._table.record(slot_of(first.extra_u64(Tag.TARGET)))
        if first.kind == Kind.LINK and aim.live and aim.kind in (Kind.DIRECTORY, Kind.LINK):
            self.gone[first.inode] = Mended(first.inode, "a further name of what has only one", first.name, gone=True)
            told = told[:-1]
        return told

    def _unwritten(self, name: bytes) -> Place:
        """Return the place of a needle that says *name* and that a writer has yet to write."""
        entry = max(self._table.memory.words[Word.VOLUMES] - 1, 0)
        return Place(entry, 0, 0 if self._writable or not name else self._volumes.get(entry).names.add(name))

    # -- after that ------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Make a tree again of what damaged needles left."""
        memory = self._table.memory
        self.find_directory(ROOT, of=0)
        for slot in unlisted_slots(memory):
            self.link_again(slot)
        self._settle_links()
        self._find_directories(stray_slots(memory))
        self._place_linked()
        for slot in ring_slots(memory):
            self._rescue(slot, "it lay in itself")
        self._part_twins()

    def _settle_links(self) -> None:
        """Count all links anew, and drop those whose target is lost: its number may be given to another."""
        counts, lost = count_links(self._table.memory)
        for slot in lost:
            inode = inode_of(slot, self._table.record(slot).generation)
            self.gone[inode] = Mended(inode, "a further name of what is gone", self._name(slot), gone=True)
            self.link_again(slot)
            self._apply(Needle(Kind.DELETE, inode, ctime_ns=time.time_ns()), Place(0, 0, 0))
        for slot, links in counts.items():
            with self._table.memory.change():
                self._table.set_links(slot, links)

    def _find_directories(self, orphans: list[int]) -> None:
        """Give the records in the slots *orphans*, whose directory was lost, a directory again."""
        table = self._table
        for slot in orphans:
            record = table.record(slot)
            parent = table.record(record.parent - 1)
            if not record.parent or (parent.live and parent.kind != Kind.DIRECTORY):
                # Its last link is lost; or its directory was removed after it had left, and the slot was used again.
                self._rescue(slot, "its directory is none" if record.parent else "it had no name left")
                continue
            generation = parent.generation + 1 & 0xFF if parent.flags else 0
            self.find_directory(inode_of(record.parent - 1, generation), of=inode_of(slot, record.generation))
            with table.memory.change():
                table.adopt(slot)

    def _place_linked(self) -> None:
        """Give what still has links a name of its own, too, where its last could not be given: the next start would."""
        for inode in sorted(self._unplaced):
            record = self._table.record(slot_of(inode))
            if record.live and record.generation == inode >> 32 and not record.parent:
                self._rescue(slot_of(inode), "its directory is none")

    def _name(self, slot: int) -> bytes:
        """Return the name of what is in *slot*, nothing if it has none or that cannot be read."""
        record = self._table.record(slot)
        try:
            return self._volumes.get(record.name_volume).names.get(record.name_offset)
        except Damaged:
            return b""

    def _rescue(self, slot: int, why: str) -> None:
        """Give what is in *slot*, and cannot stay where it is, a name under the root."""
        record = self._table.record(slot)
        inode = inode_of(slot, record.generation)
        self.rescued.setdefault(inode, Mended(inode, why, self._name(slot)))
        self.find_directory(ROOT, of=inode)
        name = lost_name(inode)
        needle = Needle(Kind.RENAME, inode, ROOT, name, ctime_ns=time.time_ns())
        self._apply(needle, self._unwritten(name))

    def _part_twins(self) -> None:
        """Let of several entries with one name only the latest keep it.

        The needle that deleted or renamed the others is damaged.
        """
        twins: dict[tuple[int, bytes], list[tuple[int, int, int]]] = {}
        for slot in twin_slots(self._table.memory):
            record = self._table.record(slot)
            name = self._volumes.get(record.name_volume).names.get(record.name_offset)
            entry = (record.name_volume, record.name_offset, slot)
            twins.setdefault((record.parent, name), []).append(entry)
        for entries in twins.values():
            for _, _, slot in sorted(entries)[:-1]:
                self._rescue(slot, "another has its name")

    def claim_xattrs(self) -> None:
        """Give extended attributes to inodes that came after them; none may get those of one that is lost."""
        for inode, (place, size) in self._unclaimed.items():
            record = self._table.record(slot_of(inode))
            if self._table.knows(inode):
                if record.live:
                    ctime_ns = record.ctime_s * 1_000_000_000
                    self._apply(Needle(Kind.XATTR, inode, data_size=size, ctime_ns=ctime_ns), place)
            elif not record.live:
                self.gone[inode] = Mended(inode, "extended attributes of what is gone", gone=True)

    def mended(self) -> list[Mended]:
        """Return all that was mended, one row for each inode."""
        made = [Mended(inode, "the directory is lost, what lay in it is not") for inode in self.lost_directories]
        return [*made, *self.rescued.values(), *self.gone.values()]

    def _apply(self, needle: Needle, place: Place) -> None:
        with self._table.memory.change():
            self._table.apply(needle, place)


def ends(needle: Needle) -> list[int]:
    """Return the inodes that are gone with *needle*."""
    if needle.kind not in (Kind.DELETE, Kind.RENAME):
        return []
    named = needle.inode if needle.kind == Kind.DELETE else needle.extra_u64(Tag.REPLACED)
    ended = [] if needle.flags & FLAG_BARE else [named]
    return [*ended, needle.extra_u64(Tag.TARGET)] if needle.flags & FLAG_LAST else ended


def lost_name(inode: int) -> bytes:
    """Return the name under the root of an entry that lost its own."""
    return b"lost+found-%d" % inode


# -- what is wrong with a table -----------------------------------------------------------------------------


def count_links(memory: Memory) -> tuple[dict[int, int], list[int]]:
    """Return how many links name each inode that has some or had, by slot, and the links whose target is lost."""
    table, slots = live_records(memory)
    kinds = table["flags"][slots] & Flag.KIND
    named, count, lost = targets(table, slots[kinds == Kind.LINK])
    had = slots[(kinds != Kind.DIRECTORY) & (table["flags"][slots] & Flag.LINKED != 0)]
    counts = dict.fromkeys(had.tolist(), 0) | dict(zip(named.tolist(), count.tolist(), strict=True))
    return counts, [int(link) for link in lost]


def unlisted_slots(memory: Memory) -> list[int]:
    """Return the slots of all that lies in a directory which does not count all of it.

    Its slot was another directory's when a needle put them there, and the one that took them away is damaged.
    """
    table, slots = live_records(memory)
    directories = slots[table["flags"][slots] & Flag.KIND == Kind.DIRECTORY]
    slots = slots[(slots > 0) & (table["parent"][slots] > 0)]
    parent = table["parent"][slots].astype(np.int64) - 1
    count = np.bincount(parent, minlength=len(table))
    wrong = directories[count[directories] != table["size"][directories]]
    return [int(slot) for slot in slots[np.isin(parent, wrong)]]


def ring_slots(memory: Memory) -> list[int]:
    """Return one of each ring of directories that lie in one another: the one that has its name longest."""
    table, slots = live_records(memory)
    above = np.zeros(len(table), np.int64)
    directories = slots[table["flags"][slots] & Flag.KIND == Kind.DIRECTORY]
    above[directories] = np.maximum(table["parent"][directories].astype(np.int64) - 1, 0)
    above[above >= len(table)] = 0
    above[:1] = 0
    far = above.copy()
    for _ in range(len(table).bit_length()):
        far = far[far]  # twice as far up
    found = []
    left = set(np.unique(far[directories]).tolist()) - {0}  # only what lies in a ring comes to no end
    while left:
        ring = [left.pop()]
        while above[ring[-1]] != ring[0]:
            ring.append(int(above[ring[-1]]))
        left.difference_update(ring)
        found.append(min(ring, key=lambda slot: (int(table["name_volume"][slot]), int(table["name_offset"][slot]))))
    return found


def stray_slots(memory: Memory) -> list[int]:
    """Return the slots of live records, but for the root, that nothing names and no live directory holds."""
    table, slots = live_records(memory)
    directories = slots[table["flags"][slots] & Flag.KIND == Kind.DIRECTORY]
    stray = ~np.isin(table["parent"][slots].astype(np.int64) - 1, directories)
    slots = slots[stray]
    slots = slots[~linked(table, slots)]
    return [int(slot) for slot in slots if slot]


def twin_slots(memory: Memory) -> list[int]:
    """Return the slots of live records that have directory and hash of the name in common with another."""
    table, slots = live_records(memory)
    slots = slots[slots > 0]
    places = table["parent"][slots].astype(np.int64) << 24 | (table["hash_generation"][slots] & 0xFF_FFFF)
    slots, places = slots[places >= 1 << 24], places[places >= 1 << 24]  # without the nameless
    _, group, count = np.unique(places, return_inverse=True, return_counts=True)
    return [int(slot) for slot in slots[count[group] > 1]]
