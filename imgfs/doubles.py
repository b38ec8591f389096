"""Finds slots that were used twice: needles that put something where something else still was.

Owns the rule. A slot falls free when a needle ends what is in it, so a put over anything but itself is a contradiction,
and the later one counts. Where a sequence number is missing between the two, the needle that would explain it may be
lost, or compacted away: that is none. Must not know what becomes of what was put first.

*Concurrency:* none; the volumes must not change meanwhile.
"""

from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from imgfs.format import ALIGNMENT, FLAG_BARE, PUT_KINDS, Kind, Needle, Tag, slot_of
from imgfs.mend import ends

# What has something that only its own needle tells; of a directory or a link everything else survives it.
_WORTH = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL]


class Double(NamedTuple):
    """Something whose slot was used again though it was still there: where its needle lies, and that of the other."""

    entry: int
    offset: int
    winner_entry: int
    winner_offset: int


class _What(IntEnum):
    """What an event does to what is in a slot."""

    PUT = 1
    NAMED = 2
    ENDED = 3


class Doubles:
    """Takes the needles of one volume after the other, in their order.

    8 bytes for each, and 32 for each that is about an inode.
    """

    def __init__(self) -> None:
        self._slot = array("I")
        self._generation = array("B")
        self._what = array("B")
        self._kind = array("B")
        self._name = array("Q")
        self._sequence = array("Q")
        self._entry = array("I")
        self._offset8 = array("I")
        # Of all needles. Counting them would not tell which are missing: a compaction puts owners first, and ends its
        # copy with a number that another needle has.
        self._there = array("Q")
        self.rescued: set[int] = set()
        """Sequence numbers of needles that an earlier repair has copied elsewhere."""

    def add(self, entry: int, offset: int, needle: Needle) -> None:
        """Take note of *needle*, which lies at *offset* of the volume with that *entry*."""
        self._there.append(needle.sequence)
        if needle.kind in PUT_KINDS:
            self._note(_What.PUT, needle.inode, needle, entry, offset)
            if Tag.RESCUED in needle.extras:
                self.rescued.add(needle.extra_u64(Tag.RESCUED))
        elif needle.kind == Kind.RENAME:
            replaced = needle.extra_u64(Tag.REPLACED)
            if replaced and needle.flags & FLAG_BARE:
                self._note(_What.NAMED, replaced, None, entry, offset)
            self._note(_What.NAMED, needle.inode, needle, entry, offset)
        elif needle.kind == Kind.DELETE and needle.flags & FLAG_BARE:
            self._note(_What.NAMED, needle.inode, None, entry, offset)
        for inode in ends(needle):
            if inode:
                self._note(_What.ENDED, inode, None, entry, offset)

    def _note(self, what: _What, inode: int, needle: Needle | None, entry: int, offset: int) -> None:
        self._slot.append(inode & 0xFFFF_FFFF)
        self._generation.append(inode >> 32 & 0xFF)
        self._what.append(what)
        self._kind.append(needle.kind if needle is not None and what == _What.PUT else 0)
        named = needle is not None and needle.parent and slot_of(inode) != 0
        seed = needle.parent if needle is not None else 0
        self._name.append(xxhash.xxh3_64_intdigest(needle.name, seed) if needle is not None and named else 0)
        self._sequence.append(needle.sequence if needle is not None else 0)
        self._entry.append(entry)
        self._offset8.append(offset // ALIGNMENT)

    def has(self, needle: Needle) -> bool:
        """Return whether a needle with the sequence number and the inode of *needle*, or a copy of it, was added."""
        same = np.frombuffer(self._sequence, np.uint64) == needle.sequence
        return bool(np.any(same & (np.frombuffer(self._slot, np.uint32) == needle.inode & 0xFFFF_FFFF)))

    def find(self) -> Iterator[Double]:
        """Yield what lost its slot to another, the last to lose it first, but for what was rescued before."""
        slot, what = np.frombuffer(self._slot, np.uint32), np.frombuffer(self._what, np.uint8)
        order = np.argsort(slot, kind="stable")
        slot, what = slot[order], what[order]
        if len(order) < 2:
            return
        generation, name = np.frombuffer(self._generation, np.uint8)[order], np.frombuffer(self._name, np.uint64)[order]
        kind = np.frombuffer(self._kind, np.uint8)[order]
        # For each event the one before it, and the last put and the last end before it, of whatever slot.
        before = np.maximum(np.arange(len(order)) - 1, 0)
        last, end = (_last_before(what == each) for each in (_What.PUT, _What.ENDED))
        chosen = (what == _What.PUT) & (last > end) & (slot[last] == slot) & np.isin(kind[last], _WORTH)
        changed = (kind != kind[last]) & (kind != Kind.FILE)
        another = (generation != generation[last]) | (name != name[before])
        sequence = np.frombuffer(self._sequence, np.uint64)[order].astype(np.int64)
        number = np.searchsorted(np.unique(np.frombuffer(self._there, np.uint64)), sequence.astype(np.uint64))
        proven = (sequence > sequence[last]) & (sequence - sequence[last] == number - number[last])
        entry, offset8 = np.frombuffer(self._entry, np.uint32)[order], np.frombuffer(self._offset8, np.uint32)[order]
        for row in np.flatnonzero(chosen & (changed | another & proven)):
            loser = int(last[row])
            if int(sequence[loser]) not in self.rescued:
                yield Double(*_place(entry, offset8, loser), *_place(entry, offset8, int(row)))


def _last_before(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return for each row the last one before it that is *chosen*, -1 if there is none."""
    last = np.maximum.accumulate(np.where(chosen, np.arange(len(chosen)), -1))
    return np.concatenate([[-1], last[:-1]])


def _place(entry: npt.NDArray[np.uint32], offset8: npt.NDArray[np.uint32], row: int) -> tuple[int, int]:
    return int(entry[row]), int(offset8[row]) * ALIGNMENT
