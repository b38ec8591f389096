"""What few inodes have, beside the records: how many links name them, and where their extended attributes lie.

Owns the entries and the chains that find them by slot. Must not know what an attribute is, nor where links lie.

*Concurrency:* changes within `Memory.change`, reads within `Memory.consistent`.
"""

import struct
from typing import NamedTuple

from imgfs.errors import StoreLimit
from imgfs.layout import RARE, RARE_AT, RARE_HEADS, RARE_HEADS_AT, RARE_MAX, Word
from imgfs.memory import Memory

_U32 = struct.Struct("<I")


class Entry(NamedTuple):
    """What one inode has of it."""

    links: int = 0
    """Names it has besides its own."""
    volume: int = -1
    """Entry of the volume that holds the needle with its extended attributes, -1 for none."""
    offset8: int = 0
    size: int = 0


NOTHING = Entry()


class Rare:
    """The entries, found by slot and generation."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._map = memory.map

    def get(self, slot: int, generation: int) -> Entry:
        """Return what that inode has, `NOTHING` for most."""
        if not self._memory.words[Word.RARE_COUNT]:
            return NOTHING
        at = self._find(slot)[1]
        if not at:
            return NOTHING
        _, _, known, links, volume, offset8, size = RARE.unpack_from(self._map, at)
        return Entry(links, volume - 1, offset8, size) if known == generation else NOTHING

    def put(self, slot: int, generation: int, entry: Entry) -> None:
        """Make *entry* what that inode has; what an earlier generation of the slot had is gone.

        Raises:
            StoreLimit: more inodes have something than the memory is laid out for.
        """
        link, at = self._find(slot)
        if entry == NOTHING:
            if at:
                self._remove(link, at)
            return
        if at:
            (following,) = _U32.unpack_from(self._map, at)
        else:
            at = self._take()
            (following,) = _U32.unpack_from(self._map, link)
        data = RARE.pack(following, slot + 1, generation, entry.links, entry.volume + 1, entry.offset8, entry.size)
        self._memory.put(at, data)
        self._memory.put_u32(link, (at - RARE_AT) // RARE.size + 1)

    def clear(self, slot: int) -> None:
        """Forget what the last inode in *slot* had."""
        if self._memory.words[Word.RARE_COUNT]:
            self.put(slot, 0, NOTHING)

    def _find(self, slot: int) -> tuple[int, int]:
        """Return where the reference to the entry of *slot* stands, and the entry; 0 if there is none, and the head."""
        head = link = RARE_HEADS_AT + 4 * (slot % RARE_HEADS)
        (reference,) = _U32.unpack_from(self._map, link)
        for _ in range(RARE_MAX):
            if not reference:
                break
            at = RARE_AT + RARE.size * (reference - 1)
            following, owner = struct.unpack_from("<II", self._map, at)
            if owner == slot + 1:
                return link, at
            link, reference = at, following
        return head, 0

    def _take(self) -> int:
        """Return where a free entry lies, which is taken."""
        words = self._memory.words
        free = words[Word.RARE_FREE]
        if free:
            at = RARE_AT + RARE.size * (free - 1)
            self._memory.put_word(Word.RARE_FREE, _U32.unpack_from(self._map, at)[0])
        else:
            used = words[Word.RARE_ENTRIES]
            if used >= RARE_MAX:
                raise StoreLimit(f"at most {RARE_MAX} images can have links or extended attributes")
            at = RARE_AT + RARE.size * used
            self._memory.put_word(Word.RARE_ENTRIES, used + 1)
        self._memory.put_word(Word.RARE_COUNT, words[Word.RARE_COUNT] + 1)
        return at

    def _remove(self, link: int, at: int) -> None:
        words = self._memory.words
        (following,) = _U32.unpack_from(self._map, at)
        self._memory.put_u32(link, following)
        self._memory.put(at, RARE.pack(words[Word.RARE_FREE], 0, 0, 0, 0, 0, 0))
        self._memory.put_word(Word.RARE_FREE, (at - RARE_AT) // RARE.size + 1)
        self._memory.put_word(Word.RARE_COUNT, words[Word.RARE_COUNT] - 1)
