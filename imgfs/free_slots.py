"""The slots that are free, in the order in which they became so: what rested longest is given away first.

Owns the queue: its words, and the links between free slots, which are those of the buckets while a slot is in use.
Must not know what was in a slot.

*Concurrency:* changes within `Memory.change`.
"""

import struct

from imgfs.layout import LINK_BYTES, LINKS_AT, Word
from imgfs.memory import Memory

_U32 = struct.Struct("<I")


class FreeSlots:
    """The queue."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._map = memory.map

    def _following(self, slot: int) -> int:
        following: int = _U32.unpack_from(self._map, LINKS_AT + LINK_BYTES * slot)[0]
        return following

    def take(self, slot: int) -> None:
        """Take *slot* out of the queue; it is its head, but where a lost directory comes back."""
        words = self._memory.words
        previous, reference = 0, words[Word.FREE_HEAD]
        while reference and reference != slot + 1:
            previous, reference = reference, self._following(reference - 1)
        if not reference:
            return
        following = self._following(slot)
        if previous:
            self._memory.put_u32(LINKS_AT + LINK_BYTES * (previous - 1), following)
        else:
            self._memory.put_word(Word.FREE_HEAD, following)
        if not following:
            self._memory.put_word(Word.FREE_TAIL, previous)
        self._memory.put_word(Word.FREE_COUNT, words[Word.FREE_COUNT] - 1)

    def push(self, slot: int) -> None:
        """Put *slot* at the end of the queue."""
        words = self._memory.words
        self._memory.put_u32(LINKS_AT + LINK_BYTES * slot, 0)
        tail = words[Word.FREE_TAIL]
        if tail:
            self._memory.put_u32(LINKS_AT + LINK_BYTES * (tail - 1), slot + 1)
        else:
            self._memory.put_word(Word.FREE_HEAD, slot + 1)
        self._memory.put_word(Word.FREE_TAIL, slot + 1)
        self._memory.put_word(Word.FREE_COUNT, words[Word.FREE_COUNT] + 1)
