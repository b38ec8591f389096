"""Loads index records into an empty table, a volume at a time, with NumPy: the last record of an inode wins.

Owns nothing. Gives the same table as applying the needles one by one (a test compares the two), but for the order in
which a bucket holds its records and for directories that changed since the last checkpoint.

*Concurrency:* the table is not shared yet; nothing is journaled.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from imgfs.buckets import BUCKETS_MAX, bucket_count
from imgfs.format import INDEX_RECORD_BYTES, Kind
from imgfs.layout import (
    ARENA_AT,
    ARENA_UNIT,
    BUCKET_BYTES,
    LINKS_AT,
    OWNER,
    OWNERS_AT,
    RECORD_BYTES,
    RECORDS_AT,
    SUBDIRECTORIES_MANY,
    Flag,
    Word,
)
from imgfs.memory import Memory

# What an index record and a record of the table have in common, in the order of both.
_SHARED = [
    ("parent", "<u4"),
    ("name_offset", "<u4"),
    ("offset8", "<u4"),
    ("size", "<u4"),
    ("mtime", "<i8"),
    ("ctime", "<u4"),
    ("owner", "<u2"),
    ("hash_generation", "<u4"),
]
# As format.INDEX_RECORD.
INDEX_RECORDS = np.dtype([("kind", "u1"), ("slot", "<u4"), *_SHARED])
# As layout.RECORD.
RECORDS = np.dtype([("flags", "u1"), ("volume", "<u2"), ("name_volume", "<u2"), *_SHARED])
assert INDEX_RECORDS.itemsize == INDEX_RECORD_BYTES
assert RECORDS.itemsize == RECORD_BYTES
_PUTS = [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL]
# Linking sorts so many records at a time, which bounds the memory it takes.
_BATCH = 1 << 20


class Loader:
    """Takes the records of one volume after the other, then links everything."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._slots = 0
        # For each slot the number of the last record of some kind within the volume in hand.
        self._last = np.zeros(0, np.int32)

    def _records(self, count: int) -> npt.NDArray[np.void]:
        return np.frombuffer(self._memory.map, RECORDS, count, RECORDS_AT)

    def add(self, records: bytes | bytearray, volume: int) -> None:
        """Load the index *records* (count x 39 bytes) of the volume with entry *volume*."""
        index = np.frombuffer(records, INDEX_RECORDS)
        if not len(index):
            return
        self._define_owners(index[index["kind"] == Kind.OWNER], volume)
        self._slots = max(self._slots, int(index["slot"][index["kind"] != Kind.OWNER].max(initial=0)))
        if len(self._last) < self._slots:
            self._last = np.full(self._slots + (self._slots >> 3), -1, np.int32)
        table = self._records(self._slots)
        slot = index["slot"].astype(np.int64) - 1
        kind = index["kind"]
        position = np.arange(len(index), dtype=np.int32)

        put, put_at = self._last_of(np.isin(kind, _PUTS), slot, position)
        fresh = np.zeros(len(put), RECORDS)
        source = index[put]
        fresh["flags"] = source["kind"]
        fresh["volume"] = fresh["name_volume"] = volume
        for name, _ in _SHARED:
            fresh[name] = source[name]
        directory = source["kind"] == Kind.DIRECTORY
        for name in ("volume", "offset8", "size"):
            fresh[name][directory] = 0
        table[put_at] = fresh

        born = self._last  # still holds the last put of each slot
        born[put_at] = put
        rename, rename_at = self._last_among(kind == Kind.RENAME, slot, position)
        keep = rename > born[rename_at]
        rename, rename_at = rename[keep], rename_at[keep]
        attributes, attributes_at = self._last_among(kind == Kind.ATTRIBUTES, slot, position)
        keep = attributes > born[attributes_at]
        attributes, attributes_at = attributes[keep], attributes_at[keep]
        changed, changed_at = self._last_among((kind == Kind.RENAME) | (kind == Kind.ATTRIBUTES), slot, position)
        keep = changed > born[changed_at]
        changed, changed_at = changed[keep], changed_at[keep]

        source = index[rename]
        table["name_volume"][rename_at] = volume
        for name in ("parent", "name_offset"):
            table[name][rename_at] = source[name]
        generation = table["hash_generation"][rename_at] & 0xFF00_0000
        table["hash_generation"][rename_at] = generation | (source["hash_generation"] & 0xFF_FFFF)
        source = index[attributes]
        table["mtime"][attributes_at] = source["mtime"]
        table["owner"][attributes_at] = source["owner"]
        table["ctime"][changed_at] = index["ctime"][changed]

        replaced = (kind == Kind.RENAME) & (index["size"] > 0)
        gone = np.concatenate([position[kind == Kind.DELETE], position[replaced]])
        gone_at = np.concatenate([slot[kind == Kind.DELETE], index["size"][replaced].astype(np.int64) - 1])
        keep = (gone_at < self._slots) & (gone_at > 0)
        gone, gone_at = gone[keep], gone_at[keep]
        dead = gone_at[gone > born[gone_at]]
        table["flags"][dead] |= np.uint8(Flag.DEAD)
        born[put_at] = -1

    def _last_of(
        self, mask: npt.NDArray[np.bool_], slot: npt.NDArray[np.int64], position: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return (position, slot) of the last record of each slot among those in *mask*."""
        numbers, slots = position[mask], slot[mask]
        last = self._last
        last[slots] = numbers  # of equal slots the last is stored
        keep = last[slots] == numbers
        last[slots] = -1
        return numbers[keep], slots[keep]

    def _last_among(
        self, mask: npt.NDArray[np.bool_], slot: npt.NDArray[np.int64], position: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """As `_last_of`, for the few: sorts instead of using the array of all slots, which is in use."""
        numbers, slots = position[mask], slot[mask]
        _, first = np.unique(slots[::-1], return_index=True)
        chosen = len(slots) - 1 - first
        return numbers[chosen], slots[chosen]

    def _define_owners(self, index: npt.NDArray[np.void], volume: int) -> None:
        for record in index:
            owner = int(record["owner"])
            OWNER.pack_into(
                self._memory.map,
                OWNERS_AT + OWNER.size * owner,
                int(record["parent"]),
                int(record["size"]),
                int(record["name_offset"]),
                volume + 1,
            )
            if owner >= self._memory.words[Word.OWNERS]:
                self._memory.words[Word.OWNERS] = owner + 1

    # -- linking ----------------------------------------------------------------------------------------------

    def link(self) -> list[int]:
        """Make the entries of all directories from the records, count everything; return the slots of orphans.

        An orphan is a record whose directory was lost with a damaged needle.
        """
        words = self._memory.words
        words[Word.SLOTS] = self._slots
        table = self._records(self._slots)
        if not self._slots:
            return []
        flags = np.ascontiguousarray(table["flags"])
        alive = (flags & Flag.KIND != 0) & (flags & Flag.DEAD == 0)
        kinds = flags & Flag.KIND
        for word, counted in (
            (Word.FILES, (Kind.FILE, Kind.SPECIAL)),
            (Word.DIRECTORIES, (Kind.DIRECTORY,)),
            (Word.SYMLINKS, (Kind.SYMLINK,)),
        ):
            words[word] = int(np.count_nonzero(alive & np.isin(kinds, counted)))
        parent = table["parent"].astype(np.int64) - 1
        inside = alive & (parent >= 0) & (parent < self._slots)
        inside[0] = False  # the root lies in no directory
        placed = inside.copy()
        placed[inside] = (alive & (kinds == Kind.DIRECTORY))[parent[inside]]
        orphans = np.flatnonzero(alive & ~placed)
        members = np.flatnonzero(placed)
        self._link_members(members, parent[members], table)
        subdirectories = members[kinds[members] == Kind.DIRECTORY]
        where, count = np.unique(parent[subdirectories], return_counts=True)
        table["volume"][where] = np.minimum(count, SUBDIRECTORIES_MANY)
        return [int(slot) for slot in orphans if slot]

    def _link_members(
        self, members: npt.NDArray[np.int64], parent: npt.NDArray[np.int64], table: npt.NDArray[np.void]
    ) -> None:
        words = self._memory.words
        directories, counts = np.unique(parent, return_counts=True)
        table["size"][directories] = counts
        buckets = np.where(counts >= bucket_threshold(), np.minimum(counts // 4, BUCKETS_MAX), 1)
        classes = np.maximum(0, np.ceil(np.log2(np.maximum(buckets, 1))).astype(np.int64) - 2)
        units = np.where(buckets > 1, np.left_shift(1, classes), 0)
        starts = words[Word.ARENA_END] + np.cumsum(units) - units
        words[Word.ARENA_END] = int(words[Word.ARENA_END] + units.sum())
        table["offset8"][directories] = np.where(buckets > 1, starts, 0)
        if not len(directories):
            return
        bits = np.frexp(buckets)[1].astype(np.int64)  # bit_length
        links = np.frombuffer(self._memory.map, "<u4", self._slots, LINKS_AT)
        heads = int(words[Word.ARENA_END]) * ARENA_UNIT // BUCKET_BYTES
        arena = np.frombuffer(self._memory.map, "<u4", heads, ARENA_AT)
        single_heads = table["offset8"]
        for start in range(0, len(members), _BATCH):
            slots = members[start : start + _BATCH]
            row = np.searchsorted(directories, parent[start : start + _BATCH])
            value = (table["hash_generation"][slots] & 0xFF_FFFF).astype(np.int64)
            bucket = value & ((1 << bits[row]) - 1)
            bucket = np.where(bucket < buckets[row], bucket, value & ((1 << (bits[row] - 1)) - 1))
            single = buckets[row] == 1
            # One number for each head: those in the arena, then those that stand in a directory's own record.
            head = np.where(single, len(arena) + directories[row], starts[row] * (ARENA_UNIT // BUCKET_BYTES) + bucket)
            order = np.argsort(head, kind="stable")
            slots, head = slots[order], head[order]
            first = np.ones(len(head), bool)
            first[1:] = head[1:] != head[:-1]
            last = np.roll(first, -1)
            following = np.roll(slots + 1, -1)
            # The chain of this batch ends in what an earlier batch put there.
            in_record = head >= len(arena)
            old = np.zeros(len(head), np.int64)
            ends = np.flatnonzero(last)
            record_ends = ends[in_record[ends]]
            arena_ends = ends[~in_record[ends]]
            old[record_ends] = single_heads[head[record_ends] - len(arena)]
            old[arena_ends] = arena[head[arena_ends]]
            links[slots] = np.where(last, old, following)
            begins = np.flatnonzero(first)
            record_begins = begins[in_record[begins]]
            arena_begins = begins[~in_record[begins]]
            single_heads[head[record_begins] - len(arena)] = slots[record_begins] + 1
            arena[head[arena_begins]] = slots[arena_begins] + 1


def bucket_threshold() -> int:
    """Return from how many children on a directory has more than one bucket."""
    count = 1
    while bucket_count(count) == 1:
        count += 1
    return count


def rebuild_free_queue(memory: Memory) -> None:
    """Queue every slot that no live record has, lowest first."""
    count = memory.words[Word.SLOTS]
    flags = np.frombuffer(memory.map, RECORDS, count, RECORDS_AT)["flags"]
    free = np.flatnonzero((flags & Flag.KIND == 0) | (flags & Flag.DEAD != 0))
    links = np.frombuffer(memory.map, "<u4", count, LINKS_AT)
    if len(free):
        links[free[:-1]] = free[1:] + 1
        links[free[-1]] = 0
    memory.words[Word.FREE_HEAD] = int(free[0]) + 1 if len(free) else 0
    memory.words[Word.FREE_TAIL] = int(free[-1]) + 1 if len(free) else 0
    memory.words[Word.FREE_COUNT] = len(free)


def stale_directories(memory: Memory) -> Iterable[int]:
    """Return the slots of the directories that changed since their last needle."""
    flags = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)["flags"]
    return [int(slot) for slot in np.flatnonzero(flags & Flag.STALE_MTIME)]


def stray_slots(memory: Memory) -> list[int]:
    """Return the slots of live records, but for the root, that name no live directory as theirs."""
    table, slots = _live(memory)
    directories = slots[table["flags"][slots] & Flag.KIND == Kind.DIRECTORY]
    stray = ~np.isin(table["parent"][slots].astype(np.int64) - 1, directories)
    return [int(slot) for slot in slots[stray] if slot]


def twin_slots(memory: Memory) -> list[int]:
    """Return the slots of live records that have directory and hash of the name in common with another."""
    table, slots = _live(memory)
    slots = slots[slots > 0]
    places = table["parent"][slots].astype(np.int64) << 24 | (table["hash_generation"][slots] & 0xFF_FFFF)
    _, group, count = np.unique(places, return_inverse=True, return_counts=True)
    return [int(slot) for slot in slots[count[group] > 1]]


def _live(memory: Memory) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Return the records, and the slots of those that have a name."""
    table = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    return table, np.flatnonzero((table["flags"] & Flag.KIND != 0) & (table["flags"] & Flag.DEAD == 0))


def live_bytes(memory: Memory) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (images, bytes of their data) for each row of the volume table."""
    table = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    rows = memory.words[Word.VOLUMES]
    kinds = table["flags"] & Flag.KIND
    chosen = ((kinds == Kind.FILE) | (kinds == Kind.SYMLINK)) & (table["flags"] & (Flag.DEAD | Flag.UNBORN) == 0)
    volume = table["volume"][chosen]
    images = np.bincount(volume, minlength=rows)
    size = np.bincount(volume, weights=table["size"][chosen].astype(np.float64), minlength=rows)
    return images.astype(np.int64), size.astype(np.int64)
