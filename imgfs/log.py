"""The log: appends needles to the active volume, seals it when it is full and begins the next, makes it durable.

Owns sequence numbers, owner needles, checkpoints, sealing and rolling. Must not know open images or what a caller
wants; a needle comes in, and lies on disk and in the table when `append` returns (active.py).

*Concurrency:* everything under `Memory.lock` but the wait for the disk in `sync`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from imgfs.active import SMALL_BYTES, Part, nobody
from imgfs.batch import IMAGES_AT_ONCE, Batches, NewImage
from imgfs.disk import Buffer
from imgfs.errors import DiskFailure, ImgfsError, StoreFull
from imgfs.format import (
    FLAG_PAIR,
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
)
from imgfs.index import checkpoint
from imgfs.layout import Word
from imgfs.records import Place
from imgfs.requests import NOBODY
from imgfs.settings import MIB
from imgfs.volume import Volume

__all__ = ["SMALL_BYTES", "Log", "Part"]

# With so much room nobody asks the disk for so long, or until a part of it is taken; every worker may take one.
_PLENTY_BYTES = 4096 * MIB
_PLENTY_PART = 64
_PLENTY_S = 0.05
# Where syncs that somebody waits for are small, blocks behind the end are written before they are needed: so many
# bytes, or this part of a volume, again and again, as long as one sync has appended no more than a part of that.
_AHEAD_BYTES = MIB
_AHEAD_PART = 16
_SMALL_PART = 8
# Kept free below the format's limit, for the needles that settle directories and seal the volume.
_END_BYTES = 64 * MIB
# More than the headers and names of any change that is not large.
_ROLL_BYTES = 4096


class Log(Batches):
    """The writing end of a store that is open for writing."""

    # Bytes that need no question whether there is room, and until when.
    _granted_bytes = 0
    _granted_until_s = 0.0

    # -- volumes ----------------------------------------------------------------------------------------------

    def make_durable(self, path: str, mark: int, end: int, *, cut: bool) -> None:
        """Make the volume at *path* and its name durable up to *end*, as a writer that was killed may not have done.

        *cut*: there is nothing behind that but what `_write_ahead` has written; it goes.
        Comes before anything is appended to it or to a volume after it: what a later sync covers must not lie behind
        what power loss can still take. What no *mark* vouches for is written again in place, the same bytes: after
        a sync that failed, the kernel holds lost pages for clean, and another sync would call them durable.
        """
        with self._disk_errors(path):
            volume = Volume.open(self._disk, path, writable=True)
            try:
                volume.write_again(mark, end)
                if cut and volume.size() > end:
                    volume.truncate(end)
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
        if previous is None and self._take_over():
            return
        volume, path = self._new_volume(previous, max(1, self._words[Word.NEXT_SEQUENCE]))
        if previous is None:
            self._publish(volume, path)
        self._enter(volume, path)
        if previous is not None:
            self._settle_directories()
            self._publish(volume, path)

    def _seal(self) -> None:
        """End the active volume: nothing follows the checkpoint this writes, and all of it is durable."""
        self._settle_directories()
        with self._disk_errors(self.volume.path):
            self._sync_active()
            self._words[Word.DURABLE] = self._words[Word.ACTIVE_END]
            self._write(Part(checkpoint(self.state(), seal=True)))
            self._finish_seal()

    def _finish_seal(self) -> None:
        """Make the seal of the active volume durable; a killed writer may not have done it."""
        words = self._words
        if words[Word.DURABLE] < words[Word.ACTIVE_END]:
            # Gives back what the extent hint allocated past the end.
            self.volume.truncate(words[Word.ACTIVE_END])
            self._sync_active()
            words[Word.DURABLE] = words[Word.ACTIVE_END]

    def _is_sealed(self) -> bool:
        return self._table.is_sealed(self._words[Word.ACTIVE])

    def must_roll(self, size: int) -> bool:
        """Return whether appending *size* bytes may have to seal the volume first, which waits for the disk."""
        return self._words[Word.ACTIVE_END] + size + _ROLL_BYTES > self._settings.volume_bytes_max

    def _make_room(self, needle: Needle, length: int) -> None:
        """Roll to a new volume if *needle* does not fit into this one."""
        end = self._words[Word.ACTIVE_END] + length
        names_end = self._words[Word.NAMES_END] + 1 + len(needle.name)
        fits = end <= self._limit() and names_end <= NAMES_BYTES_LIMIT
        if self._is_sealed():
            self._finish_seal()
            self.begin_volume()
        elif not fits and self._words[Word.ACTIVE_END] > NEEDLES_START:
            if needle.data_size == 0 and end <= VOLUME_BYTES_LIMIT - _END_BYTES // 2 and self._room() < 0:
                return  # the disk is full: what takes no data may still go here, so that images can be deleted
            self._seal()
            self.begin_volume()

    def _limit(self) -> int:
        """Return where a volume ends at most, but for its seal."""
        return min(self._settings.volume_bytes_max, VOLUME_BYTES_LIMIT - _END_BYTES)

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
        ended: bool = False,
    ) -> Place:
        """Append *needle* and do what it says to the table; return where it lies.

        Its `data_size` bytes are the buffers in *data*, or come from *large* in pieces. Sets sequence number, commit
        time, durable mark and owner. *second* is appended with it: both of them count, or none.
        *answers*: this is all that the request in hand asks for. *staged*: it holds what is in that staging entry, and
        with *ended* nobody is going to need that any more.

        Raises:
            StoreFull: no room on the disk; store and table are as before.
            StoreLimit: as `Table.owner_index`.
            DiskFailure: the disk refused; store and table are as before, or the store takes no more changes.
        """
        self._mend()
        length = needle.length + (second.needle.length if second is not None else 0)
        if (needle.kind in PUT_KINDS or needle.data_size) and not self._has_room(length):
            raise StoreFull("the disk is full: delete images or add space")
        row = self.requester if answers else NOBODY
        with self._disk_errors(self.volume.path):
            self._make_room(needle, length)
            if needle.kind in OWNED_KINDS:
                self._define_owner(needle)
            if second is None:
                return self._write(Part(needle, data, sums, large), row=row, staged=staged, ended=ended)
            needle.flags |= FLAG_PAIR
            if second.needle.kind in OWNED_KINDS:
                self._define_owner(second.needle)
            return self._write(Part(needle, data, sums, large), second, row=row, staged=staged, ended=ended)

    def append_images(self, images: Sequence[NewImage], first: int) -> int:
        """Append the first of *images* that fit into this volume; return how many, which may be none.

        They get the slots from *first* on, which were never used. Where none fits, `append` takes one, and rolls.

        Raises:
            StoreFull, StoreLimit, DiskFailure: as `append`; none of them is in the store.
        """
        self._mend()
        if self._is_sealed() or not images or self._words[Word.ACTIVE_END] + images[0].length > self._limit():
            return 0
        with self._disk_errors(self.volume.path):
            images = images[:IMAGES_AT_ONCE]
            owners = {
                key: self._owner_here(*key) for key in {(image.uid, image.gid, image.mode): 0 for image in images}
            }
            if any(self._table.owner(number) != key for key, number in owners.items()):
                return 0  # none was left, and one of these was given another meaning, as nothing had it yet
            end, names_end = self._words[Word.ACTIVE_END], self._words[Word.NAMES_END]
            count = 0
            for image in images:
                end += image.length
                names_end += 1 + len(image.name)
                if end > self._limit() or names_end > NAMES_BYTES_LIMIT:
                    break
                count += 1
            if count:
                self.check_room(end - self._words[Word.ACTIVE_END])
                self._write_images(images[:count], owners, first)
        return count

    def _has_room(self, size: int) -> bool:
        # Every change asks. Where there is plenty, a small part of that is taken for granted for a moment.
        now_s = time.monotonic()
        if size <= self._granted_bytes and now_s < self._granted_until_s:
            self._granted_bytes -= size
            return True
        room = self._room()
        plenty = room >= _PLENTY_BYTES
        self._granted_bytes, self._granted_until_s = (room // _PLENTY_PART if plenty else 0), now_s + _PLENTY_S
        return room >= size

    def _room(self) -> int:
        """Return how many bytes the disk has beyond those that deleting needs; below 0 it lacks some of these."""
        space = self._disk.space(self._directory)
        return space.f_bavail * space.f_frsize - self._settings.headroom_bytes

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
        needle.owner = self._owner_here(needle.uid, needle.gid, needle.mode)

    def _owner_here(self, uid: int, gid: int, mode: int) -> int:
        """Return the number of an owner; the first time in a volume, a needle says what it means."""
        owner = self._table.owner_index(uid, gid, mode)
        known = owner < self._words[Word.OWNERS]
        if not known or self._table.owner_volume(owner) != self._words[Word.ACTIVE]:
            self._write(Part(Needle(Kind.OWNER, 0, mode=mode, uid=uid, gid=gid, owner=owner)))
        return owner

    # -- making durable ---------------------------------------------------------------------------------------

    def sync(self, *, final: bool = False) -> None:
        """Make durable all that was appended before the call; write a checkpoint when one is due, or *final*.

        Raises:
            DiskFailure: the disk lost data that it had taken. What is still whole was appended again elsewhere.
        """
        self.sync_for(nobody, final=final)

    def sync_for(self, asked: Callable[[], int], *, final: bool = False) -> int:
        """As `sync`; *asked* counts who wants it, each for all that was appended before. Return how many are served."""
        memory, words = self._memory, self._words
        served = asked()
        with memory.lock():
            self._mend()
            self._note_synced()
            if self._is_sealed():
                # The next volume could not be begun yet, and nothing may follow the seal of this one.
                with self._disk_errors(self.volume.path):
                    self._finish_seal()
                return served
            since = words[Word.INDEX_RECORDS] - words[Word.CHECKPOINT_RECORDS]
            due = since >= self._settings.checkpoint_needles or (final and since > 0)
            if due:
                due = self._if_room(self._settle_directories)
            state, wanted, volume = self.state(), self._appended(), self.volume
            if state.end == words[Word.DURABLE] and not due:
                return served
            if served:
                self._write_ahead(volume, state.end)
            duplicate = volume.duplicate()
        try:
            with self._disk_errors(volume.path):
                end, more = self._sync_volume(duplicate, wanted, asked)
        except DiskFailure:
            with memory.lock(), suppress(ImgfsError):
                self._mend()  # if it cannot be now, the next change tries again
            raise
        finally:
            duplicate.close()
        served = max(served, more)
        # The mark may stay behind what is durable until somebody needs it: it is not worth waiting for who changes
        # something.
        if not memory.try_acquire():
            if not (due or final):
                return served
            memory.acquire()
        try:
            if not self._is_active(wanted) or self._is_sealed():
                return served  # it was sealed meanwhile, which made it durable; nothing may follow the seal
            words[Word.DURABLE] = max(words[Word.DURABLE], end)
            if due and self._if_room(lambda: self._write(Part(checkpoint(state, seal=False)))):
                words[Word.CHECKPOINT_RECORDS] = words[Word.INDEX_RECORDS]
                if final:
                    with self._disk_errors(volume.path):
                        self._sync_active()
                    words[Word.DURABLE] = words[Word.ACTIVE_END]
        finally:
            memory.release()
        return served

    def _write_ahead(self, volume: Volume, end: int) -> None:
        """Within the lock: let zeros stand behind the *end* of *volume* where the next small sync will need blocks.

        To make durable what lies in blocks that were written before takes the disk one write; what lengthens a file, or
        is the first in a block, takes the file system's own log, too, at twice the time and more.
        """
        ahead = min(_AHEAD_BYTES, self._settings.volume_bytes_max // _AHEAD_PART)
        appended = end - self._words[Word.DURABLE]
        start, upto = max(end, volume.size()), min(end + ahead, self._limit())
        if appended > ahead // _SMALL_PART or start - end >= appended or start >= upto:
            return
        if self._has_room(upto - start):
            with suppress(OSError):  # nobody needs them
                volume.write_zeros(start, upto)

    def finish(self) -> None:
        """Leave the log as it should be found: durable, a checkpoint at its end, nothing behind that. As `sync`."""
        with self._memory.lock():
            self._mend()
            if not self._is_sealed() and self.volume.size() > self._words[Word.ACTIVE_END]:
                with self._disk_errors(self.volume.path):
                    self.volume.truncate(self._words[Word.ACTIVE_END])
        self.sync(final=True)

    def _if_room(self, write: Callable[[], object]) -> bool:
        """Do what a checkpoint wants written; on a full disk it waits, and the next start replays more."""
        try:
            with self._disk_errors(self.volume.path):
                write()
        except StoreFull:
            return False
        return True

    def _settle_directories(self) -> None:
        """Give every directory whose entries changed a needle with its times, so that the index alone tells them."""
        for needle in self._directory_times():
            self._define_owner(needle)
            self._write(Part(needle))
