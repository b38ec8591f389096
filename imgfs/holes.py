"""Punches out of volumes the blocks of what was deleted or replaced, so that their space comes back at once.

Owns which blocks those are. Headers of live needles survive, and that of the first of several dead neighbours, which
give back the blocks they share; a scan steps over what lies behind it (`Volume.is_hole`). Must not know when it is
time.

*Concurrency:* takes no lock. What is dead stays dead: a needle that nothing points at is never pointed at again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from imgfs.disk import Disk
from imgfs.errors import disk_error
from imgfs.format import ALIGNMENT, INDEX_RECORD_BYTES, NEEDLE_HEADER_BYTES_MAX
from imgfs.index import index_paths
from imgfs.layout import VOLUME_SEALED, Word
from imgfs.load import INDEX_RECORDS
from imgfs.needed import Needed
from imgfs.table import Table
from imgfs.volume import HOLE_BYTES, Volume
from imgfs.volumes import Volumes


class Punched(NamedTuple):
    """What was given back."""

    holes: int
    bytes: int


class Holes:
    """Frees the blocks of dead needles of an open store."""

    def __init__(self, disk: Disk, table: Table, volumes: Volumes, checkpoint: Callable[[], None]) -> None:
        """*checkpoint* makes all durable that was appended so far, and vouches for its index."""
        self._disk = disk
        self._table = table
        self._volumes = volumes
        self._checkpoint = checkpoint
        # What the last call for a row has punched: where the runs start, and where they end.
        self._done: dict[int, tuple[int, frozenset[tuple[int, int]]]] = {}

    def punch(self, row: int, until_s: int, held: Sequence[int]) -> Punched:
        """Free what died before *until_s* in the volume in *row*; slots in *held* have handles open.

        Every worker must have answered what it had in hand when that died.

        Raises:
            DiskFailure: as the disk says.
        """
        header, path = self._volumes.get(row).volume.header, self._volumes.get(row).volume.path
        runs = self.runs(row, until_s, held)
        known = self._done.get(row)
        done = known[1] if known is not None and known[0] == header.volume_id else frozenset()
        fresh = [run for run in runs if run not in done]
        if not fresh:
            return Punched(0, 0)
        # What killed them must not be taken back by power loss, nor a hole be taken for the torn end of the log.
        self._checkpoint()
        words = self._table.memory.words
        if row == words[Word.ACTIVE] and words[Word.CHECKPOINT_RECORDS] < words[Word.INDEX_RECORDS]:
            return Punched(0, 0)  # on a full disk there was no room for one
        holes = freed = 0
        try:
            volume = Volume.open(self._disk, path, writable=True)
            try:
                for start, end in fresh:
                    size = volume.punch(start, end)
                    if size < 0:
                        return Punched(0, 0)
                    holes, freed = holes + 1, freed + size
            finally:
                volume.close()
        except OSError as error:
            raise disk_error(error, path) from error
        self._done[row] = header.volume_id, frozenset(runs)
        return Punched(holes, freed)

    def runs(self, row: int, until_s: int, held: Sequence[int]) -> list[tuple[int, int]]:
        """Return where the bytes that can be freed begin and end: at least one whole block each."""
        words = self._table.memory.words
        entry = self._table.volume(row)
        end, count = entry.end, -1
        if not entry.flags & VOLUME_SEALED and row == words[Word.ACTIVE]:
            end, count = words[Word.DURABLE], words[Word.INDEX_RECORDS]
        file = self._disk.open(index_paths(self._volumes.get(row).volume.path).records)
        try:
            size = self._disk.size(file) // INDEX_RECORD_BYTES if count < 0 else count
            records = self._disk.read(file, 0, size * INDEX_RECORD_BYTES)
        finally:
            self._disk.close(file)
        index = np.frombuffer(records, INDEX_RECORDS)
        dead = Needed(self._table, held).dead(records, row, until_s)
        offsets = index["offset8"].astype(np.int64) * ALIGNMENT
        ends = np.append(offsets[1:], end)
        dead &= ends <= end
        starts = dead & ~np.concatenate([[False], dead[:-1]])
        stops = dead & ~np.concatenate([dead[1:], [False]])
        # The header of the first one stays.
        first = offsets[starts] + NEEDLE_HEADER_BYTES_MAX
        last = ends[stops]
        whole = last // HOLE_BYTES > -(-first // HOLE_BYTES)
        return list(zip(first[whole].tolist(), last[whole].tolist(), strict=True))
