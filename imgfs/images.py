"""Writing the bytes of images: staged while written, one needle when flushed.

Owns what is staged of them when. Must not know names or directories; those are the store's.

*Concurrency:* writing and flushing hold the table's lock.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from imgfs.disk import Buffer
from imgfs.errors import (
    BadHandle,
    DiskFailure,
    ImgfsError,
    ReadOnly,
    Spoiled,
    StoreFull,
    TooLarge,
    TooManyOpen,
    disk_error,
)
from imgfs.format import ALIGNMENT, CHUNK_BYTES, IMAGE_BYTES_MAX, Kind, Needle, inode_of, slot_of
from imgfs.handles import WRITE, Handles
from imgfs.image_reading import ImageReading
from imgfs.layout import VOLUME_SEALED, Flag, Word
from imgfs.log import SMALL_BYTES, Log, Part
from imgfs.records import Record
from imgfs.staging import ATTRIBUTED, DIRTY, SPOILED, Staged, Staging, State, is_refused
from imgfs.table import Table
from imgfs.volumes import Volumes

# So much is staged anew where a writer goes on behind a flush.
_STAGED_ANEW_BYTES = 256 << 10
# What was written last is kept for its flush up to this size.
_KEPT_BYTES_MAX = 256 << 10
_NOTHING_WRITTEN = (-1, 0, b"")


class Images(ImageReading):
    """The bytes of all images of one store, to be read and written."""

    def __init__(self, table: Table, volumes: Volumes, handles: Handles, staging: Staging, log: Log | None) -> None:
        super().__init__(table, volumes, handles, staging)
        self._log = log
        # All that is staged in an entry, as it was when the table's counter stood there: entry, counter, bytes.
        self._written: tuple[int, int, bytes] = _NOTHING_WRITTEN
        if log is not None:
            log.unstage = self._unstage

    def writer(self) -> Log:
        """Return the log.

        Raises:
            ReadOnly: the store was opened for reading.
        """
        if self._log is None:
            raise ReadOnly("this store was opened read-only")
        return self._log

    def writing_inode(self, handle: int) -> int:
        """Return the inode of a handle that may write; BadHandle for any other."""
        inode, flags = self._handles.get(handle)
        if not flags & WRITE:
            raise BadHandle("this handle was not opened for writing")
        return inode

    def stage(self, inode: int, *, empty: bool = False) -> int:
        """Within the lock: return the staging entry of *inode*; a new one starts with the image's bytes, or *empty*."""
        number = self._staging.find(inode)
        if number >= 0:
            if not empty and is_refused(self._staging.state(number).flags):
                raise Spoiled("the disk was full when this image was written; open it again")
            return number
        record = self.record(inode)
        now = self.writer().now_ns()
        size = 0 if empty else record.size
        self.writer().check_room(size)
        entry = Staged(inode, DIRTY if empty else 0, record.owner, size, record.mtime_ns, now)
        return self._begin(entry, record, self._pieces(inode, record) if size else ())

    def _begin(self, entry: Staged, record: Record, pieces: Iterable[bytes] = ()) -> int:
        number = self._staging.begin(entry, pieces)
        with self._table.memory.change():
            self._staging.publish(number, entry.inode)
            self._table.set_flags(slot_of(entry.inode), record.flags | Flag.STAGED)
        return number

    def _pieces(self, inode: int, record: Record) -> Iterator[bytes]:
        whole = self.whole(inode, record)
        return self._volumes.get(record.volume).volume.pieces(whole.needle, whole.offset)

    def staged(self, inode: int) -> Staged | None:
        """Return what is staged of *inode*, None if it is not being written."""
        number = self._staging.find(inode)
        entry = self._staging.look(number) if number >= 0 else None
        return entry if entry is not None and entry.inode == inode else None

    def staged_state(self, inode: int) -> State | None:
        """Return the state of what is staged of *inode*, None if it is not being written."""
        if not self._table.record(slot_of(inode)).flags & Flag.STAGED:
            return None
        number = self._staging.find(inode)
        return self._staging.look_state(number, inode) if number >= 0 else None

    def write(self, handle: int, offset: int, data: Buffer, *, last_try: bool = True) -> int:
        """Stage *data* at *offset* of an image open for writing; return its length.

        With *last_try* an image that found the disk full is not flushed any more.

        Raises:
            BadHandle: the handle cannot write.
            TooLarge: past 4 GiB - 1.
            StoreFull: no room; what was staged before stays. Spoiled: with *last_try*, or once that was so.
        """
        inode = self.writing_inode(handle)
        end = offset + len(data)
        if end > IMAGE_BYTES_MAX:
            raise TooLarge("an image has at most 4 GiB - 1 bytes")
        log = self.writer()
        with log.lock():
            try:
                log.check_room(len(data))
                number = self.stage(inode)
                size = self._staging.state(number).size
                if offset > size:
                    self._staging.truncate(number, size)  # a killed writer may have left bytes behind the end
                self._staging.write(number, offset, data)
            except OSError as error:
                raise self._refused(inode, disk_error(error, "staging"), last_try=last_try) from error
            except StoreFull as error:
                raise self._refused(inode, error, last_try=last_try) from None
            self._dirty(number, max(size, end))
            if not offset and size <= end <= _KEPT_BYTES_MAX:
                self._written = number, self._table.memory.words[Word.COUNTER], bytes(data)
        return len(data)

    def truncate(self, inode: int, size: int) -> None:
        """Within the lock: cut or extend what is staged of *inode* to *size* bytes. TooLarge, StoreFull as `write`."""
        if size > IMAGE_BYTES_MAX:
            raise TooLarge("an image has at most 4 GiB - 1 bytes")
        number = self.stage(inode, empty=size == 0)
        old = self._staging.state(number).size
        if size > old:
            self.writer().check_room(size - old)
            self._staging.truncate(number, old)  # as in `write`
            self._staging.truncate(number, size)
            self._dirty(number, size)
        else:
            # The entry first: a file that is longer than its entry says is harmless, a shorter one lacks bytes.
            self._dirty(number, size)
            self._staging.truncate(number, size)

    def _refused(self, inode: int, failure: ImgfsError, *, last_try: bool) -> ImgfsError:
        """Return what a write that met *failure* raises, the image being spoiled if there is no other try."""
        full = isinstance(failure, StoreFull)
        if full and not last_try:
            return failure
        self._spoil(inode)
        return Spoiled(str(failure)) if full else failure

    def _spoil(self, inode: int) -> None:
        """Keep what lacks a write from becoming the image: whoever ignores the error must not lose the old one."""
        number = self._staging.find(inode)
        if number >= 0:
            state = self._staging.state(number)
            self._staging.update(number, state._replace(flags=state.flags | SPOILED))
        else:
            record = self.record(inode)
            with suppress(TooManyOpen):
                self._begin(Staged(inode, SPOILED, record.owner, 0, record.mtime_ns, self.writer().now_ns()), record)

    def _dirty(self, number: int, size: int) -> None:
        now = self.writer().now_ns()
        flags, owner, _, _, _ = self._staging.state(number)
        flags = flags | DIRTY if size else (flags | DIRTY) & ~SPOILED
        self._staging.update(number, (flags, owner, size, now, now))

    def set_staged(self, inode: int, *, owner: int | None = None, mtime_ns: int | None = None) -> None:
        """Within the lock: change what the needle of a dirty image will say."""
        number = self._staging.find(inode)
        state = self._staging.state(number)
        self._staging.update(
            number,
            state._replace(
                owner=state.owner if owner is None else owner,
                mtime_ns=state.mtime_ns if mtime_ns is None else mtime_ns,
                ctime_ns=self.writer().now_ns(),
            ),
        )

    def dirty_bytes(self, inode: int) -> int:
        """Return how many bytes a flush of *inode* would copy, 0 if it has nothing to do, nor to refuse."""
        state = self.staged_state(inode)
        return state.size + 1 if state is not None and state.flags & (DIRTY | SPOILED) else 0

    def commit(self, inode: int) -> None:
        """Within the lock: if *inode* is dirty, make what is staged the image, in one needle.

        What is staged is ended in the same step, at half the cost, if its only writer would find little to stage anew:
        behind a flush, that of an fsync too, mostly nothing comes but a close.

        An image that was unlinked meanwhile is left as it is: nobody can find it after a crash.

        Raises:
            StoreFull, DiskFailure: as `Log.append`, Spoiled if a write had found the disk full; the old image is
                whole, and what is staged stays.
        """
        if not self._table.record(slot_of(inode)).flags & Flag.STAGED:
            return
        number = self._staging.find(inode)
        if number < 0:
            return
        flags, owner, size, mtime_ns, ctime_ns = self._staging.state(number)
        if not flags & (DIRTY | SPOILED):
            return
        record = self.record(inode)
        if not record.live:
            return
        if flags & SPOILED:
            raise Spoiled("the disk was full when this image was written; the old one stays")
        uid, gid, mode = self._table.owner(owner)
        parent, name = self.own_name(inode, record)
        needle = Needle(record.kind, inode, parent, name, size, mode, uid, gid, 0, mtime_ns, ctime_ns)
        second = None
        if flags & ATTRIBUTED:
            attributes = self.waiting_attributes(inode)
            second = Part(Needle(Kind.XATTR, inode, data_size=len(attributes)), [attributes], None)
        if size <= SMALL_BYTES:
            ended = size <= _STAGED_ANEW_BYTES and self._handles.writers(inode) == 1
            data = self._small(number, size)
            self.writer().append(needle, [data] if data else [], second=second, staged=number, ended=ended)
            if ended:
                self._staging.free(number)
        else:
            pieces = self._staged_pieces(number, size)
            self.writer().append(needle, [], large=pieces, second=second, staged=number)

    def _small(self, number: int, size: int) -> bytes:
        """Within the lock: return the *size* bytes that are staged in entry *number*.

        Mostly one write brought all of them, and nothing was changed since: then they need not be read again.
        """
        entry, counter, data = self._written
        self._written = _NOTHING_WRITTEN
        if entry == number and counter == self._table.memory.words[Word.COUNTER]:
            return data
        data = self._staging.read(number, 0, size)
        return data + bytes(size - len(data)) if len(data) < size else data  # the file may be sparse at its end

    def _unstage(self, number: int, ended: bool) -> None:
        """Within `Memory.change`: needles hold what is in entry *number*; if it is *ended* nobody finds it any more."""
        if not ended:
            self._staging.clean(number)
            return
        inode = self._staging.withdraw(number)
        slot = slot_of(inode)
        self._table.set_flags(slot, self._table.record(slot).flags & ~Flag.STAGED)

    def waiting_attributes(self, inode: int) -> bytes:
        """Return the packed extended attributes that wait for the first needle of *inode*.

        Raises:
            DiskFailure: they cannot be read, perhaps because that needle came meanwhile.
        """
        number = self._staging.find(inode)
        if number < 0 or not self._staging.state(number).flags & ATTRIBUTED:
            return b""
        try:
            return self._staging.attributes(number)
        except OSError as error:
            raise disk_error(error, "staging") from error

    def own_name(self, inode: int, record: Record) -> tuple[int, bytes]:
        """Return directory and name of *inode*, which has *record*; 0 and nothing if only links name it."""
        directory = record.parent - 1
        parent = inode_of(directory, self._table.record(directory).generation)
        number = self._staging.find(inode) if record.flags & Flag.UNBORN else -1
        if number >= 0:
            return parent, self._staging.name(number)
        if not record.name_offset:
            return parent, b""
        return parent, self._volumes.get(record.name_volume).names.get(record.name_offset)

    def _staged_pieces(self, number: int, size: int) -> Iterator[bytes]:
        for at in range(0, size, CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, size - at)
            piece = self._staging.read(number, at, wanted)
            yield piece + bytes(wanted - len(piece))

    def drop_staged(self, inode: int) -> None:
        """Within the lock: forget what is staged of *inode*, which was put anew; its writers go on from there."""
        number = self._staging.find(inode)
        if number >= 0:
            self._end(number, inode, self._table.record(slot_of(inode)))

    def _end(self, number: int, inode: int, record: Record) -> None:
        """Forget entry *number*, which is that of *inode*, and in the same step that it was staged.

        *record* is what stands in its slot, which may have been given away.
        """
        with self._table.memory.change():
            self._staging.withdraw(number)
            if record.generation == inode >> 32:
                self._table.set_flags(slot_of(inode), record.flags & ~Flag.STAGED)
        self._staging.free(number)

    def is_staged(self, inode: int) -> bool:
        """Return whether *inode* is being written, or the slot it had belongs to another."""
        record = self._table.whole_record(slot_of(inode))
        return record.flags & Flag.STAGED != 0 or record.generation != inode >> 32

    def is_left_over(self, inode: int) -> bool:
        """Return whether *inode* is unlinked and something is staged of it still, for those who have it open."""
        record = self._table.whole_record(slot_of(inode))
        return not record.live and bool(record.flags & Flag.STAGED) and record.generation == inode >> 32

    def end_staging(self, inode: int) -> None:
        """Within the lock: forget what is staged of *inode*, once nobody can write to it or, unlinked, read it."""
        slot = slot_of(inode)
        record = self._table.record(slot)
        if record.generation == inode >> 32:
            if not record.flags & Flag.STAGED:
                return
            if self._handles.writers(inode) if record.live else self._handles.in_use(slot):
                return
        number = self._staging.find(inode)
        if number >= 0:
            self._end(number, inode, record)

    # -- after a sync that failed -----------------------------------------------------------------------------

    def check_kept(self, inode: int) -> None:
        """Raise DiskFailure if what was flushed of *inode* lies behind the end of its volume: a sync failed. Stale."""
        if self._lies_behind(inode):
            self._table.memory.pass_through(nowait=False)  # what was stored again may just be moving there
        if self._lies_behind(inode):
            raise DiskFailure(f"the disk lost what was written to inode {inode:#x}")

    def _lies_behind(self, inode: int) -> bool:
        record = self.record(inode)
        row = self._table.volume(record.volume)
        has_data = not record.flags & Flag.UNBORN and record.kind != Kind.DIRECTORY
        return has_data and row.flags & VOLUME_SEALED != 0 and record.offset8 * ALIGNMENT >= row.end
