"""What owner numbers stand for: user, group and mode, which many images have in common.

Owns that part of the table. Must not know where needles say it.

*Concurrency:* changes within `Memory.change`. A number is given another meaning when nothing has it any more; what a
process remembers of numbers is compared with the table before it counts.
"""

import numpy as np

from imgfs.errors import StoreLimit
from imgfs.layout import (
    AT_OWNER,
    OWNER,
    OWNERS_AT,
    OWNERS_MAX,
    RECORD_BYTES,
    RECORDS_AT,
    STAGED,
    STAGED_AT,
    STAGED_BYTES,
    Flag,
    Word,
)
from imgfs.memory import Memory

# What no image has: the highest user and group, which stand for "unchanged" in chown.
NOBODY_ELSE = (0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF)


class Owners:
    """The owner numbers of a table."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._map = memory.map
        self._numbers: dict[tuple[int, int, int], int] = {}

    def owner(self, index: int) -> tuple[int, int, int]:
        """Return (uid, gid, permission bits) of owner *index*."""
        uid, gid, mode, _ = OWNER.unpack_from(self._map, OWNERS_AT + OWNER.size * index)
        return uid, gid, mode

    def owner_volume(self, index: int) -> int:
        """Return the entry of the last volume that holds a needle for owner *index*, -1 for none."""
        volume: int = OWNER.unpack_from(self._map, OWNERS_AT + OWNER.size * index)[3]
        return volume - 1

    def owner_index(self, uid: int, gid: int, mode: int) -> int:
        """Return the index for these three; a free one if they are new, to be defined by an owner needle.

        Within the lock.

        Raises:
            StoreLimit: all 65,536 combinations are in use.
        """
        key = (uid, gid, mode)
        count = self.memory.words[Word.OWNERS]
        for index in range(len(self._numbers), count):
            self._numbers.setdefault(self.owner(index), index)
        index = self._numbers.get(key, count)
        if index < count and self.owner(index) == key:
            return index
        if index >= OWNERS_MAX or index < count:
            # Some were given another meaning.
            self._numbers = {self.owner(index): index for index in reversed(range(count))}
            index = self._numbers.get(key, count)
        return index if index < OWNERS_MAX else self._unused()

    def _unused(self) -> int:
        """Return a number that nothing has any more, without a meaning."""
        words = self.memory.words
        used = np.zeros(max(1 << 16, words[Word.OWNERS]), bool)
        shape, strides = (words[Word.SLOTS],), (RECORD_BYTES,)
        owners = np.ndarray(shape, "<u2", self._map, RECORDS_AT + AT_OWNER, strides)
        flags = np.ndarray(shape, "u1", self._map, RECORDS_AT, strides)
        used[owners[flags & Flag.KIND != 0]] = True
        for number in range(words[Word.STAGED]):
            inode, _, owner, *_ = STAGED.unpack_from(self._map, STAGED_AT + STAGED_BYTES * number)
            used[owner] |= inode != 0
        free = np.flatnonzero(~used[:OWNERS_MAX])
        if not len(free):
            raise StoreLimit(f"more than {OWNERS_MAX} combinations of user, group and mode in one store")
        index = int(free[0])
        with self.memory.change():
            self.define_owner(index, *NOBODY_ELSE, -1)
        return index

    def define_owner(self, index: int, uid: int, gid: int, mode: int, volume: int) -> None:
        """Say what owner *index* means, as of the volume with that entry; -1: no needle says it yet."""
        self.memory.put(OWNERS_AT + OWNER.size * index, OWNER.pack(uid, gid, mode, volume + 1))
        if index >= self.memory.words[Word.OWNERS]:
            self.memory.put_word(Word.OWNERS, index + 1)
