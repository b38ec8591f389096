"""A store: a tree of images on disk, opened and closed, its images read and written through handles.

Owns the life of a store in this process, and what open images mean. Synchronous; knows nothing of FUSE, and can be used
as a library. Names are looked up in view.py and changed in tree.py, extended attributes are in xattrs.py.

*Concurrency:* see view.py and tree.py. Handles and what is staged lie in shared memory and files, not here.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from imgfs.atimes import AccessTimes
from imgfs.check import Checked, check_volumes, judge, may_need
from imgfs.compact import Compaction
from imgfs.contradictions import contradictions
from imgfs.disk import Buffer, Disk
from imgfs.errors import IsADirectory
from imgfs.format import ALIGNMENT, Kind, seconds, slot_of
from imgfs.handles import WRITE
from imgfs.holes import Holes
from imgfs.index_reading import IndexRow
from imgfs.layout import Flag, Word
from imgfs.memory import Memory
from imgfs.opening import ROOT, Opened, attach_parts, make_store, open_parts, owner
from imgfs.reading import VolumeReading
from imgfs.reclaim import Limits, Reclaimer
from imgfs.records import Record
from imgfs.requests import NOBODY, Request
from imgfs.retention import emptied_ns
from imgfs.saved_table import save_table
from imgfs.settings import Settings
from imgfs.staging import DIRTY, Staged
from imgfs.survey import Damage
from imgfs.tree import PERMISSIONS
from imgfs.usage import Usage
from imgfs.view import Attr, Counts, Entry, Location, Space, Spot
from imgfs.volumes import VOLUMES
from imgfs.xattrs import Xattrs

__all__ = ["PERMISSIONS", "ROOT", "Attr", "Counts", "Entry", "Location", "Space", "Spot", "Store", "make_store"]


class Store(Xattrs):
    """An open store; make one with `Store.open`."""

    def __init__(self, path: str, disk: Disk, parts: Opened) -> None:
        super().__init__(path, disk, parts)
        self._log = parts.log
        self._lock_file = parts.lock
        self.access_times = AccessTimes(self._memory)
        """What those who show access times remember of them."""
        if self._log is not None:
            self._log.requests = self.requests

    @classmethod
    def open(
        cls,
        path: str,
        *,
        writable: bool = True,
        as_of_ns: int | None = None,
        saved: bool = True,
        disk: Disk | None = None,
        settings: Settings | None = None,
    ) -> Self:
        """Open the store at *path*; `report` tells what recovery found.

        With *as_of_ns*, in ns since 1970, it is as it was then; this needs *writable* to be false. Without *saved* a
        table that the last stop has kept is verified, and not believed.

        Raises:
            NoStore, NotFound, NewerFormat, Busy, DiskFailure, StoreFull: as `opening.open_parts`.
        """
        disk = disk or Disk()
        parts = open_parts(path, disk, settings, writable=writable, as_of_ns=as_of_ns, saved=saved)
        store = cls(path, disk, parts)
        if writable:
            store._staging.clear()
        store._volumes.prefetch_names()
        return store

    # -- several processes ------------------------------------------------------------------------------------

    @classmethod
    def attach(
        cls,
        path: str,
        memory_descriptor: int,
        lock_descriptor: int | None,
        *,
        writable: bool = True,
        disk: Disk | None = None,
        settings: Settings | None = None,
    ) -> Self:
        """Go on with the store at *path* whose table another process has left in *memory_descriptor*, after an exec.

        Takes over both descriptors; *lock_descriptor* holds the store's lock.

        Raises:
            OtherLayout: a release with another layout of the table made it; nothing was touched.
            NoStore, NewerFormat, DiskFailure: as `opening.attach_parts`.
        """
        disk = disk or Disk()
        memory = Memory(memory_descriptor)
        parts = attach_parts(path, disk, settings, memory, lock_descriptor, writable=writable)
        return cls(path, disk, parts)

    @property
    def memory_descriptor(self) -> int:
        """The table, for `attach`."""
        return self._memory.descriptor

    @property
    def lock_descriptor(self) -> int | None:
        """What holds the store's lock, for `attach`."""
        return self._lock_file

    def after_fork(self) -> None:
        """Be a process of its own: in a child, before any other call; no other thread may be in the store meanwhile."""
        self._memory.after_fork()
        self._handles.after_fork()
        self._staging.after_fork()
        self._volumes.after_fork()
        self._images.after_fork()
        if self._log is not None:
            self._log.after_fork()

    @property
    def requester(self) -> int:
        """The row of the request that the next change is made for, or NOBODY; one change at a time."""
        return self._log.requester if self._log is not None else NOBODY

    @requester.setter
    def requester(self, row: int) -> None:
        if self._log is not None:
            self._log.requester = row

    def settle(self, worker: int, resent: Collection[Request]) -> list[Request]:
        """Settle what a worker that died had in hand, as `Requests.settle`; comes after `roll_forward`."""
        return self.requests.settle(worker, resent)

    def lock(self) -> AbstractContextManager[None]:
        """Be the only one who may change the store; a change takes it by itself."""
        return self._memory.lock()

    def try_lock(self) -> bool:
        """Become the only one who may change the store, if nobody is; then `unlock` must follow."""
        return self._memory.try_acquire()

    def unlock(self) -> None:
        """Leave what `try_lock` entered."""
        self._memory.release()

    def roll_forward(self) -> None:
        """Carry on what processes that were killed left half done, and drop what nobody has open any more.

        Raises:
            DiskFailure, StoreFull: as the disk says.
        """
        if self._log is None:
            with self._memory.lock():
                return

        def change(now_ns: int) -> None:
            for inode in self._staging.inodes():
                self._drop_unneeded(inode, now_ns)

        self._locked(change)

    def _drop_unneeded(self, inode: int, now_ns: int) -> None:
        """Within the lock: end what is staged of *inode* if no handle needs it, and an image that is nothing else."""
        slot = slot_of(inode)
        record = self._table.record(slot)
        if record.generation != inode >> 32:
            self._images.drop_staged(inode)  # killed before it was ended, and the slot was given away since
            return
        if not record.flags & Flag.STAGED:
            return
        if record.flags & Flag.UNBORN and record.live and not self._handles.writers(inode):
            with self._memory.change():
                self._table.delete_unborn(slot, now_ns)
        self._images.end_staging(inode)

    def close(self) -> None:
        """Make everything durable that was closed, write a checkpoint, keep the table, and let go of the store."""
        try:
            if self._log is not None:
                self.roll_forward()
                self._log.finish()
                save_table(self._disk, self.path, self._table, self.superblock.store_id, self._volumes, self.settings)
        finally:
            self.leave()

    def leave(self) -> None:
        """Free what this process has of the store; nothing is written, and other processes go on with it."""
        self.access_times.close()
        if self._log is not None:
            self._log.close()
        self._volumes.close()
        self._staging.close()
        self.requests.close()
        self._handles.close()
        self._memory.close()
        if self._lock_file is not None:
            self._disk.close(self._lock_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> Iterator[Checked | Damage]:
        """Read everything and verify every checksum: yield what is damaged, and how far the check is.

        Nobody else may change the store meanwhile, unless it was opened for reading.
        """
        # A daemon keeps its index whole; that it says more than can be read of a damaged volume is no fault of it.
        whole = not self.writable and owner(self.path, self._disk) is not None
        return check_volumes(self._table, self._volumes, self._disk, () if whole else self.report.rebuilt)

    def judge(self, reading: VolumeReading, *, upto: int) -> list[Damage] | None:
        """Return the damage that *reading* has found in a volume of this store, as `check` does.

        All that the store has there from where it began *upto* an offset must have been found. None: this store does
        not know so much of the volume, or nothing of it.
        """
        for entry in range(self._memory.words[Word.VOLUMES]):
            row = self._table.volume(entry)
            if row.volume_id == reading.volume.header.volume_id:
                return list(judge(self._table, entry, reading, upto=upto)) if row.end >= upto else None
        return None

    def needs(self, inode: int, volume_id: int, offset: int) -> bool:
        """Return whether *inode* is there and has its bytes, or its attributes, at that place, or may have them there.

        It may, if it was put behind the last checkpoint, and its needle is not whole.
        """
        for entry in range(self._memory.words[Word.VOLUMES]):
            if self._table.volume(entry).volume_id == volume_id:
                record, rare = self._table.record(slot_of(inode)), self._table.rare.get(slot_of(inode), inode >> 32)
                places = (record.volume, record.offset8), (rare.volume, rare.offset8)
                if record.live and record.generation == inode >> 32 and (entry, offset // ALIGNMENT) in places:
                    return True
                return may_need(self._table, entry, IndexRow(Kind.FILE, inode, offset))
        return False

    def contradictions(self) -> list[str]:
        """Return what a repair would put right though no bytes are damaged, a line for each kind; as `check`."""
        return contradictions(self._table, self._volumes)

    def usage(self) -> Usage:
        """Return what tells live bytes of the volumes from dead ones; the store is open for reading."""
        return Usage(self._disk, self._table, self._volumes, self.report.rebuilt)

    def reclaimer(
        self,
        *,
        retention_s: float = 0.0,
        live_share: float = 0.7,
        settle: Callable[[], bool] = lambda: True,
    ) -> Reclaimer:
        """Return what gives back the space of deleted images; see `reclaim.Limits`. ReadOnly."""
        checkpoint = functools.partial(self._images.writer().sync, final=True)
        directory = f"{self.path}/{VOLUMES}"
        settings = self.settings
        return Reclaimer(
            self._table,
            self._volumes,
            self._handles.slots,
            lambda: self._disk.space(directory),
            Compaction(self._disk, directory, self.superblock, self._table, self._volumes, checkpoint),
            Holes(self._disk, self._table, self._volumes, checkpoint),
            Limits(
                retention_s,
                lambda: emptied_ns(self._disk, self.path) / 1e9,
                live_share,
                settings.volume_bytes_max,
                settings.headroom_bytes,
                settle,
            ),
        )

    # -- room -------------------------------------------------------------------------------------------------

    def offer_room(self) -> None:
        """Say that this process gives space back when it is asked: `room_asked` and `answer_room` then tell."""
        self._memory.words[Word.ROOM_OFFERED] = 1

    def ask_for_room(self) -> int:
        """Ask whoever gives space back to do it now; return what `has_answered` takes, 0 if there is nobody."""
        words = self._memory.words
        if not words[Word.ROOM_OFFERED]:
            return 0
        words[Word.ROOM_ASKED] += 1
        return words[Word.ROOM_ASKED]

    def has_answered(self, asked: int) -> bool:
        """Return whether all was given back that could be since `ask_for_room` returned *asked*."""
        return self._memory.words[Word.ROOM_ANSWERED] >= asked

    def room_asked(self) -> int:
        """Return the last question that was not answered yet, 0 if there is none."""
        words = self._memory.words
        asked = words[Word.ROOM_ASKED]
        return asked if asked > words[Word.ROOM_ANSWERED] else 0

    def answer_room(self, asked: int) -> None:
        """Answer all questions up to *asked*."""
        words = self._memory.words
        words[Word.ROOM_ANSWERED] = max(words[Word.ROOM_ANSWERED], asked)

    # -- open images ------------------------------------------------------------------------------------------

    def open_image(
        self, inode: int, *, write: bool = False, truncate: bool = False, nowait: bool = False, row: int = NOBODY
    ) -> int:
        """Return a handle on the image *inode*; at most 4 MiB are verified before it returns.

        *row* is that of the request in hand: the handle is closed if its worker dies before it was answered.

        Raises:
            Damaged: its bytes are not those that were written.
            Stale, IsADirectory, TooManyOpen, ReadOnly: as the names say.
            WouldBlock: *nowait* is set and the disk is needed.
        """
        if write:
            self._images.writer()
        if not truncate:
            self._images.open(inode, nowait=nowait)
        handle = self.take_handle(inode, write=write, nowait=nowait, row=row)
        try:
            if truncate:
                self._locked(lambda _: self._images.truncate(inode, 0))
        except BaseException:
            self._handles.release(handle)
            raise
        return handle

    def create_image(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, creator: int = 0
    ) -> tuple[int, int]:
        """Make an empty image; return (inode, handle) to write it. It has its name at once, and a needle when flushed.

        *creator* is the process that `creator` will tell of until then.

        Raises:
            Exists, NotFound, NotADirectory, NameTooLong, StoreFull, TooManyOpen: as the names say.
        """

        def change(now_ns: int) -> tuple[int, int]:
            self._free_name(parent, name)
            self._images.writer().check_room(0)
            inode = self._new_inode()
            slot = slot_of(inode)
            owner = self._owner_index(uid, gid, mode)
            staged = Staged(inode, DIRTY, owner, 0, now_ns, now_ns, creator, len(name), name)
            number = self._staging.begin(staged)
            flags = Kind.FILE | Flag.STAGED | Flag.UNBORN
            value = self._table.hash(name) | inode >> 32 << 24
            record = Record(flags, 0, 0, slot_of(parent) + 1, 0, 0, 0, now_ns, seconds(now_ns), owner, value)
            handle = -1
            try:
                row = self.requester
                note = functools.partial(self.requests.opened, row) if row >= 0 else None
                handle = self._handles.open(inode, WRITE, note)
                with self._memory.change():
                    self._staging.publish(number, inode)
                    self._table.add_unborn(slot, record, now_ns)
                    self._applied(inode)
            except BaseException:
                if handle >= 0:
                    self._handles.release(handle)
                raise
            return inode, handle

        return self._locked(change)

    def creator(self, inode: int) -> int:
        """Return the process that created *inode*, if it said so and nothing of it was ever flushed; else 0. Stale."""
        if not self._images.record(inode).flags & Flag.UNBORN:
            return 0
        staged = self._images.staged(inode)
        return staged.creator if staged is not None else 0

    def read(self, handle: int, offset: int, size: int, *, nowait: bool = False) -> bytes | memoryview:
        """Return up to *size* bytes at *offset*. BadHandle, Damaged, WouldBlock."""
        return self._images.read(self._handles.get(handle)[0], offset, size, nowait=nowait)

    def write(self, handle: int, offset: int, data: Buffer, *, last_try: bool = True) -> int:
        """Write *data* at *offset* and return its length; readers see it, a crash forgets it until it is flushed.

        Without *last_try* an image that found the disk full may still be flushed: the write is tried again.

        BadHandle, TooLarge, StoreFull.
        """
        return self._images.write(handle, offset, data, last_try=last_try)

    def truncate(self, inode: int, size: int, *, at_once: bool = False) -> None:
        """Cut or extend the image *inode*; unless it is open for writing, it is flushed at once. As `write`; Stale.

        With *at_once* it is also flushed if it is open, but nothing was written since the last flush: it may be closed
        already, and the release on its way.
        """

        def change(_: int) -> None:
            if self._images.record(inode).kind != Kind.FILE:
                raise IsADirectory("only an image has bytes to cut")
            whole = at_once and not self._images.dirty_bytes(inode)
            try:
                self._images.truncate(inode, size)
                if whole or not self._handles.writers(inode):
                    self._images.commit(inode)
            finally:
                self._images.end_staging(inode)

        self._locked(change)

    def flush(self, handle: int) -> None:
        """Make what was written the image: the commit point of close(2).

        Raises:
            StoreFull, DiskFailure: the old image is whole.
        """
        inode, flags = self._handles.get(handle)
        if flags & WRITE:
            self._locked(lambda _: self._images.commit(inode))

    def flush_bytes(self, handle: int) -> int:
        """Return how many bytes `flush` would copy, 0 if it has nothing to do."""
        inode, flags = self._handles.get(handle)
        return self._images.dirty_bytes(inode) if flags & WRITE else 0

    def must_roll(self, size: int) -> bool:
        """Return whether a change of *size* bytes may have to wait until a full volume is sealed."""
        return self._log is not None and self._log.must_roll(size)

    def stage_bytes(self, handle: int) -> int:
        """Return how many bytes the next `write` would copy first: those of an image that is not being written yet."""
        return self.about_to_write(handle)[2]

    def fsync(self, handle: int) -> None:
        """`flush`, and make it durable.

        Raises:
            DiskFailure: the disk lost it, now or since it was flushed.
            StoreFull: as `flush`.
        """
        self.flush(handle)
        if self._log is not None:
            self.sync()
            self.check_kept(handle)

    def check_kept(self, handle: int) -> None:
        """Raise DiskFailure if the disk lost the image of *handle* with the end of a volume. BadHandle, Stale."""
        self._images.check_kept(self.handle_inode(handle))

    def release(self, handle: int) -> None:
        """Close *handle*; what was written since the last flush is flushed, or lost if the disk is full. BadHandle."""
        inode, flags = self._handles.get(handle)
        released = not flags & WRITE or not self._images.is_staged(inode)
        if released:
            # There is nothing to flush, so no lock is due. But who cuts it meanwhile leaves it to the last writer.
            self._handles.release(handle)
            if not (self._images.is_staged(inode) if flags & WRITE else self._images.is_left_over(inode)):
                return

        def change(now_ns: int) -> None:
            try:
                self._images.commit(inode)
            finally:
                if not released:
                    self._handles.release(handle)
                self._drop_unneeded(inode, now_ns)

        self._locked(change)

    def has_staged(self, handle: int) -> bool:
        """Return whether *handle* may write and its image is being written: then `release` takes a lock. BadHandle."""
        inode, flags = self._handles.get(handle)
        return bool(flags & WRITE) and self._images.is_staged(inode)

    def may_write(self, handle: int) -> bool:
        """Return whether *handle* was opened for writing. BadHandle."""
        return bool(self._handles.get(handle)[1] & WRITE)

    def handle_inode(self, handle: int) -> int:
        """Return the inode that *handle* is open on. BadHandle."""
        return self._handles.get(handle)[0]
