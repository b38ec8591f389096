"""What the bytes of each volume are good for: live, metadata, dead, or freed already.

Owns the rule: an image is live where the table points at it, and the index of a volume says where needles lie. It is
NumPy's work on a volume at a time, and reads no data. Must not know how it is shown, nor decide what is compacted.

*Concurrency:* the table must not change meanwhile: the store is open for reading, or nobody else uses it.
"""

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.disk import Disk
from imgfs.errors import Damaged, disk_error
from imgfs.format import (
    ALIGNMENT,
    INDEX_RECORD,
    INDEX_RECORD_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    NEEDLES_START,
    Kind,
)
from imgfs.index import index_paths, pack_record
from imgfs.layout import RARE_AT, RECORDS_AT, VOLUME_GONE, VOLUME_SEALED, Flag, Word
from imgfs.load import INDEX_RECORDS, RARE_ENTRIES, RECORDS
from imgfs.table import Table
from imgfs.volume import Gap, Volume
from imgfs.volumes import Volumes

_BLOCK_BYTES = 4096  # what is punched is a multiple of this, at multiples of it
# What the table points at; an inode's attributes through rare.py.
_POINTED_AT = [Kind.FILE, Kind.SYMLINK, Kind.SPECIAL, Kind.LINK]
# Of these, the whole blocks can be freed once nobody needs them.
_PUNCHED = [Kind.FILE, Kind.SYMLINK, Kind.XATTR]
_METADATA = [Kind.DIRECTORY, Kind.DELETE, Kind.RENAME, Kind.EXCHANGE, Kind.ATTRIBUTES, Kind.OWNER, Kind.CHECKPOINT]


def _among(kinds: list[Kind]) -> npt.NDArray[np.bool_]:
    """Return for each byte whether it is one of *kinds*."""
    return np.isin(np.arange(256), kinds)


_IS_POINTED_AT, _IS_PUNCHED, _IS_METADATA = _among(_POINTED_AT), _among(_PUNCHED), _among(_METADATA)

Bytes = npt.NDArray[np.int64]


class Class(enum.IntEnum):
    """What bytes of a volume are good for."""

    LIVE = 0  # images, links and attributes that the table points at
    METADATA = 1  # the header, and needles without data: directories, renames, deletes, owners, checkpoints
    DEAD = 2  # what was deleted or replaced; what was torn, or cannot be recognised
    FREE = 3  # holes: given back to the file system


class VolumeSize(NamedTuple):
    """A volume, by its row in the volume table."""

    row: int
    volume_id: int
    size: int


@dataclass(frozen=True)
class VolumeUsage:
    """A volume, cut where its use changes: bytes from `bounds[k]` to `bounds[k + 1]` are of class `classes[k]`."""

    volume_id: int
    sealed: bool
    bounds: Bytes
    classes: npt.NDArray[np.uint8]
    needles: Bytes
    """Where needles begin."""
    punchable_bytes: int
    """Whole blocks of what is dead; some of it may still be kept for those who want it back."""

    @property
    def size(self) -> int:
        return int(self.bounds[-1])

    def bytes_of(self) -> Bytes:
        """Return how many bytes there are of each class."""
        return np.bincount(self.classes, np.diff(self.bounds), len(Class)).astype(np.int64)

    def spread(self, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return how many bytes of each class lie between neighbours of *edges*: (edges - 1) x classes."""
        lengths = np.diff(self.bounds)
        parts = np.empty((len(edges) - 1, len(Class)))
        for each in Class:
            below = np.concatenate([[0], np.cumsum(np.where(self.classes == each, lengths, 0))])
            parts[:, each] = np.diff(np.interp(edges, self.bounds, below))
        return parts


class Usage:
    """Looks at the volumes of an open store, one at a time."""

    def __init__(self, disk: Disk, table: Table, volumes: Volumes, wrong: Collection[str]) -> None:
        """*wrong*: paths of index files that are not what the volumes say."""
        self._disk = disk
        self._table = table
        self._volumes = volumes
        self._wrong = frozenset(wrong)

    def volumes(self) -> list[VolumeSize]:
        """Return all volumes, by id, without zeros that were written ahead.

        Raises:
            DiskFailure: as the disk says.
        """
        found = []
        for row in range(self._table.memory.words[Word.VOLUMES]):
            entry = self._table.volume(row)
            if entry.flags & VOLUME_GONE:
                continue
            volume = self._volumes.get(row).volume
            try:
                size = max(volume.size(), NEEDLES_START)
                if size > entry.end:
                    size = volume.content_end(max(entry.end, NEEDLES_START), size)
            except OSError as error:
                raise disk_error(error, volume.path) from error
            found.append(VolumeSize(row, entry.volume_id, size))
        return sorted(found, key=lambda each: each.volume_id)

    def of(self, listed: VolumeSize) -> VolumeUsage:
        """Return the usage of one of `volumes`.

        Raises:
            DiskFailure: as the disk says.
        """
        row, size = listed.row, listed.size
        entry, volume = self._table.volume(row), self._volumes.get(row).volume
        end = min(entry.end, size)
        try:
            index = self._index(volume, end)
            holes = np.array(list(volume.holes(size)), np.int64).reshape(-1, 2)
        except OSError as error:
            raise disk_error(error, volume.path) from error
        offsets = index["offset8"].astype(np.int64) * ALIGNMENT
        live = self._live(index, row)
        classes = np.full(len(index), Class.DEAD, np.uint8)
        classes[_IS_METADATA[index["kind"]]] = Class.METADATA
        classes[live] = Class.LIVE
        starts = np.concatenate([[0, NEEDLES_START], offsets, [end]])
        classes = np.concatenate([[Class.METADATA, Class.DEAD], classes, [Class.DEAD]])
        punched = _IS_PUNCHED[index["kind"]] & ~live
        bounds, classes = _with_holes(starts, classes, size, holes)
        return VolumeUsage(
            entry.volume_id,
            bool(entry.flags & VOLUME_SEALED),
            bounds,
            classes,
            offsets,
            _punchable(offsets, np.append(offsets[1:], end), punched, holes),
        )

    def _index(self, volume: Volume, end: int) -> npt.NDArray[np.void]:
        """Return the index records of *volume* up to *end*; from the needles where the file does not have them."""
        path = index_paths(volume.path).records
        data = b""
        if path not in self._wrong and self._disk.exists(path):
            data = self._disk.read_file(path)
        index = np.frombuffer(data, INDEX_RECORDS, len(data) // INDEX_RECORD_BYTES)
        offsets = index["offset8"].astype(np.int64) * ALIGNMENT
        good = (offsets < end) & (np.diff(offsets, prepend=NEEDLES_START - 1) > 0)
        count = len(good) if good.all() else int(good.argmin())
        covered = NEEDLES_START
        if count:
            try:
                covered = int(offsets[count - 1]) + volume.header_at(int(offsets[count - 1])).length
            except Damaged:
                covered = int(offsets[count - 1]) + ALIGNMENT
        if covered >= end:
            return index[:count]
        more = []
        for item in volume.scan(covered, end):
            if isinstance(item, Gap):
                # A kind that no needle has: it is dead.
                more.append(INDEX_RECORD.pack(Kind.FREE, 0, 0, 0, item.start // ALIGNMENT, 0, 0, 0, 0, 0))
            else:
                more.append(pack_record(item[1], item[0], 0, 0))
        return np.concatenate([index[:count], np.frombuffer(b"".join(more), INDEX_RECORDS)])

    def _live(self, index: npt.NDArray[np.void], row: int) -> npt.NDArray[np.bool_]:
        """Return which of the records *index* of the volume in *row* the table points at."""
        memory = self._table.memory
        used = memory.words[Word.SLOTS]
        records = np.frombuffer(memory.map, RECORDS, used, RECORDS_AT)
        slot = index["slot"].astype(np.int64) - 1
        inside = (slot >= 0) & (slot < used)
        at = np.where(inside, slot, 0)
        # Column by column: rows of 39 bytes would be copied whole.
        flags = records["flags"][at]
        alive = inside & (flags & Flag.KIND != 0) & (flags & Flag.DEAD == 0)
        alive &= records["hash_generation"][at] >> 24 == index["hash_generation"] >> 24
        here = (records["volume"][at] == row) & (records["offset8"][at] == index["offset8"])
        live: npt.NDArray[np.bool_] = _IS_POINTED_AT[index["kind"]] & alive & here
        attributes = index["kind"] == Kind.XATTR
        if attributes.any():
            rare = np.frombuffer(memory.map, RARE_ENTRIES, memory.words[Word.RARE_ENTRIES], RARE_AT)
            rare = rare[rare["volume"] == row + 1]
            live |= attributes & alive & np.isin(_keys(index), _keys(rare))
        return live


def _keys(rows: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return offset / 8 and slot + 1 in one number each."""
    return rows["offset8"].astype(np.uint64) << np.uint64(32) | rows["slot"].astype(np.uint64)


def _with_holes(
    starts: Bytes, classes: npt.NDArray[np.uint8], size: int, holes: Bytes
) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    """Return bounds and classes of what begins at *starts*, up to *size*, and of *holes* (count x 2) on top."""
    bounds = np.append(starts, size)
    if len(holes):
        bounds = np.sort(np.concatenate([bounds, holes.ravel()]), kind="stable")
    bounds = bounds[np.append(True, np.diff(bounds) > 0)]
    # Of several that begin at one place the last has a length.
    found = classes[np.searchsorted(starts, bounds[:-1], "right") - 1]
    if len(holes):
        hole = np.searchsorted(holes[:, 0], bounds[:-1], "right") - 1
        found[(hole >= 0) & (bounds[:-1] < holes[hole, 1])] = Class.FREE
    return bounds, found.astype(np.uint8)


def _punchable(starts: Bytes, ends: Bytes, dead: npt.NDArray[np.bool_], holes: Bytes) -> int:
    """Return how many bytes of the whole blocks of *dead* needles are no holes yet.

    Neighbours free the blocks they share; the header of the first one stays.
    """
    first = starts[dead & ~np.concatenate([[False], dead[:-1]])] + NEEDLE_HEADER_BYTES_MAX
    last = ends[dead & ~np.concatenate([dead[1:], [False]])] // _BLOCK_BYTES * _BLOCK_BYTES
    first = -(-first // _BLOCK_BYTES) * _BLOCK_BYTES
    first = np.minimum(first, last)
    freed = 0.0
    if len(holes):
        edges = holes.ravel()
        lengths = np.diff(edges)
        lengths[1::2] = 0
        below = np.concatenate([[0], np.cumsum(lengths)])
        freed = float((np.interp(last, edges, below) - np.interp(first, edges, below)).sum())
    return int((last - first).sum() - freed)
