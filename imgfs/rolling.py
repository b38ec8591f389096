"""Making the volume that is written next: a file under a passing name, durable before it gets its own.

Owns the order in which that happens. Must not know what the last volume holds, nor why it is left.

*Concurrency:* under `Memory.lock`. A writer may be killed anywhere: what has no name of its own is not there, and a
volume that has one and is not in the table yet is taken over (`_take_over`).
"""

import os
import time

from imgfs.active import Active
from imgfs.disk import Disk
from imgfs.errors import Damaged, StoreLimit
from imgfs.format import NEEDLES_START, IndexState, PreviousEnd, VolumeHeader
from imgfs.index import empty_state, index_paths, names_header
from imgfs.layout import Word
from imgfs.plausible import FIRST_SEQUENCE_MAX, NUMBER_MAX
from imgfs.records import VolumeEntry
from imgfs.settings import MIB, Settings
from imgfs.superblock import Superblock
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import SUFFIX, volume_id_of, volume_path

# XFS allocates a large volume in extents of this size, so that a scan reads it in long runs.
_EXTENT_BYTES = 16 * MIB


class Rolling(Active):
    """The end of a store that can be moved to a new volume."""

    def __init__(self, disk: Disk, directory: str, superblock: Superblock, settings: Settings, table: Table) -> None:
        """*directory* holds the volumes."""
        super().__init__(disk, directory, table)
        self._superblock = superblock
        self._settings = settings

    def _newest_id(self) -> int:
        """Return the highest number any volume has, or had and left a file of; 0 if there is none."""
        # Names count, not the table: a volume whose header is damaged must not be overwritten.
        return max(map(volume_id_of, self._disk.names(self._directory)), default=0)

    def _new_volume(self, previous: PreviousEnd | None, sequence: int) -> tuple[Volume, str]:
        """Make a volume that has no name of its own yet; return it, and the path it gets."""
        volume_id = self._newest_id() + 1
        if volume_id > NUMBER_MAX or sequence > FIRST_SEQUENCE_MAX:
            # No reader would believe its header.
            raise StoreLimit(f"{self._directory} holds a file with the highest number a volume can have; move it away")
        self._remove_unnamed()
        header = VolumeHeader(
            self._superblock.store_id,
            os.urandom(16),
            volume_id,
            sequence,
            time.time_ns(),
            self._settings.volume_bytes_max,
            previous,
        )
        path = volume_path(self._directory, volume_id)
        extent = _EXTENT_BYTES if self._settings.volume_bytes_max >= 16 * _EXTENT_BYTES else 0
        with self._disk_errors(path):
            volume = Volume.create(self._disk, path + ".new", header, extent)
            self._make_index(path, volume_id)
        return volume, path

    def _remove_unnamed(self) -> None:
        """Remove what is left of volumes that never got a name of their own."""
        names = self._disk.names(self._directory)
        for name in names:
            stem, _, suffix = name.partition(".")
            if suffix in ("vol.new", "idx", "names") and stem + SUFFIX not in names:
                self._disk.unlink(f"{self._directory}/{name}")

    def _make_index(self, path: str, volume_id: int) -> None:
        """Make the index files of a volume that holds nothing yet."""
        paths = index_paths(path)
        for index_path, data in ((paths.records, b""), (paths.names, names_header(volume_id))):
            file = self._disk.open(index_path, writable=True, create=True)
            self._disk.truncate(file, 0)
            self._disk.write(file, 0, [data])
            self._disk.close(file)

    def _enter(self, volume: Volume, path: str) -> None:
        """Make *volume*, which holds nothing yet, the active one, in one step."""
        header = volume.header
        with self._memory.change():
            entry = self._table.add_volume(VolumeEntry(header.volume_id, NEEDLES_START, header.first_sequence, 0))
            self._set_words(entry, empty_state(header.volume_id), NEEDLES_START, header.first_sequence)
        self._release_files()
        self._activate(volume, entry, paths_of=path)

    def _is_known(self, volume_id: int) -> bool:
        rows = range(self._words[Word.VOLUMES])
        return any(self._table.volume(entry).volume_id == volume_id for entry in rows)

    def _take_over(self) -> bool:
        """Enter the volume that a killed writer had made, and not entered yet, if there is one."""
        for name in self._disk.names(self._directory):
            volume_id = volume_id_of(name)
            is_volume = volume_path(self._directory, volume_id) == f"{self._directory}/{name}"
            if is_volume and not self._is_known(volume_id) and self._take(volume_id):
                return True
        return False

    def _take(self, volume_id: int) -> bool:
        """Enter the volume with that id if a writer had made it to go on there."""
        path = volume_path(self._directory, volume_id)
        try:
            volume = Volume.open(self._disk, path, writable=True)
        except Damaged:
            return False  # it was there before this store was opened
        header = volume.header
        ours = header.previous is None and header.first_sequence == self._words[Word.NEXT_SEQUENCE]
        ours = ours and (header.store_id, header.volume_id) == (self._superblock.store_id, volume_id)
        if not ours or header.replaces or volume.size() != NEEDLES_START:
            volume.close()
            return False
        with self._disk_errors(path):
            self._make_index(path, volume_id)
            self._sync_new(volume)
            self._sync_names()
        self._enter(volume, path)
        return True

    def _publish(self, volume: Volume, path: str) -> None:
        """Make *volume* durable under its final name."""
        with self._disk_errors(path):
            self._sync_new(volume)
            self._disk.rename(path + ".new", path)
            self._sync_names()
        volume.path = path

    def _sync_new(self, volume: Volume) -> None:
        """Make *volume* durable; if that fails nothing is lost, for nobody was told of anything in it."""
        with self._memory.one_sync:
            volume.sync()

    def _set_words(self, entry: int, state: IndexState, durable: int, next_sequence: int) -> None:
        """Within `Memory.change`."""
        for word, value in (
            (Word.ACTIVE, entry),
            (Word.ACTIVE_END, state.end),
            (Word.DURABLE, durable),
            (Word.SYNCED, 0),  # the row may have been that of a volume which is gone
            (Word.INDEX_RECORDS, state.records),
            (Word.INDEX_CRC, state.records_crc),
            (Word.NAMES_END, state.names_bytes),
            (Word.NAMES_CRC, state.names_crc),
            (Word.CHECKPOINT_RECORDS, 0),
            (Word.NEXT_SEQUENCE, next_sequence),
        ):
            self._memory.put_word(word, value)
