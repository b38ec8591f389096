"""Punches out of volumes the blocks of what was deleted or replaced, so that their space comes back at once.

Owns which blocks those are. Headers of live needles survive, and that of the first of several dead neighbours, which
give back the blocks they share; a scan steps over what lies behind it (`Volume.is_hole`). Must not know when it is
time.

*Concurrency:* takes no lock. What is dead stays dead: a needle that nothing points at is never pointed at again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgfs.disk import Disk
from imgfs.errors import disk_error
from imgfs.format import ALIGNMENT, INDEX_RECORD_BYTES, NEEDLE_HEADER_BYTES_MAX
from imgfs.index import read_records
from imgfs.layout import VOLUME_SEALED, Word
from imgfs.load import INDEX_RECORDS, lengths
from imgfs.table import Table
from imgfs.volume import HOLE_BYTES, Volume
from imgfs.volumes import Volumes

Run = tuple[int, int]
"""Where bytes that can be freed begin and end."""


class Punched(NamedTuple):
    """What was given back."""

    holes: int
    bytes: int
    is_all: bool = True
    """Not if the disk is too full for the checkpoint that must come before."""


class Holes:
    """Frees the blocks of dead needles of an open store."""

    def __init__(self, disk: Disk, table: Table, volumes: Volumes, checkpoint: Callable[[], None]) -> None:
        """*checkpoint* makes all durable that was appended so far, and vouches for its index."""
        self._disk = disk
        self._table = table
        self._volumes = volumes
        self._checkpoint = checkpoint
        # What was punched already, by volume: it needs no second time.
        self._done: dict[int, frozenset[Run]] = {}

    def records(self, row: int) -> bytes:
        """Return the index records of the volume in *row*, of the active one those that are there now. Damaged."""
        words = self._table.memory.words
        count = -1
        with self._table.memory.lock():
            if row == words[Word.ACTIVE] and not self._table.volume(row).flags & VOLUME_SEALED:
                count = words[Word.INDEX_RECORDS]
        return read_records(self._disk, self._volumes.get(row).volume.path, count) if count else b""

    def lengths(self, row: int, records: bytes) -> npt.NDArray[np.int64]:
        """Return how many bytes each of the needles takes that the index *records* of *row* are about."""
        entry = self._table.volume(row)
        end = entry.end if entry.flags & VOLUME_SEALED else self._table.memory.words[Word.ACTIVE_END]
        return lengths(np.frombuffer(records, INDEX_RECORDS), end)

    def punch(self, row: int, records: bytes, dead: npt.NDArray[np.bool_]) -> Punched:
        """Free the blocks of the needles in *dead*, of those that the index *records* of the volume in *row* are about.

        Every worker must have answered what it had in hand when the last of them died.

        Raises:
            DiskFailure: as the disk says.
        """
        volume = self._volumes.get(row).volume
        done = self._done.get(volume.header.volume_id, frozenset())
        runs = self._runs(records, dead)
        fresh = [run for run in runs if run not in done]
        if not fresh:
            return Punched(0, 0)
        # What killed them must not be taken back by power loss, nor a hole be taken for the torn end of the log.
        self._checkpoint()
        words = self._table.memory.words
        if row == words[Word.ACTIVE] and words[Word.CHECKPOINT_RECORDS] * INDEX_RECORD_BYTES < len(records):
            return Punched(0, 0, is_all=False)
        freed = self._punch(volume.path, fresh)
        self._done[volume.header.volume_id] = frozenset(runs)
        return freed

    def _punch(self, path: str, runs: Sequence[Run]) -> Punched:
        holes = freed = 0
        try:
            volume = Volume.open(self._disk, path, writable=True)
            try:
                for start, end in runs:
                    size = volume.punch(start, end)
                    if size < 0:
                        break
                    holes, freed = holes + 1, freed + size
            finally:
                volume.close()
        except OSError as error:
            raise disk_error(error, path) from error
        return Punched(holes, freed)

    def _runs(self, records: bytes, dead: npt.NDArray[np.bool_]) -> list[Run]:
        """Return where the bytes lie that can be freed: at least one whole block each."""
        offsets = np.frombuffer(records, INDEX_RECORDS)["offset8"].astype(np.int64) * ALIGNMENT
        if len(dead):
            dead = dead.copy()
            dead[-1] = False  # where the last one ends is known of a sealed volume only, and there it is the seal
        starts = dead & ~np.concatenate([[False], dead[:-1]])
        behind = np.flatnonzero(~dead & np.concatenate([[False], dead[:-1]]))
        # The header of the first one stays.
        first, last = offsets[starts] + NEEDLE_HEADER_BYTES_MAX, offsets[behind]
        whole = last // HOLE_BYTES > -(-first // HOLE_BYTES)
        return list(zip(first[whole].tolist(), last[whole].tolist(), strict=True))
