"""Enters all records into their directories at once, with NumPy: what buckets.py does one by one.

Owns how a bulk load makes buckets and chains. Must not know kinds: it is told which records lie in a directory.

*Concurrency:* the table is not shared yet; nothing is journaled.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from imgfs.buckets import BUCKETS_MAX, bucket_count
from imgfs.layout import ARENA_AT, ARENA_UNIT, BUCKET_BYTES, LINKS_AT, Word
from imgfs.memory import Memory

# So many records are linked at a time, which bounds the memory it takes, and how many are in each other's way.
_BATCH = 1 << 16
_ROUNDS_MAX = 64


def link_members(memory: Memory, placed: npt.NDArray[np.bool_], table: npt.NDArray[np.void]) -> None:
    """Enter the records of the slots that are *placed* into the directories they name."""
    words = memory.words
    counted = np.zeros(len(table), np.uint32)
    for _, parent in _members(placed, table):
        low, high = int(parent.min()), int(parent.max())
        if high - low < 4 * _BATCH:
            counted[low : high + 1] += np.bincount(parent - low).astype(np.uint32)
        else:
            where, count = np.unique(parent, return_counts=True)
            counted[where] += count.astype(np.uint32)
    directories = np.flatnonzero(counted)
    if not len(directories):
        return
    counts = counted[directories].astype(np.int64)
    # From here on it says in which row of these each directory is.
    row_of = counted
    row_of[directories] = np.arange(len(directories))
    table["size"][directories] = counts
    buckets = np.where(counts >= bucket_threshold(), np.minimum(counts // 4, BUCKETS_MAX), 1)
    classes = np.maximum(0, np.ceil(np.log2(np.maximum(buckets, 1))).astype(np.int64) - 2)
    units = np.where(buckets > 1, np.left_shift(1, classes), 0)
    starts = words[Word.ARENA_END] + np.cumsum(units) - units
    words[Word.ARENA_END] = int(words[Word.ARENA_END] + units.sum())
    table["offset8"][directories] = np.where(buckets > 1, starts, 0)
    bits = np.frexp(buckets)[1].astype(np.int64)  # bit_length
    wide, narrow = (1 << bits) - 1, (1 << (bits - 1)) - 1
    links = np.frombuffer(memory.map, "<u4", len(table), LINKS_AT)
    heads = int(words[Word.ARENA_END]) * ARENA_UNIT // BUCKET_BYTES
    arena = np.frombuffer(memory.map, "<u4", heads, ARENA_AT)
    single_heads = table["offset8"]
    first_head = starts * (ARENA_UNIT // BUCKET_BYTES)
    for slots, parent in _members(placed, table):
        row = row_of[parent]
        value = (table["hash_generation"][slots] & 0xFF_FFFF).astype(np.int64)
        bucket = value & wide[row]
        bucket = np.where(bucket < buckets[row], bucket, value & narrow[row])
        single = buckets[row] == 1
        _push(links, single_heads, parent[single], slots[single])
        many = ~single
        _push(links, arena, (first_head[row] + bucket)[many], slots[many])


def _push(
    links: npt.NDArray[np.uint32],
    heads: npt.NDArray[np.uint32],
    place: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
) -> None:
    """Put each of *slots* before the chain whose head stands in that *place* of *heads*.

    Of those that want to be before the same chain one gets there, the others come again: few, as chains are short and
    many. That takes a quarter of the time of sorting.
    """
    number = (slots + 1).astype(np.uint32)
    for _ in range(_ROUNDS_MAX):
        if not len(slots):
            return
        links[slots] = heads[place]
        heads[place] = number
        late = np.flatnonzero(heads[place] != number)
        slots, place, number = slots[late], place[late], number[late]
    # Only names with the same hash make a long chain.
    for slot, at in zip(slots.tolist(), place.tolist(), strict=True):
        links[slot] = heads[at]
        heads[at] = slot + 1


def _members(
    placed: npt.NDArray[np.bool_], table: npt.NDArray[np.void]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the slots that are *placed* and those of their directories, so many at a time."""
    for start in range(0, len(placed), _BATCH):
        slots = np.flatnonzero(placed[start : start + _BATCH]) + start
        if len(slots):
            yield slots, table["parent"][slots].astype(np.int64) - 1


def bucket_threshold() -> int:
    """Return from how many children on a directory has more than one bucket."""
    count = 1
    while bucket_count(count) == 1:
        count += 1
    return count
