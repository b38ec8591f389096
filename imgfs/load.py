"""Loads index records into an empty table, a volume at a time, with NumPy: the last record of an inode wins.

Owns nothing. Gives the same table as applying the needles one by one (a test compares the two), but for the order in
which a bucket holds its records and for directories that changed since the last checkpoint.

*Concurrency:* the table is not shared yet; nothing is journaled.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from imgfs.format import (
    ALIGNMENT,
    FLAG_BARE,
    FLAG_LAST,
    INDEX_RECORD_BYTES,
    NEEDLES_START,
    IndexState,
    Kind,
    inode_of,
)
from imgfs.layout import (
    LINKS_AT,
    OWNER,
    OWNERS_AT,
    RARE,
    RARE_AT,
    RARE_HEADS,
    RARE_HEADS_AT,
    RECORD_BYTES,
    RECORDS_AT,
    SUBDIRECTORIES_MANY,
    Flag,
    Word,
)
from imgfs.linking import link_members
from imgfs.memory import Memory
from imgfs.plausible import slot_limit

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
# Either, where only its bytes count: NumPy copies fields one by one.
_RAW = np.dtype(f"V{RECORD_BYTES}")
# As layout.RARE.
RARE_ENTRIES = np.dtype(
    [(name, "<u4") for name in ("next", "slot", "generation", "links", "volume", "offset8", "size")]
)
assert RARE_ENTRIES.itemsize == RARE.size
PUTS = [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK]
# What can have further names.
_LINKED = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL]
# What changes inodes that were put before; a link does so to its target.
_EVENTS = [Kind.RENAME, Kind.DELETE, Kind.ATTRIBUTES, Kind.XATTR, Kind.LINK]
# By kind: what is about an inode, what gives it a name, and the two lists above.
_IS_NAMED, _IS_ABOUT, _IS_PUT, _IS_EVENT = np.zeros((4, 256), bool)
_IS_PUT[PUTS] = True
_IS_EVENT[_EVENTS] = True
_IS_NAMED[[*PUTS, Kind.RENAME]] = True
_IS_ABOUT[[*PUTS, Kind.RENAME, Kind.DELETE, Kind.ATTRIBUTES, Kind.XATTR]] = True
# What a needle can say of the root, which has no name.
_OF_THE_ROOT = [Kind.DIRECTORY, Kind.ATTRIBUTES, Kind.XATTR]
# So many records are looked at at a time, where a number of 8 bytes is needed for each.
_BATCH = 1 << 16


class Loader:
    """Takes the records of one volume after the other, then links everything."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._slots = 0
        # For each slot the number of the last record of some kind within the volume in hand.
        self._last = np.zeros(0, np.int32)
        # The last needle with extended attributes, by slot, until the inode ends: generation, entry of the volume,
        # offset / 8, size.
        self._xattrs: dict[int, tuple[int, int, int, int]] = {}
        # Of these, the ones of inodes that are not there, as `link` found them.
        self.unclaimed: dict[int, tuple[int, int, int]] = {}

    @property
    def slots(self) -> int:
        """How many slots anything had so far."""
        return self._slots

    def _records(self, count: int) -> npt.NDArray[np.void]:
        return np.frombuffer(self._memory.map, RECORDS, count, RECORDS_AT)

    def add(self, records: bytes | bytearray | memoryview, volume: int) -> None:
        """Load the index *records* (count x 39 bytes) of the volume with entry *volume*."""
        index = np.frombuffer(records, INDEX_RECORDS)
        if not len(index):
            return
        kind = np.ascontiguousarray(index["kind"])
        slot = index["slot"].copy()
        owners = np.flatnonzero(kind == Kind.OWNER)
        self._define_owners(index[owners], volume)
        slot[owners] = 0
        self._slots = max(self._slots, int(slot.max(initial=0)))
        put = np.flatnonzero(_IS_PUT[kind]).astype(np.int32)
        put_at = slot[put].astype(np.int64) - 1
        if not (put_at[1:] > put_at[:-1]).all():
            put, put_at = self._last_of(put, put_at)
        # Both kinds of records differ only in what stands in place of the slot.
        fresh = np.frombuffer(records, _RAW)[put].view(RECORDS)
        fresh["volume"] = fresh["name_volume"] = volume
        directory = np.flatnonzero(kind[put] == Kind.DIRECTORY)
        for name in ("volume", "offset8", "size"):
            fresh[name][directory] = 0
        self._store(put_at, fresh)
        events = np.flatnonzero(_IS_EVENT[kind])
        if len(events):
            last = self._last_numbers()
            last[put_at] = put
            self._change(index[events], events.astype(np.int32), volume)
            last[put_at] = -1

    def _store(self, slots: npt.NDArray[np.int64], records: npt.NDArray[np.void]) -> None:
        """Make *records* those of *slots*, which rise if they lie side by side."""
        table = self._records(self._slots)
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (slots[1:] > slots[:-1]).all():
            table[slots[0] : slots[-1] + 1].view(_RAW)[:] = records.view(_RAW)
        else:
            table.view(_RAW)[slots] = records.view(_RAW)

    def _last_numbers(self) -> npt.NDArray[np.int32]:
        """Return a number for each slot, -1 but for what the caller sets and takes back; most stores need it rarely."""
        if len(self._last) < self._slots:
            self._last = np.full(self._slots + (self._slots >> 3), -1, np.int32)
        return self._last

    def _change(self, index: npt.NDArray[np.void], position: npt.NDArray[np.int32], volume: int) -> None:
        """Do what the records *index* say that are no puts, each where its inode was not put again behind it."""
        table = self._records(self._slots)
        kind, slot = index["kind"], index["slot"].astype(np.int64) - 1
        rename, delete, link = kind == Kind.RENAME, kind == Kind.DELETE, kind == Kind.LINK
        flags = np.where(rename | delete, index["owner"], 0)
        other = index["size"].astype(np.int64) - 1  # what a rename replaces, or a link names
        target = np.where(rename | delete, index["mtime"] - 1, -1)
        bare = flags & FLAG_BARE > 0

        def latest(*chosen: tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]) -> tuple[npt.NDArray[np.intp], ...]:
            """Return (row, slot) of the last of the rows *chosen* for each slot, if no put comes after it."""
            rows = np.concatenate([np.flatnonzero(mask) for mask, _ in chosen])
            slots = np.concatenate([slots[mask] for mask, slots in chosen])
            valid = (slots >= 0) & (slots < self._slots)
            rows, slots = rows[valid], slots[valid]
            # Where the put of an inode is lost, what follows must not befall the one that had its slot before.
            own = slots == slot[rows]
            valid = ~own | (table["hash_generation"][slots] >> 24 == index["hash_generation"][rows] >> 24)
            valid &= position[rows] > self._last[slots]
            rows, slots = rows[valid], slots[valid]
            order = np.lexsort((rows, slots))
            rows, slots = rows[order], slots[order]
            final = np.ones(len(slots), bool)
            final[:-1] = slots[1:] != slots[:-1]
            return rows[final], slots[final]

        row, at = latest((rename | delete & bare, slot), (rename & bare, other))
        # A record that takes the name away has no name to give; of a rename, `other` loses it.
        named = rename[row] & (slot[row] == at)
        for name in ("parent", "name_offset"):
            table[name][at] = np.where(named, index[name][row], 0)
        table["name_volume"][at] = np.where(named, volume, 0)
        value = np.where(named, index["hash_generation"][row] & 0xFF_FFFF, 0)
        table["hash_generation"][at] = table["hash_generation"][at] & 0xFF00_0000 | value

        row, at = latest((kind == Kind.ATTRIBUTES, slot))
        for name in ("mtime", "owner"):
            table[name][at] = index[name][row]
        # That of something dead says when it went.
        row, at = latest((~link, slot), (rename | link, other), (rename | delete, target))
        table["ctime"][at] = index["ctime"][row]

        last = flags & FLAG_LAST > 0
        ends = (delete & ~bare, slot), (rename & ~bare, other), (last, target)
        _, at = latest(*ends)
        table["flags"][at[at > 0]] |= np.uint8(Flag.DEAD)
        self._keep_xattrs(index, slot, ends, volume)

    def _keep_xattrs(
        self,
        index: npt.NDArray[np.void],
        slot: npt.NDArray[np.int64],
        ends: Iterable[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]],
        volume: int,
    ) -> None:
        """Keep in mind the last XATTR of each *slot* until the inode in it ends: its number comes again one day."""
        rows = np.flatnonzero(index["kind"] == Kind.XATTR)
        held = np.concatenate([np.fromiter(self._xattrs, np.int64, len(self._xattrs)), slot[rows]])
        if not len(held):
            return
        happened = [(int(row), -1) for row in rows]
        for mask, slots in ends:
            rows = np.flatnonzero(mask & np.isin(slots, held))
            happened += [(int(row), int(slots[row])) for row in rows]
        for row, ended in sorted(happened):
            if ended >= 0:
                self._xattrs.pop(ended, None)
                continue
            record = index[row]
            generation = int(record["hash_generation"]) >> 24
            self._xattrs[int(slot[row])] = generation, volume, int(record["offset8"]), int(record["size"])

    def _last_of(
        self, numbers: npt.NDArray[np.int32], slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return (number, slot) of the last of *numbers* for each of the *slots* they belong to."""
        last = self._last_numbers()
        last[slots] = numbers  # of equal slots the last is stored
        keep = last[slots] == numbers
        last[slots] = -1
        return numbers[keep], slots[keep]

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

        An orphan is a record whose directory, or a link whose target, was lost with a damaged needle.
        """
        words = self._memory.words
        words[Word.SLOTS] = self._slots
        table = self._records(self._slots)
        if not self._slots:
            return []
        flags = np.ascontiguousarray(table["flags"])
        links = np.flatnonzero(flags & (Flag.KIND | Flag.DEAD) == Kind.LINK)
        lost = self._load_rare(table, links) if len(links) or self._xattrs else links
        kinds: npt.NDArray[np.uint8] = flags & np.uint8(Flag.KIND)
        kinds[flags & Flag.DEAD != 0] = Kind.FREE  # of what lives
        del flags
        for word, counted in (
            (Word.FILES, (Kind.FILE, Kind.SPECIAL)),
            (Word.DIRECTORIES, (Kind.DIRECTORY,)),
            (Word.SYMLINKS, (Kind.SYMLINK,)),
        ):
            words[word] = sum(int(np.count_nonzero(kinds == kind)) for kind in counted)
        placed = self._placed(table, kinds)
        orphans = np.flatnonzero((kinds != Kind.FREE) & ~placed)
        orphans = orphans[~linked(table, orphans)]
        subdirectories = np.flatnonzero(placed & (kinds == Kind.DIRECTORY))
        del kinds
        link_members(self._memory, placed, table)
        where, count = np.unique(table["parent"][subdirectories].astype(np.int64) - 1, return_counts=True)
        table["volume"][where] = np.minimum(count, SUBDIRECTORIES_MANY)
        return [int(slot) for slot in (*orphans, *lost) if slot]

    def _placed(self, table: npt.NDArray[np.void], kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return for each slot whether what lives in it, by *kinds*, lies in a directory that does."""
        holds = np.zeros(self._slots + 1, bool)  # by slot + 1, as a parent is given
        holds[1:] = kinds == Kind.DIRECTORY
        placed: npt.NDArray[np.bool_] = kinds != Kind.FREE
        for start in range(0, self._slots, _BATCH):
            parent = table["parent"][start : start + _BATCH].astype(np.int64)
            parent[parent > self._slots] = 0
            placed[start : start + _BATCH] &= holds[parent]
        placed[0] = False  # the root lies in no directory
        return placed

    def _load_rare(self, table: npt.NDArray[np.void], links: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the *links* of each inode, take over where attributes lie; return the links whose target is lost."""
        target, count, lost = targets(table, links)
        table["flags"][target] |= np.uint8(Flag.LINKED)
        slot = np.fromiter(self._xattrs, np.int64, len(self._xattrs))
        generation, *columns = np.array(list(self._xattrs.values()), np.int64).reshape(-1, 4).T
        place = np.column_stack(columns)
        record = table[slot]
        valid = (record["flags"] & Flag.KIND != 0) & (record["flags"] & Flag.DEAD == 0)
        valid &= record["hash_generation"] >> 24 == generation
        for row in np.flatnonzero(~valid):
            volume, offset8, size = map(int, place[row])
            self.unclaimed[inode_of(int(slot[row]), int(generation[row]))] = volume, offset8, size
        valid &= place[:, 2] > 0
        place[:, 0] += 1
        slots = np.unique(np.concatenate([target, slot[valid]]))
        entries = np.zeros(len(slots), RARE_ENTRIES)
        entries["slot"] = slots + 1
        entries["generation"] = table["hash_generation"][slots] >> 24
        entries["links"][np.searchsorted(slots, target)] = count
        at = np.searchsorted(slots, slot[valid])
        for column, name in enumerate(("volume", "offset8", "size")):
            entries[name][at] = place[valid][:, column]
        self._chain(entries)
        return lost

    def _chain(self, entries: npt.NDArray[np.void]) -> None:
        """Make *entries* what rare.py finds."""
        head = (entries["slot"].astype(np.int64) - 1) % RARE_HEADS
        order = np.argsort(head, kind="stable")
        entries, head = entries[order], head[order]
        count = len(entries)
        first = np.ones(count, bool)
        first[1:] = head[1:] != head[:-1]
        number = np.arange(1, count + 1)
        entries["next"] = np.where(np.roll(first, -1), 0, number + 1)
        np.frombuffer(self._memory.map, RARE_ENTRIES, count, RARE_AT)[:] = entries
        np.frombuffer(self._memory.map, "<u4", RARE_HEADS, RARE_HEADS_AT)[head[first]] = number[first]
        self._memory.words[Word.RARE_ENTRIES] = self._memory.words[Word.RARE_COUNT] = count


def sound_records(records: bytes | memoryview, state: IndexState, sequence: int) -> bool:
    """Return whether the index *records* of one volume (count x 39 bytes), up to *state*, can be what a writer wrote.

    *sequence* is higher than any number of their needles. As plausible.py for needles: what is loaded indexes memory.
    """
    index = np.frombuffer(records, INDEX_RECORDS)
    if not len(index):
        return True
    kind, slot, parent, name, offset8 = (
        np.ascontiguousarray(index[each]) for each in ("kind", "slot", "parent", "name_offset", "offset8")
    )
    limit = slot_limit(sequence)
    owner, about, entry = kind == Kind.OWNER, _IS_ABOUT[kind], _IS_NAMED[kind]
    root = np.flatnonzero(about & (slot == 1))
    root_puts = root[entry[root]]
    entry[root] = False
    parents, names = parent[entry], name[entry]
    return bool(
        kind.min() > 0
        and offset8[0] >= NEEDLES_START // ALIGNMENT
        and offset8[-1] < state.end // ALIGNMENT
        and (offset8[1:] > offset8[:-1]).all()
        and slot[about].min(initial=1) > 0
        and slot[~owner].max(initial=0) <= limit
        and parents.max(initial=0) <= limit
        and names.max(initial=0) < state.names_bytes
        and ((names > 0) == (parents > 0)).all()
        and name[owner].max(initial=0) <= 0xFFFF
        and np.isin(kind[root], _OF_THE_ROOT).all()
        and (parent[root_puts] == 1).all()
        and not (index["hash_generation"][root] >> 24).any()
        and (index["owner"][kind == Kind.LINK] <= 0xFF).all()
    )


def lengths(index: npt.NDArray[np.void], end: int) -> npt.NDArray[np.int64]:
    """Return how many bytes each of the needles takes that *index* has records of; the last one goes up to *end*."""
    offsets = index["offset8"].astype(np.int64) * ALIGNMENT
    return np.diff(offsets, append=end)


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
    stale = flags & (Flag.STALE_MTIME | Flag.KIND) == Flag.STALE_MTIME | Kind.DIRECTORY
    return [int(slot) for slot in np.flatnonzero(stale)]


def linked(table: npt.NDArray[np.void], slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return for each of *slots* whether what is in it has no name of its own, but a link that names it."""
    bare: npt.NDArray[np.bool_] = table["parent"][slots] == 0
    if bare.any():
        links = np.flatnonzero(table["flags"] & (Flag.KIND | Flag.DEAD) == Kind.LINK)
        bare &= np.isin(slots, table["size"][links].astype(np.int64) - 1)
    return bare


def targets(
    table: npt.NDArray[np.void], links: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the slots of what *links* name, how many name each, and the links whose target is not there."""
    target = table["size"][links].astype(np.int64) - 1
    valid = (target >= 0) & (target < len(table))
    aim = table[np.where(valid, target, 0)]
    valid &= np.isin(aim["flags"] & Flag.KIND, _LINKED) & (aim["flags"] & Flag.DEAD == 0)
    valid &= aim["hash_generation"] >> 24 == table["owner"][links]
    named, count = np.unique(target[valid], return_counts=True)
    return named, count, links[~valid]


def links_of(memory: Memory, slot: int) -> list[int]:
    """Return the slots of the links that name the inode in *slot*."""
    table, slots = live_records(memory)
    chosen = (table["flags"][slots] & Flag.KIND == Kind.LINK) & (table["size"][slots] == slot + 1)
    return [int(link) for link in slots[chosen]]


def live_records(memory: Memory) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Return the records, and the slots of those that have a name."""
    table = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    return table, np.flatnonzero((table["flags"] & Flag.KIND != 0) & (table["flags"] & Flag.DEAD == 0))


def lost_slots(memory: Memory, entry: int, end: int) -> list[int]:
    """Return the slots of images whose data lies behind *end*, where the volume with that *entry* was given up."""
    table, slots = live_records(memory)
    rows = table[slots]
    lost = (rows["volume"] == entry) & (rows["offset8"].astype(np.int64) * ALIGNMENT >= end)
    lost &= np.isin(rows["flags"] & Flag.KIND, [Kind.FILE, Kind.SYMLINK]) & (rows["flags"] & Flag.UNBORN == 0)
    return [int(slot) for slot in slots[lost]]


def references(memory: Memory, rows: Iterable[int], held: Iterable[int]) -> bool:
    """Return whether anything that lives, or is *held* open though it was unlinked, lies in or is named by *rows*."""
    table = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    flags = np.ascontiguousarray(table["flags"])
    old = np.zeros(1 << 16, bool)
    old[list(rows)] = True
    wanted = (flags & Flag.KIND != 0) & (flags & Flag.UNBORN == 0)
    alive = wanted & (flags & Flag.DEAD == 0)
    open_slots = np.array([slot for slot in held if slot < len(table)], np.int64)
    wanted &= alive | np.isin(np.arange(len(table)), open_slots)
    in_data = wanted & (flags & Flag.KIND != Kind.DIRECTORY) & old[table["volume"]]
    if (in_data | alive & (table["name_offset"] > 0) & old[table["name_volume"]]).any():
        return True
    entries = np.frombuffer(memory.map, RARE_ENTRIES, memory.words[Word.RARE_ENTRIES], RARE_AT)
    entries = entries[(entries["slot"] > 0) & (entries["volume"] > 0)]
    entries = entries[old[entries["volume"].astype(np.int64) - 1]]
    slots = entries["slot"].astype(np.int64) - 1
    return bool((wanted[slots] & (table["hash_generation"][slots] >> 24 == entries["generation"])).any())


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
