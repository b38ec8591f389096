"""Reads every needle of a store, verifies every checksum, and holds what it finds against the table.

Owns what counts as damage of a store at rest; torn and corrupt are told apart as in recovery. Must not repair
anything, nor know how findings are shown.

*Concurrency:* the table must not change meanwhile: the store is open for reading, or nobody else uses it.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.errors import Damaged
from imgfs.format import ALIGNMENT, NEEDLES_START, VOLUME_HEADER_COPIES, Kind, Needle, inode_of, unpack_volume_header
from imgfs.layout import RARE_AT, RECORDS_AT, VOLUME_GONE, Flag, Word
from imgfs.load import RARE_ENTRIES, RECORDS
from imgfs.recover import Damage
from imgfs.table import Table
from imgfs.volume import Gap, Volume
from imgfs.volumes import Volumes

# The kinds of needles that the table points at; of a directory it holds all that its needle says.
_POINTED_AT = (Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK, Kind.XATTR)


class Checked(NamedTuple):
    """How far a check is."""

    needles: int
    volume_bytes: int


class _Bad(NamedTuple):
    """Bytes of a volume that are not those that were written."""

    start: int
    end: int
    text: str
    needle: Needle | None
    hole: bool = False
    """They may be what is left of something deleted whose space was given back; if nothing needs it, it is."""


def check_volumes(table: Table, volumes: Volumes) -> Iterator[Checked | Damage]:
    """Yield what is damaged in *volumes*, each image of *table* that is concerned by itself, and how far it is.

    Damage that no image of the table needs any more is told with inode 0; of a further name, with the link's own.
    """
    needles = done = 0
    rows = table.memory.words[Word.VOLUMES]
    for entry in range(rows):
        if table.volume(entry).flags & VOLUME_GONE:
            continue
        volume, end = volumes.get(entry).volume, table.volume(entry).end
        if entry == table.memory.words[Word.ACTIVE] and table.memory.words[Word.ACTIVE_END]:
            end = table.memory.words[Word.ACTIVE_END]
        last = entry == table.memory.words[Word.ACTIVE] if table.memory.words[Word.ACTIVE_END] else entry == rows - 1
        one = _VolumeCheck(table, entry, volume, end, last=last)
        for checked in one.read():
            yield Checked(needles + checked.needles, done + checked.volume_bytes)
        yield from one.damage()
        needles, done = needles + one.needles, done + end
        yield Checked(needles, done)


class _VolumeCheck:
    """The check of one volume."""

    def __init__(self, table: Table, entry: int, volume: Volume, end: int, *, last: bool) -> None:
        self._table = table
        self._entry = entry
        self._volume = volume
        self._end = end
        self._last = last
        self._durable = NEEDLES_START
        self.needles = 0
        self._bad: list[_Bad] = []
        # Offset / 8 and slot of each whole needle that the table points at: 12 bytes for each.
        self._offsets = array("I")
        self._slots = array("I")

    def read(self) -> Iterator[Checked]:
        """Read the whole volume; yield how far it is after every MiB of an image and after every needle."""
        self._check_header()
        for item in self._volume.scan(NEEDLES_START, self._end):
            if isinstance(item, Gap):
                hole = self._volume.is_hole(item.start, item.end)
                self._bad.append(_Bad(item.start, item.end, "no needle can be recognised here", None, hole))
                continue
            offset, needle = item
            self.needles += 1
            self._durable = max(self._durable, needle.durable)
            try:
                read = needle.data_start
                for piece in self._volume.pieces(needle, offset):
                    read += len(piece)
                    yield Checked(self.needles, offset + read)
            except Damaged:
                end = offset + needle.length
                hole = self._volume.touches_hole(offset, end)
                self._bad.append(_Bad(offset, end, "the data does not match its checksum", needle, hole))
            else:
                if needle.kind in _POINTED_AT:
                    self._offsets.append(offset // ALIGNMENT)
                    self._slots.append(needle.inode & 0xFFFF_FFFF)
            yield Checked(self.needles, offset + needle.length)

    def _check_header(self) -> None:
        """Verify both copies of the header; opening the volume took whichever was whole."""
        data = self._volume.read(0, NEEDLES_START)
        page = VOLUME_HEADER_COPIES[1]
        for start in VOLUME_HEADER_COPIES:
            only = bytes(start) + data[start : start + page] + bytes(NEEDLES_START - start - page)
            try:
                unpack_volume_header(only)
            except Damaged:
                text = "one of the two copies of the volume's header is damaged"
                self._bad.append(_Bad(start, start + page, text, None))

    def damage(self) -> Iterator[Damage]:
        """Yield the damage of the volume: a row for each image that is lost by it, or one where none is."""
        # Above the durable mark of the last volume nothing was promised: what is bad there is torn.
        bad = [item for item in self._bad if item.start < self._durable or not self._last]
        lost = self._lost()
        volume_id = self._volume.header.volume_id
        for item in bad:
            concerned = [(offset, *what) for offset, what in lost.items() if item.start <= offset < item.end]
            for offset, inode, attributes in concerned:
                del lost[offset]
                text = item.text if item.needle else "its header is damaged"
                text = "its extended attributes are damaged" if attributes else text
                end = item.end if item.needle else offset
                yield Damage(volume_id, offset, max(end - offset, ALIGNMENT), text, inode)
            if not concerned and not item.hole:
                text = item.text + ("; no image needs it any more" if item.needle else "")
                yield Damage(volume_id, item.start, item.end - item.start, text)
        for offset, (inode, _) in sorted(lost.items()):
            yield Damage(volume_id, offset, ALIGNMENT, "the index points at another needle; rebuild the index", inode)

    def _lost(self) -> dict[int, tuple[int, bool]]:
        """Return what the table has in this volume where no such whole needle lies.

        By offset: the inode, and whether it is its extended attributes that should be there.
        """
        memory = self._table.memory
        records = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
        flags = records["flags"]
        kinds = flags & Flag.KIND
        alive = flags & (Flag.DEAD | Flag.UNBORN) == 0
        slots = np.flatnonzero(np.isin(kinds, _POINTED_AT) & alive & (records["volume"] == self._entry))
        rare = np.frombuffer(memory.map, RARE_ENTRIES, memory.words[Word.RARE_ENTRIES], RARE_AT)
        rare = rare[(rare["slot"] > 0) & (rare["volume"] == self._entry + 1)]
        held = rare["slot"].astype(np.int64) - 1
        current = alive[held] & (records["hash_generation"][held] >> 24 == rare["generation"])
        found = _keys(np.array(self._offsets, np.uint32), np.array(self._slots, np.uint32))
        lost = {}
        for attributes, slot, offset8 in (
            (False, slots, records["offset8"][slots]),
            (True, held[current], rare["offset8"][current]),
        ):
            missing = ~np.isin(_keys(offset8, slot + 1), found)
            generation = records["hash_generation"][slot[missing]] >> 24
            for row in zip(offset8[missing].tolist(), slot[missing].tolist(), generation.tolist(), strict=True):
                lost[row[0] * ALIGNMENT] = inode_of(*row[1:]), attributes
        return lost


def _keys(offsets: npt.NDArray[np.integer], slots: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Return offset / 8 and slot + 1 in one number each."""
    return offsets.astype(np.uint64) << np.uint64(32) | slots.astype(np.uint64)
