"""The end of the log: appends needles to the active volume, their records to its index, and both to the table.

Owns the active volume, its index files, sequence numbers, checkpoints, sealing and rolling. Must not know open
images or what a caller wants; a needle comes in, and lies on disk and in the table when `append` returns.

Order of an append (docs/crash.md): needle, name, index record, table. The needle is the commit point.

*Concurrency:* everything under `Memory.lock` but the wait for the disk in `sync`.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Buffer, Disk
from imgfs.errors import DiskFailure, StoreFull, disk_error
from imgfs.format import (
    FLAG_PAIR,
    INDEX_RECORD_BYTES,
    NAMES_BYTES_LIMIT,
    NEEDLES_START,
    OWNED_KINDS,
    PUT_KINDS,
    VOLUME_BYTES_LIMIT,
    Checksums,
    IndexState,
    Kind,
    Needle,
    PreviousEnd,
    VolumeHeader,
    aligned,
    inode_of,
)
from imgfs.index import checkpoint, empty_state, index_paths, names_a_name, names_header, pack_name, pack_record
from imgfs.layout import VOLUME_SEALED, WORDS_AT, Word
from imgfs.load import stale_directories
from imgfs.settings import MIB, Settings
from imgfs.superblock import Superblock
from imgfs.table import Place, Table, VolumeEntry
from imgfs.volume import Volume
from imgfs.volumes import volume_path

# XFS allocates a large volume in extents of this size, so that a scan reads it in long runs.
_EXTENT_BYTES = 16 * MIB
# Kept free below the format's limit, for the needles that settle directories and seal the volume.
_END_BYTES = 64 * MIB
# More than the headers and names of any change that is not large.
_ROLL_BYTES = 4096
# Data up to this size is written in one call with its header and footer.
SMALL_BYTES = 1 * MIB
_NO_DATA = Checksums(0, ())
# Python has no name for it.
_CLOCK_REALTIME_COARSE = 5
# The words from ACTIVE_END to NAMES_CRC, which every append moves on.
_PROGRESS = struct.Struct("<6Q")
assert Word.NAMES_CRC - Word.ACTIVE_END == 5


class Part(NamedTuple):
    """A needle to append, and its data: the buffers in *data*, or what *large* yields."""

    needle: Needle
    data: Sequence[Buffer] = ()
    sums: Checksums | None = _NO_DATA
    large: Iterable[Buffer] | None = None


class Log:
    """The writing end of a store that is open for writing."""

    def __init__(self, disk: Disk, directory: str, superblock: Superblock, settings: Settings, table: Table) -> None:
        """*directory* holds the volumes."""
        self._disk = disk
        self._directory = directory
        self._superblock = superblock
        self._settings = settings
        self._table = table
        self._memory = table.memory
        self._words = table.memory.words
        self._volume: Volume | None = None
        self._records_file = -1
        self._names_file = -1
        self._failed: str | None = None
        self._one_sync = threading.Lock()

    def close(self) -> None:
        """Close the files; nothing is written."""
        self._release_files()

    def _release_files(self) -> None:
        if self._volume is not None:
            self._volume.close()
            self._disk.close(self._records_file)
            self._disk.close(self._names_file)
            self._volume = None

    def lock(self) -> AbstractContextManager[None]:
        """Be the only writer; see `Memory.lock`."""
        return self._memory.lock()

    def now_ns(self) -> int:
        """Return the time of a change, in ns since 1970.

        By the clock of the kernel, which goes in steps: what it sets itself for utimensat(UTIME_NOW) would else lie
        before what was changed just now.
        """
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)

    @property
    def volume(self) -> Volume:
        """The active volume."""
        if self._volume is None:
            raise AssertionError("no volume is active")
        return self._volume

    # -- volumes ----------------------------------------------------------------------------------------------

    def make_durable(self, path: str, mark: int, end: int) -> None:
        """Make the volume at *path* and its name durable up to *end*, as a writer that was killed may not have done.

        Comes before anything is appended to it or to a volume after it: what a later sync covers must not lie behind
        what power loss can still take. What no *mark* vouches for is written again in place, the same bytes: after
        a sync that failed, the kernel holds lost pages for clean, and another sync would call them durable.
        """
        with self._disk_errors(path):
            volume = Volume.open(self._disk, path, writable=True)
            try:
                volume.write_again(mark, end)
                volume.sync()
            finally:
                volume.close()
            self._disk.sync_directory(self._directory)

    def resume(self, path: str, entry: int, state: IndexState, next_sequence: int, *, checkpointed: bool) -> None:
        """Go on in the volume at *path*, which is durable and whose index files have *state*."""
        self._activate(Volume.open(self._disk, path, writable=True))
        self._set_words(entry, state, state.end, next_sequence)
        if checkpointed:
            self._words[Word.CHECKPOINT_RECORDS] = state.records

    def begin_volume(self, previous: PreviousEnd | None = None) -> None:
        """Make a new active volume; the last one must be sealed.

        With *previous*, the last one ended in torn bytes and could not be sealed by a needle of its own: the new one
        says where it ended. It gets its name only once it also holds what those needles had changed by implication.
        """
        # Names count, not the table: a volume whose header is damaged must not be overwritten.
        stems = [name.partition(".")[0] for name in self._disk.names(self._directory)]
        volume_id = 1 + max((int(stem) for stem in stems if stem.isdigit()), default=0)
        sequence = max(1, self._words[Word.NEXT_SEQUENCE])
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
            paths = index_paths(path)
            for index_path, data in ((paths.records, b""), (paths.names, names_header(volume_id))):
                file = self._disk.open(index_path, writable=True, create=True)
                self._disk.truncate(file, 0)
                self._disk.write(file, 0, [data])
                self._disk.close(file)
            if previous is None:
                self._publish(volume, path)
        self._release_files()
        self._activate(volume, paths_of=path)
        with self._memory.change():
            entry = self._table.add_volume(VolumeEntry(volume_id, NEEDLES_START, sequence, 0))
        self._set_words(entry, empty_state(volume_id), NEEDLES_START, sequence)
        if previous is not None:
            self._settle_directories()
            with self._disk_errors(path):
                self._publish(volume, path)

    def _publish(self, volume: Volume, path: str) -> None:
        """Make *volume* durable under its final name."""
        self._sync_volume(volume)
        self._disk.rename(path + ".new", path)
        try:
            self._disk.sync_directory(self._directory)
        except OSError as error:
            self._failed = f"{path}: its name may not be durable ({error.strerror}); mount again"
            raise
        volume.path = path

    def _activate(self, volume: Volume, paths_of: str | None = None) -> None:
        paths = index_paths(paths_of or volume.path)
        self._volume = volume
        # Power loss may have taken the name of a file that holds nothing yet.
        self._records_file = self._disk.open(paths.records, writable=True, create=True)
        self._names_file = self._disk.open(paths.names, writable=True)

    def _set_words(self, entry: int, state: IndexState, durable: int, next_sequence: int) -> None:
        with self._memory.change():
            for word, value in (
                (Word.ACTIVE, entry),
                (Word.ACTIVE_END, state.end),
                (Word.DURABLE, durable),
                (Word.INDEX_RECORDS, state.records),
                (Word.INDEX_CRC, state.records_crc),
                (Word.NAMES_END, state.names_bytes),
                (Word.NAMES_CRC, state.names_crc),
                (Word.CHECKPOINT_RECORDS, 0),
                (Word.NEXT_SEQUENCE, next_sequence),
            ):
                self._memory.put_word(word, value)

    def state(self) -> IndexState:
        """Return how far the active volume and its index files reach."""
        words = self._words
        return IndexState(
            words[Word.ACTIVE_END],
            words[Word.INDEX_RECORDS],
            words[Word.INDEX_CRC],
            words[Word.NAMES_END],
            words[Word.NAMES_CRC],
        )

    def _seal(self) -> None:
        """End the active volume: nothing follows the checkpoint this writes, and all of it is durable."""
        self._settle_directories()
        with self._disk_errors(self.volume.path):
            self._sync_volume()
            self._words[Word.DURABLE] = self._words[Word.ACTIVE_END]
            self._write(Part(checkpoint(self.state(), seal=True)))
            # Gives back what the extent hint allocated past the end.
            self.volume.truncate(self._words[Word.ACTIVE_END])
            self._sync_volume()
        entry = self._words[Word.ACTIVE]
        row = self._table.volume(entry)
        with self._memory.change():
            self._table.set_volume(entry, row._replace(end=self._words[Word.ACTIVE_END], flags=VOLUME_SEALED))

    def must_roll(self, size: int) -> bool:
        """Return whether appending *size* bytes may have to seal the volume first, which waits for the disk."""
        return self._words[Word.ACTIVE_END] + size + _ROLL_BYTES > self._settings.volume_bytes_max

    def _make_room(self, needle: Needle, length: int) -> None:
        """Roll to a new volume if *needle* does not fit into this one."""
        end = self._words[Word.ACTIVE_END] + length
        names_end = self._words[Word.NAMES_END] + 1 + len(needle.name)
        limit = min(self._settings.volume_bytes_max, VOLUME_BYTES_LIMIT - _END_BYTES)
        fits = end <= limit and names_end <= NAMES_BYTES_LIMIT
        row = self._table.volume(self._words[Word.ACTIVE])
        if row.flags & VOLUME_SEALED:
            self.begin_volume()
        elif not fits and self._words[Word.ACTIVE_END] > NEEDLES_START:
            if needle.data_size == 0 and end <= VOLUME_BYTES_LIMIT - _END_BYTES // 2 and not self._has_room(0):
                return  # the disk is full: what takes no data may still go here, so that images can be deleted
            self._seal()
            self.begin_volume()

    # -- appending --------------------------------------------------------------------------------------------

    def append(
        self,
        needle: Needle,
        data: list[Buffer],
        sums: Checksums | None = None,
        *,
        large: Iterable[Buffer] | None = None,
        second: Part | None = None,
    ) -> Place:
        """Append *needle* and do what it says to the table; return where it lies.

        Its `data_size` bytes are the buffers in *data*, or come from *large* in pieces. Sets sequence number, commit
        time, durable mark and owner. *second* is appended with it: both of them count, or none.

        Raises:
            StoreFull: no room on the disk; store and table are as before.
            StoreLimit: as `Table.owner_index`.
            DiskFailure: the disk refused; store and table are as before, or the store takes no more changes.
        """
        if self._failed:
            raise DiskFailure(self._failed)
        length = aligned(needle.length) + (aligned(second.needle.length) if second is not None else 0)
        if (needle.kind in PUT_KINDS or needle.data_size) and not self._has_room(length):
            raise StoreFull("the disk is full: delete images or add space")
        with self._disk_errors(self.volume.path):
            self._make_room(needle, length)
            parts = [Part(needle, data, sums, large)]
            if second is not None:
                needle.flags |= FLAG_PAIR
                parts.append(second)
            for part in parts:
                if part.needle.kind in OWNED_KINDS:
                    self._define_owner(part.needle)
            return self._write(*parts)

    def _has_room(self, size: int) -> bool:
        space = self._disk.space(self._directory)
        return space.f_bavail * space.f_frsize >= size + self._settings.headroom_bytes

    def check_room(self, size: int) -> None:
        """Raise StoreFull where *size* more bytes would take the space that deleting needs."""
        if not self._has_room(size):
            raise StoreFull("the disk is full: delete images or add space")

    def define_owner(self, uid: int, gid: int, mode: int) -> None:
        """Append what an owner means, where the needle that said so was lost."""
        with self._disk_errors(self.volume.path):
            self._define_owner(Needle(Kind.ATTRIBUTES, 0, uid=uid, gid=gid, mode=mode))

    def _define_owner(self, needle: Needle) -> None:
        """Set the owner number of *needle*; the first time in a volume, a needle says what it means."""
        owner = needle.owner = self._table.owner_index(needle.uid, needle.gid, needle.mode)
        known = owner < self._words[Word.OWNERS]
        if not known or self._table.owner_volume(owner) != self._words[Word.ACTIVE]:
            definition = Needle(Kind.OWNER, 0, mode=needle.mode, uid=needle.uid, gid=needle.gid, owner=owner)
            self._write(Part(definition))

    def _write(self, *parts: Part) -> Place:
        """Append *parts* and apply them in one step; return where the first lies."""
        before = state = self.state()
        places = []
        try:
            for number, part in enumerate(parts):
                place, state = self._write_part(part, state, self._words[Word.NEXT_SEQUENCE] + number)
                places.append(place)
            with self._memory.change():
                for part, place in zip(parts, places, strict=True):
                    self._table.apply(part.needle, place)
                self._memory.put_word(Word.NEXT_SEQUENCE, self._words[Word.NEXT_SEQUENCE] + len(parts))
                # One entry of the journal for all six.
                progress = _PROGRESS.pack(state.end, self._words[Word.DURABLE], *state[1:])
                self._memory.put(WORDS_AT + 8 * Word.ACTIVE_END, progress)
        except (Exception, KeyboardInterrupt):
            self._undo(before)
            raise
        return places[0]

    def _write_part(self, part: Part, state: IndexState, sequence: int) -> tuple[Place, IndexState]:
        """Write one needle, its name and its index record behind *state*; return where, and the state then."""
        needle = part.needle
        needle.sequence = sequence
        needle.commit_ns = self.now_ns()
        needle.ctime_ns = needle.ctime_ns or needle.commit_ns
        needle.durable = self._words[Word.DURABLE]
        name_data = pack_name(needle.name) if names_a_name(needle.kind) else b""
        name_offset = state.names_bytes if name_data else 0
        if part.large is None:
            self.volume.write_needle(state.end, needle, part.data, part.sums)
        else:
            self.volume.write_large_needle(state.end, needle, part.large)
        if name_data:
            self._disk.write(self._names_file, state.names_bytes, [name_data])
        value = self._table.hash(needle.name) if name_data else 0
        record = pack_record(needle, state.end, name_offset, value)
        self._disk.write(self._records_file, state.records * INDEX_RECORD_BYTES, [record])
        after = IndexState(
            state.end + needle.length,
            state.records + 1,
            crc32c(record, state.records_crc),
            state.names_bytes + len(name_data),
            crc32c(name_data, state.names_crc),
        )
        return Place(self._words[Word.ACTIVE], state.end, name_offset), after

    def _undo(self, state: IndexState) -> None:
        """Cut back what a failed append left, or a scan would take it for the change it was not."""
        try:
            self.volume.truncate(state.end)
            self._disk.truncate(self._names_file, state.names_bytes)
            self._disk.truncate(self._records_file, state.records * INDEX_RECORD_BYTES)
        except OSError as error:
            self._failed = f"{self.volume.path}: a failed append cannot be cut back ({error.strerror}); mount again"

    @contextmanager
    def _disk_errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, path) from error

    # -- making durable ---------------------------------------------------------------------------------------

    def sync(self, *, final: bool = False) -> None:
        """Make durable all that was appended before the call; write a checkpoint when one is due, or *final*.

        Raises:
            DiskFailure: the disk lost data that it had taken; the store takes no more changes.
        """
        memory, words = self._memory, self._words
        with memory.lock():
            if self._failed:
                raise DiskFailure(self._failed)
            if self._table.volume(words[Word.ACTIVE]).flags & VOLUME_SEALED:
                return  # the next volume could not be begun yet; this one is durable, and nothing may follow its seal
            since = words[Word.INDEX_RECORDS] - words[Word.CHECKPOINT_RECORDS]
            due = since >= self._settings.checkpoint_needles or (final and since > 0)
            if due:
                due = self._if_room(self._settle_directories)
            state, entry, volume = self.state(), words[Word.ACTIVE], self.volume
            if state.end == words[Word.DURABLE] and not due:
                return
            duplicate = volume.duplicate()
        try:
            with self._disk_errors(volume.path):
                self._sync_volume(duplicate)
        finally:
            duplicate.close()
        with memory.lock():
            if words[Word.ACTIVE] != entry:
                return  # it was sealed meanwhile, which made it durable
            words[Word.DURABLE] = max(words[Word.DURABLE], state.end)
            if due and self._if_room(lambda: self._write(Part(checkpoint(state, seal=False)))):
                words[Word.CHECKPOINT_RECORDS] = words[Word.INDEX_RECORDS]
                if final:
                    with self._disk_errors(volume.path):
                        self._sync_volume()
                    words[Word.DURABLE] = words[Word.ACTIVE_END]

    def _if_room(self, write: Callable[[], object]) -> bool:
        """Do what a checkpoint wants written; on a full disk it waits, and the next start replays more."""
        try:
            with self._disk_errors(self.volume.path):
                write()
        except StoreFull:
            return False
        return True

    def _sync_volume(self, volume: Volume | None = None) -> None:
        volume = volume or self.volume
        # The kernel reports a lost page once for an open file and then forgets it: no later sync would say the truth,
        # nor one at the same time, such as that of a seal.
        with self._one_sync:
            if self._failed:
                raise DiskFailure(self._failed)
            try:
                volume.sync()
            except OSError as error:
                self._failed = f"{volume.path}: the disk lost data that was written ({error.strerror}); mount again"
                raise

    def _settle_directories(self) -> None:
        """Give every directory whose entries changed a needle with its times, so that the index alone tells them."""
        if not self._words[Word.STALE_DIRECTORIES]:
            return
        for slot in stale_directories(self._memory):
            record = self._table.record(slot)
            uid, gid, mode = self._table.owner(record.owner)
            needle = Needle(
                Kind.ATTRIBUTES,
                inode_of(slot, record.generation),
                uid=uid,
                gid=gid,
                mode=mode,
                mtime_ns=record.mtime_ns,
                ctime_ns=record.ctime_s * 1_000_000_000,
            )
            self._define_owner(needle)
            self._write(Part(needle))
