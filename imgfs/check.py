"""Says which images are concerned by what is wrong with the bytes of a volume, and checks a whole store so.

Owns what counts as damage of a store at rest; torn and corrupt are told apart as in recovery. The bytes are read in
reading.py. Must not repair anything, nor know how findings are shown.

*Concurrency:* the table must not change meanwhile: the store is open for reading, or nobody else uses it.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.disk import Disk
from imgfs.format import ALIGNMENT, NEEDLES_START, VOLUME_BYTES_LIMIT, Kind, Needle, inode_of, slot_of
from imgfs.index import empty_state, index_paths
from imgfs.index_reading import IndexReading, IndexRow
from imgfs.layout import RARE_AT, RECORDS_AT, VOLUME_GONE, Flag, Word
from imgfs.load import RARE_ENTRIES, RECORDS
from imgfs.reading import POINTED_AT, Bad, VolumeReading
from imgfs.survey import Damage
from imgfs.table import Table
from imgfs.volumes import Volumes

_KINDS = frozenset(map(int, Kind))


class Checked(NamedTuple):
    """How far a check is."""

    needles: int
    volume_bytes: int


def check_volumes(
    table: Table, volumes: Volumes, disk: Disk, unread: Collection[str] = ()
) -> Iterator[Checked | Damage]:
    """Yield what is damaged in *volumes*, each image of *table* that is concerned by itself, and how far it is.

    Damage that no image of the table needs any more is told with inode 0; of a further name, with the link's own.
    The index whose records are at a path in *unread* is known to be wrong.
    """
    needles = done = 0
    rows = table.memory.words[Word.VOLUMES]
    for entry in range(rows):
        if table.volume(entry).flags & VOLUME_GONE:
            continue
        volume, end = volumes.get(entry).volume, table.volume(entry).end
        if entry == table.memory.words[Word.ACTIVE] and table.memory.words[Word.ACTIVE_END]:
            end = table.memory.words[Word.ACTIVE_END]
        paths, header = index_paths(volume.path), volume.header
        index = None
        if paths.records not in unread and disk.exists(paths.records):
            index = IndexReading(disk, paths, header.store_id, header.volume_id, empty_state(header.volume_id))
        last = entry == table.memory.words[Word.ACTIVE] if table.memory.words[Word.ACTIVE_END] else entry == rows - 1
        one = VolumeReading(volume, index, NEEDLES_START, end, last=last)
        try:
            for position in one.read():
                yield Checked(needles + one.needles, done + position)
            yield from judge(table, entry, one, upto=VOLUME_BYTES_LIMIT)
        finally:
            if index is not None:
                index.close()
        needles, done = needles + one.needles, done + end
        yield Checked(needles, done)


def judge(table: Table, entry: int, reading: VolumeReading, *, upto: int) -> Iterator[Damage]:
    """Yield the damage that *reading* has found: a row for each image that is concerned, or one where none is.

    The volume has the row *entry* of *table*, -1 if nothing in it counts any more. What the table has there from
    where the reading began *upto* an offset must have been found.
    """
    lost = _lost(table, entry, reading, upto) if entry >= 0 else {}
    volume_id = reading.volume.header.volume_id
    for item in reading.bad():
        if item.readable:
            inode = _owner(table, entry, item) if entry >= 0 else 0
            text = item.text if inode or item.needle is None else f"{item.text} ({_what(item.needle)})"
            needed = bool(inode) or item.suffix != ".vol" or item.needle is None or item.needle.kind not in POINTED_AT
            yield Damage(volume_id, item.start, item.end - item.start, text, inode, item.suffix, True, needed)
            continue
        concerned = [(offset, *what) for offset, what in lost.items() if item.start <= offset < item.end]
        for offset, inode, attributes in concerned:
            del lost[offset]
            text = item.text if item.needle else "its header is damaged"
            end = item.end if item.needle else offset
            text = "its extended attributes are damaged" if attributes else text
            yield Damage(volume_id, offset, max(end - offset, ALIGNMENT), text, inode)
        known = [row for row in reading.lost_rows if item.start <= row.offset < item.end]
        # What was freed lies below a checkpoint: of that the table knows all.
        for row in known if entry >= 0 and not item.hole else ():
            if row.offset not in {offset for offset, _, _ in concerned} and may_need(table, entry, row):
                text = "its extended attributes are damaged" if row.kind == Kind.XATTR else "its header is damaged"
                yield Damage(volume_id, row.offset, ALIGNMENT, text, row.inode)
                concerned.append((row.offset, row.inode, row.kind == Kind.XATTR))
        if not concerned and not item.hole:
            kinds = [item.needle.kind] if item.needle else [row.kind for row in known]
            # What an image once was; of all else nobody can say so.
            needed = not kinds or any(kind not in POINTED_AT for kind in kinds)
            text = item.text + ("" if needed or entry < 0 else "; no image needs it any more")
            if needed and (item.needle or known):
                text += f" ({', '.join(map(_what, [item.needle] if item.needle else known))})"
            yield Damage(volume_id, item.start, item.end - item.start, text, needed=needed)
    for offset, (inode, _) in sorted(lost.items()):
        yield Damage(volume_id, offset, ALIGNMENT, "the index points at another needle; rebuild the index", inode)


def may_need(table: Table, entry: int, row: IndexRow) -> bool:
    """Return whether an image may need what *row*, of the volume with that *entry*, says of a needle that is not whole.

    Who opens a store takes the index at its word only as far as a checkpoint vouches for it. So of what was put behind
    the last one, and is not whole, *table* knows nothing, while a daemon does.
    """
    volumes = [table.volume(each) for each in range(table.memory.words[Word.VOLUMES])]
    if row.kind not in POINTED_AT or volumes[entry].first_sequence < max(each.first_sequence for each in volumes):
        return False
    slot, generation = slot_of(row.inode), row.inode >> 32
    if slot >= table.memory.words[Word.SLOTS]:
        return True
    record = table.record(slot)
    if not record.kind or record.generation != generation:
        # Of two generations of a slot the later one counts; they go round.
        return not record.kind or (generation - record.generation) % 256 < 128
    if row.kind == Kind.XATTR:
        rare = table.rare.get(slot, generation)
        return record.live and (rare.volume, rare.offset8 * ALIGNMENT) <= (entry, row.offset)
    return record.live and (record.volume, record.offset8 * ALIGNMENT) <= (entry, row.offset)


def _what(needle: Needle | IndexRow) -> str:
    kind = Kind(needle.kind).name if needle.kind in _KINDS else f"a needle of kind {needle.kind}"
    return f"{kind} of inode {needle.inode:#x}" if needle.inode else kind


def _owner(table: Table, entry: int, item: Bad) -> int:
    """Return the inode that needs the needle, or the name, that *item* is about; 0 if none does."""
    needle = item.needle
    slot = slot_of(needle.inode) if needle is not None else -1
    if needle is None or not 0 <= slot < table.memory.words[Word.SLOTS]:
        return 0
    record = table.record(slot)
    if not record.live or record.generation != needle.inode >> 32 or record.flags & Flag.UNBORN:
        return 0
    if item.name_offset:
        needed = (record.name_volume, record.name_offset) == (entry, item.name_offset)
    elif needle.kind == Kind.XATTR:
        rare = table.rare.get(slot, record.generation)
        needed = (rare.volume, rare.offset8 * ALIGNMENT) == (entry, item.at)
    else:
        here = (record.volume, record.offset8 * ALIGNMENT) == (entry, item.at)
        needed = here and needle.kind in POINTED_AT and record.kind == needle.kind
    return needle.inode if needed else 0


def _lost(table: Table, entry: int, reading: VolumeReading, upto: int) -> dict[int, tuple[int, bool]]:
    """Return what *table* has where *reading* was, in the volume with that *entry*, and found no such whole needle.

    By offset: the inode, and whether it is its extended attributes that should be there.
    """
    memory = table.memory
    records = np.frombuffer(memory.map, RECORDS, memory.words[Word.SLOTS], RECORDS_AT)
    flags = records["flags"]
    kinds = flags & Flag.KIND
    alive = flags & (Flag.DEAD | Flag.UNBORN) == 0
    slots = np.flatnonzero(np.isin(kinds, POINTED_AT) & alive & (records["volume"] == entry))
    rare = np.frombuffer(memory.map, RARE_ENTRIES, memory.words[Word.RARE_ENTRIES], RARE_AT)
    rare = rare[(rare["slot"] > 0) & (rare["volume"] == entry + 1)]
    held = rare["slot"].astype(np.int64) - 1
    current = alive[held] & (records["hash_generation"][held] >> 24 == rare["generation"])
    found = _keys(np.array(reading.offsets, np.uint32), np.array(reading.slots, np.uint32))
    lost = {}
    for attributes, slot, offset8 in (
        (False, slots, records["offset8"][slots]),
        (True, held[current], rare["offset8"][current]),
    ):
        inside = (offset8 >= reading.start // ALIGNMENT) & (offset8 < upto // ALIGNMENT)
        missing = inside & ~np.isin(_keys(offset8, slot + 1), found)
        generation = records["hash_generation"][slot[missing]] >> 24
        for row in zip(offset8[missing].tolist(), slot[missing].tolist(), generation.tolist(), strict=True):
            lost[row[0] * ALIGNMENT] = inode_of(*row[1:]), attributes
    return lost


def _keys(offsets: npt.NDArray[np.integer], slots: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Return offset / 8 and slot + 1 in one number each."""
    return offsets.astype(np.uint64) << np.uint64(32) | slots.astype(np.uint64)
