"""The active volume, which all needles go to: writes one behind its end, into its index and into the table.

Owns the files of the active volume and its index, and why no more may be written. Must not know when a volume is
full, or when it is made durable.

Order of a write (docs/crash.md): needle, name, index record, table. The needle is the commit point: whoever takes the
lock after a writer was killed finishes what has got so far (`carry_on`).

*Concurrency:* everything under `Memory.lock`, but `sync_volume`. Which volume is active, how far it reaches and what is
being written stands in shared memory; each process opens the files for itself when it finds that they are others.
"""

import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from crc32c import crc32c

from imgfs.disk import Buffer, Disk
from imgfs.errors import DiskFailure, StoreLimit, disk_error
from imgfs.format import (
    FLAG_PAIR,
    FLAG_SEAL,
    INDEX_RECORD_BYTES,
    NEEDLE_HEADER_BYTES_MAX,
    Checksums,
    IndexState,
    Kind,
    Needle,
    Tag,
)
from imgfs.index import index_paths, names_a_name, pack_name, pack_record
from imgfs.layout import MOVING, VOLUME_SEALED, WORDS_AT, Word, appended_for, appending
from imgfs.plausible import NUMBER_MAX
from imgfs.records import Place
from imgfs.requests import NOBODY, Requests
from imgfs.settings import MIB
from imgfs.table import Table
from imgfs.volume import Volume
from imgfs.volumes import volume_path

NO_DATA = Checksums(0, ())
_CHECKPOINT, _LINK = int(Kind.CHECKPOINT), int(Kind.LINK)
# Data up to this size is written in one call with its header and footer.
SMALL_BYTES = 1 * MIB
# Python has no name for it.
_CLOCK_REALTIME_COARSE = 5
# The words from ACTIVE_END to APPENDING, which every write moves on.
_PROGRESS = struct.Struct("<6Q")
assert Word.APPENDING - Word.ACTIVE_END == 5
_SYNCED_SHIFT = 48
_SYNCED_MASK = (1 << _SYNCED_SHIFT) - 1


def nobody() -> int:
    """Return how many ask for a sync that is nobody's in particular."""
    return 0


class Failure:
    """Why a store takes no changes: the upper half of Word.FAILED. The lower half is the errno.

    LOST can be mended, see failed_sync.py.
    """

    LOST = 1
    UNCUT = 2
    UNNAMED = 3
    DEAD = 4


_FAILURES = {
    Failure.LOST: "the disk lost data that was written",
    Failure.UNCUT: "a failed append cannot be cut back",
    Failure.UNNAMED: "the name of the last volume may not be durable",
    Failure.DEAD: "the disk lost data that was written, and takes it nowhere else",
}


class Range(NamedTuple):
    """What a sync is asked for: a volume and its row, up to *end*, wanted when there were so many *failures*."""

    entry: int
    volume_id: int
    end: int
    failures: int


class Part(NamedTuple):
    """A needle to append, and its data: the buffers in *data*, or what *large* yields."""

    needle: Needle
    data: Sequence[Buffer] = ()
    sums: Checksums | None = NO_DATA
    large: Iterable[Buffer] | None = None


class _DiskErrors:
    """What the disk says becomes an error of the store, about the file at *path*."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise disk_error(error, self._path) from error


class Active:
    """The end of a store that is open for writing."""

    def __init__(self, disk: Disk, directory: str, table: Table) -> None:
        """*directory* holds the volumes."""
        self._disk = disk
        self._directory = directory
        self._table = table
        self._memory = table.memory
        self._words = table.memory.words
        self._volume: Volume | None = None
        self._entry = -1
        self._gone = 0  # volumes that were removed when we last looked: their rows may be others' by now
        self._records_file = -1
        self._names_file = -1
        # The rows of requests and the one in hand, and what is told of a staging entry that a needle holds now.
        self.requests: Requests | None = None
        self.requester = NOBODY
        self.unstage: Callable[[int, bool], None] | None = None
        self._memory.on_unfinished = self.carry_on

    def after_fork(self) -> None:
        """Be a process of its own: a file that is shared with the parent is told of a failed sync only once."""
        self._release_files()
        self.requester = NOBODY

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
        """The active volume, which another process may have begun."""
        words = self._words
        if self._volume is None or self._entry != words[Word.ACTIVE] or self._gone != words[Word.VOLUMES_GONE]:
            self._follow()
        assert self._volume is not None
        return self._volume

    def _follow(self) -> None:
        """Open the files of the volume that is active now, unless they are open."""
        entry, self._gone = self._words[Word.ACTIVE], self._words[Word.VOLUMES_GONE]
        volume_id = self._table.volume(entry).volume_id
        if self._volume is not None and self._entry == entry and self._volume.header.volume_id == volume_id:
            return
        self._release_files()
        self._activate(Volume.open(self._disk, volume_path(self._directory, volume_id), writable=True), entry)

    def _activate(self, volume: Volume, entry: int, paths_of: str | None = None) -> None:
        paths = index_paths(paths_of or volume.path)
        self._volume, self._entry = volume, entry
        # Power loss may have taken the name of a file that holds nothing yet.
        self._records_file = self._disk.open(paths.records, writable=True, create=True)
        self._names_file = self._disk.open(paths.names, writable=True)

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

    def _disk_errors(self, path: str) -> AbstractContextManager[None]:
        return _DiskErrors(path)

    # -- failures ---------------------------------------------------------------------------------------------

    def _fail(self, reason: int, error: OSError) -> None:
        """Let no process change anything any more."""
        self._words[Word.FAILED] = reason << 32 | (error.errno or 0)

    def _check(self) -> None:
        """Raise DiskFailure if nothing may be changed any more."""
        failed = self._words[Word.FAILED]
        if failed:
            text = f"{_FAILURES[failed >> 32]} ({os.strerror(failed & 0xFFFF_FFFF)})"
            raise DiskFailure(f"{self._directory}: {text}; mount again")

    # -- writing ----------------------------------------------------------------------------------------------

    def _write(self, *parts: Part, row: int = NOBODY, staged: int = -1, ended: bool = False) -> Place:
        """Append *parts* and apply them in one step; return where the first lies.

        They are what the request in *row* asks for, and hold what is in the staging entry *staged*, which is *ended* or
        goes on.
        """
        before = state = self.state()
        volume, words = self.volume, self._words
        sequence, now_ns = words[Word.NEXT_SEQUENCE], self.now_ns()
        if sequence + len(parts) > NUMBER_MAX:
            # No reader would believe them.
            raise StoreLimit("all sequence numbers are used up; copy what is here into a new store")
        words[Word.APPENDING] = appending(row, staged)
        places = []
        try:
            for number, part in enumerate(parts):
                needle = part.needle
                needle.sequence = sequence + number
                needle.commit_ns = now_ns
                needle.ctime_ns = needle.ctime_ns or now_ns
                needle.durable = words[Word.DURABLE]
                if part.large is None:
                    volume.write_needle(state.end, needle, part.data, part.sums)
                else:
                    volume.write_large_needle(state.end, needle, part.large)
                place, state = self._write_index(needle, state)
                places.append(place)
            self._apply([part.needle for part in parts], places, state, row, staged, ended=ended)
        except (Exception, KeyboardInterrupt):
            self._undo(before)
            raise
        return places[0]

    def _write_index(self, needle: Needle, state: IndexState) -> tuple[Place, IndexState]:
        """Write name and index record of *needle*, which lies behind *state*; return where, and the state then."""
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

    def _apply(
        self,
        needles: list[Needle],
        places: list[Place],
        state: IndexState,
        row: int,
        staged: int,
        *,
        ended: bool = False,
    ) -> None:
        """Do to the table what *needles* say, in one step with all else that must be so then."""
        memory = self._memory
        first, last = needles[0], needles[-1]
        with memory.change():
            for needle, place in zip(needles, places, strict=True):
                self._table.apply(needle, place)
            memory.put_word(Word.NEXT_SEQUENCE, last.sequence + 1)
            self._progress(state)
            if last.kind == _CHECKPOINT and last.flags & FLAG_SEAL:
                entry = places[-1].volume
                row_of = self._table.volume(entry)
                self._table.set_volume(entry, row_of._replace(end=state.end, flags=VOLUME_SEALED))
            if row >= 0 and self.requests is not None:
                self.requests.applied(row, first.extra_u64(Tag.TARGET) if first.kind == _LINK else first.inode)
            if staged >= 0 and self.unstage is not None:
                self.unstage(staged, ended)

    def _progress(self, state: IndexState) -> None:
        """Within `Memory.change`: say that the files reach *state*, and that nothing is being appended any more."""
        # One entry of the journal for all six.
        self._memory.put(WORDS_AT + 8 * Word.ACTIVE_END, _PROGRESS.pack(*state, 0))

    def carry_on(self) -> None:
        """Within the lock: finish the write that a killed writer had begun, or cut away what there is of it."""
        if self._words[Word.APPENDING] & MOVING:
            self._move_records()
            return
        before = state = self.state()
        row, staged = appended_for(self._words[Word.APPENDING])
        with self._disk_errors(self._directory):
            volume = self.volume
            needles = self._whole_needles(volume, state.end)
            if not needles:
                self._undo(before)
                return
            places = []
            try:
                for needle in needles:
                    place, state = self._write_index(needle, state)
                    places.append(place)
                self._apply(needles, places, state, row, staged)
            except (Exception, KeyboardInterrupt):
                self._undo(before)
                raise

    def _move_records(self) -> None:
        """Within the lock: let the table point to what was appended again, see failed_sync.py."""
        raise NotImplementedError

    def _whole_needles(self, volume: Volume, offset: int) -> list[Needle]:
        """Return the needle at *offset*, or the two of a pair; none if something of them is missing."""
        needles: list[Needle] = []
        while True:
            needle = volume.unpack(volume.read(offset, NEEDLE_HEADER_BYTES_MAX), offset)
            if needle is None or not volume.whole(needle, offset):
                return []
            needles.append(needle)
            if not needle.flags & FLAG_PAIR:
                return needles
            offset += needle.length

    def _undo(self, state: IndexState) -> None:
        """Cut back what a failed append left, or a scan would take it for the change it was not."""
        try:
            self.volume.truncate(state.end)
            self._disk.truncate(self._names_file, state.names_bytes)
            self._disk.truncate(self._records_file, state.records * INDEX_RECORD_BYTES)
        except OSError as error:
            self._fail(Failure.UNCUT, error)
        self._words[Word.APPENDING] = 0

    # -- making durable ---------------------------------------------------------------------------------------

    def _sync_active(self) -> None:
        """Make the active volume durable."""
        self._sync_volume(self.volume, self._appended())

    def _appended(self) -> Range:
        """Within the lock: return all of the active volume."""
        words, volume = self._words, self.volume
        return Range(words[Word.ACTIVE], volume.header.volume_id, words[Word.ACTIVE_END], words[Word.FAILURES])

    def _is_active(self, wanted: Range) -> bool:
        """Return whether the volume of *wanted* is the active one, and not just had the row that this has."""
        is_row = self._words[Word.ACTIVE] == wanted.entry
        return is_row and self._table.volume(wanted.entry).volume_id == wanted.volume_id

    def _sync_volume(self, volume: Volume, wanted: Range, asked: Callable[[], int] = nobody) -> tuple[int, int]:
        """Make *volume* durable, unless another process has done that for the range that is *wanted*.

        Return how far it is durable, which may be farther, and how many of those whom *asked* counts that serves; 0 if
        it is not farther.
        """
        words = self._words
        # The kernel reports a lost page once for an open file and then forgets it: no later sync would say the truth,
        # nor one at the same time, such as that of a seal.
        with self._memory.one_sync:
            self._check()
            if words[Word.FAILURES] != wanted.failures:
                raise DiskFailure(f"{volume.path}: {_FAILURES[Failure.LOST]}")
            if not self._is_active(wanted):
                # It was sealed meanwhile, which made it durable. To sync it would tell nothing of the one that is being
                # written, for which SYNCING may stand. From here on none is sealed: that needs a sync, too.
                return wanted.end, 0
            synced = words[Word.SYNCED]
            if synced >> _SYNCED_SHIFT == wanted.entry and synced & _SYNCED_MASK >= wanted.end:
                return wanted.end, 0
            # Another process may have synced for long, and who came meanwhile need not wait for another run.
            served, end = asked(), self._end_now(wanted)
            if not end:
                served, end = 0, wanted.end
            try:
                if words[Word.SYNCING]:
                    # Who was killed within a sync may have been told of lost pages, as nobody will be again: they are
                    # written once more, so that this sync means them, too.
                    volume.write_again(words[Word.DURABLE], end)
                words[Word.SYNCING] = 1
                volume.sync()
            except OSError as error:
                words[Word.FAILURES] += 1
                self._fail(Failure.LOST, error)
                words[Word.SYNCING] = 0
                raise
            words[Word.SYNCED] = wanted.entry << _SYNCED_SHIFT | end
            words[Word.SYNCING] = 0
        return end, served

    def _note_synced(self) -> None:
        """Within the lock: let the durable mark say what the last sync covered, which may not have got the lock."""
        words = self._words
        synced = words[Word.SYNCED]
        if synced >> _SYNCED_SHIFT == words[Word.ACTIVE]:
            words[Word.DURABLE] = max(words[Word.DURABLE], synced & _SYNCED_MASK)

    def _end_now(self, wanted: Range) -> int:
        """Return how far the volume of *wanted* reaches; 0 if it cannot be said at once, or it was sealed meanwhile.

        No `Memory.consistent`: that may have to wait for the lock, and who has that may wait for us.
        """
        words = self._words
        before = words[Word.COUNTER]
        entry, end, sealed = words[Word.ACTIVE], words[Word.ACTIVE_END], self._table.is_sealed(wanted.entry)
        ours = entry == wanted.entry and not sealed
        return end if ours and not before & 1 and words[Word.COUNTER] == before else 0

    def _sync_names(self) -> None:
        try:
            self._disk.sync_directory(self._directory)
        except OSError as error:
            self._fail(Failure.UNNAMED, error)
            raise
