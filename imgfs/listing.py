"""Many entries of a directory at a time, as arrays: what one by one takes 15 us for each takes 1 us.

Owns the stretches of `.names` that listings read, for as long as these go on. Must not know FUSE. What is not simply
in the table, being written or a hard link, it leaves to those who look at entries one by one (view.py), and says so.

*Concurrency:* reads the table once, and counts for nothing if that changed meanwhile. Threads that wait for
the disk to read names do so one after the other.
"""

import contextlib
import mmap
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.buckets import BUCKETS_MAX, HASH_BITS, REVERSED_BYTE, bucket_count
from imgfs.errors import ImgfsError, Stale
from imgfs.format import NAMES_BYTES_LIMIT, Kind
from imgfs.index import NAME_BYTES_READ, Names
from imgfs.layout import (
    LINKS_AT,
    OWNER,
    OWNERS_AT,
    OWNERS_MAX,
    RECORD_BYTES,
    RECORDS_AT,
    SUBDIRECTORIES_MANY,
    Flag,
    Word,
)
from imgfs.load import RECORDS
from imgfs.table import Table
from imgfs.volumes import Volumes

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

# Below so many children it takes longer to begin with arrays than to look at each.
CHILDREN_MIN = 12
# Longer chains are those of a table that changes meanwhile, or somebody chose names that collide.
_CHAIN_MAX = 1 << 10
_TRIES = 3
# What is read of names at once, and kept while listings go on: so much in all, of a volume so much for each child of
# the directory. To read a name alone takes as long as to read this many bytes.
_STRETCHES_BYTES_MAX = 32 << 20
_STRETCH_BYTES_EACH = 4 << 10
# A stretch longer than this begins and ends where the next answer's may be expected to.
_STRETCH_STEP = 256 << 10
_SECOND_NS = 1_000_000_000
_DIRECTORY, _SPECIAL, _LINK = int(Kind.DIRECTORY), int(Kind.SPECIAL), int(Kind.LINK)
# As layout.OWNER.
_OWNERS = np.dtype([("uid", "<u4"), ("gid", "<u4"), ("mode", "<u2"), ("", "V2"), ("volume", "<u4")])
assert _OWNERS.itemsize == OWNER.size
_REVERSED_BYTE = np.frombuffer(REVERSED_BYTE, np.uint8).astype(np.int64)


class Page(NamedTuple):
    """Entries in the order of their keys, and what `View.attr` tells of each: arrays of one length."""

    keys: Numbers
    inodes: Numbers
    kinds: npt.NDArray[np.signedinteger]
    modes: Numbers
    uids: Numbers
    gids: Numbers
    links: Numbers
    sizes: Numbers
    mtimes_ns: Numbers
    ctimes_ns: Numbers
    devices: Numbers
    name_lengths: Numbers
    names: Bytes
    """One behind the other."""


# Of entries: keys, slots, records.
_Entries = tuple[Numbers, Numbers, Records]


class _Written(NamedTuple):
    """How far what stands in `.names` counts: all of it, but in the row of the *active* volume up to *names_end*.

    Behind that is what is just being appended; if that fails, other names come there.
    """

    active: int
    names_end: int  # 0: nobody writes
    volumes_gone: int  # when that was so

    def end_in(self, row: int) -> int:
        return self.names_end if row == self.active and self.names_end else NAMES_BYTES_LIMIT


class _Stretch(NamedTuple):
    """Bytes of `.names` from offset *start* on."""

    start: int
    content: Bytes

    @property
    def end(self) -> int:
        return self.start + len(self.content)

    def holds(self, first: int, last: int) -> bool:
        """Return whether the names from offset *first* to offset *last* are in it, whole."""
        return self.start <= first <= last < self.end and last + int(self.content[last - self.start]) < self.end


class Listing:
    """The directories of a table."""

    def __init__(self, table: Table, volumes: Volumes) -> None:
        self._table = table
        self._memory = table.memory
        self._map = table.memory.map
        self._volumes = volumes
        self._stretches: dict[Names, _Stretch] = {}
        self._used: set[Names] = set()
        self._reading = threading.Lock()

    def forget(self) -> bool:
        """Free the names that nobody listed since this was called last; return whether these were the last."""
        if not self._stretches:
            return False
        used, self._used = self._used, set()
        self._stretches = {names: kept for names, kept in list(self._stretches.items()) if names in used}
        return not self._stretches

    def page(self, directory: int, after: int, count: int, *, nowait: bool = False) -> Page | None:
        """Return some *count* of the entries of slot *directory*, which is one, whose keys are above *after*.

        None if they have to be looked at one by one; an empty page behind the last of them.

        Raises:
            WouldBlock: *nowait* is set and names are not in memory.
        """
        children = self._table.buckets.children(directory)
        if children < CHILDREN_MIN:
            return None
        found = next(filter(None, (self._unchanged(directory, after, count) for _ in range(_TRIES))), None)
        if found is None:
            return None
        (keys, slots, records), owners, written = found
        flags = records["flags"]
        kinds = flags & Flag.KIND
        is_directory, is_special = kinds == _DIRECTORY, kinds == _SPECIAL
        odd = flags & (Flag.STAGED | Flag.UNBORN | Flag.DEAD) != 0
        odd |= (flags & Flag.LINKED != 0) & ~is_directory
        odd |= (kinds == _LINK) | (kinds == 0) | (records["name_offset"] == 0)
        if odd.any():
            return None
        try:
            names = self._names(records, children, written, nowait=nowait)
        except (ImgfsError, OSError) as error:
            if isinstance(error, Stale) or self._memory.words[Word.VOLUMES_GONE] != written.volumes_gone:
                return None  # compacted meanwhile
            raise
        if names is None or self._memory.words[Word.VOLUMES_GONE] != written.volumes_gone:
            return None  # a row may have been another volume's when its names were read
        sizes, subdirectories = records["size"].astype(np.int64), records["volume"].astype(np.int64)
        return Page(
            keys,
            slots + 1 | records["hash_generation"].astype(np.int64) >> HASH_BITS << 32,
            kinds,
            owners["mode"].astype(np.int64),
            owners["uid"].astype(np.int64),
            owners["gid"].astype(np.int64),
            np.where(is_directory & (subdirectories != SUBDIRECTORIES_MANY), 2 + subdirectories, 1),
            np.where(is_directory | is_special, 0, sizes),
            records["mtime"].astype(np.int64),
            records["ctime"].astype(np.int64) * _SECOND_NS,
            np.where(is_special, sizes, 0),
            *names,
        )

    def _unchanged(self, directory: int, after: int, count: int) -> tuple[_Entries, Records, _Written] | None:
        """Return entries, their owners, and how far names count; None if the table changed meanwhile."""
        words = self._memory.words
        before = words[Word.COUNTER]
        if before & 1:
            return None
        try:
            found = self._entries(directory, after, count)
            owners = np.frombuffer(self._map, _OWNERS, OWNERS_MAX, OWNERS_AT)[found[2]["owner"]] if found else None
        except (IndexError, ValueError, ZeroDivisionError):
            return None  # references, or a number of children, that only a table has that changes
        written = _Written(words[Word.ACTIVE], words[Word.NAMES_END], words[Word.VOLUMES_GONE])
        if found is None or owners is None or words[Word.COUNTER] != before:
            return None
        return found, owners, written

    def _entries(self, directory: int, after: int, count: int) -> _Entries | None:
        """Return *count* children past *after*, or a few more or less; None as `page`.

        Raises:
            IndexError, ValueError, ZeroDivisionError: the table changes meanwhile.
        """
        children = self._table.buckets.children(directory)
        buckets = bucket_count(children)
        bits = buckets.bit_length() - 1
        first, groups = after >> 32 >> (HASH_BITS - bits), 1 << bits
        slots_used = self._memory.words[Word.SLOTS]
        links = np.frombuffer(self._map, "<u4", slots_used, LINKS_AT)
        table = np.frombuffer(self._map, f"V{RECORD_BYTES}", slots_used, RECORDS_AT)
        heads = np.frombuffer(self._map, "<u4", buckets, self._table.buckets.head(directory, buckets, 0))
        while first < groups:
            # As Buckets.after goes, for many buckets at a time.
            last = min(first + count * groups // children + 1, groups)
            low = _reversed(np.arange(first, last) << HASH_BITS - bits)
            high = low + groups
            slots = _chained(heads[np.concatenate((low, high[high < buckets]))], links)
            if slots is None:
                return None
            records = table[slots].view(RECORDS)
            keys = _reversed(records["hash_generation"].astype(np.int64) & BUCKETS_MAX - 1) << 32 | slots + 1
            order = np.argsort(keys)
            order = order[np.searchsorted(keys, after, "right", sorter=order) :]
            if len(order):
                return keys[order], slots[order], records[order]
            first = last
        nothing = np.empty(0, np.int64)
        return nothing, nothing, np.empty(0, RECORDS)

    # -- names ------------------------------------------------------------------------------------------------

    def _names(
        self, records: Records, children: int, written: _Written, *, nowait: bool
    ) -> tuple[Numbers, Bytes] | None:
        """Return (lengths, bytes) of the names of *records*, of *children* in all; None if one is none.

        Raises:
            Damaged, WouldBlock: as `Names.get`.
        """
        if not len(records):
            return np.empty(0, np.int64), np.empty(0, np.uint8)
        order = np.argsort(records["name_volume"], kind="stable")
        rows = records["name_volume"][order].astype(np.int64)
        offsets = records["name_offset"][order].astype(np.int64)
        # One volume after the other: where its names begin and end among all, and which offsets they lie between.
        begins = np.flatnonzero(np.diff(rows, prepend=-1))
        ends = np.append(begins[1:], len(rows))
        lowest, highest = np.minimum.reduceat(offsets, begins), np.maximum.reduceat(offsets, begins)
        # `offsets` become those of what was read of the volume, where the bytes of a name begin.
        lengths, contents = np.empty(len(rows), np.int64), []
        for begin, end, first, last in zip(begins, ends, map(int, lowest), map(int, highest), strict=True):
            row = int(rows[begin])
            names, mine = self._volumes.get(row).names, slice(begin, end)
            stretch = self._stretch(names, first, last, children, written.end_in(row), nowait=nowait)
            if stretch is None:
                found = [names.get(int(offset), nowait=nowait) for offset in offsets[mine]]
                lengths[mine] = list(map(len, found))
                offsets[mine] = np.cumsum(lengths[mine]) - lengths[mine]
                contents.append(np.frombuffer(b"".join(found), np.uint8))
            else:
                offsets[mine] -= stretch.start
                if last - stretch.start >= len(stretch.content):
                    return None  # the file is cut: who looks at each says so
                lengths[mine] = stretch.content[offsets[mine]]
                offsets[mine] += 1
                contents.append(stretch.content)
        sizes = np.repeat([len(content) for content in contents], ends - begins)
        if (offsets + lengths > sizes).any() or not lengths.all():
            return None  # who looks at each says what is wrong with it
        places, starts = ranges(offsets, lengths), np.cumsum(lengths) - lengths
        cuts = np.append(starts[begins], len(places))
        joined = np.concatenate([content[places[cuts[n] : cuts[n + 1]]] for n, content in enumerate(contents)])
        if ((joined == 0) | (joined == ord("/"))).any() or ((lengths <= 2) & (joined[starts] == ord("."))).any():
            return None
        # Back into the order of the listing.
        back = np.argsort(order)
        return lengths[back], joined[ranges(starts[back], lengths[back])]

    def _stretch(
        self, names: Names, first: int, last: int, children: int, names_end: int, *, nowait: bool
    ) -> _Stretch | None:
        """Return a stretch with the names from offset *first* to *last*; None if they are better read one by one.

        Behind *names_end* other names may stand later.
        """
        kept = self._kept(names, first, last)
        if kept is None:
            # Those that all wait for the disk to read the same read it once, not each for itself.
            with contextlib.nullcontext() if nowait else self._reading:
                kept = self._kept(names, first, last) or self._read(
                    names, first, last, children, names_end, nowait=nowait
                )
        if kept is not None:
            self._used.add(names)
        return kept

    def _kept(self, names: Names, first: int, last: int) -> _Stretch | None:
        kept = self._stretches.get(names)
        return kept if kept is not None and kept.holds(first, last) else None

    def _read(
        self, names: Names, first: int, last: int, children: int, names_end: int, *, nowait: bool
    ) -> _Stretch | None:
        """As `_stretch`, where none is kept."""
        end = last + NAME_BYTES_READ
        if end - first > _STRETCH_STEP:
            first, end = first // _STRETCH_STEP * _STRETCH_STEP, -(-end // _STRETCH_STEP) * _STRETCH_STEP
        end = min(end, names_end)
        others = sum(len(other.content) for of, other in list(self._stretches.items()) if of is not names)
        if end - first > min(children * _STRETCH_BYTES_EACH, _STRETCHES_BYTES_MAX - others):
            return None
        read = _Stretch(first, _in_own_pages(names.stretch(first, end - first, nowait=nowait)))
        self._stretches[names] = read
        return read


def _in_own_pages(data: bytes) -> Bytes:
    """Return a copy of *data* that leaves no gap in the heap, which nobody else fills, when it is freed."""
    pages = mmap.mmap(-1, max(len(data), 1))
    pages[: len(data)] = data
    return np.frombuffer(pages, np.uint8, len(data))


def ranges(starts: Numbers, lengths: Numbers) -> Numbers:
    """Return the numbers from each of *starts* on, as many as *lengths* says, one range behind the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _reversed(hashes: Numbers) -> Numbers:
    """Return the 24 bits of each in reverse, as `buckets.reversed_hash`."""
    low, middle, high = (_REVERSED_BYTE[hashes >> shift & 0xFF] for shift in (0, 8, 16))
    reverse: Numbers = low << 16 | middle << 8 | high
    return reverse


def _chained(references: npt.NDArray[np.uint32], links: npt.NDArray[np.uint32]) -> Numbers | None:
    """Return the slots of the chains that begin with *references*; None if one is too long."""
    found = [np.empty(0, np.int64)]
    for _ in range(_CHAIN_MAX):
        slots = references[references != 0].astype(np.int64) - 1
        if not len(slots):
            return np.concatenate(found)
        found.append(slots)
        references = links[slots]
    return None
