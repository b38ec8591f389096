"""What a scan of a volume finds: needles, damage, and where the log ends.

Owns the rule that tells torn from corrupt (docs/crash.md), and what is said of damage. Must not know what needles say.

*Concurrency:* reads; keeps nothing.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imgfs.format import FLAG_PAIR, Needle
from imgfs.saved_format import SAVED_TABLE
from imgfs.volume import Gap, Volume
from imgfs.volumes import VOLUMES


@dataclass(frozen=True)
class Damage:
    """Bytes that are not those that were written, and what is known of them."""

    volume: int
    offset: int
    length: int
    text: str
    inode: int = 0
    suffix: str = ".vol"  # of the file; with volume 0 it is the superblock, or that of the kept table
    readable: bool = False  # what the image holds is whole all the same
    needed: bool = True  # by an image, or nobody knows

    @property
    def place(self) -> str:
        """Where it is, for people."""
        file = f"volume {self.volume}" if self.volume and self.suffix == ".vol" else self.file
        return f"{file}, offset {self.offset}"

    @property
    def file(self) -> str:
        """The file it is in, from the top of the store."""
        if self.suffix == SAVED_TABLE:
            return SAVED_TABLE
        return f"{VOLUMES}/{self.volume:08d}{self.suffix}" if self.volume else "imgfs.json"

    def __str__(self) -> str:
        image = f", inode {self.inode:#x}" if self.inode else ""
        return f"{self.place}, {self.length} bytes{image}: {self.text}"


# More than this no start replays, but for one without an index.
_KEPT_MAX = 1 << 17


class Survey:
    """What a scan of a volume from *start* on finds: good needles, damage, and where the log ends.

    Bytes below the highest durable mark were once on the disk: what is bad there is damage, and stepped over. Above
    it the log ends at the first needle that is not whole; what follows is torn.
    """

    def __init__(self, volume: Volume, start: int, size: int, *, all_durable: bool) -> None:
        self._volume = volume
        self._start = start
        self._size = size
        self.end = max(start, size)
        self.durable = size
        self.next_sequence = 0
        self.torn_bytes = self.torn_needles = 0
        self.damage: list[Damage] = []
        # What the look for the highest mark has found, unless that is too much to keep.
        self._seen: list[tuple[int, Needle] | Gap] | None = None
        if not all_durable:
            items = volume.scan(start, size)
            self._seen = list(itertools.islice(items, _KEPT_MAX))
            self.durable = max(_highest_mark(self._seen), _highest_mark(items))
            if len(self._seen) == _KEPT_MAX:
                self._seen = None

    def needles(self) -> Iterator[tuple[int, Needle]]:
        """Yield (offset, needle) for each good one; the attributes hold when it has ended."""
        items = self._volume.scan(self._start, self._size) if self._seen is None else iter(self._seen)
        self._seen = None
        first: list[tuple[int, Needle]] = []  # of a pair whose second has not come yet
        for item in items:
            end = self._end_at(item)
            if end is not None:
                if first and first[0][0] < self.durable:
                    yield first.pop()  # the second is damaged
                self._ends_at(first[0][0] if first else end, itertools.chain(first, [item], items))
                return
            yield from first
            first = []
            if not isinstance(item, Gap):
                self.next_sequence = max(self.next_sequence, item[1].sequence + 1)
                if item[1].flags & FLAG_PAIR:
                    first.append(item)
                else:
                    yield item
        if first and first[0][0] >= self.durable:
            self._ends_at(first[0][0], first)
        else:
            yield from first

    def _ends_at(self, end: int, torn: Iterable[tuple[int, Needle] | Gap]) -> None:
        """Note that the log ends at *end*, and what is *torn* behind it."""
        # Zeros alone are blocks that were written ahead of the log.
        self.end, self.torn_bytes = end, self._volume.content_end(end, self._size) - end
        for item in torn:
            if not isinstance(item, Gap):
                self.torn_needles += 1
                # A number is not given again, not even that of a torn needle.
                self.next_sequence = max(self.next_sequence, item[1].sequence + 1)

    def _end_at(self, item: tuple[int, Needle] | Gap) -> int | None:
        """Return where the log ends if it does so in *item*; note damage."""
        if not isinstance(item, Gap):
            offset, needle = item
            return None if offset < self.durable or self._volume.whole(needle, offset) else offset
        if item.start >= self.durable:
            return item.start
        if item.end <= self.durable and self._volume.is_hole(item.start, item.end):
            return None  # what was there was deleted
        end = min(item.end, self.durable)
        text = "no image can be recognised here"
        self.damage.append(Damage(self._volume.header.volume_id, item.start, end - item.start, text))
        return end if end < item.end else None


def _highest_mark(items: Iterable[tuple[int, Needle] | Gap]) -> int:
    """Return the highest durable mark of the needles among *items*, 0 without any."""
    return max((item[1].durable for item in items if not isinstance(item, Gap)), default=0)
