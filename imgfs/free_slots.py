"""The slots that are free, in the order in which they became so: what rested longest is given away first.

Owns the queue: its words, and the links between free slots, which are those of the buckets while a slot is in use.
Must not know what was in a slot.

*Concurrency:* changes within `Memory.change`.
"""

import struct

from imgfs.layout import LINK_BYTES, LINKS_AT, WORDS_AT, Word
from imgfs.memory import Memory

_U32 = struct.Struct("<I")
# Head, tail and count.
_QUEUE = struct.Struct("<3Q")
_QUEUE_AT = WORDS_AT + 8 * Word.FREE_HEAD
assert (Word.FREE_TAIL, Word.FREE_COUNT) == (Word.FREE_HEAD + 1, Word.FREE_HEAD + 2)


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
        head = words[Word.FREE_HEAD] if previous else following
        tail = words[Word.FREE_TAIL] if following else previous
        self._memory.put(_QUEUE_AT, _QUEUE.pack(head, tail, words[Word.FREE_COUNT] - 1))

    def push(self, slot: int) -> None:
        """Put *slot* at the end of the queue."""
        words = self._memory.words
        self._memory.put_u32(LINKS_AT + LINK_BYTES * slot, 0)
        tail = words[Word.FREE_TAIL]
        if tail:
            self._memory.put_u32(LINKS_AT + LINK_BYTES * (tail - 1), slot + 1)
        head = words[Word.FREE_HEAD] if tail else slot + 1
        # One entry of the journal for all three.
        self._memory.put(_QUEUE_AT, _QUEUE.pack(head, slot + 1, words[Word.FREE_COUNT] + 1))
