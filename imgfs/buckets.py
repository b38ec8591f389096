"""The entries of a directory, as linear hashing in shared memory: found by name hash, listed by position.

Owns the bucket regions and the links between records. Must not know names, needles or what a record is beyond its
hash and its place in a directory.

A directory of n children has `bucket_count(n)` buckets of about four records each; one child more splits at most one
bucket, one less merges one, so no change takes long, and what was freed is used again. One link per record serves
lookup, listing and removal. A child's position in a listing is its hash, bits reversed, then its slot: splitting
a bucket does not change that order, so a position stays valid whatever is added or removed.
(W. Litwin, "Linear hashing", VLDB 1980; the reversed order: O. Shalev and N. Shavit, "Split-ordered lists", 2006.)

*Concurrency:* changes within `Memory.change`, reads within `Memory.consistent`.
"""

import struct
from collections.abc import Iterator, Sequence

from imgfs.errors import Damaged
from imgfs.layout import (
    ARENA_AT,
    ARENA_UNIT,
    AT_BUCKETS,
    AT_CHILDREN,
    AT_HASH,
    BUCKET_BYTES,
    LINK_BYTES,
    LINKS_AT,
    RECORD_BYTES,
    RECORDS_AT,
    Word,
)
from imgfs.memory import Memory

_U32 = struct.Struct("<I")
HASH_BITS = 24
_HASHES_AT = RECORDS_AT + AT_HASH  # the hash of slot 0
_LOAD = 4  # records per bucket: one byte of bucket memory per record
BUCKETS_MAX = 1 << HASH_BITS
_ONE_BUCKET_MAX = 2 * _LOAD  # below this the directory's own record holds its only bucket
# Only a reader that overtakes a writer can walk further; the sequence counter makes it start again.
_CHAIN_MAX = 1 << 20
REVERSED_BYTE = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def reversed_hash(value: int) -> int:
    """Return the 24 bits of *value* in reverse."""
    table = REVERSED_BYTE
    return table[value & 0xFF] << 16 | table[value >> 8 & 0xFF] << 8 | table[value >> 16]


def bucket_count(children: int) -> int:
    """Return how many buckets a directory of so many children has."""
    return min(children // _LOAD, BUCKETS_MAX) if children >= _ONE_BUCKET_MAX else 1


def bucket_of(value: int, buckets: int) -> int:
    """Return the bucket of hash *value* among so many."""
    bits = buckets.bit_length()
    bucket = value & ((1 << bits) - 1)
    return bucket if bucket < buckets else value & ((1 << (bits - 1)) - 1)


def region_class(buckets: int) -> int:
    """Return the size class of the region that holds so many buckets: 4 << class."""
    return max(0, (buckets - 1).bit_length() - 2)


def record_at(slot: int) -> int:
    """Return where the record of *slot* lies in the mapping."""
    return RECORDS_AT + RECORD_BYTES * slot


class Buckets:
    """Adds, removes, finds and lists the children of directories, all named by slot."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._map = memory.map
        # The units of the regions that the change with this counter has freed.
        self._freed: tuple[int, set[int]] = (0, set())

    def _u32(self, offset: int) -> int:
        value: int = _U32.unpack_from(self._map, offset)[0]
        return value

    def hash_of(self, slot: int) -> int:
        """Return the name hash in the record of *slot*."""
        return self._u32(record_at(slot) + AT_HASH) & 0xFF_FFFF

    def children(self, directory: int) -> int:
        """Return how many children *directory* has."""
        return self._u32(record_at(directory) + AT_CHILDREN)

    def head(self, directory: int, buckets: int, bucket: int) -> int:
        """Return where the head of *bucket* lies in the mapping."""
        at = record_at(directory) + AT_BUCKETS
        if buckets == 1:
            return at
        return ARENA_AT + self._u32(at) * ARENA_UNIT + BUCKET_BYTES * bucket

    def _chain(self, head: int) -> Iterator[int]:
        reference = self._u32(head)
        for _ in range(_CHAIN_MAX):
            if not reference:
                return
            slot = reference - 1
            yield slot
            reference = self._u32(LINKS_AT + LINK_BYTES * slot)
        raise AssertionError("the records of a bucket form a ring")

    # -- reading ----------------------------------------------------------------------------------------------

    def find(self, directory: int, value: int) -> list[int]:
        """Return the slots of the children of *directory* whose name hash is *value*."""
        buckets = bucket_count(self.children(directory))
        u32_of, mapping = _U32.unpack_from, self._map
        (reference,) = u32_of(mapping, self.head(directory, buckets, bucket_of(value, buckets)))
        found: list[int] = []
        # As `_chain` goes, written out: every lookup comes here.
        for _ in range(_CHAIN_MAX):
            if not reference:
                return found
            slot = reference - 1
            if u32_of(mapping, _HASHES_AT + RECORD_BYTES * slot)[0] & 0xFF_FFFF == value:
                found.append(slot)
            (reference,) = u32_of(mapping, LINKS_AT + LINK_BYTES * slot)
        raise AssertionError("the records of a bucket form a ring")

    def first_known(self, directory: int, values: Sequence[int]) -> int:
        """Return the place in *values* of the first that is the name hash of a child of *directory*, else their count.

        As `find` for each, for many.
        """
        children = self.children(directory)
        if not children:
            return len(values)
        buckets = bucket_count(children)
        start = self.head(directory, buckets, 0)
        mask = (1 << buckets.bit_length()) - 1
        u32_of, mapping = _U32.unpack_from, self._map
        for place, value in enumerate(values):
            bucket = value & mask
            (reference,) = u32_of(mapping, start + BUCKET_BYTES * (bucket if bucket < buckets else bucket & mask >> 1))
            while reference:
                if u32_of(mapping, RECORDS_AT + RECORD_BYTES * (reference - 1) + AT_HASH)[0] & 0xFF_FFFF == value:
                    return place
                (reference,) = u32_of(mapping, LINKS_AT + LINK_BYTES * (reference - 1))
        return len(values)

    def after(self, directory: int, position: int) -> list[tuple[int, int]]:
        """Return (position, slot) of the next children past *position*, in order; empty at the end.

        A position is below 2**56; those of real entries are above 0.
        """
        buckets = bucket_count(self.children(directory))
        bits = buckets.bit_length() - 1
        # Of the *bits* low bits of the hash, reversed, counted upwards; the next bit decides between a bucket and
        # the one that was split off it.
        prefix = position >> 32 >> (HASH_BITS - bits)
        while prefix < 1 << bits:
            low = reversed_hash(prefix << (HASH_BITS - bits))
            group = [low] if low + (1 << bits) >= buckets else [low, low + (1 << bits)]
            found = []
            for bucket in group:
                for slot in self._chain(self.head(directory, buckets, bucket)):
                    place = reversed_hash(self.hash_of(slot)) << 32 | slot + 1
                    if place > position:
                        found.append((place, slot))
            if found:
                return sorted(found)
            prefix += 1
        return []

    # -- changing ---------------------------------------------------------------------------------------------

    def add(self, directory: int, slot: int) -> None:
        """Make *slot*, whose record holds its hash, a child of *directory*."""
        count = self.children(directory)
        buckets = bucket_count(count + 1)
        if buckets > bucket_count(count):
            self._split(directory, buckets - 1)
        head = self.head(directory, buckets, bucket_of(self.hash_of(slot), buckets))
        put, u32 = self._memory.put, _U32.pack
        put(LINKS_AT + LINK_BYTES * slot, self._map[head : head + BUCKET_BYTES])
        put(head, u32(slot + 1))
        put(record_at(directory) + AT_CHILDREN, u32(count + 1))

    def extend(self, directory: int, first: int, values: Sequence[int]) -> None:
        """Make the slots from *first* on, which were never used and get the hashes *values*, children of *directory*.

        As `add` for each; all buckets are made before any of them is filled.
        """
        count = self.children(directory)
        children = count + len(values)
        buckets = bucket_count(children)
        for number in range(bucket_count(count), buckets):
            self._split(directory, number)
        start = self.head(directory, buckets, 0)
        mask = (1 << buckets.bit_length()) - 1
        for slot, value in enumerate(values, first):
            bucket = value & mask
            head = start + BUCKET_BYTES * (bucket if bucket < buckets else bucket & mask >> 1)
            # Nothing points to this link yet.
            self._memory.fill(LINKS_AT + LINK_BYTES * slot, self._map[head : head + BUCKET_BYTES])
            self._memory.put_u32(head, slot + 1)
        self._memory.put_u32(record_at(directory) + AT_CHILDREN, children)

    def remove(self, directory: int, slot: int) -> None:
        """Take the child *slot* out of *directory*."""
        count = self.children(directory)
        buckets = bucket_count(count)
        link = self.head(directory, buckets, bucket_of(self.hash_of(slot), buckets))
        u32_of, mapping = _U32.unpack_from, self._map
        # As in `find`.
        for _ in range(_CHAIN_MAX):
            (reference,) = u32_of(mapping, link)
            if reference == slot + 1:
                break
            if not reference:
                raise Damaged(f"the entry in slot {slot} is not in the directory in slot {directory}; run imgfs check")
            link = LINKS_AT + LINK_BYTES * (reference - 1)
        else:
            raise AssertionError("the records of a bucket form a ring")
        following = LINKS_AT + LINK_BYTES * slot
        self._memory.put(link, self._map[following : following + LINK_BYTES])
        if bucket_count(count - 1) < buckets:
            self._merge(directory, buckets - 1)
        self._memory.put_u32(record_at(directory) + AT_CHILDREN, count - 1)

    def _split(self, directory: int, buckets: int) -> None:
        """Go from *buckets* to one more: move to the new one what belongs there."""
        self._resize(directory, buckets, buckets + 1)
        bits = buckets.bit_length()
        link = self.head(directory, buckets + 1, buckets & ((1 << (bits - 1)) - 1))
        new_link = self.head(directory, buckets + 1, buckets)
        moved = {slot: self.hash_of(slot) & ((1 << bits) - 1) == buckets for slot in self._chain(link)}
        for slot, moves in moved.items():
            target = new_link if moves else link
            if self._u32(target) != slot + 1:
                self._memory.put_u32(target, slot + 1)
            if moves:
                new_link = LINKS_AT + LINK_BYTES * slot
            else:
                link = LINKS_AT + LINK_BYTES * slot
        self._memory.put_u32(link, 0)
        self._memory.put_u32(new_link, 0)

    def _merge(self, directory: int, buckets: int) -> None:
        """Go from *buckets* + 1 to *buckets*: put the records of the last one behind those it was split off."""
        last = self.head(directory, buckets + 1, buckets)
        first = self._u32(last)
        if first:
            link = self.head(directory, buckets + 1, buckets & ((1 << (buckets.bit_length() - 1)) - 1))
            for slot in self._chain(link):
                link = LINKS_AT + LINK_BYTES * slot
            self._memory.put_u32(link, first)
        self._resize(directory, buckets + 1, buckets)

    def _resize(self, directory: int, old: int, new: int) -> None:
        """Give *directory* a region for *new* buckets that holds the heads of the *old* ones it keeps."""
        at = record_at(directory) + AT_BUCKETS
        if old == 1:
            head = self._u32(at)
            unit = self._allocate(region_class(new))
            self._memory.put_u32(ARENA_AT + unit * ARENA_UNIT, head)
            self._memory.put_u32(at, unit)
        elif new == 1:
            unit = self._u32(at)
            self._memory.put_u32(at, self._u32(ARENA_AT + unit * ARENA_UNIT))
            self._free(unit, region_class(old))
        elif region_class(new) != region_class(old):
            unit = self._u32(at)
            target = self._allocate(region_class(new))
            kept = BUCKET_BYTES * min(old, new)
            source_at, target_at = ARENA_AT + unit * ARENA_UNIT, ARENA_AT + target * ARENA_UNIT
            # The first word of a freed region is the link to the next: a roll-back needs it.
            self._memory.put_u32(target_at, self._u32(source_at))
            self._memory.fill(target_at + BUCKET_BYTES, self._map[source_at + BUCKET_BYTES : source_at + kept])
            self._memory.put_u32(at, target)
            self._free(unit, region_class(old))

    def _allocate(self, size_class: int) -> int:
        """Return the unit of a region for 4 << *size_class* buckets; what it holds is arbitrary."""
        word = Word.ARENA_FREE + size_class
        reference = self._memory.words[word]
        passed = -1
        # What this change itself has freed is not filled anew: a roll-back needs all of it, not only its first word.
        while reference and reference - 1 in self._freed_now():
            passed = reference - 1
            reference = self._u32(ARENA_AT + passed * ARENA_UNIT)
        if reference:
            following = self._u32(ARENA_AT + (reference - 1) * ARENA_UNIT)
            if passed < 0:
                self._memory.put_word(word, following)
            else:
                self._memory.put_u32(ARENA_AT + passed * ARENA_UNIT, following)
            return reference - 1
        unit = self._memory.words[Word.ARENA_END]
        self._memory.put_word(Word.ARENA_END, unit + (1 << size_class))
        return unit

    def _freed_now(self) -> set[int]:
        counter = self._memory.words[Word.COUNTER]
        if self._freed[0] != counter:
            self._freed = counter, set()
        return self._freed[1]

    def _free(self, unit: int, size_class: int) -> None:
        self._freed_now().add(unit)
        word = Word.ARENA_FREE + size_class
        self._memory.put_u32(ARENA_AT + unit * ARENA_UNIT, self._memory.words[word])
        self._memory.put_word(word, unit + 1)
