"""Which needles of a volume are still needed: what the table points at, and what older needles must not undo.

Owns the rule. Must not know what is done with the rest. Looks at the index of a volume and the table, at no data.

*Concurrency:* reads the table without a lock, in one sweep: what changes meanwhile is looked at again when a needle's
copy is made current. Only volumes that are sealed can be judged: nothing comes to point at them any more.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.format import FLAG_BARE, FLAG_LAST, Kind
from imgfs.layout import RARE_AT, RECORDS_AT, Flag, Word
from imgfs.load import INDEX_RECORDS, PUTS, RARE_ENTRIES, RECORDS
from imgfs.table import Table

# Later than any time.
NEVER_S = 1 << 33

_DATA = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK]


class Judged(NamedTuple):
    """What has become of the needles of a volume."""

    dead: npt.NDArray[np.bool_]
    """Images, symbolic links and attributes that were deleted or replaced, and that no handle is open on."""
    died_s: npt.NDArray[np.uint32]
    """When they were at the latest: the last change of what is in the slot now."""
    opened: frozenset[int]
    """Slots of what would be dead if no handle were open."""


class Needed:
    """Judges the needles of volumes by the *table*; *held* are slots that handles are open on."""

    def __init__(self, table: Table, held: Iterable[int] = (), cutoff_s: int = NEVER_S) -> None:
        """What was changed, replaced or deleted at *cutoff_s* or later is kept, as it was and as it is."""
        self._table = table
        self._cutoff_s = cutoff_s
        self._slots = table.memory.words[Word.SLOTS]
        self._records = np.frombuffer(table.memory.map, RECORDS, self._slots, RECORDS_AT)
        self._held = np.zeros(self._slots, bool)
        self._held[[slot for slot in held if slot < self._slots]] = True
        # Slots that a volume which stays has a put for, older than the one in hand. What is held is copied though it is
        # deleted, so that its needle outlives the volume.
        self._older = self._held.copy()

    def pass_by(self, records: bytes) -> None:
        """Take note of an older volume that stays: what undoes its needles is needed for as long."""
        index = np.frombuffer(records, INDEX_RECORDS)
        slots = index["slot"][np.isin(index["kind"], [*PUTS, Kind.XATTR])].astype(np.int64) - 1
        self._older[slots[(slots >= 0) & (slots < self._slots)]] = True

    def of(
        self,
        records: bytes,
        entry: int,
        sequences: dict[int, int],
        expired: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.bool_]:
        """Return for each of the index *records* of the volume in row *entry* whether its needle is needed.

        *sequences* tells the first sequence number of each row, which is their order. *expired* are dead needles that
        are known to be so for longer than since the cutoff.
        """
        index = np.frombuffer(records, INDEX_RECORDS)
        kind = np.ascontiguousarray(index["kind"])
        slot = index["slot"].astype(np.int64) - 1
        inside = (slot >= 0) & (slot < self._slots)
        record = self._records[np.where(inside, slot, 0)]
        kept = inside & (record["ctime"] >= self._cutoff_s) & (record["flags"] & Flag.KIND != 0)
        if expired is not None:
            kept[: len(expired)] &= ~expired  # the volume may have grown since
        self._older[slot[kept & np.isin(kind, PUTS)]] = True
        known = inside & (record["flags"] & Flag.KIND != 0)
        known &= record["hash_generation"] >> 24 == index["hash_generation"] >> 24
        dead = record["flags"] & Flag.DEAD != 0
        alive = known & (~dead | self._held[np.where(inside, slot, 0)])
        flags = np.where((kind == Kind.DELETE) | (kind == Kind.RENAME), index["owner"], 0)
        target = index["mtime"] - 1

        here = alive & (record["volume"] == entry) & (record["offset8"] == index["offset8"])
        needed = np.isin(kind, _DATA) & here
        directory = (kind == Kind.DIRECTORY) & alive & (record["flags"] & Flag.KIND == Kind.DIRECTORY)
        needed |= directory & last_of_each(directory, slot)
        named = alive & (record["name_volume"] == entry) & (record["name_offset"] == index["name_offset"])
        needed |= (kind == Kind.RENAME) & named
        needed |= self._undoing(kind, slot, flags, index, target)
        # A name that went while the inode stays: its put may still give it.
        bare = flags & FLAG_BARE > 0
        needed |= (kind == Kind.DELETE) & bare & alive & (record["parent"] == 0)
        stripped = index["size"].astype(np.int64) - 1
        needed |= (kind == Kind.RENAME) & bare & self._is_alive(stripped)
        # The end of a link moved the ctime of what it named.
        needed |= ((kind == Kind.DELETE) | (kind == Kind.RENAME)) & self._is_alive(target)

        attributes = (kind == Kind.ATTRIBUTES) & alive
        needed |= attributes & last_of_each(attributes, slot) & ~self._put_later(record, entry, sequences)
        owner = kind == Kind.OWNER
        needed |= last_of_each(owner, index["owner"].astype(np.int64))
        attributes = (kind == Kind.XATTR) & alive
        for row in np.flatnonzero(attributes):
            place = self._table.rare.get(int(slot[row]), int(index["hash_generation"][row]) >> 24)
            needed[row] = place.volume == entry and place.offset8 == index["offset8"][row]
        # What says that there are none any more, and since when.
        none = attributes & (index["size"] == 0) & last_of_each(attributes, slot)
        needed |= none & (self._was_put(slot) | (record["ctime"] == index["ctime"])) | kept
        result: npt.NDArray[np.bool_] = needed
        return result

    def dead(self, records: bytes, entry: int) -> Judged:
        """Return which of the index *records* of the volume in row *entry* are dead."""
        index = np.frombuffer(records, INDEX_RECORDS)
        kind = np.ascontiguousarray(index["kind"])
        slot = index["slot"].astype(np.int64) - 1
        inside = (slot >= 0) & (slot < self._slots)
        at = np.where(inside, slot, 0)
        record = self._records[at]
        same = record["hash_generation"] >> 24 == index["hash_generation"] >> 24
        current = (record["volume"] == entry) & (record["offset8"] == index["offset8"]) & same
        attributes = (kind == Kind.XATTR) & inside
        for row in np.flatnonzero(attributes):
            place = self._table.rare.get(int(slot[row]), int(index["hash_generation"][row]) >> 24)
            current[row] = place.volume == entry and place.offset8 == index["offset8"][row]
        current &= record["flags"] & Flag.DEAD == 0
        gone = np.isin(kind, [Kind.FILE, Kind.SYMLINK, Kind.XATTR]) & inside & ~current
        gone &= record["flags"] & Flag.KIND != 0
        opened = gone & self._held[at] & (same | attributes)
        return Judged(gone & ~opened, record["ctime"].copy(), frozenset(slot[opened].tolist()))

    def _undoing(
        self,
        kind: npt.NDArray[np.uint8],
        slot: npt.NDArray[np.int64],
        flags: npt.NDArray[np.int64],
        index: npt.NDArray[np.void],
        target: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Return which deletes and renames take away what an older volume still puts."""
        gone = (kind == Kind.DELETE) & self._was_put(slot)
        gone |= (kind == Kind.RENAME) & self._was_put(index["size"].astype(np.int64) - 1)
        undoing: npt.NDArray[np.bool_] = gone | (flags & FLAG_LAST > 0) & self._was_put(target)
        return undoing

    def _was_put(self, slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        inside = (slot >= 0) & (slot < self._slots)
        put: npt.NDArray[np.bool_] = inside & self._older[np.where(inside, slot, 0)]
        return put

    def _is_alive(self, slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        inside = (slot >= 0) & (slot < self._slots)
        flags = self._records["flags"][np.where(inside, slot, 0)]
        alive: npt.NDArray[np.bool_] = inside & (flags & Flag.KIND != 0) & (flags & Flag.DEAD == 0)
        return alive

    def _put_later(self, record: npt.NDArray[np.void], entry: int, sequences: dict[int, int]) -> npt.NDArray[np.bool_]:
        """Return which of *record*, no directories, a volume younger than *entry* puts whole."""
        later = np.zeros(1 << 16, bool)
        later[[row for row, sequence in sequences.items() if sequence > sequences[entry]]] = True
        put: npt.NDArray[np.bool_] = (record["flags"] & Flag.KIND != Kind.DIRECTORY) & later[record["volume"]]
        return put


def pointing(table: Table) -> npt.NDArray[np.int64]:
    """Return how much of what can be dead still lives, for each row of the volume table.

    It gets less when anything in a volume that is not appended to dies, and never more.
    """
    memory = table.memory
    rows = memory.words[Word.VOLUMES]
    records = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    kind = records["flags"] & Flag.KIND
    alive = (kind != 0) & (records["flags"] & (Flag.DEAD | Flag.UNBORN) == 0)
    images = np.bincount(records["volume"][alive & ((kind == Kind.FILE) | (kind == Kind.SYMLINK))], minlength=rows)
    rare = np.frombuffer(memory.map, RARE_ENTRIES, memory.words[Word.RARE_ENTRIES], RARE_AT)
    rare = rare[(rare["slot"] > 0) & (rare["slot"] <= len(records)) & (rare["volume"] > 0)]
    slot = rare["slot"].astype(np.int64) - 1
    theirs = alive[slot] & (records["hash_generation"][slot] >> 24 == rare["generation"])
    attributes = np.bincount(rare["volume"][theirs].astype(np.int64) - 1, minlength=rows)
    result: npt.NDArray[np.int64] = images[:rows] + attributes[:rows]
    return result


def last_of_each(chosen: npt.NDArray[np.bool_], slot: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which of the *chosen* rows is the last of its slot."""
    rows = np.flatnonzero(chosen)[::-1]
    result = np.zeros(len(chosen), bool)
    result[rows[np.unique(slot[rows], return_index=True)[1]]] = True
    return result
