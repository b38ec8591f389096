"""Many entries of a directory at a time, as arrays: what one by one takes 15 us for each takes 1 us.

Owns the stretches of `.names` that listings read, for as long as these go on. Must not know FUSE. What is not simply
in the table, being written or a hard link, it leaves to those who look at entries one by one (view.py), and says so.

*Concurrency:* reads the table once, and counts for nothing if that changed meanwhile. Threads that wait for
the disk to read names do so one after the other.
"""

import contextlib
import mmap
import threading
from collections.abc import Iterable
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
# Of more entries names are not read one by one.
_SINGLY_MAX = 1024
# A stretch longer than this begins and ends where the next answer's may be expected to.
_STRETCH_STEP = 256 << 10
# Behind what was read of names: the longest line fits in whichever byte it begins at.
_ROOM = 256
LINE_STEP = 8
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
    """A line for each, all of one length that LINE_STEP divides: the name, then zeros."""
    counter: int
    """Word.COUNTER when all of this was so."""
    ends: bool
    """Nothing comes behind."""


class _Entries(NamedTuple):
    """Entries in the order of their keys."""

    keys: Numbers
    slots: Numbers
    records: Records
    ends: bool


class _Written(NamedTuple):
    """How far what stands in `.names` counts: all of it, but in the row of the *active* volume up to *names_end*.

    Behind that is what is just being appended; if that fails, other names come there.
    """

    active: int
    names_end: int  # 0: nobody writes
    volumes_gone: int  # when that was so
    counter: int

    def end_in(self, row: int) -> int:
        return self.names_end if row == self.active and self.names_end else NAMES_BYTES_LIMIT


class _Stretch(NamedTuple):
    """Bytes of `.names` from offset *start* on."""

    start: int
    content: Bytes
    """And _ROOM zeros."""

    @property
    def end(self) -> int:
        return self.start + len(self.content) - _ROOM

    def holds(self, first: int, last: int) -> bool:
        """Return whether the names from offset *first* to offset *last* are in it, whole."""
        return self.start <= first <= last < self.end and last + int(self.content[last - self.start]) < self.end


class _Found(NamedTuple):
    """Where the names *of* these records are."""

    of: Numbers
    content: Bytes
    """With _ROOM bytes behind the last name."""
    places: Numbers
    """Where the bytes of each begin in it."""


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
        (keys, slots, records, ends), owners, written = found
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
            written.counter,
            ends,
        )

    def _unchanged(self, directory: int, after: int, count: int) -> tuple[_Entries, Records, _Written] | None:
        """Return entries, their owners, and how far names count; None if the table changed meanwhile."""
        words = self._memory.words
        before = words[Word.COUNTER]
        if before & 1:
            return None
        try:
            found = self._entries(directory, after, count)
            owners = np.frombuffer(self._map, _OWNERS, OWNERS_MAX, OWNERS_AT)[found.records["owner"]] if found else None
        except (IndexError, ValueError, ZeroDivisionError):
            return None  # references, or a number of children, that only a table has that changes
        written = _Written(words[Word.ACTIVE], words[Word.NAMES_END], words[Word.VOLUMES_GONE], before)
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
            rows = table[slots]
            keys = _reversed(rows.view(RECORDS)["hash_generation"].astype(np.int64) & BUCKETS_MAX - 1) << 32 | slots + 1
            order = np.argsort(keys)
            order = order[np.searchsorted(keys, after, "right", sorter=order) :]
            if len(order):
                # As bytes: records field by field take seven times as long.
                return _Entries(keys[order], slots[order], rows[order].view(RECORDS), last == groups)
            first = last
        nothing = np.empty(0, np.int64)
        return _Entries(nothing, nothing, np.empty(0, RECORDS), ends=True)

    # -- names ------------------------------------------------------------------------------------------------

    def _names(
        self, records: Records, children: int, written: _Written, *, nowait: bool
    ) -> tuple[Numbers, Bytes] | None:
        """Return (lengths, names as in `Page`) of *records*, of *children* in all; None if one is none.

        Raises:
            Damaged, WouldBlock: as `Names.get`.
        """
        if not len(records):
            return np.empty(0, np.int64), np.empty((0, 0), np.uint8)
        # One volume after the other: which records are its, and which offsets their names lie between.
        order = np.argsort(records["name_volume"], kind="stable")
        rows = records["name_volume"][order]
        offsets = records["name_offset"][order].astype(np.int64)
        begins = np.flatnonzero(np.diff(rows.astype(np.int64), prepend=-1))
        ends = np.append(begins[1:], len(rows))
        lowest, highest = np.minimum.reduceat(offsets, begins), np.maximum.reduceat(offsets, begins)
        lengths, found = np.empty(len(rows), np.int64), []
        for begin, end, first, last in zip(begins, ends, map(int, lowest), map(int, highest), strict=True):
            row, of, places = int(rows[begin]), order[begin:end], offsets[begin:end]
            names = self._volumes.get(row).names
            stretch = self._stretch(names, first, last, children, written.end_in(row), nowait=nowait)
            if stretch is None:
                if len(records) > _SINGLY_MAX:
                    return None  # fewer at a time, or others wait for long
                each = [names.get(place, nowait=nowait) for place in places.tolist()]
                lengths[of] = list(map(len, each))
                found.append(_Found(of, _in_own_pages(b"".join(each)), np.cumsum(lengths[of]) - lengths[of]))
            else:
                if last >= stretch.end:
                    return None  # the file is cut: who looks at each says so
                places -= stretch.start
                lengths[of] = stretch.content[places]
                found.append(_Found(of, stretch.content, places + 1))
        if not lengths.all():
            return None
        lines = _lined_up(lengths, found)
        inside = np.arange(lines.shape[1], dtype=np.uint8) < lengths.astype(np.uint8)[:, None]
        lines *= inside
        wrong = (lines == ord("/")) | (lines == 0) & inside
        if wrong.any() or ((lengths <= 2) & (lines[:, 0] == ord("."))).any():
            return None  # who looks at each says what is wrong with it
        return lengths, lines

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
        if end - first + _ROOM > min(children * _STRETCH_BYTES_EACH, _STRETCHES_BYTES_MAX - others):
            return None
        read = _Stretch(first, _in_own_pages(names.stretch(first, end - first, nowait=nowait)))
        self._stretches[names] = read
        return read


def _in_own_pages(data: bytes) -> Bytes:
    """Return *data* and _ROOM zeros, where freeing them leaves no gap in the heap that nobody else fills."""
    pages = mmap.mmap(-1, len(data) + _ROOM)
    pages[: len(data)] = data
    return np.frombuffer(pages, np.uint8)


def _lined_up(lengths: Numbers, found: Iterable[_Found]) -> Bytes:
    """Return names as `Page` has them, of those *lengths*, but with anything behind the shorter."""
    longest = int(lengths.max())
    width = longest + -longest % LINE_STEP
    lines = np.empty(len(lengths), f"V{width}")
    for of, content, places in found:
        lines[of] = np.ndarray(len(content) - width + 1, lines.dtype, content, strides=(1,))[places]
    return lines.view(np.uint8).reshape(-1, width)


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
