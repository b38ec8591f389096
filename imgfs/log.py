"""The end of the log: appends needles to the active volume, their records to its index, and both to the table.

Owns the active volume, its index files, sequence numbers, checkpoints, sealing and rolling. Must not know open
images or what a caller wants; a needle comes in, and lies on disk and in the table when `append` returns.

Order of an append (docs/crash.md): needle, name, index record, table. The needle is the commit point: whoever takes
the lock after a writer was killed finishes what has got so far (`carry_on`).

*Concurrency:* everything under `Memory.lock` but the wait for the disk in `sync`. Which volume is active is said in
shared memory; each process opens its files when it finds that it moved.
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
from imgfs.errors import Damaged, DiskFailure, StoreFull, disk_error
from imgfs.format import (
    FLAG_PAIR,
    FLAG_SEAL,
    INDEX_RECORD_BYTES,
    NAMES_BYTES_LIMIT,
    NEEDLE_HEADER_BYTES_MAX,
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
from imgfs.layout import VOLUME_SEALED, WORDS_AT, Word, appended_for, appending
from imgfs.load import stale_directories
from imgfs.requests import Requests
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
# The words from ACTIVE_END to APPENDING, which every append moves on.
_PROGRESS = struct.Struct("<6Q")
assert Word.APPENDING - Word.ACTIVE_END == 5


class Failure:
    """Why a store takes no changes, in the upper half of Word.FAILED; the lower half is the errno."""

    LOST = 1
    UNCUT = 2
    UNNAMED = 3


_FAILURES = {
    Failure.LOST: "the disk lost data that was written",
    Failure.UNCUT: "a failed append cannot be cut back",
    Failure.UNNAMED: "the name of this volume may not be durable",
}


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
        self._entry = -1
        self._records_file = -1
        self._names_file = -1
        self._one_sync = threading.Lock()
        # What a request needs besides the table when its needle is applied, and the row of the one in hand.
        self.requests: Requests | None = None
        self.requester = -1
        self.unstage: Callable[[int], None] | None = None
        self._memory.on_unfinished = self.carry_on

    def after_fork(self) -> None:
        """Be a process of its own: a file that is shared with the parent is told of a failed sync only once."""
        self._release_files()
        self._one_sync = threading.Lock()
        self.requester = -1

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
        """Return the time of a change, in ns since 1970."""
        return time.time_ns()

    @property
    def volume(self) -> Volume:
        """The active volume, which another process may have begun."""
        if self._volume is None or self._entry != self._words[Word.ACTIVE]:
            self._follow()
        assert self._volume is not None
        return self._volume

    def _follow(self) -> None:
        """Open the files of the volume that is active now."""
        self._release_files()
        entry = self._words[Word.ACTIVE]
        path = volume_path(self._directory, self._table.volume(entry).volume_id)
        self._activate(Volume.open(self._disk, path, writable=True), entry)

    def _fail(self, reason: int, error: OSError) -> None:
        """Let no process change anything any more."""
        self._words[Word.FAILED] = reason << 32 | (error.errno or 0)

    def _check(self) -> None:
        failed = self._words[Word.FAILED]
        if failed:
            text = f"{_FAILURES[failed >> 32]} ({os.strerror(failed & 0xFFFF_FFFF)})"
            raise DiskFailure(f"{self._directory}: {text}; mount again")

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
        self._activate(Volume.open(self._disk, path, writable=True), entry)
        with self._memory.change():
            self._set_words(entry, state, state.end, next_sequence)
        if checkpointed:
            self._words[Word.CHECKPOINT_RECORDS] = state.records

    def begin_volume(self, previous: PreviousEnd | None = None) -> None:
        """Make a new active volume; the last one must be sealed. One that a killed writer has made is taken.

        With *previous*, the last one ended in torn bytes and could not be sealed by a needle of its own: the new one
        says where it ended. It gets its name only once it also holds what those needles had changed by implication.
        """
        # Names count, not the table: a volume whose header is damaged must not be overwritten.
        stems = [name.partition(".")[0] for name in self._disk.names(self._directory)]
        volume_id = 1 + max((int(stem) for stem in stems if stem.isdigit()), default=0)
        if previous is None and self._take_over(volume_id - 1):
            return
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
            self._make_index(path, volume_id)
            if previous is None:
                self._publish(volume, path)
        self._enter(volume, path)
        if previous is not None:
            self._settle_directories()
            with self._disk_errors(path):
                self._publish(volume, path)

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

    def _take_over(self, volume_id: int) -> bool:
        """Enter the volume *volume_id* if a writer was killed when it had made that, and before it entered it."""
        words = self._words
        path = volume_path(self._directory, volume_id)
        known = any(self._table.volume(entry).volume_id == volume_id for entry in range(words[Word.VOLUMES]))
        if known or not self._disk.exists(path):
            return False
        try:
            volume = Volume.open(self._disk, path, writable=True)
        except Damaged:
            return False  # it was there before this store was opened
        if volume.header.first_sequence != words[Word.NEXT_SEQUENCE] or volume.size() != NEEDLES_START:
            volume.close()
            return False
        with self._disk_errors(path):
            self._make_index(path, volume_id)
            self._sync_volume(volume)
            self._sync_names()
        self._enter(volume, path)
        return True

    def _publish(self, volume: Volume, path: str) -> None:
        """Make *volume* durable under its final name."""
        self._sync_volume(volume)
        self._disk.rename(path + ".new", path)
        self._sync_names()
        volume.path = path

    def _sync_names(self) -> None:
        try:
            self._disk.sync_directory(self._directory)
        except OSError as error:
            self._fail(Failure.UNNAMED, error)
            raise

    def _activate(self, volume: Volume, entry: int, paths_of: str | None = None) -> None:
        paths = index_paths(paths_of or volume.path)
        self._volume, self._entry = volume, entry
        # Power loss may have taken the name of a file that holds nothing yet.
        self._records_file = self._disk.open(paths.records, writable=True, create=True)
        self._names_file = self._disk.open(paths.names, writable=True)

    def _set_words(self, entry: int, state: IndexState, durable: int, next_sequence: int) -> None:
        """Within `Memory.change`."""
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
            self._finish_seal()

    def _finish_seal(self) -> None:
        """Make the seal of the active volume durable; a killed writer may not have done it."""
        words = self._words
        if words[Word.DURABLE] < words[Word.ACTIVE_END]:
            # Gives back what the extent hint allocated past the end.
            self.volume.truncate(words[Word.ACTIVE_END])
            self._sync_volume()
            words[Word.DURABLE] = words[Word.ACTIVE_END]

    def _is_sealed(self) -> bool:
        return bool(self._table.volume(self._words[Word.ACTIVE]).flags & VOLUME_SEALED)

    def must_roll(self, size: int) -> bool:
        """Return whether appending *size* bytes may have to seal the volume first, which waits for the disk."""
        return self._words[Word.ACTIVE_END] + size + _ROLL_BYTES > self._settings.volume_bytes_max

    def _make_room(self, needle: Needle, length: int) -> None:
        """Roll to a new volume if *needle* does not fit into this one."""
        end = self._words[Word.ACTIVE_END] + length
        names_end = self._words[Word.NAMES_END] + 1 + len(needle.name)
        limit = min(self._settings.volume_bytes_max, VOLUME_BYTES_LIMIT - _END_BYTES)
        fits = end <= limit and names_end <= NAMES_BYTES_LIMIT
        if self._is_sealed():
            self._finish_seal()
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
        answers: bool = False,
        staged: int = -1,
    ) -> Place:
        """Append *needle* and do what it says to the table; return where it lies.

        Its `data_size` bytes are the buffers in *data*, or come from *large* in pieces. Sets sequence number, commit
        time, durable mark and owner. *second* is appended with it: both of them count, or none. *answers*: it is all
        that the request in hand asks for. *staged*: it stores what is in that staging entry.

        Raises:
            StoreFull: no room on the disk; store and table are as before.
            StoreLimit: as `Table.owner_index`.
            DiskFailure: the disk refused; store and table are as before, or the store takes no more changes.
        """
        self._check()
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
            return self._write(*parts, row=self.requester if answers else -1, staged=staged)

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

    def _write(self, *parts: Part, row: int = -1, staged: int = -1) -> Place:
        """Append *parts* and apply them in one step; return where the first lies."""
        words, volume = self._words, self.volume
        state = self.state()
        end = state.end
        words[Word.APPENDING] = appending(row, staged)
        try:
            for number, part in enumerate(parts):
                needle = part.needle
                needle.sequence = words[Word.NEXT_SEQUENCE] + number
                needle.commit_ns = self.now_ns()
                needle.ctime_ns = needle.ctime_ns or needle.commit_ns
                needle.durable = words[Word.DURABLE]
                if part.large is None:
                    volume.write_needle(end, needle, part.data, part.sums)
                else:
                    volume.write_large_needle(end, needle, part.large)
                end += needle.length
            return self._apply([part.needle for part in parts], state, row, staged)
        except (Exception, KeyboardInterrupt):
            self._undo(state)
            raise

    def _apply(self, needles: Sequence[Needle], state: IndexState, row: int, staged: int) -> Place:
        """Append to the index what *needles* say, which stand at the end of the volume, and do it to the table."""
        words = self._words
        entry, last = words[Word.ACTIVE], needles[-1]
        places = []
        for needle in needles:
            place, state = self._index(needle, state)
            places.append(place)
        with self._memory.change():
            for needle, place in zip(needles, places, strict=True):
                self._table.apply(needle, place)
            self._memory.put_word(Word.NEXT_SEQUENCE, last.sequence + 1)
            # One entry of the journal for all six.
            self._memory.put(WORDS_AT + 8 * Word.ACTIVE_END, _PROGRESS.pack(*state, 0))
            if last.kind == Kind.CHECKPOINT and last.flags & FLAG_SEAL:
                sealed = self._table.volume(entry)._replace(end=state.end, flags=VOLUME_SEALED)
                self._table.set_volume(entry, sealed)
            if row >= 0 and self.requests is not None:
                self.requests.applied(row, needles[0].inode)
            if staged >= 0 and self.unstage is not None:
                self.unstage(staged)
        return places[0]

    def _index(self, needle: Needle, state: IndexState) -> tuple[Place, IndexState]:
        """Append name and record of *needle* to the index files, which have *state*; return where, and the next state."""
        name_data = pack_name(needle.name) if names_a_name(needle.kind) else b""
        name_offset = state.names_bytes if name_data else 0
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

    def carry_on(self) -> None:
        """Within the lock: finish the append that a killed writer had begun, or cut away what there is of it."""
        state = self.state()
        volume = self.volume
        row, staged = appended_for(self._words[Word.APPENDING])
        needles: list[Needle] = []
        end = state.end
        with self._disk_errors(volume.path):
            while not needles or needles[-1].flags & FLAG_PAIR:
                needle = volume.unpack(volume.read(end, NEEDLE_HEADER_BYTES_MAX), end)
                if needle is None or not volume.whole(needle, end):
                    self._undo(state)
                    return
                needles.append(needle)
                end += needle.length
            try:
                self._apply(needles, state, row, staged)
            except (Exception, KeyboardInterrupt):
                self._undo(state)
                raise

    def _undo(self, state: IndexState) -> None:
        """Cut back what a failed append left, or a scan would take it for the change it was not."""
        try:
            self.volume.truncate(state.end)
            self._disk.truncate(self._names_file, state.names_bytes)
            self._disk.truncate(self._records_file, state.records * INDEX_RECORD_BYTES)
        except OSError as error:
            self._fail(Failure.UNCUT, error)
        self._words[Word.APPENDING] = 0

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
            self._check()
            if self._is_sealed():
                # The next volume could not be begun yet, and nothing may follow the seal of this one.
                with self._disk_errors(self.volume.path):
                    self._finish_seal()
                return
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
            self._check()
            try:
                volume.sync()
            except OSError as error:
                self._fail(Failure.LOST, error)
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
